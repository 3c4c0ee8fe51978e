"""Checkpoints of sharded runs: torch.distributed.checkpoint in safetensors files, and one json file for the rest.

A checkpoint is written aside and renamed when it is whole, so a directory `step_*` with a `state.json` is complete.
Nothing in it is a pickle: a checkpoint from a stranger can run no code. It loads on any number of ranks.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import Optimizer

from quack_lm.errors import UserError
from quack_lm.files import write_json
from quack_lm.parallel import World
from quack_lm.stabilizers.base import Stabilizer

STATE = "state.json"


def save(
    directory: Path,
    step: int,
    model: nn.Module,
    optimizers: list[Optimizer],
    stabilizer: Stabilizer,
    state: dict[str, Any],
    world: World,
    *,
    keep: int,
) -> None:
    """Write `directory/step_<step>`; the older ones beyond the newest `keep` go once it is complete."""
    target = directory / f"step_{step:08d}"
    aside = directory / f".{target.name}.partial"
    if world.is_main:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    world.barrier()
    tensors = _tensors(model, optimizers, stabilizer)
    writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
    with warnings.catch_warnings():
        # A single process without a group is what `no_dist` says.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save(tensors, storage_writer=writer, no_dist=world.mesh is None)
    if world.is_main:
        write_json(aside / STATE, {"step": step, "stabilizer_state": sorted(stabilizer.state_dict()), **state})
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
        for old in _complete(directory)[:-keep]:
            shutil.rmtree(old)
    world.barrier()


def newest(directory: Path) -> Path | None:
    """The last complete checkpoint."""
    found = _complete(directory)
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The json part of a checkpoint; UserError naming the file if it is unreadable."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        if (
            not isinstance(state, dict)
            or not {"step", "stabilizer_state", "progress", "manifest_sha256"} <= state.keys()
        ):
            raise ValueError("it is not what a run writes")
        return state
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{checkpoint / STATE} cannot be read ({error}); remove {checkpoint} to use the one before"
        ) from None


def load(
    checkpoint: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    stabilizer: Stabilizer,
    world: World,
) -> None:
    """Take back weights, optimizer and stabilizer state, in place."""
    _create_optimizer_state(optimizers)
    tensors = _tensors(model, optimizers, None)
    try:
        known = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except SafetensorError as error:
        raise UserError(f"{checkpoint} is damaged ({error}); remove it to use the one before") from None
    own = {f"stabilizer.{name}": name for name in read_state(checkpoint)["stabilizer_state"]}
    missing = sorted((tensors.keys() | own.keys()) - known.keys())
    if missing:
        raise UserError(
            f"{checkpoint} lacks {missing[0]} and {len(missing) - 1} more: files are missing, or it belongs to another "
            "model; remove it to use the one before, or use another run_dir"
        )
    for name, tensor in tensors.items():
        if tensor.ndim and known[name].size != tensor.shape:  # type: ignore[union-attr]
            raise UserError(f"{checkpoint} has another shape of {name}; remove it, or use another run_dir")
    for key in own:
        meta = known[key]
        tensors[key] = torch.empty(meta.size, dtype=meta.properties.dtype, device=world.device)  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=world.mesh is None)
    stabilizer.load_state_dict({name: tensors[key] for key, name in own.items()})


def _tensors(model: nn.Module, optimizers: list[Optimizer], stabilizer: Stabilizer | None) -> dict[str, Tensor]:
    """Everything that is a tensor, under one flat name each; the tensors are the live ones."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
    if stabilizer is not None:
        tensors |= {f"stabilizer.{name}": value for name, value in stabilizer.state_dict().items()}
    return tensors


def _create_optimizer_state(optimizers: list[Optimizer]) -> None:
    """Optimizers make their state at the first step; a step with no gradient and no rate makes it without a move."""
    for optimizer in optimizers:
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


def _complete(directory: Path) -> list[Path]:
    return sorted(path.parent for path in directory.glob(f"step_*/{STATE}"))
