"""What a config promises, checked against the data, the machine and the run directory; nothing is written.

An error is found here, before any work starts, and is one line: `UserError`. The `RunPlan` that comes out holds what
was opened and built for it, and `build.py` makes a run of it.
"""

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quack_lm.config import flatten, identity, instantiate, older_identity
from quack_lm.data.manifest import SPLITS
from quack_lm.data.settings import DataSettings
from quack_lm.data.sources import DataSources
from quack_lm.errors import UserError
from quack_lm.model import Transformer, count_parameters
from quack_lm.optim.recipe import Recipe
from quack_lm.parallel import check_world, launched_world, memory_of_a_rank, resolve_device
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.step import LogitWeights
from quack_lm.text import refuse_secret
from quack_lm.training import checkpoint
from quack_lm.training.build import (
    RunPlan,
    choose_kernels,
    count_flops_per_token,
    initialize_stabilizer,
    make_model,
    open_data,
)
from quack_lm.training.compilation import check_compiler, is_compiled
from quack_lm.training.evaluation import EvalSettings, read_tasks
from quack_lm.training.flops import peak_flops
from quack_lm.training.init_from import InitialWeights, find_source, open_initial_weights
from quack_lm.training.metrics import LoggerSettings
from quack_lm.training.run_dir import RunDir
from quack_lm.training.settings import BYTES_PER_PARAMETER, TrainerSettings
from quack_lm.training.sinks import check_packages
from quack_lm.training.step_memory import SHARE_OF_MEMORY, in_own_process, largest_micro_batch

KEYS_NAMED = 5

# A planned sweep's, and a prepared data set's.
FILES_OF_OTHERS = ("plan.json", "manifest.json")

# What may change when a run is continued: how long and how it is executed and watched, not what it computes.
CHANGEABLE = {
    "data.dir",
    "data.dirs",
    "data.verify_checksums",
    "data.workers",
    "trainer.steps",
    "trainer.micro_batch_size",
    "trainer.val_every",
    "trainer.probe_every",
    "trainer.probe_parts",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.device",
    "trainer.replicas",
    "trainer.compile",
    "trainer.activation_checkpointing",
    "trainer.loss_chunk",
    "trainer.reduce_every_micro_batch",
    "trainer.reshard_after_forward",
    "trainer.deterministic",
    "trainer.timeout_s",
}


