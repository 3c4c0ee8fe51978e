"""From a checked config to objects: model, data, measurement, and the run that holds them.

`make_model` and `open_data` are what checking needs too; a `RunPlan` carries what it has opened and built, so that
nothing is built or opened twice; `build_run` starts the process group and makes the rest.
"""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import torch
from torch.optim import Optimizer

from quack_lm import slurm
from quack_lm.attention.base import Attention
from quack_lm.attention.cache import bytes_per_token
from quack_lm.attention.scores import implementation, resolve_backend, resolve_max_logits
from quack_lm.config import choice, fingerprint, identity, instantiate
from quack_lm.data.batches import EvalBatches, SequenceMixture, TrainBatches
from quack_lm.data.manifest import TOKENIZER, SplitName
from quack_lm.data.settings import DataSettings
from quack_lm.data.sources import DataSources
from quack_lm.errors import UserError, explained
from quack_lm.files import LOCK_WAIT_S
from quack_lm.model import ModelSizes, Transformer, count_parameters
from quack_lm.optim.recipe import Recipe
from quack_lm.parallel import World, materialize, shard
from quack_lm.probe import Probe
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.step import LogitWeights
from quack_lm.text import echo
from quack_lm.training import checkpoint
from quack_lm.training.coordinator import Coordinator
from quack_lm.training.environment import package_versions
from quack_lm.training.evaluation import Evaluation, Task
from quack_lm.training.flops import attention_flops_per_token, flops_per_token, peak_flops
from quack_lm.training.init_from import InitialWeights, open_initial_weights
from quack_lm.training.loop import Run
from quack_lm.training.metrics import LoggerSettings, RunLog
from quack_lm.training.process import start_process
from quack_lm.training.profiler import StepProfiler
from quack_lm.training.run_dir import READER_S, RunDir
from quack_lm.training.saver import Saver
from quack_lm.training.settings import TrainerSettings
from quack_lm.training.sinks import TensorBoardSink, TrackioSink, WandbSink
from quack_lm.training.state import TrainState
from quack_lm.training.watchdog import Watchdog

T = TypeVar("T")

# Longer than the watchdog waits: its stacks say more about a hang than a collective that times out.
GRACE_S = 60.0
# The ranks arrive far apart, for one per machine reads every byte of the data first: at least at this rate, from a file
# server that many machines read from.
READ_BYTES_PER_S = 1e7


@dataclass(frozen=True)
class RunPlan:
    """A checked run: its config, and what checking it has opened and built already."""

    config: dict[str, Any]
    run_dir: RunDir
    settings: TrainerSettings
    logger: LoggerSettings
    recipe: Recipe
    stabilizer: Stabilizer
    model: Transformer  # on the meta device
    data: DataSources
    sequences: dict[SplitName, SequenceMixture]
    tasks: list[Task]  # to evaluate on, where that is asked for
    device: str
    flops_per_token: float
    is_compiled: bool
    resumes_from: Path | None  # known to rank 0 alone
    initial: InitialWeights | None  # of trainer.init_from, where it does not resume; known to rank 0 alone
    snapshot: tuple[list[str], str | None]  # of the run directory when it was checked
    finished: str | None  # the status with which this very run has ended already


# ------------------------------------------------------------------------------------------------ for checking too


def make_model(config: dict[str, Any], stabilizer: Stabilizer | None = None) -> Transformer:
    """The config's model on the meta device, its forward changed by `stabilizer` (one of its own unless given).

    Raises UserError for shapes that cannot be.
    """
    sizes: ModelSizes = instantiate(config["model"])
    settings: TrainerSettings = instantiate(config["trainer"])
    chosen: Stabilizer = stabilizer or instantiate(config["stabilizer"])

    def make_attention() -> Attention:
        attention: Attention = instantiate(config["attention"], sizes.d_model, chosen.qk_transform)
        attention.tracks_max_logits = chosen.needs_max_logits
        return attention

    try:
        with torch.device("meta"):
            return Transformer(
                sizes,
                make_attention,
                activation_checkpointing=settings.activation_checkpointing,
                loss_chunk=settings.loss_chunk,
            )
    except (TypeError, RuntimeError, OverflowError) as error:
        # Without memory behind them, matrices can only fail by sizes that no machine can count.
        key = max(("d_model", "d_ff", "vocab_size"), key=lambda name: getattr(sizes, name))
        raise UserError(
            f"model.{key}={getattr(sizes, key)} is too large, or another size of model or attention"
        ) from error


