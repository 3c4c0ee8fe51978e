"""Each stabilizer against its equations, through real attentions with real weights."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ATTENTIONS, LONE, STABILIZERS, small_config, small_model, tokens
from torch import Tensor, nn

from quack_lm.attention.base import Attention
from quack_lm.attention.mask import number_documents
from quack_lm.attention.mha import MHA
from quack_lm.attention.mla import MLA
from quack_lm.attention.scores import logits
from quack_lm.config import choices, instantiate
from quack_lm.data.batches import EvalBatches, Sequences
from quack_lm.model import Transformer
from quack_lm.probe import Probe
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.stabilizers.fixed import Fixed
from quack_lm.stabilizers.none import NoStabilizer
from quack_lm.stabilizers.qk_clip import QKClip
from quack_lm.stabilizers.quack import QuacK
from quack_lm.step import LogitWeights, stabilized_step

NORMS = {"frobenius": reference.frobenius, "spectral": reference.spectral}


def arrays(attention: Attention) -> reference.Weights:
    """The attention's matrices in float64."""
    return {n.removesuffix(".weight"): p.detach().double().numpy().copy() for n, p in attention.named_parameters()}


@torch.no_grad()
def set_norms(attention: Attention, norms: dict[str, list[float]], *, seed: int) -> None:
    """Random weights whose blocks have the given Frobenius norms."""
    generator = torch.Generator().manual_seed(seed)
    for name, values in norms.items():
        weight = attention.get_parameter(f"{name}.weight")
        for block, norm in zip(weight.chunk(len(values)), values, strict=True):
            block.copy_(torch.randn(block.shape, generator=generator))
            block.mul_(norm / block.norm())


def scales_after(stabilizer: QuacK, attentions: list[Attention], then: list[dict[str, list[float]]]) -> Any:
    """QuacK's factors, [layers, blocks], once weights that were initial have changed to have the norms `then`."""
    weights = LogitWeights(attentions)
    assert stabilizer.needs_norms
    stabilizer.initialize(weights.paths, weights.norms(stabilizer.needs_norms))
    for layer, norms in enumerate(then):
        set_norms(attentions[layer], norms, seed=100 + layer)
    return stabilizer.step_scale(weights.paths, weights.norms(stabilizer.needs_norms))


def compare(scales: dict[str, Tensor], expected: list[dict[str, list[float]]], rtol: float = 1e-5) -> None:
    assert scales.keys() == expected[0].keys()
    for name, table in scales.items():
        np.testing.assert_allclose(table, [layer[name] for layer in expected], rtol=rtol, err_msg=name)


# ------------------------------------------------------------------------------------------------ QuacK


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("largest", range(3))
def test_quack_on_mha_is_algorithm_1(norm: str, largest: int) -> None:
    attentions: list[Attention] = [MHA(15, n_heads=3, n_kv_heads=3, head_dim=10) for _ in range(2)]
    turned = np.roll([7.0, 0.5, 0.02], largest).tolist()
    before = [{"w_q": [1.0, 2.0, 3.0], "w_k": [0.1, 4.0, 0.7]}, {"w_q": turned, "w_k": [5.0, 1.0, 0.2]}]
    after = [{"w_q": turned, "w_k": [9.0, 0.3, 1.0]}, {"w_q": [2.0, 0.1, 6.0], "w_k": turned}]
    for layer, norms in enumerate(before):
        set_norms(attentions[layer], norms, seed=layer)
    start = [arrays(a) for a in attentions]
    scales = scales_after(QuacK(tau=0.3, norm=norm), attentions, after)
    expected = [
        reference.algorithm_1(arrays(a), s, n_heads=3, n_kv_heads=3, tau=0.3, norm=NORMS[norm])
        for a, s in zip(attentions, start, strict=True)
    ]
    compare(scales, expected, rtol=1e-4 if norm == "spectral" else 1e-5)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("largest", range(3))
