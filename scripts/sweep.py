"""Train every run of a sweep file and compare them.

    python scripts/sweep.py [plan|run|status] sweep=NAME [dir=runs/NAME] [jobs=2] [threads=1] [key=value ...]

plan     compose and check every run, write plan.json and print the runs; trains nothing
run      plan, then train what is unfinished, jobs at a time, and print the comparison table (the default)
status   print the table of a sweep directory as it is now

sweep    a file of configs/sweep/ by name, or a path that ends in .yaml
dir      where the runs go, runs/<sweep> unless given; its name is all that status needs
jobs     processes at a time, each on its own cores; as many as fit unless given
threads  cores and torch threads of each process, 1 unless given
others   overrides for every run, for example trainer.steps=20 data.dir=data/other

Ctrl-C lets the runs save and end; the same command continues them. A run is known by the hash of its resolved config:
completed and diverged runs are never repeated, also after the sweep file has grown. The exit code is 0 when every run
completed or diverged, 1 when some failed, 2 for a mistake in the command or a file.
"""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

from quack_lm import sweep
from quack_lm.errors import UserError, exit_on_user_error
from quack_lm.report import results, table

VERBS = ("plan", "run", "status")


@dataclass
class Command:
    """The command line, taken apart."""

    verb: str = "run"
    sweep: str | None = None
    directory: Path | None = None
    jobs: int | None = None
    threads: int = 1
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
        if key == "sweep":
            command.sweep = value
        elif key == "dir":
            command.directory = Path(value)
        elif key == "jobs":
            command.jobs = _positive(key, value)
        elif key == "threads":
            command.threads = _positive(key, value)
        else:
            command.overrides.append(argument)
    if command.directory is None and command.sweep is not None:
        is_path = command.sweep.endswith((".yaml", ".yml"))
        command.directory = Path("runs") / (Path(command.sweep).stem if is_path else command.sweep)
    return command


def _positive(key: str, value: str) -> int:
    if not value.isdecimal() or int(value) == 0:
        raise UserError(f"{key}={value} must be a whole number of at least 1")
    return int(value)


def make_plan(command: Command, directory: Path) -> sweep.Plan:
    if command.sweep is None:
        raise UserError("sweep=... is missing: the name of a file in configs/sweep/, for example sweep=quickstart")
    loaded = sweep.load(command.sweep)
    plan = sweep.Plan(
        sweep=loaded.name,
        question=loaded.question,
        command=shlex.join(["python", "scripts/sweep.py", *sys.argv[1:]]),
        cells=sweep.plan(loaded, directory, command.overrides),
    )
    sweep.write_plan(directory, plan)
    return plan


def print_plan(plan: sweep.Plan) -> None:
    print(plan.question, end="\n\n")
    for cell in plan.cells:
        print(f"{cell.status():11} {cell.command()}")
    steps, tokens = sum(c.total_steps for c in plan.cells), sum(c.total_tokens for c in plan.cells)
    unfinished = sum(not cell.is_finished() for cell in plan.cells)
    print(f"\n{len(plan.cells)} runs, {unfinished} unfinished; {steps} steps, {tokens / 1e6:.1f} million tokens in all")


def main(arguments: list[str]) -> int:
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    command = parse(arguments)
    if command.directory is None:
        raise UserError("say which sweep: sweep=quickstart, or dir=... for status; see --help")
    if command.verb == "status":
        print(table.as_text(results.load(command.directory)))
        return 0
    plan = make_plan(command, command.directory)
    if command.verb == "plan":
        print_plan(plan)
        return 0
    outcome = sweep.run(plan.cells, jobs=command.jobs, threads=command.threads)
    print(table.as_text(results.load(command.directory)))
    if outcome.signal:
        print("stopped; the same command continues", file=sys.stderr)
    for cell in outcome.failed:
        print(f"failed: {cell.name}; its log is {cell.run_dir / sweep.LOG_FILE}", file=sys.stderr)
    return outcome.exit_code


if __name__ == "__main__":
    with exit_on_user_error():
        sys.exit(main(sys.argv[1:]))
