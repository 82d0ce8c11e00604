"""The rules of the house, checked on the source itself: which file may import what, and which stand alone."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"torch", "triton", "numpy", "sentencepiece", "tiktoken", "pytest"} | {"regex", "jinja2"}  # the last two come along
FOLDERS = ("kernels", "parallel", "data")
GROUND = {"optim", "logprobs", "cli", "quant", "lora", "metrics", "adapters", "sandbox", "moe", "hf_config", "flags", "tensor_files"}  # import nothing of the project
LEVEL = {"model": 1, "checkpoint": 2, "calibrate": 3, "generate": 3, "evaluate": 3, "convert": 3, "serve": 3,
         "sample_pairs": 3, "shards": 3}  # imports go down
LEVEL_OF_STAGES = 4
ENTRY = {"data/prepare.py", "data/chat.py", "parallel/__init__.py", "parallel/ledger.py"}  # may import siblings, lazily
FILES = sorted(path.relative_to(ROOT).as_posix() for path in (*ROOT.glob("*.py"), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))))
LIFTABLE = [f for f in FILES if (f.split("/")[0] in FOLDERS and f not in ENTRY and not f.endswith("__init__.py"))
            or f in ("model.py", "moe.py", "hf_config.py", "tensor_files.py", "lora.py", "adapters.py", "quant.py", "logprobs.py",
                     "optim.py", "sandbox.py", "cli.py", "metrics.py")]


def imports(file: str) -> list[tuple[str, bool]]:
    """(module, whether it is imported when the file is) of every import statement."""
    tree, found = ast.parse((ROOT / file).read_text(encoding="utf-8")), []
    late = [f for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef))]
    late += [f for f in tree.body if isinstance(f, ast.If) and "__main__" in ast.unparse(f.test)]
    inside = {id(node) for f in late for node in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import cannot be lifted out"
            found.append((node.module, id(node) not in inside))
    return found


def ours(module: str) -> str | None:
    """The project's file that a module is, or None."""
    path = module.replace(".", "/") + ".py"
    return path if path in FILES else module + "/__init__.py" if module + "/__init__.py" in FILES else None


def level(file: str) -> int:
    name = file.removesuffix(".py")
    if name.startswith("train_"):
        return LEVEL_OF_STAGES
    return 0 if name in GROUND or "/" in name else LEVEL[name]


def test_every_file_has_its_place():
    for file in FILES:
        level(file)  # KeyError: a file that the design does not know


@pytest.mark.parametrize("file", FILES)
def test_only_the_allowed_packages_are_imported(file):
    for module, _ in imports(file):
        top = module.split(".")[0]
        assert top in PACKAGES or top in sys.stdlib_module_names or ours(module), f"{file} imports {module}"


@pytest.mark.parametrize("file", FILES)
def test_imports_point_one_way(file):
    for module, at_import in imports(file):
        target = ours(module)
        if target is None:
            continue
        if file in ENTRY:
            assert not at_import, f"{file}: an entry point imports {target} lazily"
        elif target.startswith("kernels/"):
            assert not at_import or level(file) > 0
        else:
            same_level = level(file) == level(target) == LEVEL["generate"]  # there a circle is excluded below
            assert level(target) < level(file) or same_level, f"{file} may not import {target}"


def test_there_is_no_circle():
    graph = {file: {target for module, at_import in imports(file) if at_import and (target := ours(module))} for file in FILES}
    while graph:
        leaves = [file for file, targets in graph.items() if not targets & graph.keys()]
        assert leaves, f"a circle of imports among {sorted(graph)}"
        for file in leaves:
            del graph[file]


@pytest.mark.parametrize("file", FILES)
def test_no_pickle_is_read_or_written(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    names = {module.split(".")[0] for module, _ in imports(file)}
    assert not names & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    for call in ("torch.load(", "torch.save(", "allow_pickle=True", "all_gather_object(", "broadcast_object_list(", "gather_object("):
        assert call not in text, f"{file} calls {call}"


@pytest.mark.parametrize("file", [f for f in FILES if "/" in f])
def test_no_file_in_a_folder_bears_a_name_of_the_standard_library(file):
    assert Path(file).stem == "__init__" or Path(file).stem not in sys.stdlib_module_names


@pytest.mark.parametrize("file", LIFTABLE)
def test_file_lifted_alone_into_an_empty_folder_runs_there(file, tmp_path):
    """Imported with nothing of the project in reach, in a process of its own that writes no file and starts no thread pool."""
    shutil.copy(ROOT / file, tmp_path / Path(file).name)
    script = f"import {Path(file).stem} as lifted; print(sorted(n for n in vars(lifted) if not n.startswith('_'))[0])"
    done = subprocess.run([sys.executable, "-B", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in tmp_path.iterdir()] == [Path(file).name]


DEMONSTRATED = [f for f in LIFTABLE if "\nif __name__" in (ROOT / f).read_text(encoding="utf-8")
                and f not in ("metrics.py", "sandbox.py")]  # these two ask for arguments


@pytest.mark.parametrize("file", DEMONSTRATED)
def test_lifted_file_runs_its_own_demonstration(file, tmp_path):
    shutil.copy(ROOT / file, tmp_path / Path(file).name)
    done = subprocess.run([sys.executable, "-B", Path(file).name], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


@pytest.mark.parametrize("file", [f for f in FILES if f.startswith("train_")])
def test_no_file_imports_a_stage(file):
    for other in FILES:
        assert file.removesuffix(".py") not in {module for module, _ in imports(other)}, f"{other} imports {file}"


def test_stages_stay_within_a_reader_s_sitting():
    for file in FILES:
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        limit = {"cli.py": 99, "train_ppo.py": 450, "data/tokenizer.py": 720}.get(file, 350 if file.startswith("train_") else 600)
        assert lines <= limit, f"{file} has {lines} lines"