def test_a_gqa_keys_partner_is_the_largest_query_head_of_its_group(norm: str, largest: int) -> None:
    attentions: list[Attention] = [MHA(15, n_heads=6, n_kv_heads=2, head_dim=4) for _ in range(2)]
    # One head stands out in each group, a different one before and after.
    first, second = np.roll([8.0, 1.0, 2.0], largest), np.roll([0.1, 0.4, 0.2], largest)
    before = [{"w_q": [*first, *second], "w_k": [3.0, 0.5]}, {"w_q": [*second, *first], "w_k": [0.2, 6.0]}]
    after = [{"w_q": [*second[::-1], *first], "w_k": [1.0, 9.0]}, {"w_q": [*first, *second[::-1]], "w_k": [4.0, 2.0]}]
    for layer, norms in enumerate(before):
        set_norms(attentions[layer], norms, seed=layer)
    start = [arrays(a) for a in attentions]
    scales = scales_after(QuacK(tau=2.0, norm=norm), attentions, after)
    sizes = [NORMS[norm](block) for block in reference.cut(start[0]["w_q"], 6)]
    assert (np.argmax(sizes[:3]), np.argmax(sizes[3:])) == (largest, (largest + 1) % 3)
    expected = [
        reference.algorithm_1(arrays(a), s, n_heads=6, n_kv_heads=2, tau=2.0, norm=NORMS[norm])
        for a, s in zip(attentions, start, strict=True)
    ]
    compare(scales, expected, rtol=1e-4 if norm == "spectral" else 1e-5)


# The content path is the larger for w_dq in the first case, by |w_uq[h]| |w_uk[h]| |w_dkv| = 6, 6, 16 times 1 against
# |w_qr[h]| |w_kr| = 8, 2, 4; the rope path in the second. The head that decides has the largest product, but the
# largest of no single norm.
CONTENT_WINS = {
    "w_uq": [6.0, 1.0, 4.0],
    "w_uk": [1.0, 6.0, 4.0],
    "w_qr": [4.0, 1.0, 2.0],
    "w_dq": [3.0],
    "w_dkv": [1.0],
    "w_kr": [2.0],
}
ROPE_WINS = {
    "w_uq": [0.6, 0.1, 0.4],
    "w_uk": [0.1, 0.6, 0.4],
    "w_qr": [1.0, 7.0, 2.0],
    "w_dq": [0.2],
    "w_dkv": [5.0],
    "w_kr": [0.3],
}


def reorder_heads(norms: dict[str, list[float]], order: tuple[int, ...]) -> dict[str, list[float]]:
    return {name: [values[h] for h in order] if len(values) > 1 else values for name, values in norms.items()}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("starts_with_content", [True, False])
def test_quack_on_mla_is_algorithm_2_in_each_branch(
    norm: str, order: tuple[int, ...], starts_with_content: bool
) -> None:
    sizes = {"n_heads": 3, "q_latent_dim": 11, "kv_latent_dim": 7, "nope_dim": 5, "rope_dim": 4, "v_dim": 3}
    attentions: list[Attention] = [MLA(13, **sizes) for _ in range(3)]
    content, rope = reorder_heads(CONTENT_WINS, order), reorder_heads(ROPE_WINS, order)
    first, second = (content, rope) if starts_with_content else (rope, content)
    # Layer 0 changes branch, layer 1 does not, layer 2 does not but changes the deciding heads.
    before, after = [first, first, first], [second, first, reorder_heads(first, (1, 2, 0))]
    for layer, norms in enumerate(before):
        set_norms(attentions[layer], norms, seed=layer)
    start = [arrays(a) for a in attentions]
    scales = scales_after(QuacK(tau=0.7, norm=norm), attentions, after)
    now = [arrays(a) for a in attentions]
    if norm == "frobenius":
        for table, wins in [(start[0], starts_with_content), (now[0], not starts_with_content)]:
            assert_branch_is_active(table, order, content_wins=wins)
    expected = [
        reference.algorithm_2(n, s, n_heads=3, tau=0.7, norm=NORMS[norm]) for n, s in zip(now, start, strict=True)
    ]
    compare(scales, expected, rtol=1e-4 if norm == "spectral" else 1e-5)


def assert_branch_is_active(weights: reference.Weights, order: tuple[int, ...], *, content_wins: bool) -> None:
    """The case is what it claims: which path and which head decide, and by how much."""
    uq, uk, qr = ([reference.frobenius(b) for b in reference.cut(weights[w], 3)] for w in ("w_uq", "w_uk", "w_qr"))
    dkv, kr = reference.frobenius(weights["w_dkv"]), reference.frobenius(weights["w_kr"])
    content, rope = [a * b * dkv for a, b in zip(uq, uk, strict=True)], [a * kr for a in qr]
    assert (max(content) > 1.5 * max(rope)) if content_wins else (max(rope) > 1.5 * max(content))
    # Decides w_dkv, w_dq and, in the other path, w_kr: distinct heads, so that no other index gives the same number.
    assert np.argmax(content) == order.index(2)
    assert np.argmax(rope) == order.index(0 if content_wins else 1)
    assert sorted(content)[-1] > 1.5 * sorted(content)[-2]
    assert np.argmax(uq) != np.argmax(content) != np.argmax(uk)


