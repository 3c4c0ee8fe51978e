"""A trace of chosen steps, by torch's profiler: where the time of a step goes, by region and by operator.

The regions are those of the training loop, `data`, `forward`, `backward`, `clip_gradients` and `stabilizer`, and
in the last torch's own `Optimizer.step#...`. `attention` is marked in a trace alone, and where nothing is compiled.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from quack_lm.errors import explaining
from quack_lm.model import Transformer
from quack_lm.text import echo

REGIONS = ("data", "forward", "attention", "backward", "clip_gradients", "stabilizer")
OPTIMIZER = "Optimizer.step#"
OPERATORS = 15
MEMORY_EVENTS = 100_000


class StepProfiler:
    """Traces steps `first` to `last` of a run into a directory; without steps it does nothing.

    `trace_rank0.json.gz` is for Perfetto or chrome://tracing, and on CUDA `memory_rank0.pickle` for
    pytorch.org/memory_viz. Every rank writes its own.
    """

    def __init__(self, directory: Path, steps: Sequence[int] | None, model: Transformer, *, rank: int) -> None:
        self.directory = directory
        self.first, self.last = steps or (0, -1)
        self.model = model
        self.rank = rank
        self._profile: profile | None = None
        self._made = 0
        self._hooks: list[Any] = []

    def is_due(self, step: int) -> bool:
        """Whether the trace begins or ends when so many steps are made."""
        return step == self.first - 1 or (step == self.last and self._profile is not None)

    def advance(self, step: int) -> None:
        """Begin the trace, or write it; where it `is_due`."""
        if self._profile is None:
            self._start(step)
        else:
            self.close(step)

    def close(self, step: int) -> None:
        """Write the trace of the steps that were made since it began, if it has, and print what it says."""
        if self._profile is None:
            return
        profiler, self._profile = self._profile, None
        profiler.stop()
        for hook in self._hooks:
            hook.remove()
        with explaining(f"trainer.profile: {self.directory}", "and make it writable"):
            write_trace(profiler, self.directory / f"trace_rank{self.rank}.json.gz")
            if torch.cuda.is_available():
                torch.cuda.memory._dump_snapshot(str(self.directory / f"memory_rank{self.rank}.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
        if self.rank == 0:
            echo(*regions(profiler, step - self._made), "", *operators(profiler), f"trace: {self.directory}", err=True)

    def _start(self, step: int) -> None:
        self._made = step
        if not self.model.is_compiled:
            self._hooks = [hook for attention in self.model.attentions for hook in _marking(attention, "attention")]
        if torch.cuda.is_available():
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it tells stderr that there is no GPU
        self._profile = profile(activities=activities())
        self._profile.start()


def activities() -> list[ProfilerActivity]:
    """What there is to trace on this machine."""
    return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]


def write_trace(profiler: profile, path: Path) -> None:
    """Write a trace to a .json or .json.gz file; complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".writing_{path.name}")
    profiler.export_chrome_trace(str(temporary))  # which only prints where it fails
    temporary.replace(path)


def operators(profiler: profile) -> list[str]:
    """The operators that took longest, as the lines of a table."""
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    table: str = profiler.key_averages().table(sort_by=order, row_limit=OPERATORS, max_name_column_width=60)
    return table.splitlines()


def regions(profiler: profile, steps: int) -> list[str]:
    """The time of each region in a mean step, on the host, and on the GPU where there is one, as lines."""
    lines = [f"{'region':32}  ms a step" + "    on the GPU" * torch.cuda.is_available()]
    for event in profiler.key_averages():
        if event.key in REGIONS or event.key.startswith(OPTIMIZER):
            times = [event.cpu_time_total, *([event.device_time_total] if torch.cuda.is_available() else [])]
            lines.append(f"{event.key:32}" + "".join(f"{time / 1e3 / steps:11.3f}" for time in times))
    return lines


def _marking(module: nn.Module, name: str) -> list[Any]:
    """Make the forward of a module a region, until the hooks are removed."""
    open_regions: list[record_function] = []

    def is_counted() -> bool:
        """Not in a probe or a validation, and not where a backward computes activations again."""
        return module.training and torch._C._current_graph_task_id() == -1

    def enter(*_: Any) -> None:
        if is_counted():
            open_regions.append(record_function(name))
            open_regions[-1].__enter__()

    def leave(*_: Any) -> None:
        if is_counted():
            open_regions.pop().__exit__(None, None, None)

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
