"""Plan a run or a sweep without its hardware: parameters, FLOPs, memory, communication, time.

    quack-lm plan experiment=paper attention=mla stabilizer=quack world_size=4 card=GH200 mfu=0.4
    quack-lm plan sweep=paper/fig2 scale=1b world_size=4 card=GH200 mfu=0.4
    quack-lm plan experiment=paper attention=mha,mla mfu=runs/mine card=H100     # the MFU that a run has measured
    quack-lm plan measure=true sweep=memory                                      # beside what two steps take here

world_size=1      ranks of a run, each with a card
card=NAME         a GPU by its name or a part of it: H100, H200 NVL, 'A100 80GB PCIe'
mfu=0.4           assumed share of the card's peak, or the directory of a run that has measured its own
sweep=, scale=    plan every run of a sweep, as quack-lm sweep does; so do several values of a key
measure=true      make two steps of each config on this machine, and print planned beside measured memory

Every other key=value is a setting, as of quack-lm train. No data set is needed. Memory is that of rank 0, which has the
largest part, at the peak of a step: the step itself is made, on tensors without memory, and every storage counted. A
card's context, its libraries, temporaries of its kernels and fragments come on top: a step fits where it takes at most
90% of the card's memory. Compilation is not planned; it saves activations. FLOPs count attention over all pairs of
positions, as MFU does everywhere here, and no recomputation.
"""

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from quack_lm.cli import sweep as sweep_command
from quack_lm.config import choice, compose, instantiate, split_axes, take_keys
from quack_lm.errors import UserError
from quack_lm.files import metrics_line, user_path
from quack_lm.report.table import NO_NUMBER, Table, count, significant
from quack_lm.sweep import cost
from quack_lm.sweep.label import describe_differences
from quack_lm.text import echo
from quack_lm.training.accelerators import Accelerator, named_accelerator
from quack_lm.training.run_dir import RunDir, lines_backwards

if TYPE_CHECKING:
    from quack_lm.sweep.cell import Cell
    from quack_lm.training.settings import TrainerSettings
    from quack_lm.training.step_memory import StepMemory

OWN = ("world_size", "card", "mfu", "measure")
MIB, GIB = 2**20, 2**30
LEAST_CHUNK = 1024  # of the loss, in tokens: fewer save little
CHECKPOINTING: Mapping[str, Any] = {"keep all": False, "selective": "selective", "recompute all": True}


@dataclass(frozen=True)
class Setting:
    """Where the runs are to be made; None for what is not said."""

    world_size: int
    card: str | None
    accelerator: Accelerator | None
    mfu: float | None

    @property
    def speed(self) -> cost.Speed | None:
        """Of all cards of a run together."""
        if self.mfu is None or self.accelerator is None:
            return None
        return cost.Speed(mfu=self.mfu, tflops=self.accelerator.tflops * self.world_size)

    def check(self, settings: "TrainerSettings") -> None:
        """UserError where the ranks cannot share the batch, or a number would follow from what is not known."""
        settings.check_ranks(self.world_size)
        if self.card and settings.device == "cpu":
            raise UserError(f"trainer.device=cpu: card={self.card} is a GPU; leave one of them out")
        if settings.micro_batch_size == "auto" and not self.accelerator:
            raise UserError("trainer.micro_batch_size=auto needs a card=NAME, whose memory decides")
        if self.speed and settings.precision != "bfloat16":
            raise UserError(
                f"mfu={self.mfu:g} is a share of a card's peak, which is known for trainer.precision=bfloat16, not for "
                f"{settings.precision}; set that, or leave mfu out"
            )

    def tokens_per_s(self, flops_per_token: float) -> float | None:
        """Of a run."""
        return self.speed.mfu * self.speed.tflops * 1e12 / flops_per_token if self.speed else None

    @property
    def budget(self) -> float | None:
        """The bytes that a step may take on a card."""
        from quack_lm.training.step_memory import SHARE_OF_MEMORY

        return SHARE_OF_MEMORY["cuda"] * self.accelerator.memory_gib * GIB if self.accelerator else None


def main(arguments: list[str]) -> int:
    """Print the plan of a run or of a sweep."""
    if {"-h", "--help"} & set(arguments):
        echo(*(__doc__ or "").splitlines())
        return 0
    own, rest = take_keys(arguments, OWN)
    setting, is_measured = read(own), own.get("measure") == "true"
    if is_measured and len(own) > 1:
        key = next(key for key in own if key != "measure")
        raise UserError(
            f"{key}={own[key]}: measure=true measures on the ranks that torchrun starts here; leave {key} out"
        )
    if any(argument.startswith("sweep=") for argument in rest) or split_axes(rest)[1]:
        command = sweep_command.parse(["plan", *rest])
        cells = sweep_command.make_plan(command, command.directory).cells
        if is_measured:
            return measure([cell.config for cell in cells])
        plan_sweep(cells, setting)
        return 0
    config = compose(rest)
    if is_measured:
        return measure([config])
    plan_run(config, setting)
    return 0


