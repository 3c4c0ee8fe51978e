"""The training step of a config on random tokens, with the time of each of its phases."""

import time
from typing import Any

import torch
from torch import Tensor

from quack_lm.config import instantiate
from quack_lm.optim.recipe import Recipe, set_lr
from quack_lm.parallel import World, clip_gradients, set_gradient_reduction
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.step import LogitWeights, stabilized_step
from quack_lm.training.build import initialize_stabilizer, make_model, place_model
from quack_lm.training.settings import TrainerSettings


class Phases:
    """The time of named phases in turn: on a GPU by its own clock, without waiting for it before the end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []
        self.mark("start")

    def mark(self, name: str) -> None:
        """The end of a phase, and the start of the next."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((name, event))
        else:
            self.marks.append((name, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """By phase; one that was marked several times is the sum. Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        found: dict[str, float] = {}
        for (_, before), (name, after) in zip(self.marks, self.marks[1:], strict=False):
            passed = before.elapsed_time(after) / 1e3 if self.device.type == "cuda" else after - before
            found[name] = found.get(name, 0.0) + passed
        return found


class TrainingStep:
    """The model, optimizers and stabilizer of a config, and the step that `training/loop.py` makes with them."""

    def __init__(self, config: dict[str, Any], world: World) -> None:
        settings: TrainerSettings = instantiate(config["trainer"])
        recipe: Recipe = instantiate(config["optimizer"])
        self.world = world
        self.stabilizer: Stabilizer = instantiate(config["stabilizer"])
        self.model = make_model(config, self.stabilizer)
        place_model(self.model, settings, world, seed=config["seed"])
        self.optimizers = recipe.build(self.model)
        self.weights = LogitWeights(self.model.attentions)
        initialize_stabilizer(self.stabilizer, self.weights)
        self.max_grad_norm = recipe.max_grad_norm
        self.reduces_every_micro_batch = settings.reduce_every_micro_batch
        self.micro_batches = self._random_tokens(config, settings)
        self.tokens_per_step = settings.global_batch_size * settings.seq_len
        # Small, so that however many steps are made the model stays as it was drawn.
        set_lr(self.optimizers, 1e-3)

    def _random_tokens(self, config: dict[str, Any], settings: TrainerSettings) -> list[Tensor]:
        size, length = settings.sequences_at_once, settings.seq_len + 1
        count = settings.global_batch_size // (size * self.world.size)
        generator = torch.Generator().manual_seed(config["seed"] + self.world.rank)
        vocabulary = config["model"]["vocab_size"]
        return [torch.randint(vocabulary, (size, length), generator=generator) for _ in range(count)]

    def __call__(self, phases: Phases) -> None:
        """One step."""
        for number, tokens in enumerate(self.micro_batches, start=1):
            is_last = number == len(self.micro_batches)
            set_gradient_reduction(self.model, self.reduces_every_micro_batch or is_last)
            tokens = self.world.to_device(tokens)
            loss = self.model(tokens[:, :-1], tokens[:, 1:]).sum() / self.tokens_per_step
            phases.mark("forward")
            (loss * (self.world.size if self.world.mesh is not None else 1)).backward()
            phases.mark("backward")
        clip_gradients(list(self.model.parameters()), self.max_grad_norm)
        phases.mark("optimizer")
        hooks = [hook for optimizer in self.optimizers for hook in _marking(optimizer, phases)]
        stabilized_step(self.optimizers, self.stabilizer, self.weights, self.world)
        phases.mark("stabilizer")
        for hook in hooks:
            hook.remove()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        phases.mark("optimizer")


def _marking(optimizer: torch.optim.Optimizer, phases: Phases) -> list[Any]:
    """Mark an optimizer's own part of the stabilized step."""
    return [
        optimizer.register_step_pre_hook(lambda *_: phases.mark("stabilizer")),
        optimizer.register_step_post_hook(lambda *_: phases.mark("optimizer")),
    ]
