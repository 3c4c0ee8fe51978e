"""One run of a sweep, and what it has reached, read from its directory."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quack_lm.config import choice
from quack_lm.sweep.file import override_value
from quack_lm.text import shell_line
from quack_lm.training.run_dir import FINISHED, RunDir


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    overrides: list[str]
    config: dict[str, Any]
    fingerprint: str
    run_dir: RunDir

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def total_steps(self) -> int:
        return int(self.config["trainer"]["steps"])

    @property
    def tokens_per_step(self) -> int:
        return int(self.config["trainer"]["global_batch_size"] * self.config["trainer"]["seq_len"])

    @property
    def total_tokens(self) -> int:
        return self.total_steps * self.tokens_per_step

    def arguments(self) -> list[str]:
        """The arguments of quack-lm train; a cell that was started before continues."""
        return [*self.overrides, f"run_dir={override_value(str(self.run_dir))}", "trainer.resume=auto"]

    def command(self) -> str:
        """The run as one line to paste into a shell."""
        return shell_line(["quack-lm", "train", *self.arguments()])

    def bare_command(self) -> str:
        """The same without the directory, for a reader who has another one."""
        return shell_line(["quack-lm", "train", *self.overrides])

    # -------------------------------------------------------------------------------------------- what it has reached

    def is_finished(self) -> bool:
        """Whether running it again would only repeat it."""
        return self.run_dir.status() in FINISHED

    def steps_done(self) -> int:
        """The last step that the run has logged."""
        return min(int(self.run_dir.last_line("step").get("step", 0)), self.total_steps)


def reuse(cells: Sequence[Cell], directory: Path) -> list[Cell]:
    """Copy, without checkpoints, the runs of another sweep directory that are cells of this one; returns those."""
    copied = []
    for cell in cells:
        target, other = cell.run_dir.path, RunDir(directory / cell.name)
        # A run that a rule stopped was judged by the other runs of its sweep, and these are others here.
        if target.exists() or other.status() not in ("completed", "diverged"):
            continue
        staging = target.with_name(f".{cell.name}.partial")
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(other.path, staging, ignore=shutil.ignore_patterns("checkpoints", "wandb", ".lock"))
        staging.rename(target)
        copied.append(cell)
    return copied


def readable(config: dict[str, Any]) -> str:
    """Made of the cell's own config alone: a name must not change when the sweep around it grows."""
    attention, stabilizer = choice(config["attention"]), choice(config["stabilizer"])
    return f"{attention}-{stabilizer}-lr{config['optimizer']['lr']:g}-seed{config['seed']}"
