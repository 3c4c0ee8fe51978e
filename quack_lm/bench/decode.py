"""Decoding: one token after another behind a context of a given length."""

import json
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from quack_lm.bench.step import Phases, Timing, timed
from quack_lm.errors import UserError
from quack_lm.model import Transformer
from quack_lm.parallel import World, materialize
from quack_lm.training.build import make_model

# Those in use, by their config: variants that differ in the length of the context alone share one.
_MODELS: WeakValueDictionary[str, Transformer] = WeakValueDictionary()


class DecodeStep:
    """A token for each of `trainer.micro_batch_size` sequences, of which a cache has `trainer.seq_len` tokens already.

    The cache has random contents of a unit scale, as that of an initial model has. `keeps_keys`: full keys and values.
    """

    def __init__(self, config: dict[str, Any], world: World, *, keeps_keys: bool) -> None:
        if world.size > 1:
            raise UserError("suite=decode runs in one process; start it without torchrun")
        self.device = world.device
        self.context = config["trainer"]["seq_len"]
        self.tokens_per_step = config["trainer"]["micro_batch_size"]
        self.model = _model(config, self.device, keeps_keys=keeps_keys)
        self.cache = self.model.make_cache(self.tokens_per_step, self.context + 1)
        generator = torch.Generator(self.device).manual_seed(config["seed"])
        for layer in self.cache.layers:
            for entry in layer.tensors.values():
                entry.normal_(generator=generator)
        self.new_BT = torch.zeros(self.tokens_per_step, 1, dtype=torch.long, device=self.device)

    @property
    def cache_bytes(self) -> int:
        """Of a token in a layer."""
        return self.cache.bytes // (len(self.cache.layers) * self.cache.capacity * self.tokens_per_step)

    @property
    def memory_bytes(self) -> int:
        """Of the weights, which variants share, and the cache."""
        return self.cache.bytes + sum(p.numel() * p.element_size() for p in self.model.parameters())

    def turn(self, steps: int) -> Timing:
        """Make so many steps, each behind the same context."""
        return timed(self, self.device, steps)

    def __call__(self, phases: Phases) -> None:
        """One step."""
        self.cache.rewind(self.context)
        self.model.decode(self.new_BT, self.cache)
        phases.mark("forward")


def _model(config: dict[str, Any], device: torch.device, *, keeps_keys: bool) -> Transformer:
    sections = {name: config[name] for name in ("model", "attention", "stabilizer", "seed")}
    precision = config["trainer"]["precision"]
    key = json.dumps({**sections, "precision": precision, "keeps_keys": keeps_keys})
    if (known := _MODELS.get(key)) is not None:
        return known
    # The kernels of training are not used.
    model = make_model({**config, "attention": {**config["attention"], "backend": "sdpa"}})
    for attention in model.attentions:
        attention.keeps_keys = keeps_keys
    materialize(model, partial(model.initial_value, seed=config["seed"], device=device), device)
    _MODELS[key] = model.to(getattr(torch, precision)).eval()
    return model
