"""When and where checkpoints are written: staged in a temporary directory, in the background, then atomically renamed.

save     ranks together: wait for the last one, copy, start writing            .step_00000500.partial/
advance  at a step boundary, once no rank writes: rank 0 commits in a thread
commit   state.json and manifest.json, all synced, then the rename; then older checkpoints are deleted
"""

import itertools
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from quack_lm.parallel import World
from quack_lm.text import echo
from quack_lm.training import checkpoint
from quack_lm.training.checkpoint import TensorSpec, TensorWriter


class Saver:
    """The checkpoints of one run. `error` is this rank's error, for the ranks to agree on; nothing raises here."""

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
        self.about = about or {}  # stored in every checkpoint of the run
        self.error: str | None = None
        self.total_s = 0.0  # from the call of `save` until the checkpoint is complete
        self.latest_step = first_step or None  # of the newest complete checkpoint, as rank 0 knows it
        self._writer = TensorWriter(world, is_async=is_async)
        self._committer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: Future[Any] | None = None  # first the tensors', then the commit's
        self._uncommitted: tuple[int, dict[str, Any], dict[str, TensorSpec]] | None = None
        self._started_at = 0.0
        self._undeletable: set[Path] = set()  # of which a warning has been given
        # What lies beyond the step that the run continues from was refused: neither counted nor deleted.
        self._refused = {
            path for path in checkpoint.list_checkpoints(directory) if checkpoint.step_of(path) > first_step
        }

    @property
    def is_writing(self) -> bool:
        """Whether this rank is writing in the background."""
        return self._work is not None and not self._work.done()

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin the checkpoint of a step, on all ranks together; without `is_async`, also end it."""
        self.wait()
        self._started_at = time.perf_counter()
        staging = self._staging_dir(step)
        if self.world.is_main:
            self._guarded(lambda: self._prepare(staging))
        # Before: rank 0 has made the directory, or could not. After: every rank knows which.
        if any(self.world.max_over_ranks(self.error is not None)):
            return
        entry = (step, state, checkpoint.tensor_specs(tensors))
        self._work, self._uncommitted = self._writer.write(staging, tensors), entry
        if not self._writer.is_async:
            self.wait()

    def advance(self) -> None:
        """On all ranks together, when none is writing: commit what has been written, in a thread of rank 0."""
        self._join()
        if self._uncommitted is None:
            return
        entry, self._uncommitted = self._uncommitted, None
        # A rank that could not write has reported it to all others in the last collective of the writing.
        if self.world.is_main and self.error is None:
            self._work = self._committer.submit(self._commit, *entry)

    def wait(self) -> None:
        """On all ranks together: until the last checkpoint is complete, or a rank has an error."""
        self.advance()
        self._join()
        self.world.barrier()

    def _prepare(self, staging: Path) -> None:
        # By a run that was killed, or by one that could not delete them.
        for left in [*self.directory.glob(".step_*.partial"), *self.directory.glob(".deleted_*")]:
            self._delete(left)
        staging.mkdir(parents=True)

    def _commit(self, step: int, state: dict[str, Any], specs: dict[str, TensorSpec]) -> None:
        target = self.directory / checkpoint.name_of(step)
        if target.exists():  # a damaged one: a valid one would have been continued
            _rename_damaged(target)
            self._refused.discard(target)
        checkpoint.commit(self._staging_dir(step), target, {"step": step, **self.about, **state}, specs)
        self.latest_step = step
        self.total_s += time.perf_counter() - self._started_at
        self._prune()

    def _prune(self) -> None:
        candidates = [path for path in checkpoint.list_checkpoints(self.directory) if path not in self._refused]
        # By size alone: the newest was read when its manifest was made, and to read every byte of the others at each
        # save would multiply what a save costs. One whose bits turned since counts as kept until a run wants to
        # continue from it, which reads every byte and takes the one before; the newest is there in any case.
        valid = [path for path in candidates if not checkpoint.validate_checkpoint(path)]
        kept = set(checkpoint.retained_checkpoints(valid, keep=self.keep, keep_every=self.keep_every))
        for old in valid:
            if old not in kept:
                self._delete(old)

    def _delete(self, directory: Path) -> None:
        """Delete an old checkpoint or a leftover; one that cannot be, or is protected, stays with one warning."""
        if directory in self._undeletable:
            return
        try:
            if not directory.name.startswith(".") and _is_protected(directory):
                self._undeletable.add(directory)
                echo(f"warning: {directory} is a link or write-protected and is kept", err=True)
                return
            # Renamed first: neither a crash nor an error in the middle may leave half a checkpoint under its name, or
            # something in the way of the next one.
            if not directory.name.startswith(".deleted_"):
                places = (self.directory / f".deleted_{number}" for number in itertools.count(1))
                directory = directory.rename(next(place for place in places if not place.exists()))
            shutil.rmtree(directory)
        except OSError as error:
            self._undeletable.add(directory)
            echo(f"warning: {directory} cannot be deleted and stays: {error.strerror}", err=True)

    def _staging_dir(self, step: int) -> Path:
        return self.directory / f".{checkpoint.name_of(step)}.partial"

    def _join(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            self._guarded(work.result)

    def _guarded(self, work: Callable[[], object]) -> None:
        try:
            work()
        except checkpoint.WRITING_ERRORS as error:  # whatever it is: the ranks must agree on it before one of them ends
            reason = checkpoint.root_cause(error)
            what = getattr(reason, "strerror", None) or f"{type(reason).__name__}: {reason}"
            self.error = (
                f"{self.directory}: no checkpoint could be written ({what}); "
                "fix that and run the same command again: it continues from the last complete one"
            )


def _is_protected(old: Path) -> bool:
    """Whether somebody wants to keep a checkpoint: it is a link, or it or one of its files must not be written to.

    The mode is asked as well, because root may write in spite of it; `os.access` also knows of immutable files.
    """
    if old.is_symlink():
        return True
    return any(not (path.stat().st_mode & 0o222 and os.access(path, os.W_OK)) for path in (old, *old.iterdir()))


def _rename_damaged(damaged: Path) -> None:
    """Make room for a new checkpoint of the same step, and keep the damaged one for inspection."""
    number = 1
    while (place := damaged.with_name(f"damaged_{damaged.name}_{number}")).exists():
        number += 1
    damaged.rename(place)
    echo(f"warning: {damaged} is replaced by a complete checkpoint; the damaged one is {place.name}", err=True)