def test_quack_with_normalized_latents_leaves_the_down_projections_alone() -> None:
    attentions: list[Attention] = [
        MLA(13, n_heads=3, q_latent_dim=11, kv_latent_dim=7, nope_dim=5, rope_dim=4, v_dim=3, latent_norm=True)
    ]
    set_norms(attentions[0], CONTENT_WINS, seed=0)
    scales = scales_after(QuacK(tau=1.0), attentions, [ROPE_WINS])
    expected = {
        "w_uq": [10.0, 10.0, 10.0],
        "w_uk": [10.0, 10.0, 10.0],
        "w_qr": [2 / 0.3] * 3,
        "w_kr": [4 / 7],
    }
    compare(scales, [expected])


def test_quacks_reference_survives_a_round_trip_through_its_state() -> None:
    attentions: list[Attention] = [MHA(15, n_heads=3, n_kv_heads=3, head_dim=10)]
    weights = LogitWeights(attentions)
    first, second = QuacK(tau=0.3), QuacK(tau=0.3)
    first.initialize(weights.paths, weights.norms("frobenius"))
    set_norms(attentions[0], {"w_q": [1.0, 2.0, 3.0], "w_k": [3.0, 1.0, 9.0]}, seed=0)
    second.load_state_dict(first.state_dict())
    norms = weights.norms("frobenius")
    for name, scale in first.step_scale(weights.paths, norms).items():
        assert torch.equal(second.step_scale(weights.paths, norms)[name], scale)


@pytest.mark.parametrize("shape", [(4, 15), (15, 4), (5, 5), (1, 9)])
@pytest.mark.parametrize("kind", ["random", "rank_one", "degenerate", "near_degenerate", "tiny", "huge", "zero"])
def test_the_spectral_norm_is_that_of_an_svd(kind: str, shape: tuple[int, int]) -> None:
    rows, columns = shape
    rng = np.random.default_rng(3)
    u, _ = np.linalg.qr(rng.standard_normal((rows, rows)))
    v, _ = np.linalg.qr(rng.standard_normal((columns, columns)))
    n = min(shape)
    singular = {
        "random": np.sort(rng.uniform(0.5, 2, n)),
        "rank_one": np.eye(1, n)[0],
        "degenerate": np.ones(n),
        "near_degenerate": 1 - 1e-5 * np.arange(n),
        "tiny": 1e-6 * (1 + np.arange(n)),
        "huge": 1e6 * (1 + np.arange(n)),
        "zero": np.zeros(n),
    }[kind]
    block = (u[:, :n] * singular) @ v[:, :n].T
    attention = MHA(columns, n_heads=3, n_kv_heads=3, head_dim=2 * rows)
    with torch.no_grad():
        # Three heads of different size, each block the matrix on top of a smaller copy of itself.
        stacked = np.concatenate([f * np.concatenate([block, 0.5 * block]) for f in (1.0, 3.0, 0.1)])
        attention.w_q.weight.copy_(torch.from_numpy(stacked))
    got = LogitWeights([attention]).norms("spectral")["w_q"]
    expected = [reference.spectral(b) for b in reference.cut(stacked, 3)]
    np.testing.assert_allclose(got[0].numpy(), expected, rtol=4e-4, atol=0)


# ------------------------------------------------------------------------------------------------ Lemma 1

D_MODEL, HEAD_DIM = 7, 4
scale = st.floats(-3, 3).map(lambda e: 10.0**e)


def unit_rank_one(rng: np.random.Generator, left: reference.Array | None, shape: tuple[int, int]) -> reference.Array:
    """u v^T with unit vectors; u is given or random."""
    u = rng.standard_normal(shape[0]) if left is None else left
    v = rng.standard_normal(shape[1])
    return np.outer(u / np.linalg.norm(u), v / np.linalg.norm(v))


def worst_case_change(new: Attention, old: reference.Weights, heads: int, kv_heads: int) -> list[float]:
    """sqrt(d_head) times the largest |change| of a head's logit over all unit x and y: a spectral norm."""
    now = arrays(new)
    changes = []
    for h in range(heads):
        g = h * kv_heads // heads
        form_now, form_old = (
            reference.cut(w["w_q"], heads)[h].T @ reference.cut(w["w_k"], kv_heads)[g] for w in (now, old)
        )
        changes.append(reference.spectral(form_now - form_old))
    return changes


