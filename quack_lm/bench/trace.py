"""What a step consists of, by torch's profiler."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from quack_lm.bench.step import TimedStep
from quack_lm.errors import explaining

STEPS = 3
OPERATIONS = 15


def trace(step: TimedStep, path: Path, *, device: torch.device) -> str:
    """Write the trace of a few steps to a .json or .json.gz file; the operations that took longest, as a table."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        step.turn(STEPS)
    with explaining(f"trace={path}", "or choose another"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".writing_{path.name}")
        profiler.export_chrome_trace(str(temporary))  # which only prints where it fails
        temporary.replace(path)
    order = "self_device_time_total" if is_cuda else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=OPERATIONS, max_name_column_width=60)
