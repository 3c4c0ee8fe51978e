"""What a checkpoint is: which directories are valid ones, and how a run loads it on any number of ranks.

    step_00000500/
        shard-00001-model-*.safetensors ...   what each rank holds, as torch.distributed.checkpoint writes it
        state.json                            the step, progress, config, data and W&B run
        manifest.json                         size and sha256 of every other file

A directory is a checkpoint only if its manifest matches it. Nothing in it is a pickle: an untrusted checkpoint
can run no code. No state of a random generator is in it, because no training step draws a number: the order of the data
and the initial weights are functions of the seed. Nor are the max logits that QK clip reads: `step.py` clears
them after every step, and a checkpoint is taken between steps. `saver.py` decides when and where checkpoints are
written.
"""

import errno
import json
import os
import re
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.optim import Optimizer

from quack_lm.config import from_identity
from quack_lm.errors import UserError
from quack_lm.files import file_sha256s, parse_json, relative_note, sync_directory, write_atomically
from quack_lm.parallel import HostGroup, World
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.text import echo
from quack_lm.training.run_dir import RunDir
from quack_lm.training.state import TrainState

STATE = "state.json"
MANIFEST = "manifest.json"
NAME = re.compile(r"step_\d{8,}")
OF_MODEL, OF_STABILIZER = "model.", "stabilizer."
# The bytes of a file are put together in memory before they are written: safetensors knows no other way.
FILE_BYTES = 1 << 30
# One process needs no group. Here and not around the calls, because some are made in threads.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")

# torch.distributed.checkpoint's own is no Exception.
WRITING_ERRORS = (Exception, CheckpointException)
STATE_KEYS = {"step": int, "stabilizer_state": list, "progress": dict, "manifest_sha256": str, "config": dict}


def name_of(step: int) -> str:
    """The directory of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    """The step of a checkpoint's directory."""
    return int(checkpoint.name.removeprefix("step_"))


@dataclass(frozen=True)
class Digest:
    """What identifies a file's contents."""

    bytes: int
    sha256: str


class TensorSpec(NamedTuple):
    """What is known of a tensor without its values; of a sharded one, of the full tensor."""

    shape: torch.Size
    dtype: torch.dtype


