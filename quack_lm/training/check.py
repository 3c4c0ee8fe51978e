"""What a config promises, checked against the data, the machine and the run directory; nothing is written.

A mistake is found here, before any work starts, and is one line: `UserError`. What was opened and built for that is
kept in the `Plan` that `build.py` makes a run of.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quack_lm.attention.base import Attention
from quack_lm.attention.scores import check_backend
from quack_lm.config import choice, fingerprint, flatten, identity, instantiate, read_yaml, refuse_password
from quack_lm.data.corpus import Corpus
from quack_lm.data.manifest import TokenData
from quack_lm.errors import UserError
from quack_lm.files import read_json
from quack_lm.model import ModelSizes, Transformer, count_parameters
from quack_lm.optim.recipe import Recipe
from quack_lm.parallel import (
    check_world,
    default_device,
    launched_world,
    memory_of_a_rank,
)
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.step import LogitWeights
from quack_lm.training import checkpoint
from quack_lm.training.flops import flops_per_token
from quack_lm.training.metrics import LoggerSettings
from quack_lm.training.settings import TrainerSettings
from quack_lm.training.state import TrainState

# Float32 weights, their gradients, and one moment of an optimizer; what is computed comes on top.
LEAST_BYTES_PER_PARAMETER = 12

CHECKPOINTS = "checkpoints"
KEYS_NAMED = 5

# What may change when a run is continued: how long and how it is executed and watched, not what it computes.
CHANGEABLE = {
    "data.dir",
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
    "trainer.timeout_s",
}


@dataclass(frozen=True)
class Plan:
    """A checked run: its config, and what checking it has opened and built already."""

    config: dict[str, Any]
    run_dir: Path
    settings: TrainerSettings
    logger: LoggerSettings
    recipe: Recipe
    stabilizer: Stabilizer
    model: Transformer  # on the meta device
    data: TokenData
    device: str
    flops_per_token: float
    resumes_from: Path | None  # known to rank 0 alone
    seen: Any  # what of the run there was when it was checked
    finished: str | None  # the status with which this very run has ended already


def make_model(config: dict[str, Any], *, eot_id: int | None = None, backend: str | None = None) -> Transformer:
    """The config's model on the meta device; UserError for shapes that cannot be."""
    sizes: ModelSizes = instantiate(config["model"])
    settings: TrainerSettings = instantiate(config["trainer"])
    stabilizer: Stabilizer = instantiate(config["stabilizer"])
    section = config["attention"] | ({"backend": backend} if backend else {})

    def make_attention() -> Attention:
        attention: Attention = instantiate(section, sizes.d_model, stabilizer.qk_transform)
        attention.tracks_max_logits = stabilizer.needs_max_logits
        return attention

    try:
        with torch.device("meta"):
            return Transformer(
                sizes,
                make_attention,
                eot_id=eot_id,
                activation_checkpointing=settings.activation_checkpointing,
                loss_chunk=settings.loss_chunk,
            )
    except (TypeError, RuntimeError, OverflowError) as error:
        # Without memory behind them, matrices can only fail by sizes that no machine can count.
        key = max(("d_model", "d_ff", "vocab_size"), key=lambda name: getattr(sizes, name))
        raise UserError(
            f"model.{key}={getattr(sizes, key)} is too large, or another size of model or attention"
        ) from error


