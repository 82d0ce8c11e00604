"""The processes that torchrun started: how they begin together, and how they end when one of them fails.

    with joined() as world:                         # without torchrun: one process, and nothing of the below
        device = world.own(torch.device("cuda"))    # this process's GPU: gloo for what is on the CPU, NCCL for the rest
        with world.first_ahead():                   # rank 0 makes the data, then the others find it made
            ...
        if world.any(caught): ...                   # a signal reached one rank: all stop at the same step

    a rank raises         its message lies in the store; the others' collectives break off, and they end with that line
    all raise the same    (flags that do not fit) rank 0 says it, once
    a rank is killed      it leaves no message: the others call the roll, and name the ranks that no longer answer
    a rank hangs          the others wait for `minutes`, then the same

The store is torchrun's own; it lives in the agent and outlives any rank, or, under TORCH_DISABLE_SHARE_RDZV_TCP_STORE,
in rank 0. Only rank 0 prints.

    torchrun --nproc_per_node 4 parallel/launch.py --fail 2         # so does python parallel/launch.py: rank 2 fails
"""

import contextlib
import datetime
import os
import sys
import threading
import time

import torch
import torch.distributed as dist


class World:
    """This process's rank among `size`, and what all of them do together."""

    def __init__(self, rank: int = 0, size: int = 1, store=None):
        self.rank, self.size, self.store, self.turns = rank, size, store, 0

    def own(self, device: torch.device) -> torch.device:
        """The one of that kind that this process should take."""
        if self.size > 1 and device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {device}: has no collectives; one process only")
        return torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" else device

    @contextlib.contextmanager
    def first_ahead(self):
        """The block is run by rank 0 while the others wait, however long, and then by them."""
        self.turns += 1
        if self.size > 1:
            self.any(False)  # nobody still looks at what rank 0 is about to change
            while self.rank and not self.store.check([f"turn/{self.turns}"]):
                if self.store.check(["culprit"]):
                    raise ConnectionError(self.store.get("culprit").decode())
                time.sleep(0.1)
        yield
        if self.size > 1 and not self.rank:
            self.store.set(f"turn/{self.turns}", "")

    def any(self, mine) -> bool:
        """Whether it is true on some rank."""
        if self.size == 1:
            return bool(mine)
        flag = torch.tensor(int(bool(mine)))
        dist.all_reduce(flag)
        return bool(flag)


@contextlib.contextmanager
def joined(minutes: float = 10.0):
    """Join the processes that torchrun started -> World.

    minutes: how long a collective waits for a rank. What the block raises ends all ranks, see above: ValueError and the
    like as they were or, on the other ranks, as ConnectionError with the culprit's message; bugs keep their traceback.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield World()
        return
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # it outlives a restart, and with it the addresses and
        # messages of processes that are gone. Rank 0's own, on several nodes, begins empty: their agents count apart.
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    local, backend = int(os.environ.get("LOCAL_RANK", rank)), "gloo"
    if torch.cuda.device_count() > local and dist.is_nccl_available():
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=dist.PrefixStore("groups", store), rank=rank, world_size=size,
                            timeout=datetime.timedelta(minutes=minutes))
    try:
        with answering(store, rank), open(os.devnull, "w") as nowhere:
            with (contextlib.redirect_stdout(nowhere if rank else sys.stdout),
                  contextlib.redirect_stderr(nowhere if rank else sys.stderr)):
                yield World(rank, size, store)
    except (Exception, KeyboardInterrupt) as error:
        try:
            line = end_together(store, rank, size, error)
        except RuntimeError:  # no store any more: it was rank 0's
            line = f"no answer from rank 0 of {size}: it died or hangs" if broken_off(error) else None
        if line is None:
            raise
        raise ConnectionError(line) from error
    dist.destroy_process_group()


@contextlib.contextmanager
def answering(store, rank: int):
    """While the block runs, a thread answers when another rank calls the roll, also if the block waits in a collective:
    a rank whose peers all live does not notice that a rank elsewhere has died."""
    over = threading.Event()

    def answer() -> None:
        with contextlib.suppress(RuntimeError):  # the agent has gone, and the store with it
            while not over.wait(0.5):
                if store.check(["roll"]):
                    store.set(f"here/{rank}", "")
                    return

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()  # a thread that came back from the store into an interpreter at its end would crash it


def end_together(store, rank: int, size: int, error: BaseException) -> str | None:
    """What rank `rank` should say in place of its error; None: the error itself, which is its own. Exits with code 2
    where rank 0 says it."""
    text, seconds = " ".join(str(error).split()), 15.0  # on a busy machine rank 0 may be seconds behind
    ours = f"rank {rank} failed: {text or type(error).__name__}"

    def told() -> str | None:
        """What rank 0 is about to print, waited for."""
        return store.get("told").decode() if appears(store, "told", seconds) else None

    if not broken_off(error):
        store.set(f"said/{rank}", text)
        if rank == 0:
            store.compare_set("culprit", "", ours)
            store.set("told", text)
            return None
        if told() == text:
            leave()
        store.compare_set("culprit", "", ours)
        return ours if isinstance(error, (ValueError, OSError, KeyboardInterrupt)) else None
    if rank and store.check(["told"]):
        leave()
    store.set(f"said/{rank}", "")
    store.set("roll", "")
    if appears(store, "culprit", seconds):
        line = store.get("culprit").decode()
    else:
        silent = [r for r in range(size) if not store.check([f"said/{r}"])]
        silent = [r for r in silent if not store.check([f"here/{r}"])] or silent  # who answers may hang all the same
        line = f"rank {rank}: {text}"
        if silent:
            line = f"no answer from rank {', '.join(map(str, silent))} of {size}: it died or hangs"
    if rank == 0:
        store.set("told", line)
    elif store.check(["said/0"]) and told() is not None:
        leave()
    return line


def appears(store, key: str, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while not store.check([key]):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def leave() -> None:
    time.sleep(0.5)  # for rank 0 to print; torchrun ends all as soon as one has ended
    sys.exit(2)


def broken_off(error: BaseException) -> bool:
    """Whether a collective failed because of another rank."""
    words = ("closed by peer", "reset by peer", "broken pipe", "timed out", "timeout", "connection refused", "gloo",
             "nccl", "aborted")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def main() -> None:
    import subprocess
    if "RANK" not in os.environ:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", __file__, "--fail", "2"]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
        print(next((line for line in done.stderr.splitlines() if line.startswith("rank 0 ends:")), done.stderr))
        return
    try:
        with joined() as world:
            if str(world.rank) in sys.argv[1:]:
                raise ValueError("a line of the data is no JSON")
            dist.barrier()
    except ConnectionError as error:
        print(f"rank {os.environ['RANK']} ends: {error}", file=sys.stderr, flush=True)
        time.sleep(1)
        sys.exit(2)


if __name__ == "__main__":
    main()
