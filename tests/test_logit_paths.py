"""The contract of an attention: its declared paths are its logits, and its fast forward is a softmax of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import reference
import torch
from models import ATTENTIONS, small_config, small_model
from torch import Tensor

from quack_lm.attention.base import Attention
from quack_lm.attention.mask import Mask, number_documents
from quack_lm.attention.rope import rope_table
from quack_lm.attention.scores import attend, logits
from quack_lm.logit_paths import (
    Factor,
    LogitPath,
    declared_weights,
    largest_partner_product,
)

LENGTH = 7
every_attention = pytest.mark.parametrize("name", ATTENTIONS)


def some_attention(name: str, *, backend: str | None = None, dtype: torch.dtype = torch.float64) -> Attention:
    """One layer with weights large enough that no softmax is flat."""
    attention = small_model(small_config(name, "none", "model.init_std=0.4"), backend=backend).attentions[1]
    return attention.to(dtype)


def some_input(attention: Attention, n_sequences: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(n_sequences, LENGTH, 30, generator=generator, dtype=attention.w_o.weight.dtype)


def rope(attention: Attention) -> Tensor:
    return rope_table(LENGTH, attention.rope_width, theta=attention.rope_theta, device="cpu")


@torch.no_grad()
def all_logits(attention: Attention, x: Tensor) -> Tensor:
    """[B, H, T, T], unmasked."""
    q, k, _ = attention.project(x)
    return logits(*attention.seam(q, k, rope(attention)))


@contextmanager
def only(attention: Attention, path: LogitPath) -> Iterator[None]:
    """Within, the weights that only other paths have are zero."""
    mine = {factor.weight for factor in path.factors}
    others = [
        attention.get_parameter(f"{w}.weight") for w in declared_weights(attention.logit_paths()) if w not in mine
    ]
    kept = [p.detach().clone() for p in others]
    with torch.no_grad():
        for p in others:
            p.zero_()
        yield
        for p, value in zip(others, kept, strict=True):
            p.copy_(value)


# ------------------------------------------------------------------------------------------------ paths


@every_attention
def test_doubling_a_block_of_a_factor_doubles_exactly_its_heads(name: str) -> None:
    attention = some_attention(name)
    x = some_input(attention)
    for path in attention.logit_paths():
        with only(attention, path):
            before = all_logits(attention, x)
            assert before.abs().amin((0, 2, 3)).gt(0).all()
            for factor in path.factors:
                weight = attention.get_parameter(f"{factor.weight}.weight")
                rows = weight.shape[0] // factor.blocks
                heads = attention.n_heads // factor.blocks
                for block in range(factor.blocks):
                    mine = weight.detach()[block * rows : (block + 1) * rows]
                    expected = before.clone()
                    expected[:, block * heads : (block + 1) * heads] *= 2
                    mine *= 2
                    torch.testing.assert_close(all_logits(attention, x), expected, rtol=1e-13, atol=0)
                    mine /= 2


@every_attention
def test_the_paths_add_up_to_the_logit(name: str) -> None:
    attention = some_attention(name)
    x = some_input(attention)
    total = torch.zeros(())
    for path in attention.logit_paths():
        with only(attention, path):
            total = total + all_logits(attention, x)
    torch.testing.assert_close(total, all_logits(attention, x))


@every_attention
def test_doubling_an_undeclared_matrix_leaves_the_logits_alone(name: str) -> None:
    attention = some_attention(name)
    x = some_input(attention)
    before = all_logits(attention, x)
    declared = {f"{w}.weight" for w in declared_weights(attention.logit_paths())}
    undeclared = {n: p for n, p in attention.named_parameters() if p.ndim == 2 and n not in declared}
    assert "w_o.weight" in undeclared
    for parameter in undeclared.values():
        parameter.detach().mul_(2)
        torch.testing.assert_close(all_logits(attention, x), before, rtol=1e-13, atol=0)


@every_attention
def test_every_path_has_a_factor_of_its_own_and_one_that_is_cut_into_the_query_heads(name: str) -> None:
    attention = some_attention(name)
    paths = attention.logit_paths()
    for path in paths:
        elsewhere = {factor.weight for other in paths if other is not path for factor in other.factors}
        assert any(f.weight not in elsewhere for f in path.factors)
        assert any(f.heads == attention.n_heads for f in path.factors)


def test_partner_products_are_those_worked_by_hand() -> None:
    # Two layers, four query heads on two key heads, and a matrix that all heads share.
    paths = (
        LogitPath("one", (Factor("q", 4), Factor("k", 2), Factor("all"))),
        LogitPath("two", (Factor("r", 4), Factor("all"))),
    )
    norms = {
        "q": torch.tensor([[1.0, 2.0, 3.0, 4.0], [8.0, 1.0, 1.0, 1.0]]),
        "k": torch.tensor([[5.0, 2.0], [1.0, 3.0]]),
        "all": torch.tensor([[10.0], [2.0]]),
        "r": torch.tensor([[1.0, 1.0, 11.0, 1.0], [1.0, 2.0, 3.0, 4.0]]),
    }
    largest = largest_partner_product(paths, norms)
    assert largest["q"].tolist() == [[50, 50, 20, 20], [2, 2, 6, 6]]
    assert largest["k"].tolist() == [[20, 40], [16, 2]]
    # Layer 0: max(max(5, 10, 6, 8), 11); layer 1: max(max(8, 1, 3, 3), 4).
    assert largest["all"].tolist() == [[11], [8]]
    assert largest["r"].tolist() == [[10, 10, 10, 10], [2, 2, 2, 2]]


# ------------------------------------------------------------------------------------------------ logits


def as_numpy(attention: Attention) -> reference.Weights:
    return {n.removesuffix(".weight"): p.detach().double().numpy() for n, p in attention.named_parameters()}


@pytest.mark.parametrize("name", ["mha", "gqa", "mha_one_head"])
def test_mha_and_gqa_logits_are_those_of_the_equation(name: str) -> None:
    attention = some_attention(name)
    x = some_input(attention)
    n_kv_heads = attention.n_kv_heads
    expected = [
        reference.mha_logits(one.numpy(), as_numpy(attention), n_heads=attention.n_heads, n_kv_heads=n_kv_heads)
        for one in x
    ]
    np.testing.assert_allclose(all_logits(attention, x), np.stack(expected), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["mla", "mla_one_head", "mla_wide_values"])
def test_mla_logits_are_those_of_the_equation(name: str) -> None:
    attention = some_attention(name)
    x = some_input(attention)
    expected = [reference.mla_logits(one.numpy(), as_numpy(attention), n_heads=attention.n_heads) for one in x]
    np.testing.assert_allclose(all_logits(attention, x), np.stack(expected), rtol=1e-5, atol=1e-4)


@every_attention
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("has_documents", [False, True])
def test_the_fast_forward_is_the_softmax_of_the_visible_logits(name: str, backend: str, has_documents: bool) -> None:
    attention = some_attention(name, backend=backend, dtype=torch.float32)
    x = some_input(attention)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2], [0, 0, 0, 0, 0, 0, 1]]) if has_documents else None
    _, _, values = attention.project(x)
    values = values.double().repeat_interleave(attention.n_heads // values.shape[1], dim=1).detach()
    scores = all_logits(attention, x).double().numpy()
    out = np.zeros((*scores.shape[:3], values.shape[-1]))
    for b in range(len(x)):
        seen = set(reference.visible_pairs(LENGTH, None if documents is None else documents[b].tolist()))
        for i in range(LENGTH):
            keys = [j for j in range(LENGTH) if (i, j) in seen]
            weight = np.exp(scores[b, :, i, keys] - scores[b, :, i, keys].max(0))
            out[b, :, i] = np.einsum("jh,hjv->hv", weight / weight.sum(0), values[b, :, keys].numpy())
    expected = torch.from_numpy(out).transpose(1, 2).flatten(2) @ attention.w_o.weight.double().T
    got = attention(x, rope(attention), Mask(documents))
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("has_documents", [False, True])
@pytest.mark.parametrize("length", [5, 530])
def test_the_reported_maximum_is_that_of_the_visible_logits(backend: str, has_documents: bool, length: int) -> None:
    # 530 rows are more than one block of rows.
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, 6, length, 10, generator=generator)
    k, v = torch.randn(2, 2, length, 10, generator=generator), torch.randn(2, 2, length, 3, generator=generator)
    # The largest of all logits of each head is in the future, and one that is visible lies across documents.
    documents = torch.arange(length).mul(3).div(length, rounding_mode="floor").expand(2, -1) if has_documents else None
    _, largest = attend(q, k, v, mask=Mask(documents), backend=backend, want_max=True)
    seen = torch.zeros(length, length, dtype=torch.bool)
    pairs = reference.visible_pairs(length, None if documents is None else documents[0].tolist())
    seen[tuple(torch.tensor(pairs).T)] = True
    scores = logits(q, k)
    expected = scores.masked_fill(~seen, -torch.inf).amax((0, 2, 3))
    assert (expected < scores.amax((0, 2, 3))).any()
    torch.testing.assert_close(largest, expected)


def test_an_end_of_text_token_belongs_to_the_document_it_ends() -> None:
    tokens = torch.tensor([[4, 0, 5, 6, 0, 0, 7], [0, 1, 2, 3, 4, 5, 0]])
    assert number_documents(tokens, 0).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
