"""The training loop: phases by name, each a function below. No stabilizer or attention is named here."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import record_function

from quack_lm.data.batches import EvalBatches, TrainBatches
from quack_lm.model import Transformer
from quack_lm.optim.recipe import set_lr
from quack_lm.parallel import World, clip_gradients, evaluating, set_gradient_reduction
from quack_lm.probe import Probe
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.step import LogitWeights, stabilized_step
from quack_lm.training.checkpoint import name_of, named_tensors
from quack_lm.training.coordinator import Coordinator
from quack_lm.training.evaluation import Evaluation
from quack_lm.training.metrics import Clock, RunLog
from quack_lm.training.profiler import StepProfiler
from quack_lm.training.run_dir import RunDir
from quack_lm.training.saver import Saver
from quack_lm.training.settings import TrainerSettings
from quack_lm.training.state import RunStatus, TrainState, bits_per_byte


@dataclass
class Run:
    """The built objects of one run."""

    run_dir: RunDir
    settings: TrainerSettings
    world: World
    coordinator: Coordinator
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
    evaluation: Evaluation | None
    log: RunLog
    profiler: StepProfiler
    saver: Saver
    state: TrainState
    unigram_entropy: float
    val_tokens_per_byte: dict[str, float]  # of the validation text, as `DataSources.val_tokens_per_byte` has it
    flops_per_token: float
    peak_flops: float | None
    facts: dict[str, Any]  # what summary and checkpoints say besides the state
    lock: IO[str] | None  # held open by the main process: one run at a time in a directory
    status: RunStatus = field(default_factory=RunStatus)

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step, over all ranks."""
        return self.settings.global_batch_size * self.settings.seq_len


def train(run: Run) -> RunStatus:
    """Train to the end, or to a divergence or a stop signal."""
    state, settings, clock = run.state, run.settings, Clock(run.world, run.state.outside_s)
    with run.coordinator.supervising(), clock.leaving_out_stops():
        if state.step == 0:
            with clock.paused("validation"):
                validate(run)
                summarize(run)
        while state.step < settings.steps and run.status.name == "running":
            if run.profiler.is_due(state.step):
                with clock.paused("profile"):
                    run.profiler.advance(state.step)
            lr = set_lr(run.optimizers, run.schedule(state.step))
            is_probed = due(state.step + 1, settings.probe_every, settings.steps) or state.step == 0
            if is_probed:
                with clock.paused("probe"):
                    run.probe.before()
            # ---------------------------------------------------------------- timed
            losses = accumulate_gradients(run)
            grad_norm = clip_gradients(list(run.model.parameters()), run.max_grad_norm)
            stabilized_step(run.optimizers, run.stabilizer, run.weights, run.world)
            for optimizer in run.optimizers:
                optimizer.zero_grad()
            # ----------------------------------------------------------------
            clock.see()
            source_tokens = run.batches.source_tokens(state.step)
            state.step += 1
            run.log.add_loss(state.step, losses, source_tokens)
            run.log.add(state.step, {"optim/lr": lr, "optim/grad_norm": grad_norm})
            if is_probed:
                with clock.paused("probe"):
                    record_probe(run)
            if due(state.step, settings.val_every, settings.steps):
                with clock.paused("validation"):
                    validate(run)
            if run.evaluation is not None and due(state.step, run.evaluation.every, settings.steps):
                with clock.paused("evaluation"):
                    run.log.add(state.step, run.evaluation.run(run.model, run.coordinator.watchdog.feed))
            agreed = run.coordinator.sync(is_saving=run.saver.is_writing)
            if not agreed.is_saving:
                run.saver.advance()
            stop_signal = agreed.stop_signal if state.step < settings.steps else None
            is_saved = stop_signal is not None or due(state.step, settings.checkpoint_every, settings.steps)
            # A checkpoint is taken with the log written: nothing of the steps before it can be lost.
            if is_saved or due(state.step, run.log.settings.log_every, settings.steps):
                write_log(run, clock)
            if is_saved and run.status.name != "diverged":
                with clock.paused("checkpoint"):
                    save(run)
            if stop_signal and run.status.name == "running":
                run.status = RunStatus.interrupted(stop_signal)
        finish(run)
    return run.status


def due(step: int, every: int, total: int) -> bool:
    """Whether something that happens every so many steps, and at the end, happens now."""
    return step == total or (every > 0 and step % every == 0)


