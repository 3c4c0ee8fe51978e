"""The decoder: its size, its initial values, its masks, and what must not change its results."""

import math
from collections import Counter
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quack_lm.attention.rope import rope_table, rotate
from quack_lm.config import compose
from quack_lm.model import Transformer, count_parameters
from quack_lm.parallel import materialize
from quack_lm.rms_norm import RMSNorm
from quack_lm.training.build import make_model

CPU = torch.device("cpu")

# Three heads of four, three layers, nothing equal to anything else.
SMALL = (
    "experiment=tiny",
    "data.dir=none",  # whatever a checkout holds
    "data.vocab_size=37",
    "model.d_model=12",
    "model.n_heads=3",
    "model.n_layers=3",
    "model.d_ff=20",
    "model.init_std=0.4",
)


@cache
def config(*overrides: str) -> dict:
    return compose([*SMALL, *overrides])


def make(*overrides: str, eot_id: int | None = None, seed: int = 0) -> Transformer:
    """A small model with its initial values."""
    model = make_model(config(*overrides))
    model.eot_id = eot_id
    materialize(model, partial(model.initial_value, seed=seed, device=CPU), CPU)
    return model


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(37, (batch, length), generator=torch.Generator().manual_seed(3))


# ------------------------------------------------------------------------------------------------ size

VOCAB, D, LAYERS, HEADS, FF, LATENT_Q, LATENT_KV, NOPE, ROPE, VALUE = 49152, 2048, 14, 32, 8192, 512, 256, 64, 64, 128

ELSEWHERE = {
    "embedding": VOCAB * D,
    "mlp.w_gate": LAYERS * D * FF,
    "mlp.w_up": LAYERS * D * FF,
    "mlp.w_down": LAYERS * D * FF,
}
NORMS = (2 * LAYERS + 1) * D

ATTENTION = {
    "mha": {
        "attention.w_q": LAYERS * D * D,
        "attention.w_k": LAYERS * D * D,
        "attention.w_v": LAYERS * D * D,
        "attention.w_o": LAYERS * D * D,
    },
    "mla": {
        "attention.w_dq": LAYERS * D * LATENT_Q,
        "attention.w_uq": LAYERS * LATENT_Q * HEADS * NOPE,
        "attention.w_qr": LAYERS * LATENT_Q * HEADS * ROPE,
        "attention.w_dkv": LAYERS * D * LATENT_KV,
        "attention.w_uk": LAYERS * LATENT_KV * HEADS * NOPE,
        "attention.w_uv": LAYERS * LATENT_KV * HEADS * VALUE,
        "attention.w_kr": LAYERS * D * ROPE,
        "attention.w_o": LAYERS * HEADS * VALUE * D,
    },
}
TOTAL = {"mha": 1_040_246_784, "mla": 998_041_600}
HEAD_DIM = {"mha": 64, "mla": 128}


@pytest.mark.parametrize("attention", ["mha", "mla"])
@pytest.mark.parametrize("stabilizer", ["none", "fixed", "qk_norm", "qk_clip", "quack"])
def test_the_1b_model_has_the_papers_parameters_component_by_component(attention: str, stabilizer: str) -> None:
    model = make_model(compose(["model=1b", f"attention={attention}", f"stabilizer={stabilizer}"]))
    assert all(parameter.is_meta for parameter in model.parameters())
    gains = LAYERS * 2 * HEAD_DIM[attention] if stabilizer == "qk_norm" else 0
    expected = {**ELSEWHERE, **ATTENTION[attention], "norms": NORMS + gains, "total": TOTAL[attention] + gains}
    assert count_parameters(model) == expected


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_the_1b_models_heads_have_the_papers_widths(attention: str) -> None:
    first = make_model(compose(["model=1b", f"attention={attention}"])).attentions[0]
    q, k, v = first.project(torch.empty(1, 3, D, device="meta"))
    width = HEAD_DIM[attention]
    assert [q.shape, k.shape, v.shape] == [(1, HEADS, 3, width)] * 3
    assert first.rope_width == 64


