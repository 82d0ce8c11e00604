"""Each way in which a program has tried to pass without being right, by name; and right programs, which must pass."""

import gzip
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import sandbox
from sandbox import check_solution, run_batch, run_program

TEST = "assert add(1, 2) == 3\nassert add(-1, 1) == 0"
RIGHT = "def add(a, b):\n    return a + b\n"
linux = pytest.mark.skipif(sys.platform != "linux", reason="what the kernel refuses is Linux's promise")

# Each of these is followed by nothing: the program alone must not pass. `add` is wrong or never comes to be asked.
HOSTILE = {
    "exit 0": "import sys\nsys.exit(0)",
    "exit 0 inside the function": "def add(a, b):\n    raise SystemExit(0)",
    "os._exit": "import os\nos._exit(0)",
    "os._exit inside the function": "import os\ndef add(a, b):\n    os._exit(0)",
    "exit from a thread": "import os, threading, time\ndef add(a, b):\n    threading.Thread(target=os._exit, args=(0,)).start()\n    time.sleep(30)",
    "exit in atexit": "import atexit, os, sys\natexit.register(os._exit, 0)\nsys.exit(1)",
    "forged success on stdout": "print('passed')\nprint('[\"passed\", \"\", \"\"]')\nimport os\nos._exit(0)",
    "forged success on every descriptor": (
        "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'[\"passed\", \"\", \"\"]\\n')\n    except OSError:\n        pass\nos._exit(0)"),
    "forged answers": ("import os\nfor fd in range(3, 64):\n    try:\n        os.write(fd, b'[null, true]\\n' * 100)\n    except OSError:\n        pass\n"
                       "def add(a, b):\n    return None"),
    "an object equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "    def __bool__(self): return True\ndef add(a, b):\n    return Any()"),
    "an int equal to everything": "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef add(a, b):\n    return Any(7)",
    "a list of objects equal to everything": "class Any:\n    def __eq__(self, other): return True\ndef add(a, b):\n    return [Any()]",
    "builtins replaced": "import builtins\nbuiltins.AssertionError = Warning\nbuiltins.all = lambda x: True\ndef add(a, b):\n    return None",
    "the caller's frames searched": (
        "import sys, gc\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n        f.f_globals.update(AssertionError=Warning)\n        f = f.f_back\n"
        "    return next((o for o in gc.get_objects() if isinstance(o, str) and 'assert add' in o), None)"),
    "the sandbox's own module patched": (
        "import sys\nmain = sys.modules['__main__']\nmain._judge = main._pack = main.check_solution = lambda *a, **k: True\ndef add(a, b):\n    return None"),
    "StopIteration": "def add(a, b):\n    raise StopIteration",
    "fork": "import os\nos.fork()\n" + RIGHT,
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except BaseException:\n        pass",
    "fork that leaves the parent early": "import os, time\nif os.fork():\n    os._exit(0)\nos.setsid()\ntime.sleep(1000)",
    "daemon by double fork": "import os, time\nif not os.fork():\n    os.setsid()\n    if not os.fork():\n        time.sleep(1000)\n    os._exit(0)\n" + RIGHT,
    "subprocess": "import subprocess\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\n" + RIGHT,
    "shell": "import os\nos.system('sleep 1000 &')\n" + RIGHT,
    "exec": "import os\nos.execv('/bin/true', ['true'])\n" + RIGHT,
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start()\n" + RIGHT,
    "socket": "import socket\nsocket.socket()\n" + RIGHT,
    "socket whose refusal is caught": "import socket\ntry:\n    socket.create_connection(('127.0.0.1', 80), 1)\nexcept BaseException:\n    pass\n" + RIGHT,
    "kill the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n" + RIGHT,
    "kill every process": "import os, signal\nos.kill(-1, signal.SIGKILL)\n" + RIGHT,
    "kill itself": "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n" + RIGHT,
    "kill by the group": "import os, signal\nos.killpg(0, signal.SIGTERM)\n" + RIGHT,
    "ctypes": "import ctypes\nctypes.CDLL(None).fork()\n" + RIGHT,
    "infinite loop": "while True:\n    pass",
    "infinite loop in the function": "def add(a, b):\n    while True:\n        pass",
    "sleep": "import time\ntime.sleep(1000)",
    "deaf to signals": "import signal\nfor s in range(1, 65):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "memory bomb in one piece": "x = 'a' * (1 << 40)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10 ** 9)\ndef add(a, b):\n    return add(b, a)",
    "output flood": "while True:\n    print('x' * 10000)",
    "output flood that ends": "print('x' * (1 << 21))\n" + RIGHT,
    "output flood on stderr whose error is caught": (
        "import os\ntry:\n    while True:\n        os.write(2, b'x' * 65536)\nexcept OSError:\n    pass\n" + RIGHT),
    "answer flood": "def add(a, b):\n    return 'x' * (1 << 25)",
    "answer nested too deep": "x = []\nfor _ in range(100000):\n    x = [x]\ndef add(a, b):\n    return x",
    "answer without end": "import itertools\ndef add(a, b):\n    return itertools.count()",
    "descriptor flood": "import os\nfds = []\nwhile True:\n    fds.append(os.pipe())",
    "write a file": "open('left_behind.txt', 'w').write('x')\n" + RIGHT,
    "write by os.open": "import os\nos.open('/tmp/left_behind.txt', os.O_CREAT | os.O_RDWR)\n" + RIGHT,
    "temporary file": "import tempfile\ntempfile.mkstemp()\n" + RIGHT,
    "make a folder": "import os\nos.mkdir('/tmp/left_behind')\n" + RIGHT,
    "remove a file": "import os\nos.remove('/tmp/some_file_of_the_user')\n" + RIGHT,
    "channel closed": "import os\nos.closerange(3, 64)\n" + RIGHT,
    "syntax error": "def add(a, b)\n    return a + b",
    "no such function": "def plus(a, b):\n    return a + b",
    "wrong answer": "def add(a, b):\n    return a - b",
    "right once": "def add(a, b):\n    return 3",
    "exception": "def add(a, b):\n    raise ValueError('no')",
    "nothing": "",
    "null bytes": "\0",
}


def processes_of(text: str) -> list[str]:
    """Command lines of living processes that contain `text`; zombies have none."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in line and int(path.parent.name) != os.getpid():
            found.append(line)
    return found


def children() -> list[str]:
    """Processes of this test run's sandboxes that live, waiting a moment for a killed one to be gone."""
    for _ in range(400):
        if not (alive := [line for role in ("--judge", "--candidate") for line in processes_of("sandbox.py " + role)]):
            return []
        time.sleep(0.05)
    return alive


def without(guards: dict[str, str], folder: Path) -> str:
    """Path of a copy of sandbox.py in which each piece of source is replaced by another."""
    source = Path(sandbox.__file__).read_text(encoding="utf-8")
    for old, new in guards.items():
        assert source.count(old) == 1
        source = source.replace(old, new)
    (folder / "sandbox.py").write_text(source, encoding="utf-8")
    return str(folder / "sandbox.py")


NO_NAMESPACES = {"if file := _isolate():": "if file := None:"}
NO_SECCOMP = {"filtered = _filter_system_calls()": "filtered = False"}
NO_HOOK = {"    sys.addaudithook(_hook())\n": ""}


@pytest.fixture(scope="module")
def hostile_results(tmp_path_factory):
    """Every hostile program run once, two at a time, in a folder of its own, which is returned too."""
    folder, home = tmp_path_factory.mktemp("scratch"), os.getcwd()
    os.chdir(folder)
    try:
        jobs = [dict(program=program, test=TEST, timeout=1.0, memory_bytes=256 << 20) for program in HOSTILE.values()]
        return dict(zip(HOSTILE, run_batch(check_solution, jobs, workers=2))), folder
    finally:
        os.chdir(home)


@linux
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_fails(name, hostile_results):
    result = hostile_results[0][name]
    assert result.passed is False and result.status != "passed", result


@linux
def test_nothing_survives_hostile_programs(hostile_results):
    assert children() == [] and processes_of("sleep 1000") == []
    assert os.listdir(hostile_results[1]) == []
    assert not os.path.lexists("/tmp/left_behind") and not os.path.lexists("/tmp/left_behind.txt")


@linux
@pytest.mark.parametrize("missing", [NO_NAMESPACES, NO_NAMESPACES | NO_SECCOMP, NO_NAMESPACES | NO_HOOK],
                         ids=["as in a container", "as on macOS", "no hook either"])
def test_fewer_guards_hold_too(missing, monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "__file__", without(missing, tmp_path))
    names = [name for name in HOSTILE if HOSTILE[name].endswith(RIGHT)]  # those that would pass if nobody minded
    names.remove("channel closed")
    jobs = [dict(program=HOSTILE[name], test=TEST) for name in names]
    results = run_batch(check_solution, jobs, workers=2)
    assert {result.status for result in results} <= {"forbidden", "flooded"}, dict(zip(names, results))
    assert check_solution(RIGHT, TEST).passed
    assert children() == [] and processes_of("sleep 1000") == []