def check_run(config: dict[str, Any], *, is_rehearsal: bool = False) -> Plan:
    """Check everything that a config promises against the data, the machine and the run directory; write nothing.

    In a rehearsal, which trains nothing, a machine without a GPU may lack the memory that a GPU would have.
    """
    settings: TrainerSettings = instantiate(config["trainer"])
    logger: LoggerSettings = instantiate(config["logger"])
    if logger.wandb == "online":  # which prints its address
        refuse_password("WANDB_BASE_URL in the environment", os.environ.get("WANDB_BASE_URL", ""))
    _, world_size, _ = launched_world()
    device = default_device() if settings.device == "auto" else settings.device
    check_world(device=device)
    check_ranks(settings, world_size)
    check_backend(config["attention"]["backend"], device=device, precision=settings.precision)
    reference = make_model(config, backend="eager")
    corpus: Corpus = instantiate(config["data"])
    if not is_rehearsal or settings.device != "auto" or device == "cuda":
        check_memory(config, reference, device=device, ranks_of_a_copy=world_size // settings.replicas)
    data = open_data(corpus, config["model"]["vocab_size"], verify_checksums=False)
    for split in ("train", "val", "probe"):
        data.windows(split, settings.seq_len)
    run_dir = Path(config["run_dir"] or default_run_dir(config))
    seen = seen_of(run_dir, settings)
    resumes_from, finished = check_run_dir(run_dir, config, settings)
    recipe: Recipe = instantiate(config["optimizer"])
    stabilizer: Stabilizer = instantiate(config["stabilizer"])
    initialize_stabilizer(stabilizer, LogitWeights(reference.attentions))  # on the meta device
    if resumes_from:
        check_same_data(run_dir, resumes_from, data)
        _check_checkpoint(resumes_from, reference, recipe, stabilizer)
    # Last: it takes minutes, and nothing else that is wrong should wait for it.
    if corpus.verify_checksums and not finished:
        open_data(corpus, config["model"]["vocab_size"])
    return Plan(
        config={**config, "run_dir": str(run_dir)},
        run_dir=run_dir,
        settings=settings,
        logger=logger,
        recipe=recipe,
        stabilizer=stabilizer,
        model=make_model(config, eot_id=data.manifest.eot_id if corpus.mask_documents else None),
        data=data,
        device=device,
        flops_per_token=flops_per_token(reference, settings.seq_len),
        resumes_from=resumes_from,
        seen=seen,
        finished=finished,
    )


def run_warnings(plan: Plan) -> list[str]:
    """What is allowed and probably not meant."""
    warmup = plan.recipe.warmup_steps
    if plan.settings.steps < warmup:
        return [
            f"trainer.steps={plan.settings.steps} ends before optimizer.warmup_steps={warmup} do: the rate never "
            "reaches optimizer.lr"
        ]
    return []


def default_run_dir(config: dict[str, Any]) -> Path:
    """runs/<attention>-<stabilizer>-<fingerprint>: the same for the same run, so that calling again continues it."""
    return Path("runs", f"{choice(config['attention'])}-{choice(config['stabilizer'])}-{fingerprint(config)}")


def check_ranks(settings: TrainerSettings, world_size: int) -> None:
    """Raise UserError where so many processes cannot share out replicas and batch."""
    if world_size % settings.replicas:
        raise UserError(f"trainer.replicas={settings.replicas} must divide the number of processes, {world_size}")
    whole, micro = settings.global_batch_size, settings.micro_batch_size
    if whole % (world_size * micro):
        raise UserError(
            f"trainer.global_batch_size={whole} must be a multiple of processes x trainer.micro_batch_size = "
            f"{world_size} x {micro} = {world_size * micro}"
        )


def check_memory(config: dict[str, Any], model: Transformer, *, device: str, ranks_of_a_copy: int) -> None:
    """Raise UserError where a rank's part of the weights, gradients and optimizer state cannot fit into its memory."""
    n_params = count_parameters(model)["total"]
    needed, there = LEAST_BYTES_PER_PARAMETER * n_params / ranks_of_a_copy, memory_of_a_rank(device)
    if needed > there:
        sizes = flatten({name: config[name] for name in ("model", "attention")})
        key = max((k for k, v in sizes.items() if isinstance(v, int)), key=sizes.__getitem__)
        raise UserError(
            f"{key}={sizes[key]} is too large, or another size of model or attention: {n_params:,} parameters take "
            f"{needed / 2**30:,.0f} GiB of the {there / 2**30:,.0f} GiB that each process has"
        )


def open_data(corpus: Corpus, vocab_size: int, *, verify_checksums: bool = True) -> TokenData:
    """The prepared data of a corpus; UserError where it is not there, damaged, or another than the config says."""
    # One process per machine reads every byte; the others trust it.
    verify = verify_checksums and corpus.verify_checksums and launched_world()[2] == 0
    data = TokenData.open(Path(corpus.dir), verify_checksums=verify)
    made = data.manifest
    for key, wanted, found in (
        ("vocab_size", corpus.vocab_size, made.vocab_size),
        ("tokenizer", corpus.tokenizer or made.tokenizer.name, made.tokenizer.name),
    ):
        if wanted != found:
            raise UserError(
                f"data.dir={corpus.dir} was made with data.{key}={found}, not {wanted}; use that data set's own"
            )
    if data.manifest.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size} is smaller than the vocabulary of data.dir={corpus.dir}; "
            f"set data.vocab_size={data.manifest.vocab_size}"
        )
    return data


def check_run_dir(run_dir: Path, config: dict[str, Any], settings: TrainerSettings) -> tuple[Path | None, str | None]:
    """(the checkpoint to continue from, the status with which this run has ended already), or None for each."""
    try:
        existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.exists())
    except OSError as error:
        raise UserError(f"run_dir={run_dir}: {error.strerror}; choose another run_dir") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"run_dir={run_dir}: {existing} is not a directory that can be written to; choose another run_dir"
        )
    place = run_dir / CHECKPOINTS
    if (place.exists() or place.is_symlink()) and not (
        place.is_dir() and os.access(place, os.R_OK | os.W_OK | os.X_OK)
    ):
        raise UserError(f"{place} is not a directory that can be written to; mend that, or choose another run_dir")
    if not (run_dir / "config.yaml").exists():
        if (run_dir / "metrics.jsonl").exists() or place.exists():
            raise UserError(f"run_dir={run_dir} holds results without their config.yaml; choose another run_dir")
        return None, None
    mend = f"run_dir={run_dir}: choose another run_dir, for its config.yaml cannot be read"
    try:
        before = identity(read_yaml(run_dir / "config.yaml", mend))
    except (AttributeError, RecursionError):
        raise UserError(f"{mend}: it does not have the sections of a run") from None
    _check_same_run(f"run_dir={run_dir}", before, config)
    if settings.resume == "never":
        raise UserError(
            f"run_dir={run_dir} already holds this run; trainer.resume=auto continues it, or choose another run_dir"
        )
    finished = _finished(run_dir, settings)
    # One process reads every byte and chooses; the others take its choice once they have met.
    found = checkpoint.latest_valid_checkpoint(place) if launched_world()[0] == 0 else None
    if found:
        _check_same_run(str(found), checkpoint.read_state(found)["config"], config)
    elif launched_world()[0] == 0 and not finished:
        _check_none_is_missing(run_dir)
    return found, finished


def _check_none_is_missing(run_dir: Path) -> None:
    """UserError unless a run without a checkpoint never had one: to begin again is to discard its log.

    Its summary knows: there is one before the log has a line, and each names the newest whole checkpoint, but for those
    of earlier versions.
    """
    summary = read_json(run_dir / "summary.json")
    last = summary.get("checkpoint_step") if summary else "unknown"
    if (run_dir / "metrics.jsonl").exists() and last is not None:
        raise UserError(
            f"run_dir={run_dir} has the log of a run and no checkpoint (the last one, by its summary.json: step "
            f"{last}); put its checkpoints back, or choose another run_dir to start again from step 0"
        )


def _check_same_run(where: str, before: dict[str, Any], config: dict[str, Any]) -> None:
    """UserError naming the keys in which an earlier run, by its `identity`, was another one than this config's."""
    now = identity(config)
    # A schedule that bends towards the end is another one for another number of steps.
    free = CHANGEABLE - (set() if config["optimizer"]["schedule"] == "constant" else {"trainer.steps"})
    changed = [k for k in sorted(now.keys() | before.keys()) if now.get(k) != before.get(k) and k not in free]
    if changed:
        differences = ", ".join(f"{key}={before.get(key)}, not {now.get(key)}" for key in changed[:KEYS_NAMED])
        more = f" (and {len(changed) - KEYS_NAMED} more keys)" if len(changed) > KEYS_NAMED else ""
        raise UserError(f"{where} holds a run with {differences}{more}; choose another run_dir")


def check_same_data(run_dir: Path, found: Path, data: TokenData) -> None:
    """UserError where a checkpoint's run was trained on another data set."""
    if checkpoint.read_state(found)["manifest_sha256"] != data.manifest_sha256:
        raise UserError(
            f"data.dir={data.directory} is not the data set that run_dir={run_dir} was trained on; choose another "
            "run_dir"
        )


def _check_checkpoint(found: Path, model: Transformer, recipe: Recipe, stabilizer: Stabilizer) -> None:
    """UserError where a checkpoint does not hold a run's progress, and every tensor of these on the meta device."""
    progress_of(found)
    optimizers = recipe.build(model)
    checkpoint.create_optimizer_state(optimizers)
    checkpoint.check_tensors(found, checkpoint.named_tensors(model, optimizers, stabilizer))


def progress_of(found: Path) -> TrainState:
    """What a run knew of itself when it wrote this checkpoint; UserError where it cannot be used."""
    state = checkpoint.read_state(found)
    try:
        progress = TrainState.from_json(state["progress"])
        if progress.step != state["step"]:
            raise ValueError(f"it is of step {progress.step}")
    except ValueError as error:
        raise UserError(
            f"{found}: the progress in its state.json cannot be used ({error}); remove it to use the one before"
        ) from None
    return progress


def initialize_stabilizer(stabilizer: Stabilizer, weights: LogitWeights) -> None:
    """Show it the weights with which a run begins, where it asks for their norms."""
    if stabilizer.needs_norms:
        stabilizer.initialize(weights.paths, weights.norms(stabilizer.needs_norms))


def seen_of(run_dir: Path, settings: TrainerSettings) -> tuple[list[str], str | None]:
    """The names of a run's checkpoints, and how it has ended; nothing of what `check_run_dir` is about to refuse."""
    try:
        return [path.name for path in checkpoint.list_checkpoints(run_dir / CHECKPOINTS)], _finished(run_dir, settings)
    except OSError:
        return [], None


def _finished(run_dir: Path, settings: TrainerSettings) -> str | None:
    summary = read_json(run_dir / "summary.json")
    if not isinstance(summary.get("step", 0), int):
        return None
    is_done = summary.get("status") == "completed" and summary.get("step", 0) >= settings.steps
    return summary["status"] if is_done or summary.get("status") == "diverged" else None
