"""Compare the speed of training steps: variants in turn, in a random order, and their ratios in each round.

    quack-lm bench suite=stabilizers                                    # on this machine, with a small model
    quack-lm bench suite=stabilizers attention=mla trainer.precision=bfloat16
    quack-lm bench suite=compile model=1b attention=mha trainer.micro_batch_size=4 trainer.seq_len=2048   # needs: GPU

Suites: {suites}

suite=NAME     what is compared
rounds=10      how often each variant has its turn; a ratio has an interval from two rounds on
steps=3        steps of a turn
warmup=3       steps of each variant before the first round: caches, and compilation
out=FILE       a line of JSON for each turn, runs/bench/<suite>.jsonl unless given
only=A,B       some variants of the suite

Every other key=value is a setting of all variants, as of quack-lm train. Tokens are random, so no data set is needed.
Rounds in which a fixed matrix product between the turns took 1.25 times its median are left out and counted: then
something else ran.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from quack_lm.bench import suites
from quack_lm.config import compose, unknown_flag
from quack_lm.errors import UserError, explaining
from quack_lm.files import user_path, write_atomically
from quack_lm.report.table import NO_NUMBER, Table, significant
from quack_lm.text import echo

if TYPE_CHECKING:
    from quack_lm.bench.rounds import Summary

DEFAULTS = {"rounds": 10, "steps": 3, "warmup": 3}
PHASES = ("forward", "backward", "optimizer", "stabilizer")


def main(arguments: list[str]) -> int:
    """Measure one suite, print its table and write its turns."""
    if {"-h", "--help"} & set(arguments):
        echo(*(__doc__ or "").format(suites=", ".join(suites.SUITES)).splitlines())
        return 0
    own, configs = read(arguments)

    # Imported late: a mistake in the settings need not wait for it.
    from quack_lm.bench import rounds
    from quack_lm.bench.peers import make_step
    from quack_lm.parallel import default_device, launched_world, start_world
    from quack_lm.training.memory import keep_freed_memory
    from quack_lm.training.numerics import set_numerics

    counts = {name: _count(own, name) for name in DEFAULTS}
    trainers = [config["trainer"] for config in configs.values()]
    device = default_device() if trainers[0]["device"] == "auto" else trainers[0]["device"]
    if device == "cpu":
        keep_freed_memory()
    set_numerics(is_deterministic=trainers[0]["deterministic"])
    # As in training: in bfloat16 also a single process is wrapped.
    is_wrapped = launched_world()[1] > 1 or any(trainer["precision"] != "float32" for trainer in trainers)
    world = start_world(device=device, is_wrapped=is_wrapped)
    steps = {name: make_step(name, config, world) for name, config in configs.items()}
    turns = rounds.measure(steps, device=world.device, **counts)
    kept = rounds.quiet_rounds(turns)
    if world.is_main:
        found = rounds.summarize(suites.baselines(list(steps)), turns, kept)
        echo(*_table(found, {name: step.tokens_per_step for name, step in steps.items()}).splitlines(), "")
        path = user_path(own.get("out", f"runs/bench/{own['suite']}.jsonl"))
        lines = [{"suite": own["suite"], **asdict(turn), "is_kept": turn.round in kept} for turn in turns]
        with explaining(f"out={path}", "or choose another"):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        left_out = counts["rounds"] - len(kept)
        echo(f"{len(kept)} rounds, {left_out} left out because the machine was busy; each turn is in {path}")
    return world.shutdown(0)


def _table(found: "Sequence[Summary]", tokens_per_step: Mapping[str, int]) -> str:
    rows = []
    for one in found:
        phases = (f"{1e3 * one.phases_s.get(name, 0.0):.3g}" for name in PHASES)
        bounds = f" [{one.interval[0]:.3f}, {one.interval[1]:.3f}]" if one.interval else ""
        speed = significant(tokens_per_step[one.variant] / one.step_s)
        ratio = f"{one.ratio:.3f}{bounds}" if one.variant != one.baseline else NO_NUMBER
        rows.append((one.variant, speed, f"{1e3 * one.step_s:.4g}", *phases, ratio, one.baseline))
    header = ("variant", "tok/s", "step, ms", *PHASES, "step time", "relative to")
    return Table(header=header, rows=rows, numeric=range(1, 8)).as_text()


def read(arguments: list[str]) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
    """The keys of the benchmark itself, and the config of each variant."""
    own, overrides = _split(arguments)
    if "suite" not in own:
        raise UserError(f"say what to compare: suite=stabilizers, or one of: {', '.join(suites.SUITES)}")
    variants = dict(suites.variants(own["suite"]))
    if "only" in own:
        wanted = own["only"].split(",")
        if unknown := [name for name in wanted if name not in variants]:
            raise UserError(f"only={own['only']}: the suite has no {unknown[0]}; it has: {', '.join(variants)}")
        variants = {name: variants[name] for name in wanted}
    return own, {name: compose([*suites.BASE, *settings, *overrides]) for name, settings in variants.items()}


def _split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    own, overrides = {}, []
    for argument in arguments:
        if argument.startswith("-"):
            raise UserError(unknown_flag(argument, []))
        name, _, value = argument.partition("=")
        if name in ("suite", "out", "only", *DEFAULTS):
            own[name] = value
        else:
            overrides.append(argument)
    return own, overrides


def _count(own: dict[str, str], name: str) -> int:
    value = own.get(name, str(DEFAULTS[name]))
    if not value.isdecimal() or not 1 <= int(value[:9]) <= 9999:
        raise UserError(f"{name}={value} must be an integer from 1 to 9999")
    return int(value)
