"""The command line: what each type reads, what is refused and how, and what the process then returns."""

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Literal

import pytest

import cli


@dataclass
class Args:
    model: str  # folder of the model
    max_steps: int = 1000  # number of updates, 100 % of them
    lr: float = 1e-3  # peak: the learning rate  # said twice
    compile: bool = False  # compile it
    keep_best: bool = True  # keep the best one
    head_dim: int | None = None  # width of a head
    schedule: Literal["cosine", "linear"] = "cosine"  # shape
    power: Literal[1, 2] = 1  # exponent
    data: list[str] = field(default_factory=lambda: ["stdlib"])  # files
    betas: list[float] | None = None  # decays
    plain: str = "x"


def parse(*argv):
    return cli.parse(Args, "what it does", ["--model", "m", *argv])


def test_defaults_are_the_dataclass_defaults():
    assert parse() == Args("m")
    assert parse().data is not parse().data


@pytest.mark.parametrize("argv, name, value", [
    (["--max_steps", "7"], "max_steps", 7),
    (["--max-steps", "7"], "max_steps", 7),
    (["--max-steps=7"], "max_steps", 7),
    (["--max_steps=-7"], "max_steps", -7),
    (["--lr", "-1e-3"], "lr", -1e-3),
    (["--lr", "3"], "lr", 3.0),
    (["--compile"], "compile", True),
    (["--no_keep_best"], "keep_best", False),
    (["--no-keep-best"], "keep_best", False),
    (["--no-keep_best"], "keep_best", False),
    (["--no_keep_best", "--keep-best"], "keep_best", True),
    (["--head_dim", "8"], "head_dim", 8),
    (["--schedule", "linear"], "schedule", "linear"),
    (["--power", "2"], "power", 2),
    (["--data", "a", "b c", "-d"], "data", ["a", "b c", "-d"]),
    (["--betas", "0.9", "0.95"], "betas", [0.9, 0.95]),
    (["--plain=--max-steps=3"], "plain", "--max-steps=3"),
    (["--plain", "a=b-c_d"], "plain", "a=b-c_d"),
    (["--plain", "-some text"], "plain", "-some text"),
    (["--plain=-hello"], "plain", "-hello"),
    (["--plain", ""], "plain", ""),
    (["--plain", "a", "--plain", "b"], "plain", "b"),
])
def test_a_flag_sets_its_field_and_no_other(argv, name, value):
    expected = Args("m")
    setattr(expected, name, value)
    assert parse(*argv) == expected
    assert type(getattr(parse(*argv), name)) is type(value)


@pytest.mark.parametrize("argv, words", [
    (["--max_stps", "7"], ["--max_stps", "did you mean --max_steps?"]),
    (["--no_keep_bst"], ["did you mean --no_keep_best?"]),
    (["--max", "7"], ["unknown flag --max;"]),  # no abbreviations: a later flag would change their meaning
    (["--qwertyuiop=1"], ["unknown flag --qwertyuiop; see --help"]),
    (["--max_steps", "many"], ["--max_steps", "int", "'many'"]),
    (["--max_steps", "1.5"], ["--max_steps", "int", "'1.5'"]),
    (["--max_steps", ""], ["--max_steps", "int"]),
    (["--max_steps"], ["--max_steps", "expected one argument"]),
    (["--lr", "fast"], ["--lr", "float", "'fast'"]),
    (["--schedule", "cosinus"], ["--schedule", "cosinus", "cosine", "linear"]),
    (["--power", "3"], ["--power", "3"]),
    (["--data"], ["--data", "at least one"]),
    (["--betas", "0.9", "x"], ["--betas", "float", "'x'"]),
    (["--compile=yes"], ["--compile", "yes"]),
    (["stray"], ["unexpected argument 'stray'"]),
    (["--compile", "true"], ["unexpected argument 'true'"]),
    (["-x"], ["unexpected argument '-x'"]),
])
def test_bad_flags_are_one_clear_line(argv, words):
    with pytest.raises(ValueError) as error:
        parse(*argv)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_a_field_without_default_is_required():
    with pytest.raises(ValueError, match="required: --model"):
        cli.parse(Args, None, [])


