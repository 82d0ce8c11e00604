"""Runs programs that a model wrote, and tells right from wrong so that a program cannot talk its way to a pass.

    evaluator  --job-->   judge: runs the test             --f(1, 2)?-->  candidate: runs the program
    (trains)  <-verdict-  (trusted; knows what to expect)  <----3-------  (may be hostile)

Nothing that a program does can say "passed": the test and the values it expects live in another process, the judge, and
only the judge reports, after the test's last line. In the test, the program's functions are stand-ins that send their
arguments through a pipe and get plain data back (None, bool, numbers, str, bytes, list, tuple, set, dict). An object
whose `__eq__` is always true is no such data and fails; `os._exit(0)` ends the wrong process; a forged line of success
is just output; and no frame hides a nonce to be found, because there is none. What holds the candidate:

    limits      memory, CPU time, output, descriptors (setrlimit); wall time (the evaluator kills)
    seccomp     Linux on x86-64 and arm64: permitted system calls are listed, any other kills. No fork, exec, socket,
                signal to another process, no file opened for writing: so no orphan and no file can be left behind
    namespaces  Linux where users may make them: no network, no other process, no file but Python's own in sight
    hook        everywhere: Python's audit events refuse the same by name, and reading outside Python's library

`Result.guards` says which were in force. This is no security boundary: a hole in the kernel is open to the program; the
hook alone (macOS and Windows, where memory and output may be unbounded too) holds only programs that do not look for a
way around it; without namespaces (most containers) nothing but the hook keeps a program from what its user may read.
The price: programs get the standard library alone (`python -I -S`); a right one that forks, opens a socket or writes a
file fails; one that changes its arguments changes copies; a test cannot hand it a function.

    python sandbox.py program.py                     # run it; passed = exit status 0
    python sandbox.py program.py --test asserts.py   # passed = the test ran to its end; exit code 0 (1 if not)

HumanEval (arXiv:2107.03374): check_solution(prompt + completion, test, entry_point=entry_point, setup=prompt).
MBPP (arXiv:2108.07732): check_solution(code, "\n".join(test_list), setup=test_setup_code).
"""

import argparse
import ast
import builtins
import contextlib
import ctypes
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

try:
    import resource
except ImportError:  # Windows
    resource = None

OUTPUT_BYTES = 1 << 20  # a program that prints so much is a flood, and fails
REPLY_BYTES = 16 << 20  # so is an answer of this length
REFUSED = 86  # exit status of a program that the hook stopped
WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Result(NamedTuple):
    """What became of a program. `output` is its stdout and `errors` its stderr; in a check both are in `output`."""
    passed: bool
    status: str  # passed, failed (by the test), exited, forbidden, timeout, flooded
    detail: str = ""  # one line: why
    output: str = ""
    errors: str = ""
    guards: tuple[str, ...] = ()


def check_solution(program: str, test: str, *, entry_point: str | None = None, setup: str = "", timeout: float = 3.0,
                   memory_bytes: int = 512 << 20) -> Result:
    """Passed if and only if `test` ran to its end over the functions that `program` defines.

    `setup` (imports, helpers) runs before the test and is trusted like it. Names that neither of them defines are the
    program's, builtins never are, `entry_point` always is; given that, HumanEval's `check(candidate)` in the test is
    called. `timeout`: seconds of wall time without Python's start; `memory_bytes`: address space of each process.
    Raises ValueError if test or setup do not compile (the program may be anything), OSError if no sandbox can start.
    """
    for name, source in (("test", test), ("setup", setup)):
        try:
            compile(source, f"<{name}>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"the {name} is no Python: {error}") from None
    return _supervise(dict(program=program, test=test, entry_point=entry_point, setup=setup), timeout, memory_bytes)


def run_program(program: str, *, stdin: str = "", timeout: float = 3.0, memory_bytes: int = 512 << 20) -> Result:
    """Run `program` as `__main__`. Passed: it ended in time with status 0, which is the program's own word.

    A verdict compares `output` with what is expected, or comes from `check_solution`.
    """
    return _supervise(dict(program=program, test=None, stdin=stdin), timeout, memory_bytes)


def run_batch(function: Callable[..., Result], jobs: list[dict], workers: int | None = None) -> list[Result]:
    """[function(**job) for job in jobs], `workers` at a time (default: one per core)."""
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda job: function(**job), jobs))


