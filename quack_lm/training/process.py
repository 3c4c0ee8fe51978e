"""What a process that trains settles before its first tensor: freed memory, torch's numerics, the other ranks."""

from collections.abc import Sequence

from quack_lm.parallel import World, launched_world, start_world
from quack_lm.training.memory import keep_freed_memory
from quack_lm.training.numerics import set_numerics
from quack_lm.training.settings import TrainerSettings


def start_process(
    settings: Sequence[TrainerSettings], *, device: str, keeps_freed_memory: bool = True, timeout_s: float = 600.0
) -> World:
    """Join the other ranks as the first of the settings asks, wrapped by FSDP if any of them is.

    `keeps_freed_memory` is for a CPU. RuntimeError where the others do not come within `timeout_s`.
    """
    if device == "cpu" and keeps_freed_memory:
        keep_freed_memory()
    set_numerics(is_deterministic=settings[0].deterministic)
    is_wrapped = any(one.is_wrapped(launched_world()[1]) for one in settings)
    return start_world(device=device, is_wrapped=is_wrapped, replicas=settings[0].replicas, timeout_s=timeout_s)
