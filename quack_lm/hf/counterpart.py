"""Which class of transformers computes what a model computes, and how its tensors are made of ours, and back.

    attention                 queries and keys    class                       tensors
    MHA, GQA                  as they are         Llama                       the same
    MHA, GQA                  QK norm             Qwen3                       the same
    MLA with latent norms     as they are         DeepSeek-V3, all dense      packed, rotary dimensions in pairs
    MLA without them          as they are, or     GLM-4.5, all dense          down- and up-projections multiplied out
                              QK norm
    any other                                     QuackLM, of this package    the same, under our names

Our rotary layout is that of Llama, Qwen3 and GLM (the first half of the dimensions with the second); DeepSeek-V3 has
neighbors in pairs. All of them divide logits by the square root of the head dimension. Some epsilons are fixed there,
or shared by all norms; a scale s in front of a norm moves them: norm(s x; eps) = norm(x; eps / s^2).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quack_lm.attention.base import Attention
from quack_lm.attention.mha import MHA
from quack_lm.attention.mla import MLA
from quack_lm.model import Transformer
from quack_lm.stabilizers.qk_norm import QueryKeyNorm

# The settings with which a run has the weights of a stock class as they are.
SETTINGS = {
    "llama": "attention=mha and a stabilizer other than qk_norm",
    "qwen3": "attention=mha and stabilizer=qk_norm",
    "deepseek_v3": "attention=mla, attention.latent_norm=true and a stabilizer other than qk_norm",
}
# The epsilon of DeepSeek-V3's latent norms, which no config sets.
LATENT_EPS = 1e-6

# Of every stock class: their names in a layer, and ours.
BLOCK = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "mlp.gate_proj": "mlp.w_gate",
    "mlp.up_proj": "mlp.w_up",
    "mlp.down_proj": "mlp.w_down",
}


@dataclass(frozen=True)
class Weight:
    """A tensor of theirs, made of tensors of ours; `unpack` is the way back, None where there is none."""

    name: str
    ours: tuple[str, ...]
    pack: Callable[..., Tensor]
    unpack: Callable[[Tensor], tuple[Tensor, ...]] | None = None


@dataclass(frozen=True)
class Counterpart:
    """A class of transformers, as the `model_type` of a config.json, that computes what one of our models does."""

    model_type: str
    config: dict[str, Any]  # what config.json says of the architecture
    weights: list[Weight]
    why: str  # this class, in a sentence

    @property
    def is_folded(self) -> bool:
        """Whether tensors are products of ours, from which ours cannot be had back."""
        return any(weight.unpack is None for weight in self.weights)

    def origins(self) -> dict[str, tuple[Weight, int]]:
        """Each of our tensors: which of theirs it is a part of, and the number of that part."""
        return {name: (weight, number) for weight in self.weights for number, name in enumerate(weight.ours)}


def counterpart(model: Transformer, config: Mapping[str, Any]) -> Counterpart:
    """The stock class for the model of a run's config, on any device; `as_it_is` where there is none."""
    attention = model.attentions[0]
    transform = attention.seam.transform
    if transform is None or type(transform) is QueryKeyNorm:
        if type(attention) is MHA:
            return _llama(model, attention) if transform is None else _qwen3(model, attention, transform)
        if type(attention) is MLA and not attention.latent_norm:
            return _glm(model, attention, transform)
        if type(attention) is MLA and transform is None:
            return _deepseek(model, attention)
    form = type(attention).__name__ + (" with latent norms" if getattr(attention, "latent_norm", False) else "")
    norm = "" if transform is None else f" and {type(transform).__name__} of queries and keys"
    return as_it_is(model, config, f"no stock class has {form}{norm}")


def as_it_is(model: Transformer, config: Mapping[str, Any], why: str) -> Counterpart:
    """The class that this package registers, with our own tensors; who loads it has to `import quack_lm.hf`."""
    sizes = model.sizes
    values = {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.d_model,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": model.attentions[0].n_heads,
        "sections": {name: config[name] for name in ("model", "attention", "stabilizer")},
    }
    weights = [_same(f"model.{name}", name) for name, _ in model.named_parameters()]
    return Counterpart("quack_lm", values, weights, f"{why}: it is loaded after `import quack_lm.hf`")


