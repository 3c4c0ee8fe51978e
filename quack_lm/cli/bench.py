"""Compare the speed of training steps: variants in turn, in a random order, and their ratios in each round.

    quack-lm bench suite=stabilizers                                    # on this machine, with a small model
    quack-lm bench suite=stabilizers attention=mla trainer.precision=bfloat16
    quack-lm bench suite=stabilizers experiment=paper trainer.compile=true     # needs: GPU. The paper's model and step

Suites:
{suites}

suite=NAME     what is compared
rounds=10      how often each variant has its turn; a ratio has an interval from six rounds on
steps=3        steps of a turn
warmup=3       steps of each variant before the first round: caches, compilation, and its peak memory
               (loader, probe and checkpoint: 8 rounds of 50 steps, whole intervals; ranks: 8 rounds; scaling: 8
               rounds of 1 step behind 1; decode: 8 steps)
out=FILE       a line of JSON for each turn, runs/bench/<suite>.jsonl unless given
only=A,B       some variants of the suite
trace=FILE     after that, a trace of the first variant's steps for Perfetto or chrome://tracing (FILE.json.gz), and
               the operations that took longest
plot=FILE      suite=decode: decode steps per second against the length of the context; suite=scaling: step time
               against each size (FILE.png or FILE.pdf)

Every other key=value is a setting of all variants, as of quack-lm train; an experiment= or a model= that is given has
its own sizes. Tokens are random, so no data set is needed; with data.mask_documents=true they are documents of 512
tokens on average.
Rounds in which a fixed matrix product between the turns took 1.25 times its median are left out and counted: then
something else ran. Where fewer than three are left, all count, and the table says so. Load that comes and goes within
a turn is not seen, but hardly moves a median and widens the interval.
"""

import json
import math
import os
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from quack_lm.bench import suites
from quack_lm.bench.suites import Suite, Variant
from quack_lm.cli.flags import check_writable
from quack_lm.config import compose, groups, instantiate, take_keys
from quack_lm.errors import UserError, explaining
from quack_lm.files import holding, refuse_other_than_file, user_path, write_atomically, write_together
from quack_lm.report.table import Table, significant
from quack_lm.text import echo
from quack_lm.training.counts import format_count

if TYPE_CHECKING:
    from quack_lm.bench.rounds import Summary, Turn
    from quack_lm.parallel import World

COUNTS = ("rounds", "steps", "warmup")
# The fewest values whose signed ranks say something at 95%.
ROUNDS_OF_AN_INTERVAL = 6
# The suites with a figure.
PLOTTED = ("decode", "scaling")
# The phases of a step, by the header of their column.
PHASES = {
    "data": "data",
    "fwd": "forward",
    "bwd": "backward",
    "optim": "optimizer",
    "stabilizer": "stabilizer",
    "logging": "logging",
    "probe": "probe",
    "checkpoint": "checkpoint",
}
# Settings of a run that a benchmark does not have.
WITHOUT_EFFECT = (
    "run_dir",
    "data.dir",
    "data.dirs",
    "trainer.init_from",
    "trainer.init_stabilizer",
    "trainer.profile",
    "trainer.resume",
)
MIB = 2**20
OWN = ("suite", "out", "only", "trace", "plot", *COUNTS)
# Of the table of `kernels`.
LEGEND = """\
fwd, bwd     kernels that inductor generates for forward and backward of one micro-batch, each as one graph
+fwd, +bwd   how many more than the baseline, per layer
GEMMs        matrix products, which are calls of libraries, as attention is; other: further such calls
B/token      bytes that all but GEMMs and attention read and write at least
stabilizer   operators around the optimizer step, for all layers together and not compiled"""


@dataclass(frozen=True)
class Command:
    """What the command line asks for."""

    suite: str
    counts: dict[str, int]  # rounds, steps, warmup
    out: Path
    trace: Path | None
    plot: Path | None
    variants: dict[str, Variant]
    settings: dict[str, list[str]]  # of each variant, on top of BASE
    configs: dict[str, dict[str, Any]]
    notes: list[str]  # what is left out

    def leave_out(self, device: str) -> None:
        """Drop the variants for which this machine lacks something; a CPU's ranks may share its cores."""
        import torch

        gpus = torch.cuda.device_count() if device == "cuda" else math.inf
        without: dict[str, list[str]] = {}
        for name, variant in list(self.variants.items()):
            if variant.needs_gpu and device == "cpu":
                reason = "no GPU here"
            elif variant.ranks > gpus:
                reason = f"this machine has {gpus} GPUs"
            else:
                is_lowered = self.suite == "kernels"  # by inductor, which asks the compiler what the CPU can do
                reason = "" if variant.decode else _missing(self.configs[name], device, is_compiled=is_lowered)
            if reason:
                without.setdefault(reason, []).append(name)
                del self.variants[name], self.configs[name]
        self.notes.extend(f"{', '.join(names)} left out: {reason}" for reason, names in without.items())
        if not self.variants:
            raise UserError("; ".join(self.notes))


