"""What each suite compares: variants of one config, the first of which the others are relative to."""

from collections.abc import Mapping, Sequence

from quack_lm.config import choices
from quack_lm.errors import UserError

# A model whose step takes a fraction of a second on one core, and whose matrices are large enough to count.
BASE = (
    "experiment=tiny",
    "model.vocab_size=4096",
    "model.d_model=256",
    "model.n_layers=4",
    "model.n_heads=8",
    "model.d_ff=1024",
    "model.tied_embeddings=true",
    "trainer.seq_len=512",
    "trainer.micro_batch_size=8",
    "trainer.global_batch_size=8",
)
# Models of `transformers`, by the names of their variants.
PEERS = ("qwen3", "llama", "deepseek_v3")
Variants = Mapping[str, Sequence[str]]  # the settings of each


def variants(suite: str) -> Variants:
    """The settings of each variant of a suite; UserError for one that is unknown."""
    if suite not in SUITES:
        raise UserError(f"suite={suite} is unknown; choose one of: {', '.join(SUITES)}")
    return SUITES[suite]


def baselines(names: Sequence[str]) -> dict[str, str]:
    """What each variant is relative to: the first one, but our models to their peers."""
    peers = {f"ours, as {peer}": peer for peer in PEERS if peer in names}
    return {name: name if name in PEERS else peers.get(name, names[0]) for name in names}


def _stabilizers() -> Variants:
    others = [name for name in choices("stabilizer") if name != "none"]
    return {name: [f"stabilizer={name}"] for name in ("none", *others)}


SUITES: Mapping[str, Variants] = {
    "stabilizers": _stabilizers(),
    "attention": {
        "mha": ["attention=mha"],
        "gqa": ["attention=mha", "attention.n_kv_heads=2"],
        "mla": ["attention=mla"],
    },
    "optimizers": {
        "adamw": ["optimizer=adamw"],
        "muon": ["optimizer=muon"],
        "muon in float32": ["optimizer=muon", "optimizer.ns_dtype=float32"],
    },
    "compile": {"eager": [], "compiled": ["trainer.compile=true"]},
    "precision": {"float32": [], "bfloat16": ["trainer.precision=bfloat16"]},
    "checkpointing": {
        "none": [],
        "selective": ["trainer.activation_checkpointing=selective"],
        "every block": ["trainer.activation_checkpointing=true"],
    },
    "loss": {
        "whole": ["model.vocab_size=49152"],
        "in pieces of 1024 tokens": ["model.vocab_size=49152", "trainer.loss_chunk=1024"],
    },
    "length": {f"{n} tokens": [f"trainer.seq_len={n}"] for n in (128, 256, 512, 1024, 2048)},
    "layers": {f"{n} layers": [f"model.n_layers={n}"] for n in (2, 4, 8, 16)},
    # A model of `transformers` with the same sizes, optimizer and tokens, in a plain loop; ours beside it.
    "peers": {
        name: settings
        for peer, settings in {
            "qwen3": ["stabilizer=qk_norm", "optimizer=adamw"],
            "llama": ["optimizer=adamw"],
            "deepseek_v3": ["attention=mla", "attention.latent_norm=true", "optimizer=adamw"],
        }.items()
        for name in (peer, f"ours, as {peer}")
    },
}
