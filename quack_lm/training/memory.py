"""How much memory tensors take at once; and how the process treats memory that it has freed, on a CPU."""

import ctypes
import gc
import os
from contextlib import AbstractContextManager
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

# Parameters of glibc's mallopt.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to use freed memory again; whether it is there and does.

    As it comes, it takes each large tensor from the kernel and gives it back, and every page of it faults again at the
    next step. What it keeps instead is at most what the process has used at once, and holes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # musl, macOS
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, -1))


class PeakMemory(AbstractContextManager["PeakMemory"]):
    """`bytes`, after the block: the most that tensors took at once within it, with those that were there before.

    Counted is what torch's allocator hands out, temporaries of kernels included: on CUDA without what it holds in
    reserve, on a CPU without the scratch memory of other libraries. On a CPU the profiler watches, at the cost of a few
    percent of time, and what was there before counts until the end, even where it is freed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bytes = 0
        self._profile: Any = None

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            gc.collect()  # what nobody holds is not there
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it tells stderr that there is no GPU
            self.bytes = _bytes_of_tensors(self.device)
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True).__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
            return
        self._profile.__exit__(kind, error, traceback)
        # The profiler's public views add these events up by operator; each is an allocation, or of negative size.
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        self.bytes += max(accumulate(changes, initial=0))


def _bytes_of_tensors(device: torch.device) -> int:
    """Of every tensor that Python knows; tensors that share memory count once."""
    # Sharded tensors hold a plain one, which is an object of its own.
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.device.type == device.type]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
