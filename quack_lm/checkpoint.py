"""What a checkpoint is: which directories are one, whole and ours, and how a run takes it back on any number of ranks.

    step_00000500/
        rank_00000.safetensors ...   each rank's rows of weights and optimizer state; rank 0 also what all ranks share
        state.json                   the step, progress, config, data and W&B run
        manifest.json                size and sha256 of every other file

A directory is a checkpoint only if its manifest matches it. Nothing in it is a pickle: a checkpoint from a stranger can
run no code. No state of a random generator is in it, because no training step draws a number: the order of the data
and the initial weights are functions of the seed. `saver.py` writes checkpoints.
"""

import json
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from quack_lm.errors import UserError
from quack_lm.parallel import World, local, local_rows
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.tensor_file import Digest, Piece, Reader, file_digest

STATE = "state.json"
MANIFEST = "manifest.json"
NAME = re.compile(r"step_\d{8,}")
HASHING_THREADS = 8
STATE_KEYS = {"step", "stabilizer_state", "progress", "manifest_sha256", "config"}


def name_of(step: int) -> str:
    """The directory of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's directory."""
    return int(checkpoint.name.removeprefix("step_"))


def found(directory: Path) -> list[Path]:
    """Every directory that is named like a checkpoint, by step; whether it is one, `damage` says."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in paths if NAME.fullmatch(path.name)), key=step_of)


def newest_valid(directory: Path) -> Path | None:
    """The last checkpoint whose manifest matches; each newer one that is not is reported in a line, and left alone."""
    candidates = found(directory)
    for path in reversed(candidates):
        wrong = damage(path, verify_checksums=True)
        if wrong is None:
            return path
        print(f"warning: {path} is not a whole checkpoint and is skipped: {wrong}", file=sys.stderr)
    if candidates:
        print(
            f"WARNING: none of the {len(candidates)} checkpoints in {directory} is whole: "
            "THE RUN STARTS AGAIN FROM STEP 0",
            file=sys.stderr,
        )
    return None


def damage(checkpoint: Path, *, verify_checksums: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None; without checksums, its files are still checked for their sizes."""
    try:
        listed = read_manifest(checkpoint)
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.name != MANIFEST}
        for name in sorted(listed.keys() | sizes.keys()):
            if name not in sizes:
                return f"{name} is missing"
            if name not in listed:
                return f"{name} is not in its {MANIFEST}"
            if sizes[name] != listed[name].bytes:
                return f"{name} has {sizes[name]} bytes, not {listed[name].bytes}"
        if verify_checksums:
            with ThreadPoolExecutor(HASHING_THREADS) as threads:
                digests = threads.map(lambda name: file_digest(checkpoint / name), listed)
                for (name, expected), digest in zip(listed.items(), digests, strict=True):
                    if digest != expected:
                        return f"{name} has another sha256 than its {MANIFEST} says"
            if read_state(checkpoint)["step"] != step_of(checkpoint):
                return f"{STATE} is of another step"
    except (OSError, ValueError) as error:
        return " ".join(str(error).split())
    return None


def read_manifest(checkpoint: Path) -> dict[str, Digest]:
    """The files that a checkpoint consists of; ValueError or OSError where that cannot be read."""
    if not (checkpoint / MANIFEST).is_file():
        raise ValueError(f"it has no {MANIFEST}")
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        listed = {name: Digest(int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"its {MANIFEST} is not what a run writes") from None
    if STATE not in listed or any(Path(name).name != name for name in listed):
        raise ValueError(f"its {MANIFEST} is not what a run writes")
    return listed


def manifest_json(files: dict[str, Digest]) -> str:
    """The text of a manifest."""
    return json.dumps({"files": {name: asdict(digest) for name, digest in sorted(files.items())}}, indent=2) + "\n"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The json part of a checkpoint; UserError naming the file if it is not one."""
    try:
        state = json.loads((checkpoint / STATE).read_text())
        if not isinstance(state, dict) or not state.keys() >= STATE_KEYS:
            raise ValueError("it is not what a run writes")
        return state
    except (OSError, ValueError) as error:
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
    """Take back weights, optimizer and stabilizer state, in place; each rank reads its own rows."""
    _create_optimizer_state(optimizers)
    tensors = named_tensors(model, optimizers)
    own = {f"stabilizer.{name}": name for name in read_state(checkpoint)["stabilizer_state"]}
    try:
        reader = Reader(sorted(checkpoint.glob("*.safetensors")))
        missing = sorted(name for name in (*tensors, *own) if name not in reader)
        if missing:
            raise ValueError(f"it lacks {missing[0]} and {len(missing) - 1} more")
        for name, tensor in tensors.items():
            reader.read_into(local(tensor), name, piece_of(tensor))
        stabilizer.load_state_dict({name: reader.read(key).to(world.device) for key, name in own.items()})
    except ValueError as error:
        raise UserError(
            f"{checkpoint} does not fit this model ({error}); remove it to use the one before, or use another run_dir"
        ) from None


def named_tensors(
    model: nn.Module, optimizers: list[Optimizer], stabilizer: Stabilizer | None = None
) -> dict[str, Tensor]:
    """Everything that is a tensor, under one flat name each; the tensors are the live ones."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"model.{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
    if stabilizer is not None:
        tensors |= {f"stabilizer.{name}": value for name, value in stabilizer.state_dict().items()}
    return tensors


def piece_of(tensor: Tensor) -> Piece:
    """The rows of a tensor that this rank holds."""
    return Piece(*local_rows(tensor), tensor.shape[0]) if tensor.ndim else Piece(0, 1, 1)


def kept(checkpoints: list[Path], *, keep: int, keep_every: int) -> Iterator[Path]:
    """Of whole checkpoints, by step: the newest `keep`, and those of every `keep_every`th step (0: of none)."""
    for path in checkpoints:
        if path in checkpoints[-keep:] or (keep_every and step_of(path) % keep_every == 0):
            yield path


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
