"""Train every run of a sweep file and compare them.

    quack-lm sweep [plan|run|resume|submit|status|cancel|collect] sweep=NAME [scale=SCALE] [key=value ...]

plan     compose and check every run, write plan.json, print the runs and what they cost; trains nothing
run      plan, then train what is unfinished, jobs at a time, and print the comparison table (the default)
resume   the same as run
submit   plan, then queue what is unfinished and not queued yet as job arrays on a slurm cluster (slurm/sweep.sbatch)
status   print how far each run of a sweep directory is, and what slurm does about it where jobs were submitted
cancel   cancel the queued and running jobs of this sweep and wait until its runs have saved; submit continues them
collect  write results.parquet, results.csv and curves.parquet: all that quack-lm report needs, in a few files, beside
         the runs or in out=DIR

sweep    a file of configs/sweep/ by name, or a path that ends in .yaml
scale    one of the file's scales, for example proxy or 1b, where it has some
dir      where the runs go, runs/<sweep>-<scale> unless given; alone it is enough for status, cancel and collect
reuse    another sweep's directory: the runs that this sweep shares with it and that have finished are copied from there
jobs     for run: processes at a time, each on its own cores, or GPU; as many as fit unless given
threads  for run: cores and torch threads of each process, 1 unless given
nodes, gpus, tasks, cpus, time   for submit: what each run gets. Nodes (1); GPUs and ranks per node (a rank per GPU, or
         1); cores per rank; the limit after which a run saves and queues again, as sbatch takes it: 4:00:00
concurrency   for submit: runs at a time, 8 unless given
mfu, tflops   for plan: the share of a device's peak that is reached, and that peak; without them hours are estimated
         from the runs that have finished
others   overrides for every run, for example trainer.steps=20 data.dir=data/other

Ctrl-C lets the runs save and end; the same command continues them. A run is known by the hash of its resolved config:
completed and diverged runs are never repeated, also after the sweep file has grown. The exit code is 0 when every run
completed, diverged or was stopped by the file's rule, 1 when some failed or still end, 2 for a mistake in the command
or a file, or a cluster that does not answer. In a job, slurm/sweep.sbatch calls `task file=... index=...` to train one
run of a file.
"""

import json
import math
import re
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quack_lm.errors import UserError, printable
from quack_lm.report import collected, runs, status
from quack_lm.sweep import cluster, cost, file, local
from quack_lm.sweep.cell import reuse, shell_line
from quack_lm.sweep.plan import PLAN_FILE, Plan, make_cells, read_plan, write_plan

VERBS = ("plan", "run", "resume", "submit", "status", "cancel", "collect", "task")
# Keys that one verb alone takes: elsewhere they would have no effect, silently.
COUNTS: dict[str, tuple[str, ...]] = {"jobs": ("plan", "run", "resume"), "threads": ("plan", "run", "resume")}
COUNTS |= dict.fromkeys(("nodes", "gpus", "tasks", "cpus", "concurrency"), ("submit",))
TIME = r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}"


@dataclass
class Command:
    """The command line, taken apart."""

    arguments: list[str]
    verb: str = "run"
    sweep: str | None = None
    scale: str | None = None
    directory: Path | None = None
    out: Path | None = None
    reuse: list[Path] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    time: str | None = None
    file: Path | None = None
    index: int = 0
    mfu: float | None = None
    tflops: float | None = None
    overrides: list[str] = field(default_factory=list)

    @property
    def jobs(self) -> int | None:
        return self.counts.get("jobs")

    @property
    def threads(self) -> int:
        return self.counts.get("threads", 1)

    @property
    def resources(self) -> cluster.Resources:
        given = {key: self.counts[key] for key in ("nodes", "gpus", "tasks", "cpus") if key in self.counts}
        return cluster.Resources(time=self.time, **given)


