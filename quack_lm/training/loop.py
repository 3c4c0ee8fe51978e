"""The training loop: phases by name, each a function below. No stabilizer or attention is named here."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from quack_lm.data.batches import EvalBatches, TrainBatches
from quack_lm.errors import UserError
from quack_lm.files import write_json
from quack_lm.model import Transformer
from quack_lm.optim.recipe import set_rates
from quack_lm.parallel import World, clip_gradients, evaluating
from quack_lm.probe import Probe
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.step import LogitWeights, stabilized_step
from quack_lm.training.checkpoint import named_tensors
from quack_lm.training.metrics import Clock, RunLog
from quack_lm.training.saver import Saver
from quack_lm.training.settings import TrainerSettings
from quack_lm.training.state import TrainState
from quack_lm.training.watchdog import Watchdog


@dataclass
class Run:
    """The built objects of one run."""

    run_dir: Path
    settings: TrainerSettings
    world: World
    model: Transformer
    optimizers: list[Optimizer]
    schedule: Callable[[int], float]
    max_grad_norm: float | None
    stabilizer: Stabilizer
    stabilizer_name: str
    weights: LogitWeights
    batches: TrainBatches
    validation: EvalBatches
    probe: Probe
    log: RunLog
    saver: Saver
    watchdog: Watchdog
    progress: TrainState
    unigram_entropy: float
    flops_per_token: float
    peak_flops: float
    lock: IO[str] | None  # held open by the main process: one run at a time in a directory
    facts: dict[str, Any]  # what the summary and the checkpoints say beside the progress
    stopped_by: str | None = None  # the signal that ended the loop
    trouble: str | None = None  # what this rank could not do, until all ranks meet and end together

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.settings.global_batch_size * self.settings.seq_len


def train(run: Run) -> str:
    """Train to the end, or to a divergence or a signal; returns the status that summary.json has."""
    clock, progress = Clock(run.world, run.progress.outside_s), run.progress
    rates = [group["base_lr"] for optimizer in run.optimizers for group in optimizer.param_groups]
    status, reason = "running", None
    with run.watchdog.watching(), stop_signals() as signal_received:
        if progress.step == 0:
            with clock.paused("validation"):
                validate(run)
                summarize(run, status)
        while progress.step < run.settings.steps and status == "running":
            factor = run.schedule(progress.step)
            set_rates(run.optimizers, factor)
            is_probed = due(progress.step + 1, run.settings.probe_every, run.settings.steps) or progress.step == 0
            if is_probed:
                with clock.paused("probe"):
                    run.probe.before()
            # ---------------------------------------------------------------- timed
            loss = accumulate_gradients(run)
            grad_norm = clip_gradients(list(run.model.parameters()), run.max_grad_norm)
            stabilized_step(run.optimizers, run.stabilizer, run.weights, run.world)
            for optimizer in run.optimizers:
                optimizer.zero_grad()
            # ----------------------------------------------------------------
            progress.step += 1
            run.log.add_loss(progress.step, loss)
            run.log.add(progress.step, {"optim/lr": rates[0] * factor, "optim/grad_norm": grad_norm})
            if is_probed:
                with clock.paused("probe"):
                    record_probe(run)
            if due(progress.step, run.settings.val_every, run.settings.steps):
                with clock.paused("validation"):
                    validate(run)
            # Before: each rank has its own signal, or none. After: all agree on one.
            number = meet(run, signal_received())
            if number and progress.step < run.settings.steps:
                run.stopped_by = signal.Signals(number).name
                status, reason = "interrupted", f"asked to stop by {run.stopped_by}"
            is_saved = status == "interrupted" or due(progress.step, run.settings.checkpoint_every, run.settings.steps)
            # A checkpoint is taken with the log written: nothing of the steps before it can be lost.
            if is_saved or due(progress.step, run.log.settings.log_every, run.settings.steps):
                diverged = write_log(run, clock)
                status, reason = ("diverged", diverged) if diverged else (status, reason)
            if is_saved and status != "diverged":
                with clock.paused("checkpoint"):
                    save(run)
        return finish(run, "completed" if status == "running" else status, reason)


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == total or (every > 0 and step % every == 0)


def meet(run: Run, signal_number: int = 0) -> int:
    """Once a step all ranks meet: the signal that one of them got, or 0; UserError on all if one is in trouble."""
    # In this order: a thread that has ended has said what went wrong before.
    mine = run.saver.is_writing
    run.trouble = run.trouble or run.saver.trouble or run.batches.error or run.validation.error
    number, is_in_trouble, is_writing = run.world.max_over_ranks(signal_number, run.trouble is not None, mine)
    if is_in_trouble:
        raise UserError(next(text for text in run.world.all_gather(run.trouble or "") if text))
    if not is_writing:
        run.saver.advance()
    run.watchdog.feed()
    return number


@contextmanager
def writing(run: Run) -> Iterator[None]:
    """What cannot be written down, on a full disk for instance, ends the run for all ranks at their next meeting."""
    try:
        yield
    except OSError as error:
        what = f"{error.filename or run.run_dir}: {error.strerror or error}"
        run.trouble = run.trouble or (
            f"run_dir={run.run_dir} cannot be written to ({what}); "
            "mend that and run the same command again: it continues from the last whole checkpoint"
        )


def accumulate_gradients(run: Run) -> Tensor:
    """Forward and backward over this step's micro-batches; this rank's share of the mean loss per token.

    Every token of the global batch weighs the same, whatever the ranks and micro-batches.
    """
    share = torch.zeros((), device=run.world.device)
    for tokens in run.batches.micro_batches(run.progress.step):
        tokens = run.world.to_device(tokens)
        loss = run.model(tokens[:, :-1], tokens[:, 1:]).sum() / run.batch_tokens
        # FSDP averages gradients over ranks; the loss is already this rank's share of a sum.
        (loss * (run.world.size if run.world.mesh is not None else 1)).backward()
        share += loss.detach()
    return share


def validate(run: Run) -> None:
    """Mean loss per token over the fixed validation sequences, the same for every world size."""
    total = torch.zeros(2, device=run.world.device, dtype=torch.float64)
    with evaluating(run.model):
        for tokens, weights_B in run.validation:
            run.watchdog.feed()
            tokens, weights_B = run.world.to_device(tokens), run.world.to_device(weights_B)
            nats_BT = run.model(tokens[:, :-1], tokens[:, 1:]).unflatten(0, (len(tokens), -1))
            # Padding sequences have weight 0; where() and not a product: they may be NaN in a run that diverges.
            total[0] += torch.where(weights_B[:, None] > 0, nats_BT, 0.0).sum(dtype=torch.float64)
            total[1] += weights_B.sum() * nats_BT.shape[1]
    # Before: each rank has the sums over its sequences. After: the sums over all.
    nats, tokens_seen = run.world.sum(total).tolist()
    run.progress.take_val_loss(nats / tokens_seen)
    run.log.add(run.progress.step, {"val/loss": nats / tokens_seen})


def record_probe(run: Run) -> None:
    """Logits and their change in the step just made, and what the stabilizer did in it."""
    values = run.probe.after()
    run.progress.take_logits(values["logits/max"].item(), values["logits/delta_mean"].item())
    own = {f"{run.stabilizer_name}/{name}": value for name, value in run.stabilizer.metrics().items()}
    norms = {f"norms/{name}_per_block": value for name, value in run.weights.norms("frobenius").items()}
    run.log.add(run.progress.step, {**values, **own, **norms})


def write_log(run: Run, clock: Clock) -> str | None:
    """Flush the log with the throughput since the last time; the reason if the run has diverged."""
    progress = run.progress
    seconds, steps = clock.take(), run.log.pending_steps
    progress.elapsed_s += seconds
    tokens_per_s = steps * run.batch_tokens / seconds if seconds > 0 else 0.0
    # The first interval pays for warm caches, allocation and compilation.
    if progress.step > steps:
        progress.timed_s, progress.timed_tokens = (
            progress.timed_s + seconds,
            progress.timed_tokens + steps * run.batch_tokens,
        )
    mfu = tokens_per_s * run.flops_per_token / (run.peak_flops * run.world.size)
    run.log.add(
        progress.step,
        {
            "throughput/tokens_per_s": tokens_per_s,
            "throughput/mfu": mfu,
            "data/epoch": run.batches.epoch(progress.step),
        },
    )
    with writing(run):
        run.log.flush()
    reason = progress.take_losses(run.log.losses, run.settings)
    if reason is None and progress.val_loss is not None and not math.isfinite(progress.val_loss):
        reason = f"validation loss {progress.val_loss} at step {progress.step}"
    summarize(run, "running", tokens_per_s=tokens_per_s)
    return reason


def save(run: Run) -> None:
    """Checkpoint everything that the next step depends on."""
    with writing(run):
        run.log.sync()
    meet(run)  # no checkpoint without the log of the steps before it; and the watchdog waits anew
    state = {"stabilizer_state": sorted(run.stabilizer.state_dict()), "progress": run.progress.as_json(), **run.facts}
    run.saver.save(run.progress.step, named_tensors(run.model, run.optimizers, run.stabilizer), state)


def finish(run: Run, status: str, reason: str | None) -> str:
    """See the last checkpoint whole, and write the last summary."""
    run.watchdog.feed()
    with Clock(run.world, run.progress.outside_s).paused("checkpoint"):
        run.saver.wait()
    if status == "diverged" and run.progress.val_step != run.progress.step:
        validate(run)  # or the summary would show the loss of a healthier step
    with writing(run):
        run.log.flush()
    last = summarize(run, status, reason=reason)
    meet(run)
    # What follows concerns no other rank, and W&B has time limits of its own.
    run.watchdog.stop()
    run.log.close(last)
    return status


def summarize(run: Run, status: str, *, reason: str | None = None, tokens_per_s: float | None = None) -> dict[str, Any]:
    """Replace summary.json, and return what it says."""
    progress = run.progress
    if progress.timed_s > 0:
        tokens_per_s = progress.timed_tokens / progress.timed_s
    elif progress.elapsed_s > 0:  # a run of one log interval, warm-up included
        tokens_per_s = progress.step * run.batch_tokens / progress.elapsed_s
    summary = {
        "status": status,
        "reason": reason,
        "unstable": progress.instabilities(run.settings, run.unigram_entropy),
        "step": progress.step,
        "tokens": progress.step * run.batch_tokens,
        "val_loss": progress.val_loss,
        "val_step": progress.val_step,
        "best_val_loss": progress.best_val_loss,
        "initial_val_loss": progress.initial_val_loss,
        "max_logit": progress.max_logit,
        "peak_logit": progress.peak_logit,
        "delta_mean": progress.delta_mean,
        "tokens_per_s": tokens_per_s,
        "elapsed_s": progress.elapsed_s,
        "outside_s": progress.outside_s,
        "checkpoint_s": run.saver.total_s,
        "checkpoint_step": run.saver.whole_step,
        "probes": progress.probes,
        **run.facts,
    }
    if run.world.is_main:
        with writing(run):
            write_json(run.run_dir / "summary.json", summary)
    return summary


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """Within, the first SIGINT, SIGTERM or SIGUSR1 only asks the loop to stop; a second SIGINT stops at once.

    Gives the number of the first signal so far, or 0.
    """
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