def _supervise(job: dict, timeout: float, memory_bytes: int) -> Result:
    """Let a judge do the job and wait for its verdict, `timeout` seconds from the moment when the program begins."""
    if not 0 < timeout < 1e6 or memory_bytes < 64 << 20:
        raise ValueError(f"timeout {timeout} s must lie in (0, 1e6), memory_bytes {memory_bytes} be {64 << 20} or more")
    keep = ("SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LD_LIBRARY_PATH")  # the least that a Python may need to start
    environment = {name: os.environ[name] for name in keep if name in os.environ}
    environment["HOME"] = os.path.abspath(os.sep)  # else libraries look for it by a socket (zoneinfo, sysconfig)
    with tempfile.TemporaryFile() as file:
        file.write(json.dumps(job | {"timeout": timeout, "memory_bytes": memory_bytes}).encode())
        file.seek(0)
        judge = subprocess.Popen(_python("--judge"), stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                 bufsize=0, env=environment, start_new_session=True)
    try:
        guards = judge.stdout.readline()  # comes before anything of the program runs
        verdict, errors = judge.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        verdict = json.dumps(["timeout", f"more than {timeout:g} s"])
    finally:
        if judge.poll() is None:  # not reaped yet, so its number cannot have become another's
            _kill_group(judge.pid) or judge.kill()
            judge.communicate()
    if not guards:
        raise OSError(f"no sandbox can start here: {' '.join(errors.decode(errors='replace').split())[-500:]}")
    verdict = verdict or json.dumps(["failed", f"the program's answers killed the judge ({judge.returncode})"])
    status, *texts = json.loads(verdict)
    return Result(status == "passed", status, *texts)._replace(guards=tuple(json.loads(guards)))


def _python(role: str) -> list[str]:
    return [os.path.realpath(sys.executable), "-I", "-S", "-B", "-X", "utf8", os.path.abspath(__file__), role]


def _kill_group(group: int) -> None:
    if hasattr(os, "killpg"):
        os.killpg(group, signal.SIGKILL)


# The judge: runs the test ---------------------------------------------------------------------------------------------

class _Remote:
    """Stands in the test for an object of the program: can be called, listed, and asked for attributes.

    To compare it or ask for its truth raises, because either answer would be the program's to choose.
    """
    def __init__(self, ask, ref):
        self._ask, self._ref = ask, ref

    def __call__(self, *args, **kwargs):
        return self._ask("call", self, *args, **kwargs)

    def __iter__(self):
        return iter(self._ask("list", self))

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __eq__(self, other=None):
        raise TypeError("the program returned an object that is no plain data")

    __ne__ = __bool__ = __eq__


