"""Peak memory of a call from the allocator's record, which is exact and the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Return the largest total size, at one time, of the tensors made during ``call``, in bytes.

    On the CPU, PyTorch's allocator reports each allocation and release to the profiler, including scratch space inside
    operators. Memory of the linear-algebra library and of Python is not included.
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
