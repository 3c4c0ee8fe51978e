"""The training step of a config on random tokens, with the time of each of its phases."""

import time
from collections.abc import Callable
from resource import RUSAGE_SELF, getrusage
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from quack_lm.config import instantiate
from quack_lm.data.batches import Sequences, TrainBatches
from quack_lm.errors import UserError
from quack_lm.optim.recipe import Recipe, set_lr
from quack_lm.parallel import World, clip_gradients, memory_of_a_rank, set_gradient_reduction
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.step import LogitWeights, stabilized_step
from quack_lm.training.build import choose_kernels, initialize_stabilizer, make_model, place_model
from quack_lm.training.settings import TrainerSettings

# Of the base rates: small, so that however many steps are made the model stays as it was drawn.
LR_FACTOR = 1e-3
# Of random tokens, where the attention stays within documents: their mean length, and what ends one.
DOCUMENT_TOKENS, EOT_ID = 512, 0


class Timing(NamedTuple):
    """The mean time of a step of a turn, and of each of its phases; and its minor page faults, where they are known."""

    step_s: float
    phases_s: dict[str, float]
    page_faults: float | None = None


class TimedStep(Protocol):
    """What the rounds compare."""

    tokens_per_step: int  # over all ranks

    def turn(self, steps: int) -> Timing:
        """Make so many steps."""


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


def timed(step: Callable[[Phases], object], device: torch.device, steps: int) -> Timing:
    """The mean of so many steps in a row."""
    phases, faults = Phases(device), getrusage(RUSAGE_SELF).ru_minflt
    start = time.perf_counter()
    for _ in range(steps):
        step(phases)
    phases_s = {name: seconds / steps for name, seconds in phases.seconds().items()}
    step_s = (time.perf_counter() - start) / steps
    return Timing(step_s, phases_s, (getrusage(RUSAGE_SELF).ru_minflt - faults) / steps)


class TrainingStep:
    """The model, optimizers and stabilizer of a config, and the step that `training/loop.py` makes with them."""

    def __init__(self, config: dict[str, Any], world: World) -> None:
        self.settings: TrainerSettings = instantiate(config["trainer"])
        recipe: Recipe = instantiate(config["optimizer"])
        self.world = world
        self.stabilizer: Stabilizer = instantiate(config["stabilizer"])
        self.model = make_model(config, self.stabilizer)
        self.model.eot_id = EOT_ID if config["data"]["mask_documents"] else None
        choose_kernels(self.model, self.settings, device=world.device.type)
        place_model(self.model, self.settings, world, seed=config["seed"], is_compiled=self.settings.compile is True)
        self.optimizers = recipe.build(self.model)
        self.weights = LogitWeights(self.model.attentions)
        initialize_stabilizer(self.stabilizer, self.weights)
        self.max_grad_norm = recipe.max_grad_norm
        tokens = random_tokens(config, n_sequences=self.settings.global_batch_size)
        self.batches = self.batches_of(Sequences([tokens], self.settings.seq_len), seed=config["seed"])
        self.tokens_per_step = self.settings.global_batch_size * self.settings.seq_len
        self.step = 0
        self.lr = set_lr(self.optimizers, LR_FACTOR)

    def batches_of(self, sequences: Sequences, *, seed: int) -> TrainBatches:
        """This rank's batches of them."""
        return TrainBatches(
            sequences,
            seed=seed,
            global_batch_size=self.settings.global_batch_size,
            micro_batch_size=self.settings.sequences_at_once,
            rank=self.world.rank,
            world_size=self.world.size,
        )

    def turn(self, steps: int) -> Timing:
        """Make so many steps."""
        return timed(self, self.world.device, steps)

    def __call__(self, phases: Phases) -> tuple[Tensor, Tensor | float]:
        """One step: this rank's share of the loss, and the norm of the gradient."""
        share = torch.zeros((), device=self.world.device)
        for number, tokens in enumerate(self.batches.micro_batches(self.step), start=1):
            n_documents = self.model.count_documents(tokens[:, :-1])
            tokens = self.world.to_device(tokens)
            phases.mark("data")
            is_last = number == self.batches.n_micro_batches
            set_gradient_reduction(self.model, self.settings.reduce_every_micro_batch or is_last)
            loss = self.loss(tokens, n_documents)
            phases.mark("forward")
            (loss * (self.world.size if self.world.mesh is not None else 1)).backward()
            share += loss.detach()
            phases.mark("backward")
        grad_norm = clip_gradients(list(self.model.parameters()), self.max_grad_norm)
        phases.mark("optimizer")
        hooks = [hook for optimizer in self.optimizers for hook in _marking(optimizer, phases)]
        stabilized_step(self.optimizers, self.stabilizer, self.weights, self.world)
        phases.mark("stabilizer")
        for hook in hooks:
            hook.remove()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        phases.mark("optimizer")
        self.step += 1
        return share, grad_norm

    def micro_batch(self) -> Tensor:
        """The first one, on the device."""
        return self.world.to_device(next(self.batches.micro_batches(0)))

    def loss(self, tokens: Tensor, n_documents: int | None = None) -> Tensor:
        """The part of a micro-batch [B, T + 1] in the mean loss per token."""
        return self.model(tokens[:, :-1], tokens[:, 1:], n_documents).sum() / self.tokens_per_step


def check_memory_of_tokens(config: dict[str, Any]) -> None:
    """UserError where the sequences of a step do not fit into the memory of a process."""
    batch, seq_len = (config["trainer"][key] for key in ("global_batch_size", "seq_len"))
    needed, available = batch * seq_len * _dtype(config).itemsize, memory_of_a_rank("cpu")
    if needed > available:
        raise UserError(
            f"trainer.global_batch_size={batch} sequences of trainer.seq_len={seq_len}, which a benchmark keeps, "
            f"take {needed / 2**30:,.0f} GiB of the {available / 2**30:,.0f} GiB that each process has"
        )


def random_tokens(config: dict[str, Any], *, n_sequences: int) -> np.ndarray:
    """Ids of the vocabulary, as many as the sequences have together; the same on every rank."""
    vocab_size, seq_len = config["model"]["vocab_size"], config["trainer"]["seq_len"]
    dtype = _dtype(config)
    generator, count = np.random.default_rng(config["seed"]), n_sequences * seq_len + 1
    tokens = generator.integers(vocab_size, size=count, dtype=dtype)
    if config["data"]["mask_documents"]:
        tokens[generator.integers(DOCUMENT_TOKENS, size=count) == 0] = EOT_ID
    return tokens


def _dtype(config: dict[str, Any]) -> np.dtype:
    """As in prepared data."""
    return np.dtype(np.uint16 if config["model"]["vocab_size"] <= 1 << 16 else np.uint32)


def _marking(optimizer: torch.optim.Optimizer, phases: Phases) -> list[Any]:
    """Mark an optimizer's own part of the stabilized step."""
    return [
        optimizer.register_step_pre_hook(lambda *_: phases.mark("stabilizer")),
        optimizer.register_step_post_hook(lambda *_: phases.mark("optimizer")),
    ]
