"""With copied weights, our models compute what transformers' Llama, Qwen3 and DeepSeek-V3 compute.

Sizes are small, odd and unequal, and weights large enough that attention is far from uniform.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from quack_lm.attention.base import Attention
from quack_lm.attention.mha import MHA
from quack_lm.attention.mla import MLA
from quack_lm.model import ModelSizes, Transformer
from quack_lm.stabilizers.qk_norm import QKNorm

VOCAB, D_MODEL, LAYERS, D_FF, THETA, EPS = 61, 30, 3, 44, 500.0, 1e-3
Weights = dict[str, Tensor]


def sizes(*, heads: int, tied: bool) -> ModelSizes:
    return ModelSizes(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        n_layers=LAYERS,
        n_heads=heads,
        d_ff=D_FF,
        tied_embeddings=tied,
        norm_eps=EPS,
    )


def common_config(*, heads: int, tied: bool) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": D_FF,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": heads,
        "rms_norm_eps": EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "tie_word_embeddings": tied,
        "attn_implementation": "eager",
    }


# ------------------------------------------------------------------------------------------------ names


def shared_weights(ours: Weights) -> Weights:
    """What all three families have, under transformers' names."""
    names = {
        "attention_norm.weight": "input_layernorm.weight",
        "mlp_norm.weight": "post_attention_layernorm.weight",
        "mlp.w_gate.weight": "mlp.gate_proj.weight",
        "mlp.w_up.weight": "mlp.up_proj.weight",
        "mlp.w_down.weight": "mlp.down_proj.weight",
        "attention.w_o.weight": "self_attn.o_proj.weight",
    }
    theirs = {"model.embed_tokens.weight": ours["embedding.weight"], "model.norm.weight": ours["norm.weight"]}
    if "head.weight" in ours:
        theirs["lm_head.weight"] = ours["head.weight"]
    for layer in range(LAYERS):
        theirs |= {f"model.layers.{layer}.{new}": ours[f"blocks.{layer}.{old}"] for old, new in names.items()}
    return theirs


def mha_weights(ours: Weights) -> Weights:
    names = {
        "w_q.weight": "q_proj.weight",
        "w_k.weight": "k_proj.weight",
        "w_v.weight": "v_proj.weight",
        "seam.transform.q_norm.weight": "q_norm.weight",
        "seam.transform.k_norm.weight": "k_norm.weight",
    }
    return shared_weights(ours) | {
        f"model.layers.{layer}.self_attn.{new}": ours[f"blocks.{layer}.attention.{old}"]
        for layer in range(LAYERS)
        for old, new in names.items()
        if f"blocks.{layer}.attention.{old}" in ours
    }


def mla_weights(ours: Weights, heads: int) -> Weights:
    """DeepSeek packs content and rotary queries head by head, likewise keys and values, and W_dkv with W_kr."""
    theirs = shared_weights(ours)

    def pack(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first.unflatten(0, (heads, -1)), second.unflatten(0, (heads, -1))], dim=1).flatten(0, 1)

    for layer in range(LAYERS):
        own = {k.split(".")[3]: v for k, v in ours.items() if k.startswith(f"blocks.{layer}.attention.")}
        packed = {
            "q_a_proj": own["w_dq"],
            "q_a_layernorm": own["q_norm"],
            "q_b_proj": pack(own["w_uq"], own["w_qr"]),
            "kv_a_proj_with_mqa": torch.cat([own["w_dkv"], own["w_kr"]]),
            "kv_a_layernorm": own["kv_norm"],
            "kv_b_proj": pack(own["w_uk"], own["w_uv"]),
        }
        theirs |= {f"model.layers.{layer}.self_attn.{name}.weight": tensor for name, tensor in packed.items()}
    return theirs


# ------------------------------------------------------------------------------------------------ models


def mha_case(
    theirs: type, config: type, *, heads: int, kv_heads: int, tied: bool, qk_norm: bool
) -> tuple[Transformer, nn.Module, Callable]:
    head_dim = 8  # not d_model / heads

    def attention() -> Attention:
        transform = QKNorm(eps=EPS).qk_transform if qk_norm else None
        return MHA(D_MODEL, transform, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, rope_theta=THETA)

    reference: PretrainedConfig = config(
        **common_config(heads=heads, tied=tied), num_key_value_heads=kv_heads, head_dim=head_dim
    )
    return Transformer(sizes(heads=heads, tied=tied), attention), theirs(reference), mha_weights


