"""One run of a sweep, and what it has reached, read from its directory."""

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydantic

from quack_lm.config import choice
from quack_lm.files import metrics_line, read_json, take_lock
from quack_lm.sweep.file import override_value
from quack_lm.training.state import Count, Seconds

LOG_FILE = "train.log"
METRICS_FILE = "metrics.jsonl"
STOP_FILE = "stopped_by_rule.json"

# Statuses that running again would only repeat.
FINISHED = ("completed", "diverged", "stopped by rule")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    overrides: list[str]
    config: dict[str, Any]
    fingerprint: str
    run_dir: Path

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

    def summary(self) -> dict[str, Any]:
        """What the run wrote about itself so far; empty before it wrote anything, or where that is damaged."""
        return checked_summary(read_json(self.run_dir / "summary.json")) or {}

    def stop_record(self) -> dict[str, Any]:
        """What the stop rule of the sweep wrote when it ended this run; empty where it did not."""
        return read_json(self.run_dir / STOP_FILE)

    def status(self) -> str:
        """How the run stands.

        `completed`, `diverged`, `interrupted` and `failed` are its own words; `stopped by rule` is the sweep's;
        `running` only while a process is at it, else `killed`; `pending` before it was ever started.
        """
        written = self.summary().get("status")
        if written in FINISHED or written == "failed":
            return str(written)
        log = self.run_dir / LOG_FILE
        if is_locked(log):
            return "running"
        if self.stop_record():
            return "stopped by rule"
        if written:
            return "killed" if written == "running" else str(written)
        return "failed" if log.exists() else "pending"

    def is_finished(self) -> bool:
        return self.status() in FINISHED

    def has_ended(self) -> bool:
        """Whether its files say that it is finished; unlike `is_finished`, this touches no lock."""
        return self.summary().get("status") in FINISHED or bool(self.stop_record())

    def steps_done(self) -> int:
        """The last step that the run has logged."""
        return min(int(self.last_line("step").get("step", 0)), self.total_steps)

    def newest_checkpoint(self) -> str:
        """The name of the last checkpoint to continue from; names sort by step; empty where there is none."""
        return max((path.parent.name for path in self.run_dir.glob("checkpoints/step_*/manifest.json")), default="")

    def last_line(self, key: str) -> dict[str, Any]:
        """The newest line of metrics.jsonl that has this key; empty where there is none near the end."""
        path = self.run_dir / METRICS_FILE
        for line in reversed(tail(path).split("\n") if path.is_file() else []):
            # One that is cut by our window, or is still being written, is empty.
            if key in (record := metrics_line(line)):
                return record
        return {}


class _Summary(pydantic.BaseModel):
    """What is read of a summary.json, which may come from somebody else."""

    model_config = pydantic.ConfigDict(strict=True)

    status: str = ""
    reason: str | None = None
    unstable: list[str] | None = None
    step: Count = 0
    tokens: Count = 0
    elapsed_s: Seconds = 0.0
    outside_s: dict[str, Seconds] | None = None
    probes: int = 0


def checked_summary(found: dict[str, Any]) -> dict[str, Any] | None:
    """The summary, if what is read of it is what it should be; else None."""
    try:
        _Summary.model_validate(found)
    except pydantic.ValidationError:
        return None
    return found


def shell_line(arguments: Sequence[str]) -> str:
    """The arguments as one line for bash: like shlex.join, but a line break stays inside of the line."""
    return " ".join(shlex.quote(text) if text.isprintable() else _ansi_quoted(text) for text in arguments)


def _ansi_quoted(text: str) -> str:
    known = {"\\": "\\\\", "'": "\\'"}
    return "$'" + "".join(known.get(c, c if c.isprintable() else f"\\U{ord(c):08x}") for c in text) + "'"


def reuse(cells: Sequence[Cell], directory: Path) -> list[Cell]:
    """Copy, without checkpoints, the runs of another sweep directory that are cells of this one; returns those."""
    copied = []
    for cell in cells:
        other = replace(cell, run_dir=directory / cell.name)
        # A run that some rule stopped was judged by the runs beside it, and these are others here.
        if cell.run_dir.exists() or other.status() not in ("completed", "diverged"):
            continue
        aside = cell.run_dir.with_name(f".{cell.name}.partial")
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(other.run_dir, aside, ignore=shutil.ignore_patterns("checkpoints", "wandb", ".lock"))
        aside.rename(cell.run_dir)
        copied.append(cell)
    return copied


def readable(config: dict[str, Any]) -> str:
    """Made of the cell's own config alone: a name must not change when the sweep around it grows."""
    attention, stabilizer = choice(config["attention"]), choice(config["stabilizer"])
    return f"{attention}-{stabilizer}-lr{config['optimizer']['lr']:g}-seed{config['seed']}"


def last_lines(log: Path, count: int) -> list[str]:
    """The end of a log; a progress bar's repainted lines count as one."""
    if not log.is_file():
        return []
    lines = [line.split("\r")[-1].rstrip() for line in tail(log).replace("\r\n", "\n").split("\n")]
    return [line for line in lines if line][-count:]


def tail(path: Path, size: int = 1 << 18) -> str:
    """The last bytes of a file."""
    with open(path, "rb") as handle:
        handle.seek(max(0, path.stat().st_size - size))
        return handle.read().decode(errors="replace")


def is_locked(log: Path) -> bool:
    """Whether a process that the runner started is alive: it holds the lock of its log."""
    if not log.is_file():
        return False
    with open(log, "rb") as handle:
        return not take_lock(handle, shared=True)