def one_step(
    stabilizer: Any,
    *,
    rng: np.random.Generator,
    initial_sizes: tuple[float, ...],
    sizes: tuple[float, ...],
    d: float,
    eta: float,
    kv_heads: int = 3,
    is_aligned: bool = False,
) -> tuple[list[float], dict[str, list[float]], dict[str, list[float]]]:
    """Measured worst-case changes of three heads, and all blocks' norms at initialization and before the step.

    Initial weights and present ones are random with blocks of the given sizes, the step's directions have norm `d`.
    `is_aligned` makes the weights rank-one and the directions the worst there are.
    """
    attention = MHA(D_MODEL, n_heads=3, n_kv_heads=kv_heads, head_dim=HEAD_DIM).double()
    blocks = {"w_q": 3, "w_k": kv_heads}
    weights = LogitWeights([attention])

    def redraw(block_sizes: tuple[float, ...]) -> dict[str, list[float]]:
        remaining = iter(block_sizes)
        norms = {name: [next(remaining) for _ in range(n)] for name, n in blocks.items()}
        for name, values in norms.items():
            parts = []
            for value in values:
                shape = (HEAD_DIM, D_MODEL)
                part = unit_rank_one(rng, np.eye(HEAD_DIM)[0], shape) if is_aligned else rng.standard_normal(shape)
                parts.append(value * part / np.linalg.norm(part))
            with torch.no_grad():
                attention.get_parameter(f"{name}.weight").copy_(torch.from_numpy(np.concatenate(parts)))
        return norms

    start = redraw(initial_sizes)
    if stabilizer.needs_norms:
        stabilizer.initialize(weights.paths, weights.norms(stabilizer.needs_norms))
    before = redraw(sizes)
    old = arrays(attention)
    parameters = [attention.get_parameter(f"{name}.weight") for name in blocks]
    for parameter, n in zip(parameters, blocks.values(), strict=True):
        left = np.eye(HEAD_DIM)[0] if is_aligned else None
        directions = [d * unit_rank_one(rng, left, (HEAD_DIM, D_MODEL)) for _ in range(n)]
        if not is_aligned:
            directions = [d * m / np.linalg.norm(m) for m in rng.standard_normal((n, HEAD_DIM, D_MODEL))]
        parameter.grad = torch.from_numpy(np.concatenate(directions))
    stabilized_step([torch.optim.SGD(parameters, lr=eta)], stabilizer, weights, LONE)
    return worst_case_change(attention, old, 3, kv_heads), start, before


def lemma_bounds(
    start: dict[str, list[float]], before: dict[str, list[float]], *, tau: float, eta: float, d: float
) -> list[float]:
    """tau_Q D + tau_K D + tau_Q tau_K D^2 / c^2 of each head, with eta_Q = tau_Q / |W_K| and eta_K = tau_K / |W_Q|."""
    bounds = []
    for n_q, n_k, q, k in zip(start["w_q"], start["w_k"], before["w_q"], before["w_k"], strict=True):
        tau_q, tau_k, c = tau * eta * n_k, tau * eta * n_q, min(q, k)
        bounds.append(tau_q * d + tau_k * d + tau_q * tau_k * d**2 / c**2)
    return bounds


@settings(max_examples=40)
@given(
    sizes=st.tuples(*[scale] * 6),
    initial=st.tuples(*[scale] * 6),
    tau=st.sampled_from([0.01, 0.1, 1.0, 10.0]),
    eta=st.floats(-4, 0).map(lambda e: 10.0**e),
    d=st.floats(0.1, 10),
    seed=st.integers(0, 2**32),
    is_aligned=st.booleans(),
    norm=st.sampled_from(["frobenius", "spectral"]),
)
def test_a_quack_step_keeps_the_logit_change_under_the_bound_of_lemma_1(
    sizes: tuple[float, ...],
    initial: tuple[float, ...],
    tau: float,
    eta: float,
    d: float,
    seed: int,
    is_aligned: bool,
    norm: Any,
) -> None:
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {"initial_sizes": initial, "sizes": sizes, "d": d, "eta": eta, "is_aligned": True}
    if norm == "frobenius":
        options["is_aligned"] = is_aligned  # rank-one weights have the same norm in both senses
    changes, start, before = one_step(QuacK(tau=tau, norm=norm), rng=rng, **options)
    for change, bound, q, k in zip(
        changes, lemma_bounds(start, before, tau=tau, eta=eta, d=d), before["w_q"], before["w_k"], strict=True
    ):
        # Measured as a difference of forms of size |W_Q| |W_K| in float64.
        assert change <= bound * (1 + 1e-6) + 1e-13 * q * k


