"""When a run counts as diverged or unstable: rules on numbers, worked by hand."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quack_lm.config import CONFIG_DIR, compose
from quack_lm.errors import UserError
from quack_lm.report import collected
from quack_lm.training.state import StabilityRules, TrainState, kind_of_end

RULES = StabilityRules(
    diverged_factor=1.5,
    diverged_patience=3,
    unstable_logit=100.0,
    unstable_margin=0.1,
    stuck_fraction=0.85,
    stuck_after=10,
)
UNIGRAM = 6.0


def follow_by(losses: list[float], rules: StabilityRules) -> str | None:
    """Feed all losses at once under these rules."""
    state = TrainState()
    state.step = len(losses)
    return state.take_losses(losses, rules)


def follow(losses: list[float], *, flush_every: int = 1000, progress: TrainState | None = None) -> str | None:
    """Feed the losses of steps 1, 2, ... in groups, as a log does that is flushed every so many steps."""
    progress = progress or TrainState()
    for start in range(0, len(losses), flush_every):
        group = losses[start : start + flush_every]
        progress.step += len(group)
        reason = progress.take_losses(group, RULES)
        if reason:
            return reason
    return None


# ------------------------------------------------------------------------------------------------ diverged


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_divergence_at_its_step(loss: float) -> None:
    reason = follow([5.0, 4.0, 3.0, loss, 3.0])
    assert reason is not None
    assert "step 4" in reason
    assert str(loss) in reason


def test_a_falling_loss_is_no_divergence() -> None:
    assert follow([6.0 - 0.05 * step for step in range(100)]) is None


def test_a_spike_shorter_than_the_patience_is_no_divergence() -> None:
    assert follow([4.0, 9.0, 9.0, 4.0, 9.0, 9.0, 4.0]) is None


def test_a_loss_above_its_best_for_as_long_as_the_patience_is_divergence() -> None:
    reason = follow([4.0, 9.0, 9.0, 9.0, 4.0])
    assert reason is not None
    assert "step 4" in reason
    assert "1.5" in reason
    assert "4" in reason


def test_a_loss_at_the_limit_is_not_above_it() -> None:
    assert follow([4.0] + 10 * [6.0]) is None
    assert follow([4.0] + 10 * [6.001]) is not None


def test_the_best_is_the_runs_own_so_that_a_high_start_does_not_count() -> None:
    assert follow(100 * [11.0]) is None


def test_the_limit_follows_a_falling_best() -> None:
    assert follow([8.0, 11.0, 11.0, 4.0, 4.0, 4.0, 6.5, 6.5, 6.5]) is not None, "6.5 is far above 4, though below 8"


def test_one_easy_batch_condemns_no_run() -> None:
    assert follow([4.0, 4.0, 4.0, 1.0] + 20 * [4.0, 4.1]) is None


# Relative deviations of 0.25, 0.5 and 1.3; losses near zero with rare spikes; and one hard sequence in a hundred.
NOISE: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "a batch": lambda rng: rng.gamma(16, 4 / 16, size=3000),
    "a sequence": lambda rng: rng.gamma(4, 4 / 4, size=3000),
    "heavy tails": lambda rng: rng.lognormal(0, 1, size=3000),
    "memorized": lambda rng: rng.gamma(0.1, 0.05 / 0.1, size=3000),
    "hard sequences": lambda rng: np.where(rng.random(3000) < 0.01, 5.0, 0.05) * rng.random(3000),
}


@pytest.mark.parametrize("draw", NOISE.values(), ids=NOISE)
def test_stationary_noise_is_not_called_divergence(draw: Callable[[np.random.Generator], np.ndarray]) -> None:
    rng = np.random.default_rng(0)
    runs = (draw(rng) for _ in range(40))
    assert not any(follow_by([float(losses.mean()), *losses.tolist()], StabilityRules()) for losses in runs)
    with pytest.raises(UserError, match="diverged_patience"):
        compose(["experiment=tiny", "trainer.diverged_patience=99"])


@pytest.mark.parametrize("shape", [16.0, 4.0])
def test_a_blow_up_is_found_within_the_steps_of_one_mean(shape: float) -> None:
    rng, rules = np.random.default_rng(1), StabilityRules()
    for _ in range(20):
        healthy, broken = rng.gamma(shape, 4 / shape, size=500), rng.gamma(shape, 9 / shape, size=200)
        reason = follow_by([5.3, *healthy.tolist(), *broken.tolist()], rules)
        assert reason is not None
        step = int(reason.rsplit(" ", 1)[1])
        assert 501 < step <= 501 + rules.diverged_patience


def test_no_healthy_run_of_the_collected_sweep_is_called_diverged() -> None:
    measured = collected.load(CONFIG_DIR.parent / "docs" / "results" / "fig2-proxy")
    judged = 0
    for result in measured.results:
        losses = [loss for _, loss in result.curve("train/loss") if math.isfinite(loss)]
        if result.is_healthy and losses:
            assert follow_by(losses, StabilityRules(diverged_patience=10)) is None, result.cell.name
            judged += 1
    assert judged > 100


@given(
    losses=st.lists(st.floats(1, 20) | st.just(math.nan), max_size=40),
    flush_every=st.integers(1, 50),
    resume_at=st.integers(0, 40),
)
def test_the_verdict_does_not_depend_on_when_the_log_is_flushed_or_the_run_resumed(
    losses: list[float], flush_every: int, resume_at: int
) -> None:
    expected = follow(losses, flush_every=1)
    assert follow(losses, flush_every=flush_every) == expected
    before = TrainState()
    reason = follow(losses[:resume_at], progress=before)
    if reason is None:
        # What a checkpoint holds went through json, which has no infinity.
        restored = TrainState.from_json(json.loads(json.dumps(before.as_json(), allow_nan=False)))
        reason = follow(losses[resume_at:], progress=restored)
    assert reason == expected


@pytest.mark.parametrize("seen", [math.nan, math.inf])
def test_a_logit_that_was_not_finite_is_still_known_after_a_checkpoint(seen: float) -> None:
    before = TrainState()
    for logit in (3.0, seen, 4.0):
        before.take_logits(logit, 0.1)
    after = TrainState.from_json(json.loads(json.dumps(before.as_json(), allow_nan=False)))
    after.take_logits(5.0, 0.1)
    assert after.probes == 4
    assert after.peak_logit is not None
    assert not math.isfinite(after.peak_logit)
    assert after.instabilities(RULES, UNIGRAM)


# ------------------------------------------------------------------------------------------------ unstable


def finished(
    *, step: int = 100, val_losses: tuple[float, ...] = (6.5, 4.0), logits: tuple[float, ...] = (5.0,)
) -> TrainState:
    progress = TrainState()
    for number, loss in enumerate(val_losses):
        progress.step = 0 if number == 0 else step
        progress.take_val_loss(loss)
    for logit in logits:
        progress.take_logits(logit, 0.1)
    return progress


def test_a_run_that_learned_is_stable() -> None:
    assert finished().instabilities(RULES, UNIGRAM) == []
    assert TrainState().instabilities(RULES, UNIGRAM) == [], "and so is one that has not begun"


@pytest.mark.parametrize("logits", [(5.0, 250.0, 5.0), (math.inf,), (math.nan,), (5.0, math.nan), (5.0, math.inf, 5.0)])
def test_a_logit_that_was_ever_too_large_or_not_finite_is_a_reason(logits: tuple[float, ...]) -> None:
    reasons = finished(logits=logits).instabilities(RULES, UNIGRAM)
    assert len(reasons) == 1
    assert "logit" in reasons[0]
    assert "above 100" in reasons[0]


def test_a_logit_at_the_limit_is_no_reason() -> None:
    assert finished(logits=(100.0, -3.0)).instabilities(RULES, UNIGRAM) == []


def test_the_summary_has_the_last_logit_and_the_rule_the_largest() -> None:
    progress = finished(logits=(3.0, 9.0, 7.0))
    assert (progress.max_logit, progress.peak_logit, progress.delta_mean) == (7.0, 9.0, 0.1)


@pytest.mark.parametrize("last", [4.2, math.nan, math.inf])
def test_ending_above_the_best_validation_loss_is_a_reason(last: float) -> None:
    reasons = finished(val_losses=(6.5, 4.0, last)).instabilities(RULES, UNIGRAM)
    assert any("above its best, 4.000" in reason for reason in reasons)


def test_ending_within_the_margin_of_the_best_is_no_reason() -> None:
    assert finished(val_losses=(6.5, 4.0, 4.09)).instabilities(RULES, UNIGRAM) == []


def test_a_loss_stuck_near_the_unigram_entropy_is_a_reason_once_it_has_had_time() -> None:
    # 0.85 x 6 = 5.1
    for step, loss, is_stuck in ((10, 5.2, True), (9, 5.2, False), (10, 5.0, False), (1000, 5.9, True)):
        reasons = finished(step=step, val_losses=(6.5, loss)).instabilities(RULES, UNIGRAM)
        assert ["stuck near the unigram entropy, 6.000" in reason for reason in reasons] == ([True] if is_stuck else [])


def test_several_reasons_are_all_given() -> None:
    assert len(finished(val_losses=(6.5, 5.2, 5.9), logits=(1e4,)).instabilities(RULES, UNIGRAM)) == 3


@given(st.lists(st.floats(0, 20) | st.sampled_from([math.nan, math.inf]), min_size=1, max_size=9))
def test_the_best_validation_loss_is_the_smallest_finite_one_and_the_initial_that_of_step_0(
    losses: list[float],
) -> None:
    progress = finished(val_losses=tuple(losses))
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert progress.best_val_loss == (min(finite) if finite else None)
    assert str(progress.val_loss) == str(losses[-1])
    assert str(progress.initial_val_loss) == str(losses[0])


# ------------------------------------------------------------------------------------------------ kinds


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        ("completed", None, "completed"),
        ("diverged", follow([math.nan]), "non-finite"),
        ("diverged", "validation loss inf at step 3", "non-finite"),
        ("diverged", "training loss above 1.5 x its best, 3, for 100 steps up to step 300", "diverged"),
        ("failed", "OutOfMemoryError: CUDA out of memory.", "out of memory"),
        ("failed", "RuntimeError: DefaultCPUAllocator: can't allocate memory", "out of memory"),
        ("failed", "KeyError: 'x'", "failed"),
        ("interrupted", "asked to stop by SIGTERM", "preempted"),
        ("interrupted", "the job was canceled (SIGTERM)", "canceled"),
        ("interrupted", "asked to stop by SIGINT", "interrupted"),
    ],
)
def test_an_end_has_a_kind(status: str, reason: str | None, kind: str) -> None:
    assert kind_of_end(status, reason) == kind
