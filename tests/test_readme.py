"""What README.md says, checked: its tables, its files, its tests, its flags."""

import re
from dataclasses import fields
from pathlib import Path

import train_dpo
import train_pretrain
import train_sft
from bench import readme_tables

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_are_those_of_the_results():
    assert README == readme_tables.filled(README)


def test_every_file_and_test_that_is_named_exists():
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", README):
        assert f"def {name}(" in tests, name
    for file, name in re.findall(r"`([\w/]+\.py)`, `(\w+)`", README):
        assert re.search(rf"^(def|class) {name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), (file, name)


def test_every_flag_in_a_recipe_is_a_flag():
    for stage in (train_pretrain, train_sft, train_dpo):
        known = {field.name for field in fields(stage.Args)}
        for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL):
            for command in re.findall(rf"(?:python|torchrun --nproc_per_node \d+) {stage.__name__}\.py((?:[^\n]*\\\n)*[^\n]*)", block):
                for flag in re.findall(r"--(\w+)", command):
                    assert flag in known, (stage.__name__, flag)


def test_every_file_of_the_tour_is_toured():
    for path in (*ROOT.glob("*.py"), *(ROOT / "data").glob("*.py")):
        if path.name != "__init__.py":
            assert f"`{path.relative_to(ROOT).as_posix()}`" in README, path