def _judge() -> None:
    """Read a job from stdin, print which guards hold, do the job, print the verdict, and die with the whole group."""
    _die_with_parent()
    job = json.load(sys.stdin)
    serve, inward = job["test"] is not None, subprocess.PIPE
    header = json.dumps({"program": job["program"], "serve": serve}).encode()
    header = len(header).to_bytes(4, "little") + header
    if not serve:
        inward = tempfile.TemporaryFile()  # like the next without a name, so there is nothing to clean up
        inward.write(header + job["stdin"].encode(errors="replace")), inward.seek(0)
    errors, command = tempfile.TemporaryFile(), _python("--candidate")
    _limit(AS=job["memory_bytes"], CPU=int(job["timeout"]) + 5, FSIZE=OUTPUT_BYTES, NOFILE=64, CORE=0)
    if file := _isolate():
        command[-2] = file
    child = subprocess.Popen(command, stdin=inward, stdout=subprocess.PIPE, stderr=errors, cwd=os.path.abspath(os.sep))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: the candidate, of the same user, cannot read this memory

    def printed() -> str:
        errors.seek(0)
        return errors.read(OUTPUT_BYTES).decode(errors="replace")

    def finish(status: str, detail: str = "", output: str | None = None) -> None:
        child.kill(), child.wait()
        texts = [printed()] if output is None else [output, printed()]
        if os.fstat(errors.fileno()).st_size >= OUTPUT_BYTES or status == "flooded":
            status, detail = "flooded", "printed or answered more than it may"
        report.write(json.dumps([status, detail, *texts]).encode()), report.flush()
        _kill_group(0)  # this process too
        os._exit(0)

    def gone() -> tuple[str, str]:
        """Status and detail when the candidate answers no more."""
        try:
            code = child.wait(1)
        except subprocess.TimeoutExpired:
            return "exited", "the program closed its channel"
        if code == REFUSED:
            return "forbidden", (printed().splitlines() or [""])[-1]
        if -code == getattr(signal, "SIGSYS", None):
            return "forbidden", "a system call that programs may not make (fork, exec, socket, kill, write a file ...)"
        return "exited", f"exit status {code}" + " before the test's end" * serve

    def ask(operation: str, target, *args, **kwargs):
        """Let the candidate do something to `target`, one of its objects: returns its value or raises its exception.

        A candidate that is gone ends the judge; an exception could be taken for the one that a test expects.
        """
        request = json.dumps(_pack([operation, target, args, kwargs], _reference)) + "\n"
        try:
            child.stdin.write(request.encode()), child.stdin.flush()
            line = child.stdout.readline(REPLY_BYTES)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            finish(*(["flooded"] if len(line) == REPLY_BYTES else gone()))
        try:
            raised, body = json.loads(line)
            value = _unpack(body, lambda ref: _Remote(ask, ref))
        except Exception as error:
            finish("failed", f"the program's answer cannot be read: {error}")
        if raised:  # not StopIteration: it would quietly end a loop of the test over map(f, ...), and with it the test
            raise {kind.__name__: kind for kind in EXCEPTIONS}.get(raised, Exception)(body)
        return value

    if serve:
        child.stdin.write(header), child.stdin.flush()
    held = child.stdout.readline()
    if not held:
        sys.exit(printed() or f"Python ended with status {child.wait()}")
    report = os.fdopen(os.dup(1), "wb")
    os.dup2(errors.fileno(), 1), os.dup2(errors.fileno(), 2)  # what the test prints must not mix with the verdict
    guards = ["hook", *json.loads(held)] + ["namespaces"] * bool(file) + ["limits"] * bool(resource)
    report.write(json.dumps(guards).encode() + b"\n"), report.flush()
    if not serve:
        output = child.stdout.read(OUTPUT_BYTES)
        flooded = len(output) == OUTPUT_BYTES
        verdict = ["flooded", ""] if flooded else ["passed", ""] if child.wait() == 0 else gone()
        finish(*verdict, output.decode(errors="replace"))
    try:
        root, scope = ask("load", None), {"__name__": "test"}
        exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), scope)
        names = {node.id for node in ast.walk(ast.parse(job["test"])) if isinstance(node, ast.Name)}
        for name in names - scope.keys() - set(dir(builtins)):
            with contextlib.suppress(AttributeError):  # the test's own, or a NameError once it is used
                scope[name] = ask("get", root, name)
        if job["entry_point"]:
            scope["candidate"] = scope[job["entry_point"]] = ask("get", root, job["entry_point"])
        exec(compile(job["test"], "<test>", "exec", dont_inherit=True), scope)
        if job["entry_point"] and isinstance(scope.get("check"), types.FunctionType):  # else it is the program's
            scope["check"](scope["candidate"])
        ask("list", [])  # the candidate must be alive at the end, too
    except BaseException as error:  # sys.exit in the test is no pass either
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<test>"]
        where = f" in line {lines[-1]} of the test: {job['test'].splitlines()[lines[-1] - 1].strip()}" if lines else ""
        finish("failed", f"{type(error).__name__}{': ' * bool(str(error))}{error}{where}"[:2000])
    finish("passed")


# What travels between the two -----------------------------------------------------------------------------------------