def parse(arguments: list[str]) -> Command:
    command = Command(list(arguments))
    if arguments and "=" not in arguments[0]:
        command.verb, *arguments = arguments
        if command.verb not in VERBS:
            raise UserError(f"unknown verb {command.verb}; choices: {', '.join(VERBS)}")
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise UserError(f"cannot read {argument}; after the verb come key=value pairs, see --help")
        if key in ("sweep", "scale"):
            setattr(command, key, value)
        elif key == "dir":
            command.directory = Path(value)
        elif key == "out":
            if command.verb != "collect":
                raise UserError(f"{argument} has no meaning for {command.verb}, only for collect")
            command.out = Path(value)
        elif key == "reuse":
            if not (Path(value) / PLAN_FILE).is_file():
                raise UserError(f"reuse={value} is no sweep directory: it has no {PLAN_FILE}")
            command.reuse.append(Path(value))
        elif key in COUNTS:
            if command.verb not in COUNTS[key]:
                raise UserError(f"{argument} has no meaning for {command.verb}, only for {', '.join(COUNTS[key])}")
            command.counts[key] = _whole(key, value)
        elif key == "time" and command.verb == "submit":
            if not re.fullmatch(TIME, value):
                raise UserError(f"time={value} must be a time limit as sbatch takes it, for example 4:00:00 or 1-12:00")
            command.time = value
        elif key == "file" and command.verb == "task":
            command.file = Path(value)
        elif key == "index" and command.verb == "task":
            command.index = _index(value)
        elif key in ("mfu", "tflops"):
            setattr(command, key, _positive(key, value))
        else:
            command.overrides.append(argument)
    if (command.mfu is None) != (command.tflops is None):
        raise UserError("mfu=... and tflops=... go together, for example mfu=0.4 tflops=989")
    if command.directory is None and command.sweep is not None:
        is_path = command.sweep.endswith((".yaml", ".yml"))
        name = Path(command.sweep).stem if is_path else command.sweep
        command.directory = Path("runs") / (f"{name}-{command.scale}" if command.scale else name)
    return command


def _whole(key: str, value: str) -> int:
    if not value.isdecimal() or len(value) > 4 or int(value) == 0:
        raise UserError(f"{key}={value} must be a whole number from 1 to 9999")
    return int(value)


def _index(value: str) -> int:
    if not value.isdecimal() or len(value) > 9:
        raise UserError(f"index={value} must be a whole number, SLURM_ARRAY_TASK_ID in a job array")
    return int(value)


