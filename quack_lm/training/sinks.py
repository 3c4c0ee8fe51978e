"""Copies of the log in other tools: Weights & Biases, TensorBoard, trackio. Each may fail alone; training goes on."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from quack_lm.errors import UserError
from quack_lm.text import echo, one_line
from quack_lm.training.metrics import LoggerSettings

# The packages of extras, by the key that asks for them.
OPTIONAL = ("tensorboard", "trackio")


class Sink(ABC):
    """Where every line of metrics.jsonl goes as well; its failures are reported once and never stop the run."""

    name: str

    def __init__(self, settings: LoggerSettings) -> None:
        self.per_head = settings.per_head
        self._is_on = True

    def log(self, record: Mapping[str, Any]) -> None:
        """Copy one line of metrics.jsonl; tables over layers and heads only with `logger.per_head`."""
        if self._is_on:
            with self._ignoring_errors():
                self._log(flatten_record(record, per_head=self.per_head), step=record["step"])

    def close(self, summary: Mapping[str, Any], artifacts: Sequence[Path] = ()) -> None:
        """Write the summary of the run, keep files and directories of it where the tool can, and finish."""
        if self._is_on:
            with self._ignoring_errors():
                self._close(summary, artifacts)

    @abstractmethod
    def _log(self, values: Mapping[str, float], *, step: int) -> None: ...

    @abstractmethod
    def _close(self, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None: ...

    @contextmanager
    def _ignoring_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever another tool does, training goes on
            echo(one_line(f"{self.name} failed and is off for the rest of this run: {type(error).__name__}: {error}"))
            self._is_on = False


class WandbSink(Sink):
    """Weights & Biases, with the run's id to continue it."""

    name = "W&B"

    def __init__(self, run_dir: Path, settings: LoggerSettings, config: dict[str, Any], run_id: str | None) -> None:
        super().__init__(settings)
        self.id: str | None = run_id
        self._run: Any = None
        limit_s = settings.wandb_timeout_s
        if settings.wandb == "online":
            echo(f"connecting to W&B (logger.wandb_timeout_s={limit_s:g} at most, then without it)", err=True)
        with self._ignoring_errors():
            import wandb

            self._run = wandb.init(
                mode=settings.wandb,
                dir=run_dir,
                project=settings.project,
                entity=settings.entity,
                group=settings.group,
                name=settings.name or run_dir.name,
                tags=settings.tags,
                config=config,
                id=run_id,
                resume="allow",
                # The run directory names the commit; W&B would copy the remote's URL, and tokens stand in URLs.
                settings=wandb.Settings(
                    console="off",
                    disable_git=True,
                    init_timeout=limit_s,
                    login_timeout=limit_s,
                    finish_timeout=limit_s,
                ),
            )
            self.id = self._run.id
            # Every chart over the steps, and in the table of runs what they are compared by.
            self._run.define_metric("step", hidden=True)
            self._run.define_metric("*", step_metric="step")
            self._run.define_metric("val/*", step_metric="step", summary="min,last")
            self._run.define_metric("logits/max", step_metric="step", summary="max,last")

    def _log(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log(dict(values), step=step)

    def _close(self, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        import wandb

        self._run.summary.update(dict(summary))
        for path in artifacts:
            artifact = wandb.Artifact(f"{self._run.id}-{path.name}", type="model" if path.is_dir() else "result")
            artifact.add_dir(str(path)) if path.is_dir() else artifact.add_file(str(path))
            self._run.log_artifact(artifact)
        self._run.finish()


class TensorBoardSink(Sink):
    """Event files in the run directory, for `tensorboard --logdir`; a continued run drops what came later."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, settings: LoggerSettings, *, first_step: int) -> None:
        super().__init__(settings)
        with self._ignoring_errors():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=first_step + 1 if first_step else None
            )

    def _log(self, values: Mapping[str, float], *, step: int) -> None:
        for name, value in values.items():
            if name != "step":
                self._writer.add_scalar(name, value, global_step=step)

    def _close(self, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        self._writer.close()


class TrackioSink(Sink):
    """trackio's local board, which needs no account: `trackio show`."""

    name = "trackio"

    def __init__(self, run_dir: Path, settings: LoggerSettings, config: dict[str, Any], *, is_continued: bool) -> None:
        super().__init__(settings)
        # It knows runs by their names alone, and directories of several runs may have one name.
        place = hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:6]
        with self._ignoring_errors(), redirect_stdout(StringIO()):  # it prints how to see the board, and more
            import trackio

            # Where it cannot write, it would warn from a thread and lose the log.
            Path(os.environ.get("TRACKIO_DIR", ".")).mkdir(parents=True, exist_ok=True)
            self._run = trackio.init(
                settings.project,
                name=f"{settings.name or run_dir.name}-{place}",
                group=settings.group,
                config=config,
                resume="allow" if is_continued else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def _log(self, values: Mapping[str, float], *, step: int) -> None:
        self._run.log({name: value for name, value in values.items() if name != "step"}, step=step)

    def _close(self, summary: Mapping[str, Any], artifacts: Sequence[Path]) -> None:
        import trackio

        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            trackio.finish()  # and not the run's own, behind which it would finish, and print, once more at exit


def check_packages(settings: LoggerSettings) -> None:
    """UserError for a tool that is asked for and not installed."""
    if settings.wandb != "disabled" and find_spec("wandb") is None:
        raise UserError(f"logger.wandb={settings.wandb} needs wandb: pip install wandb, or leave it out")
    for name in OPTIONAL:
        if getattr(settings, name) and find_spec(name) is None:
            raise UserError(f"logger.{name}=true needs {name}: pip install -e '.[{name}]', or leave it out")


def flatten_record(record: Mapping[str, Any], *, per_head: bool) -> dict[str, Any]:
    """A line of metrics.jsonl without its tables, or with a value for each layer and head in their place."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        if not isinstance(value, list):
            flat[name] = value
        elif per_head and value and isinstance(value[0], list):
            base = name.removesuffix("_per_head").removesuffix("_per_block")
            flat |= {f"{base}/layer{i}/head{j}": x for i, row in enumerate(value) for j, x in enumerate(row)}
    return flat
