"""Train every run of a sweep and compare them.

    quack-lm sweep run sweep=NAME [scale=SCALE] [key=value ...]               # a file of configs/sweep/
    quack-lm sweep run experiment=tiny attention=mha,mla optimizer.lr=3e-3,3e-2 'seed=range(0,3)'    # without a file

Verbs: plan|run|resume|submit|status|cancel|collect
{verbs}

Keys of the sweep itself:
{keys}

Every other key=value is a setting of all runs, for example trainer.steps=20. Several values, a,b or choice(a,b) or
range(0,5), are an axis of the grid. Ctrl-C saves and stops the runs; the same command continues them. A run is known
by the hash of its resolved config: completed and diverged runs are never repeated, also after the sweep has grown. The
exit code is 0 when every run completed, diverged or was stopped by the file's rule, 1 when some failed or still end, 2
for a mistake in the command or a file, or a cluster that does not answer.
"""

import json
import math
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quack_lm.config import nearest, split_axes, unknown_flag
from quack_lm.errors import UserError
from quack_lm.files import user_path
from quack_lm.sweep import cluster, cost, file, local, multirun
from quack_lm.sweep.cell import reuse
from quack_lm.sweep.plan import PLAN_FILE, SweepPlan, make_cells, read_plan, write_plan
from quack_lm.text import echo, shell_line

VERBS = {
    "plan": "compose and check every run, write plan.json (not with --check), print runs and cost; trains nothing",
    "run": "plan, then train what is unfinished, and print the comparison table (the default)",
    "resume": "the same as run",
    "submit": "plan, then queue what is unfinished and not queued yet as job arrays on a slurm cluster",
    "status": "print how far each run of a sweep directory is, and what slurm does about it where jobs were submitted",
    "cancel": "cancel the jobs of this sweep and wait until its runs have saved; submit continues them",
    "collect": "write results.parquet, results.csv and curves.parquet: all that quack-lm report needs, in a few files",
    "task": "what slurm/sweep.sbatch calls: train one run of a file that submit wrote",
}


def count(value: str) -> int:
    """an integer from 1 to 9999"""
    if not value.isdecimal() or not 1 <= int(value[:9]) <= 9999:
        raise ValueError
    return int(value)


def index(value: str) -> int:
    """an integer, SLURM_ARRAY_TASK_ID in a job array"""
    if not value.isdecimal():
        raise ValueError
    return int(value)


def positive(value: str) -> float:
    """a number above 0"""
    if not 0 < float(value) < math.inf:
        raise ValueError
    return float(value)


def time_limit(value: str) -> str:
    """a time limit as sbatch takes it, for example 4:00:00 or 1-12:00"""
    if not re.fullmatch(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}", value):
        raise ValueError
    return value


def sweep_directory(value: str) -> Path:
    """a sweep directory, which has a plan.json"""
    directory = user_path(value)
    if not (directory / PLAN_FILE).is_file():
        raise ValueError
    return directory


@dataclass(frozen=True)
class Key:
    """A key of the sweep itself; the docstring of `read` says what a value must be."""

    read: Callable[[str], Any]
    verbs: tuple[str, ...]
    meaning: str