ATOMS = {int: (hex, lambda text: int(text, 16)),  # decimal digits would be limited to 4300
         float: (float.hex, float.fromhex), complex: (complex.__repr__, complex), bytes: (bytes.hex, bytes.fromhex)}
CONTAINERS = (tuple, set, frozenset, dict)
EXCEPTIONS = (ArithmeticError, AssertionError, AttributeError, Exception, IndexError, KeyError, LookupError, NameError,
              NotImplementedError, OSError, OverflowError, RuntimeError, TypeError, ValueError, ZeroDivisionError)


def _pack(value, other: Callable):
    """Plain data as JSON; a subclass (Counter, namedtuple) counts as what it extends. `other` packs the rest."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, list):
        return [_pack(item, other) for item in value]
    for kind, (write, _) in ATOMS.items():
        if isinstance(value, kind):
            return {kind.__name__: write(value)}
    for kind in CONTAINERS:
        if isinstance(value, kind):
            return {kind.__name__: [_pack(item, other) for item in (value.items() if kind is dict else value)]}
    return other(value)


def _unpack(data, other: Callable):
    """The inverse: builds nothing but plain data, and `other(ref)`."""
    if isinstance(data, list):
        return [_unpack(item, other) for item in data]
    if not isinstance(data, dict):
        return data
    (name, body), = data.items()
    readers = {kind.__name__: read for kind, (_, read) in ATOMS.items()} | {"ref": other}
    builders = {kind.__name__: kind for kind in CONTAINERS}
    return builders[name](_unpack(body, other)) if name in builders else readers[name](body)


def _reference(value) -> dict:
    if isinstance(value, _Remote):
        return {"ref": value._ref}
    raise TypeError(f"a test cannot hand a {type(value).__name__} to the program, only plain data")


# The candidate: runs the program --------------------------------------------------------------------------------------

def _candidate() -> None:
    """Read a program from stdin and run it; if there is a test, answer the judge's requests."""
    _die_with_parent()
    header = json.loads(_read(int.from_bytes(_read(4), "little")))  # what follows on stdin is the program's
    name, requests, replies = "__main__", 0, 1
    if header["serve"]:  # the judge's pipes move away; the program gets an empty stdin, and stderr's file for stdout
        name, requests, replies, (empty, writer) = "solution", os.dup(0), os.dup(1), os.pipe()
        os.close(writer), os.dup2(empty, 0), os.dup2(2, 1)
    sys.argv, module = ["program"], types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look it up
    builtins.exit = builtins.quit = sys.exit  # `site`, which -S leaves out, would give these
    _limit(NPROC=64)
    filtered = _filter_system_calls()
    sys.addaudithook(_hook())
    os.write(replies, json.dumps(["seccomp"] * filtered).encode() + b"\n")

    def load(_):
        exec(compile(header["program"], "<program>", "exec", dont_inherit=True), module.__dict__)
        return module
    if not header["serve"]:
        load(None)
        return
    kept, operations = [], {"load": load, "get": getattr, "list": list, "call": lambda f, *a, **k: f(*a, **k)}

    def keep(value):
        kept.append(value)
        return {"ref": len(kept) - 1}
    for line in os.fdopen(requests, "rb"):
        try:
            operation, target, args, kwargs = _unpack(json.loads(line), kept.__getitem__)
            reply = [None, _pack(operations[operation](target, *args, **kwargs), keep)]
        except Exception as error:
            kind = next(kind for kind in type(error).__mro__ if kind in EXCEPTIONS)
            reply = [kind.__name__, f"{error}" if kind is type(error) else f"{type(error).__name__}: {error}"]
        sys.stdout.flush()
        with os.fdopen(os.dup(replies), "wb") as file:
            file.write(json.dumps(reply).encode() + b"\n")


def _read(size: int) -> bytes:
    """The next `size` bytes of stdin, and not one more."""
    data = b""
    while len(data) < size:
        data += os.read(0, size - len(data)) or sys.exit("the judge is gone")
    return data


# The guards -----------------------------------------------------------------------------------------------------------