def _missing(config: dict[str, Any], device: str, *, is_compiled: bool) -> str:
    """What a config needs and this machine does not have; empty where there is nothing."""
    from quack_lm.training.build import choose_kernels, make_model
    from quack_lm.training.compilation import check_compiler

    settings, model = instantiate(config["trainer"]), make_model(config)
    try:
        choose_kernels(model, settings, device=device)
        check_compiler(replace(settings, compile=settings.compile or is_compiled), device=device)
    except UserError as error:
        return str(error)
    return ""


def main(arguments: list[str]) -> int:
    """Measure one suite, print its table and write its turns."""
    if {"-h", "--help"} & set(arguments):
        echo(*(__doc__ or "").format(suites="\n".join(map(_listed, suites.SUITES))).splitlines())
        return 0
    command = read(arguments)

    # Imported late: a mistake in the settings need not wait for it.
    from quack_lm.bench.step import check_memory_of_tokens
    from quack_lm.parallel import check_world, launched_world, resolve_device
    from quack_lm.training.build import make_model
    from quack_lm.training.check import check_memory
    from quack_lm.training.process import start_process
    from quack_lm.training.stop_signals import leaving

    device = resolve_device(next(iter(command.configs.values()))["trainer"]["device"])
    check_world(device=device)
    command.leave_out(device)
    trainers = [instantiate(config["trainer"]) for config in command.configs.values()]
    for variant, config, trainer in zip(command.variants.values(), command.configs.values(), trainers, strict=True):
        ranks = variant.ranks or launched_world()[1]
        trainer.check_ranks(ranks)
        model = make_model(config)
        if not variant.decode:
            check_memory(config, model, device=device, ranks_of_a_copy=ranks // trainer.replicas)
            check_memory_of_tokens(config)
    for key, path in (("out", command.out), ("trace", command.trace), ("plot", command.plot)):
        if path:
            check_writable(path, f"{key}={path}")
    for note in command.notes:
        echo(note, err=True)
    world = start_process(trainers, device=device)
    with _writing(command):
        command.out.parent.mkdir(parents=True, exist_ok=True)
        # Beside the result where a variant writes what a run writes: to the disk that this is meant for.
        place = command.out.parent if any(variant.parts for variant in command.variants.values()) else None
        own = tempfile.TemporaryDirectory(dir=place, prefix=".bench_", ignore_cleanup_errors=True)
        lock = command.out.with_name(f".{command.out.name}.lock").open("a") if world.is_main else None
    refusal = f"out={command.out} is being written by another process; choose another"
    with leaving(), holding(lock, refusal) if lock else nullcontext(), own as name:
        directory = Path(world.all_gather(name)[0])  # of the main process
        (count if command.suite == "kernels" else measure)(command, world, directory)
        world.barrier()
    return world.shutdown(0)


def measure(command: Command, world: "World", directory: Path) -> None:
    """Write a line for each turn, those of a round at its end, and print the table."""
    from quack_lm.bench import rounds
    from quack_lm.bench.build import make_step
    from quack_lm.bench.decode import DecodeStep
    from quack_lm.bench.trace import trace
    from quack_lm.training.build import count_flops_per_token
    from quack_lm.training.flops import peak_flops

    makers = {
        name: partial(make_step, variant, command.configs[name], command.settings[name], world, directory / str(number))
        for number, (name, variant) in enumerate(command.variants.items())
    }
    precisions = {config["trainer"]["precision"] for config in command.configs.values()}
    peaks = {precision: peak_flops(world.device, precision) for precision in sorted(precisions)}
    warm = rounds.warm_up(makers, device=world.device, steps=command.counts["warmup"])
    scales = {}
    for name, variant in command.variants.items():
        config = command.configs[name]
        peak = None if variant.decode else peaks[config["trainer"]["precision"]]
        at_peak_s = count_flops_per_token(config) / (peak * (variant.ranks or world.size)) if peak else None
        step, memory_bytes = warm[name]
        cache_bytes = step.cache_bytes if isinstance(step, DecodeStep) else None
        scales[name] = Scale(step.tokens_per_step, at_peak_s, memory_bytes, cache_bytes)

    baselines = suites.baselines(command.variants)

    def write_turns(turns: "Sequence[Turn]") -> None:
        if world.is_main:
            kept = rounds.kept_rounds(turns)
            more = [{"baseline": baselines[turn.variant], "is_kept": turn.round in kept} for turn in turns]
            _write(command, [_line(turn, scales[turn.variant]) | own for turn, own in zip(turns, more, strict=True)])

    turns = rounds.measure(
        {name: one.step for name, one in warm.items()},
        device=world.device,
        rounds=command.counts["rounds"],
        steps=command.counts["steps"],
        after_round=write_turns,
    )
    if world.is_main:
        kept, busy = rounds.kept_rounds(turns), rounds.busy_rounds(turns)
        found = rounds.summarize(baselines, turns, kept)
        has_faults = any(variant.is_isolated for variant in command.variants.values())
        echo(*_table(found, scales, has_faults=has_faults).splitlines(), "")
        is_kept = bool(busy & kept)
        how = (
            "in which the machine was busy, too many to leave out"
            if is_kept
            else "left out because the machine was busy"
        )
        echo(f"{len(kept)} rounds, {len(busy)} {'of them ' * is_kept}{how}; {_machine(world)}")
        if len(kept) < ROUNDS_OF_AN_INTERVAL and len(found) > 1:
            echo(f"no intervals: they need {ROUNDS_OF_AN_INTERVAL} rounds")
        echo(f"each turn is in {command.out}")
        if command.plot:
            _write_plot(command, found, scales)
    if command.trace:
        operations = trace(next(iter(warm.values())).step, command.trace, world)
        if world.is_main:
            echo(*operations)


@dataclass(frozen=True)
class Scale:
    """What makes rates of the time of a variant's step."""

    tokens: int
    at_peak_s: float | None  # the time of a token at the devices' peak, where that is known
    memory_bytes: int
    cache_bytes: int | None = None  # of a token in a layer, at decode

    def tokens_per_s(self, step_s: float) -> float | None:
        """Throughput over all ranks, of steps that have tokens."""
        return self.tokens / step_s if self.tokens else None

    def mfu(self, step_s: float) -> float | None:
        """Model FLOPs utilization."""
        speed = self.tokens_per_s(step_s)
        return speed * self.at_peak_s if speed and self.at_peak_s else None


def _line(turn: "Turn", scale: Scale) -> dict[str, Any]:
    rates = {"tokens_per_s": scale.tokens_per_s(turn.step_s), "mfu": scale.mfu(turn.step_s)}
    return {**asdict(turn), **rates, "memory_bytes": scale.memory_bytes, "cache_bytes": scale.cache_bytes}


def _writing(command: Command) -> AbstractContextManager[None]:
    return explaining(f"out={command.out}", "or choose another")


def _write(command: Command, lines: Sequence[Mapping[str, Any]]) -> None:
    with _writing(command):
        write_atomically(command.out, "".join(json.dumps({"suite": command.suite, **line}) + "\n" for line in lines))


def _write_plot(command: Command, found: "Sequence[Summary]", scales: Mapping[str, Scale]) -> None:
    from quack_lm.bench.plot import decode_plot, scaling_plot
    from quack_lm.report.draw import draw, save

    assert command.plot is not None
    cache_bytes = {name: scale.cache_bytes for name, scale in scales.items() if scale.cache_bytes is not None}
    figure = draw(decode_plot(found, cache_bytes) if cache_bytes else scaling_plot(found))
    with explaining(f"plot={command.plot}", "or choose another"):
        command.plot.parent.mkdir(parents=True, exist_ok=True)
        write_together({command.plot: save(figure, command.plot.suffix.removeprefix("."))})
    echo(f"plot: {command.plot}")


def _machine(world: "World") -> str:
    import torch

    if world.device.type == "cuda":
        return torch.cuda.get_device_name(world.device)
    return f"{len(os.sched_getaffinity(0))} CPU cores, {torch.get_num_threads()} threads here"


def _table(found: "Sequence[Summary]", scales: Mapping[str, Scale], *, has_faults: bool) -> str:
    has_cache = any(scale.cache_bytes is not None for scale in scales.values())
    phases = {short: name for short, name in PHASES.items() if any(name in one.phases_s for one in found)}
    rows = []
    for one in found:
        scale = scales[one.variant]
        speed, mfu = scale.tokens_per_s(one.step_s), scale.mfu(one.step_s)
        own = (significant(1e3 * one.phases_s[name]) if name in one.phases_s else "" for name in phases.values())
        bounds = f" [{one.interval[0]:.3f}, {one.interval[1]:.3f}]" if one.interval else ""
        ratio = f"{one.ratio:.3f}{bounds}" if one.variant != one.baseline else "baseline"
        rows.append(
            (
                one.variant,
                "" if speed is None else format_count(speed),
                "" if mfu is None else f"{100 * mfu:.3g}%",
                *([f"{scale.cache_bytes:,}"] if has_cache else []),
                significant(scale.memory_bytes / MIB),
                *(["" if one.page_faults is None else format_count(one.page_faults)] if has_faults else []),
                significant(1e3 * one.step_s),
                *own,
                ratio,
                f"{one.fastest_ratio:.3f}" if one.variant != one.baseline else "",
            )
        )
    cache, faults = ["cache B"] if has_cache else [], ["faults"] if has_faults else []
    header = ("variant", "tok/s", "MFU", *cache, "MiB", *faults, "ms", *phases, "relative step time", "fastest")
    return Table(header=header, rows=rows, numeric=range(1, len(header))).as_text()


def count(command: Command, world: "World", directory: Path) -> None:
    """Write a line for each variant's kernels, and print the table."""
    from quack_lm.bench.build import make_here
    from quack_lm.bench.kernels import count_kernels, count_stabilizer_calls
    from quack_lm.bench.step import TrainingStep

    if world.size > 1:
        raise UserError("suite=kernels counts in one process; start it without torchrun")
    baselines, lines = suites.baselines(command.variants), dict[str, dict[str, Any]]()
    for name, variant in tqdm(command.variants.items(), disable=None, leave=False):
        config = command.configs[name]
        step: Any = make_here(variant, config, directory, world)
        calls = count_stabilizer_calls(step) if isinstance(step, TrainingStep) else 0
        found = count_kernels(step.loss, step.micro_batch())
        n_tokens = config["trainer"]["micro_batch_size"] * config["trainer"]["seq_len"]
        lines[name] = {
            "variant": name,
            "baseline": baselines[name],
            **found._asdict(),
            "bytes_per_token": found.bytes / n_tokens,
            "stabilizer_calls": calls,
            "n_layers": config["model"]["n_layers"],
        }
    rows = [_kernel_row(name, line, lines[baselines[name]]) for name, line in lines.items()]
    header = ("variant", "fwd", "bwd", "+fwd", "+bwd", "GEMMs", "attention", "other", "B/token", "stabilizer")
    echo(*Table(header=header, rows=rows, numeric=range(1, len(header))).as_text().splitlines(), "")
    echo(*LEGEND.splitlines(), f"inductor for {world.device.type}")
    echo(f"each line is in {command.out}")
    _write(command, list(lines.values()))


def _kernel_row(name: str, line: dict[str, Any], baseline: dict[str, Any]) -> tuple[str, ...]:
    def more(key: str) -> str:
        return "baseline" if line is baseline else f"{(line[key] - baseline[key]) / line['n_layers']:+.3g}"

    counts = ("matrix_products", "attentions", "other_calls")
    return (
        name,
        str(line["forward"]),
        str(line["backward"]),
        more("forward"),
        more("backward"),
        *(str(line[key]) for key in counts),
        format_count(line["bytes_per_token"]),
        str(line["stabilizer_calls"]),
    )


# ------------------------------------------------------------------------------------------------ the command line


def read(arguments: list[str]) -> Command:
    """The command; UserError for a mistake in it."""
    own, overrides = take_keys(arguments, OWN)
    if "suite" not in own:
        raise UserError(f"say what to compare: suite=stabilizers, or one of: {', '.join(suites.SUITES)}")
    suite = suites.suite(own["suite"])
    counts = {name: _count(own, name, getattr(suite, name)) for name in COUNTS}
    variants, notes = _chosen(suite, own.get("only"))
    _refuse_varied(own["suite"], suite.variants, list(variants), overrides)
    base = _base(suite, overrides)
    settings, configs = {}, {}
    for name, variant in variants.items():
        settings[name] = [*variant.settings, *overrides]
        configs[name] = compose([*base, *settings[name]])
        for key, values in (("compile", "true or false"), ("micro_batch_size", "a number")):
            if configs[name]["trainer"][key] == "auto":
                raise UserError(f"trainer.{key}=auto is chosen where a run starts; give {values} here")
        if variant.ranks > 1:
            settings[name] += variant.share_batch(configs[name]["trainer"])
            configs[name] = compose([*base, *settings[name]])
        variant.check_config(name, configs[name])
        variant.check_turn(configs[name], counts["steps"])
    out = user_path(own.get("out", f"runs/bench/{own['suite']}.jsonl"))
    trace = user_path(own["trace"]) if "trace" in own else None
    first = next(iter(variants.values()), None)
    if trace and first and (own["suite"] == "kernels" or first.is_isolated or first.ranks):
        raise UserError(
            f"trace={trace}: suite={own['suite']} has no steps to trace here; trace those of suite=stabilizers"
        )
    if trace and not trace.name.endswith((".json", ".json.gz")):
        raise UserError(f"trace={own['trace']} must name a file that ends in .json or .json.gz")
    plot = user_path(own["plot"]) if "plot" in own else None
    if plot and own["suite"] not in PLOTTED:
        raise UserError(f"plot={own['plot']}: suite={own['suite']} has no figure; {' and '.join(PLOTTED)} have one")
    if plot and plot.suffix not in (".png", ".pdf"):
        raise UserError(f"plot={own['plot']} must name a file that ends in .png or .pdf")
    places: dict[Path, str] = {}
    for key, path in (("out", out), ("trace", trace), ("plot", plot)):
        if path:
            refuse_other_than_file(f"{key}={path}", path)
            if (other := places.setdefault(path.absolute(), key)) != key:
                raise UserError(f"{key}={path} is the file of {other}=, too; choose another")
    return Command(own["suite"], counts, out, trace, plot, variants, settings, configs, notes)


def _refuse_varied(
    suite: str, variants: Mapping[str, Variant], chosen: Sequence[str], overrides: Sequence[str]
) -> None:
    """UserError where a setting is one in which the variants of the suite differ, or a choice that it makes, and is not
    that of those that are chosen; or one that no benchmark looks at."""
    own = {name: dict(setting.split("=", 1) for setting in one.settings) for name, one in variants.items()}
    for key, _, value in (override.lstrip("+").partition("=") for override in overrides):
        if key in WITHOUT_EFFECT or key.startswith("eval."):
            raise UserError(f"{key} has no effect: a benchmark makes steps on random tokens; leave it out")
        if {own[name].get(key) for name in chosen} == {value}:
            continue
        values = {settings.get(key) for settings in own.values()}
        if len(values) > 1 or (key in groups() and values - {None, value}):
            raise UserError(f"{key} is what suite={suite} sets; leave it out, or measure one config with suite=step")


def _base(suite: Suite, overrides: Sequence[str]) -> list[str]:
    """The suite's own settings, but for the sizes of a model or an experiment that is chosen: single keys would win."""
    chosen = {override.lstrip("+").partition("=")[0] for override in overrides}
    if "experiment" in chosen:
        return [setting for setting in suite.base if setting.startswith("trainer.compile=")]
    return [setting for setting in suite.base if not ("model" in chosen and setting.startswith("model."))]


def _chosen(suite: Suite, only: str | None) -> tuple[dict[str, Variant], list[str]]:
    """The variants that are asked for and can be had here, and what is left out."""
    named = list(suite.variants) if only is None else only.split(",")
    if unknown := [name for name in named if name not in suite.variants]:
        raise UserError(f"only={only}: the suite has no '{unknown[0]}'; it has: {', '.join(suite.variants)}")
    variants = {name: suite.variants[name] for name in named}
    missing = {name: one.package for name, one in variants.items() if one.package and not find_spec(one.package)}
    notes = [f"{name} is left out, for {package} is missing: {suites.INSTALL}" for name, package in missing.items()]
    if only and notes:
        raise UserError(f"only={only}: {notes[0]}")
    for name, one in variants.items():
        if len(variants) > 1 and one.baseline and one.baseline not in variants:
            raise UserError(f"only={only}: {name} is relative to {one.baseline}; name that, too")
    return {name: one for name, one in variants.items() if name not in missing}, notes


def _count(own: dict[str, str], name: str, default: int) -> int:
    value = own.get(name, str(default))
    if not value.isdecimal() or not 1 <= int(value[:9]) <= 9999:
        raise UserError(f"{name}={value} must be an integer from 1 to 9999")
    return int(value)


def _listed(name: str) -> str:
    variants = ", ".join(suites.SUITES[name].variants)
    return textwrap.fill(f"{name:14}{variants}", width=118, initial_indent="    ", subsequent_indent=" " * 18)