def tensor_specs(tensors: dict[str, Tensor]) -> dict[str, TensorSpec]:
    """The kind of each tensor."""
    return {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


class Piece(NamedTuple):
    """A part of a tensor as it lies in a file: where it begins in the full tensor, and its own shape and dtype."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype


def list_checkpoints(directory: Path) -> list[Path]:
    """Every directory that is named like a checkpoint, by step; whether it is one, `validate_checkpoint` says."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted((path for path in paths if NAME.fullmatch(path.name)), key=step_of)


def latest_valid_checkpoint(
    directory: Path, *, fix: str = "restore one, or choose another run_dir to start again from step 0"
) -> Path | None:
    """The last checkpoint whose manifest matches; each newer one that is not is reported in a line, and left alone.

    None where there is no checkpoint; UserError, which ends with `fix`, where there are some and none is valid:
    beginning again would throw away what the run has logged.
    """
    wrong: dict[Path, str] = {}
    for path in reversed(list_checkpoints(directory)):
        reason = validate_checkpoint(path, verify_checksums=True)
        if reason is None:
            for other, why in wrong.items():
                echo(f"warning: {other} is not a valid checkpoint and is skipped: {why}", err=True)
            return path
        wrong[path] = reason
    if wrong:
        newest, why = next(iter(wrong.items()))
        raise UserError(
            f"none of the {len(wrong)} checkpoints in {directory} is valid, for example {newest}: {why}; {fix}"
        )
    return None


def find_checkpoint(path: Path, what: str) -> Path:
    """The checkpoint at a path, every byte of it verified: a checkpoint itself, or the newest valid one of a run.

    UserError, which begins with `what`, where there is none, or it is damaged.
    """
    path, note = Path(os.path.abspath(path)), relative_note(path)
    if NAME.fullmatch(path.name):
        if reason := validate_checkpoint(path, verify_checksums=True):
            raise UserError(f"{what} is not a valid checkpoint: {reason}; use another one of its run")
        return path
    if (path / STATE).exists():
        raise UserError(f"{what}: a checkpoint's directory is named after its step, step_00000400; give it that name")
    if (found := latest_valid_checkpoint(path / "checkpoints", fix="restore one")) is None:
        raise UserError(f"{what} is neither a checkpoint nor the directory of a run that has one{note}")
    return found


def validate_checkpoint(checkpoint: Path, *, verify_checksums: bool = False) -> str | None:
    """What is wrong with a checkpoint, or None; without checksums, its files are still checked for their sizes."""
    try:
        listed = read_manifest(checkpoint)
        paths = {path.name: path for path in checkpoint.iterdir() if path.name != MANIFEST}
        for name in sorted(listed.keys() | paths.keys()):
            if name not in paths:
                return f"{name} is missing"
            if name not in listed:
                return f"{name} is not in its {MANIFEST}"
            if not paths[name].is_file():  # to read a pipe is to wait for ever
                return f"{name} is not a regular file"
            if (size := paths[name].stat().st_size) != listed[name].bytes:
                return f"{name} has {size} bytes, not {listed[name].bytes}"
        if verify_checksums:
            digests = file_sha256s([checkpoint / name for name in listed])
            for (name, expected), digest in zip(listed.items(), digests, strict=True):
                if digest != expected.sha256:
                    return f"{name} has another sha256 than its {MANIFEST} says"
            if read_state(checkpoint)["step"] != step_of(checkpoint):
                return f"{STATE} is of another step"
    except (OSError, ValueError, UserError) as error:
        return " ".join(str(error).split())
    return None


def read_manifest(checkpoint: Path) -> dict[str, Digest]:
    """The files that a checkpoint consists of; ValueError or OSError where that cannot be read."""
    if not (checkpoint / MANIFEST).is_file():
        raise ValueError(f"it has no {MANIFEST}")
    try:
        files = parse_json((checkpoint / MANIFEST).read_text())["files"]
        listed = {name: Digest(int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):  # int() of Infinity
        raise ValueError(f"its {MANIFEST} is not what a run writes") from None
    if STATE not in listed or any(Path(name).name != name for name in listed):
        raise ValueError(f"its {MANIFEST} is not what a run writes")
    return listed


def commit(staging: Path, target: Path, state: dict[str, Any], wanted: dict[str, TensorSpec]) -> None:
    """Give written tensors their state, their manifest and, once the disk has all of it, their name.

    OSError where the files of all ranks do not hold every tensor that is wanted.
    """
    if wrong := _first_wrong(_stored(staging), wanted):
        raise OSError(errno.EIO, f"{wrong}, though all ranks have written")
    write_atomically(staging / STATE, json.dumps(state, indent=2) + "\n")
    paths = sorted(staging.iterdir())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, file_sha256s(paths), strict=True)
    }
    write_atomically(staging / MANIFEST, json.dumps({"files": files}, indent=2) + "\n")
    staging.rename(target)
    sync_directory(target.parent)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The json part of a checkpoint; UserError naming the file if it is not one."""
    try:
        state = parse_json((checkpoint / STATE).read_text())
        if not isinstance(state, dict) or any(not isinstance(state.get(key), kind) for key, kind in STATE_KEYS.items()):
            raise ValueError("it is not what a run writes")
        return state
    except (OSError, ValueError) as error:
        raise UserError(
            f"{checkpoint / STATE} cannot be read ({error}); remove {checkpoint} to use the one before"
        ) from None


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config of the run that a checkpoint is of, with defaults for what is no part of its identity."""
    return from_identity(read_state(checkpoint)["config"], f"{checkpoint / STATE}")


def read_train_state(checkpoint: Path) -> TrainState:
    """The part of it that the loop keeps; UserError if it cannot be used."""
    values = read_state(checkpoint)
    try:
        state = TrainState.from_json(values["progress"])
        if state.step != values["step"]:
            raise ValueError(f"it is of step {state.step}")
    except ValueError as error:
        raise UserError(
            f"{checkpoint}: the progress in its {STATE} cannot be used ({error}); remove it to use the one before"
        ) from None
    return state


def snapshot(run_dir: RunDir, total_steps: int) -> tuple[list[str], str | None]:
    """The names of a run's checkpoints and how it has ended, to see whether another process trains it meanwhile."""
    try:
        return [path.name for path in list_checkpoints(run_dir.checkpoints)], run_dir.final_status(total_steps)
    except OSError:
        return [], None