def count_flops_per_token(config: dict[str, Any]) -> float:
    """FLOPs of forward and backward per token of the config's model, on a copy whose stabilizer is its own."""
    return flops_per_token(_eager_copy(config), config["trainer"]["seq_len"])


def count_attention_flops_per_token(config: dict[str, Any]) -> float:
    """The part of `count_flops_per_token` that pairs positions."""
    return attention_flops_per_token(_eager_copy(config), config["trainer"]["seq_len"])


def count_cache_bytes(config: dict[str, Any]) -> int:
    """The bytes that a token takes at decode in each layer of the config's model, in bfloat16."""
    attention = make_model({**config, "model": {**config["model"], "n_layers": 1}}).attentions[0]
    return bytes_per_token(attention.cache_entries(), torch.bfloat16)


def _eager_copy(config: dict[str, Any]) -> Transformer:
    return make_model({**config, "attention": {**config["attention"], "backend": "eager"}})


def open_data(settings: DataSettings, vocab_size: int) -> DataSources:
    """The prepared data of a config, not yet verified by checksum; UserError if they are missing, damaged, or beyond
    the model's vocabulary."""
    data = DataSources.open(settings)
    if data.manifest.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the vocabulary of {data.directory}; leave it out, or set "
            f"model.vocab_size={data.manifest.vocab_size}"
        )
    return data


def choose_kernels(model: Transformer, settings: TrainerSettings, *, device: str) -> None:
    """Settle what `auto` leaves open, and import what was chosen; UserError where it cannot run on the device."""
    first = model.attentions[0]
    backend = resolve_backend(first.backend, device=device, precision=settings.precision, head_width=first.head_width)
    max_logit_kernel = resolve_max_logits(settings.max_logits, device=device)
    for attention in model.attentions:
        attention.backend, attention.max_logit_kernel = backend, max_logit_kernel


def attention_kernel(meta_model: Transformer, settings: TrainerSettings, device: torch.device) -> str:
    """What computes the attention of a model of the meta device once it is on a device: `implementation`."""
    attention = meta_model.attentions[0]
    dtype = torch.bfloat16 if settings.precision == "bfloat16" else torch.float32
    x = torch.empty(1, settings.seq_len, meta_model.sizes.d_model, device="meta")
    # The choice depends on shapes, and on whether there will be a backward pass.
    q, k, v = (torch.empty(t.shape, device=device, dtype=dtype, requires_grad=True) for t in attention.project(x))
    documents = None if meta_model.eot_id is None else torch.zeros(x.shape[:2], device=device, dtype=torch.long)
    return implementation(attention.backend, q, k, v, attention.make_mask(v.new_empty(x.shape[:2]), documents))


def place_model(
    model: Transformer, settings: TrainerSettings, world: World, *, seed: int | None, is_compiled: bool
) -> None:
    """Shard a model of the meta device and draw its weights; without a seed they wait for those of a checkpoint."""
    if is_compiled:
        model.compile_parts()
    shard_model(model, settings, world)
    initial = None if seed is None else partial(model.initial_value, seed=seed, device=world.device)
    materialize(model, initial, world.device)


def shard_model(model: Transformer, settings: TrainerSettings, world: World) -> None:
    """Shard a model as the settings ask for, where the world has several ranks or weights are gathered in bfloat16."""
    shard(
        model,
        list(model.blocks),
        world,
        precision=settings.precision,
        reduce_dtype=settings.reduce_dtype,
        frees_blocks_after_forward=settings.frees_blocks_after_forward(
            sum(p.numel() for p in model.blocks.parameters())
        ),
    )


