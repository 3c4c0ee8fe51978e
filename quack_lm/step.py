"""One optimizer step with the stabilizer's two scalings around it. Order is text here, not registration:

    norms -> step_scale -> optimizer step -> each weight block goes `scale` of its way -> weight_scale -> weights edited

Scaling the finished step works with every optimizer: for Muon it scales each head's slice of the orthogonalized
update, for AdamW it is a learning rate per block, decoupled decay included.
"""

from functools import cached_property, partial

import torch
from torch import Tensor
from torch.optim import Optimizer

from quack_lm.attention.base import Attention
from quack_lm.logit_paths import declared_weights
from quack_lm.parallel import World, local, local_rows, measure_full_matrices, sum_over_shards
from quack_lm.stabilizers.base import Scales, Stabilizer

# Repeated squarings of the Gram matrix: the spectral norm is then exact to 0.04% in the worst case, without a host
# sync.
SQUARINGS = 16


class LogitWeights:
    """The weights of all layers that multiply into logits, stacked by symbol; norms and scales are [layers, blocks]."""

    def __init__(self, attentions: list[Attention]) -> None:
        self.attentions = attentions
        self.paths = attentions[0].logit_paths()
        self.blocks = declared_weights(self.paths)
        self.parameters = {name: [a.get_parameter(f"{name}.weight") for a in attentions] for name in self.blocks}

    @cached_property
    def _rows(self) -> dict[str, list[Tensor]]:
        """This rank's rows of each weight, by layer: views, made once because a sharded tensor takes long to ask.

        They stay valid as long as the parameters keep their memory, as they do from the first step on.
        """
        return {name: [local(p.detach()) for p in parameters] for name, parameters in self.parameters.items()}

    def stack(self, name: str) -> Tensor:
        """This rank's rows of one weight in all layers, copied: [layers, local rows, columns]."""
        return torch.stack(self._rows[name])

    @torch.no_grad()
    def norms(self, kind: str) -> dict[str, Tensor]:
        """The Frobenius or spectral norm of every block of every declared weight."""
        return self._spectral() if kind == "spectral" else self.frobenius(self.stacks())

    def stacks(self) -> dict[str, Tensor]:
        """`stack` of every declared weight."""
        return {name: self.stack(name) for name in self.blocks}

    @torch.no_grad()
    def write(self, stacks: dict[str, Tensor]) -> None:
        """Put back what `stacks` took, or something of its shape."""
        for name, stacked in stacks.items():
            torch._foreach_copy_(self._rows[name], list(stacked.unbind()))

    @torch.no_grad()
    def rescale_step(self, before: dict[str, Tensor], scales: Scales) -> None:
        """Move every scaled weight from where it was only `scale` of its way to where the optimizer put it.

        Overwrites `before`.
        """
        for name, start in before.items():
            # At a scale of one, lerp gives its end bit for bit.
            torch._foreach_lerp_(start.unbind(), self._rows[name], self._by_layer(name, scales[name]))
        self.write(before)

    @torch.no_grad()
    def multiply(self, scales: Scales) -> None:
        """Multiply blocks of the float32 master weights."""
        for name, scale in scales.items():
            torch._foreach_mul_(self._rows[name], self._by_layer(name, scale))

    @torch.no_grad()
    def take_max_logits(self, world: World) -> Tensor:
        """Each head's max logit since the last call over all ranks, [layers, heads]; the record is cleared."""
        maxima_LH = torch.stack([a.max_logits_H for a in self.attentions])
        for attention in self.attentions:
            attention.max_logits_H.fill_(-torch.inf)
        return world.max(maxima_LH)

    def _by_layer(self, name: str, scale_LN: Tensor | float) -> tuple[Tensor, ...] | float:
        """[layers or 1, blocks] -> for each layer, this rank's rows [local rows, 1]: a shard's edge may cut a head."""
        if not isinstance(scale_LN, Tensor):
            return scale_LN
        rows, weight = self._rows[name], self.parameters[name][0]
        start, stop = local_rows(weight)
        per_row = scale_LN.to(rows[0].device).repeat_interleave(weight.shape[0] // scale_LN.shape[-1], dim=-1)
        return per_row[:, start:stop, None].expand(len(rows), -1, -1).unbind()

    def frobenius(self, stacks: dict[str, Tensor]) -> dict[str, Tensor]:
        """The Frobenius norm of every block of stacks shaped and sharded like the declared weights."""
        squares = []
        for name, parameters in self.parameters.items():
            start, stop = local_rows(parameters[0])
            rows = torch.linalg.vector_norm(stacks[name], dim=-1).square()
            full = rows.new_zeros(len(parameters), parameters[0].shape[0])
            full[:, start:stop] = rows
            squares.append(full)
        # Before: each rank has the squared norms of its own rows. After: of all rows, for all weights and layers at
        # once. Every row is summed on one rank, so the result does not depend on the sharding.
        example = next(iter(self.parameters.values()))[0]
        flat = sum_over_shards(torch.cat([s.flatten() for s in squares]), example)
        summed = (f.view_as(s) for f, s in zip(flat.split([s.numel() for s in squares]), squares, strict=True))
        return {
            name: rows.unflatten(-1, (blocks, -1)).sum(-1).sqrt()
            for (name, blocks), rows in zip(self.blocks.items(), summed, strict=True)
        }

    def _spectral(self) -> dict[str, Tensor]:
        return {
            name: measure_full_matrices(
                partial(spectral_norms, blocks=blocks), self.stack(name), self.parameters[name][0]
            )
            for name, blocks in self.blocks.items()
        }


def spectral_norms(matrices_NRC: Tensor, blocks: int) -> Tensor:
    """The largest singular value of each of the equal row blocks of each matrix: [N, blocks].

    The Gram matrix to a huge power keeps its top eigenspace alone; the Rayleigh quotient there is the squared norm.
    """
    x = matrices_NRC.unflatten(1, (blocks, -1))
    gram = x @ x.mT if x.shape[-2] <= x.shape[-1] else x.mT @ x
    power = gram
    for _ in range(SQUARINGS):
        power = power / _trace(power)[..., None, None]
        power = power @ power
    return ((gram * power).sum((-2, -1)) / _trace(power)).sqrt()


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(torch.finfo(matrices.dtype).tiny)


@torch.no_grad()
def stabilized_step(optimizers: list[Optimizer], stabilizer: Stabilizer, weights: LogitWeights, world: World) -> None:
    """Step every optimizer, under the stabilizer's rates, then let it edit the weights."""
    with torch.profiler.record_function("stabilizer"):
        kind = stabilizer.needs_norms
        # The copies that have their norms taken are also where the scaled move starts.
        stacks = weights.stacks() if kind == "frobenius" else {}
        norms = weights.frobenius(stacks) if stacks else weights.norms(kind) if kind else {}
        scales = stabilizer.step_scale(weights.paths, norms)
        before = {name: stacks[name] if name in stacks else weights.stack(name) for name in scales}
        if not stabilizer.scales_weight_decay:
            _decay(before, weights, optimizers)
    for optimizer in optimizers:
        optimizer.step()
    with torch.profiler.record_function("stabilizer"):
        if scales:
            weights.rescale_step(before, scales)
        if stabilizer.needs_max_logits:
            # Seen under the weights before this step: Kimi K2's algorithm clips the stepped weights by these maxima.
            weights.multiply(stabilizer.weight_scale(weights.paths, weights.take_max_logits(world)))


def _decay(before: dict[str, Tensor], weights: LogitWeights, optimizers: list[Optimizer]) -> None:
    """Start the scaled move from the decayed weights, so that the decay itself goes at the base rate."""
    decay = {p: 1 - g["lr"] * g["weight_decay"] for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, start in before.items():
        start.mul_(decay[weights.parameters[name][0]])