def read(own: Mapping[str, str]) -> Setting:
    """Where the runs are to be made; UserError for what cannot be."""
    if own.get("measure", "false") not in ("true", "false"):
        raise UserError(f"measure={own['measure']} must be true or false")
    ranks = own.get("world_size", "1")
    if not ranks.isdecimal() or not 1 <= int(ranks[:9]) <= 99_999:
        raise UserError(f"world_size={ranks} must be an integer from 1 to 99999")
    card, accelerator = named_accelerator(own["card"]) if "card" in own else (None, None)
    return Setting(int(ranks), card, accelerator, read_mfu(own["mfu"]) if "mfu" in own else None)


def read_mfu(text: str) -> float:
    """A number, or the median that the run in a directory has logged."""
    try:
        mfu = float(text)
    except ValueError:
        run_dir = RunDir(user_path(text))
        path = run_dir.metrics_file
        if not path.is_file():
            raise UserError(f"mfu={text} must be a share of the peak, as 0.4, or the directory of a run") from None
        if run_dir.environment().get("device_type") != "cuda":
            raise UserError(f"mfu={text}: the run there did not train on a GPU; give a number") from None
        logged = [found for line in lines_backwards(path) if (found := metrics_line(line).get("throughput/mfu"))]
        if not logged:
            raise UserError(f"mfu={text}: the run there has logged no throughput/mfu; give a number") from None
        return statistics.median(logged)
    if not 0 < mfu <= 1:
        raise UserError(f"mfu={text} must be above 0 and at most 1")
    return mfu


# ------------------------------------------------------------------------------------------------ one run


def plan_run(config: dict[str, Any], setting: Setting) -> None:
    """Print everything about one run."""
    from quack_lm.model import count_parameters
    from quack_lm.training.build import count_attention_flops_per_token, count_flops_per_token, make_model

    settings: TrainerSettings = instantiate(config["trainer"])
    setting.check(settings)
    flops, in_attention = count_flops_per_token(config), count_attention_flops_per_token(config)
    step_tokens = settings.global_batch_size * settings.seq_len
    parameters = count_parameters(make_model(config))["total"]
    settings, total, memory = _memory(config, settings, setting)
    echo(
        f"attention={choice(config['attention'])} stabilizer={choice(config['stabilizer'])}, {settings.precision}, "
        f"{setting.world_size} x {setting.card or 'an unnamed device'}",
        "",
        f"parameters      {parameters:,} ({count(parameters)})",
        f"FLOPs           {flops:.4g} per token; {in_attention / flops:.0%} of them pair positions, all with all: "
        f"{flops - in_attention / 2:.4g} with the causal half",
        f"step            {settings.global_batch_size} sequences of {settings.seq_len} tokens: {count(step_tokens)} "
        f"tokens, {flops * step_tokens:.3g} FLOPs",
    )
    echo("", *memory)
    traffic = _traffic(config, settings, setting.world_size)
    kinds = ", ".join(f"{kind} {n_bytes / GIB:.3g}" for kind, n_bytes in traffic.items() if n_bytes)
    echo(f"communication   GiB sent by a rank in a step: {kinds or 'none'}")
    if setting.budget and total > setting.budget:
        echo(f"time            none: a step takes {total / GIB:.1f} GiB, and may take {setting.budget / GIB:.1f}")
        return
    speed = setting.tokens_per_s(flops)
    if speed is None:
        echo("time            unknown without card=GH200 and mfu=0.4, or mfu=DIRECTORY of a run")
        return
    hours = settings.steps * step_tokens / speed / 3600
    sent = sum(traffic.values()) / (step_tokens / speed) / 1e9
    echo(
        f"time            {count(speed)} tokens/s at an MFU of {setting.mfu:.3g}: {step_tokens / speed:.3g} s a step, "
        f"in which a rank sends {sent:.3g} GB/s",
        f"                {hours:.3g} hours for {settings.steps} steps, {hours * setting.world_size:.3g} card-hours, "
        "without validation, probes and checkpoints",
    )