def initialize_stabilizer(stabilizer: Stabilizer, weights: LogitWeights) -> None:
    """Give it the norms of the weights with which a run begins, if it asks for norms.

    A run that continues does so on the meta device, so that the stabilizer has the state that is then loaded.
    """
    if stabilizer.needs_norms:
        stabilizer.initialize(weights.paths, weights.norms(stabilizer.needs_norms))


# ------------------------------------------------------------------------------------------------ the run


def build_run(plan: RunPlan) -> Run:
    """Start the process group, claim the run directory, and build every object of the run."""
    # What some rank reads before it joins the others: all data, and the checkpoints until a valid one.
    reading_s = (plan.data.n_bytes + plan.run_dir.checkpoint_bytes()) / READ_BYTES_PER_S
    timeout_s = plan.settings.timeout_s + GRACE_S + reading_s
    world = start_process([plan.settings], device=plan.device, timeout_s=timeout_s)
    # From here on the ranks wait for each other, and none may hang; of a restart, one may wait for the lock.
    waits_s = plan.settings.timeout_s + (LOCK_WAIT_S if slurm.is_restart() else 0.0)
    startup = Watchdog(waits_s, rank=world.rank)
    with startup.watching():
        # Before: each rank has a micro-batch, with `auto` of its own device. After: all have the smallest.
        micro_batch_size = min(world.all_gather(plan.settings.sequences_at_once))
        plan = replace(plan, settings=replace(plan.settings, micro_batch_size=micro_batch_size))
        settings, config = plan.settings, plan.config
        lock = _on_main_rank(world, plan.run_dir, lambda: _claim(plan))
        # Before: rank 0 has chosen a checkpoint, or what to begin with. After: every rank has their names.
        names = world.all_gather(
            (plan.resumes_from and plan.resumes_from.name, plan.initial and str(plan.initial.path))
        )
        resumes_from = plan.run_dir.checkpoints / names[0][0] if names[0][0] else None
        init_from = Path(names[0][1]) if names[0][1] else None
        state = checkpoint.read_train_state(resumes_from) if resumes_from else TrainState()
        n_params = count_parameters(plan.model)["total"]
        facts: dict[str, Any] = {
            "n_params": n_params,
            "fingerprint": fingerprint(config),
            "world_size": world.size,
            "manifest_sha256": plan.data.manifest_sha256,
        }
        kernel = attention_kernel(plan.model, settings, world.device)
        trained = build_model(plan, world, startup, resumes_from=resumes_from, init_from=init_from)
        startup.feed()
        data = build_data(plan, world)
        measurement = build_measurement(plan, world, trained, data, first_step=state.step)
        run = Run(
            run_dir=plan.run_dir,
            settings=settings,
            world=world,
            coordinator=Coordinator(
                world,
                Watchdog(settings.timeout_s, rank=world.rank),
                plan.run_dir,
                parts=[measurement.saver, data.batches, data.validation],
            ),
            model=plan.model,
            optimizers=trained.optimizers,
            schedule=plan.recipe.make_schedule(settings.steps),
            max_grad_norm=plan.recipe.max_grad_norm,
            stabilizer=plan.stabilizer,
            stabilizer_name=choice(config["stabilizer"]),
            weights=trained.weights,
            batches=data.batches,
            validation=data.validation,
            evaluation=build_evaluation(plan, world),
            probe=measurement.probe,
            log=measurement.log,
            profiler=StepProfiler(plan.run_dir.path / "profile", settings.profile, plan.model, rank=world.rank),
            saver=measurement.saver,
            state=state,
            unigram_entropy=plan.data.unigram_entropy,
            val_tokens_per_byte=plan.data.val_tokens_per_byte(data.validation.sequences_of),
            flops_per_token=plan.flops_per_token,
            peak_flops=1e12 * plan.logger.peak_tflops
            if plan.logger.peak_tflops
            else peak_flops(world.device, settings.precision),
            facts=facts,
            lock=lock,
        )
        _on_main_rank(world, plan.run_dir, lambda: run.log.rewind(state.step if resumes_from else -1))
        _on_main_rank(
            world,
            plan.run_dir,
            lambda: plan.run_dir.write_description(config, _environment(plan, world, n_params, kernel)),
        )
    if world.is_main:
        if world.device.type == "cuda":
            echo(f"attention: {kernel}", err=True)
        _start_logging(plan, run, resumes_from)
    return run


