"""The probe's split of a change, against swapping weights by hand, and Lemma 1's bound beside it."""

import pytest
import torch
from models import ATTENTIONS, LONE, small_config, small_model, tokens
from torch import Tensor

from quack_lm.attention.scores import logits
from quack_lm.logit_paths import Factor, LogitPath, declared_weights, largest_change_of_product
from quack_lm.model import Transformer
from quack_lm.probe import Probe
from quack_lm.step import LogitWeights

OVERRIDES = ["model.init_std=0.3", "model.embedding_std=1.0"]


def test_the_largest_change_of_two_factors_is_lemma_1() -> None:
    paths = (LogitPath("qk", (Factor("w_q", 2), Factor("w_k", 1))),)
    norms = {"w_q": torch.tensor([[2.0, 3.0]]), "w_k": torch.tensor([[5.0]])}
    changes = {"w_q": torch.tensor([[0.1, 0.2]]), "w_k": torch.tensor([[0.3]])}
    expected = [2 * 0.3 + 0.1 * 5 + 0.1 * 0.3, 3 * 0.3 + 0.2 * 5 + 0.2 * 0.3]
    torch.testing.assert_close(largest_change_of_product(paths, norms, changes), torch.tensor([expected]))


def test_paths_add_up() -> None:
    paths = (LogitPath("a", (Factor("u"), Factor("v"))), LogitPath("b", (Factor("u"), Factor("w"))))
    norms = {"u": torch.tensor([[1.0]]), "v": torch.tensor([[2.0]]), "w": torch.tensor([[4.0]])}
    changes = {"u": torch.tensor([[1.0]]), "v": torch.tensor([[0.0]]), "w": torch.tensor([[1.0]])}
    # (1+1) 2 - 2  +  (1+1)(4+1) - 4
    torch.testing.assert_close(largest_change_of_product(paths, norms, changes), torch.tensor([[2.0 + 6.0]]))


def move(model: Transformer, scale: float = 0.05) -> None:
    """Change every parameter a little."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def queries_keys_and_inputs(model: Transformer, ids: Tensor) -> list[tuple[Tensor, Tensor, tuple]]:
    """Of each layer, by hooks of this test's own."""
    inputs: list[tuple] = []
    outputs: list[tuple] = []
    hooks = [a.register_forward_pre_hook(lambda _, args: inputs.append(args)) for a in model.attentions]
    hooks += [a.seam.register_forward_hook(lambda _, __, qk: outputs.append(qk)) for a in model.attentions]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return [(q, k, args) for (q, k), args in zip(outputs, inputs, strict=True)]


@pytest.mark.parametrize("stabilizer", ["none", "qk_norm"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_parts_are_what_swapping_one_sides_weights_back_gives(attention: str, stabilizer: str) -> None:
    model = small_model(small_config(attention, stabilizer, *OVERRIDES))
    weights = LogitWeights(model.attentions)
    ids = tokens(3)
    probe = Probe(model, model.attentions, [(ids, torch.ones(3))], LONE, eot_id=None, weights=weights)
    probe.before()
    old_weights = weights.stacks()
    old = queries_keys_and_inputs(model, ids[:, :-1])
    move(model)
    state = {name: p.clone() for name, p in model.state_dict().items()}
    measured = probe.after()
    assert all(torch.equal(p, state[name]) for name, p in model.state_dict().items()), "the weights are put back"

    seen = torch.ones(8, 8).tril().bool()
    new = queries_keys_and_inputs(model, ids[:, :-1])
    weights.write(old_weights)
    for layer, ((q0, k0, _), (q1, k1, args)) in enumerate(zip(old, new, strict=True)):
        layer_attention = model.attentions[layer]
        with torch.no_grad():
            q, k, _ = layer_attention.project(args[0])
            q, k = layer_attention.seam(q, k, args[1])
        # Each side's part is the mean over the two orders in which the sides can be swapped.
        from_query = (logits(q1, k1) - logits(q, k1) + logits(q1, k) - logits(q, k)) / 2
        from_key = (logits(q1, k1) - logits(q1, k) + logits(q, k1) - logits(q, k)) / 2
        upstream = logits(q, k) - logits(q0, k0)
        torch.testing.assert_close(from_query + from_key + upstream, logits(q1, k1) - logits(q0, k0))
        for name, part in (("query", from_query), ("key", from_key), ("upstream", upstream)):
            mean = part.abs()[:, :, seen].mean((0, 2))
            torch.testing.assert_close(
                measured[f"logits/delta_from_{name}_per_head"][layer], mean, rtol=1e-4, atol=1e-6
            )
        largest = (from_query + from_key).abs()[:, :, seen].amax((0, 2))
        torch.testing.assert_close(measured["logits/delta_weights_max_per_head"][layer], largest, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_no_change_by_the_weights_passes_lemma_1(attention: str) -> None:
    model = small_model(small_config(attention, "none", *OVERRIDES))
    weights = LogitWeights(model.attentions)
    probe = Probe(model, model.attentions, [(tokens(3), torch.ones(3))], LONE, eot_id=None, weights=weights)
    probe.before()
    move(model)
    measured = probe.after()
    bound = measured.get("logits/delta_weights_max_bound_per_head")
    if "latent_norm" in attention:
        assert bound is None
    else:
        assert (measured["logits/delta_weights_max_per_head"] < bound).all()
        assert (bound < 1000 * measured["logits/delta_weights_max_per_head"]).all()


def test_there_is_no_bound_where_queries_and_keys_are_normalized() -> None:
    model = small_model(small_config("mha", "qk_norm"))
    probe = Probe(
        *(model, model.attentions, [(tokens(3), torch.ones(3))], LONE),
        eot_id=None,
        weights=LogitWeights(model.attentions),
    )
    probe.before()
    assert "logits/delta_weights_max_bound" not in probe.after()


def test_a_layer_whose_weights_did_not_move_has_upstream_changes_only() -> None:
    model = small_model(small_config("mla", "none", *OVERRIDES))
    weights = LogitWeights(model.attentions)
    probe = Probe(model, model.attentions, [(tokens(3), torch.ones(3))], LONE, eot_id=None, weights=weights)
    probe.before()
    kept = weights.stacks()
    move(model)
    weights.write(kept)
    measured = probe.after()
    assert set(declared_weights(weights.paths)) == set(kept)
    for part in ("query", "key"):
        assert measured[f"logits/delta_from_{part}"] == 0
    torch.testing.assert_close(measured["logits/delta_from_upstream"], measured["logits/delta_mean"])
