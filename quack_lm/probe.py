"""How large the attention logits are, and how much one optimizer step changes them, on a fixed held-out batch.

Queries and keys of the probe batch are kept before the step and taken again after it; logits are formed from both a
block of query rows at a time, so memory stays linear in T. Everything is over causally visible pairs, in float32.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from quack_lm.attention.base import Attention
from quack_lm.attention.scores import Mask, logits, number_documents, row_chunks
from quack_lm.parallel import World, evaluating

# Query rows whose logits, old and new, exist at once.
ROWS = 256


class Probe:
    """Per layer and head: largest logit, mean and largest |change|, and attention entropy in nats.

    `batches` are this rank's (tokens [B, T + 1], weights [B]) of the probe windows; sequences of weight 0 are padding.
    """

    def __init__(
        self,
        model: nn.Module,
        attentions: list[Attention],
        batches: Iterable[tuple[Tensor, Tensor]],
        world: World,
        *,
        eot_id: int | None,
    ) -> None:
        self.model = model
        self.attentions = attentions
        self.batches = [(world.load(tokens[:, :-1]), world.load(weights)) for tokens, weights in batches]
        self.world = world
        self.eot_id = eot_id
        self._before: list[list[tuple[Tensor, Tensor]]] = []

    def before(self) -> None:
        """Keep queries and keys as they are: one (q, k) per batch and layer."""
        self._before = [self._queries_and_keys(tokens) for tokens, _ in self.batches]

    @torch.no_grad()
    def after(self) -> dict[str, Tensor]:
        """The measurements against `before`: tables [layers, heads], and their aggregates over heads."""
        shape = (len(self.attentions), self.attentions[0].n_heads)
        largest = torch.full((2, *shape), -torch.inf, device=self.world.device)  # largest logit, largest change
        sums = torch.zeros((2, *shape), device=self.world.device, dtype=torch.float64)  # changes, entropies
        counts = torch.zeros(2, device=self.world.device, dtype=torch.float64)  # visible pairs, query rows
        for (tokens, weights), old in zip(self.batches, self._before, strict=True):
            new = self._queries_and_keys(tokens)
            real = weights > 0
            if not real.any():
                continue
            mask = Mask(None if self.eot_id is None else number_documents(tokens[real], self.eot_id))
            for rows in row_chunks(tokens.shape[1], ROWS):
                seen = mask.visible(rows, tokens.shape[1], tokens.device)
                pairs = seen.sum() * (1 if seen.ndim == 4 else real.sum())
                counts += torch.stack([pairs, real.sum() * (rows.stop - rows.start)])
                for layer, ((q0, k0), (q1, k1)) in enumerate(zip(old, new, strict=True)):
                    after = logits(q1[real], k1[real], rows=rows)
                    change = (after - logits(q0[real], k0[real], rows=rows)).abs().masked_fill(~seen, 0.0)
                    after = after.masked_fill(~seen, -torch.inf)
                    highest = torch.stack([after.amax((0, 2, 3)), change.amax((0, 2, 3))])
                    largest[:, layer] = torch.maximum(largest[:, layer], highest)
                    # Masked, because 0 * -inf is not zero.
                    surprise = after.log_softmax(-1).masked_fill(~seen, 0.0)
                    entropy = -(after.softmax(-1) * surprise).sum((0, 2, 3))
                    sums[:, layer] += torch.stack([change.sum((0, 2, 3)), entropy])
        self._before = []
        return self._tables(largest, sums, counts)

    def _tables(self, largest: Tensor, sums: Tensor, counts: Tensor) -> dict[str, Tensor]:
        # Before: each rank has its sequences' numbers. After: those of the whole probe batch.
        self.world.max(largest)
        flat = self.world.sum(torch.cat([sums.flatten(), counts]))
        means = (flat[:-2].view_as(sums) / flat[-2:, None, None]).float()
        tables = {"max": largest[0], "delta_max": largest[1], "delta_mean": means[0], "entropy": means[1]}
        totals = {name: table.max() if "max" in name else table.mean() for name, table in tables.items()}
        return {
            **{f"logits/{name}": value for name, value in totals.items()},
            **{f"logits/{name}_per_head": table for name, table in tables.items()},
        }

    def _queries_and_keys(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each layer's final queries and keys, as the seam passes them to attention."""
        seen: list[tuple[Tensor, Tensor]] = []
        hooks = [a.seam.register_forward_hook(lambda _, __, qk: seen.append(qk)) for a in self.attentions]
        try:
            # Hooks would make compiled blocks compile anew; two forwards every probe interval can run uncompiled.
            with evaluating(self.model), torch.compiler.set_stance("force_eager"):
                self.model(tokens)
        finally:
            for hook in hooks:
                hook.remove()
        assert len(seen) == len(self.attentions)
        return seen