def mla_case(*, heads: int, tied: bool) -> tuple[Transformer, nn.Module, Callable]:
    nope, rope, value = 6, 4, 7

    def attention() -> Attention:
        return MLA(
            D_MODEL,
            n_heads=heads,
            q_latent_dim=14,
            kv_latent_dim=9,
            nope_dim=nope,
            rope_dim=rope,
            v_dim=value,
            latent_norm=True,
            norm_eps=1e-6,  # fixed in DeepSeek-V3, whatever the model's
            rope_theta=THETA,
        )

    reference = DeepseekV3Config(
        **common_config(heads=heads, tied=tied),
        num_key_value_heads=heads,
        q_lora_rank=14,
        kv_lora_rank=9,
        qk_nope_head_dim=nope,
        qk_rope_head_dim=rope,
        v_head_dim=value,
        first_k_dense_replace=LAYERS,
        rope_interleave=False,
    )
    model = Transformer(sizes(heads=heads, tied=tied), attention)
    return model, DeepseekV3ForCausalLM(reference), lambda ours: mla_weights(ours, heads)


CASES = {
    "llama_mha": lambda: mha_case(LlamaForCausalLM, LlamaConfig, heads=3, kv_heads=3, tied=True, qk_norm=False),
    "llama_gqa": lambda: mha_case(LlamaForCausalLM, LlamaConfig, heads=6, kv_heads=2, tied=False, qk_norm=False),
    "qwen3_mha": lambda: mha_case(Qwen3ForCausalLM, Qwen3Config, heads=5, kv_heads=5, tied=False, qk_norm=True),
    "qwen3_gqa": lambda: mha_case(Qwen3ForCausalLM, Qwen3Config, heads=6, kv_heads=3, tied=True, qk_norm=True),
    "deepseek_v3": lambda: mla_case(heads=3, tied=False),
    "deepseek_v3_tied": lambda: mla_case(heads=5, tied=True),
}


@pytest.fixture(params=CASES)
def pair(request: pytest.FixtureRequest) -> tuple[Transformer, nn.Module, Callable]:
    """Our model with random weights, theirs with the same, and the map of names."""
    torch.manual_seed(0)
    ours, theirs, rename = CASES[request.param]()
    with torch.no_grad():
        for parameter in ours.parameters():
            # Gains around one, matrices that keep the size of what they multiply.
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5)
    weights = rename(dict(ours.state_dict()))
    expected = set(theirs.state_dict()) - ({"lm_head.weight"} if ours.head is None else set())
    assert set(weights) == expected, "every weight of theirs is one of ours"
    theirs.load_state_dict(weights, strict=False)
    theirs.eval()
    return ours, theirs, rename


def random_tokens(length: int) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


def test_logits_equal_those_of_transformers(pair) -> None:
    ours, theirs, _ = pair
    for attention in ours.attentions:
        attention.tracks_max_logits = True
    tokens = random_tokens(23)
    with torch.no_grad():
        mine, reference = ours(tokens), theirs(tokens).logits
    assert min(a.max_logits_H.min() for a in ours.attentions) > 1, "attention must matter, or this compares little"
    assert reference.std() > 0.3
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-4 * reference.abs().max().item())


def test_gradients_equal_those_of_transformers(pair) -> None:
    ours, theirs, rename = pair
    tokens = random_tokens(12)
    ours(tokens[:, :-1], tokens[:, 1:]).mean().backward()
    F.cross_entropy(theirs(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    reference = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    # The map of names is linear, so that it maps gradients like weights.
    for name, gradient in rename({name: parameter.grad for name, parameter in ours.named_parameters()}).items():
        largest = reference[name].abs().max().item()
        assert largest > 1e-5, f"{name} has a gradient worth comparing"
        torch.testing.assert_close(
            gradient, reference[name], rtol=1e-4, atol=1e-4 * largest, msg=lambda m, n=name: n + m
        )


def test_the_loss_equals_that_of_transformers(pair) -> None:
    ours, theirs, _ = pair
    tokens = random_tokens(17)
    with torch.no_grad():
        # They shift the labels themselves.
        reference = theirs(tokens, labels=tokens).loss
        mine = ours(tokens[:, :-1], tokens[:, 1:]).mean()
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=0)