def check_tensors(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """UserError where a checkpoint does not hold these tensors of `named_tensors`, complete, and of the same kind.

    Their values are not asked for: they may lie on the meta device.
    """
    wrong = _first_wrong(_stored(checkpoint), tensor_specs(tensors))
    listed = read_state(checkpoint)["stabilizer_state"]
    if listed != sorted(name.removeprefix(OF_STABILIZER) for name in tensors if name.startswith(OF_STABILIZER)):
        wrong = f"its {STATE} lists a stabilizer_state of another stabilizer"
    if wrong:
        raise UserError(f"{checkpoint}: {wrong}; remove it to use the one before, or use another run_dir")


def check_weights(checkpoint: Path, model: nn.Module) -> None:
    """UserError where a checkpoint does not hold the weights of a model, which may be on the meta device."""
    if wrong := _first_wrong(_stored(checkpoint), tensor_specs(named_tensors(model, []))):
        raise UserError(f"{checkpoint}: {wrong}; use another one of its run")


def load(
    checkpoint: Path,
    model: nn.Module,
    optimizers: list[Optimizer],
    stabilizer: Stabilizer,
    world: World,
) -> None:
    """Take back weights, optimizer and stabilizer state, in place; each rank reads what it holds.

    The stabilizer has been initialized, if only on the meta device: its state says what there is to read.
    """
    create_optimizer_state(optimizers)
    own = stabilizer_tensors(stabilizer, world.device)
    tensors = named_tensors(model, optimizers) | own
    check_tensors(checkpoint, tensors)
    load_tensors(checkpoint, tensors, world)
    load_stabilizer(stabilizer, own)


def load_tensors(checkpoint: Path, tensors: dict[str, Tensor], world: World | None = None) -> None:
    """Fill tensors of these names in place, each rank what it holds; without a world, in this process alone."""
    is_alone = world is None or world.mesh is None
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(checkpoint)), no_dist=is_alone)


def stabilizer_tensors(stabilizer: Stabilizer, device: torch.device) -> dict[str, Tensor]:
    """A stabilizer's state under its names in a checkpoint, without values; it has been initialized."""
    state = stabilizer.state_dict()
    return {f"{OF_STABILIZER}{name}": torch.empty_like(value, device=device) for name, value in state.items()}


def load_stabilizer(stabilizer: Stabilizer, tensors: dict[str, Tensor]) -> None:
    """Give a stabilizer what `stabilizer_tensors` has been filled with."""
    stabilizer.load_state_dict({name.removeprefix(OF_STABILIZER): value for name, value in tensors.items()})


def stored_shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each full tensor in a checkpoint; UserError if one cannot be read."""
    return {name: _full_shape(pieces) for name, pieces in _stored(checkpoint).items()}


def _full_shape(pieces: list[Piece]) -> tuple[int, ...]:
    last = max(pieces, key=lambda piece: piece.start)
    return tuple(start + size for start, size in zip(last.start, last.shape, strict=True))


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Take back the weights alone, in place, in one process, after `check_weights`; UserError where one is not
    finite."""
    tensors = named_tensors(model, [])
    load_tensors(checkpoint, tensors)
    for name, tensor in tensors.items():
        refuse_not_finite(tensor, f"{checkpoint}: {name}")


def read_weight(checkpoint: Path, name: str, shape: torch.Size) -> Tensor:
    """One weight of the model, whole and on the CPU; UserError where a value of it is not finite."""
    weight = torch.empty(shape)
    load_tensors(checkpoint, {f"{OF_MODEL}{name}": weight})
    refuse_not_finite(weight, f"{checkpoint}: {name}")
    return weight


def refuse_not_finite(weight: Tensor, what: str) -> None:
    """UserError, which begins with `what`, where a value is infinite or nan: no run of this project saves any."""
    if not weight.isfinite().all():
        raise UserError(f"{what} has values that are not finite; take other weights")


def _stored(checkpoint: Path) -> dict[str, list[Piece]]:
    """What lies in a checkpoint's files of tensors, from their headers alone; UserError if one cannot be read."""
    pieces: dict[str, list[Piece]] = {}
    try:
        # By place: replicas have the same one.
        for place, part in HuggingFaceStorageReader(str(checkpoint)).read_metadata().storage_data.items():
            # A number is stored as one element, with or without a dimension.
            start, shape = tuple(place.offset) or (0,), tuple(part.shape) or (1,)
            pieces.setdefault(place.fqn, []).append(Piece(start, shape, part.dtype))
    except Exception as error:  # an untrusted header, whose reader raises anything
        raise UserError(
            f"{checkpoint} is damaged ({type(error).__name__}: {error}); remove it to use the one before"
        ) from None
    return pieces


