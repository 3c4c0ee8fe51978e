"""Optimizers against torch's own and against NumPy, groups against the model, schedules against numbers by hand."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import ATTENTIONS, OPTIMIZERS, small_config, small_model, tokens
from torch import Tensor, nn

from quack_lm.config import compose, instantiate
from quack_lm.optim.muon import Muon, orthogonalize
from quack_lm.optim.recipe import set_lr
from quack_lm.optim.schedule import make_schedule
from quack_lm.parallel import clip_gradients

SHAPES = [(5, 13), (13, 5), (7, 7), (1, 6)]
TORCH_SCALE = {"jordan": "original", "moonlight": "match_rms_adamw"}


def random_parameters(seed: int = 0) -> list[nn.Parameter]:
    """Two of each shape: tall, wide and square."""
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES + SHAPES[::-1]]


def random_gradients(parameters: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.randn(parameter.shape, generator=generator) * 10.0 ** (number % 5 - 2)


# ------------------------------------------------------------------------------------------------ Muon


@pytest.mark.parametrize("momentum", [0.0, 0.95])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("update_scale", ["jordan", "moonlight"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_equals_torchs_muon(momentum: float, nesterov: bool, update_scale: Any, weight_decay: float) -> None:
    ours, theirs = random_parameters(), random_parameters()
    common = {"lr": 0.1, "momentum": momentum, "weight_decay": weight_decay}
    optimizers = [
        Muon(ours, **common, nesterov=nesterov, update_scale=update_scale),
        torch.optim.Muon(theirs, **common, nesterov=nesterov, adjust_lr_fn=TORCH_SCALE[update_scale]),
    ]
    start = [p.detach().clone() for p in ours]
    for step in range(4):
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            random_gradients(parameters, step)
            optimizer.step()
    for a, b, zero in zip(ours, theirs, start, strict=True):
        # Both orthogonalize in bfloat16, which has 8 bits; the distance travelled is what they may differ in.
        assert (a - b).norm() < 0.02 * (b - zero).norm()


@pytest.mark.parametrize("momentum", [0.0, 0.95])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("update_scale", ["jordan", "moonlight"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_in_float32_equals_the_equations(
    momentum: float, nesterov: bool, update_scale: Any, weight_decay: float
) -> None:
    parameters, lr = random_parameters(), 0.1
    optimizer = Muon(
        parameters,
        lr=lr,
        momentum=momentum,
        nesterov=nesterov,
        update_scale=update_scale,
        weight_decay=weight_decay,
        ns_dtype=torch.float32,
    )
    expected = [p.detach().double().numpy() for p in parameters]
    references = [reference.Muon(momentum=momentum, nesterov=nesterov, update_scale=update_scale) for _ in parameters]
    for step in range(4):
        random_gradients(parameters, step)
        for i, (each, parameter) in enumerate(zip(references, parameters, strict=True)):
            assert parameter.grad is not None
            rates = np.full(len(parameter), lr)
            expected[i] = each.step(expected[i], parameter.grad.double().numpy(), rates, rates * weight_decay)
        optimizer.step()
    for parameter, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach().numpy(), value, rtol=1e-4, atol=1e-4)


@settings(max_examples=30)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), seed=st.integers(0, 2**32), size=st.floats(-6, 6))
def test_orthogonalizing_is_newton_schulz_whatever_the_shape_and_size(
    rows: int, columns: int, seed: int, size: float
) -> None:
    matrices = np.random.default_rng(seed).standard_normal((3, rows, columns)) * 10.0**size
    got = orthogonalize(torch.from_numpy(matrices))
    np.testing.assert_allclose(got, [reference.newton_schulz(m) for m in matrices], rtol=1e-9, atol=1e-9)


def test_orthogonalizing_brings_singular_values_near_one_and_keeps_the_singular_vectors() -> None:
    rng = np.random.default_rng(0)
    u, s, vt = np.linalg.svd(rng.standard_normal((6, 9)), full_matrices=False)
    got = orthogonalize(torch.from_numpy((u * np.maximum(s, 0.3)) @ vt)[None])[0].numpy()
    inner = u.T @ got @ vt.T
    np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-9)
    assert ((np.diag(inner) > 0.6) & (np.diag(inner) < 1.3)).all()


def test_a_matrix_without_a_gradient_stays_and_one_with_a_zero_gradient_stays_finite() -> None:
    still, zero = (nn.Parameter(torch.ones(3, 5)) for _ in range(2))
    zero.grad = torch.zeros(3, 5)
    Muon([still, zero], lr=0.1).step()
    assert torch.equal(still, torch.ones(3, 5))
    assert torch.equal(zero, torch.ones(3, 5))


# ------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_every_parameter_is_in_exactly_one_group_and_gains_are_not_decayed(
    name: str, tied: str, optimizer: str
) -> None:
    # QK norm has the most gains of all stabilizers.
    overrides = [f"model.tied_embeddings={tied}", "optimizer.weight_decay=0.1"]
    config = small_config(name, "qk_norm", *overrides, optimizer=optimizer)
    model = small_model(config)
    optimizers = instantiate(config["optimizer"]).build(model)
    groups = [group for each in optimizers for group in each.param_groups]
    for parameter_name, parameter in model.named_parameters():
        holding = [group for group in groups if any(p is parameter for p in group["params"])]
        assert len(holding) == 1, parameter_name
        assert holding[0]["weight_decay"] == (0.0 if parameter.ndim == 1 else 0.1), parameter_name
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest_at_its_own_rate(name: str) -> None:
    config = small_config(name, "qk_norm", "optimizer.lr=0.3", "optimizer.adamw_lr=0.02")
    model = small_model(config)
    muon, adamw = instantiate(config["optimizer"]).build(model)
    assert isinstance(muon, Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        assert (id(parameter) in in_muon) == (parameter_name.startswith("blocks.") and parameter.ndim == 2)
    assert {group["lr"] for group in muon.param_groups} == {0.3}
    assert {group["lr"] for group in adamw.param_groups} == {0.02}


def test_adamws_rate_is_the_base_rate_when_it_has_none_of_its_own() -> None:
    config = small_config("mha", "none", "optimizer.lr=0.3", "optimizer.adamw_lr=null")
    _, adamw = instantiate(config["optimizer"]).build(small_model(config))
    assert {group["lr"] for group in adamw.param_groups} == {0.3}


def test_set_lr_scales_each_groups_own_base_rate() -> None:
    config = small_config("mha", "none", "optimizer.lr=0.3", "optimizer.adamw_lr=0.02")
    optimizers = instantiate(config["optimizer"]).build(small_model(config))
    for factor in (0.5, 0.25):
        set_lr(optimizers, factor)
        rates = [{group["lr"] for group in each.param_groups} for each in optimizers]
        assert rates == [{0.3 * factor}, {0.02 * factor}]


def trained(config: dict[str, Any], build: Any) -> list[tuple[str, Tensor]]:
    model = small_model(config)
    optimizers = build(model)
    for step in range(4):
        batch = tokens(3, seed=step)
        model(batch[:, :-1], batch[:, 1:]).mean().backward()
        for each in optimizers:
            each.step()
            each.zero_grad()
    return list(model.named_parameters())


def test_the_adamw_recipe_equals_torchs_adamw() -> None:
    overrides = ["optimizer.lr=0.01", "optimizer.weight_decay=0.2", "optimizer.adamw_beta1=0.8"]
    config = small_config("mla", "qk_norm", *overrides, "optimizer.adamw_beta2=0.9", optimizer="adamw")

    def plain(model: nn.Module) -> list[torch.optim.Optimizer]:
        return [
            torch.optim.AdamW([p], lr=0.01, betas=(0.8, 0.9), weight_decay=0.2 if p.ndim == 2 else 0.0, fused=False)
            for p in model.parameters()
        ]

    for (name, got), (_, expected) in zip(
        trained(config, instantiate(config["optimizer"]).build), trained(config, plain), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_state_in_bfloat16_is_that_in_float32_rounded_after_every_step(optimizer: str) -> None:
    def build(dtype: str) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        config = small_config("mla", "qk_norm", f"optimizer.state_dtype={dtype}", optimizer=optimizer)
        model = small_model(config)
        return model, instantiate(config["optimizer"]).build(model)

    (half, half_optimizers), (full, full_optimizers) = build("bfloat16"), build("float32")
    for step in range(3):
        for model in (half, full):
            random_gradients(list(model.parameters()), step)
        for a, b in zip(half_optimizers, full_optimizers, strict=True):
            a.step()
            b.step()
            for held, state in zip(a.state.values(), b.state.values(), strict=True):
                for name in state.keys() - {"step"}:
                    state[name].copy_(state[name].bfloat16())
                    assert held[name].dtype == torch.bfloat16
                    assert torch.equal(held[name].float(), state[name])
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("update_scale", ["jordan", "moonlight"])
def test_the_muon_recipe_equals_torchs_muon_and_adamw(update_scale: str) -> None:
    overrides = ["optimizer.lr=0.02", "optimizer.adamw_lr=0.005", "optimizer.weight_decay=0.2"]
    overrides += [f"optimizer.update_scale={update_scale}", "optimizer.ns_dtype=bfloat16"]
    config = small_config("mha", "none", *overrides)

    def plain(model: nn.Module) -> list[torch.optim.Optimizer]:
        hidden = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
        scale = TORCH_SCALE[update_scale]
        optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, lr=0.02, momentum=0.95, weight_decay=0.2, adjust_lr_fn=scale)
        ]
        for p in model.parameters():
            if all(p is not each for each in hidden):
                decay = 0.2 if p.ndim == 2 else 0.0
                optimizers.append(torch.optim.AdamW([p], lr=0.005, betas=(0.9, 0.95), weight_decay=decay))
        return optimizers

    start = {name: p.detach().clone() for name, p in small_model(config).named_parameters()}
    got, expected = trained(config, instantiate(config["optimizer"]).build), trained(config, plain)
    for (name, a), (_, b) in zip(got, expected, strict=True):
        assert (a - b).norm() < 0.05 * (b - start[name]).norm(), name


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_optimizer_can_be_chosen_in_the_tiny_experiment(optimizer: str) -> None:
    # `experiment=tiny` sets keys that Muon alone has: AdamW was refused with "unknown key optimizer.ns_dtype".
    config = compose(["experiment=tiny", f"optimizer={optimizer}"])
    assert config["optimizer"]["warmup_steps"] == 40


# ------------------------------------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Steps 0-3 warm up; 8 steps remain, of which the last half is the decay of wsd.
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("wsd", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2]),
        (
            "cosine",
            [0.25, 0.5, 0.75, 1]
            + [0.2 + 0.4 * (1 + c) for c in (1, 0.92388, 0.70711, 0.38268, 0, -0.38268, -0.70711, -0.92388, -1)],
        ),
    ],
)
def test_schedules_give_the_factors_worked_by_hand(name: Any, expected: list[float]) -> None:
    schedule = make_schedule(name, total_steps=12, warmup_steps=4, decay_fraction=0.5, min_lr_ratio=0.2)
    assert [schedule(step) for step in range(13)] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_without_warm_up_the_first_step_has_the_whole_rate(name: Any) -> None:
    schedule = make_schedule(name, total_steps=10, warmup_steps=0, decay_fraction=0.2, min_lr_ratio=0.0)
    assert schedule(0) == 1


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_a_run_shorter_than_its_warm_up_only_warms_up(name: Any) -> None:
    schedule = make_schedule(name, total_steps=3, warmup_steps=8, decay_fraction=0.2, min_lr_ratio=0.0)
    assert [schedule(step) for step in range(3)] == [1 / 8, 2 / 8, 3 / 8]


def test_the_paper_runs_at_a_constant_rate_after_500_steps_of_warm_up() -> None:
    recipe = instantiate(compose(["experiment=paper"])["optimizer"])
    schedule = recipe.make_schedule(5000)
    assert [schedule(step) for step in (0, 249, 499, 500, 4999)] == pytest.approx([0.002, 0.5, 1, 1, 1])


@settings(max_examples=50)
@given(
    name=st.sampled_from(["constant", "cosine", "wsd"]),
    total=st.integers(1, 300),
    warmup=st.integers(0, 300),
    fraction=st.floats(0.01, 1),
    final=st.floats(0, 1),
)
def test_every_factor_is_positive_at_most_one_and_falls_after_warm_up(
    name: Any, total: int, warmup: int, fraction: float, final: float
) -> None:
    schedule = make_schedule(name, total_steps=total, warmup_steps=warmup, decay_fraction=fraction, min_lr_ratio=final)
    factors = [schedule(step) for step in range(total)]
    assert all(0 < factor <= 1 + 1e-12 for factor in factors)
    assert factors[:warmup] == sorted(factors[:warmup])
    after = factors[warmup:]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(after))
    assert all(factor >= final - 1e-12 for factor in after)


# ------------------------------------------------------------------------------------------------ clipping


@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e9, None])
def test_gradients_are_clipped_like_torchs_clip_grad_norm(max_norm: float | None) -> None:
    ours, theirs = random_parameters(), random_parameters()
    for parameters in (ours, theirs):
        random_gradients(parameters, 7)
        parameters[2].grad = None
    unclipped = [p.grad.clone() for p in ours if p.grad is not None]
    norm = clip_gradients(ours, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    torch.testing.assert_close(norm, expected)
    assert ours[2].grad is None
    got = [p.grad for p in ours if p.grad is not None]
    torch.testing.assert_close(got, [p.grad for p in theirs if p.grad is not None])
    assert torch.equal(got[0], unclipped[0]) == (max_norm is None or max_norm > norm)