def test_components_are_counted_once_and_sum_to_the_total() -> None:
    for overrides in ((), ("attention=mla", "attention.latent_norm=true"), ("model.tied_embeddings=true",)):
        model = make(*overrides)
        counts = count_parameters(model)
        assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in model.parameters())
        assert ("head" in counts) == ("model.tied_embeddings=true" not in overrides)


def test_latent_norms_are_counted_as_norms() -> None:
    mla = ("attention=mla", "attention.q_latent_dim=7", "attention.kv_latent_dim=5")
    plain = count_parameters(make(*mla))
    normed = count_parameters(make(*mla, "attention.latent_norm=true"))
    assert normed["norms"] - plain["norms"] == 3 * (7 + 5)
    assert normed["total"] - plain["total"] == 3 * (7 + 5)


# ------------------------------------------------------------------------------------------------ embeddings


def changed_columns(*overrides: str) -> list[int]:
    """Which vocabulary logits change with the embedding of token 30, when 30 is not in the input."""
    model = make(*overrides)
    tokens = random_tokens(2, 9) % 30
    with torch.no_grad():
        before = model(tokens)
        model.embedding.weight[30] += 1.0
        after = model(tokens)
    return (before != after).any(0).any(0).nonzero().flatten().tolist()


def test_tied_embeddings_are_the_head() -> None:
    assert changed_columns("model.tied_embeddings=true") == [30]
    assert "head.weight" not in dict(make("model.tied_embeddings=true").named_parameters())


def test_untied_embeddings_are_not_the_head() -> None:
    assert changed_columns("model.tied_embeddings=false") == []


# ------------------------------------------------------------------------------------------------ initial values


def test_initial_values_depend_on_the_seed_and_the_name_alone() -> None:
    torch.manual_seed(1)
    first = dict(make().named_parameters())
    torch.manual_seed(2)
    for overrides in (
        ("stabilizer=quack",),
        ("stabilizer=qk_norm",),
        ("trainer.activation_checkpointing=true",),
        ("attention=mla", "attention.v_dim=4"),
    ):
        other = dict(make(*overrides).named_parameters())
        shared = first.keys() & other.keys()
        assert {
            "embedding.weight",
            "head.weight",
            "blocks.2.mlp.w_down.weight",
            "blocks.0.attention.w_o.weight",
        } <= shared
        for name in shared:
            assert torch.equal(first[name], other[name]), name


def test_another_seed_gives_other_values_everywhere_but_in_the_norms() -> None:
    first, second = dict(make(seed=0).named_parameters()), dict(make(seed=1).named_parameters())
    for name, values in first.items():
        if name.endswith("norm.weight"):
            assert (values == 1).all()
        else:
            assert not (values == second[name]).any(), name


def test_no_two_matrices_start_alike() -> None:
    starts = [
        p.flatten()[:8].tolist() for n, p in make("attention=mla").named_parameters() if not n.endswith("norm.weight")
    ]
    assert len({tuple(start) for start in starts}) == len(starts)


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_initial_values_are_normal_with_the_configured_deviations(attention: str) -> None:
    wide = (
        "model.d_model=66",
        "model.d_ff=100",
        "data.vocab_size=500",
    )
    model = make(*wide, f"attention={attention}", "model.init_std=0.3", "model.embedding_std=0.07")
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            continue
        expected = 0.3
        if name in ("embedding.weight", "head.weight"):
            expected = 0.07
        elif name.split(".")[-2] in ("w_o", "w_down"):
            expected = 0.3 / math.sqrt(2 * 3)
        # Five standard errors of the deviation, and of the mean.
        n = parameter.numel()
        assert abs(parameter.std().item() / expected - 1) < 5 / math.sqrt(2 * n), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(n), name
        # A normal distribution has 68.3% within one deviation.
        within = (parameter.abs() < expected).float().mean().item()
        assert abs(within - 0.6827) < 5 * math.sqrt(0.6827 * 0.3173 / n), name


