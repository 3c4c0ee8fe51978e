"""The directory of one run: the names of its files, what they say, and who may write there.

    config.yaml        resolved config: the run's identity        metrics.jsonl     one object per step
    environment.json   command, versions, commit, machine         summary.json      status and latest numbers
    checkpoints/       see checkpoint.py                          .lock             held by the process that trains

A sweep adds train.log, the output of its runs, whose lock the process that it started holds; and stopped_by_rule.json.
Reading needs no torch.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import pydantic
import yaml

from quack_lm import __version__
from quack_lm.config import choice, fingerprint, read_yaml
from quack_lm.errors import UserError, explaining
from quack_lm.files import (
    metrics_line,
    nearest_existing_parent,
    open_regular,
    read_json,
    take_lock,
    user_path,
    write_atomically,
    write_json,
)
from quack_lm.training.state import Count, Seconds, StatusName

# Outside of these nothing was measured, and ratios of such numbers are too large for a float.
TokensPerSecond = Literal[0] | Annotated[float, pydantic.Field(ge=1e-6, le=1e12)]

# For how long a process that only reads the state may hold a lock.
READER_S = 1.0

# Statuses that running again would only repeat.
FINISHED = ("completed", "diverged", "stopped by rule")
STATUSES = (*FINISHED, "interrupted", "failed", "running", "killed", "pending")


class _Summary(pydantic.BaseModel):
    """What is read of a summary.json, which may be untrusted."""

    model_config = pydantic.ConfigDict(strict=True)

    status: StatusName | None = None
    reason: str | None = None
    unstable: list[str] | None = None
    val_loss: float | None = None
    step: Count = 0
    tokens: Count = 0
    elapsed_s: Seconds = 0.0
    outside_s: dict[str, Seconds] | None = None
    probes: int = 0
    tokens_per_s: TokensPerSecond | None = None
    timed_tokens: Count | None = None


def checked_summary(values: dict[str, Any]) -> dict[str, Any] | None:
    """The summary, if the fields that are read have the types that a run writes; else None."""
    try:
        _Summary.model_validate(values)
    except pydantic.ValidationError:
        return None
    return values


@dataclass(frozen=True)
class RunDir:
    """A run's directory, which need not exist yet."""

    path: Path

    @classmethod
    def of(cls, config: dict[str, Any]) -> "RunDir":
        """The directory of a config's run; unless it names one, runs/<attention>-<stabilizer>-<fingerprint>.

        That is the same for the same run, so that calling again continues it.
        """
        default = f"runs/{choice(config['attention'])}-{choice(config['stabilizer'])}-{fingerprint(config)}"
        return cls(user_path(config["run_dir"] or default))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    # -------------------------------------------------------------------------------------------- names

    @property
    def config_file(self) -> Path:
        """The resolved config; its presence marks the directory as a run's."""
        return self.path / "config.yaml"

    @property
    def environment_file(self) -> Path:
        """Command, versions, commit and machine."""
        return self.path / "environment.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON object per step."""
        return self.path / "metrics.jsonl"

    @property
    def summary_file(self) -> Path:
        """Status and latest numbers, replaced at every log interval."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """Contains one directory for each checkpoint."""
        return self.path / "checkpoints"

    @property
    def log_file(self) -> Path:
        """Output of the processes that a sweep started."""
        return self.path / "train.log"

    @property
    def lock_file(self) -> Path:
        """Locked by the process that trains."""
        return self.path / ".lock"

    @property
    def stop_file(self) -> Path:
        """Written by a sweep whose stop rule ended this run."""
        return self.path / "stopped_by_rule.json"

    # -------------------------------------------------------------------------------------------- what it says

    def config(self) -> dict[str, Any]:
        """The config of the run in this directory; UserError if it cannot be read, or another version wrote it."""
        hint = f"run_dir={self}: its config.yaml cannot be read; choose another run_dir"
        # The environment is written first, so a config without one is not from this version either.
        versions = self.environment().get("versions")
        written_by = versions.get("quack_lm") if isinstance(versions, dict) else None
        config = read_yaml(self.config_file, hint)
        if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
            raise UserError(f"{hint}: it does not have the sections of a run")
        if not isinstance(written_by, str) or _series(written_by) != _series(__version__):
            writer = f"quack_lm {written_by}" if isinstance(written_by, str) else "an earlier version of quack_lm"
            raise UserError(
                f"run_dir={self} was written by {writer}, this is {__version__}: continue it with that version, or "
                "choose another run_dir"
            )
        return config

    def environment(self) -> dict[str, Any]:
        """What the run recorded about the machine; empty if there is none."""
        return read_json(self.environment_file)

    def summary(self) -> dict[str, Any]:
        """What the run last wrote about itself; empty before it wrote anything, or if that is damaged."""
        return checked_summary(read_json(self.summary_file)) or {}

    def stop_record(self) -> dict[str, Any]:
        """What a sweep's stop rule wrote when it ended this run; empty if it did not."""
        return read_json(self.stop_file)

    def status(self) -> str:
        """How the run stands.

        `completed`, `diverged`, `interrupted` and `failed` are its own words; `stopped by rule` is the sweep's;
        `running` only while a process is at it, else `killed`; `pending` before it was ever started.
        """
        written = self.summary().get("status")
        if written in FINISHED or written == "failed":
            return str(written)
        if self.is_running():
            return "running"
        if self.stop_record():
            return "stopped by rule"
        if written:
            return "killed" if written == "running" else str(written)
        return "failed" if self.log_file.exists() else "pending"

    def is_running(self) -> bool:
        """Whether a process is alive that trains here, or that a sweep started here: each holds a lock."""
        return _is_locked(self.log_file) or _is_locked(self.lock_file)

    def logs_this_process(self) -> bool:
        """Whether this process writes its output to `log_file`: then a sweep has started it here."""
        return self.log_file.exists() and os.path.samestat(os.fstat(1), self.log_file.stat())

    def has_ended(self) -> bool:
        """Whether its files say that it is finished; unlike `status`, this touches no lock."""
        return self.summary().get("status") in FINISHED or bool(self.stop_record())

    def final_status(self, total_steps: int) -> str | None:
        """The status with which a run of so many steps has ended for good, or None."""
        summary = self.summary()
        is_complete = summary.get("status") == "completed" and summary.get("step", 0) >= total_steps
        return summary["status"] if is_complete or summary.get("status") == "diverged" else None

    def last_line(self, key: str) -> dict[str, Any]:
        """The newest line of metrics.jsonl that has this key; empty if there is none."""
        name = json.dumps(key).encode()
        for line in lines_backwards(self.metrics_file) if self.metrics_file.is_file() else []:
            # Tables over heads make a line of megabytes, which is not parsed in vain. One still being written is empty.
            if name in line and not isinstance((record := metrics_line(line)).get(key, []), list):
                return record
        return {}

    def last_log_lines(self, count: int) -> list[str]:
        """The end of train.log; a progress bar's repainted lines count as one."""
        if not self.log_file.is_file():
            return []
        lines = [line.split("\r")[-1].rstrip() for line in tail(self.log_file).replace("\r\n", "\n").split("\n")]
        return [line for line in lines if line][-count:]

    def newest_checkpoint(self) -> str:
        """The name of the newest complete checkpoint; names sort by step; empty if there is none."""
        return max((path.parent.name for path in self.checkpoints.glob("step_*/manifest.json")), default="")

    def checkpoint_bytes(self) -> int:
        """Bytes of everything under checkpoints/; 0 if another process is removing some of it right now."""
        try:
            return sum(path.stat().st_size for path in self.checkpoints.rglob("*"))
        except OSError:
            return 0

    # -------------------------------------------------------------------------------------------- writing

    def check_writable(self) -> None:
        """UserError unless this directory can be made or written to, and its checkpoints too."""
        with explaining(f"run_dir={self}", "or choose another run_dir"):
            existing = nearest_existing_parent(self.path)
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UserError(f"run_dir={self}: {existing} is not a writable directory; choose another run_dir")
        place = self.checkpoints
        if (place.exists() or place.is_symlink()) and not (
            place.is_dir() and os.access(place, os.R_OK | os.W_OK | os.X_OK)
        ):
            raise UserError(f"{place} is not a writable directory; fix that, or choose another run_dir")

    def claim(self, *, wait_s: float = READER_S) -> IO[str]:
        """Lock the directory for as long as the returned file is open; UserError if another process has it.

        A process that reads the state of the run holds the lock for a moment, so one waits a little.
        """
        with explaining(f"run_dir={self}", "or choose another run_dir"):
            self.path.mkdir(parents=True, exist_ok=True)
            # Appending: a run that is refused does not even change the time of the file.
            lock: IO[str] = open_regular(self.lock_file, "a")
        if not take_lock(lock, wait_s=wait_s):
            raise UserError(f"run_dir={self} is in use by another process; wait for it or choose another run_dir")
        return lock

    def write_description(self, config: dict[str, Any], environment: dict[str, Any]) -> None:
        """Write environment.json, then config.yaml, each atomically."""
        write_json(self.environment_file, environment)
        write_atomically(self.config_file, yaml.safe_dump(config, sort_keys=False))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace summary.json atomically."""
        write_json(self.summary_file, summary)


def _is_locked(path: Path) -> bool:
    """Whether a process holds the exclusive lock of this file."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return not take_lock(file, shared=True)


def _series(version: str) -> str:
    """`0.2.1` -> `0.2`: releases of one series continue each other's runs."""
    return ".".join(version.split(".")[:2])


def lines_backwards(path: Path, size: int = 1 << 18) -> Iterator[bytes]:
    """The lines of a file from the last to the first, read in pieces of `size` bytes."""
    with open(path, "rb") as file:
        start, rest = file.seek(0, os.SEEK_END), b""
        while start:
            end, start = start, max(0, start - size)
            file.seek(start)
            rest, *lines = (file.read(end - start) + rest).split(b"\n")
            yield from reversed(lines)
        yield rest


def tail(path: Path, size: int = 1 << 18) -> str:
    """The last bytes of a file, as text."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode(errors="replace")