# ------------------------------------------------------------------------------------------------ classes


def _llama(model: Transformer, attention: MHA) -> Counterpart:
    # Llama's config refuses other sizes, which its class could compute; Mistral's does not.
    fits = model.sizes.d_model % attention.n_heads == 0
    return Counterpart(
        "llama" if fits else "mistral",
        _mha_config(model, attention)
        | ({"attention_bias": False, "mlp_bias": False} if fits else {"sliding_window": None}),
        _layers(model, _mha_weights()),
        "MHA and GQA without a norm of queries and keys are Llama's attention"
        + ("" if fits else "; Mistral's is the same, for heads that do not divide the width"),
    )


def _qwen3(model: Transformer, attention: MHA, norm: QueryKeyNorm) -> Counterpart:
    scale = _epsilon_scale(norm.q_norm.eps, model.sizes.norm_eps)
    gains = [_same(f"self_attn.{n}.weight", f"attention.seam.transform.{n}.weight") for n in ("q_norm", "k_norm")]
    return Counterpart(
        "qwen3",
        _mha_config(model, attention) | {"attention_bias": False, "use_sliding_window": False},
        _layers(model, [*_mha_weights(scale), *gains]),
        "MHA and GQA with QK norm are Qwen3's attention"
        + ("" if scale == 1 else "; W_Q and W_K are scaled, for there all norms share an epsilon"),
    )


def _mha_config(model: Transformer, attention: MHA) -> dict[str, Any]:
    return _config(model, attention, theta=attention.rope_theta) | {
        "num_key_value_heads": attention.n_kv_heads,
        "head_dim": attention.qk_width,
    }


def _mha_weights(qk_scale: float = 1.0) -> list[Weight]:
    scales = {"q": qk_scale, "k": qk_scale, "v": 1.0, "o": 1.0}
    return [_same(f"self_attn.{n}_proj.weight", f"attention.w_{n}.weight", scale) for n, scale in scales.items()]


def _deepseek(model: Transformer, attention: MLA) -> Counterpart:
    """Content and rotary queries lie head by head in one matrix, so do keys and values, and W_dkv lies on W_kr."""
    heads, rope = attention.n_heads, attention.rope_width
    nope, value = attention.qk_width - rope, attention.w_o.in_features // heads
    latent = attention.w_dkv.out_features
    scale = _epsilon_scale(attention.q_norm.eps, LATENT_EPS)  # type: ignore[arg-type]

    def pack_q(w_uq: Tensor, w_qr: Tensor) -> Tensor:
        return _by_head(w_uq, _paired(w_qr, heads), heads=heads)

    def unpack_q(packed: Tensor) -> tuple[Tensor, ...]:
        w_uq, w_qr = _from_heads(packed, nope, rope, heads=heads)
        return w_uq, _halved(w_qr, heads)

    def pack_down(w_dkv: Tensor, w_kr: Tensor) -> Tensor:
        return torch.cat([w_dkv * scale, _paired(w_kr, 1)])

    def unpack_down(packed: Tensor) -> tuple[Tensor, ...]:
        w_dkv, w_kr = packed.split([latent, rope])
        return w_dkv / scale, _halved(w_kr, 1)

    weights = [
        _same("self_attn.q_a_proj.weight", "attention.w_dq.weight", scale),
        _same("self_attn.q_a_layernorm.weight", "attention.q_norm.weight"),
        Weight("self_attn.q_b_proj.weight", ("attention.w_uq.weight", "attention.w_qr.weight"), pack_q, unpack_q),
        Weight(
            "self_attn.kv_a_proj_with_mqa.weight",
            ("attention.w_dkv.weight", "attention.w_kr.weight"),
            pack_down,
            unpack_down,
        ),
        _same("self_attn.kv_a_layernorm.weight", "attention.kv_norm.weight"),
        Weight(
            "self_attn.kv_b_proj.weight",
            ("attention.w_uk.weight", "attention.w_uv.weight"),
            lambda w_uk, w_uv: _by_head(w_uk, w_uv, heads=heads),
            lambda packed: _from_heads(packed, nope, value, heads=heads),
        ),
        _same("self_attn.o_proj.weight", "attention.w_o.weight"),
    ]
    config = {
        "num_key_value_heads": heads,
        "q_lora_rank": attention.w_dq.out_features,
        "kv_lora_rank": latent,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "rope_interleave": True,
        **_all_dense(model),
    }
    return Counterpart(
        "deepseek_v3",
        _config(model, attention, theta=attention.rope_theta) | config,
        _layers(model, weights),
        "MLA with latent norms is DeepSeek-V3's attention, whose layers are all dense here (first_k_dense_replace)"
        + ("" if scale == 1 else "; W_dq and W_dkv are scaled, for the epsilon of its latent norms is fixed"),
    )


