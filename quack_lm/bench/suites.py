"""What each suite compares: variants of one config, the first of which the others are relative to."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from quack_lm.config import choices, chosen_groups, compose, flatten, groups
from quack_lm.errors import UserError

# The tiny experiment's matrices start larger, for its width of 64. Here logits would be so large that attention weights
# become subnormal numbers, which a CPU multiplies many times slower.
INIT = "model.init_std=0.02"
# A model whose step takes a fraction of a second on one core, and whose matrices are large enough to count.
BASE = (
    "experiment=tiny",
    INIT,
    "model.vocab_size=4096",
    "model.d_model=256",
    "model.n_layers=4",
    "model.n_heads=8",
    "model.d_ff=1024",
    "model.tied_embeddings=true",
    "trainer.seq_len=512",
    "trainer.micro_batch_size=8",
    "trainer.global_batch_size=8",
    "trainer.compile=false",
)
# A layer of the paper's 1B model, decoding one sequence.
DECODE_BASE = (
    "experiment=tiny",
    INIT,
    "model.vocab_size=4096",
    "model.d_model=2048",
    "model.n_layers=1",
    "model.n_heads=32",
    "model.d_ff=8192",
    "model.tied_embeddings=true",
    "trainer.micro_batch_size=1",
    "trainer.global_batch_size=1",
    "trainer.compile=false",
)
CONTEXTS = (128, 512, 2048, 8192, 32768)
# The intervals of the paper's runs; but checkpoints, of which a turn should not take 500 steps.
INTERVALS = ("logger.log_every=10", "trainer.probe_every=50", "trainer.checkpoint_every=50")

# What some peers need besides the project's own dependencies, and the extra that installs it.
PACKAGES = {"llama Trainer": "accelerate", "litgpt": "litgpt", "torchtitan": "torchtitan"}
INSTALL = "pip install -e '.[peers]'"
# Settings that the models and optimizers of other libraries do not follow.
UNEQUAL = (
    "attention._target_",
    "attention.latent_norm",
    "optimizer._target_",
    "optimizer.state_dtype",
    "stabilizer.",
    "trainer.activation_checkpointing",
)

Part = Literal["data", "log", "probe", "checkpoint"]
Scaling = Literal["strong", "weak"]
# What a cache has at decode: what the attention declares, or full keys and values.
Kept = Literal["declared", "keys"]


@dataclass(frozen=True)
class Variant:
    """The settings of one variant, and what makes its steps: our training step, unless something else is said.

    Args:
        settings: as of `quack-lm train`.
        baseline: the variant that it is relative to; None: the suite's first.
        parts: of a run, around the step.
        peer: whose step it is, a name in `peers.py`.
        package: what it needs besides the project's own dependencies.
        muon: whose optimizer makes a step, without a model.
        shape: of a matrix in each layer, in multiples of the model's width; None: the matrices of the blocks.
        decode: what the cache of a step has that decodes one token.
        ranks: how many processes torchrun starts for it.
        scaling: strong: they share the batch of one rank; weak: each has as much.
        is_isolated: whether its steps are made in a process of their own, with memory settings of their own.
        keeps_freed_memory: whether that process keeps what it has freed, on a CPU.
        needs_gpu: whether its kernels, or those of its backward pass, run on GPUs alone.
    """

    settings: Sequence[str] = ()
    baseline: str | None = None
    parts: tuple[Part, ...] = ()
    peer: str | None = None
    package: str | None = None
    muon: Literal["ours", "torch"] | None = None
    shape: tuple[float, float] | None = None
    decode: Kept | None = None
    ranks: int = 0
    scaling: Scaling = "strong"
    needs_gpu: bool = False
    is_isolated: bool = False
    keeps_freed_memory: bool = True

    def check_turn(self, config: dict[str, Any], steps: int) -> None:
        """UserError where a turn would have another share of an interval than its neighbors."""
        trainer = config["trainer"]
        intervals = {
            "log": ("logger.log_every", config["logger"]["log_every"]),
            "probe": ("trainer.probe_every", trainer["probe_every"]),
            "checkpoint": ("trainer.checkpoint_every", trainer["checkpoint_every"]),
        }
        for part in self.parts:
            key, every = intervals.get(part, ("", 1))
            if every == 0 or steps % every:
                raise UserError(f"steps={steps} must be a multiple of {key}={every}; set steps or {key}")

    def check_config(self, name: str, config: dict[str, Any]) -> None:
        """UserError where the config asks for what the variant does not do: a peer follows sizes alone."""
        optimizer = config["optimizer"]
        for key, dtype in (("ns_dtype", "bfloat16"), ("state_dtype", "float32")) if self.muon else ():
            if optimizer[key] != dtype:
                raise UserError(f"{name} has optimizer.{key}={dtype}, as torch's Muon has it; leave it out")
        trainer, own_chunk = config["trainer"], any(one.startswith("trainer.loss_chunk=") for one in self.settings)
        n_tokens, chunk = trainer["micro_batch_size"] * trainer["seq_len"], trainer["loss_chunk"]
        if own_chunk and isinstance(chunk, int) and chunk >= n_tokens:
            raise UserError(f"{name}: a micro-batch has {n_tokens} tokens, which are one piece; make it larger")
        if self.peer:
            alone = [*BASE, *self.settings]
            own, given = (
                {key: value for key, value in flatten(one).items() if key.startswith(UNEQUAL)}
                for one in (compose(alone), config)
            )
            if changed := [key for key in sorted(own | given) if own.get(key) != given.get(key)]:
                key = changed[0].removesuffix("._target_")
                value = chosen_groups(alone)[key] if key in groups() else json.dumps(own.get(key))
                raise UserError(f"{name} has {key}={value}; leave {key} out, or choose others with only=...")
        if config["data"]["mask_documents"] and (self.peer or self.decode):
            raise UserError(f"{name} masks no documents; leave data.mask_documents out")

    def share_batch(self, trainer: dict[str, Any]) -> list[str]:
        """The settings by which its ranks share the batch of a config, or have as much each."""
        batch, micro_batch = trainer["global_batch_size"], trainer["micro_batch_size"]
        if self.scaling == "weak":
            return [f"trainer.global_batch_size={batch * self.ranks}"]
        return [f"trainer.micro_batch_size={math.gcd(micro_batch, max(1, batch // self.ranks))}"]


Variants = Mapping[str, Variant]


@dataclass(frozen=True)
class Suite:
    """Variants, and how often each is measured unless the user says it; `base`: settings before all others."""

    variants: Variants
    base: Sequence[str] = BASE
    rounds: int = 10
    steps: int = 3
    warmup: int = 3


def _each(settings: Mapping[str, Sequence[str]]) -> Suite:
    return Suite({name: Variant(own) for name, own in settings.items()})


def _stabilizers() -> dict[str, Sequence[str]]:
    others = [name for name in choices("stabilizer") if name != "none"]
    return {name: [f"stabilizer={name}"] for name in ("none", *others)}


def _sizes(name: str, numbers: Sequence[int], *keys: str) -> Suite:
    """`keys` are settings in which `{}` is the number, and `{1}` four times it."""
    return _each({f"{name} {n}": [key.format(n, 4 * n) for key in keys] for n in numbers})


def _around(variants: Mapping[str, Variant]) -> Suite:
    """A turn is a whole number of intervals."""
    return Suite(variants, rounds=8, steps=50, warmup=50)


def _ranks() -> Variants:
    scalings: tuple[Scaling, ...] = ("strong", "weak")
    several = {f"ranks {kind} {n}": Variant(ranks=n, scaling=kind) for kind in scalings for n in (2, 4)}
    return {"ranks strong 1": Variant(ranks=1), **several}


def _decode() -> Variants:
    """Relative to MLA with a cache of latents and without a stabilizer, behind the same context."""
    forms: dict[str, tuple[list[str], Kept]] = {
        "mla": (["attention=mla"], "declared"),
        "mla qk_norm absorbed": (["attention=mla", "stabilizer=qk_norm"], "declared"),
        "mla qk_norm materialized": (["attention=mla", "stabilizer=qk_norm"], "keys"),
        "mha": (["attention=mha"], "declared"),
        "gqa": (["attention=mha", "attention.n_kv_heads=8"], "declared"),
    }
    return {
        f"{name} {n}": Variant([*settings, f"trainer.seq_len={n}"], baseline=f"mla {n}", decode=kept)
        for name, (settings, kept) in forms.items()
        for n in CONTEXTS
    }


def _peers() -> dict[str, Variant]:
    """Ours first; each peer with the same sizes, optimizer and number of tokens."""
    families: dict[tuple[str, ...], list[str]] = {
        ("qwen3",): ["stabilizer=qk_norm", "optimizer=adamw"],
        ("llama", "llama Trainer", "litgpt", "torchtitan"): ["optimizer=adamw"],
        ("deepseek_v3",): ["attention=mla", "attention.latent_norm=true", "optimizer=adamw"],
    }
    variants: dict[str, Variant] = {}
    for peers, settings in families.items():
        ours = f"ours as {peers[0]}"
        variants[ours] = Variant(settings, ours, is_isolated=True)
        variants |= {
            peer: Variant(
                settings,
                ours,
                peer=peer,
                package=PACKAGES.get(peer),
                is_isolated=True,
                keeps_freed_memory=False,  # as their users do
            )
            for peer in peers
        }
    return variants


def _muon(owners: Mapping[str, Variant]) -> Suite:
    """Ours relative to torch's, on the matrices of each of the given variants."""
    whose: tuple[Literal["torch", "ours"], ...] = ("torch", "ours")
    return Suite(
        {
            f"{name} {which}": replace(
                one,
                settings=[*one.settings, "optimizer=muon", "optimizer.ns_dtype=bfloat16"],
                baseline=f"{name} torch",
                muon=which,
            )
            for name, one in owners.items()
            for which in whose
        }
    )


