"""Train one model, or several.

    quack-lm train experiment=tiny attention=mla stabilizer=quack
    quack-lm train experiment=tiny stabilizer=quack stabilizer.tau=0.1 optimizer.lr=3e-3 run_dir=runs/mine
    quack-lm train -m experiment=tiny attention=mha,mla stabilizer=none,quack 'seed=range(0,3)'   # 12 runs, compared
    torchrun --nproc-per-node 8 -m quack_lm train model=1b attention=mla stabilizer=qk_clip data.dir=/data/cosmopedia_v2
    quack-lm train --config runs/mine/config.yaml run_dir=runs/again     # the same run again

Settings are key=value (Hydra's grammar). A group takes one of its choices:
{groups}
and every key inside a group can be set individually. Flags:
    --config FILE    take all settings from the config.yaml of an earlier run; key=value still overrides
    --check          print the resolved config and the parameter counts, check everything, and train nothing
    -c, --cfg job    print the resolved config
    -i, --info defaults   print the choice of each group
    -m, --multirun   train every combination of keys with several values, a,b or range(0,5), as quack-lm sweep run does
    -h, --help [TOPIC]    this text, or help on a group, a choice or a key: --help optimizer, --help optimizer.lr

The run directory gets config.yaml, environment.json, metrics.jsonl, summary.json and checkpoints/. Calling the same
command again continues an unfinished run. On a slurm cluster, quack-lm submit starts it. Exit codes: 0 completed,
diverged or interrupted; 2 a mistake in the settings; 1 a crash; 128 + the number of a signal before the first step.
"""

import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from quack_lm import slurm
from quack_lm.config import (
    choices,
    chosen_groups,
    compose,
    flatten,
    groups,
    help_text,
    help_topic,
    read_flags,
    take_flag,
)
from quack_lm.errors import UserError, exit_without_teardown
from quack_lm.text import echo, escape, one_line
from quack_lm.training.run_dir import RunDir
from quack_lm.training.state import RunStatus
from quack_lm.training.stop_signals import ending, hold

if TYPE_CHECKING:
    from quack_lm.training.loop import Run


def main(arguments: list[str]) -> int:
    """Read the command line, check, and train."""
    topic = help_topic(arguments)
    if topic is not None:
        echo(*(help_text(topic) if topic else usage()).splitlines())
        return 0
    is_multirun = bool({"-m", "--multirun"} & set(arguments))
    arguments = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    if (shown := show(arguments)) is not None:
        echo(*shown.splitlines())
        return 0
    file, is_check, overrides = read_flags(arguments)
    if is_multirun:
        if os.environ.get("WORLD_SIZE", "1") != "1" or slurm.is_one_of_many():
            raise UserError("-m starts its runs as processes of their own: call it without torchrun or srun")
        from quack_lm.cli import sweep

        if file:
            raise UserError("-m makes its runs of groups and keys, not of a --config file; leave one of the two out")
        return sweep.main([*(["plan", "--check"] if is_check else ["run"]), *overrides])
    config = compose_run(overrides, file)
    return check_config(config) if is_check else train_config(config)


def compose_run(overrides: list[str], file: Path | None) -> dict[str, Any]:
    """The config of the run that a command line asks for; UserError where its --config file is of a run that was moved.

    Such a file still names the old directory, where the run would start anew.
    """
    config = compose(overrides, file=file)
    if file and config["run_dir"] and not any(override.startswith("run_dir=") for override in overrides):
        here, named = RunDir(file.absolute().parent), RunDir.of(config)
        if here.config_file.exists() and here.path.resolve() != named.path.absolute().resolve():
            raise UserError(
                f"--config {file} says run_dir={named} and lies in {here}: add run_dir={here} to continue there, or "
                "another run_dir to start a new run"
            )
    return config


def check_config(config: dict[str, Any]) -> int:
    """Check a composed config, and print what a run of it would be; returns the exit code."""
    # Imported late, here and below: --help and a mistake in the settings need not wait for it.
    from quack_lm.model import count_parameters
    from quack_lm.training.check import check_run, run_warnings

    echo(*yaml.safe_dump(config, sort_keys=False).splitlines(), "")
    plan = check_run(config, is_rehearsal=True)
    echo(*(f"{n:>15,}  {component}" for component, n in count_parameters(plan.model).items()))
    echo(*(f"warning: {text}" for text in run_warnings(plan)), err=True)
    echo(f"ready to train in {plan.run_dir}")
    return 0


