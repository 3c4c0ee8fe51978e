"""Muon alone, without a model around it: ours, and torch's."""

from typing import Any

import torch
from torch import nn

from quack_lm.bench.step import Phases, Timing, timed
from quack_lm.config import instantiate
from quack_lm.errors import UserError
from quack_lm.optim.recipe import MuonRecipe
from quack_lm.parallel import World
from quack_lm.training.build import make_model


class MuonStep:
    """A step of Muon over random matrices and gradients of the shapes that a config's blocks have.

    `shape`: of a single one in each block instead, rows and columns in multiples of the model's width.
    """

    tokens_per_step = 0

    def __init__(
        self, config: dict[str, Any], world: World, *, is_ours: bool, shape: tuple[float, float] | None = None
    ) -> None:
        recipe = instantiate(config["optimizer"])
        if not isinstance(recipe, MuonRecipe) or world.mesh is not None:
            raise UserError("suite=muon needs optimizer=muon and trainer.precision=float32, in one process")
        self.device = world.device
        generator = torch.Generator(self.device).manual_seed(config["seed"])
        blocks = nn.Module()
        if shape is None:
            shapes = [tuple(p.shape) for p in make_model(config).blocks.parameters() if p.ndim == 2]
        else:
            size = tuple(round(times * config["model"]["d_model"]) for times in shape)
            shapes = [size] * config["model"]["n_layers"]
        for number, size in enumerate(shapes):
            weight, gradient = (torch.randn(size, device=self.device, generator=generator) for _ in range(2))
            blocks.register_parameter(str(number), nn.Parameter(weight))
            blocks.get_parameter(str(number)).grad = gradient
        if is_ours:
            rest = nn.Linear(1, 1, bias=False, device=self.device)  # for AdamW, which is not measured
            self.optimizer: torch.optim.Optimizer = recipe.build(nn.ModuleDict({"blocks": blocks, "rest": rest}))[0]
        else:
            self.optimizer = torch.optim.Muon(
                blocks.parameters(),
                lr=recipe.lr,
                momentum=recipe.momentum,
                nesterov=recipe.nesterov,
                weight_decay=recipe.weight_decay,
            )

    def turn(self, steps: int) -> Timing:
        """Make so many steps."""
        return timed(self, self.device, steps)

    def __call__(self, phases: Phases) -> None:
        """One step."""
        self.optimizer.step()
        phases.mark("optimizer")