@linux
def test_verdicts_say_why(hostile_results):
    results = hostile_results[0]
    for name, status in {"exit 0": "exited", "os._exit inside the function": "exited", "fork": "forbidden", "subprocess": "forbidden",
                         "socket": "forbidden", "write a file": "forbidden", "infinite loop": "timeout", "sleep": "timeout",
                         "output flood": "flooded", "output flood that ends": "flooded", "answer flood": "flooded",
                         "wrong answer": "failed", "an object equal to everything": "failed", "memory bomb in one piece": "failed"}.items():
        assert results[name].status == status, (name, results[name])
    assert results["wrong answer"].detail == "AssertionError in line 1 of the test: assert add(1, 2) == 3"
    assert results["right once"].detail == "AssertionError in line 2 of the test: assert add(-1, 1) == 0"
    assert results["fork"].detail == "refused: os.fork"
    assert "no plain data" in results["an object equal to everything"].detail
    assert "ValueError: no" in results["exception"].detail
    assert "add" in results["no such function"].detail


@linux
@pytest.mark.skipif(os.uname().machine not in ("x86_64", "aarch64"), reason="seccomp's table knows x86-64 and arm64")
@pytest.mark.parametrize("call", ["os.fork()", "os.posix_spawn('/bin/true', ['true'], {})", "os.execv('/bin/true', ['true'])",
                                  "__import__('socket').socket()", "__import__('socket').socketpair()", "os.kill(os.getppid(), 15)",
                                  "os.setsid()", "os.open('/tmp/left_behind', os.O_CREAT | os.O_RDWR)", "os.mkdir('/tmp/left_behind')",
                                  "os.unlink('/tmp/left_behind')", "os.truncate('/tmp/left_behind', 0)", "os.memfd_create('x')",
                                  "__import__('resource').prlimit(os.getppid() or 1, 7, (0, 0))", "os.nice(1)",
                                  "__import__('fcntl').fcntl(0, 8, os.getppid())", "os.chroot('/')", "os.symlink('/', '/tmp/left_behind')"])
def test_the_kernel_refuses_where_the_hook_does_not(call, monkeypatch, tmp_path):
    """The hook switched off, as a program that found a way round it would have it."""
    monkeypatch.setattr(sandbox, "__file__", without(NO_HOOK, tmp_path))
    result = check_solution(f"import os\ntry:\n    {call}\nexcept Exception:\n    pass\n{RIGHT}", TEST)
    assert result.status == "forbidden" and "system call" in result.detail, result
    assert not os.path.lexists("/tmp/left_behind")


@linux
def test_programs_see_no_file_but_pythons(tmp_path):
    secret = tmp_path / "answers.txt"
    secret.write_text("the answers")
    for path in (str(secret), "/etc/passwd", "/proc/self/status", f"/proc/{os.getpid()}/environ"):
        result = run_program(f"print(open({path!r}).read())")
        assert not result.passed and result.output == "" and "Error" in result.errors
    assert run_program("import os; print(dict(os.environ))").output.count("GLASSBOX") == 0


@linux
def test_a_killed_evaluator_takes_its_programs_along(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(Path(sandbox.__file__).parent)!r})\nimport sandbox\n" \
             "print('up', flush=True)\nsandbox.run_program('import time; time.sleep(1000)', timeout=900)"
    evaluator = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    evaluator.stdout.readline()
    for _ in range(400):
        if processes_of("sandbox.py --candidate"):
            break
        time.sleep(0.05)
    assert processes_of("sandbox.py --candidate")
    evaluator.send_signal(signal.SIGKILL)
    evaluator.communicate()
    assert children() == []


def test_right_program_passes():
    result = check_solution(RIGHT, TEST)
    assert result.passed and result.status == "passed" and "hook" in result.guards, result


def test_program_that_prints_or_reads_stdin_passes_and_its_output_is_kept():
    result = check_solution("print('loading')\nimport sys\nprint(repr(sys.stdin.read()), file=sys.stderr)\n" + RIGHT, TEST)
    assert result.passed and "loading" in result.output and "''" in result.output


def test_plain_data_arrives_as_it_left():
    values = [None, True, 0, -5, 10 ** 5000, 1.5, -0.0, float("inf"), 2 - 3j, "é\ud800\n", b"\0\xff", [], [1, [2]], (), (1,), {1, 2},
              frozenset("ab"), {1: "a", (1, 2): {"b": [None]}}]
    for value in values:
        packed = json.loads(json.dumps(sandbox._pack(value, None)))
        again = sandbox._unpack(packed, None)
        assert again == value and type(again) is type(value)
    test = "import sys\nsys.set_int_max_str_digits(0) if hasattr(sys, 'set_int_max_str_digits') else 0\n"
    test += "".join(f"assert same({v!r}) == {v!r} and type(same({v!r})) is {type(v).__name__}\n" for v in values[1:4] + values[5:7] + values[8:])
    assert check_solution("def same(x):\n    return x", test).passed
    assert check_solution("def f():\n    return float('nan')", "assert f() != f()").passed