def accumulate_gradients(run: Run) -> Tensor:
    """Forward and backward over this step's micro-batches; this rank's share of the mean loss per token, [1].

    Every token of the global batch weighs the same, whatever the ranks and micro-batches. With S data sets it is
    followed by the sums of the losses of this rank's tokens of each, [1 + S].
    """
    batches, step = run.batches, run.state.step
    share = torch.zeros((), device=run.world.device)
    by_source = torch.zeros(len(batches.names) if batches.is_mixed else 0, device=run.world.device)
    batches_and_sources = zip(batches.micro_batches(step), batches.sources(step), strict=True)
    for number, (tokens, sources_B) in enumerate(batches_and_sources, start=1):
        is_last = number == run.batches.n_micro_batches
        set_gradient_reduction(run.model, run.settings.reduce_every_micro_batch or is_last)
        n_documents = run.model.count_documents(tokens[:, :-1])
        tokens = run.world.to_device(tokens)
        with record_function("forward"):
            nats = run.model(tokens[:, :-1], tokens[:, 1:], n_documents)
            loss = nats.sum() / run.batch_tokens
        with record_function("backward"):
            # FSDP averages gradients over ranks; the loss is already this rank's share of a sum.
            (loss * (run.world.size if run.world.mesh is not None else 1)).backward()
        share += loss.detach()
        if batches.is_mixed:
            by_source += sum_by_source(nats.detach().unflatten(0, (len(tokens), -1)).sum(1), sources_B, run)
    return torch.cat([share[None], by_source])


def sum_by_source(values_B: Tensor, sources_B: Tensor, run: Run) -> Tensor:
    """The sum of the values of the sequences of each data set, [B], [B] on the host -> [S], in a fixed order."""
    is_own_SB = run.world.to_device(sources_B == torch.arange(len(run.batches.names))[:, None])
    # where() and not a product: of a run that diverges, one sequence alone may be NaN.
    return torch.where(is_own_SB, values_B, 0.0).sum(1)


def validate(run: Run) -> None:
    """Mean loss per token over the fixed validation sequences, the same for every world size; and in bits per byte."""
    names = run.batches.names if run.batches.is_mixed else []
    total = torch.zeros(2, device=run.world.device, dtype=torch.float64)
    by_source = torch.zeros(2, len(names), device=run.world.device, dtype=torch.float64)
    with evaluating(run.model):
        for (tokens, weights_B), sources_B in zip(run.validation, run.validation.sources(), strict=True):
            run.coordinator.watchdog.feed()
            tokens, weights_B = run.world.to_device(tokens), run.world.to_device(weights_B)
            nats_BT = run.model(tokens[:, :-1], tokens[:, 1:]).unflatten(0, (len(tokens), -1))
            # Padding sequences have weight 0; where() and not a product: they may be NaN in a run that diverges.
            nats_BT = torch.where(weights_B[:, None] > 0, nats_BT, 0.0)
            total[0] += nats_BT.sum(dtype=torch.float64)
            total[1] += weights_B.sum() * nats_BT.shape[1]
            if names:
                by_source[0] += sum_by_source(nats_BT.sum(1, dtype=torch.float64), sources_B, run)
                by_source[1] += sum_by_source(weights_B * nats_BT.shape[1], sources_B, run)
    # Before: each rank has the sums over its sequences. After: the sums over all.
    (nats, *nats_of), (tokens_seen, *tokens_of) = run.world.sum(torch.cat([total[:, None], by_source], 1)).tolist()
    run.state.take_val_loss(nats / tokens_seen)
    parts = {f"/{name}": x / n for name, x, n in zip(names, nats_of, tokens_of, strict=True) if n}
    losses, ratios = {"": nats / tokens_seen, **parts}, run.val_tokens_per_byte
    run.log.add(run.state.step, {f"val/loss{end}": loss for end, loss in losses.items()})
    bits = {end: bits_per_byte(loss, ratios[end]) for end, loss in losses.items() if end in ratios}
    run.log.add(run.state.step, {f"val/bits_per_byte{end}": value for end, value in bits.items()})


def record_probe(run: Run) -> None:
    """Logits and their change in the step just made, and what the stabilizer did in it."""
    values = run.probe.after()
    run.state.take_logits(values["logits/max"].item(), values["logits/delta_mean"].item())
    own = {f"{run.stabilizer_name}/{name}": value for name, value in run.stabilizer.metrics().items()}
    norms = {f"norms/{name}_per_block": value for name, value in run.weights.norms("frobenius").items()}
    run.log.add(run.state.step, {**values, **own, **norms})