def test_the_1b_models_residual_projections_start_at_the_scaled_deviation() -> None:
    model = make_model(compose(["model=1b"]))
    for name, expected in (("w_q", 0.02), ("w_o", 0.02 / math.sqrt(28))):
        values = model.initial_value(f"blocks.5.attention.{name}.weight", torch.Size((300, 301)), seed=0, device=CPU)
        assert values.std().item() == pytest.approx(expected, rel=0.02)


# ------------------------------------------------------------------------------------------------ execution


def loss_and_gradients(model: Transformer) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    tokens = random_tokens(2, 12)
    model.train()
    nats = model(tokens[:, :-1], tokens[:, 1:])
    nats.mean().backward()
    maxima = torch.stack([attention.max_logits_H for attention in model.attentions])
    return nats.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, maxima


@pytest.mark.parametrize("recomputed", ["true", "selective"])
@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_recomputation_changes_no_bit_of_loss_gradients_or_maxima(attention: str, recomputed: str) -> None:
    choice = (f"attention={attention}", "stabilizer=qk_clip")
    nats, gradients, maxima = loss_and_gradients(make(*choice))
    again_nats, again, again_maxima = loss_and_gradients(
        make(*choice, f"trainer.activation_checkpointing={recomputed}")
    )
    assert torch.equal(nats, again_nats)
    assert torch.equal(maxima, again_maxima)
    assert maxima.isfinite().all()
    assert gradients.keys() == again.keys() == dict(make(*choice).named_parameters()).keys()
    for name in gradients:
        assert torch.equal(gradients[name], again[name]), name


class OperatorCounts(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.counts[operator.name().partition(".")[0].removeprefix("aten::")] += 1
        return operator(*args, **(kwargs or {}))


def test_selective_recomputation_repeats_neither_attention_nor_a_product_with_a_weight() -> None:
    counts = {}
    for recomputed in ("false", "selective", "true"):
        with OperatorCounts() as seen:
            loss_and_gradients(make("stabilizer=qk_clip", f"trainer.activation_checkpointing={recomputed}"))
        attention = sum(n for name, n in seen.counts.items() if "dot_product" in name and "backward" not in name)
        counts[recomputed] = (seen.counts["mm"], attention, seen.counts["silu"], seen.counts["bmm"])
    (mm, attention, silu, bmm), layers = counts["false"], 3
    # The last product of a block need not be repeated; the scores of the max logits are, rather than kept.
    assert counts["selective"] == (mm, attention, silu + layers, bmm + layers)
    assert counts["true"] == (mm + 6 * layers, attention + layers, silu + layers, bmm + layers)


@pytest.mark.parametrize("chunk", [1, 5, 22, 1000])
def test_cutting_the_loss_into_chunks_leaves_it_and_the_gradients_equal(chunk: int) -> None:
    nats, gradients, _ = loss_and_gradients(make())
    again_nats, again, _ = loss_and_gradients(make(f"trainer.loss_chunk={chunk}"))
    assert nats.shape == again_nats.shape == (22,)
    torch.testing.assert_close(nats, again_nats, rtol=1e-6, atol=1e-6)
    assert gradients.keys() == again.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], again[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_loss_is_the_cross_entropy_of_the_logits_in_nats() -> None:
    model = make()
    tokens = random_tokens(2, 12)
    nats = model(tokens[:, :-1], tokens[:, 1:])
    logits = model(tokens[:, :-1]).double()
    expected = (logits.exp().sum(-1).log() - logits.gather(-1, tokens[:, 1:, None])[..., 0]).flatten()
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats.double(), expected, rtol=1e-5, atol=1e-6)


def test_maxima_are_tracked_in_training_alone_and_over_all_its_forwards() -> None:
    model = make("stabilizer=qk_clip")
    tokens = random_tokens(2, 12)

    def maxima_after(*batches: Tensor) -> Tensor:
        for batch in batches:
            model(batch)
        return torch.stack([attention.max_logits_H.clone() for attention in model.attentions])

    model.eval()
    assert (maxima_after(tokens) == -torch.inf).all(), "validation is not training"
    model.train()
    start = maxima_after(tokens[:, :5])
    whole = maxima_after(tokens)
    assert start.isfinite().all()
    assert (whole >= start).all()
    assert (whole > start).any()
    # The logits of a prefix are among those of the whole, so that they change no maximum.
    assert torch.equal(maxima_after(tokens[:, :5], tokens[:1, :1]), whole)


