"""Decoding with a cache gives what the forward gives, for every attention and stabilizer, and keeps what is said."""

import itertools
import random
from typing import Any

import pytest
import torch
from models import ATTENTIONS, STABILIZERS, small_config, small_model, tokens
from torch import Tensor, nn

from quack_lm.attention.base import Attention
from quack_lm.attention.cache import ScalesKeys, bytes_per_token
from quack_lm.attention.mask import Mask
from quack_lm.attention.mha import MHA
from quack_lm.attention.mla import MLA
from quack_lm.config import compose, instantiate
from quack_lm.generate import Sampling, generate_tokens
from quack_lm.model import ModelSizes, Transformer
from quack_lm.parallel import materialize
from quack_lm.training.build import count_cache_bytes, make_model

EVERY = list(itertools.product(ATTENTIONS, STABILIZERS))
EOT = 7
LENGTHS = (9, 4, 6)


def spread(model: Transformer, dtype: torch.dtype = torch.float64) -> Transformer:
    """In evaluation mode, with gains that are not one, and weights so large that attention is far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.mul_(3)
    return model.to(dtype).eval()


def random_model(attention: str, stabilizer: str, dtype: torch.dtype = torch.float64) -> Transformer:
    return spread(small_model(small_config(attention, stabilizer)), dtype)


def assert_decodes_like_its_forward(model: Transformer, *, eot_id: int | None = None) -> None:
    """Three sequences of unequal length, filled up to one, in pieces of random length, against each one's forward."""
    model.eot_id = eot_id
    rows = [tokens(1, n, seed=n)[0] for n in LENGTHS]
    if eot_id is not None:
        rows[0][[2, 5]] = rows[2][1] = eot_id
    longest = max(LENGTHS)
    pads = torch.tensor([longest - n for n in LENGTHS])
    filled = torch.stack(
        [torch.cat([torch.zeros(int(p), dtype=torch.long), r]) for p, r in zip(pads, rows, strict=True)]
    )
    for seed in range(2):
        cuts = sorted(random.Random(seed).sample(range(1, longest), 3))
        cache = model.make_cache(len(rows), longest, pads_B=pads)
        pieces = [
            model.decode(filled[:, a:b], cache, n_logits=b - a) for a, b in itertools.pairwise([0, *cuts, longest])
        ]
        together = torch.cat(pieces, 1)
        for row, pad, own in zip(rows, pads, together, strict=True):
            with torch.no_grad():
                alone = model(row[None])[0]
            torch.testing.assert_close(own[int(pad) :], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("attention", "stabilizer"), EVERY)
def test_decoding_in_pieces_gives_the_logits_of_the_forward(attention: str, stabilizer: str) -> None:
    assert_decodes_like_its_forward(random_model(attention, stabilizer))