def _first_wrong(stored: dict[str, list[Piece]], wanted: dict[str, TensorSpec]) -> str | None:
    """What is missing of these tensors; torch.distributed.checkpoint would leave rows of a lost file as they are, and
    would round numbers of another dtype."""
    for name, (shape, dtype) in wanted.items():
        if name not in stored:
            return f"it lacks {name}: a file is missing, or it belongs to another model"
        if other := {str(piece.dtype) for piece in stored[name]} - {str(dtype)}:
            return f"it has {name} as {min(other)}, not {dtype}"
        n_rows, *row = shape or (1,)
        covered = 0
        for piece in sorted(stored[name], key=lambda piece: (piece.start, piece.shape)):
            if piece.shape[1:] != tuple(row):
                return f"{name} has another shape"
            # Tensors are sharded by rows alone.
            if piece.start != (covered, *(0 for _ in row)):
                return f"it lacks a part of {name}: a file is missing"
            covered += piece.shape[0]
        if covered != n_rows:
            return f"it has {covered} rows of {name}, not {n_rows}: a file is missing, or it belongs to another model"
    return None


class TensorWriter:
    """Writes the tensors of all ranks with torch.distributed.checkpoint, in the loop or in the background."""

    def __init__(self, world: World, *, is_async: bool) -> None:
        # Collectives in a thread need a group that the loop does not use.
        self._world = world
        self._group: HostGroup = world.host_group() if is_async else None
        self.is_async = is_async
        # Pinned host memory is allocated once, and a GPU copies to it at full speed.
        is_cuda = world.device.type == "cuda"
        options = StagingOptions(
            use_pinned_memory=is_cuda,
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=is_cuda,
        )
        self._stager = DefaultStager(options) if is_async else None

    def write(self, directory: Path, tensors: dict[str, Tensor]) -> Future[Any]:
        """Start to write on all ranks together; when `is_async`, the tensors may change once this returns."""
        files = _numbers_of_files(tensors, self._world.size)
        storage = HuggingFaceStorageWriter(str(directory), fqn_to_index_mapping=files, save_distributed=True)
        if self._stager is not None:
            return dcp.async_save(  # type: ignore[return-value]
                tensors,
                storage_writer=storage,
                async_stager=self._stager,
                process_group=self._group,
                no_dist=self._world.mesh is None,
            )
        future: Future[Any] = Future()
        try:
            future.set_result(dcp.save(tensors, storage_writer=storage, no_dist=self._world.mesh is None))
        except WRITING_ERRORS as error:
            future.set_exception(error)
        return future


def _numbers_of_files(tensors: dict[str, Tensor], n_shards: int) -> dict[str, int]:
    """Which of a rank's files each tensor goes to, from 1, so that none has many more than FILE_BYTES."""
    numbers, number, filled = {}, 1, 0
    for name, tensor in tensors.items():
        n_bytes = tensor.numel() * tensor.element_size() // n_shards
        if filled and filled + n_bytes > FILE_BYTES:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += n_bytes
    return numbers


def root_cause(error: BaseException) -> BaseException:
    """What went wrong on the first of the ranks that torch.distributed.checkpoint reports."""
    while isinstance(error, CheckpointException) and error.failures:
        error = error.failures[min(error.failures)][0]
    return error


def named_tensors(
    model: nn.Module, optimizers: list[Optimizer], stabilizer: Stabilizer | None = None
) -> dict[str, Tensor]:
    """Everything that is a tensor, under one flat name each; the tensors are the live ones."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {f"{OF_MODEL}{name}": parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": value for key, value in state.items()}
    if stabilizer is not None:
        tensors |= {f"{OF_STABILIZER}{name}": value for name, value in stabilizer.state_dict().items()}
    return tensors


def expected_tensors(meta_model: nn.Module, optimizers: list[Optimizer], stabilizer: Stabilizer) -> dict[str, Tensor]:
    """`named_tensors` of a run, on the meta device, before anything is built."""
    create_optimizer_state(optimizers)
    return named_tensors(meta_model, optimizers, stabilizer)


def retained_checkpoints(checkpoints: list[Path], *, keep: int, keep_every: int) -> Iterator[Path]:
    """Of valid checkpoints, by step: the newest `keep`, and those of every `keep_every`th step (0: of none)."""
    for path in checkpoints:
        if path in checkpoints[-keep:] or (keep_every and step_of(path) % keep_every == 0):
            yield path


def create_optimizer_state(optimizers: list[Optimizer]) -> None:
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
