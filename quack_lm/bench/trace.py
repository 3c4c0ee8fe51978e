"""What a step consists of, by torch's profiler."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from quack_lm.bench.step import Phases
from quack_lm.errors import explaining

STEPS = 3
OPERATIONS = 15


def trace(step: Callable[[Phases], None], path: Path, *, device: torch.device) -> str:
    """Write the trace of a few steps to a .json or .json.gz file; the operations that took longest, as a table."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    phases = Phases(device)
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            step(phases)
        phases.seconds()  # waits for the device
    with explaining(f"trace={path}", "or choose another"):
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    order = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=OPERATIONS, max_name_column_width=60)