@pytest.mark.parametrize("stabilizer", ["none", "qk_norm"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_with_masking_a_new_token_sees_its_own_document(attention: str, stabilizer: str) -> None:
    assert_decodes_like_its_forward(random_model(attention, stabilizer), eot_id=EOT)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_full_keys_and_values_give_the_same(stabilizer: str) -> None:
    model = random_model("mla", stabilizer)
    for attention in model.attentions:
        attention.keeps_keys = True
        assert set(attention.cache_entries()) == {"keys", "values"}
    assert_decodes_like_its_forward(model)


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Without a cache: the forward of everything, again for each token."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(("attention", "stabilizer"), EVERY)
def test_in_float32_the_tokens_are_those_without_a_cache(attention: str, stabilizer: str) -> None:
    model = random_model(attention, stabilizer, torch.float32)
    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (5, 1, 8)]
    steps = generate_tokens(model, prompts, max_new_tokens=10, sampling=Sampling(temperature=0))
    made = [list(row) for row in zip(*steps, strict=True)]
    assert made == [greedy(model, prompt, 10) for prompt in prompts]
    assert len({token for row in made for token in row}) > 3


# ------------------------------------------------------------------------------------------------ what is not known yet


class Mixing(MHA):
    """An attention whose forward is not the shared one: each token's output is gated by the mean input so far."""

    cache_entries = Attention.cache_entries
    decode = Attention.decode

    def forward(self, x_BTD: Tensor, rope_2TF: Tensor, mask: Mask) -> Tensor:
        seen = mask.matrix(x_BTD.shape[1], x_BTD.device).to(x_BTD.dtype)
        means = (seen / seen.sum(-1, keepdim=True)) @ (x_BTD if seen.ndim == 2 else x_BTD[:, None])
        return super().forward(x_BTD, rope_2TF, mask) * torch.sigmoid(means.reshape(x_BTD.shape))


class Shifting(nn.Module):
    """A transform that does more to a key than scale it."""

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        return q_BHTK, k_BGTK.sin() + 0.5


def model_of(make: Any) -> Transformer:
    sizes = ModelSizes(vocab_size=41, d_model=30, n_layers=2, n_heads=3, d_ff=35, init_std=0.1)
    with torch.device("meta"):
        model = Transformer(sizes, make)
    device = torch.device("cpu")
    materialize(model, lambda name, shape: model.initial_value(name, shape, seed=0, device=device), device)
    return spread(model)


def test_a_new_attention_decodes_without_a_line_about_it() -> None:
    model = model_of(lambda: Mixing(30, n_heads=3, n_kv_heads=1))
    assert set(model.attentions[0].cache_entries()) == {"input"}
    for eot_id in (None, EOT):
        assert_decodes_like_its_forward(model, eot_id=eot_id)


def test_a_transform_that_does_not_scale_keys_leaves_mla_with_full_keys() -> None:
    model = model_of(lambda: MLA(30, lambda width: Shifting(), n_heads=3, kv_latent_dim=7))
    assert set(model.attentions[0].cache_entries()) == {"keys", "values"}
    assert_decodes_like_its_forward(model)


@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_a_transform_that_says_it_scales_keys_does_that_alone(stabilizer: str) -> None:
    transform = instantiate(small_config("mla", stabilizer)["stabilizer"]).qk_transform(7)
    assert transform is None or isinstance(transform, ScalesKeys)
    if transform is None:
        return
    generator = torch.Generator().manual_seed(0)
    for parameter in transform.parameters():
        parameter.data.uniform_(0.5, 1.5, generator=generator)
    q, k = (torch.randn(2, 3, 5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    transform = transform.double()
    new_q, new_k = transform(q, k)
    torch.testing.assert_close(transform.transform_queries(q), new_q)
    torch.testing.assert_close(transform.key_scale(k)[..., None] * transform.key_gain_K * k, new_k)


# ------------------------------------------------------------------------------------------------ what is kept

SCALARS = 32 * 4
PAPER = {
    ("attention=mha",): 2 * 32 * 64 * 2,
    ("attention=mha", "attention.n_kv_heads=8"): 2 * 8 * 64 * 2,
    ("attention=mha", "stabilizer=qk_norm"): 2 * 32 * 64 * 2,
    ("attention=mla",): (256 + 64) * 2,
    ("attention=mla", "stabilizer=quack"): (256 + 64) * 2,
    ("attention=mla", "attention.latent_norm=true"): (256 + 64) * 2,
    ("attention=mla", "stabilizer=qk_norm"): (256 + 64) * 2 + SCALARS,
}


@pytest.mark.parametrize("settings", PAPER, ids=" ".join)
def test_the_1b_model_keeps_the_bytes_of_the_papers_sizes(settings: tuple[str, ...]) -> None:
    assert count_cache_bytes(compose(["model=1b", *settings])) == PAPER[settings]


def test_full_keys_and_values_of_the_1b_model_take_25_times_the_latents() -> None:
    attention = make_model(compose(["model=1b", "attention=mla", "model.n_layers=1"])).attentions[0]
    attention.keeps_keys = True
    assert bytes_per_token(attention.cache_entries(), torch.bfloat16) == 16_384


@pytest.mark.parametrize(("attention", "stabilizer"), EVERY)
def test_a_cache_has_what_is_declared_and_nothing_else(attention: str, stabilizer: str) -> None:
    model = random_model(attention, stabilizer, torch.bfloat16)
    cache = model.make_cache(3, 11)
    declared = bytes_per_token(model.attentions[0].cache_entries(), torch.bfloat16)
    assert cache.bytes == declared * 3 * 11 * len(model.attentions)
    assert declared == count_cache_bytes(small_config(attention, stabilizer))
    logits = model.decode(tokens(3, 11), cache)
    assert logits.dtype == torch.bfloat16
    assert all(layer.length == 11 for layer in cache.layers)


def test_a_cache_forgets_what_is_behind_a_length_and_refuses_more_than_it_has_room_for() -> None:
    model = random_model("mla", "qk_norm")
    first, second = tokens(2, 6, seed=1), tokens(2, 6, seed=2)
    second[:, :4] = first[:, :4]
    cache = model.make_cache(2, 6)
    model.decode(first, cache)
    cache.rewind(4)
    got = model.decode(second[:, 4:], cache)
    with torch.no_grad():
        torch.testing.assert_close(got[:, 0], model(second)[:, -1])
    with pytest.raises(ValueError, match="7 tokens do not fit into a cache of 6"):
        model.decode(first[:, :1], cache)


@pytest.mark.parametrize("keeps_keys", [False, True])
def test_in_bfloat16_decoding_is_as_near_to_the_exact_logits_as_the_forward(keeps_keys: bool) -> None:
    exact, rounded = random_model("mla", "qk_norm"), random_model("mla", "qk_norm", torch.bfloat16)
    for attention in rounded.attentions:
        attention.keeps_keys = keeps_keys
    ids = tokens(4, 12)
    cache = rounded.make_cache(4, 12)
    got = torch.cat([rounded.decode(ids[:, i : i + 1], cache) for i in range(12)], 1)
    with torch.no_grad():
        expected, forward = exact(ids), rounded(ids)
    assert (got.double() - expected).norm() < 1.5 * (forward.double() - expected).norm()