def train_config(config: dict[str, Any]) -> int:
    """Train a composed config; returns the exit code."""
    with ending(partial(end_at_start, RunDir.of(config))):
        from tqdm import tqdm

        from quack_lm.training.build import build_run
        from quack_lm.training.check import check_run, run_warnings

        plan = check_run(config)
        if plan.finished:
            echo(f"{plan.run_dir} is finished already: {plan.finished}")
            if late := late_settings(config, plan.run_dir.config()):
                echo(f"it was trained without {', '.join(late)}; to train it again with that, choose another run_dir")
            return 0
        run = build_run(plan)
        for warning in run_warnings(plan) if run.world.is_main else []:
            tqdm.write(escape(f"warning: {warning}"), file=sys.stderr)  # above the progress bar
        if config["trainer"]["micro_batch_size"] == "auto" and run.world.is_main:
            tqdm.write(f"trainer.micro_batch_size=auto is {run.settings.micro_batch_size} here", file=sys.stderr)
        hold()  # until the loop listens
    _train(run)
    return run.world.shutdown(0)


def late_settings(config: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What a config asks of the steps of a run that is finished, and its config from `before` did not."""
    now, then = flatten(config), flatten(before)
    asked = [key for key in ("eval.every", "trainer.profile") if now[key] and now[key] != then.get(key)]
    return [f"{key}={now[key]}" for key in asked]


def end_at_start(run_dir: RunDir, stop_signal: signal.Signals) -> NoReturn:
    """End this process before its first step, with nothing to save; say so, also to the sweep that has started it."""

    def summarize(status: RunStatus) -> None:
        # Without a sweep, nothing has shown yet that this is the run's own directory.
        if run_dir.logs_this_process() and not run_dir.has_ended():
            run_dir.write_summary({**run_dir.summary(), "status": status.name, "reason": status.reason})

    if slurm.is_first_rank():
        name = stop_signal.name
        echo(f"stopped by {name} before the first step; the same command starts it again", err=True)
        with suppress(OSError):
            summarize(RunStatus.interrupted(name))
            if name == "SIGTERM":  # a time limit that leaves no step, SIGUSR1, would only come again
                _tell_job(name, summarize)
    slurm.flush_before_srun_kills()
    exit_without_teardown(128 + stop_signal)


def _train(run: "Run") -> None:
    """Train; whatever ends the run is in its summary before this returns or raises."""
    from quack_lm.training.loop import summarize, train

    def end_as(status: RunStatus) -> None:
        run.status = status
        summarize(run)

    try:
        status = train(run)
    except KeyboardInterrupt:
        end_as(RunStatus("interrupted", "stopped at once by a second SIGINT"))
        exit_without_teardown(130)  # nor waiting for a checkpoint that is being written
    except BaseException as error:
        run.status = RunStatus("failed", one_line(f"{type(error).__name__}: {error}"))
        last = summarize(run)
        if isinstance(error, UserError):  # that all ranks have agreed on: none may end while W&B is told
            run.log.close(last)
            with suppress(RuntimeError):
                run.world.barrier()
        raise
    if not run.world.is_main:
        return
    echo(f"{status.name} at step {run.state.step}: validation loss {run.state.val_loss:.4f}, {run.run_dir}")
    if status.stop_signal in slurm.WORDS:
        _tell_job(status.stop_signal, end_as)


def _tell_job(stop_signal: str, summarize: Callable[[RunStatus], None]) -> None:
    """Tell a job of slurm which signal has ended the run, and the summary whether that was a cancellation."""
    slurm.tell_job(slurm.WORDS[stop_signal])
    # Asked when all is saved: a controller may take its time to answer.
    if stop_signal == "SIGTERM" and slurm.was_canceled():
        summarize(RunStatus("interrupted", "the job was canceled (SIGTERM)", stop_signal))


def usage() -> str:
    """The text of --help, with the choices of each group."""
    table = "\n".join(f"    {group + '=':13} {' | '.join(choices(group))}" for group in groups())
    return (__doc__ or "").replace("{groups}", table)


def show(arguments: list[str]) -> str | None:
    """What Hydra's flags --cfg and --info print; None where neither is given."""
    cfg, rest = take_flag(arguments, "--cfg", "-c")
    info, rest = take_flag(rest, "--info", "-i")
    if cfg is None and info is None:
        return None
    file, _, overrides = read_flags([argument for argument in rest if argument != "--resolve"])
    if cfg is not None:
        if cfg != "job":
            raise UserError(f"--cfg {cfg}: only --cfg job exists, which prints the resolved config of a run")
        return yaml.safe_dump(compose(overrides, file=file), sort_keys=False).rstrip()
    if info != "defaults" or file:
        raise UserError(
            f"--info {info}: only --info defaults exists, for a run that is composed from groups; --cfg job prints "
            "the resolved config, and --help GROUP explains its keys"
        )
    return "\n".join(f"{group}={name or 'null'}" for group, name in chosen_groups(overrides).items())