def test_subclasses_of_plain_data_count_as_what_they_extend():
    program = ("import collections, enum\nPoint = collections.namedtuple('Point', 'x y')\nclass E(enum.IntEnum):\n    A = 3\n"
               "def f():\n    return [Point(1, 2), collections.Counter('aab'), E.A]\n")
    assert check_solution(program, "assert f() == [(1, 2), {'a': 2, 'b': 1}, 3]").passed


def test_objects_of_the_program_can_be_made_used_and_handed_back():
    program = ("class Pair:\n    def __init__(self, a, b=0):\n        self.a, self.b = a, b\n    def sum(self):\n        return self.a + self.b\n"
               "def total(pairs):\n    return sum(p.sum() for p in pairs)\ndef squares(n):\n    return (i * i for i in range(n))\n")
    assert check_solution(program, "assert Pair(1, b=2).sum() == 3\nassert total([Pair(1, 2), Pair(3)]) == 6\nassert Pair(5).a == 5\n"
                                   "assert list(squares(4)) == [0, 1, 4, 9]\nassert [x for x in squares(2)] == [0, 1]").passed
    assert not check_solution(program, "assert squares(4) == [0, 1, 4, 9]").passed
    assert not check_solution(program, "assert squares(4)").passed
    assert not check_solution(program, "assert squares(4) != 3").passed


def test_exceptions_reach_the_test_but_a_dead_program_is_none():
    test = "try:\n    f()\nexcept ValueError as error:\n    assert str(error) == 'no'\nelse:\n    assert False"
    assert check_solution("def f():\n    raise ValueError('no')", test).passed
    assert not check_solution("def f():\n    raise KeyError('no')", test).passed
    swallow = "try:\n    f()\nexcept BaseException:\n    pass"
    assert check_solution("class Odd(Exception): pass\ndef f():\n    raise Odd", swallow).passed
    assert not check_solution("import os\ndef f():\n    os._exit(0)", swallow).passed
    assert not check_solution("def f():\n    raise SystemExit", swallow).passed


def test_stop_iteration_does_not_end_the_tests_loop():
    loop = "for got, want in zip(map(f, [1, 2]), [1, 2]):\n    assert got == want"
    assert check_solution("def f(x):\n    return x", loop).passed
    assert not check_solution("def f(x):\n    raise StopIteration", loop).passed


def test_the_program_cannot_replace_what_the_test_relies_on():
    program = "def abs(x):\n    return 0\ndef isclose(a, b):\n    return True\ndef root(x):\n    return 7.0\n"
    test = "assert abs(root(4.0) - 2.0) < 1e-6"
    assert not check_solution(program, test).passed
    assert not check_solution(program, "assert isclose(root(4.0), 2.0)", setup="from math import isclose").passed
    assert check_solution("def sum(a, b):\n    return a * b", "assert sum(3, 4) == 12", entry_point="sum").passed
    assert check_solution("def check(a):\n    return a > 1", "assert check(2) and not check(1)", entry_point="check").passed


def test_changing_an_argument_changes_a_copy():
    assert not check_solution("def f(x):\n    x.clear()\n    return []", "x = [2, 1]\nassert f(x) == sorted(x)").passed


def test_a_test_that_leaves_early_is_no_pass():
    for test in ("import sys\nsys.exit(0)\n" + TEST, "import os\nos._exit(0)\n" + TEST, "raise SystemExit"):
        assert not check_solution(RIGHT, test).passed


def test_dataclasses_and_threads_work():
    program = ("from __future__ import annotations\nimport threading\nfrom dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n"
               "def add(a, b):\n    out = []\n    t = threading.Thread(target=lambda: out.append(P(a).x + b))\n    t.start()\n    t.join()\n    return out[0]\n")
    assert check_solution(program, TEST).passed, check_solution(program, TEST)


def test_standard_library_is_at_hand_under_every_guard():
    names = ("array asyncio bisect calendar cmath collections contextlib copy csv datetime decimal difflib fractions functools hashlib heapq "
             "html inspect io itertools json logging math numbers operator random re secrets statistics string struct textwrap time "
             "doctest sysconfig zoneinfo typing unicodedata uuid zlib sqlite3 ssl bz2 lzma xml.etree.ElementTree concurrent.futures").split()
    program = f"import {', '.join(names)}\nrandom.shuffle([1, 2]); print(time.strftime('%Y') > '2000', hashlib.sha256(b'').hexdigest()[:4]," \
              " len(uuid.uuid4().hex), decimal.Decimal(1) / 3 > 0)"
    result = run_program(program, timeout=20)
    assert result.passed and result.output == "True e3b0 32 True\n", result


