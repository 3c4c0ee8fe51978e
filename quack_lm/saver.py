"""Writes checkpoints beside the training: a copy to host memory in the loop, files in a thread of each rank.

    save     ranks together: wait for the last one, copy, start writing          .step_00000500.partial/
    advance  at a step boundary, once no rank writes: the digests travel to rank 0, whose thread commits
    commit   state.json and manifest.json, all synced, then the rename; then older checkpoints go

So a checkpoint is whole or invisible at any moment, and no collective runs in a thread.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from quack_lm import checkpoint
from quack_lm.checkpoint import MANIFEST, STATE, Digest, Piece
from quack_lm.files import sync_directory, write_atomically
from quack_lm.parallel import World, is_written_here, local
from quack_lm.tensor_file import write_tensors


class Saver:
    """The checkpoints of one run. `trouble` is this rank's error, for the ranks to agree on; nothing raises here."""

    def __init__(
        self,
        directory: Path,
        world: World,
        *,
        keep: int,
        keep_every: int = 0,
        is_async: bool = True,
        first_step: int = 0,
        about: dict[str, Any] | None = None,
    ) -> None:
        self.directory = directory
        self.world = world
        self.keep = keep
        self.keep_every = keep_every
        self.is_async = is_async
        self.about = about or {}  # what every checkpoint of the run says beside its own state
        self.trouble: str | None = None
        self.total_s = 0.0  # from the call of `save` until the checkpoint is whole
        self._thread: Thread | None = None
        self._buffers: dict[str, Tensor] = {}
        self._digest: Digest | None = None  # of this rank's file, once written
        self._uncommitted: tuple[int, dict[str, Any]] | None = None
        self._began = 0.0
        # What lies beyond the step that the run continues from was refused: neither counted nor deleted.
        self._refused = {path for path in checkpoint.found(directory) if checkpoint.step_of(path) > first_step}

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin the checkpoint of a step, on all ranks together; without `is_async`, also end it."""
        self.wait()
        self._began = time.perf_counter()
        aside = self._aside(step)
        if self.world.is_main:
            self._guarded(lambda: self._prepare(aside))
        # Before: rank 0 has made the directory, or could not. After: every rank knows which.
        if any(self.world.any(self.trouble is not None)):
            return
        # What all ranks share is in rank 0's file.
        own = {name: tensor for name, tensor in tensors.items() if is_written_here(tensor, self.world)}
        pieces = {name: checkpoint.piece_of(tensor) for name, tensor in own.items()}
        copies = self._copy({name: local(tensor) for name, tensor in own.items()})
        self._digest, self._uncommitted = None, (step, state)
        self._start(lambda: self._write(aside, copies, pieces))
        if not self.is_async:
            self.wait()

    def advance(self) -> None:
        """On all ranks together, when none is writing: commit what has been written; done in rank 0's thread."""
        if self._uncommitted is None:
            return
        (step, state), self._uncommitted = self._uncommitted, None
        # Before: each rank has its file's digest. After: every rank has all.
        lines = self.world.texts(json.dumps(asdict(self._digest)) if self._digest else "")
        digests = {_file_of(rank): Digest(**json.loads(line)) for rank, line in enumerate(lines) if line}
        if self.world.is_main:
            self._start(lambda: self._commit(step, state, digests))

    def wait(self) -> None:
        """On all ranks together: until the last checkpoint is whole, or a rank is in trouble."""
        self._join()
        # Before: each rank has written, or failed to. After: every rank knows whether one failed.
        if any(self.world.any(self.trouble is not None)):
            self._uncommitted = None
            return
        self.advance()
        self._join()
        self.world.barrier()

    def _prepare(self, aside: Path) -> None:
        for left in self.directory.glob(".step_*.partial"):  # by a run that was killed
            shutil.rmtree(left)
        aside.mkdir(parents=True)

    def _copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """To host memory that is allocated once; pinned, so that a GPU copies at full speed."""
        is_cuda = self.world.device.type == "cuda"
        if not (is_cuda or self.is_async):
            return tensors
        for name, tensor in tensors.items():
            if name not in self._buffers:
                self._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_cuda)
            self._buffers[name].copy_(tensor, non_blocking=is_cuda)
        self.world.synchronize()
        return {name: self._buffers[name] for name in tensors}

    def _write(self, aside: Path, tensors: dict[str, Tensor], pieces: dict[str, Piece]) -> None:
        if tensors:
            self._digest = write_tensors(aside / _file_of(self.world.rank), tensors, pieces)

    def _commit(self, step: int, state: dict[str, Any], digests: dict[str, Digest]) -> None:
        aside, target = self._aside(step), self.directory / checkpoint.name_of(step)
        write_atomically(aside / STATE, json.dumps({"step": step, **self.about, **state}, indent=2) + "\n")
        digests[STATE] = checkpoint.file_digest(aside / STATE)
        write_atomically(aside / MANIFEST, checkpoint.manifest_json(digests))
        if target.exists():  # a damaged one: a valid one would have been continued
            _set_aside(target)
            self._refused.discard(target)
        aside.rename(target)
        sync_directory(self.directory)
        self.total_s += time.perf_counter() - self._began
        self._prune()

    def _prune(self) -> None:
        others = [path for path in checkpoint.found(self.directory) if path not in self._refused]
        whole = [path for path in others if not checkpoint.damage(path)]
        kept = set(checkpoint.kept(whole, keep=self.keep, keep_every=self.keep_every))
        for old in whole:
            if old not in kept:
                # Renamed first: a crash in the middle must not leave half a checkpoint under its name.
                gone = old.rename(self.directory / f".{old.name}.partial")
                shutil.rmtree(gone)

    def _aside(self, step: int) -> Path:
        return self.directory / f".{checkpoint.name_of(step)}.partial"

    def _start(self, work: Callable[[], None]) -> None:
        # A daemon: whoever stops the program at once, by a second Ctrl-C, does not wait for a disk.
        self._thread = Thread(target=self._guarded, args=(work,), daemon=True, name="checkpoint")
        self._thread.start()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except OSError as error:
            self.trouble = (
                f"{self.directory}: no checkpoint could be written ({error.strerror or error}); "
                "mend that and run the same command again: it continues from the last whole one"
            )
        except Exception as error:  # else it would end in a thread that nobody asks
            self.trouble = f"{self.directory}: no checkpoint could be written ({type(error).__name__}: {error})"


def _file_of(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


def _set_aside(damaged: Path) -> None:
    """Out of the way of a new checkpoint of the same step, and still there for whoever wants to look."""
    number = 1
    while (place := damaged.with_name(f"damaged_{damaged.name}_{number}")).exists():
        number += 1
    damaged.rename(place)
    print(f"warning: {damaged} is replaced by a whole checkpoint; the damaged one is {place.name}", file=sys.stderr)
