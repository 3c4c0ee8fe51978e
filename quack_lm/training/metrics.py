"""What a run writes down: metrics.jsonl (the truth), copies of it in other tools (sinks.py), a progress line.

Anyone records a named value for a step; here values are reduced over ranks, copied to the host once per `log_every`
steps, and written, one object per step.
"""

import json
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from tqdm import tqdm

from quack_lm.files import finite, metrics_line, open_regular, write_atomically
from quack_lm.parallel import World
from quack_lm.training.counts import format_count

if TYPE_CHECKING:
    from quack_lm.training.sinks import Sink

Value = Tensor | float


# What W&B itself refuses, after the run has begun.
WandbProject = Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[^/\\#?%:]+$")]
WandbTag = Annotated[str, Field(min_length=1, max_length=64)]


@dataclass(frozen=True, kw_only=True)
class LoggerSettings:
    """Where numbers go.

    Args:
        wandb: whether metrics are mirrored to Weights & Biases.
        project: W&B project.
        entity: W&B user or team; null: the default one.
        group: W&B group.
        name: W&B name of the run; null: the name of run_dir.
        tags: W&B tags.
        log_every: steps between copies of metrics from device to host.
        per_head: copy the tables over layers and heads to W&B, TensorBoard and trackio as well, one key each.
        progress: whether there is a progress bar.
        peak_tflops: peak of one device in TFLOP/s, to which throughput/mfu is relative; null: a GPU's by its name, for
            trainer.precision=bfloat16, and a CPU's as measured.
        wandb_artifacts: upload the last checkpoint, metrics.jsonl and summary.json to W&B when the run ends.
        tensorboard: whether metrics are written for TensorBoard too, to tensorboard/ in the run directory.
        trackio: whether metrics go to trackio's local board too, under `project`.
        wandb_timeout_s: seconds to wait for W&B at the start and at the end; training itself never waits for it.
    """

    wandb: Literal["online", "offline", "disabled"] = "disabled"
    project: WandbProject = "quack_lm"
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[WandbTag] = field(default_factory=list)
    log_every: PositiveInt = 10
    per_head: bool = False
    progress: bool = True
    peak_tflops: PositiveFloat | None = None
    wandb_artifacts: bool = False
    tensorboard: bool = False
    trackio: bool = False
    wandb_timeout_s: PositiveFloat = 60.0


class Interval(NamedTuple):
    """Training seconds, and whether the process was stopped in them: then up to a step is missing for each time."""

    seconds: float
    was_stopped: bool


class Clock:
    """Seconds spent training: validation, probes and checkpoints are paused out, with the device drained at the
    edges, and counted by name in `outside_s`."""

    def __init__(self, world: World, outside_s: dict[str, float]) -> None:
        self.world = world
        self.outside_s = outside_s
        self.n_intervals = 0  # that `take` has returned in this process
        self._active_s = 0.0
        self._since = self._seen = time.perf_counter()
        self._was_stopped = False

    @contextmanager
    def leaving_out_stops(self) -> Iterator[None]:
        """Within, time in which this process is stopped (SIGSTOP, a suspended job) counts as nothing.

        Only its end makes itself known, by SIGCONT, so everything since the last `see` is left out.
        """
        before = signal.signal(signal.SIGCONT, self._skip)
        try:
            yield
        finally:
            signal.signal(signal.SIGCONT, before)

    def see(self) -> None:
        """Remember when the process was last seen at work; once a step."""
        self._seen = time.perf_counter()

    def _skip(self, number: int, frame: FrameType | None) -> None:
        now = time.perf_counter()
        self._since += now - self._seen
        self._seen, self._was_stopped = now, True

    @contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Nothing inside counts as training."""
        self._stop()
        yield
        self.world.synchronize()
        now = time.perf_counter()
        self.outside_s[name] = self.outside_s.get(name, 0.0) + now - self._since
        self._since = self._seen = now

    def take(self) -> Interval:
        """The training time since the last call."""
        self._stop()
        self.n_intervals += 1
        interval = Interval(self._active_s, self._was_stopped)
        self._active_s, self._was_stopped = 0.0, False
        return interval

    def _stop(self) -> None:
        self.world.synchronize()
        now = time.perf_counter()
        self._active_s += now - self._since
        self._since = self._seen = now


class RunLog:
    """Records by step, written by the main process when flushed."""

    def __init__(
        self, path: Path, settings: LoggerSettings, world: World, *, batch_tokens: int, total_steps: int
    ) -> None:
        self.path = path
        self.settings = settings
        self.world = world
        self.batch_tokens = batch_tokens
        self.total_steps = total_steps
        self.sinks: list[Sink] = []
        self._records: dict[int, dict[str, Value]] = {}
        self._summed: dict[int, tuple[Tensor, Mapping[str, int]]] = {}
        self.losses: list[float] = []  # of the steps that the last flush was about
        self._bar: tqdm | None = None

    def add(self, step: int, values: Mapping[str, Value]) -> None:
        """Keep values that are the same on every rank; tensors stay on the device until `flush`."""
        self._records.setdefault(step, {}).update(values)

    def add_loss(self, step: int, share: Tensor, source_tokens: Mapping[str, int] | None = None) -> None:
        """Keep this rank's share of the training loss: the shares of all ranks sum to it.

        With several data sets, `source_tokens` has the tokens that the step read of each, by its name, and behind the
        loss `share` has the sum of the losses of this rank's tokens of each.
        """
        self._summed[step] = share, source_tokens or {}

    @property
    def pending_steps(self) -> int:
        """Training steps kept since the last flush."""
        return len(self._summed)

    def flush(self) -> list[float]:
        """Write everything kept, and return the training losses in order of step; every rank gets the same.

        They are in `losses` too, also where the main process could not write: the ranks must not part over that.
        """
        self.losses = losses = []
        if self._summed:
            # Before: each rank's shares of the losses since the last flush. After: the losses, on every rank.
            rows = self.world.sum(torch.stack([share.reshape(-1) for share, _ in self._summed.values()])).tolist()
            self.losses = losses = [row[0] for row in rows]
            for (step, (_, tokens)), (loss, *nats) in zip(self._summed.items(), rows, strict=True):
                parts = zip(tokens.items(), nats, strict=True)
                self.add(step, {"train/loss": loss, **{f"train/loss/{name}": x / n for (name, n), x in parts if n}})
        if self.world.is_main:
            with self.path.open("a") as file:
                for step in sorted(self._records):
                    record = {"step": step, "tokens": step * self.batch_tokens}
                    record |= {name: _plain(value) for name, value in self._records[step].items()}
                    file.write(json.dumps(finite(record)) + "\n")
                    for sink in self.sinks:
                        sink.log(record)
            self._show()
        self._records, self._summed = {}, {}
        return losses

    def sync(self) -> None:
        """Wait until the disk has what was flushed."""
        if self.world.is_main and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """Drop what was written after `step`, when a run continues from an older checkpoint."""
        if not self.world.is_main or not self.path.exists():
            return
        with open_regular(self.path, errors="replace") as file:
            # A line that is none, as a crash leaves it, has no step and is dropped, too.
            kept = [line for line in file.read().splitlines() if metrics_line(line).get("step", math.inf) <= step]
        write_atomically(self.path, "".join(line + "\n" for line in kept))

    def start_progress(self, step: int, description: str) -> None:
        """Show a progress bar, on a terminal or in a log file."""
        if self.world.is_main and self.settings.progress:
            is_file = not os.isatty(2)
            self._bar = tqdm(
                total=self.total_steps,
                initial=step,
                desc=description,
                unit="step",
                dynamic_ncols=not is_file,
                mininterval=10.0 if is_file else 0.2,
            )

    def close(self, summary: dict[str, Any] | None = None, artifacts: Sequence[Path] = ()) -> None:
        """End the bar, and the sinks with the run's summary, and with files of it if they are asked for."""
        if self._bar is not None:
            self._bar.close()
        for sink in self.sinks:
            sink.close(summary or {}, artifacts if self.settings.wandb_artifacts else ())

    def _show(self) -> None:
        if self._bar is None or not self._records:
            return
        last = max(self._records)
        shown = {"loss": "train/loss", "val": "val/loss", "tok/s": "throughput/tokens_per_s"}
        values = {label: _plain(self._records[last][k]) for label, k in shown.items() if k in self._records[last]}
        texts = {k: format_count(v) if k == "tok/s" else f"{v:.4f}" for k, v in values.items()}
        if texts:
            self._bar.set_postfix(texts, refresh=False)
        self._bar.update(last - self._bar.n)


def _plain(value: Value) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
