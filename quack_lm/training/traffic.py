"""The bytes that a rank sends in an optimizer step, by kind of collective, from the shapes of what is sent.

Among n ranks a rank sends (n - 1) / n of the full tensor in an all-gather or a reduce-scatter, twice that in an
all-reduce, which is one of each, and in an all-to-all what is for the others. The cut of a tensor by rows is uneven:
these are the bytes of rank 0, which has the most rows, with the padding that FSDP adds.
"""

import math
from collections.abc import Iterable, Iterator

from torch import nn
from torch.optim import Optimizer

from quack_lm.model import Transformer
from quack_lm.optim.muon import Muon
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.step import LogitWeights
from quack_lm.training.settings import TrainerSettings

KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")
BYTES = {"float32": 4, "bfloat16": 2}

# The kind of a collective, and the bytes that rank 0 sends in it.
Sent = tuple[str, float]


def step_traffic(
    model: Transformer,
    optimizers: Iterable[Optimizer],
    stabilizer: Stabilizer,
    settings: TrainerSettings,
    *,
    ranks: int,
) -> dict[str, float]:
    """Bytes that rank 0 of `ranks` sends in a step, by each of KINDS; the model may lie on the meta device.

    Logging, validation, probes, checkpoints, and what the hosts tell each other are not part of a step.
    """
    shards, replicas = ranks // settings.replicas, settings.replicas
    sent = [*_fsdp(model, settings, shards, replicas), ("all_reduce", _all_reduced(4, shards))]  # the gradient norm
    for optimizer in optimizers:
        if isinstance(optimizer, Muon):
            sent += _muon(optimizer, shards, replicas)
    sent += _norms(LogitWeights(model.attentions), stabilizer.needs_norms, shards, replicas)
    if stabilizer.needs_max_logits:
        sent.append(("all_reduce", _all_reduced(4 * len(model.attentions) * model.attentions[0].n_heads, ranks)))
    return {kind: sum(n_bytes for each, n_bytes in sent if each == kind) for kind in KINDS}


def _fsdp(model: Transformer, settings: TrainerSettings, shards: int, replicas: int) -> Iterator[Sent]:
    """Weights are gathered for each micro-batch, those of freed blocks twice; gradients are summed over the ranks."""
    micro_batches = settings.global_batch_size // (shards * replicas * settings.sequences_at_once)
    reductions = micro_batches if settings.reduce_every_micro_batch else 1
    groups = [list(block.parameters()) for block in model.blocks]
    n_blocks, inside = len(groups), {p for parameters in groups for p in parameters}
    is_freed = settings.frees_blocks_after_forward(sum(p.numel() for p in inside))
    groups.append([p for p in model.parameters() if p not in inside])
    for number, parameters in enumerate(groups, start=1):
        part = sum(_rows(p, shards) * p.shape[1:].numel() for p in parameters)
        gathers = micro_batches * (2 if is_freed and number < n_blocks else 1)
        yield "all_gather", gathers * (shards - 1) * part * BYTES[settings.precision]
        gradients = part * BYTES[settings.reduce_dtype]
        yield "reduce_scatter", reductions * (shards - 1) * gradients
        yield "all_reduce", reductions * _all_reduced(gradients, replicas)


def _muon(optimizer: Muon, shards: int, replicas: int) -> Iterator[Sent]:
    """Rows go to the rank that orthogonalizes a matrix, and come back; replicas then exchange their results."""
    for group in optimizer.param_groups:
        shapes = [p.shape for p in group["params"]]
        for shape in dict.fromkeys(shapes):
            each, rows, to_owners = _shared_out(shapes.count(shape), shape, shards, replicas)
            of_a_row = shape[1] * group["ns_dtype"].itemsize
            yield "all_to_all", (to_owners + each * (shape[0] - rows)) * of_a_row
            yield "all_gather", (replicas - 1) * shards * each * rows * of_a_row


def _norms(weights: LogitWeights, kind: str | None, shards: int, replicas: int) -> Iterator[Sent]:
    """In float32, for every declared weight: squared norms of all rows, or spectral norms of shared out matrices."""
    for name, parameters in weights.parameters.items() if kind else ():
        count, shape = len(parameters), parameters[0].shape
        if kind == "frobenius":
            yield "all_reduce", _all_reduced(4 * count * shape[0], shards)
        else:
            each, _, to_owners = _shared_out(count, shape, shards, replicas)
            yield "all_to_all", to_owners * 4 * shape[1]
            table = 4 * replicas * shards * each * weights.blocks[name]
            yield "all_reduce", _all_reduced(table, shards) + _all_reduced(table, replicas)


def _shared_out(count: int, shape: tuple[int, ...], shards: int, replicas: int) -> tuple[int, int, int]:
    """Of so many matrices: those of a rank, the rows that it has of each, and those that it sends to their owners."""
    each, rows = math.ceil(count / (shards * replicas)), math.ceil(shape[0] / shards)
    return each, rows, (shards - 1) * each * rows


def _rows(parameter: nn.Parameter, shards: int) -> int:
    return math.ceil(parameter.shape[0] / shards)


def _all_reduced(n_bytes: int, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * n_bytes
