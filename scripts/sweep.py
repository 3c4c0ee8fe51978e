"""Train every run of a sweep file and compare them.

    python scripts/sweep.py [plan|run|resume|status|collect] sweep=NAME [scale=SCALE] [key=value ...]

plan     compose and check every run, write plan.json, print the runs and what they cost; trains nothing
run      plan, then train what is unfinished, jobs at a time, and print the comparison table (the default)
resume   the same as run
status   print how far each run of a sweep directory is
collect  write results.parquet, results.csv and curves.parquet: all that scripts/report.py needs, in a few files, beside
         the runs or in out=DIR

sweep    a file of configs/sweep/ by name, or a path that ends in .yaml
scale    one of the file's scales, for example proxy or 1b, where it has some
dir      where the runs go, runs/<sweep>-<scale> unless given; alone it is enough for status and collect
reuse    another sweep's directory: the runs that this sweep shares with it and that have finished are copied from there
jobs     processes at a time, each on its own cores, or GPU; as many as fit unless given
threads  cores and torch threads of each process, 1 unless given
mfu, tflops   for plan: the share of a device's peak that is reached, and that peak; without them hours are estimated
         from the runs that have finished
others   overrides for every run, for example trainer.steps=20 data.dir=data/other

Ctrl-C lets the runs save and end; the same command continues them. A run is known by the hash of its resolved config:
completed and diverged runs are never repeated, also after the sweep file has grown. The exit code is 0 when every run
completed, diverged or was stopped by the file's rule, 1 when some failed, 2 for a mistake in the command or a file.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quack_lm.errors import UserError, exit_on_user_error
from quack_lm.report import collected, progress, runs
from quack_lm.sweep import cost, file, local
from quack_lm.sweep.cell import LOG_FILE, Cell, reuse, shell_line
from quack_lm.sweep.plan import PLAN_FILE, Plan, make_cells, read_plan, write_plan

VERBS = ("plan", "run", "resume", "status", "collect")


@dataclass
class Command:
    """The command line, taken apart."""

    verb: str = "run"
    sweep: str | None = None
    scale: str | None = None
    directory: Path | None = None
    out: Path | None = None
    reuse: list[Path] = field(default_factory=list)
    jobs: int | None = None
    threads: int = 1
    mfu: float | None = None
    tflops: float | None = None
    overrides: list[str] = field(default_factory=list)


def parse(arguments: list[str]) -> Command:
    command = Command()
    if arguments and "=" not in arguments[0]:
        command.verb = arguments.pop(0)
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
            command.out = Path(value)
        elif key == "reuse":
            if not (Path(value) / PLAN_FILE).is_file():
                raise UserError(f"reuse={value} is no sweep directory: it has no {PLAN_FILE}")
            command.reuse.append(Path(value))
        elif key in ("jobs", "threads"):
            setattr(command, key, _whole(key, value))
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


def _positive(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise UserError(f"{key}={value} must be a number above 0")
    return number


def make_plan(command: Command, directory: Path) -> Plan:
    if command.sweep is None:
        raise UserError("sweep=... is missing: the name of a file in configs/sweep/, for example sweep=quickstart")
    loaded = file.load(command.sweep, command.scale)
    plan = Plan(
        sweep=loaded.name,
        question=loaded.question,
        command=shell_line(["python", "scripts/sweep.py", *sys.argv[1:]]),
        cells=make_cells(loaded, directory, command.overrides),
        stop=loaded.stop,
    )
    write_plan(directory, plan)
    return plan


def print_plan(plan: Plan, command: Command) -> None:
    print(plan.question, end="\n\n")
    for cell in plan.cells:
        print(f"{cell.status():11} {cell.command()}")
    unfinished = sum(not cell.is_finished() for cell in plan.cells)
    assumed = cost.Speed(mfu=command.mfu, tflops=command.tflops) if command.mfu and command.tflops else None
    total = cost.estimate(plan.cells, cost.count_flops(plan.cells, _flops_per_token), assumed)
    print(f"\n{len(plan.cells)} runs, {unfinished} unfinished; {total.tokens:.3g} tokens, {total.flops:.3g} FLOPs")
    if total.hours is None or total.hours_left is None:
        print("hours: unknown before a run has finished; mfu=0.4 tflops=989 would assume a speed")
    else:
        basis = f"MFU {command.mfu:g} of {command.tflops:g} TFLOP/s" if assumed else "the speed of the runs so far"
        jobs = command.jobs or local.default_jobs(command.threads)
        left = f"{total.hours_left:.3g} left, {total.hours_left / jobs:.3g} with jobs={jobs}"
        print(f"device-hours: {total.hours:.3g} in all, {left} (at {basis})")
    if plan.stop:
        print(f"stop rule: {plan.stop}")


def _flops_per_token(config: dict[str, Any]) -> float:
    from quack_lm.build import make_model  # late: status and collect need no torch
    from quack_lm.metrics import flops_per_token

    return flops_per_token(make_model(config, backend="eager"), config["trainer"]["seq_len"])


def train(plan: Plan, command: Command, directory: Path) -> int:
    for other in command.reuse:
        print(f"{len(reuse(plan.cells, other))} runs reused from {other}")
    outcome = local.run(plan.cells, stop=plan.stop, jobs=command.jobs, threads=command.threads)
    print(runs.as_text(collected.load(directory)))
    if outcome.signal:
        print("stopped; the same command continues", file=sys.stderr)
    for cell in outcome.failed:
        print(f"failed: {cell.name}; its log is {_log(cell)}", file=sys.stderr)
    return outcome.exit_code


def _log(cell: Cell) -> Path:
    return cell.run_dir / LOG_FILE


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    command = parse(arguments)
    directory = command.directory
    if directory is None:
        raise UserError("say which sweep: sweep=quickstart, or dir=... for status and collect; see --help")
    if command.verb == "status":
        print(progress.status_table(read_plan(directory).cells))
    elif command.verb == "collect":
        for path in collected.write(directory, command.out):
            print(path)
    elif command.verb == "plan":
        print_plan(make_plan(command, directory), command)
    else:
        return train(make_plan(command, directory), command, directory)
    return 0


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(sys.argv[1:]))