TRAINS, PLANS = ("plan", "run", "resume"), ("plan", "run", "resume", "submit")
KEYS = {
    "sweep": Key(os.path.expanduser, tuple(VERBS), "a file of configs/sweep/ by name, or a path that ends in .yaml"),
    "scale": Key(str, tuple(VERBS), "one of the file's scales, for example proxy or 1b, where it has some"),
    "dir": Key(
        user_path, tuple(VERBS), "where the runs are; unless given, runs/<sweep>-<scale>, or runs/multirun-<hash>"
    ),
    "reuse": Key(sweep_directory, PLANS, "another sweep's directory: finished runs that both have are copied from it"),
    "jobs": Key(count, TRAINS, "processes at a time, each on its own cores, or GPU; as many as fit unless given"),
    "threads": Key(count, TRAINS, "cores and torch threads of each process, 1 unless given"),
    "nodes": Key(count, ("submit",), "nodes of each run, 1 unless given"),
    "gpus": Key(count, ("submit",), "GPUs of each node, each with a rank"),
    "tasks": Key(count, ("submit",), "ranks of each node, where it has no GPUs, or another number of ranks"),
    "cpus": Key(count, ("submit",), "cores of each rank"),
    "time": Key(time_limit, ("submit",), "after which a run saves and queues again, as sbatch takes it: 4:00:00"),
    "concurrency": Key(count, ("submit",), "runs at a time, 8 unless given"),
    "mfu": Key(positive, ("plan",), "assumed share of the device's peak, with tflops=...; else that of finished runs"),
    "tflops": Key(positive, ("plan",), "assumed peak of the device in TFLOP/s"),
    "out": Key(user_path, ("collect",), "where the files go, next to the runs unless given"),
    "file": Key(user_path, ("task",), "a file that submit wrote"),
    "index": Key(index, ("task",), "the run in it"),
}


@dataclass(frozen=True)
class Command:
    """The command line, taken apart: the sweep's own keys, and the settings of its runs."""

    verb: str
    arguments: list[str]
    own: dict[str, Any]
    reuse: list[Path] = field(default_factory=list)
    overrides: list[str] = field(default_factory=list)

    @property
    def directory(self) -> Path:
        """Where the runs are, from dir=..., or from the sweep's name and scale."""
        if "dir" in self.own:
            return Path(self.own["dir"])
        if sweep := self.own.get("sweep"):
            name = Path(sweep).stem if sweep.endswith((".yaml", ".yml")) else sweep
            return Path("runs") / (f"{name}-{self.own['scale']}" if "scale" in self.own else name)
        if self.verb in PLANS and split_axes(self.overrides)[1]:
            return Path("runs") / multirun.unnamed_name(self.overrides)
        raise UserError(
            "say which sweep: sweep=quickstart, or several values of a key such as seed=0,1; dir=... is enough for "
            "status, cancel and collect; see --help"
        )

    @property
    def resources(self) -> cluster.Resources:
        names = ("nodes", "gpus", "tasks", "cpus", "time")
        return cluster.Resources(**{name: self.own[name] for name in names if name in self.own})


def parse(arguments: list[str]) -> Command:
    verb, rest = "run", list(arguments)
    if rest and "=" not in rest[0] and not rest[0].startswith("-"):
        verb, *rest = rest
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb}; {nearest(verb, list(VERBS))}")
    command = Command(verb, list(arguments), own={})
    for argument in rest:
        if argument.startswith("-"):
            raise UserError(unknown_flag(argument, []))
        name, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"cannot read {argument}; after the verb come key=value pairs, see --help")
        key = KEYS.get(name)
        if key is None:
            command.overrides.append(argument)
            continue
        if verb not in key.verbs:
            raise UserError(f"{argument} has no meaning for {verb}, only for {', '.join(key.verbs)}")
        try:
            read = key.read(value)
        except ValueError:
            raise UserError(f"{argument} must be {key.read.__doc__}") from None
        if name == "reuse":
            command.reuse.append(read)
        else:
            command.own[name] = read
    if ("mfu" in command.own) != ("tflops" in command.own):
        raise UserError("mfu=... and tflops=... go together, for example mfu=0.4 tflops=989")
    return command


def usage() -> str:
    """The text of --help, with the verbs and keys from their tables."""

    def entry(name: str, meaning: str) -> str:
        return textwrap.fill(meaning, 118, initial_indent=f"    {name:13}", subsequent_indent=" " * 17)

    verbs = "\n".join(entry(verb, meaning) for verb, meaning in VERBS.items())
    keys = "\n".join(
        entry(f"{name}=", key.meaning + ("" if len(key.verbs) == len(VERBS) else f" (for {', '.join(key.verbs)})"))
        for name, key in KEYS.items()
    )
    return (__doc__ or "").replace("{verbs}", verbs).replace("{keys}", keys)


