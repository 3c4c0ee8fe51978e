"""Small models of odd and unequal sizes, composed and built as a run does it, for the tests that need one."""

from copy import deepcopy
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from quack_lm.config import choices, compose
from quack_lm.model import Transformer
from quack_lm.parallel import World, materialize, shard
from quack_lm.training.build import make_model

LONE = World(0, 1, 0, torch.device("cpu"))

SIZES = [
    "model.vocab_size=41",
    "model.d_model=30",
    "model.n_layers=2",
    "model.n_heads=3",
    "model.d_ff=35",
    "trainer.steps=20",
    "optimizer.warmup_steps=0",
]

# Every attention that has a yaml, so that a newcomer is covered the day it arrives, and forms of them worth having.
ATTENTIONS: dict[str, list[str]] = {name: [f"attention={name}"] for name in choices("attention")}
LATENTS = ["attention.q_latent_dim=11", "attention.kv_latent_dim=7"]
ATTENTIONS["mla"] += [*LATENTS, "attention.nope_dim=5", "attention.rope_dim=2", "attention.v_dim=3"]
ATTENTIONS["gqa"] = ["attention=mha", "attention.n_heads=6", "attention.n_kv_heads=2", "attention.head_dim=4"]
ATTENTIONS["mha_one_head"] = ["attention=mha", "attention.n_heads=1", "attention.head_dim=6"]
ATTENTIONS["mla_one_head"] = [
    "attention=mla",
    *LATENTS,
    "attention.n_heads=1",
    "attention.nope_dim=5",
    "attention.rope_dim=4",
]
ATTENTIONS["mla_wide_values"] = [
    "attention=mla",
    *LATENTS,
    "attention.nope_dim=3",
    "attention.rope_dim=2",
    "attention.v_dim=9",
]
# A tiny eps: then a normalized latent does not know how large its down-projection is.
ATTENTIONS["mla_latent_norm"] = [*ATTENTIONS["mla"], "attention.latent_norm=true", "attention.norm_eps=1e-30"]

OPTIMIZERS = {name: [f"optimizer={name}"] for name in choices("optimizer")}
# Exact enough to compare with; bfloat16 has tests of its own.
OPTIMIZERS["muon"] += ["optimizer.ns_dtype=float32"]

STABILIZERS = choices("stabilizer")


def small_config(attention: str, stabilizer: str = "none", *overrides: str, optimizer: str = "muon") -> dict[str, Any]:
    """A checked config around one of `ATTENTIONS`, a stabilizer and one of `OPTIMIZERS`."""
    chosen = [*ATTENTIONS[attention], f"stabilizer={stabilizer}", *OPTIMIZERS[optimizer]]
    return deepcopy(_compose(*chosen, *SIZES, *overrides))


@cache
def _compose(*overrides: str) -> dict[str, Any]:
    return compose(["model=tiny", "data=stdlib", "trainer=tiny", *overrides])


def small_model(
    config: dict[str, Any], *, world: World = LONE, eot_id: int | None = None, backend: str | None = None
) -> Transformer:
    """The config's model with its initial weights, in training mode, sharded over the world."""
    section = config["attention"] | ({"backend": backend} if backend else {})
    model = make_model({**config, "attention": section})
    model.eot_id = eot_id
    shard(model, list(model.blocks), world, precision="float32")
    materialize(model, partial(model.initial_value, seed=config["seed"], device=world.device), world.device)
    return model


def tokens(n_sequences: int, length: int = 9, *, seed: int = 0, vocab_size: int = 41) -> Tensor:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (n_sequences, length), generator=generator)