def test_help_is_the_comments_and_each_default_once(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.index("what it does") < text.index("--model STR folder of the model (required)")
    assert "--max_steps INT number of updates, 100 % of them (default: 1000)" in text
    assert "peak: the learning rate # said twice (default: 0.001)" in text
    assert "keep the best one (default: True) --head_dim INT" in text
    assert "compile it (default: False)" in text
    assert "{cosine,linear} shape (default: cosine)" in text
    assert "files (default: ['stdlib'])" in text
    assert text.endswith("--plain STR (default: x)")


SCRIPT = """
    import sys
    sys.path.insert(0, {root!r})
    import cli
    def main():
        {body}
    cli.run(main)
"""


def process(tmp_path, body, **environment):
    """A Python process running `cli.run(main)`, where main is `body`."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(root=os.path.dirname(cli.__file__), body=body))
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, **environment})


@pytest.mark.parametrize("body, code, stderr", [
    ("raise ValueError('bad\\n  line 2')", 2, "error: bad line 2\n"),
    ("open('no/such/file')", 2, "error: [Errno 2] No such file or directory: 'no/such/file'\n"),
    ("raise OSError(28, 'No space left on device', 'out')", 2, "error: [Errno 28] No space left on device: 'out'\n"),
    ("raise KeyboardInterrupt", 2, "error: interrupted\n"),
    ("raise KeyboardInterrupt('saved; go on with --resume auto')", 2, "error: saved; go on with --resume auto\n"),
    ("return None", 0, ""),
    ("return 1", 1, ""),
    ("sys.exit(3)", 3, ""),
])
def test_how_a_run_ends(tmp_path, body, code, stderr):
    run = process(tmp_path, body)
    assert run.communicate(timeout=60) == ("", stderr)
    assert run.returncode == code


def test_a_bug_keeps_its_traceback(tmp_path):
    run = process(tmp_path, "raise KeyError('x')")
    assert "Traceback" in run.communicate(timeout=60)[1] and run.returncode == 1


def test_a_traceback_can_be_asked_for(tmp_path):
    run = process(tmp_path, "raise ValueError('bad')", GLASSBOX_TRACEBACK="1")
    error = run.communicate(timeout=60)[1]
    assert "Traceback" in error and "ValueError: bad" in error and run.returncode == 1


def test_output_before_an_error_is_not_lost(tmp_path):
    run = process(tmp_path, "print('so far'); raise ValueError('bad')")
    assert run.communicate(timeout=60) == ("so far\n", "error: bad\n")


@pytest.mark.parametrize("body", [
    "[print('line', flush=True) for _ in range(100_000)]",  # noticed while printing
    "import time; sys.stdin.readline(); print('one short line')",  # noticed only when the buffer is flushed at the end
])
def test_a_reader_that_goes_away_is_no_error(tmp_path, body):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT).format(root=os.path.dirname(cli.__file__), body=body))
    pipe = subprocess.PIPE
    run = subprocess.Popen([sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=pipe,
                           env={**os.environ, "PYTHONUNBUFFERED": ""})
    run.stdout.close()
    run.stdin.close()
    assert run.stderr.read() == b""
    assert run.wait(timeout=60) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to a single process")
def test_ctrl_c_is_one_line(tmp_path):
    # A test suite that a shell runs in the background inherits an ignored SIGINT, and so would the child.
    listen = "import signal, time; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = process(tmp_path, f"{listen}; print('ready', flush=True); time.sleep(60)")
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGINT)
    assert run.communicate(timeout=60) == ("", "error: interrupted\n")
    assert run.returncode == 2


def test_the_file_stays_under_100_lines():
    with open(cli.__file__, encoding="utf-8") as file:
        assert len(file.readlines()) < 100