def make_plan(command: Command, directory: Path) -> SweepPlan:
    """Expand and check the sweep, as far as its finished runs say which settings are judged; writes nothing."""
    from quack_lm.report.comparison import judge_selected  # late, as everywhere here: it needs more libraries

    settings, axes = split_axes(command.overrides)
    if "sweep" in command.own:
        sweep = multirun.with_axes(file.load(command.own["sweep"], command.own.get("scale")), axes)
    else:
        sweep = multirun.unnamed_sweep(command.overrides)
    plan = SweepPlan(
        sweep=sweep.name,
        question=sweep.question,
        command=shell_line(["quack-lm", "sweep", *command.arguments]),
        cells=make_cells(sweep, directory, settings),
        stop=sweep.stop,
        tune_seeds=sweep.tune_seeds,
    )
    return judge_selected(plan, directory)


def print_what_follows(plan: SweepPlan) -> None:
    """That a plan with tuning seeds grows when these have selected the settings."""
    seeds = plan.tune_seeds
    if any(cell.config["seed"] in seeds and not cell.is_finished() for cell in plan.cells):
        echo("when the tuning runs have finished, the same command plans the judging seeds of the selected settings")


def print_plan(plan: SweepPlan, command: Command) -> None:
    echo(*plan.question.splitlines(), "")
    for cell in plan.cells:
        echo(f"{cell.run_dir.status():11} {cell.command()}")
    unfinished = sum(not cell.is_finished() for cell in plan.cells)
    assumed = cost.Speed(mfu=command.own["mfu"], tflops=command.own["tflops"]) if "mfu" in command.own else None
    total = cost.estimate(plan.cells, cost.count_flops(plan.cells, _flops_per_token), assumed)
    echo("", f"{len(plan.cells)} runs, {unfinished} unfinished; {total.tokens:.3g} tokens, {total.flops:.3g} FLOPs")
    if total.hours is None or total.hours_left is None:
        echo("hours: unknown before a run has finished; mfu=0.4 tflops=989 would assume a speed")
    else:
        basis = f"MFU {assumed.mfu:g} of {assumed.tflops:g} TFLOP/s" if assumed else "the speed of the runs so far"
        # An assumed device is another machine's: how many runs fit on this one says nothing there.
        jobs = command.own.get("jobs") or (1 if assumed else local.default_jobs(command.own.get("threads", 1)))
        left = f"{total.hours_left:.3g} left" + (
            f", {total.hours_left / jobs:.3g} with jobs={jobs}" if jobs > 1 else ""
        )
        echo(f"device-hours: {total.hours:.3g} in all, {left} (at {basis}, without the start of each run)")
    if plan.stop:
        echo(f"stop rule: {plan.stop}")
    print_what_follows(plan)


def _flops_per_token(config: dict[str, Any]) -> float:
    from quack_lm.training.build import count_flops_per_token  # late: status and collect need no torch

    return count_flops_per_token(config)


def submit(plan: SweepPlan, command: Command, directory: Path) -> int:
    _check_data(plan)
    take_over(plan, command)
    done = cluster.submit(directory, plan, command.resources, concurrency=command.own.get("concurrency", 8))
    for job in done.jobs:
        echo(f"submitted job {job.job}: {job.n_cells} runs")
    now, ending = sum(job.n_cells for job in done.jobs), len(done.still_ending)
    before = len(plan.cells) - now - ending
    echo(f"{len(plan.cells)} runs: {before} finished, running or queued before, {now} submitted now")
    echo(shell_line(["quack-lm", "sweep", "status", f"dir={directory}"]))
    print_what_follows(plan)
    if ending:
        names = ", ".join(cell.name for cell in done.still_ending)
        echo(f"{ending} still ending, submit again in a moment: {names}", err=True)
    return 1 if ending else 0