def _memory(
    config: dict[str, Any], settings: "TrainerSettings", setting: Setting
) -> "tuple[TrainerSettings, int, list[str]]":
    """The settings, with the micro-batch of the table; the bytes of their step; the table and what fits, as lines."""
    from quack_lm.training.step_memory import CATEGORIES, fake_step

    with fake_step(config, world_size=setting.world_size, device=_device(config)) as step:
        budget, own = setting.budget, settings.activation_checkpointing
        largest = {name: step.largest_micro_batch(budget, way) for name, way in CHECKPOINTING.items()} if budget else {}
        if settings.micro_batch_size == "auto":
            chosen = largest[next(name for name, way in CHECKPOINTING.items() if way == own)]
            settings = replace(settings, micro_batch_size=chosen[0] if chosen else 1)
        size = settings.sequences_at_once
        taken = {
            name: step.memory(micro_batch_size=size, activation_checkpointing=way)
            for name, way in CHECKPOINTING.items()
        }
    unit, in_unit = _unit(one.total for one in taken.values())
    rows = [(part, *(in_unit(one.parts.get(part, 0)) for one in taken.values())) for part in CATEGORIES]
    rows.append(("total", *(in_unit(one.total) for one in taken.values())))
    rows.append(("kept by a probe beside it", *[in_unit(step.probe_bytes)] * len(taken)))
    if budget:
        rows.append((f"largest micro-batch in {budget / GIB:.1f} GiB", *(_size(found) for found in largest.values())))
        rows.append(("its total", *(in_unit(found[1].total) if found else NO_NUMBER for found in largest.values())))
    header = (f"{unit} of a rank, micro-batch {size}", *CHECKPOINTING)
    lines = [*Table(header=header, rows=rows, numeric=range(1, 4)).as_text().splitlines(), ""]
    if budget:
        fitting = [(CHECKPOINTING[name], found[0]) for name, found in largest.items() if found]
        cheapest = (
            f"trainer.micro_batch_size={fitting[0][1]} trainer.activation_checkpointing={_as_yaml(fitting[0][0])}"
            if fitting
            else f"nothing fits: {_advice(settings, taken['recompute all'], budget)}"
        )
        lines.append(f"cheapest        {cheapest}")
    return settings, next(taken[name].total for name, way in CHECKPOINTING.items() if way == own), lines


def _advice(settings: "TrainerSettings", least: "StepMemory", budget: float) -> str:
    """What helps a run of which no step fits; `least` is what it takes where everything is recomputed."""
    from quack_lm.training.step_memory import LASTING

    lasting = sum(least.parts.get(part, 0) for part in LASTING)
    if lasting > budget:
        return f"weights, gradients and optimizer alone take {lasting / GIB:.1f} GiB; use more ranks or a smaller model"
    is_small = isinstance(settings.loss_chunk, int) and settings.loss_chunk <= LEAST_CHUNK
    return "use more ranks" + ("" if is_small else f", or trainer.loss_chunk={LEAST_CHUNK}")


def _traffic(config: dict[str, Any], settings: "TrainerSettings", world_size: int) -> dict[str, float]:
    from quack_lm.training.build import make_model
    from quack_lm.training.traffic import step_traffic

    stabilizer = instantiate(config["stabilizer"])
    model = make_model(config, stabilizer)
    optimizers = instantiate(config["optimizer"]).build(model)
    return step_traffic(model, optimizers, stabilizer, settings, ranks=world_size)


def _device(config: dict[str, Any]) -> str:
    return "cpu" if config["trainer"]["device"] == "cpu" else "cuda"


def _as_yaml(value: Any) -> str:
    return json.dumps(value).strip('"')


def _unit(totals: Iterable[int]) -> tuple[str, Callable[[float], str]]:
    """The unit of a table of memory, and how a number is written in it: MiB where none of the totals is a GiB."""
    if max(totals) < GIB:
        return "MiB", lambda n_bytes: f"{n_bytes / MIB:.2f}"
    return "GiB", lambda n_bytes: f"{n_bytes / GIB:.2f}"


def _size(found: "tuple[int, StepMemory] | None") -> str:
    return str(found[0]) if found else NO_NUMBER


# ------------------------------------------------------------------------------------------------ a sweep