def check_run(config: dict[str, Any], *, is_rehearsal: bool = False) -> RunPlan:
    """Check everything that a config promises against the data, the machine and the run directory; write nothing.

    In a rehearsal, which trains nothing, a machine without a GPU may lack the memory that a GPU would have.
    """
    settings: TrainerSettings = instantiate(config["trainer"])
    logger: LoggerSettings = instantiate(config["logger"])
    recipe: Recipe = instantiate(config["optimizer"])
    stabilizer: Stabilizer = instantiate(config["stabilizer"])
    data_settings: DataSettings = instantiate(config["data"])
    evaluated: EvalSettings = instantiate(config["eval"])
    tasks = read_tasks(evaluated.tasks) if evaluated.every else []
    if logger.wandb == "online":  # which prints its address
        refuse_secret("WANDB_BASE_URL in the environment", os.environ.get("WANDB_BASE_URL", ""))
    check_packages(logger)
    _, world_size, local_rank = launched_world()
    device = resolve_device(settings.device)
    check_world(device=device)
    settings.check_ranks(world_size)
    check_compiler(settings, device=device)
    model = make_model(config, stabilizer)
    choose_kernels(model, settings, device=device)
    is_here = not is_rehearsal or settings.device != "auto" or device == "cuda"
    if is_here:
        check_memory(config, model, device=device, ranks_of_a_copy=world_size // settings.replicas)
    data = open_data(data_settings, config["model"]["vocab_size"])
    if tasks and not data.manifest.tokenizer.files:
        raise UserError(
            f"eval.every={evaluated.every} needs the tokenizer of the data, which {data.directory} does not have: set "
            "eval.every=0, or import its tokens again with data.tokenizer"
        )
    sequences = {split: data.sequences(split, settings.seq_len) for split in SPLITS}
    run_dir = RunDir.of(config)
    snapshot = checkpoint.snapshot(run_dir, settings.steps)
    resumes_from, finished = check_run_dir(run_dir, config, settings)
    is_new = not resumes_from and not finished
    initial = check_initial_weights(config, settings, model, stabilizer, data) if is_new else None
    if resumes_from:
        initialize_stabilizer(stabilizer, LogitWeights(model.attentions))  # without values: which tensors there are
        check_same_data(run_dir, resumes_from, data)
        checkpoint.read_train_state(resumes_from)
        checkpoint.check_tensors(resumes_from, checkpoint.expected_tensors(model, recipe.build(model), stabilizer))
    # Both take their time, so nothing else should wait for them.
    if settings.micro_batch_size == "auto":
        size = choose_micro_batch_size(config, settings, device, world_size) if is_here else 1
        settings = replace(settings, micro_batch_size=size)
    # One process per machine reads every byte.
    if data_settings.verify_checksums and local_rank == 0 and not finished:
        data.verify_checksums()
    model.eot_id = data.manifest.eot_id if data_settings.mask_documents else None
    flops = count_flops_per_token(config)
    return RunPlan(
        config={**config, "run_dir": str(run_dir)},
        run_dir=run_dir,
        settings=settings,
        logger=logger,
        recipe=recipe,
        stabilizer=stabilizer,
        model=model,
        data=data,
        sequences=sequences,
        tasks=tasks,
        device=device,
        flops_per_token=flops,
        is_compiled=is_compiled(settings, device=device, flops_per_token=flops, ranks=world_size),
        resumes_from=resumes_from,
        initial=initial,
        snapshot=snapshot,
        finished=finished,
    )


def run_warnings(plan: RunPlan) -> list[str]:
    """What is allowed and probably not meant."""
    found, warmup, precision = [], plan.recipe.warmup_steps, plan.settings.precision
    if plan.settings.steps < warmup:
        found.append(
            f"trainer.steps={plan.settings.steps} ends before optimizer.warmup_steps={warmup} do: the rate never "
            "reaches optimizer.lr"
        )
    if plan.initial and plan.initial.has_other_tokenizer:
        found.append(
            f"trainer.init_from={plan.settings.init_from} seems to have been trained with another tokenizer than the "
            f"one of data.dir={plan.data.directory}: its token ids would mean other text here"
        )
    n_sequences = plan.settings.steps * plan.settings.global_batch_size
    for data, share in zip(plan.data.sets, plan.data.shares, strict=True):
        if share * n_sequences < 1:
            found.append(f"data.weights gives {data.directory} none of the {n_sequences:,} sequences of this run")
    if plan.device == "cuda" and plan.logger.peak_tflops is None:
        device = torch.device("cuda", launched_world()[2])
        if peak_flops(device, precision) is None:
            name = torch.cuda.get_device_name(device)
            found.append(
                f"the {precision} peak of {name} is unknown, so there is no throughput/mfu; logger.peak_tflops=... "
                "gives the peak in TFLOP/s"
            )
    return found


def check_memory(config: dict[str, Any], model: Transformer, *, device: str, ranks_of_a_copy: int) -> None:
    """Raise UserError where a rank's part of the weights, gradients and optimizer state cannot fit into its memory, or
    what every step keeps of a micro-batch: the inputs [B, T, D] of the blocks."""
    n_params = count_parameters(model)["total"]
    bytes_of_state = 2 if config["optimizer"]["state_dtype"] == "bfloat16" else 4
    needed = (BYTES_PER_PARAMETER - 4 + bytes_of_state) * n_params / ranks_of_a_copy
    available = memory_of_a_rank(device)
    if not config["trainer"]["reduce_every_micro_batch"]:
        # The other ranks' part of the gradients.
        needed += getattr(torch, config["trainer"]["reduce_dtype"]).itemsize * n_params * (1 - 1 / ranks_of_a_copy)
    if needed > available:
        sizes = flatten({name: config[name] for name in ("model", "attention")})
        key = max((k for k, v in sizes.items() if isinstance(v, int)), key=sizes.__getitem__)
        raise UserError(
            f"{key}={sizes[key]} is too large, or another size of model or attention: {n_params:,} parameters take "
            f"{needed / 2**30:,.0f} GiB of the {available / 2**30:,.0f} GiB that each process has"
        )
    trainer, sizes = config["trainer"], config["model"]
    micro_batch_size = 1 if trainer["micro_batch_size"] == "auto" else trainer["micro_batch_size"]
    itemsize = getattr(torch, trainer["precision"]).itemsize
    kept = micro_batch_size * trainer["seq_len"] * sizes["d_model"] * sizes["n_layers"] * itemsize
    if kept > available:
        raise UserError(
            f"trainer.micro_batch_size={micro_batch_size} sequences of trainer.seq_len={trainer['seq_len']} are too "
            f"large: the inputs of the blocks alone take {kept / 2**30:,.0f} GiB of the {available / 2**30:,.0f} GiB "
            "that each process has"
        )


def choose_micro_batch_size(config: dict[str, Any], settings: TrainerSettings, device: str, world_size: int) -> int:
    """The largest that fits into this process's memory; UserError where none does."""
    available = memory_of_a_rank(device)
    budget = SHARE_OF_MEMORY[device] * available
    choose = partial(largest_micro_batch, config, world_size=world_size, device=device, budget=budget)
    found = in_own_process(choose) if settings.is_wrapped(world_size) else choose()
    if found is None:
        raise UserError(
            f"trainer.micro_batch_size=auto: a step of one sequence takes more than {SHARE_OF_MEMORY[device]:.0%} of "
            f"the {available / 2**30:,.1f} GiB that each process has; set trainer.activation_checkpointing=true, "
            "trainer.loss_chunk=1024, or use more ranks"
        )
    return found


def check_run_dir(run_dir: RunDir, config: dict[str, Any], settings: TrainerSettings) -> tuple[Path | None, str | None]:
    """(the checkpoint to continue from, the status with which this run has ended already), or None for each."""
    run_dir.check_writable()
    if not run_dir.config_file.exists():
        if run_dir.metrics_file.exists() or run_dir.checkpoints.exists():
            raise UserError(f"run_dir={run_dir} holds results without their config.yaml; choose another run_dir")
        _check_nothing_else(run_dir)
        return None, None
    _check_same_run(f"run_dir={run_dir}", identity(run_dir.config()), config)
    if settings.resume == "never":
        raise UserError(
            f"run_dir={run_dir} already holds this run; trainer.resume=auto continues it, or choose another run_dir"
        )
    for record in (run_dir.summary(), run_dir.last_line("step")):  # either may be lost or damaged
        _check_not_beyond(run_dir, record.get("step", 0), settings)
    finished = run_dir.final_status(settings.steps)
    if launched_world()[0] != 0:  # one process reads every byte and chooses; the others get its choice later
        return None, finished
    latest = checkpoint.latest_valid_checkpoint(run_dir.checkpoints)
    if latest:
        _check_same_run(str(latest), checkpoint.read_state(latest)["config"], config)
        _check_not_beyond(run_dir, checkpoint.step_of(latest), settings)
    elif not finished:
        _check_none_is_missing(run_dir)
    return latest, finished


def _check_nothing_else(run_dir: RunDir) -> None:
    """UserError where the directory of a new run is another thing's already: of runs, of a sweep, of data, of configs.

    Files are no obstacle, for a job or a sweep may have begun a log there.
    """
    paths = sorted(run_dir.path.iterdir()) if run_dir.path.is_dir() else []
    foreign = next((path for path in paths if path.is_dir() or path.name in FILES_OF_OTHERS), None)
    if foreign:
        name = foreign.name + "/" * foreign.is_dir()
        raise UserError(f"run_dir={run_dir} is no directory of a run, for it holds {name}; choose a new directory")


def _check_not_beyond(run_dir: RunDir, step: int, settings: TrainerSettings) -> None:
    """UserError where a run has made more steps than it is to have: to go on would only rewrite its record."""
    if step > settings.steps:
        raise UserError(
            f"run_dir={run_dir} holds this run at step {step}, beyond trainer.steps={settings.steps}; choose another "
            f"run_dir, or trainer.steps of at least {step}"
        )


def _check_none_is_missing(run_dir: RunDir) -> None:
    """UserError unless a run without a checkpoint never had one: to begin again is to discard its log.

    Its summary knows: there is one before the log has a line, and each names the newest complete checkpoint.
    """
    summary = run_dir.summary()
    last = summary.get("checkpoint_step") if summary else "unknown"
    if run_dir.metrics_file.exists() and last is not None:
        raise UserError(
            f"run_dir={run_dir} has the log of a run and no checkpoint (the last one, by its summary.json: step "
            f"{last}); put its checkpoints back, or choose another run_dir to start again from step 0"
        )


def _check_same_run(where: str, before: dict[str, Any], config: dict[str, Any]) -> None:
    """UserError naming the keys in which an earlier run, by its `identity`, was another one than this config's."""
    now, before = identity(config), older_identity(before, config)
    # A schedule that bends towards the end is another one for another number of steps.
    free = CHANGEABLE - (set() if config["optimizer"]["schedule"] == "constant" else {"trainer.steps"})
    changed = [k for k in sorted(now.keys() | before.keys()) if now.get(k) != before.get(k) and k not in free]
    if changed:
        differences = ", ".join(f"{key}={before.get(key)}, not {now.get(key)}" for key in changed[:KEYS_NAMED])
        more = f" (and {len(changed) - KEYS_NAMED} more keys)" if len(changed) > KEYS_NAMED else ""
        raise UserError(f"{where} holds a run with {differences}{more}; choose another run_dir")


def check_initial_weights(
    config: dict[str, Any],
    settings: TrainerSettings,
    meta_model: Transformer,
    stabilizer: Stabilizer,
    data: DataSources,
) -> InitialWeights | None:
    """What a new run begins with by `trainer.init_from`, on rank 0; UserError where that cannot be."""
    if settings.init_from is None or launched_world()[0] != 0:
        return None
    initialize_stabilizer(stabilizer, LogitWeights(meta_model.attentions))  # without values: which tensors there are
    return open_initial_weights(find_source(settings.init_from), config, meta_model, stabilizer, data)


def check_same_data(run_dir: RunDir, latest: Path, data: DataSources) -> None:
    """UserError where a checkpoint's run was trained on another data set."""
    if checkpoint.read_state(latest)["manifest_sha256"] != data.manifest_sha256:
        raise UserError(
            f"{'data.dir' if len(data.sets) == 1 else 'data.dirs'}={', '.join(str(d.directory) for d in data.sets)} "
            f"is not the data set that run_dir={run_dir} was trained on; choose another run_dir"
        )
