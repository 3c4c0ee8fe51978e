"""What a step consists of, by torch's profiler."""

from pathlib import Path

from torch.profiler import profile

from quack_lm.bench.step import TimedStep
from quack_lm.errors import explaining
from quack_lm.parallel import World
from quack_lm.training.profiler import activities, operators, write_trace

STEPS = 3


def trace(step: TimedStep, path: Path, world: World) -> list[str]:
    """Write the main process's trace of a few steps to a .json or .json.gz file; the operators that took longest."""
    if not world.is_main:
        step.turn(STEPS)
        return []
    with profile(activities=activities()) as profiler:
        step.turn(STEPS)
    with explaining(f"trace={path}", "or choose another"):
        write_trace(profiler, path)
    return operators(profiler)
