"""How large the attention logits are, and how much one optimizer step changes them, on a fixed held-out batch.

Queries and keys of the probe batch are kept before the step and taken again after it; logits are formed from both a
block of query rows at a time, so memory stays linear in T. Everything is over causally visible pairs, in float32.

The change can be split into the parts of the query weights, the key weights and everything upstream: with the new
layer inputs x and the old weights, queries and keys are q', k'. A logit is bilinear, so this is exact and symmetric:

    q1 k1 - q0 k0  =  (q1 - q') (k1 + k') / 2  +  (q1 + q') / 2 (k1 - k')  +  (q' k' - q0 k0)
                       query weights             key weights                   upstream
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from quack_lm.attention.base import Attention
from quack_lm.attention.mask import Mask, number_documents
from quack_lm.attention.scores import logits, row_chunks
from quack_lm.logit_paths import largest_change_of_product
from quack_lm.parallel import World, evaluating
from quack_lm.step import LogitWeights

# Query rows whose logits, old and new, exist at once.
ROWS = 128
PARTS = ("query", "key", "upstream")


class Probe:
    """Per layer and head: max logit, mean and largest |change|, and attention entropy in nats.

    `batches` are this rank's (tokens [B, T + 1], weights [B]) of the probe split; sequences of weight 0 are padding.
    With `weights`, the mean |change| is split into its parts too.
    """

    def __init__(
        self,
        model: nn.Module,
        attentions: list[Attention],
        batches: Iterable[tuple[Tensor, Tensor]],
        world: World,
        *,
        eot_id: int | None,
        weights: LogitWeights | None = None,
    ) -> None:
        self.model = model
        self.attentions = attentions
        self.batches = [(world.to_device(tokens[:, :-1]), world.to_device(weights)) for tokens, weights in batches]
        self.world = world
        self.eot_id = eot_id
        self.weights = weights
        self._before: list[list[tuple[Tensor, Tensor]]] = []
        self._old_weights: dict[str, Tensor] = {}

    def before(self) -> None:
        """Keep queries and keys as they are: one (q, k) per batch and layer."""
        self._before = [self._queries_and_keys(tokens) for tokens, _ in self.batches]
        self._old_weights = self.weights.stacks() if self.weights else {}

    @torch.no_grad()
    def after(self) -> dict[str, Tensor]:
        """The measurements against `before`: tables [layers, heads], and their aggregates over heads."""
        shape = (len(self.attentions), self.attentions[0].n_heads)
        # Max logit, largest change, largest change by the weights; and the longest input of each layer.
        largest = torch.full((3, *shape), -torch.inf, device=self.world.device)
        longest = torch.zeros(len(self.attentions), device=self.world.device)
        # Changes, entropies, and the parts of the changes.
        sums = torch.zeros((2 + len(PARTS), *shape), device=self.world.device, dtype=torch.float64)
        counts = torch.zeros(2, device=self.world.device, dtype=torch.float64)  # visible pairs, query rows
        for (tokens, weights), old in zip(self.batches, self._before, strict=True):
            inputs: list[Tensor] = []
            new = self._queries_and_keys(tokens, see_inputs=inputs)
            halfway = self._with_old_weights(tokens, inputs) if self.weights else [None] * len(new)
            real = weights > 0
            if not real.any():
                continue
            longest = longest.maximum(torch.stack([x[real].float().norm(dim=-1).amax() for x in inputs]))
            mask = Mask(None if self.eot_id is None else number_documents(tokens[real], self.eot_id))
            for rows in row_chunks(tokens.shape[1], ROWS):
                seen = mask.visible(rows, rows.stop, tokens.device)  # no row sees later keys
                hidden = ~seen
                pairs = seen.sum() * (1 if seen.ndim == 4 else real.sum())
                counts += torch.stack([pairs, real.sum() * (rows.stop - rows.start)])
                for layer, of_layer in enumerate(zip(old, new, halfway, strict=True)):
                    (q0, k0), (q1, k1), *middle = (
                        (q[real], k[real][:, :, : rows.stop]) for q, k in filter(None, of_layer)
                    )
                    after = logits(q1, k1, rows=rows)
                    # In place where nothing else reads it: each of these is as large as the logits.
                    change = logits(q0, k0, rows=rows).sub_(after).abs_().masked_fill_(hidden, 0.0)
                    after.masked_fill_(hidden, -torch.inf)
                    highest = torch.stack([after.amax((0, 2, 3)), change.amax((0, 2, 3))])
                    largest[:2, layer] = torch.maximum(largest[:2, layer], highest)
                    log_p = after.log_softmax(-1)
                    # Masked, because 0 * -inf is not zero.
                    entropy = -log_p.exp().mul_(log_p.masked_fill_(hidden, 0.0)).sum((0, 2, 3))
                    sums[:2, layer] += torch.stack([change.sum((0, 2, 3)), entropy])
                    if middle:
                        parts = _split(q0, k0, *middle[0], q1, k1, rows=rows).masked_fill_(hidden, 0.0)
                        sums[2:, layer] += parts.abs().sum((1, 3, 4))
                        by_weights = (parts[0] + parts[1]).abs().amax((0, 2, 3))
                        largest[2, layer] = torch.maximum(largest[2, layer], by_weights)
        self._before = []
        return self._tables(largest, longest, sums, counts)

    def _tables(self, largest: Tensor, longest: Tensor, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
        # Before: each rank has its sequences' numbers. After: those of the whole probe batch.
        self.world.max(largest)
        flat = self.world.sum(torch.cat([sums.flatten(), counts]))
        pairs, rows = flat[-2:]
        per = torch.stack([pairs, rows, *[pairs] * len(PARTS)])
        means = (flat[:-2].view_as(sums) / per[:, None, None]).float()
        tables = {"max": largest[0], "delta_max": largest[1], "delta_mean": means[0], "entropy": means[1]}
        if self.weights:
            tables |= {f"delta_from_{part}": mean for part, mean in zip(PARTS, means[2:], strict=True)}
            tables["delta_weights_max"] = largest[2]
            tables |= self._bound(self.weights, self.world.max(longest))
        totals = {name: table.max() if "max" in name else table.mean() for name, table in tables.items()}
        return {
            **{f"logits/{name}": value for name, value in totals.items()},
            **{f"logits/{name}_per_head": table for name, table in tables.items()},
        }

    def _bound(self, weights: LogitWeights, longest_L: Tensor) -> dict[str, Tensor]:
        """Lemma 1 with the measured norms: weight updates of these sizes can change no logit by more.

        Empty where something on the way normalizes: a bound needs a product.
        """
        attention = self.attentions[0]
        if attention.seam.transform is not None or not attention.has_plain_paths:
            return {}
        now = weights.stacks()
        changes = weights.frobenius({name: now[name] - old for name, old in self._old_weights.items()})
        products = largest_change_of_product(weights.paths, weights.frobenius(self._old_weights), changes)
        return {"delta_weights_max_bound": products * longest_L[:, None] ** 2 / attention.qk_width**0.5}

    def _with_old_weights(self, tokens: Tensor, inputs: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Queries and keys of the present layer inputs under the declared weights as they were before the step."""
        assert self.weights is not None
        now = self.weights.stacks()
        self.weights.write(self._old_weights)
        try:
            # A whole forward, so that sharded weights are gathered as ever; each layer is given the input it had.
            return self._queries_and_keys(tokens, give_inputs=inputs)
        finally:
            self.weights.write(now)

    def _queries_and_keys(
        self, tokens: Tensor, *, see_inputs: list[Tensor] | None = None, give_inputs: list[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Each layer's final queries and keys, as the seam passes them to attention."""
        seen: list[tuple[Tensor, Tensor]] = []
        hooks = [a.seam.register_forward_hook(lambda _, __, qk: seen.append(qk)) for a in self.attentions]
        if see_inputs is not None:
            hooks += [a.register_forward_pre_hook(lambda _, args: see_inputs.append(args[0])) for a in self.attentions]
        if give_inputs is not None:
            given = iter(give_inputs)
            hooks += [a.register_forward_pre_hook(lambda _, args: (next(given), *args[1:])) for a in self.attentions]
        try:
            # Hooks would make compiled blocks compile anew; a few forwards every probe interval can run uncompiled.
            with evaluating(self.model), torch.compiler.set_stance("force_eager"):
                self.model(tokens, with_head=False)
        finally:
            for hook in hooks:
                hook.remove()
        assert len(seen) == len(self.attentions)
        return seen


def _split(q0: Tensor, k0: Tensor, q: Tensor, k: Tensor, q1: Tensor, k1: Tensor, *, rows: slice) -> Tensor:
    """The parts of the change of the logits, [parts, B, H, rows, T]; q, k have the new inputs and the old weights."""
    q0, k0, q, k, q1, k1 = (x.float() for x in (q0, k0, q, k, q1, k1))
    from_query = logits(q1 - q, (k1 + k) / 2, rows=rows)
    from_key = logits((q1 + q) / 2, k1 - k, rows=rows)
    return torch.stack([from_query, from_key, logits(q, k, rows=rows) - logits(q0, k0, rows=rows)])