def _positive(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise UserError(f"{key}={value} must be a number above 0")
    return number


def make_plan(command: Command, directory: Path) -> Plan:
    """Expand and check the sweep; writes nothing."""
    if command.sweep is None:
        raise UserError("sweep=... is missing: the name of a file in configs/sweep/, for example sweep=quickstart")
    loaded = file.load(command.sweep, command.scale)
    return Plan(
        sweep=loaded.name,
        question=loaded.question,
        command=shell_line(["quack-lm", "sweep", *command.arguments]),
        cells=make_cells(loaded, directory, command.overrides),
        stop=loaded.stop,
    )


def print_plan(plan: Plan, command: Command) -> None:
    print(*map(printable, plan.question.splitlines()), sep="\n", end="\n\n")
    for cell in plan.cells:
        print(f"{cell.run_dir.status():11} {cell.command()}")
    unfinished = sum(not cell.is_finished() for cell in plan.cells)
    assumed = cost.Speed(mfu=command.mfu, tflops=command.tflops) if command.mfu and command.tflops else None
    total = cost.estimate(plan.cells, cost.count_flops(plan.cells, _flops_per_token), assumed)
    print(f"\n{len(plan.cells)} runs, {unfinished} unfinished; {total.tokens:.3g} tokens, {total.flops:.3g} FLOPs")
    if total.hours is None or total.hours_left is None:
        print("hours: unknown before a run has finished; mfu=0.4 tflops=989 would assume a speed")
    else:
        basis = f"MFU {command.mfu:g} of {command.tflops:g} TFLOP/s" if assumed else "the speed of the runs so far"
        # An assumed device is another machine's: how many runs fit on this one says nothing there.
        jobs = command.jobs or (1 if assumed else local.default_jobs(command.threads))
        left = f"{total.hours_left:.3g} left" + (
            f", {total.hours_left / jobs:.3g} with jobs={jobs}" if jobs > 1 else ""
        )
        print(f"device-hours: {total.hours:.3g} in all, {left} (at {basis}, without the start of each run)")
    if plan.stop:
        print(f"stop rule: {plan.stop}")


def _flops_per_token(config: dict[str, Any]) -> float:
    from quack_lm.training.build import make_model  # late: status and collect need no torch
    from quack_lm.training.flops import flops_per_token

    return flops_per_token(make_model(config), config["trainer"]["seq_len"])


def submit(plan: Plan, command: Command, directory: Path) -> int:
    _check_data(plan)
    take_over(plan, command)
    done = cluster.submit(directory, plan, command.resources, concurrency=command.counts.get("concurrency", 8))
    for job in done.jobs:
        print(f"submitted job {job.job}: {job.n_cells} runs")
    now, ending = sum(job.n_cells for job in done.jobs), len(done.still_ending)
    before = len(plan.cells) - now - ending
    print(f"{len(plan.cells)} runs: {before} finished, running or queued before, {now} submitted now")
    print(f"quack-lm sweep status {shlex.quote(f'dir={directory}')}")
    if ending:
        names = ", ".join(cell.name for cell in done.still_ending)
        print(f"{ending} still ending, submit again in a moment: {names}", file=sys.stderr)
    return 1 if ending else 0


def cancel(directory: Path) -> int:
    if not cluster.was_submitted(directory):
        read_plan(directory)  # says so where this is no sweep at all
        print("no job of this sweep is in the queue")
        return 0
    jobs = cluster.cancel(directory)
    if not jobs:
        print("no job of this sweep is in the queue")
        return 0
    print(f"canceled {_listed(jobs)}; waiting up to {cluster.CANCEL_WAIT_S:g} s for runs to save and end", flush=True)
    if left := cluster.wait_for_end(directory):
        print(f"{_listed(left)} still ending: wait with submit until status shows no more of it", file=sys.stderr)
    return 1 if left else 0


def _listed(jobs: list[int]) -> str:
    return ", ".join(f"job {job}" for job in jobs)


def _check_data(plan: Plan) -> None:
    """That each data set of the sweep is there, before a queue is waited in; the jobs read its bytes."""
    from quack_lm.config import instantiate
    from quack_lm.training.build import open_data  # late: status and collect need no torch

    for data, size in {(json.dumps(c.config["data"]), c.config["model"]["vocab_size"]) for c in plan.cells}:
        open_data(instantiate(json.loads(data)), size)


def show_status(plan: Plan, directory: Path) -> None:
    """What the run directories say, and slurm; the former also where the latter does not answer."""
    if not cluster.was_submitted(directory):
        print(status.status_table(plan.cells))
        return
    try:
        tasks = cluster.tasks_of(directory)
    except UserError:
        print(status.status_table(plan.cells))
        raise
    print(status.status_table(plan.cells, tasks))


def take_over(plan: Plan, command: Command) -> None:
    for other in command.reuse:
        print(f"{len(reuse(plan.cells, other))} runs reused from {other}")


def train(plan: Plan, command: Command, directory: Path) -> int:
    take_over(plan, command)
    outcome = local.run(plan.cells, stop=plan.stop, jobs=command.jobs, threads=command.threads)
    print(runs.as_text(collected.load(directory)))
    if outcome.signal:
        print("stopped; the same command continues", file=sys.stderr)
    for cell in outcome.failed:
        print(f"failed: {cell.name}; its log is {cell.run_dir.log_file}", file=sys.stderr)
    return outcome.exit_code


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    command = parse(arguments)
    if command.verb == "task":
        if command.file is None:
            raise UserError("file=... is missing: a file that submit wrote, with index=... for the run in it")
        cluster.run_task(command.file, command.index)
    directory = command.directory
    if directory is None:
        raise UserError("say which sweep: sweep=quickstart, or dir=... for status, cancel and collect; see --help")
    if command.verb == "status":
        show_status(read_plan(directory), directory)
    elif command.verb == "cancel":
        return cancel(directory)
    elif command.verb == "collect":
        for path in collected.write(directory, command.out):
            print(path)
    else:
        plan = make_plan(command, directory)
        if command.verb == "submit":
            return submit(plan, command, directory)
        write_plan(directory, plan)
        if command.verb == "plan":
            print_plan(plan, command)
        else:
            return train(plan, command, directory)
    return 0