class TrainedObjects(NamedTuple):
    """What the optimizer step reads and writes; the model is the plan's, on its device now."""

    optimizers: list[Optimizer]
    weights: LogitWeights


def build_model(
    plan: RunPlan, world: World, watchdog: Watchdog, *, resumes_from: Path | None, init_from: Path | None
) -> TrainedObjects:
    """Shard and materialize the plan's model; its weights, and the rest of the state, from the seed or a checkpoint."""
    model = plan.model
    initial = None
    if resumes_from or init_from:  # without values: what there is to load
        initialize_stabilizer(plan.stabilizer, LogitWeights(model.attentions))
    if init_from:
        initial = open_initial_weights(init_from, plan.config, model, plan.stabilizer, plan.data)
    seed = None if resumes_from or init_from else plan.config["seed"]
    place_model(model, plan.settings, world, seed=seed, is_compiled=plan.is_compiled)
    watchdog.feed()
    if initial:
        initial.fill(model, world)
        watchdog.feed()
    optimizers = plan.recipe.build(model)
    weights = LogitWeights(model.attentions)
    if resumes_from:
        checkpoint.load(resumes_from, model, optimizers, plan.stabilizer, world)
    else:
        initialize_stabilizer(plan.stabilizer, weights)
    if initial:
        initial.load_stabilizer(plan.stabilizer, world)
    return TrainedObjects(optimizers, weights)


class DataObjects(NamedTuple):
    """The batches of one rank, of each split."""

    batches: TrainBatches
    validation: EvalBatches
    probe: EvalBatches


def build_data(plan: RunPlan, world: World) -> DataObjects:
    """This rank's share of the training, validation and probe sequences."""
    settings = plan.settings
    place = {"rank": world.rank, "world_size": world.size}

    def held_out(split: SplitName, n_sequences: int) -> EvalBatches:
        micro_batch_size = settings.held_out_at_once(n_sequences, ranks=world.size)
        return EvalBatches(plan.sequences[split], n_sequences=n_sequences, micro_batch_size=micro_batch_size, **place)

    return DataObjects(
        TrainBatches(
            plan.sequences["train"],
            seed=plan.config["seed"],
            global_batch_size=settings.global_batch_size,
            micro_batch_size=settings.sequences_at_once,
            **place,
        ),
        held_out("val", settings.val_sequences),
        held_out("probe", settings.probe_sequences),
    )


def build_evaluation(plan: RunPlan, world: World) -> Evaluation | None:
    """The tasks in tokens of the data set, if there are any."""
    if not plan.tasks:
        return None
    # Imported late: only these runs need the libraries of tokenizers.
    from quack_lm.data.tokenizer import TextTokenizer

    eot_id = plan.data.manifest.eot_id
    tokenizer = TextTokenizer.open(plan.data.directory / TOKENIZER, f"data.dir={plan.data.directory}", eot_id=eot_id)
    return Evaluation(
        plan.tasks,
        tokenizer.encode,
        world,
        every=plan.config["eval"]["every"],
        eot_id=eot_id,
        seq_len=plan.settings.seq_len,
        micro_batch_size=plan.settings.sequences_at_once,
    )


class MeasurementObjects(NamedTuple):
    """What measures the run and writes it down."""

    probe: Probe
    log: RunLog
    saver: Saver