def _glm(model: Transformer, attention: MLA, norm: QueryKeyNorm | None) -> Counterpart:
    """Without a norm between them, down- and up-projection are one matrix: MLA is MHA in which only the first
    dimensions of a head turn. Heads have one width there, so the narrower ones are filled up with zeros."""
    heads, rope, width = attention.n_heads, attention.rope_width, attention.qk_width
    value = attention.w_o.in_features // heads
    full = max(width, value)
    # A norm over `full` dimensions divides by a mean over more of them than ours, and so do the logits.
    widening = full / width
    qk_scale = 1.0 if norm is None else _epsilon_scale(norm.q_norm.eps, model.sizes.norm_eps) * math.sqrt(widening)
    q_scale = math.sqrt(widening) if norm is None else qk_scale

    def q(w_dq: Tensor, w_uq: Tensor, w_qr: Tensor) -> Tensor:
        return _padded(_by_head(_product(w_qr, w_dq), _product(w_uq, w_dq), heads=heads) * q_scale, heads, full)

    def k(w_dkv: Tensor, w_uk: Tensor, w_kr: Tensor) -> Tensor:
        rotary = w_kr.double().repeat(heads, 1)
        return _padded(_by_head(rotary, _product(w_uk, w_dkv), heads=heads) * qk_scale, heads, full)

    def v(w_dkv: Tensor, w_uv: Tensor) -> Tensor:
        return _padded(_product(w_uv, w_dkv), heads, full)

    def o(w_o: Tensor) -> Tensor:
        return _padded(w_o.T, heads, full).T

    def gain(scale: float) -> Callable[[Tensor], Tensor]:
        return lambda gain_K: F.pad(gain_K.roll(rope) * scale, (0, full - width))

    weights = [
        _product_of("q_proj", q, "w_dq", "w_uq", "w_qr"),
        _product_of("k_proj", k, "w_dkv", "w_uk", "w_kr"),
        _product_of("v_proj", v, "w_dkv", "w_uv"),
        _product_of("o_proj", o, "w_o"),
    ]
    if norm is not None:
        # Of both gains, the queries' takes the scale of the logits as well.
        weights += [
            _product_of("q_norm", gain(1.0), "seam.transform.q_norm"),
            _product_of("k_norm", gain(widening**-0.5), "seam.transform.k_norm"),
        ]
    config = _config(model, attention, theta=attention.rope_theta) | {
        "num_key_value_heads": heads,
        "head_dim": full,
        "use_qk_norm": norm is not None,
        **_all_dense(model),
    }
    config["rope_parameters"]["partial_rotary_factor"] = _fraction(rope, full)
    return Counterpart(
        "glm4_moe",
        config,
        _layers(model, weights),
        "no stock class has MLA without latent norms, so its down- and up-projections are multiplied out, which makes "
        "it MHA with partial rotary positions, as GLM-4.5's attention, whose layers are all dense here; it caches keys "
        "and values, not latents (--class quack_lm keeps the weights as they are)",
    )


