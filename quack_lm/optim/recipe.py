"""Which parameter is optimized how: hidden matrices by Muon and the rest by AdamW, or all by AdamW."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn
from torch.optim import Optimizer

from quack_lm.errors import UserError
from quack_lm.optim.moments import hold_moments_in
from quack_lm.optim.muon import Muon, UpdateScale
from quack_lm.optim.schedule import ScheduleName, make_schedule

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
# Far above any rate that trains, and small enough for float32 times every scale of an update.
Rate = Annotated[float, Field(gt=0, le=1e36)]
# bfloat16 numbers lie up to 2^-7 apart, relative to their size: a smaller share of a change than half of that is lost.
LARGEST_BFLOAT16_DECAY = 1 - 2**-8


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A base rate with its schedule, and the settings of AdamW, which has a part in every recipe.

    Args:
        lr: base learning rate.
        warmup_steps: steps of linear warm-up to the base learning rate.
        schedule: what the rate does after warm-up.
        decay_fraction: share of the run in which the wsd schedule decays.
        min_lr_ratio: where the cosine and wsd schedules end, relative to the base learning rate.
        weight_decay: decoupled weight decay; norm gains have none.
        max_grad_norm: global norm to which gradients are clipped, before any optimizer; null: no clipping.
        adamw_beta1: AdamW's decay of the first moment.
        adamw_beta2: AdamW's decay of the second moment.
        adamw_eps: AdamW's epsilon.
        state_dtype: what AdamW's moments and Muon's momentum are kept in between steps; they are updated in float32.
    """

    lr: Rate
    warmup_steps: NonNegativeInt
    schedule: ScheduleName = "constant"
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2
    min_lr_ratio: Fraction = 0.0
    weight_decay: NonNegativeFloat = 0.0
    max_grad_norm: PositiveFloat | None = 1.0
    adamw_beta1: Beta = 0.9
    adamw_beta2: Beta = 0.95
    adamw_eps: PositiveFloat = 1e-8
    state_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        """Refuse moments that rounding would keep from changing."""
        decays = {name: getattr(self, name, 0.0) for name in ("adamw_beta1", "adamw_beta2", "momentum")}
        name = max(decays, key=decays.__getitem__)
        if self.state_dtype == "bfloat16" and decays[name] > LARGEST_BFLOAT16_DECAY:
            raise UserError(
                f"optimizer.{name}={decays[name]} is above {LARGEST_BFLOAT16_DECAY:.4f}, where bfloat16 rounds the "
                "changes away; use optimizer.state_dtype=float32"
            )

    @abstractmethod
    def build(self, model: nn.Module) -> list[Optimizer]:
        """Optimizers that hold every trainable parameter of the model exactly once."""

    def make_schedule(self, total_steps: int) -> Callable[[int], float]:
        """The factor on every rate at each step."""
        return make_schedule(
            self.schedule,
            total_steps=total_steps,
            warmup_steps=self.warmup_steps,
            decay_fraction=self.decay_fraction,
            min_lr_ratio=self.min_lr_ratio,
        )

    def _adamw(self, parameters: Iterable[nn.Parameter], lr: float) -> Optimizer:
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        betas = (self.adamw_beta1, self.adamw_beta2)
        # On the meta device, where the state is made only to see what a checkpoint must hold, no kernel is fused.
        is_fused = not any(p.is_meta for p in parameters)
        optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=lr, betas=betas, eps=self.adamw_eps, fused=is_fused
        )
        if self.state_dtype != "float32":
            hold_moments_in(optimizer, getattr(torch, self.state_dtype))
        return optimizer


@dataclass(frozen=True, kw_only=True)
class AdamWRecipe(Recipe):
    """AdamW for every parameter."""

    def build(self, model: nn.Module) -> list[Optimizer]:
        """A single AdamW over all parameters, norm gains without decay."""
        return _checked(model, [self._adamw(model.parameters(), self.lr)])


@dataclass(frozen=True, kw_only=True)
class MuonRecipe(Recipe):
    """Muon for the matrices inside the blocks; AdamW for embedding, head and norms.

    Args:
        momentum: Muon's momentum.
        nesterov: whether the momentum is Nesterov's.
        update_scale: scale of Muon's update: jordan is max(1, rows/cols)^0.5, moonlight 0.2 max(rows, cols)^0.5.
        ns_dtype: precision of the Newton-Schulz products.
        adamw_lr: learning rate of the AdamW part; null: the same as lr.
    """

    momentum: Beta = 0.95
    nesterov: bool = True
    update_scale: UpdateScale = "jordan"
    ns_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    adamw_lr: Rate | None = None

    def build(self, model: nn.Module) -> list[Optimizer]:
        """[Muon over the matrices of the blocks, AdamW over the rest]."""
        hidden = {p: None for p in model.get_submodule("blocks").parameters() if p.ndim == 2}
        muon = Muon(
            hidden,
            lr=self.lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
            update_scale=self.update_scale,
            ns_dtype=getattr(torch, self.ns_dtype),
            state_dtype=getattr(torch, self.state_dtype),
        )
        rest = [p for p in model.parameters() if p not in hidden]
        return _checked(model, [muon, self._adamw(rest, self.adamw_lr or self.lr)])


def set_lr(optimizers: list[Optimizer], factor: float) -> float:
    """Scale every group's base rate by the schedule's factor; returns the rate of the first group."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
    return float(optimizers[0].param_groups[0]["lr"])


def _checked(model: nn.Module, optimizers: list[Optimizer]) -> list[Optimizer]:
    held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters()), "each parameter belongs to exactly one group"
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers
