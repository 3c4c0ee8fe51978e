"""From a checked plan to objects: the processes' group, the run directory, and everything that trains."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, TypeVar

import torch
import yaml

from quack_lm import __version__, slurm
from quack_lm.config import choice, fingerprint, identity
from quack_lm.data.batches import EvalBatches, TrainBatches
from quack_lm.errors import UserError
from quack_lm.files import LOCK_WAIT_S, open_regular, read_json, take_lock, write_atomically, write_json
from quack_lm.model import count_parameters
from quack_lm.parallel import (
    World,
    launched_world,
    materialize,
    shard,
    start_world,
)
from quack_lm.probe import Probe
from quack_lm.step import LogitWeights
from quack_lm.training import checkpoint
from quack_lm.training.check import CHECKPOINTS, Plan, initialize_stabilizer, progress_of, seen_of
from quack_lm.training.flops import peak_flops
from quack_lm.training.loop import Run
from quack_lm.training.metrics import RunLog, WandbMirror
from quack_lm.training.saver import Saver
from quack_lm.training.state import TrainState
from quack_lm.training.watchdog import Watchdog

T = TypeVar("T")

# Longer than the watchdog waits: it tells more about a hang than a collective that gives up.
GRACE_S = 60.0
# The ranks arrive far apart, for one per machine reads every byte of the data first: at least at this rate, from a file
# server that many machines read from.
READ_BYTES_PER_S = 1e7


def build(plan: Plan) -> Run:
    """Start the processes' group, take the run directory, and build every object of the run."""
    settings = plan.settings
    world = start_world(
        device=plan.device,
        # One float32 process needs no wrapping; in bfloat16 it gets FSDP's precision rules like many would.
        is_wrapped=launched_world()[1] > 1 or settings.precision != "float32",
        replicas=settings.replicas,
        timeout_s=settings.timeout_s + GRACE_S + _bytes_read_first(plan) / READ_BYTES_PER_S,
    )
    # From here on the ranks wait for each other, and none may hang; of a restart, one may wait for the lock.
    limit_s = settings.timeout_s + (LOCK_WAIT_S if slurm.is_restart() else 0.0)
    watchdog = Watchdog(limit_s, rank=world.rank)
    with watchdog.watching():
        run = _assemble(plan, world, watchdog)
    # W&B has a time limit of its own, and the run goes on without it.
    if world.is_main and plan.logger.wandb != "disabled":
        run.log.mirror = WandbMirror(plan.run_dir, plan.logger, plan.config, run.facts["wandb_id"])
        run.facts["wandb_id"] = run.log.mirror.id
    config = plan.config
    run.log.start_progress(run.progress.step, f"{choice(config['attention'])}/{choice(config['stabilizer'])}")
    return run


def _bytes_read_first(plan: Plan) -> int:
    """What some rank reads before it joins the others: all data, and the checkpoints until one is whole."""
    n_bytes = plan.data.n_bytes
    # Another process may be removing old ones; whether that one has a right to, the lock will tell.
    with suppress(OSError):
        n_bytes += sum(path.stat().st_size for path in (plan.run_dir / CHECKPOINTS).rglob("*"))
    return n_bytes


def _assemble(plan: Plan, world: World, watchdog: Watchdog) -> Run:
    settings, config = plan.settings, plan.config
    lock = _by_main(world, plan.run_dir, lambda: _take_run_dir(plan))
    # Before: rank 0 has chosen a checkpoint. After: every rank has its name.
    chosen = world.all_gather_text(plan.resumes_from.name if plan.resumes_from else "")[0]
    resumes_from = plan.run_dir / CHECKPOINTS / chosen if chosen else None
    state = checkpoint.read_state(resumes_from) if resumes_from else {}

    model = plan.model
    n_params = count_parameters(model)["total"]
    if settings.compile:
        for block in model.blocks:
            block.compile()
    shard(model, list(model.blocks), world, precision=settings.precision)
    initial = partial(model.initial_value, seed=config["seed"], device=world.device)
    materialize(model, None if resumes_from else initial, world.device)
    watchdog.feed()
    optimizers = plan.recipe.build(model)
    weights = LogitWeights(model.attentions)
    if resumes_from:
        checkpoint.load(resumes_from, model, optimizers, plan.stabilizer, world)
    else:
        initialize_stabilizer(plan.stabilizer, weights)

    watchdog.feed()
    progress = progress_of(resumes_from) if resumes_from else TrainState()
    batch_tokens = settings.global_batch_size * settings.seq_len
    log = RunLog(plan.run_dir, plan.logger, world, batch_tokens=batch_tokens, total_steps=settings.steps)
    split = {"micro_batch_size": settings.micro_batch_size, "rank": world.rank, "world_size": world.size}
    validation = EvalBatches(plan.data.windows("val", settings.seq_len), n_sequences=settings.val_sequences, **split)
    probe = EvalBatches(plan.data.windows("probe", settings.seq_len), n_sequences=settings.probe_sequences, **split)
    facts = {
        "n_params": n_params,
        "fingerprint": fingerprint(config),
        "world_size": world.size,
        "manifest_sha256": plan.data.manifest_sha256,
    }
    run = Run(
        run_dir=plan.run_dir,
        settings=settings,
        world=world,
        model=model,
        optimizers=optimizers,
        schedule=plan.recipe.make_schedule(settings.steps),
        max_grad_norm=plan.recipe.max_grad_norm,
        stabilizer=plan.stabilizer,
        stabilizer_name=choice(config["stabilizer"]),
        weights=weights,
        batches=TrainBatches(
            plan.data.windows("train", settings.seq_len),
            seed=config["seed"],
            global_batch_size=settings.global_batch_size,
            **split,
        ),
        validation=validation,
        probe=Probe(
            *(model, model.attentions, probe, world),
            eot_id=model.eot_id,
            weights=weights if settings.probe_parts else None,
        ),
        log=log,
        saver=Saver(
            *(plan.run_dir / CHECKPOINTS, world),
            keep=settings.keep_checkpoints,
            keep_every=settings.keep_every,
            is_async=settings.async_checkpoints,
            first_step=progress.step,
            about={"config": identity(config)},
        ),
        watchdog=Watchdog(settings.timeout_s, rank=world.rank),
        progress=progress,
        unigram_entropy=plan.data.manifest.unigram_entropy,
        flops_per_token=plan.flops_per_token,
        peak_flops=peak_flops(world.device, settings.precision),
        facts=facts,
        lock=lock,
    )
    _by_main(world, plan.run_dir, lambda: log.rewind(progress.step if resumes_from else -1))
    _by_main(world, plan.run_dir, lambda: _describe(plan, world, n_params))
    if world.is_main and plan.logger.wandb != "disabled":
        # The summary knows the run of one that ended before its first checkpoint.
        facts["wandb_id"] = state.get("wandb_id") or read_json(plan.run_dir / "summary.json").get("wandb_id")
    return run


def _by_main(world: World, run_dir: Path, work: Callable[[], T]) -> T | None:
    """What the main process makes of `work`; what stops it stops every rank, with the same line."""
    made, trouble = None, ""
    if world.is_main:
        try:
            made = work()
        except UserError as error:
            trouble = str(error)
        except OSError as error:
            trouble = (
                f"run_dir={run_dir} cannot be written to ({error.strerror}); mend that and run the same command again"
            )
    trouble = world.all_gather_text(trouble)[0]
    if trouble:
        raise UserError(trouble)
    return made


def _take_run_dir(plan: Plan) -> IO[str]:
    """Lock the run directory for as long as the returned file is open."""
    run_dir = plan.run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Appending: a run that is refused leaves not even a new time on the file.
        lock = open_regular(run_dir / ".lock", "a")
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written to: {error.strerror}; choose another run_dir") from None
    if not take_lock(lock, wait_s=LOCK_WAIT_S if slurm.is_restart() else 0.0):
        raise UserError(f"run_dir={run_dir} is in use by another process; wait for it or choose another run_dir")
    if seen_of(run_dir, plan.settings) != plan.seen:
        raise UserError(
            f"run_dir={run_dir} was trained by another process while this one was starting; run the same command again"
        )
    return lock


def _describe(plan: Plan, world: World, n_params: int) -> None:
    """Write what a result is worthless without: the resolved config and the environment."""
    write_atomically(plan.run_dir / "config.yaml", yaml.safe_dump(plan.config, sort_keys=False))
    packages = ("torch", "transformers", "datasets", "tokenizers", "numpy", "hydra-core", "wandb")
    environment = {
        "command": sys.argv,
        "git_revision": _git("rev-parse", "HEAD"),
        "git_is_dirty": bool(_git("status", "--porcelain")),
        "versions": {
            "quack_lm": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in packages},
        },
        "device": torch.cuda.get_device_name()
        if world.device.type == "cuda"
        else platform.processor() or platform.machine(),
        "device_type": world.device.type,
        "world_size": world.size,
        "host": platform.node(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "n_params": n_params,
    }
    write_json(plan.run_dir / "environment.json", environment)


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
