"""The moments of AdamW in bfloat16 between its steps; within a step they are float32, as its fused kernel wants."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def hold_moments_in(optimizer: Optimizer, dtype: torch.dtype) -> None:
    """Round the moments of an AdamW to `dtype` after each step, and widen them for the next one.

    The float32 copies exist while there are no activations, so they do not add to the peak of a training step.
    """
    held: dict[tuple[Tensor, str], Tensor] = {}

    def widen(*_: Any) -> None:
        for parameter, state in optimizer.state.items():
            for name in MOMENTS:
                held[parameter, name] = state[name]
                state[name] = state[name].float()

    def narrow(*_: Any) -> None:
        for parameter, state in optimizer.state.items():
            for name in MOMENTS:
                # The same tensor from step to step: checkpoints keep a pinned buffer for each that they have seen.
                kept = held.pop((parameter, name), None)
                state[name] = state[name].to(dtype) if kept is None else kept.copy_(state[name])

    optimizer.register_step_pre_hook(widen)
    optimizer.register_step_post_hook(narrow)
