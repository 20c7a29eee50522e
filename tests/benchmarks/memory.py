"""Peak memory of a call, from the allocator's own record: exact, and the same on every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that tensors made during ``call`` take at one time; what existed before does not count.

    On the CPU, PyTorch's allocator tells the profiler of each allocation and each release, the scratch space inside an
    operator included. What a linear-algebra library takes for itself is not seen, nor is Python's own memory.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    records = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    in_use = most = 0
    for record in sorted(records, key=lambda record: record.start_ns()):
        in_use += record.nbytes()  # negative for a release
        most = max(most, in_use)
    return most