def _scaling() -> Suite:
    """All suites of one size, each relative to its own first variant."""
    return Suite(
        {
            name: replace(one, baseline=next(iter(each.variants)))
            for each in (*SIZES.values(), Suite(_ranks()))
            for name, one in each.variants.items()
        },
        rounds=8,
        steps=1,
        warmup=1,
    )


def _kernels() -> Variants:
    ours = {
        f"{attention} {name}": Variant([f"attention={attention}", *settings], baseline=f"{attention} none")
        for attention in choices("attention")
        for name, settings in _stabilizers().items()
    }
    return {**ours, **{name: one for name, one in _peers().items() if name != "llama Trainer"}}


# How the cost grows; a name ends with the size.
SIZES: Mapping[str, Suite] = {
    "length": _sizes("length", (128, 256, 512, 1024, 2048), "trainer.seq_len={}"),
    "layers": _sizes("layers", (2, 4, 8, 16), "model.n_layers={}"),
    "width": _sizes("width", (128, 256, 512, 1024), "model.d_model={}", "model.d_ff={1}"),
    "vocabulary": _sizes("vocabulary", (1024, 4096, 16384, 65536), "model.vocab_size={}"),
}
# Rows and columns of the matrices of the blocks of the 1B models, in multiples of their width; the rotary key's last.
SHAPES = ((1, 1), (4, 1), (1, 4), (1, 2), (1, 0.25), (0.25, 1), (1, 0.125), (0.125, 1), (2, 0.125), (0.03125, 1))