def cancel(directory: Path) -> int:
    if not cluster.was_submitted(directory):
        read_plan(directory)  # says so where this is no sweep at all
        echo("no job of this sweep is in the queue")
        return 0
    jobs = cluster.cancel(directory)
    if not jobs:
        echo("no job of this sweep is in the queue")
        return 0
    echo(f"canceled {_listed(jobs)}; waiting up to {cluster.CANCEL_WAIT_S:g} s for runs to save and end")
    if left := cluster.wait_for_end(directory):
        echo(f"{_listed(left)} still ending: wait with submit until status shows no more of it", err=True)
    return 1 if left else 0


def _listed(jobs: list[int]) -> str:
    return ", ".join(f"job {job}" for job in jobs)


def _check_data(plan: SweepPlan) -> None:
    """That each data set of the unfinished runs is there, before any of them is started; the runs read its bytes."""
    from quack_lm.config import instantiate
    from quack_lm.training.build import open_data  # late: status and collect need no torch

    unfinished = [cell for cell in plan.cells if not cell.is_finished()]
    for data, size in {(json.dumps(c.config["data"]), c.config["model"]["vocab_size"]) for c in unfinished}:
        open_data(instantiate(json.loads(data)), size)


def show_status(plan: SweepPlan, directory: Path) -> None:
    """What the run directories say, and slurm; the former also where the latter does not answer."""
    from quack_lm.report.status import status_table  # late, as everywhere here: only these verbs need its libraries

    if not cluster.was_submitted(directory):
        echo(*status_table(plan.cells).splitlines())
        return
    try:
        tasks = cluster.tasks_of(directory)
    except UserError:
        echo(*status_table(plan.cells).splitlines())
        raise
    echo(*status_table(plan.cells, tasks).splitlines())


def take_over(plan: SweepPlan, command: Command) -> None:
    for other in command.reuse:
        echo(f"{len(reuse(plan.cells, other))} runs reused from {other}")


def train(plan: SweepPlan, command: Command, directory: Path) -> int:
    from quack_lm.report import collected, runs

    take_over(plan, command)
    _check_data(plan)
    limits = {"jobs": command.own.get("jobs"), "threads": command.own.get("threads", 1)}
    outcome = local.run(plan.cells, stop=plan.stop, **limits)
    # The tuning runs have selected the settings that are judged now.
    while (
        plan.tune_seeds
        and not outcome.exit_code
        and len((grown := make_plan(command, directory)).cells) > len(plan.cells)
    ):
        plan = grown
        write_plan(directory, plan)
        outcome = local.run(plan.cells, stop=plan.stop, **limits)
    echo(*runs.as_text(collected.load(directory)).splitlines())
    if outcome.signal:
        echo("stopped; the same command continues", err=True)
    for cell in outcome.failed:
        echo(f"failed: {cell.name}; its log is {cell.run_dir.log_file}", err=True)
    return outcome.exit_code


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        echo(*usage().splitlines())
        return 0
    is_check = "--check" in arguments
    command = parse([argument for argument in arguments if argument != "--check"])
    if is_check and command.verb != "plan":
        raise UserError(f"--check has no meaning for {command.verb}, only for plan")
    if command.verb == "task":
        if "file" not in command.own:
            raise UserError("file=... is missing: a file that submit wrote, with index=... for the run in it")
        cluster.run_task(command.own["file"], command.own.get("index", 0))
    directory = command.directory
    if command.verb == "status":
        show_status(read_plan(directory), directory)
        return 0
    if command.verb == "cancel":
        return cancel(directory)
    if command.verb == "collect":
        from quack_lm.report import collected

        echo(*map(str, collected.write(directory, command.own.get("out"))))
        return 0
    plan = make_plan(command, directory)
    if command.verb == "submit":
        return submit(plan, command, directory)
    if is_check:  # writes nothing
        _check_data(plan)
    else:
        write_plan(directory, plan)
    if command.verb == "plan":
        print_plan(plan, command)
        return 0
    if "sweep" in command.own:
        return train(plan, command, directory)
    echo(f"{len(plan.cells)} runs in {directory}")
    code = train(plan, command, directory)
    echo(
        shell_line(["quack-lm", "sweep", "status", f"dir={directory}"]),
        shell_line(["quack-lm", "report", str(directory)]),
    )
    return code