@settings(max_examples=20)
@given(sizes=st.tuples(*[st.floats(1, 3).map(lambda e: 10.0**e)] * 6), d=st.floats(0.1, 1), seed=st.integers(0, 2**32))
def test_a_plain_step_on_large_weights_breaks_the_bound_of_lemma_1(
    sizes: tuple[float, ...], d: float, seed: int
) -> None:
    options: dict[str, Any] = {"initial_sizes": (1.0,) * 6, "sizes": sizes, "d": d, "eta": 0.01, "is_aligned": True}
    plain, start, before = one_step(NoStabilizer(), rng=np.random.default_rng(seed), **options)
    quack, _, _ = one_step(QuacK(tau=1.0), rng=np.random.default_rng(seed), **options)
    for change, kept, bound in zip(plain, quack, lemma_bounds(start, before, tau=1.0, eta=0.01, d=d), strict=True):
        assert kept <= bound < change


@settings(max_examples=25)
@given(
    sizes=st.tuples(*[scale] * 4), initial=st.tuples(*[scale] * 4), seed=st.integers(0, 2**32), aligned=st.booleans()
)
def test_lemma_1_holds_for_query_heads_that_share_a_key(
    sizes: tuple[float, ...], initial: tuple[float, ...], seed: int, aligned: bool
) -> None:
    tau, eta, d = 0.5, 0.1, 2.0
    changes, start, before = one_step(
        QuacK(tau=tau),
        rng=np.random.default_rng(seed),
        initial_sizes=initial,
        sizes=sizes,
        d=d,
        eta=eta,
        kv_heads=1,
        is_aligned=aligned,
    )
    for change, q in zip(changes, before["w_q"], strict=True):
        # The key moves at the rate of its largest partner, and is the only partner of each query head.
        k, tau_q, tau_k = before["w_k"][0], tau * eta * start["w_k"][0], tau * eta * max(start["w_q"])
        bound = tau_q * d + tau_k * d * q / max(before["w_q"]) + tau_q * tau_k * d**2 / (k * max(before["w_q"]))
        assert change <= bound * (1 + 1e-6) + 1e-13 * q * k


# A normalized latent is not bounded by its input's norm, so the bound below is not about it.
@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "mla_latent_norm"])
@pytest.mark.parametrize("growth", [1, 10, 100])
def test_every_attentions_logit_change_under_quack_stays_bounded_as_its_weights_grow(name: str, growth: int) -> None:
    bound, change = first_order_bound_and_change(name, growth, lambda: QuacK(tau=0.1))
    assert (change > 0).all()
    assert (change <= 1.001 * bound).all()


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "mla_latent_norm"])
def test_every_attentions_logit_change_under_one_rate_grows_with_its_weights(name: str) -> None:
    bound, change = first_order_bound_and_change(name, 100, NoStabilizer)
    assert (change > bound).all()