def _limit(**limits: int) -> None:
    for name, value in limits.items() if resource else ():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with contextlib.suppress(ValueError, OSError):  # macOS knows RLIMIT_AS but does not take it
            resource.setrlimit(kind, (value, value))


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _hook() -> Callable:
    """An audit hook (PEP 578): what only a hostile program does ends the process, reading elsewhere is refused."""
    fatal = tuple("_winapi. ctypes. os.chmod os.chown os.exec os.fork os.kill os.link os.mkdir os.posix_spawn "
                  "os.remove os.rename os.rmdir os.spawn os.startfile os.symlink os.system os.truncate os.utime pty. "
                  "signal.pthread_kill socket. sqlite3.connect subprocess. winreg.".split())
    readable = (sys.base_prefix + os.sep, sys.base_exec_prefix + os.sep, os.path.abspath(__file__))
    end, say, absolute, decode = os._exit, os.write, os.path.abspath, os.fsdecode  # the program may replace those in os

    def hook(event, args):
        looks = event in ("open", "os.listdir", "os.scandir") and not isinstance(args[0], int)
        writes = looks and event == "open" and isinstance(args[2], int) and args[2] & WRITE
        if writes or event.startswith(fatal):
            say(2, f"\nrefused: {event}{' for writing' if writes else ''}\n".encode())
            end(REFUSED)
        if looks and not (absolute(decode(args[0] or ".")) + "/").startswith(readable):
            raise PermissionError(f"programs may not read {args[0]}")
    return hook


def _isolate() -> str | None:
    """Take network, processes and files out of sight of this process's children (namespaces(7), Linux).

    Returns the path of this file under the new root, or None where namespaces cannot be had, as in most containers.
    """
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name, *args):
        if getattr(libc, name)(*args) == -1:
            raise OSError(ctypes.get_errno(), name)
    try:
        ids = {"setgroups": "deny", "uid_map": f"65534 {os.getuid()} 1", "gid_map": f"65534 {os.getgid()} 1"}
        call("unshare", 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000)  # CLONE_NEW USER, NS, PID, NET, IPC
        for name, line in ids.items():  # inside, the user is nobody: a program started there has no powers
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
        call("mount", None, b"/", None, 0x44000, None)  # MS_REC | MS_PRIVATE: the machine's mounts stay as they are
        root = "/proc"  # a folder that every Linux has, with nothing below it that Python needs
        call("mount", b"tmpfs", root.encode(), b"tmpfs", 0, b"size=4m,mode=755")
        prefixes = map(os.path.realpath, (sys.base_prefix, sys.base_exec_prefix))
        for path in ("/usr", "/lib", "/lib64", "/nix", *prefixes):
            if os.path.islink(path):
                os.symlink(os.readlink(path), root + path)
            elif os.path.isdir(path) and not os.path.exists(root + path):
                os.makedirs(root + path)
                call("mount", path.encode(), (root + path).encode(), None, 0x5000, None)  # MS_BIND | MS_REC
        shutil.copyfile(__file__, root + "/sandbox.py")
        if os.path.exists("/etc/ld.so.cache"):  # tells where shared libraries lie
            os.mkdir(root + "/etc")
            shutil.copyfile("/etc/ld.so.cache", root + "/etc/ld.so.cache")
        read_only = (ctypes.c_uint64 * 4)(3)  # MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, mount_setattr (Linux 5.12)
        libc.syscall(442, -100, root.encode(), 0x8000, read_only, 32)  # older ones: seccomp forbids writing
        os.chroot(root), os.chdir("/")
        return "/sandbox.py"
    except OSError:
        return None


