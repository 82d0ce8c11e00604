"""A run on several nodes, as a user starts it: a node joins, a node is lost, and the rows are those of one process.

A node is a network namespace of this machine, with one end of a cable (a veth pair) in it; where namespaces are not
permitted, it is no more than a loopback address. On each, torchrun starts an agent; these meet through c10d.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import checkpoint
import stages
import train_pretrain
from test_train_parallel import ROOT, SHAPE, TEXT, when

if not Path("/proc/self/task").exists():
    pytest.skip("finds torchrun's workers in /proc", allow_module_level=True)


class Node(NamedTuple):
    address: str
    interface: str
    enter: list[str]  # words before a command that run it there


LOOPBACK = [Node("127.0.0.1", "lo", []), Node("127.0.0.2", "lo", [])]


@pytest.fixture(scope="module")
def cabled():
    """Two namespaces that see nothing but each other; or the reason why there are none, in words."""
    missing = [tool for tool in ("unshare", "nsenter", "ip") if not shutil.which(tool)]
    if missing:
        yield f"network namespaces need {missing[0]}"
        return
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]  # who is not root is root of a user namespace
    same = ["--user", "--preserve-credentials"] if own else []
    with contextlib.ExitStack() as stack:
        def namespace(*words: str) -> int:
            """-> process id of one that stays in it; the namespace goes with it."""
            process = subprocess.Popen([*words, "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE,
                                       stderr=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            if not process.stdout.readline():
                raise PermissionError("network namespaces are not permitted here")
            return process.pid

        def inside(pid: int) -> list[str]:
            return ["nsenter", "--target", str(pid), *same, "--net"]

        try:
            first = namespace("unshare", *own, "--net")
            second = namespace(*inside(first), "unshare", "--net")
            nodes = [Node(f"10.0.0.{k}", "eth0", inside(pid)) for k, pid in ((1, first), (2, second))]
            subprocess.run([*inside(first), *f"ip link add eth0 type veth peer name eth0 netns {second}".split()],
                           check=True, capture_output=True)
            for node in nodes:
                for command in (f"ip address add {node.address}/24 dev eth0", "ip link set eth0 up", "ip link set lo up"):
                    subprocess.run([*node.enter, *command.split()], check=True, capture_output=True)
        except (PermissionError, subprocess.CalledProcessError) as error:
            yield f"{error} {getattr(error, 'stderr', b'').decode()}".strip()
            return
        yield nodes


def agent(node: Node, first: Node, port: int, settings: dict) -> subprocess.Popen:
    """torchrun on a node, with one worker, as README has it for each of several nodes."""
    conf = f"is_host={int(node == first)},last_call_timeout=1,keep_alive_interval=1"  # a small machine room's
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "1:2", "--nproc_per_node", "1",
               "--max_restarts", "9", "--rdzv_backend", "c10d", "--rdzv_id", "nodes", "--local_addr", node.address,
               "--rdzv_endpoint", f"{first.address}:{port}", "--rdzv_conf", conf, str(ROOT / "train_pretrain.py"),
               *stages.flags(settings)]
    return subprocess.Popen([*node.enter, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": node.interface,
                                              "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"})


def children(process: subprocess.Popen) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def lose(process: subprocess.Popen) -> None:
    """The node with all that runs on it."""
    if process.poll() is None:
        workers = children(process)
        process.kill()
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.communicate()


def told_to_end(pid: int) -> bool:
    """Whether SIGTERM waits for a process that is stopped."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return any(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1 for line in lines if line.startswith("ShdPnd"))


def sharded(folder: Path) -> bool:
    """Whether several processes wrote the checkpoint."""
    return (folder / "index.json").exists()


@pytest.mark.parametrize("kind", ["namespaces", "loopback"])
def test_a_node_joins_and_another_is_lost_and_the_sample_order_goes_on(tmp_path, cabled, kind):
    """One process, two on two nodes, one of whose workers is killed, one: the rows of one process undisturbed."""
    if kind == "namespaces" and isinstance(cabled, str):
        pytest.skip(cabled)
    if kind == "loopback" and not isinstance(cabled, str):
        pytest.skip("tried with namespaces instead, which are permitted here")
    nodes, run, data = LOOPBACK if kind == "loopback" else cabled, tmp_path / "run", tmp_path / "sums.txt"
    data.write_text(TEXT)
    settings = SHAPE | dict(data=str(data), out=str(run), max_steps=80, save_every=2, eval_every=0, resume="auto",
                            schedule="constant")
    truth = stages.run_stage(train_pretrain.main, settings | {"out": str(tmp_path / "alone")})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.ExitStack() as stack:
        first = agent(nodes[0], nodes[0], port, settings)
        stack.callback(lose, first)
        when(lambda: checkpoint.latest(run), first)
        worker, = children(first)
        os.kill(worker, signal.SIGSTOP)  # else it might be done before the other node is there
        second = agent(nodes[1], nodes[0], port, settings)
        stack.callback(lose, second)
        when(lambda: told_to_end(worker), second)
        os.kill(worker, signal.SIGCONT)
        when(lambda: sharded(checkpoint.latest(run)), second)
        killed = children(second)
        os.kill(killed[0], signal.SIGKILL)  # both nodes stay, but of their agents only one counts it as a restart
        when(lambda: children(second) not in ([], killed), second)
        before = checkpoint.latest(run)
        when(lambda: checkpoint.latest(run) != before, second)
        lose(second)
        out, err = first.communicate(timeout=180)
    assert first.returncode == 0, err[-3000:]
    stages.assert_close_logs(run, truth)
    kinds = [sharded(folder) for _, folder in sorted(checkpoint.step_folders(run).items())]
    assert [k for k, before in zip(kinds, [None, *kinds]) if k != before] == [False, True, False]
    assert "error: no answer from rank 1 of 2: it died or hangs" in err.splitlines(), err[-3000:]