# ------------------------------------------------------------------------------------------------ who sees whom

VARIANTS = [
    (),
    ("attention.n_kv_heads=1",),
    ("attention=mla",),
    ("attention=mla", "stabilizer=qk_norm"),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "+".join(v) or "mha")
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_token_changes_no_logits_before_it_and_all_after_it(variant: tuple[str, ...], backend: str) -> None:
    model = make(*variant, f"attention.backend={backend}")
    tokens = random_tokens(2, 11)
    other = tokens.clone()
    other[:, 6] = (other[:, 6] + 1) % 37
    with torch.no_grad():
        changed = (model(tokens) != model(other)).any(-1)
    assert not changed[:, :6].any()
    assert changed[:, 6:].all()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "+".join(v) or "mha")
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_with_masking_a_document_is_blind_to_the_others(variant: tuple[str, ...], backend: str) -> None:
    eot = 36
    tokens = random_tokens(2, 14) % eot
    tokens[0, 5] = tokens[1, 8] = eot
    other = tokens.clone()
    other[:, 2] = (other[:, 2] + 1) % eot
    masked = make(*variant, f"attention.backend={backend}", eot_id=eot)
    plain = make(*variant, f"attention.backend={backend}")
    with torch.no_grad():
        changed = (masked(tokens) != masked(other)).any(-1)
        leaks = (plain(tokens) != plain(other)).any(-1)
    # The end-of-text token belongs to the document it ends.
    assert changed.nonzero().tolist() == [[0, t] for t in range(2, 6)] + [[1, t] for t in range(2, 9)]
    assert leaks[:, 2:].all()


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "+".join(v) or "mha")
def test_with_masking_a_document_has_the_logits_it_has_alone(variant: tuple[str, ...]) -> None:
    eot = 36
    tokens = random_tokens(1, 13) % eot
    tokens[0, [4, 5, 9]] = eot  # four documents, the second of them empty but for its end
    model = make(*variant, eot_id=eot)
    with torch.no_grad():
        together = model(tokens)
        alone = torch.cat([model(tokens[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 10), (10, 13))], dim=1)
    # Positions are relative, so that a document may start anywhere.
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ rotary positions


def random_vectors(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(dim=st.integers(1, 6).map(lambda n: 2 * n), still=st.integers(0, 5), length=st.integers(1, 40))
def test_rotation_keeps_norms_and_the_dimensions_without_position(dim: int, still: int, length: int) -> None:
    x = random_vectors(2, 3, length, still + dim)
    turned = rotate(x, rope_table(length, dim, theta=100.0, device="cpu"))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[..., :still], x[..., :still])
    assert torch.equal(turned[:, :, 0], x[:, :, 0]), "position 0 turns nothing"


