"""The peak of memory of a function, in bytes, on a GPU or a CPU."""

import torch
from torch.autograd.profiler import profile


def peak_bytes(run) -> int:
    """Most bytes that lived at once during run(), above those before it: what PyTorch's allocator gave out and got back.

    Every tensor counts, also those that are made inside of compiled code and of custom operators; what nobody writes to
    is counted as well, so sizes beyond this machine's memory may be counted where nothing is computed.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True, use_kineto=True) as record:
        run()
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):  # sorted() keeps the order of equal times
        live += event.nbytes()
        peak = max(peak, live)
    return peak