SUITES: Mapping[str, Suite] = {
    "stabilizers": _each(_stabilizers()),
    "attention": _each(
        {
            "mha": ["attention=mha"],
            "gqa": ["attention=mha", "attention.n_kv_heads=2"],
            "mla": ["attention=mla"],
        }
    ),
    "optimizers": _each(
        {
            "adamw": ["optimizer=adamw"],
            "muon": ["optimizer=muon"],
            "muon in float32": ["optimizer=muon", "optimizer.ns_dtype=float32"],
        }
    ),
    "backends": Suite(
        {name: Variant([f"attention.backend={name}"], needs_gpu=name != "sdpa") for name in ("sdpa", "flash", "flex")}
    ),
    # QK clip's maxima: blocks of scores, FlexAttention's forward beside sdpa, and FlexAttention for everything.
    "max_logits": Suite(
        {
            "none": Variant(),
            "sdpa and matmul": Variant(["stabilizer=qk_clip", "trainer.max_logits=matmul"]),
            "sdpa and flex": Variant(["stabilizer=qk_clip", "trainer.max_logits=flex"], needs_gpu=True),
            "flex": Variant(["stabilizer=qk_clip", "attention.backend=flex"], needs_gpu=True),
        }
    ),
    "compile": _each({"eager": [], "compiled": ["trainer.compile=true"]}),
    # On the weights of the blocks alone, without forward and backward; and on one matrix of each block.
    "muon": _muon({name: Variant([f"attention={name}"]) for name in choices("attention")}),
    "muon_shapes": _muon({f"{m:g}x{n:g}": Variant(shape=(m, n)) for m, n in SHAPES}),
    "precision": _each({"float32": [], "bfloat16": ["trainer.precision=bfloat16"]}),
    "checkpointing": _each(
        {
            "none": [],
            "selective": ["trainer.activation_checkpointing=selective"],
            "every block": ["trainer.activation_checkpointing=true"],
        }
    ),
    "loss": _each(
        {
            "whole": ["model.vocab_size=49152", "trainer.loss_chunk=null"],
            "in pieces of 1024": ["model.vocab_size=49152", "trainer.loss_chunk=1024"],
        }
    ),
    # What a run does around the step.
    "loader": _around({"tokens in memory": Variant(), "memory-mapped": Variant(parts=("data",))}),
    "probe": _around(
        {
            "none": Variant(INTERVALS),
            "logging": Variant(INTERVALS, parts=("log",)),
            "logging and probe": Variant(INTERVALS, parts=("log", "probe")),
        }
    ),
    "checkpoint": _around(
        {
            "none": Variant(INTERVALS),
            "asynchronous": Variant(INTERVALS, parts=("checkpoint",)),
            "synchronous": Variant([*INTERVALS, "trainer.async_checkpoints=false"], parts=("checkpoint",)),
        }
    ),
    # What the process does with memory that it has freed, on a CPU.
    "freed_memory": Suite(
        {
            "kept": Variant(is_isolated=True),
            "given back": Variant(is_isolated=True, keeps_freed_memory=False),
        }
    ),
    **SIZES,
    "ranks": Suite(_ranks(), rounds=8),
    "scaling": _scaling(),
    "peers": Suite(_peers()),
    "kernels": Suite(_kernels()),
    "decode": Suite(_decode(), DECODE_BASE, steps=8),
    "step": _each({"step": []}),  # of one config
}


def suite(name: str) -> Suite:
    """The suite of this name; UserError for one that is unknown."""
    if name not in SUITES:
        raise UserError(f"suite={name} is unknown; choose one of: {', '.join(SUITES)}")
    return SUITES[name]


def baselines(variants: Variants) -> dict[str, str]:
    """What each variant is relative to; where that is left out, the first one."""
    first = next(iter(variants))
    wanted = {name: one.baseline or first for name, one in variants.items()}
    return {name: baseline if baseline in variants else first for name, baseline in wanted.items()}