def write_log(run: Run, clock: Clock) -> None:
    """Flush the log with the throughput since the last time, and decide whether the run has diverged."""
    state = run.state
    (seconds, was_stopped), steps = clock.take(), run.log.pending_steps
    n_tokens = steps * run.batch_tokens
    state.elapsed_s += seconds
    tokens_per_s = n_tokens / seconds if seconds > 0 else 0.0
    # The first interval of each process pays for warm caches, allocation and compilation.
    if clock.n_intervals > 1 and not was_stopped:
        state.timed_s += seconds
        state.timed_tokens += n_tokens
    throughput = {"throughput/tokens_per_s": tokens_per_s}
    if run.peak_flops is not None:
        throughput["throughput/mfu"] = tokens_per_s * run.flops_per_token / (run.peak_flops * run.world.size)
    run.log.add(state.step, {**({} if was_stopped else throughput), **data_read(run)})
    with run.coordinator.recording_write_errors():
        run.log.flush()
    reason = state.take_losses(run.log.losses, run.settings)
    if reason is None and state.val_loss is not None and not math.isfinite(state.val_loss):
        reason = f"validation loss {state.val_loss} at step {state.step}"
    summarize(run, tokens_per_s=tokens_per_s)
    if reason:
        run.status = RunStatus("diverged", reason)


def data_read(run: Run) -> dict[str, float]:
    """Passes over the training data so far; with several data sets, the passes over each and its tokens too."""
    batches, step = run.batches, run.state.step
    found: dict[str, float] = {"data/epoch": batches.epoch(step)}
    if batches.is_mixed:
        found |= {f"data/epoch/{name}": epochs for name, epochs in batches.epochs(step).items()}
        found |= {f"data/tokens/{name}": n * run.settings.seq_len for name, n in batches.sequences_read(step).items()}
    return found


def save(run: Run) -> None:
    """Checkpoint everything that the next step depends on."""
    with run.coordinator.recording_write_errors():
        run.log.sync()
    run.coordinator.sync()  # no checkpoint without the log of the steps before it; and the watchdog waits anew
    state = {"stabilizer_state": sorted(run.stabilizer.state_dict()), "progress": run.state.as_json(), **run.facts}
    run.saver.save(run.state.step, named_tensors(run.model, run.optimizers, run.stabilizer), state)


def finish(run: Run) -> None:
    """Wait for the last checkpoint, and write the last summary."""
    run.coordinator.watchdog.feed()
    run.profiler.close(run.state.step)
    with Clock(run.world, run.state.outside_s).paused("checkpoint"):
        run.saver.wait()
    if run.status.name == "running":
        run.status = RunStatus("completed")
    if run.status.name == "diverged" and run.state.val_step != run.state.step:
        validate(run)  # or the summary would show the loss of a healthier step
    with run.coordinator.recording_write_errors():
        run.log.flush()
    last = summarize(run)
    run.coordinator.sync()
    # What follows concerns no other rank, and W&B has its own time limits.
    run.coordinator.watchdog.stop()
    latest = run.saver.latest_step
    checkpoints = [] if latest is None else [run.run_dir.checkpoints / name_of(latest)]
    run.log.close(last, [*checkpoints, run.run_dir.metrics_file, run.run_dir.summary_file])


def summarize(run: Run, *, tokens_per_s: float | None = None) -> dict[str, Any]:
    """Replace summary.json, and return what it says."""
    state, ratio = run.state, run.val_tokens_per_byte.get("")
    if state.timed_s > 0:
        tokens_per_s = state.timed_tokens / state.timed_s
    elif state.elapsed_s > 0:  # with the warm-up of each process: `timed_tokens` says that this compares with nothing
        tokens_per_s = state.step * run.batch_tokens / state.elapsed_s
    summary = {
        "status": run.status.name,
        "reason": run.status.reason,
        "unstable": state.instabilities(run.settings, run.unigram_entropy),
        "step": state.step,
        "tokens": state.step * run.batch_tokens,
        "val_loss": state.val_loss,
        "val_bits_per_byte": None if state.val_loss is None or ratio is None else bits_per_byte(state.val_loss, ratio),
        "val_tokens_per_byte": ratio,
        "val_step": state.val_step,
        "best_val_loss": state.best_val_loss,
        "initial_val_loss": state.initial_val_loss,
        "max_logit": state.max_logit,
        "peak_logit": state.peak_logit,
        "delta_mean": state.delta_mean,
        "tokens_per_s": tokens_per_s,
        "timed_tokens": state.timed_tokens,
        "elapsed_s": state.elapsed_s,
        "outside_s": state.outside_s,
        "checkpoint_s": run.saver.total_s,
        "checkpoint_step": run.saver.latest_step,
        "probes": state.probes,
        **run.facts,
    }
    if run.world.is_main:
        with run.coordinator.recording_write_errors():
            run.run_dir.write_summary(summary)
    return summary