# name, number on x86-64, number on arm64
SYSTEM_CALLS = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, close 3 57, lseek 8 62, fstat 5 80,
stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48, readlink 89 -, readlinkat 267 78,
getcwd 79 17, getdents64 217 61, open 2 -, openat 257 56, ioctl 16 29, fcntl 72 25, dup 32 23, dup2 33 -, dup3 292 24,
pipe 22 -, pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, mmap 9 222, munmap 11 215, brk 12 214,
mprotect 10 226, mremap 25 216, madvise 28 233, membarrier 324 283, clone 56 220, futex 202 98, set_robust_list 273 99,
set_tid_address 218 96, rseq 334 293, arch_prctl 158 -, prctl 157 167, sched_yield 24 124, sched_getaffinity 204 123,
getcpu 309 168, exit 60 93, exit_group 231 94, wait4 61 260, waitid 247 95, restart_syscall 219 128, alarm 37 -,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, sigaltstack 131 132, setitimer 38 103,
getitimer 36 102, getpid 39 172, gettid 186 178, getppid 110 173, getuid 102 174, geteuid 107 175, getgid 104 176,
getegid 108 177, getrlimit 97 163, prlimit64 302 261, getrusage 98 165, sysinfo 99 179, uname 63 160, umask 95 166,
times 100 153, time 201 -, gettimeofday 96 169, clock_gettime 228 113, clock_getres 229 114, clock_nanosleep 230 115,
nanosleep 35 101, getrandom 318 278"""
CONDITIONS = {  # name: (argument, mask, value): permitted only if argument & mask == value
    "open": (1, WRITE, 0), "openat": (2, WRITE, 0), "clone": (0, 0x10000, 0x10000),  # CLONE_THREAD: no new process
    "fcntl": (1, 8, 0),  # neither F_SETOWN nor F_SETSIG: signals to others
    "prctl": (0, 0xFFFFFFFF, 15), "prlimit64": (0, 0xFFFFFFFF, 0)}  # PR_SET_NAME; its own limits


def _filter_system_calls() -> bool:
    """Hold this process to SYSTEM_CALLS for good (seccomp(2)); False where that cannot be done."""
    machine = os.uname().machine if sys.platform == "linux" and sys.maxsize > 1 << 32 else ""
    if machine not in ("x86_64", "aarch64"):
        return False
    allow, kill, no_such_call = 0x7FFF0000, 0x80000000, 0x00050000 | 38  # 38: ENOSYS
    load, equal, at_least, mask, give = 0x20, 0x15, 0x35, 0x54, 0x06  # A = word k; skip jt or jf; A &= k; return k
    code = [(load, 0, 0, 4), (equal, 1, 0, 0xC000003E if machine == "x86_64" else 0xC00000B7), (give, 0, 0, kill),
            (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (give, 0, 0, kill),  # the x32 twins of the calls
            (at_least, 0, 1, 424), (give, 0, 0, no_such_call)]  # newer than 2019: the C library then takes older ones
    for name, *numbers in map(str.split, SYSTEM_CALLS.split(",")):
        number, (argument, bits, value) = numbers[machine == "aarch64"], CONDITIONS.get(name, (0, 0, 0))
        if number != "-":
            code += [(equal, 0, 5, int(number)), (load, 0, 0, 16 + 8 * argument), (mask, 0, 0, bits),
                     (equal, 0, 1, value), (give, 0, 0, allow), (give, 0, 0, kill)]
    code.append((give, 0, 0, kill))
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in code))
    program = ctypes.create_string_buffer(struct.pack("HP", len(code), ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None)
    return libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program) == 0  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="Python file to run, with the stdin of this process")
    parser.add_argument("--test", type=Path, help="Python file of asserts over what the program defines")
    parser.add_argument("--timeout", type=float, default=3.0, help="seconds (default: 3)")
    args = parser.parse_args()
    try:
        program = args.program.read_text(encoding="utf-8")
        if args.test:
            result = check_solution(program, args.test.read_text(encoding="utf-8"), timeout=args.timeout)
        else:
            result = run_program(program, stdin="" if sys.stdin.isatty() else sys.stdin.read(), timeout=args.timeout)
    except (OSError, ValueError) as error:
        print("error:", error, file=sys.stderr)
        return 2
    print(result.output, end=""), print(result.errors, end="", file=sys.stderr)
    print(f"{result.status}: {result.detail or 'to the end'}   (guards: {', '.join(result.guards)})")
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit({"--judge": _judge, "--candidate": _candidate}.get((sys.argv[1:2] or [""])[0], main)())