def test_humanevals_reference_solutions_pass_and_stubs_fail(shared_data):
    rows = [json.loads(line) for line in gzip.open(shared_data / "humaneval" / "HumanEval.jsonl.gz", "rt", encoding="utf-8")]
    assert len(rows) == 164
    rows = rows[::9] + [row for row in rows if row["task_id"] in ("HumanEval/32", "HumanEval/38", "HumanEval/50")]  # helpers in the prompt
    bodies = [row["canonical_solution"] for row in rows] + ["    return None\n"] * len(rows)
    jobs = [dict(program=row["prompt"] + body, test=row["test"], entry_point=row["entry_point"], setup=row["prompt"], timeout=10.0)
            for row, body in zip(rows * 2, bodies)]
    results = run_batch(check_solution, jobs, workers=2)
    assert [r.passed for r in results] == [True] * len(rows) + [False] * len(rows), results


def test_run_program_gives_stdout_stderr_and_status():
    result = run_program("import sys\nprint(int(input()) + int(sys.stdin.read()))\nprint('note', file=sys.stderr)", stdin="40\n2\n")
    assert result[:5] == (True, "passed", "", "42\n", "note\n")
    assert run_program("if __name__ == '__main__':\n    exit()").passed
    failed = run_program("print('before')\n1 / 0")
    assert (failed.passed, failed.status, failed.detail, failed.output) == (False, "exited", "exit status 1", "before\n")
    assert "ZeroDivisionError" in failed.errors


@linux
@pytest.mark.parametrize("name, status", [("infinite loop", "timeout"), ("output flood", "flooded"), ("fork", "forbidden"), ("socket", "forbidden"),
                                          ("daemon by double fork", "forbidden"), ("kill the parent", "forbidden"), ("write a file", "forbidden"),
                                          ("memory bomb", "exited"), ("output flood that ends", "flooded"),
                                          ("output flood on stderr whose error is caught", "flooded")])
def test_run_program_holds_hostile_ones(name, status):
    result = run_program(HOSTILE[name], timeout=1.0, memory_bytes=256 << 20)
    assert not result.passed and result.status == status, result
    assert children() == []


def test_large_stdin_and_program_do_not_block():
    assert run_program("#" * 500_000 + "\nprint('ok')", stdin="x" * 3_000_000).output == "ok\n"


def test_batches_keep_their_order():
    jobs = [dict(program=f"print({i})") for i in range(8)]
    assert [r.output for r in run_batch(run_program, jobs, workers=3)] == [f"{i}\n" for i in range(8)]


def test_bad_input_is_one_clear_line():
    with pytest.raises(ValueError, match="the test is no Python"):
        check_solution(RIGHT, "assert add(1, 2) = 3")
    with pytest.raises(ValueError, match="the setup is no Python"):
        check_solution(RIGHT, TEST, setup="def")
    with pytest.raises(ValueError, match="timeout"):
        run_program("", timeout=0)
    with pytest.raises(ValueError, match="memory_bytes"):
        run_program("", memory_bytes=1000)


def test_a_python_that_cannot_start_is_no_verdict(monkeypatch):
    monkeypatch.setattr(sandbox, "_python", lambda role: [sys.executable, "-c", "raise SystemExit('no disk')"])
    with pytest.raises(OSError, match="no sandbox can start here: no disk"):
        check_solution(RIGHT, TEST)


def test_command_line(tmp_path):
    (tmp_path / "p.py").write_text(RIGHT)
    (tmp_path / "t.py").write_text(TEST)
    (tmp_path / "w.py").write_text(TEST + "\nassert add(1, 1) == 3")

    def run(*words):
        return subprocess.run([sys.executable, sandbox.__file__, *words], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert run("p.py").returncode == 0
    good, bad, missing = run("p.py", "--test", "t.py"), run("p.py", "--test", "w.py"), run("q.py")
    assert good.returncode == 0 and good.stdout.startswith("passed: to the end   (guards: hook")
    assert bad.returncode == 1 and bad.stdout.startswith("failed: AssertionError in line 3 of the test: assert add(1, 1) == 3")
    assert missing.returncode == 2 and missing.stderr.startswith("error: ") and missing.stderr.count("\n") == 1