def plan_sweep(cells: "list[Cell]", setting: Setting) -> None:
    """Print a row for each kind of run, and the cost of all."""
    from quack_lm.model import count_parameters
    from quack_lm.training.build import count_flops_per_token, make_model

    kinds: dict[str, list[Cell]] = {}
    for cell in cells:
        kinds.setdefault(_kind(cell.config), []).append(cell)
    for own in kinds.values():
        setting.check(instantiate(own[0].config["trainer"]))
    flops = cost.count_flops(cells, count_flops_per_token)
    memory = [_step_memory(own[0].config, setting).total for own in kinds.values()]
    unit, in_unit = _unit(memory)
    differences = describe_differences([own[0].config for own in kinds.values()])
    settings = [" ".join(filter(None, pair)) for pair in differences]
    has_settings = any(settings)
    rows = []
    for own, taken, others in zip(kinds.values(), memory, settings, strict=True):
        config, fits = own[0].config, not setting.budget or taken <= setting.budget
        per_token = flops[own[0].name] / own[0].total_tokens
        total = cost.estimate(own, {cell.name: flops[cell.name] for cell in own}, setting.speed)
        hours = total.hours
        rows.append(
            (
                *(choice(config[section]) for section in ("attention", "stabilizer")),
                *([others] if has_settings else []),
                str(len(own)),
                count(count_parameters(make_model(config))["total"]),
                f"{per_token:.3g}",
                in_unit(taken),
                count(setting.tokens_per_s(per_token) if fits else None),
                significant(hours / len(own) if hours and fits else None),
                significant(hours * setting.world_size if hours and fits else None),
            )
        )
    header = (
        "attention",
        "stabilizer",
        *(["settings"] if has_settings else []),
        "runs",
        "parameters",
        "FLOPs/token",
        f"{unit} of a rank",
        "tokens/s",
        "hours each",
    )
    echo(
        *Table(header=(*header, "card-hours"), rows=rows, numeric=range(2 + has_settings, 9 + has_settings))
        .as_text()
        .splitlines(),
        "",
    )
    all_of_it = cost.estimate(cells, flops, setting.speed)
    echo(f"{len(cells)} runs, {all_of_it.tokens:.3g} tokens, {all_of_it.flops:.3g} FLOPs")
    if setting.budget and (n_large := sum(taken > setting.budget for taken in memory)):
        echo(
            f"time: none, for {n_large} of {len(memory)} kinds of runs take more than {setting.budget / GIB:.1f} GiB, "
            "which a step may: use a smaller trainer.micro_batch_size, trainer.activation_checkpointing, or more ranks"
        )
        return
    if setting.speed is None or all_of_it.hours is None:
        echo("time: unknown without card=GH200 and mfu=0.4, or mfu=DIRECTORY of a run")
        return
    echo(
        f"{all_of_it.hours * setting.world_size:.3g} card-hours, {all_of_it.hours:.3g} hours one run after another on "
        f"{setting.world_size} x {setting.card} at an MFU of {setting.mfu:.3g}, without validation, probes, checkpoints"
    )


def _step_memory(config: dict[str, Any], setting: Setting) -> "StepMemory":
    """At the config's micro-batch; where that is auto, at the largest that fits, or 1."""
    from quack_lm.training.step_memory import fake_step

    with fake_step(config, world_size=setting.world_size, device=_device(config)) as step:
        size = step.settings.micro_batch_size
        if size != "auto":
            return step.memory(micro_batch_size=size)
        found = step.largest_micro_batch(setting.budget or 0)
        return found[1] if found else step.memory(micro_batch_size=1)


def _kind(config: dict[str, Any]) -> str:
    """What enters FLOPs and memory: all but seeds, rates and directories."""
    parts = [config[name] for name in ("model", "attention", "trainer")]
    optimizer = {key: value for key, value in config["optimizer"].items() if not key.endswith("lr")}
    stabilizer = [config["stabilizer"].get(key) for key in ("_target_", "norm")]
    return json.dumps([*parts, optimizer, *stabilizer, config["data"]["mask_documents"]], sort_keys=True)


# ------------------------------------------------------------------------------------------------ measured here


def measure(configs: list[dict[str, Any]]) -> int:
    """Make two steps of each config here, and print their memory beside the planned; returns the exit code."""
    from quack_lm.bench.step import Phases, TrainingStep
    from quack_lm.parallel import launched_world, resolve_device
    from quack_lm.training.memory import PeakMemory
    from quack_lm.training.process import start_process
    from quack_lm.training.step_memory import in_own_process, plan_memory

    settings: list[TrainerSettings] = [instantiate(config["trainer"]) for config in configs]
    device, ranks = resolve_device(settings[0].device), launched_world()[1]
    for one in settings:
        one.check_ranks(ranks)
    is_wrapped = any(one.is_wrapped(ranks) for one in settings)
    plan_here = partial(plan_memory, configs, world_size=ranks, device=device)
    planned = in_own_process(plan_here) if is_wrapped else plan_here()
    world = start_process(settings, device=device, keeps_freed_memory=False)
    rows = []
    for config, plan in zip(configs, planned, strict=True):
        step = TrainingStep(config, world)
        step(Phases(world.device))  # the state of the optimizers comes with the first step
        with PeakMemory(world.device) as peak:
            step(Phases(world.device))
        del step
        kinds = [choice(config[section]) for section in ("attention", "stabilizer")]
        ways = [_as_yaml(config["trainer"][key]) for key in ("activation_checkpointing", "loss_chunk")]
        sizes = [f"{n_bytes / 2**20:.1f}" for n_bytes in (plan.total, peak.bytes)]
        rows.append((*kinds, *ways, *sizes, f"{plan.total / peak.bytes:.3f}"))
    if world.is_main:
        header = ("attention", "stabilizer", "checkpointing", "loss_chunk", "planned, MiB", "measured, MiB", "ratio")
        echo(*Table(header=header, rows=rows, numeric=range(4, 7)).as_text().splitlines())
    return world.shutdown(0)
