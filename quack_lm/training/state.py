"""What a run knows of itself, and how it ends: diverged or not, and the quieter signs that it was not stable.

Many failures show no NaN: the loss sticks near the unigram entropy while logits explode. So a run has a `status` and
a list of reasons to call it unstable.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, create_model

# What 64 bits hold: a step goes into tensors.
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
StatusName = Literal["running", "completed", "diverged", "interrupted", "failed"]


# Standard errors by which two means of losses must differ.
NOISE_FACTOR = 5.0


@dataclass(frozen=True, kw_only=True)
class StabilityRules:
    """What counts as diverged (the run ends) and as unstable (the summary says so).

    Diverged: the training loss is not finite, or its mean over `diverged_patience` steps is above `diverged_factor`
    times the best such mean, and by more than the noise of both. Unstable: a logit above `unstable_logit`, or a
    validation loss `unstable_margin` nats above its best, or above `stuck_fraction` of the unigram entropy after
    `stuck_after` steps.

    Args:
        diverged_factor: mean training loss relative to the best such mean above which a run ends as diverged.
        diverged_patience: steps of such a mean.
        unstable_logit: max logit above which the summary calls a run unstable.
        unstable_margin: nats of the last validation loss above the best one that the summary calls unstable.
        stuck_fraction: share of the unigram entropy above which a validation loss is called stuck.
        stuck_after: steps before which no run is called stuck.
    """

    diverged_factor: PositiveFloat = 1.5
    # A mean of fewer is noise: with 50, one in eight stationary runs of 3000 steps is called diverged where losses
    # deviate by half their mean, as at batch 1.
    diverged_patience: Annotated[int, Field(ge=100)] = 100
    unstable_logit: PositiveFloat = 1000.0
    unstable_margin: PositiveFloat = 0.1
    stuck_fraction: PositiveFloat = 0.85
    stuck_after: PositiveInt = 300


@dataclass(frozen=True)
class RunStatus:
    """How a run stands, as its summary.json says it."""

    name: StatusName = "running"
    reason: str | None = None
    stop_signal: str | None = None

    @classmethod
    def interrupted(cls, stop_signal: str) -> "RunStatus":
        """Ended by a signal, after a checkpoint."""
        return cls("interrupted", f"asked to stop by {stop_signal}", stop_signal)


def kind_of_end(status: str, reason: str | None) -> str:
    """The status refined by `reason`, as `TrainState`, the loop or an exception wrote it."""
    reason = reason or ""
    if status == "diverged" and any(f"loss {value} at step" in reason for value in ("nan", "inf")):
        return "non-finite"
    if status == "failed" and any(words in reason for words in ("OutOfMemory", "MemoryError", "allocate memory")):
        return "out of memory"
    if status == "interrupted" and "canceled" in reason:
        return "canceled"
    if status == "interrupted" and ("SIGTERM" in reason or "SIGUSR1" in reason):
        return "preempted"
    return status


def bits_per_byte(loss: float, tokens_per_byte: float) -> float:
    """A loss in nats per token as bits per byte of text, which compares models with different tokenizers."""
    return loss / math.log(2) * tokens_per_byte


@dataclass
class TrainState:
    """What a run knows of itself; a checkpoint carries it."""

    step: Count = 0
    recent_losses: list[float] = field(default_factory=list)  # of the last `diverged_patience` steps
    best_mean: float | None = None  # the smallest mean of so many training losses in a row; at first the first loss
    best_variance: float = 0.0  # of those losses
    initial_val_loss: float | None = None
    val_loss: float | None = None
    val_step: Count | None = None
    best_val_loss: float | None = None
    max_logit: float | None = None
    peak_logit: float | None = None
    delta_mean: float | None = None
    elapsed_s: Seconds = 0.0  # training alone
    timed_s: Seconds = 0.0  # the same without warm-up intervals
    timed_tokens: Count = 0
    outside_s: dict[str, Seconds] = field(default_factory=dict)  # probe, validation, checkpoint
    probes: Count = 0

    def as_json(self) -> dict[str, Any]:
        """For `from_json`: what is not finite travels as a word, because JSON has no number for it."""
        own = asdict(self)
        return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in own.items()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainState":
        """What `as_json` gave, every key of it; ValueError in one line for anything else."""
        own: dict[str, Any] = {k: float(v) if isinstance(v, str) else v for k, v in values.items()}
        # Strict, since what would only be odd here ends a run far from here, or makes its results wrong.
        fields: Any = {name: (hint, ...) for name, hint in get_type_hints(cls, include_extras=True).items()}
        schema = create_model(cls.__name__, __config__=ConfigDict(strict=True, extra="forbid"), **fields)
        try:
            schema.model_validate(own)
        except ValidationError as error:
            first = error.errors()[0]
            raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
        return cls(**own)

    def take_losses(self, losses: list[float], rules: StabilityRules) -> str | None:
        """Follow the training losses of consecutive steps up to `step`; the reason for divergence, if any."""
        for back, loss in zip(range(len(losses) - 1, -1, -1), losses, strict=True):
            step = self.step - back
            if not math.isfinite(loss):
                return f"training loss {loss} at step {step}"
            if reason := self._take_loss(loss, rules):
                return f"{reason}, up to step {step}"
        return None

    def _take_loss(self, loss: float, rules: StabilityRules) -> str | None:
        window = rules.diverged_patience
        if self.best_mean is None:
            self.best_mean = loss  # of nearly uniform predictions: it has little noise
        self.recent_losses = [*self.recent_losses, loss][-window:]
        if len(self.recent_losses) < window:
            return None
        mean = sum(self.recent_losses) / window
        variance = sum((x - mean) ** 2 for x in self.recent_losses) / max(1, window - 1)
        if mean < self.best_mean:
            self.best_mean, self.best_variance = mean, variance
        # Smoothed against smoothed, and by more than the noise of both: one easy batch is no best, and near zero a
        # ratio alone means nothing.
        noise = math.sqrt((variance + self.best_variance) / window)
        if mean > rules.diverged_factor * self.best_mean and mean - self.best_mean > NOISE_FACTOR * noise:
            return (
                f"training loss {mean:.4g} (mean of {window} steps) above {rules.diverged_factor:g} x its best, "
                f"{self.best_mean:.4g}"
            )
        return None

    def take_val_loss(self, loss: float) -> None:
        """Update latest, initial and best validation loss, in nats per token."""
        self.val_loss, self.val_step = loss, self.step
        if self.step == 0:
            self.initial_val_loss = loss
        if math.isfinite(loss):
            self.best_val_loss = loss if self.best_val_loss is None else min(self.best_val_loss, loss)

    def take_logits(self, max_logit: float, delta_mean: float) -> None:
        """Update latest and peak max logit and the mean |change| of the logits."""
        self.max_logit, self.delta_mean = max_logit, delta_mean
        self.probes += 1
        before = max_logit if self.peak_logit is None else self.peak_logit
        # A NaN, once seen, stays.
        self.peak_logit = math.nan if math.isnan(before) or math.isnan(max_logit) else max(before, max_logit)

    def instabilities(self, rules: StabilityRules, unigram_entropy: float) -> list[str]:
        """The reasons to call the run unstable; none if it was fine."""
        reasons = []
        if self.peak_logit is not None and not self.peak_logit <= rules.unstable_logit:
            reasons.append(f"max logit {self.peak_logit:.3g} above {rules.unstable_logit:g}")
        if self.val_loss is not None and self.best_val_loss is not None:
            if not self.val_loss <= self.best_val_loss + rules.unstable_margin:
                reasons.append(f"validation loss {self.val_loss:.3f} ended above its best, {self.best_val_loss:.3f}")
            stuck = rules.stuck_fraction * unigram_entropy
            if self.step >= rules.stuck_after and not self.val_loss <= stuck:
                reasons.append(
                    f"validation loss {self.val_loss:.3f} stuck near the unigram entropy, {unigram_entropy:.3f}"
                )
        return reasons
