"""Runs a function on N processes joined by gloo, as torchrun would, but with processes that stay for the next test.

    def job(world, scale):                  # at the top of a test's module: the processes import it by name
        x = torch.ones(1)
        dist.all_reduce(x)
        return scale * x

    def test_sum():
        assert [r.item() for r in run_on(4, job, 10.0)] == [40.0] * 4

Starting a process costs a second (it imports torch), so each world size keeps its processes for the whole session, one
thread each. A world in which a rank failed, or took too long, may hang in half a collective: it is thrown away.
"""

import atexit
import datetime
import multiprocessing
import pickle
import sys
import traceback
from multiprocessing.connection import wait

import torch
import torch.distributed as dist

_worlds: dict[int, "World"] = {}


def run_on(world_size: int, function, *args, timeout: float = 300.0) -> list:
    """-> [function(world_size, *args) of rank 0, of rank 1 ...], run as ranks of one gloo world; seed 0 on each.

    `function` stands at the top of a module; arguments and results go through pickle. RuntimeError gives the rank and
    the traceback of the first that failed; TimeoutError says which ranks did not answer in `timeout` seconds.
    """
    if world_size not in _worlds:
        _worlds[world_size] = World(world_size)
    try:
        return _worlds[world_size].run(function, args, timeout)
    except BaseException:
        _worlds.pop(world_size).close()
        raise


class World:
    """`size` living processes with a connection to each; the store through which they met lies in this process."""

    def __init__(self, size: int):
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # port 0: any free one
        context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        if sys.platform == "linux":
            context.set_forkserver_preload(["torch._dynamo", "torch.distributed"])  # once, then forked: an optimizer imports it
        self.connections, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, size, self.store.port), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function, args, timeout: float) -> list:
        task = pickle.dumps((function, args))
        for connection in self.connections:
            connection.send_bytes(task)
        results, waiting = {}, dict(zip(self.connections, range(len(self.connections))))
        for _ in range(int(timeout / 0.5) + 1):  # by slices, not by the clock: a machine put to sleep costs only one
            for connection in wait(list(waiting), 0.5):
                rank = waiting.pop(connection)
                try:
                    good, value = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    good, value = False, "the process died"
                if not good:
                    raise RuntimeError(f"rank {rank} of {len(self.connections)}: {value}")
                results[rank] = value
            if not waiting:
                return [results[rank] for rank in range(len(self.connections))]
        raise TimeoutError(f"{function.__name__}: ranks {sorted(waiting.values())} did not answer in {timeout:g} s")

    def close(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(connection, rank: int, size: int, port: int) -> None:
    """A rank's life: join the others, then run what comes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=datetime.timedelta(minutes=10))
    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:  # the tests are over
            return
        try:
            function, args = pickle.loads(task)
            torch.manual_seed(0)
            answer = True, function(size, *args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


@atexit.register
def _close() -> None:
    while _worlds:
        _worlds.popitem()[1].close()
