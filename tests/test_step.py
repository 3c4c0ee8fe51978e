"""The whole stabilized step against independent arithmetic: per-head rates, decay, clipping, and what is neutral."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from models import ATTENTIONS, LONE, OPTIMIZERS, small_config, small_model, tokens
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_lm.config import instantiate
from quack_lm.model import Transformer
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.stabilizers.fixed import Fixed
from quack_lm.stabilizers.none import NoStabilizer
from quack_lm.stabilizers.qk_clip import QKClip
from quack_lm.stabilizers.quack import QuacK
from quack_lm.step import LogitWeights, stabilized_step

N_STEPS = 3
LR, DECAY, TAU, THRESHOLD = 0.02, 0.5, 0.3, 0.2
DECLARED = {
    "mha": {"w_q": 3, "w_k": 3},
    "gqa": {"w_q": 6, "w_k": 2},
    "mla": {"w_uq": 3, "w_uk": 3, "w_qr": 3, "w_dq": 1, "w_dkv": 1, "w_kr": 1},
}
CLIP = {"mha": reference.clip_mha, "gqa": reference.clip_gqa, "mla": reference.clip_mla}
OVERRIDES = [f"optimizer.lr={LR}", f"optimizer.weight_decay={DECAY}", "model.init_std=0.2"]


class Steps:
    """A small model and what is needed to step it with a stabilizer, once per batch."""

    def __init__(self, name: str, stabilizer: Stabilizer, optimizer: str, *overrides: str) -> None:
        extra = {"muon": ["optimizer.adamw_lr=null"]}.get(optimizer, [])
        config = small_config(name, "none", *OVERRIDES, *extra, *overrides, optimizer=optimizer)
        self.model: Transformer = small_model(config)
        self.stabilizer = stabilizer
        self.optimizers: list[Optimizer] = instantiate(config["optimizer"]).build(self.model)
        self.weights = LogitWeights(self.model.attentions)
        for attention in self.model.attentions:
            attention.tracks_max_logits = stabilizer.needs_max_logits
        if stabilizer.needs_norms:
            stabilizer.initialize(self.weights.paths, self.weights.norms(stabilizer.needs_norms))
        self.maxima: list[list[float]] = []

    def gradients(self, step: int) -> None:
        """Forward and backward; `maxima` has each layer's and head's largest visible logit of this forward."""
        self.maxima = []
        hooks = [a.seam.register_forward_hook(self._keep_maxima) for a in self.model.attentions]
        batch = tokens(3, seed=step)
        self.model(batch[:, :-1], batch[:, 1:]).mean().backward()
        for hook in hooks:
            hook.remove()

    def step(self) -> None:
        stabilized_step(self.optimizers, self.stabilizer, self.weights, LONE)
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def parameters(self) -> dict[str, reference.Array]:
        return {name: p.detach().double().numpy().copy() for name, p in self.model.named_parameters()}

    def _keep_maxima(self, module: nn.Module, inputs: Any, qk: tuple[Tensor, Tensor]) -> None:
        q, k = (x.detach().double().numpy() for x in qk)
        group = q.shape[1] // k.shape[1]
        pairs = reference.visible_pairs(q.shape[2])
        self.maxima.append(
            [
                max(float(q[b, h, i] @ k[b, h // group, j]) for b in range(len(q)) for i, j in pairs)
                / q.shape[-1] ** 0.5
                for h in range(q.shape[1])
            ]
        )


def layer_weights(parameters: dict[str, reference.Array], layer: int) -> reference.Weights:
    prefix = f"blocks.{layer}.attention."
    return {n.removeprefix(prefix).removesuffix(".weight"): p for n, p in parameters.items() if n.startswith(prefix)}


def expected_scales(
    name: str, kind: str, now: dict[str, reference.Array], start: dict[str, reference.Array]
) -> dict[str, list[float]]:
    """The paper's factor on the rate of each block of each declared parameter, by the parameter's whole name."""
    scales: dict[str, list[float]] = {}
    for layer in range(2):
        weights, initial = layer_weights(now, layer), layer_weights(start, layer)
        if kind == "fixed":
            factors = {weight: [TAU] * blocks for weight, blocks in DECLARED[name].items()}
        elif kind.startswith("quack"):
            norm = reference.spectral if kind == "quack_spectral" else reference.frobenius
            if name == "mla":
                factors = reference.algorithm_2(weights, initial, n_heads=3, tau=TAU, norm=norm)
            else:
                heads = {"n_heads": DECLARED[name]["w_q"], "n_kv_heads": DECLARED[name]["w_k"]}
                factors = reference.algorithm_1(weights, initial, **heads, tau=TAU, norm=norm)
        else:
            factors = {}
        scales |= {f"blocks.{layer}.attention.{weight}.weight": values for weight, values in factors.items()}
    return scales


MAKE: dict[str, Callable[[bool], Stabilizer]] = {
    "none": lambda scales_decay: NoStabilizer(),
    "fixed": lambda scales_decay: Fixed(tau=TAU, scales_weight_decay=scales_decay),
    "quack": lambda scales_decay: QuacK(tau=TAU, scales_weight_decay=scales_decay),
    "quack_spectral": lambda scales_decay: QuacK(tau=TAU, norm="spectral", scales_weight_decay=scales_decay),
    "qk_clip": lambda scales_decay: QKClip(threshold=THRESHOLD),
}


def make_reference(optimizer: str, name: str, value: reference.Array) -> Any:
    is_muon = optimizer == "muon" and name.startswith("blocks.") and value.ndim == 2
    return reference.Muon() if is_muon else reference.AdamW()


@pytest.mark.parametrize("scales_decay", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("name", DECLARED)
def test_the_stabilized_step_is_the_papers(name: str, kind: str, optimizer: str, scales_decay: bool) -> None:
    run = Steps(name, MAKE[kind](scales_decay), optimizer)
    start = run.parameters()
    references = {n: make_reference(optimizer, n, value) for n, value in start.items()}
    has_scaled = has_clipped = False
    for step in range(N_STEPS):
        run.gradients(step)
        before = run.parameters()
        scales = expected_scales(name, kind, before, start)
        expected = {}
        for n, p in run.model.named_parameters():
            assert p.grad is not None
            rows, factors = len(p), scales.get(n, [1.0])
            has_scaled |= n in scales
            lr = LR * np.repeat(factors, rows // len(factors))
            decay_rate = lr if scales_decay else np.full(rows, LR)
            decay = decay_rate * (DECAY if p.ndim == 2 else 0.0)
            expected[n] = references[n].step(before[n], p.grad.double().numpy(), lr, decay)
        if kind == "qk_clip":
            for layer, maxima in enumerate(run.maxima):
                for weight, factors in CLIP[name](maxima, THRESHOLD).items():
                    has_clipped |= min(factors) < 0.9
                    key = f"blocks.{layer}.attention.{weight}.weight"
                    expected[key] = reference.scale_rows(expected[key], factors)
        run.step()
        for n, value in run.parameters().items():
            # The distance travelled is compared; 1e-6 is float32's rounding of the weights themselves.
            travelled = np.abs(expected[n] - before[n]).max()
            np.testing.assert_allclose(value, expected[n], rtol=0, atol=3e-4 * travelled + 1e-6, err_msg=n)
    assert has_scaled == (kind not in ("none", "qk_clip"))
    assert has_clipped == (kind == "qk_clip")


@pytest.mark.parametrize("scales_decay", [True, False])
@pytest.mark.parametrize("name", DECLARED)
def test_under_adamw_quack_is_torchs_adamw_with_a_rate_for_each_head(name: str, scales_decay: bool) -> None:
    run = Steps(name, QuacK(tau=TAU, scales_weight_decay=scales_decay), "adamw")
    start = run.parameters()
    heads: dict[str, list[nn.Parameter]] = {}
    for layer in range(2):
        for weight, blocks in DECLARED[name].items():
            key = f"blocks.{layer}.attention.{weight}.weight"
            heads[key] = [nn.Parameter(torch.from_numpy(block.copy())) for block in reference.cut(start[key], blocks)]
    groups = [{"params": [p]} for parts in heads.values() for p in parts]
    torch_adamw = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY)
    for step in range(N_STEPS):
        run.gradients(step)
        now = {key: torch.cat([p.detach() for p in parts]).numpy() for key, parts in heads.items()}
        scales = expected_scales(name, "quack", now, start)
        rates = [rate for key in heads for rate in scales[key]]
        gradients = dict(run.model.named_parameters())
        for key, parts in heads.items():
            whole = gradients[key].grad
            assert whole is not None
            for p, g in zip(parts, whole.double().chunk(len(parts)), strict=True):
                p.grad = g.clone()
        for group, rate in zip(torch_adamw.param_groups, rates, strict=True):
            group["lr"] = LR * rate
            # Decay of 1 - lr * weight_decay at the base rate, whatever the head's own rate is.
            group["weight_decay"] = DECAY if scales_decay else DECAY / rate
        torch_adamw.step()
        run.step()
    for key, parts in heads.items():
        np.testing.assert_allclose(
            run.parameters()[key], torch.cat([p.detach() for p in parts]).numpy(), rtol=1e-4, atol=2e-6, err_msg=key
        )


@pytest.mark.parametrize("kind", ["fixed", "quack"])
@pytest.mark.parametrize("name", DECLARED)
def test_under_muon_each_block_goes_its_factor_of_the_way_of_torchs_muon(name: str, kind: str) -> None:
    run = Steps(name, MAKE[kind](True), "muon", "optimizer.ns_dtype=bfloat16")
    run.gradients(0)
    run.step()  # so that QuacK's factors have left tau
    run.gradients(1)
    before = run.parameters()
    first = Steps(name, MAKE[kind](True), "muon", "optimizer.ns_dtype=bfloat16")
    first.gradients(0)
    start = first.parameters()
    hidden = [k for k, v in before.items() if k.startswith("blocks.") and v.ndim == 2]
    copies = {k: nn.Parameter(torch.from_numpy(start[k]).float()) for k in hidden}
    muon = torch.optim.Muon(list(copies.values()), lr=LR, momentum=0.95, weight_decay=DECAY, adjust_lr_fn="original")
    for source, values in [(first, start), (run, before)]:
        for k, p in source.model.named_parameters():
            if k in copies:
                assert p.grad is not None
                copies[k].grad = p.grad.clone()
                copies[k].detach().copy_(torch.from_numpy(values[k]))
        muon.step()
    scales = expected_scales(name, kind, before, start)
    run.step()
    after = run.parameters()
    for k, p in copies.items():
        way = p.detach().double().numpy() - before[k]
        expected = reference.scale_rows(way, scales[k]) if k in scales else way
        assert np.linalg.norm(after[k] - before[k] - expected) < 0.03 * np.linalg.norm(expected), k
        assert np.linalg.norm(expected) > 0
    assert scales.keys() <= copies.keys()


# ------------------------------------------------------------------------------------------------ neutral


def weights_after(name: str, stabilizer: Stabilizer, optimizer: str, n_steps: int) -> dict[str, reference.Array]:
    run = Steps(name, stabilizer, optimizer)
    for step in range(n_steps):
        run.gradients(step)
        run.step()
    return run.parameters()


def assert_identical(ours: dict[str, reference.Array], theirs: dict[str, reference.Array]) -> None:
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ATTENTIONS)
def test_neutral_settings_are_bit_identical_to_no_stabilizer(name: str, optimizer: str) -> None:
    plain = weights_after(name, NoStabilizer(), optimizer, N_STEPS)
    for neutral in (
        Fixed(tau=1.0),
        Fixed(tau=1.0, scales_weight_decay=False),
        QKClip(threshold=1e6),
        QKClip(threshold=1e-6, read_only=True),
    ):
        assert_identical(weights_after(name, neutral, optimizer, N_STEPS), plain)
    clipped = weights_after(name, QKClip(threshold=1e-6), optimizer, N_STEPS)
    assert any((clipped[n] != plain[n]).any() for n in plain)


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_quacks_first_step_with_tau_one_is_bit_identical_to_no_stabilizer(name: str, optimizer: str, norm: Any) -> None:
    plain = [weights_after(name, NoStabilizer(), optimizer, n_steps) for n_steps in (1, 2)]
    for scales_decay in (True, False):
        quack = [
            weights_after(name, QuacK(tau=1.0, norm=norm, scales_weight_decay=scales_decay), optimizer, n_steps)
            for n_steps in (1, 2)
        ]
        assert_identical(quack[0], plain[0])
        assert any((quack[1][n] != plain[1][n]).any() for n in plain[1])


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_decay_alone_shrinks_scaled_weights_at_the_base_rate_when_decoupled(optimizer: str) -> None:
    # Zero gradients: what is left of the step is the decay.
    for scales_decay, rate in [(True, TAU * LR), (False, LR)]:
        run = Steps("mla", Fixed(tau=TAU, scales_weight_decay=scales_decay), optimizer)
        before = run.parameters()
        for p in run.model.parameters():
            p.grad = torch.zeros_like(p)
        run.step()
        after = run.parameters()
        for weight in DECLARED["mla"]:
            key = f"blocks.1.attention.{weight}.weight"
            np.testing.assert_allclose(after[key], before[key] * (1 - rate * DECAY), rtol=1e-6)
        key = "blocks.1.attention.w_uv.weight"
        np.testing.assert_allclose(after[key], before[key] * (1 - LR * DECAY), rtol=1e-6)


def test_the_scheduled_rate_of_the_step_is_what_is_scaled() -> None:
    # Algorithm 1: eta is the scheduled base rate. Halving it halves the way of a first step.
    ways = []
    for factor in (1.0, 0.5):
        run = Steps("mha", QuacK(tau=TAU), "adamw", "optimizer.weight_decay=0.0")
        before = run.parameters()
        for group in run.optimizers[0].param_groups:
            group["lr"] *= factor
        run.gradients(0)
        run.step()
        key = "blocks.0.attention.w_q.weight"
        ways.append(run.parameters()[key] - before[key])
    np.testing.assert_allclose(ways[1], 0.5 * ways[0], atol=1e-7)