def first_order_bound_and_change(name: str, growth: int, make_stabilizer: Callable[[], Stabilizer]) -> Any:
    """Each head's bound and largest measured change of sqrt(d_head) * logit, for unit inputs at position 0.

    To first order, a head's change is at most the sum over paths and factors of tau eta D times the largest product of
    the factor's partners at initialization, whatever the weights are now.
    """
    eta, tau, stabilizer = 1e-4, 0.1, make_stabilizer()
    attention = small_model(small_config(name)).double().attentions[0]
    weights = LogitWeights([attention])
    stabilizer.initialize(weights.paths, weights.norms("frobenius"))
    largest = dict.fromkeys(weights.blocks, 0.0)
    for path in weights.paths:
        norms = {
            f.weight: [reference.frobenius(b) for b in reference.cut(arrays(attention)[f.weight], f.blocks)]
            for f in path.factors
        }
        for factor, head in itertools.product(path.factors, range(attention.n_heads)):
            partners = [norms[f.weight][head * f.blocks // attention.n_heads] for f in path.factors if f is not factor]
            largest[factor.weight] = max(largest[factor.weight], math.prod(partners))
    bound = sum(tau * eta * largest[factor.weight] for path in weights.paths for factor in path.factors)
    parameters = [attention.get_parameter(f"{w}.weight") for w in weights.blocks]
    with torch.no_grad():
        for parameter, blocks in zip(parameters, weights.blocks.values(), strict=True):
            parameter.mul_(growth)
            # A direction of norm one for each block along which the logits grow: the block itself.
            parameter.grad = torch.cat([-block / block.norm() for block in parameter.chunk(blocks)])
    x = torch.randn(1, 30, 30, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x /= x.norm(dim=-1, keepdim=True)
    q, k, _ = attention.project(x)
    before, width = logits(q, k), q.shape[-1]
    stabilized_step([torch.optim.SGD(parameters, lr=eta)], stabilizer, weights, LONE)
    q, k, _ = attention.project(x)
    return bound, ((logits(q, k) - before).abs().amax((0, 2, 3)) * math.sqrt(width)).detach()


# ------------------------------------------------------------------------------------------------ fixed factor


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("tau", [0.01, 0.1, 10.0])
def test_under_the_fixed_factor_the_declared_weights_and_no_others_move_tau_times_as_far(name: str, tau: float) -> None:
    moved = {}
    for stabilizer in (NoStabilizer(), Fixed(tau=tau)):
        model = small_model(small_config(name))
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        batch = tokens(2)
        model(batch[:, :-1], batch[:, 1:]).sum().backward()
        weights = LogitWeights(model.attentions)
        stabilized_step([torch.optim.SGD(model.parameters(), lr=0.1)], stabilizer, weights, LONE)
        moved[stabilizer] = {n: p.detach() - start[n] for n, p in model.named_parameters()}
    plain, fixed = moved.values()
    declared = {
        "mha": {"w_q", "w_k"},
        "mla": {"w_uq", "w_uk", "w_qr", "w_dq", "w_dkv", "w_kr"},
        "gqa": {"w_q", "w_k"},
        "mla_latent_norm": {"w_uq", "w_uk", "w_qr", "w_kr"},
    }
    expected = declared.get(name) or set(weights.blocks)
    for parameter, distance in plain.items():
        assert distance.abs().max() > 0, parameter
        if parameter.split(".")[-2] in expected:
            torch.testing.assert_close(fixed[parameter], tau * distance, rtol=1e-3, atol=3e-7)
        else:
            assert torch.equal(fixed[parameter], distance), parameter


# ------------------------------------------------------------------------------------------------ QK clip

THRESHOLD = 0.3  # below the largest logit of some heads and above that of others, with the weights of `clip_model`


def clip_model(name: str, *overrides: str, eot_id: int | None = None, backend: str | None = None) -> Transformer:
    config = small_config(name, "qk_clip", "model.init_std=0.3", *overrides)
    return small_model(config, eot_id=eot_id, backend=backend)


def recorded_maxima(model: Transformer) -> Tensor:
    """What training has tracked since the last step, [layers, heads]; it stays."""
    return torch.stack([a.max_logits_H.clone() for a in model.attentions])


def forward_and_measure(model: Transformer, batch: Tensor, *, backward: bool = True) -> Tensor:
    """One training forward; each head's largest visible logit from its queries and keys, [layers, heads]."""
    measured = []

    def keep(module: nn.Module, inputs: Any, qk: tuple[Tensor, Tensor]) -> None:
        scores = logits(*qk).detach()
        documents = None if model.eot_id is None else number_documents(batch[:, :-1], model.eot_id)
        best = []
        for b in range(len(batch)):
            row = None if documents is None else documents[b].tolist()
            pairs = torch.tensor(reference.visible_pairs(scores.shape[-1], row)).T
            best.append(scores[b, :, pairs[0], pairs[1]].amax(-1))
        measured.append(torch.stack(best).amax(0))

    hooks = [a.seam.register_forward_hook(keep) for a in model.attentions]
    loss = model(batch[:, :-1], batch[:, 1:]).mean()
    for hook in hooks:
        hook.remove()
    if backward:
        loss.backward()
    return torch.stack(measured)


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("eot_id", [None, 3])
def test_tracked_maxima_are_those_of_all_micro_batches_and_sequences(
    name: str, backend: str, eot_id: int | None
) -> None:
    model = clip_model(name, eot_id=eot_id, backend=backend)
    micro_batches = [tokens(3, seed=seed, vocab_size=9) for seed in range(4)]
    measured = torch.stack([forward_and_measure(model, batch) for batch in micro_batches])
    torch.testing.assert_close(recorded_maxima(model), measured.amax(0))
    # Different micro-batches decide different heads, so neither the first nor the last is enough.
    assert len(measured.flatten(1).argmax(0).unique()) > 1


def test_document_masking_lowers_some_maxima() -> None:
    batch = tokens(3, vocab_size=4)
    maxima = [forward_and_measure(clip_model("mha", eot_id=eot_id), batch) for eot_id in (None, 3)]
    assert (maxima[1] <= maxima[0]).all()
    assert (maxima[1] < maxima[0]).any()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_recomputed_forwards_do_not_change_the_tracked_maxima(name: str) -> None:
    recorded = []
    for activation_checkpointing in ("true", "false"):
        model = clip_model(name, f"trainer.activation_checkpointing={activation_checkpointing}")
        for seed in range(2):
            batch = tokens(3, seed=seed)
            model(batch[:, :-1], batch[:, 1:]).mean().backward()
        recorded.append(recorded_maxima(model))
    assert recorded[0].isfinite().all()
    assert torch.equal(*recorded)


def test_validation_and_probe_forwards_do_not_count() -> None:
    model = clip_model("mha")
    quiet = forward_and_measure(model, tokens(1, 4))
    row = np.arange(8 * 12 + 1, dtype=np.uint16) % 41
    batches = EvalBatches(Sequences([row], 8), n_sequences=10, micro_batch_size=5, rank=0, world_size=1)
    probe = Probe(model, model.attentions, batches, LONE, eot_id=None)
    probe.before()
    louder = probe.after()["logits/max_per_head"]
    model.eval()
    with torch.no_grad():
        forward_and_measure(model, tokens(20), backward=False)
    model.train()
    assert (louder > quiet).any()
    assert torch.equal(recorded_maxima(model), quiet)


@pytest.mark.parametrize("read_only", [False, True])
def test_the_record_starts_anew_after_each_step(read_only: bool) -> None:
    model, stabilizer = clip_model("mla"), QKClip(threshold=THRESHOLD, read_only=read_only)
    weights = LogitWeights(model.attentions)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for seed, n_sequences in [(0, 20), (1, 1)]:
        measured = forward_and_measure(model, tokens(n_sequences, seed=seed))
        stabilized_step([optimizer], stabilizer, weights, LONE)
        assert (recorded_maxima(model) == -torch.inf).all()
        torch.testing.assert_close(stabilizer.metrics()["max_logits"], measured)


def clipped(name: str, *overrides: str) -> tuple[Transformer, Tensor, list[reference.Weights], list[reference.Weights]]:
    """A model clipped once with no other change: it, the maxima before, and each layer's weights before and after."""
    model = clip_model(name, *overrides)
    before = [arrays(a) for a in model.attentions]
    maxima = forward_and_measure(model, tokens(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stabilized_step([optimizer], QKClip(threshold=THRESHOLD), LogitWeights(model.attentions), LONE)
    return model, maxima, before, [arrays(a) for a in model.attentions]


@pytest.mark.parametrize(
    ("name", "equation"),
    [
        ("mha", reference.clip_mha),
        ("mha_one_head", reference.clip_mha),
        ("gqa", reference.clip_gqa),
        ("mla", reference.clip_mla),
        ("mla_one_head", reference.clip_mla),
        ("mla_wide_values", reference.clip_mla),
    ],
)
def test_clipping_multiplies_each_heads_own_weights_by_their_power_of_gamma(name: str, equation: Any) -> None:
    _, maxima, before, after = clipped(name)
    assert (maxima > THRESHOLD).any()
    for layer, weights in enumerate(before):
        factors = equation(maxima[layer].tolist(), THRESHOLD)
        for weight, old in weights.items():
            if weight in factors:
                np.testing.assert_allclose(after[layer][weight], reference.scale_rows(old, factors[weight]), rtol=1e-6)
            else:
                np.testing.assert_array_equal(after[layer][weight], old, err_msg=weight)


@pytest.mark.parametrize("name", [name for name in ATTENTIONS if name != "mla_latent_norm"])
def test_after_clipping_the_largest_logit_of_a_head_is_the_threshold(name: str) -> None:
    model, maxima, _, _ = clipped(name)
    # Only the first layer's inputs are still what they were.
    again = forward_and_measure(model, tokens(3))[0]
    torch.testing.assert_close(again, maxima[0].clamp_max(THRESHOLD), rtol=1e-5, atol=1e-6)
    assert (maxima[0] > THRESHOLD).any()


def test_heads_without_a_positive_logit_are_left_alone() -> None:
    model = clip_model("mha", "model.init_std=0.5")
    first = model.attentions[0]
    # With keys that are the negative of the queries a token's logit with itself is negative; one token sees no other.
    with torch.no_grad():
        first.get_parameter("w_k.weight")[10:].copy_(-first.get_parameter("w_q.weight")[10:])
        first.get_parameter("w_k.weight")[:10].copy_(10 * first.get_parameter("w_q.weight")[:10])
    before = arrays(first)
    maxima = forward_and_measure(model, tokens(4, 2))
    assert maxima[0, 0] > 1
    assert (maxima[0, 1:] < -1).all()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stabilizer = QKClip(threshold=1.0)
    stabilized_step([optimizer], stabilizer, LogitWeights(model.attentions), LONE)
    after = arrays(first)
    for name in ("w_q", "w_k"):
        np.testing.assert_array_equal(after[name][10:], before[name][10:])
        assert (np.abs(after[name][:10]) < np.abs(before[name][:10])).all()
    assert stabilizer.metrics()["gamma"][0, 1:].tolist() == [1.0, 1.0]


def test_a_head_that_has_seen_nothing_is_left_alone() -> None:
    gammas = QKClip(threshold=2.0)
    paths = clip_model("mla").attentions[0].logit_paths()
    scales = gammas.weight_scale(paths, torch.tensor([[-torch.inf, 8.0, 0.0]]))
    assert scales["w_qr"].tolist() == [[1.0, 0.25, 1.0]]
    assert scales["w_uq"].tolist() == scales["w_uk"].tolist() == [[1.0, 0.5, 1.0]]
    assert scales.keys() == {"w_qr", "w_uq", "w_uk"}
    assert gammas.metrics()["fraction"] == pytest.approx(1 / 3)


def test_read_only_measures_without_clipping() -> None:
    model, stabilizer = clip_model("mla"), QKClip(threshold=THRESHOLD, read_only=True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    maxima = forward_and_measure(model, tokens(3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stabilized_step([optimizer], stabilizer, LogitWeights(model.attentions), LONE)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert (stabilizer.metrics()["gamma"] < 1).any()
    torch.testing.assert_close(stabilizer.metrics()["gamma"], (THRESHOLD / maxima).clamp_max(1).where(maxima > 0, 1.0))


# ------------------------------------------------------------------------------------------------ QK norm


@pytest.mark.parametrize("name", ATTENTIONS)
def test_under_qk_norm_queries_and_keys_have_norm_root_d_and_the_gain_of_each_dimension(name: str) -> None:
    attention = small_model(small_config(name, "qk_norm", "model.init_std=0.5")).attentions[0]
    seen: list[tuple[Tensor, Tensor]] = []
    transform = attention.seam.transform
    assert transform is not None
    transform.register_forward_hook(lambda _, inputs, __: seen.append(inputs))
    gains = {n: torch.linspace(0.5, 2, len(p)) for n, p in transform.named_parameters()}
    for n, p in transform.named_parameters():
        p.detach().copy_(gains[n])
    x = torch.randn(2, 1, 30, generator=torch.Generator().manual_seed(0))
    q, k, _ = attention.project(x)
    # A single token is at position 0, where rotation does nothing.
    got_q, got_k = attention.seam(q, k, torch.stack([torch.ones(1, 1), torch.zeros(1, 1)]))
    for raw, got, gain in [(q, got_q, gains["q_norm.weight"]), (k, got_k, gains["k_norm.weight"])]:
        values = raw.detach().double().numpy()
        expected = values / np.sqrt((values**2).mean(-1, keepdims=True) + 1e-6) * gain.numpy()
        np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ all together


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("name", [*choices("attention"), "gqa"])
def test_twenty_steps_lower_the_loss(name: str, stabilizer: str, optimizer: str) -> None:
    config = small_config(name, stabilizer, "optimizer.lr=0.01", optimizer=optimizer)
    model = small_model(config)
    optimizers = instantiate(config["optimizer"]).build(model)
    steadies: Stabilizer = instantiate(config["stabilizer"])
    weights = LogitWeights(model.attentions)
    if steadies.needs_norms:
        steadies.initialize(weights.paths, weights.norms(steadies.needs_norms))
    batch = tokens(4)
    losses = []
    for _ in range(20):
        loss = model(batch[:, :-1], batch[:, 1:]).mean()
        loss.backward()
        losses.append(loss.item())
        stabilized_step(optimizers, steadies, weights, LONE)
        for each in optimizers:
            each.zero_grad()
    assert losses[0] == pytest.approx(math.log(41), abs=0.3)
    assert losses[-1] < losses[0] - 0.3
    assert all(value.isfinite().all() for value in steadies.metrics().values())