# ------------------------------------------------------------------------------------------------ parts of them


def _config(model: Transformer, attention: Attention, *, theta: float) -> dict[str, Any]:
    sizes = model.sizes
    return {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.d_model,
        "intermediate_size": sizes.d_ff,
        "num_hidden_layers": sizes.n_layers,
        "num_attention_heads": attention.n_heads,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": sizes.tied_embeddings,
    }


def _all_dense(model: Transformer) -> dict[str, Any]:
    """No layer has experts or a bias, and no further layer predicts more tokens."""
    return {"first_k_dense_replace": model.sizes.n_layers, "num_nextn_predict_layers": 0, "attention_bias": False}


def _layers(model: Transformer, attention: list[Weight]) -> list[Weight]:
    """The weights of a model, with those of an attention in each layer."""
    outside = {"model.embed_tokens.weight": "embedding.weight", "model.norm.weight": "norm.weight"}
    if model.head is not None:
        outside["lm_head.weight"] = "head.weight"
    layer = [*attention, *(_same(f"{theirs}.weight", f"{ours}.weight") for theirs, ours in BLOCK.items())]

    def numbered() -> Iterator[Weight]:
        for number in range(model.sizes.n_layers):
            for weight in layer:
                ours = tuple(f"blocks.{number}.{name}" for name in weight.ours)
                yield replace(weight, name=f"model.layers.{number}.{weight.name}", ours=ours)

    return [*(_same(theirs, ours) for theirs, ours in outside.items()), *numbered()]


def _same(theirs: str, ours: str, scale: float = 1.0) -> Weight:
    if scale == 1:
        return Weight(theirs, (ours,), lambda tensor: tensor, lambda tensor: (tensor,))
    return Weight(theirs, (ours,), lambda tensor: tensor * scale, lambda tensor: (tensor / scale,))


def _product_of(theirs: str, pack: Callable[..., Tensor], *ours: str) -> Weight:
    return Weight(f"self_attn.{theirs}.weight", tuple(f"attention.{name}.weight" for name in ours), pack)


def _epsilon_scale(ours: float | None, theirs: float) -> float:
    """What the input of a norm is multiplied by where another epsilon is added."""
    assert ours is not None
    return math.sqrt(theirs / ours)


def _product(up: Tensor, down: Tensor) -> Tensor:
    """In float64: what is rounded is the product, once."""
    return up.double() @ down.double()


def _by_head(first: Tensor, second: Tensor, *, heads: int) -> Tensor:
    """Of two matrices [heads * rows, columns], the rows of each head one after the other."""
    return torch.cat([first.unflatten(0, (heads, -1)), second.unflatten(0, (heads, -1))], dim=1).flatten(0, 1)


def _from_heads(packed: Tensor, *rows: int, heads: int) -> tuple[Tensor, ...]:
    """What `_by_head` was given, by the rows of a head of each."""
    return tuple(part.flatten(0, 1) for part in packed.unflatten(0, (heads, -1)).split(list(rows), dim=1))


def _padded(matrix: Tensor, heads: int, width: int) -> Tensor:
    """[heads * rows, columns] -> [heads * width, columns], with zeros after the rows of each head."""
    blocks = matrix.unflatten(0, (heads, -1))
    return F.pad(blocks, (0, 0, 0, width - blocks.shape[1])).flatten(0, 1)


def _paired(matrix: Tensor, heads: int) -> Tensor:
    """Each head's rotary rows from halves, 0 1 2 | 3 4 5, to pairs, 0 3 | 1 4 | 2 5."""
    return matrix.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _halved(matrix: Tensor, heads: int) -> Tensor:
    """What `_paired` was given."""
    return matrix.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _fraction(part: int, whole: int) -> float:
    """part / whole, of which int(whole * fraction) is `part` again: the quotient may be rounded down."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 1.0)
