"""Learning-rate schedules as plain functions: the factor on the base rate at a step, counted from 0."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

ScheduleName = Literal["constant", "cosine", "wsd"]


def make_schedule(
    name: ScheduleName, *, total_steps: int, warmup_steps: int, decay_fraction: float, min_lr_ratio: float
) -> Callable[[int], float]:
    """Linear warm-up, then `constant` (the paper), `cosine` to the end, or `wsd`: linear decay in the last fraction."""
    shapes: dict[str, Callable[[float], float]] = {
        "constant": _constant,
        "cosine": partial(_cosine, min_lr_ratio=min_lr_ratio),
        "wsd": partial(_wsd, decay_fraction=decay_fraction, min_lr_ratio=min_lr_ratio),
    }
    after = shapes[name]

    def schedule(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return after((step - warmup_steps) / max(1, total_steps - warmup_steps))

    return schedule


def _constant(progress: float) -> float:
    return 1.0


def _cosine(progress: float, *, min_lr_ratio: float) -> float:
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _wsd(progress: float, *, decay_fraction: float, min_lr_ratio: float) -> float:
    into_decay = max(0.0, (min(progress, 1.0) - (1 - decay_fraction)) / decay_fraction)
    return 1 - (1 - min_lr_ratio) * into_decay
