"""What tests/test_sharding.py compares: run by torchrun on several ranks, and by the test itself on one.

torchrun --nproc-per-node 3 tests/sharding_worker.py --replicas 1 --out results.pt
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import STABILIZERS, small_config, small_model, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from quack_lm.config import instantiate
from quack_lm.parallel import (
    World,
    clip_gradients,
    full_tensor,
    local,
    local_rows,
    map_full_matrices,
    measure_full_matrices,
    start_world,
)
from quack_lm.step import LogitWeights, stabilized_step

ATTENTIONS = ("mha", "gqa", "mla")
# Divisible by 1, 2, 3 and 4 ranks.
N_SEQUENCES = 12
N_STEPS = 2
# A threshold that some heads pass; an eps that keeps AdamW from magnifying the rounding of vanishing gradients.
OVERRIDES = ["model.init_std=0.3", "optimizer.lr=0.02", "optimizer.weight_decay=0.3"]
EXTRA = {"qk_clip": ["stabilizer.threshold=0.5"], "adamw": ["optimizer.adamw_eps=1e-4"]}

# Wide, tall, fewer rows than ranks, one row, and rows that no world size of the tests divides.
SHAPES = [(6, 5), (7, 3), (2, 9), (1, 4), (5, 5)]
COUNTS = [1, 2, 5, 8]


def combinations() -> list[str]:
    """Attention/stabilizer/optimizer: all under Muon, and under AdamW with the attention that has the most weights."""
    with_muon = itertools.product(ATTENTIONS, STABILIZERS, ["muon"])
    return ["/".join(names) for names in (*with_muon, *itertools.product(["mla"], STABILIZERS, ["adamw"]))]


def compose_configs() -> dict[str, dict[str, Any]]:
    """The config of each combination; composed once, since that takes longer than all steps together."""
    configs = {}
    for combination in combinations():
        attention, stabilizer, optimizer = combination.split("/")
        extra = [*OVERRIDES, *EXTRA.get(stabilizer, []), *EXTRA.get(optimizer, [])]
        configs[combination] = small_config(attention, stabilizer, *extra, optimizer=optimizer)
    return configs


def train(config: dict[str, Any], world: World) -> dict[str, Any]:
    """Two stabilized steps on a batch split over the ranks, and all that should not depend on how."""
    model = small_model(config, world=world)
    if world.mesh is not None:
        model.loss_chunk = 7  # of the tokens of a rank, whose number it does not divide
    optimizers, steadies = instantiate(config["optimizer"]).build(model), instantiate(config["stabilizer"])
    weights = LogitWeights(model.attentions)
    if steadies.needs_norms:
        steadies.initialize(weights.paths, weights.norms(steadies.needs_norms))
    norms = []
    for step in range(N_STEPS):
        mine = tokens(N_SEQUENCES, seed=step).chunk(world.size)[world.rank]
        importance = 1 + mine[:, 1:].flatten() % 3  # of a token in the loss
        loss = (importance * model(mine[:, :-1], mine[:, 1:])).sum() / (N_SEQUENCES * (mine.shape[1] - 1))
        (loss * world.size).backward()
        norms.append(clip_gradients(list(model.parameters()), 0.5))
        stabilized_step(optimizers, steadies, weights, world)
        for each in optimizers:
            each.zero_grad()
    return {
        "weights": {name: full_tensor(p.detach()).clone() for name, p in model.named_parameters()},
        "metrics": steadies.metrics(),
        "grad_norms": torch.stack(norms),
    }


def initial_norms(config: dict[str, Any], world: World) -> dict[str, dict[str, Tensor]]:
    """Of blocks of very different size, so that a wrong row goes unnoticed nowhere."""
    model = small_model(config, world=world)
    for parameter in model.parameters():
        start, stop = local_rows(parameter)
        rows = torch.linspace(0.1, 7, parameter.shape[0])[start:stop]
        local(parameter).detach().mul_(rows.view(-1, *[1] * (parameter.ndim - 1)))
    weights = LogitWeights(model.attentions)
    return {kind: weights.norms(kind) for kind in ("frobenius", "spectral")}


class Matrices(nn.Module):
    """Matrices of one shape."""

    def __init__(self, shape: tuple[int, int], count: int) -> None:
        super().__init__()
        # The matrices are told apart by their size: 1, 2, 3, ... times a common one.
        base = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        base = base / base.norm()
        self.items = nn.ParameterList([nn.Parameter((i + 1) * base) for i in range(count)])


def whole_matrix_work(shape: tuple[int, int], count: int, world: World) -> dict[str, Any]:
    """The results of both kinds of shared work, and the sizes of the matrices that this rank was handed for each."""
    module = Matrices(shape, count)
    if world.mesh is not None:
        fully_shard(module, mesh=world.mesh)
    parameters = list(module.items)
    stack = torch.stack([local(p.detach()) for p in parameters])
    handed: dict[str, list[float]] = {"map": [], "measure": []}

    def mapped(matrices: Tensor) -> Tensor:
        handed["map"] += matrices.norm(dim=(1, 2)).tolist()
        # Depends on the whole matrix and on where each entry is.
        return matrices.flip(1).cumsum(1) + matrices.sum((1, 2), keepdim=True)

    def measured(matrices: Tensor) -> Tensor:
        handed["measure"] += matrices.norm(dim=(1, 2)).tolist()
        return torch.stack([matrices.sum((1, 2)), matrices[:, 0, 0], matrices[:, -1, -1]], dim=-1)

    mine = map_full_matrices(mapped, stack, parameters[0])
    result = [whole_like(rows, p) for rows, p in zip(mine, parameters, strict=True)]
    table = measure_full_matrices(measured, stack, parameters[0])
    everyone: list[Any] = [handed]
    if world.mesh is not None:
        everyone = [None] * world.size
        dist.all_gather_object(everyone, handed)
    return {"map": torch.stack(result), "measure": table, "handed": everyone, "rows_here": stack.shape[1]}


def whole_like(rows: Tensor, parameter: Tensor) -> Tensor:
    """This rank's rows of a result, put together over the ranks by torch itself."""
    if not isinstance(parameter, DTensor):
        return rows
    result = DTensor.from_local(
        rows.contiguous(),
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
    return result.full_tensor()


def everything(configs: dict[str, dict[str, Any]], world: World) -> dict[str, Any]:
    """All results, the same on every rank but for what says what this rank did."""
    return {
        "steps": {combination: train(config, world) for combination, config in configs.items()},
        "norms": {attention: initial_norms(configs[f"{attention}/none/muon"], world) for attention in ATTENTIONS},
        "work": {(shape, count): whole_matrix_work(shape, count, world) for shape in SHAPES for count in COUNTS},
    }


def main() -> None:
    """Run everything on this rank, with the configs that lie in the directory; the results of each rank go there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--replicas", type=int, required=True)
    parser.add_argument("--directory", type=Path, required=True)
    arguments = parser.parse_args()
    configs = json.loads((arguments.directory / "configs.json").read_text())
    world = start_world(device="cpu", is_wrapped=True, replicas=arguments.replicas)
    torch.save(everything(configs, world), arguments.directory / f"rank_{world.rank}.pt")
    world.shutdown(0)


if __name__ == "__main__":
    main()