@given(dim=st.integers(1, 6).map(lambda n: 2 * n), i=st.integers(0, 30), j=st.integers(0, 30), shift=st.integers(0, 60))
def test_the_product_of_rotated_vectors_depends_on_their_distance_alone(dim: int, i: int, j: int, shift: int) -> None:
    table = rope_table(100, dim, theta=100.0, device="cpu")
    q, k = (random_vectors(dim, seed=s).expand(1, 1, 100, dim) for s in (0, 1))
    products = rotate(q, table) @ rotate(k, table).mT
    torch.testing.assert_close(products[0, 0, i, j], products[0, 0, i + shift, j + shift], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dim", "theta"), [(2, 10.0), (10, 10_000.0)])
def test_rotation_is_multiplication_by_a_complex_number(dim: int, theta: float) -> None:
    length = 50
    x = random_vectors(1, 2, length, dim).double()
    half = torch.complex(x[..., : dim // 2], x[..., dim // 2 :])
    speed = torch.tensor([theta ** (-2 * f / dim) for f in range(dim // 2)], dtype=torch.float64)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * speed
    turned = half * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    actual = rotate(x, rope_table(length, dim, theta=theta, device="cpu"))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_rotation_keeps_the_precision_of_what_it_rotates() -> None:
    x = random_vectors(1, 1, 7, 6).bfloat16()
    turned = rotate(x, rope_table(7, 4, theta=100.0, device="cpu"))
    assert turned.dtype == torch.bfloat16
    exact = rotate(x.float(), rope_table(7, 4, theta=100.0, device="cpu"))
    assert torch.equal(turned, exact.bfloat16()), "rounded once, at the end"


@pytest.mark.parametrize("still", [0, 3])
def test_the_gradient_of_a_rotation_is_that_of_its_differences_however_heads_lie_in_memory(still: int) -> None:
    table = rope_table(5, 4, theta=100.0, device="cpu")
    for x in (random_vectors(2, 3, 5, still + 4), random_vectors(2, 5, 3, still + 4).transpose(1, 2)):
        assert rotate(x, table).stride() == x.stride()
        assert torch.autograd.gradcheck(lambda x: rotate(x, table), x.double().requires_grad_())


def test_a_table_larger_than_its_input_or_with_a_gradient_rotates_as_the_formula_says() -> None:
    table, x = rope_table(5, 4, theta=100.0, device="cpu"), random_vectors(1, 3, 5, 4)
    of_two = torch.stack([table, table.flip(1)], dim=1)[:, :, None]  # positions of two sequences
    rotated = rotate(x, of_two)
    torch.testing.assert_close(rotated[:1], rotate(x, table))
    torch.testing.assert_close(rotated[1:], rotate(x, table.flip(1)))
    assert torch.autograd.gradcheck(lambda t: rotate(x.double(), t), table.double().requires_grad_())


# ------------------------------------------------------------------------------------------------ RMSNorm


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 4, 6)])
def test_the_norm_is_torchs_and_so_is_its_gradient(shape: tuple[int, ...]) -> None:
    norm = RMSNorm(shape[-1], eps=0.01).double()
    torch.nn.init.normal_(norm.weight)
    # Heads, as split from a product: in memory the time axis comes first.
    x = torch.randn(shape, dtype=torch.float64).transpose(0, -2).contiguous().transpose(0, -2).requires_grad_()
    torch.testing.assert_close(norm(x), torch.nn.RMSNorm.forward(norm, x), rtol=1e-13, atol=0)
    assert torch.autograd.gradcheck(
        lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x), (x, norm.weight)
    )


def test_a_norm_of_bfloat16_takes_a_gain_and_a_gradient_of_float32() -> None:
    norm, seen = RMSNorm(6, eps=1e-6), []
    norm.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 4, 3, 6).bfloat16().transpose(1, 2).requires_grad_()
    norm(x).sum().backward()  # the gradient of a sum has strides of 0
    exact = x.detach().double().requires_grad_()
    torch.nn.functional.rms_norm(exact, (6,), eps=1e-6).sum().backward()
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=2e-2, atol=2e-2)
    assert len(seen) == 1


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1.5e-7), (torch.bfloat16, 5e-3)])
def test_the_norm_is_exact_up_to_rounding_in_working_precision(dtype: torch.dtype, bound: float) -> None:
    norm = RMSNorm(64, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x, grad = (torch.randn(50, 64).to(dtype).requires_grad_() for _ in range(2))
    norm(x).backward(grad)
    exact_x, weight = (t.detach().double().requires_grad_() for t in (x, norm.weight))
    exact = torch.nn.functional.rms_norm(exact_x, (64,), weight, 1e-6)
    exact.backward(grad.double())
    for got, wanted in ((norm(x), exact), (x.grad, exact_x.grad), (norm.weight.grad, weight.grad)):
        assert got.dtype == dtype
        assert (got.double() - wanted).norm() < bound * wanted.norm()