def build_measurement(
    plan: RunPlan, world: World, trained: TrainedObjects, data: DataObjects, *, first_step: int
) -> MeasurementObjects:
    """The probe, the log and the saver; `first_step` is the step of the checkpoint that is continued, or 0."""
    settings = plan.settings
    batch_tokens = settings.global_batch_size * settings.seq_len
    return MeasurementObjects(
        Probe(
            plan.model,
            plan.model.attentions,
            data.probe,
            world,
            eot_id=plan.model.eot_id,
            weights=trained.weights if settings.probe_parts else None,
        ),
        RunLog(plan.run_dir.metrics_file, plan.logger, world, batch_tokens=batch_tokens, total_steps=settings.steps),
        Saver(
            plan.run_dir.checkpoints,
            world,
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every,
            is_async=settings.async_checkpoints,
            first_step=first_step,
            about={"config": identity(plan.config)},
        ),
    )


def _on_main_rank(world: World, run_dir: RunDir, work: Callable[[], T]) -> T | None:
    """What `work` returns on the main rank, None on the others; its error is raised on every rank."""
    result, error = None, ""
    if world.is_main:
        try:
            result = work()
        except UserError as raised:
            error = str(raised)
        except OSError as raised:
            error = explained(raised, f"run_dir={run_dir}", "and run the same command again")
    error = world.all_gather(error)[0]
    if error:
        raise UserError(error)
    return result


def _claim(plan: RunPlan) -> IO[str]:
    lock = plan.run_dir.claim(wait_s=LOCK_WAIT_S if slurm.is_restart() else READER_S)
    if checkpoint.snapshot(plan.run_dir, plan.settings.steps) != plan.snapshot:
        raise UserError(
            f"run_dir={plan.run_dir} was trained by another process while this one was starting; run the same command "
            "again"
        )
    return lock


def _start_logging(plan: RunPlan, run: Run, resumes_from: Path | None) -> None:
    """Progress bar and sinks; the run goes on without one that fails."""
    logger, path = plan.logger, plan.run_dir.path
    if logger.wandb != "disabled":
        # The summary knows the W&B run of one that ended before its first checkpoint.
        saved = checkpoint.read_state(resumes_from) if resumes_from else {}
        wandb_id = saved.get("wandb_id") or plan.run_dir.summary().get("wandb_id")
        sink = WandbSink(path, logger, plan.config, wandb_id)
        run.log.sinks.append(sink)
        run.facts["wandb_id"] = sink.id
    if logger.tensorboard:
        run.log.sinks.append(TensorBoardSink(path, logger, first_step=run.state.step))
    if logger.trackio:
        run.log.sinks.append(TrackioSink(path, logger, plan.config, is_continued=resumes_from is not None))
    sections = plan.config["attention"], plan.config["stabilizer"]
    run.log.start_progress(run.state.step, "/".join(choice(section) for section in sections))


def _environment(plan: RunPlan, world: World, n_params: int, attention_kernel: str) -> dict[str, Any]:
    """What is needed to reproduce a result."""
    is_cuda = world.device.type == "cuda"
    return {
        "command": sys.argv,
        "git_revision": _git("rev-parse", "HEAD"),
        "git_is_dirty": bool(_git("status", "--porcelain")),
        "versions": package_versions(),
        "device": torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
        "device_type": world.device.type,
        "world_size": world.size,
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "n_params": n_params,
        "is_compiled": plan.is_compiled,
        "attention_kernel": attention_kernel,
        "micro_batch_size": plan.settings.micro_batch_size,
        "data": plan.data.description(),
        # The checkpoint itself, of which there are several in a run directory; a run that goes on has chosen before.
        "init_from": str(plan.initial.path) if plan.initial else plan.run_dir.environment().get("init_from"),
    }


def _git(*arguments: str) -> str | None:
    """The output of git in this package's checkout; None for an installed package, also below another repository."""
    root = Path(__file__).parents[2]
    if not (root / "pyproject.toml").is_file():
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
