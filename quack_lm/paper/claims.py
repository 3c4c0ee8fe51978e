"""The claims of the paper (arXiv 2511.21377, Figs. 1 to 4), tested on the runs of a sweep.

Each claim is a function of the results that yields, for every place with runs for it, the measured numbers and whether
they support the claim. Only differences whose paired interval excludes zero count as differences.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from quack_lm.report.comparison import (
    BASELINE,
    ROUNDING,
    Difference,
    best_settings,
    by_label,
    difference,
    losses,
    settled_loss,
    speeds,
)
from quack_lm.report.results import Place, Result, Results
from quack_lm.report.sections import Section
from quack_lm.report.statistics import excludes_zero
from quack_lm.report.table import NO_NUMBER, Table, interval, loss, significant

# Losses agree up to this difference, in nats per token.
AGREEMENT = 0.05
PAPER_STEPS = 5000
# Stabilizers with which an MLA model can decode from its latent cache, according to the paper.
WITH_LATENT_CACHE = (BASELINE, "fixed", "qk_clip", "quack")
# Stabilizers that multiply the learning rate of the query/key weights by a constant: tau, or 1 without one.
CONSTANT_FACTOR = (BASELINE, "fixed")
# A stabilizer controls the logits if it makes them, and their change, smaller by this factor.
CONTROL_FACTOR = 10

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "not decided", "not tested here"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The test of a claim at one place; `verdict` is None if the seeds do not decide it."""

    place: str
    numbers: str
    verdict: bool | None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, and its tests on this sweep."""

    source: str
    text: str
    findings: list[Finding]

    @property
    def verdict(self) -> str:
        """`holds` if it holds at every place that was tested."""
        if not self.findings:
            return UNTESTED
        return {True: HOLDS, False: FAILS, None: UNDECIDED}[_all_of([f.verdict for f in self.findings])]

    @property
    def numbers(self) -> str:
        """The numbers and the verdict of every place."""
        marks = {True: "yes", False: "no", None: "not decided"}
        return "; ".join(f"{f.place}: {f.numbers} ({marks[f.verdict]})" for f in self.findings) or NO_NUMBER


def _all_of(verdicts: Sequence[bool | None]) -> bool | None:
    """False if any verdict is, True if all are and there is one, else None."""
    if False in verdicts:
        return False
    return None if None in verdicts or not verdicts else True


def claims(results: Results) -> list[Claim]:
    """All claims, including those that this sweep cannot test."""
    return [Claim(source=s, text=t, findings=list(test(results))) for s, t, test in _CLAIMS]


def section(results: Results) -> Section:
    """The table of all claims as a section of the report."""
    return Section(
        title="Claims of the paper",
        intro="A claim holds if the runs support it at every place that can test it; a difference counts only if its "
        "paired 95% interval excludes zero. Learning rates are matched to the paper's by steps x rate. Fig. 1 of the "
        "paper is the training loss, Fig. 2 the validation loss, Fig. 3 the norm used by QuacK, Fig. 4 the middle head "
        "of the middle layer.",
        table=as_table(claims(results)),
    )


def as_table(found: Sequence[Claim]) -> Table:
    """One row per claim, colored by its verdict."""
    colors = {HOLDS: "good", FAILS: "bad", UNDECIDED: "unstable", UNTESTED: "unfinished"}
    return Table(
        header=("paper", "claim", "verdict", "measured"),
        rows=[(claim.source, claim.text, claim.verdict, claim.numbers) for claim in found],
        classes=[colors[claim.verdict] + " prose" for claim in found],
    )


# ------------------------------------------------------------------------------------------------ the rates


def _at(results: Results, rate: float) -> list[Place]:
    """The places that correspond to a rate of the paper: those with its steps x rate, to the nearest power of ten."""
    distance = {r.place: r.lr * r.cell.total_steps for r in results.results}
    paper = rate * PAPER_STEPS
    return [p for p in results.places() if not p.condition and round(math.log10(distance[p] / paper)) == 0]


def _lowest(results: Results) -> list[Place]:
    return _at(results, 3e-4)


def _middle(results: Results) -> list[Place]:
    return _at(results, 3e-3)


def _top(results: Results) -> list[Place]:
    return _at(results, 3e-2)


# ------------------------------------------------------------------------------------------------ tests of health


def _health(runs: Sequence[Result], *, wanted: bool) -> bool | None:
    verdicts = {r.is_healthy is wanted for r in runs if r.is_finished}
    return None if len(verdicts) != 1 else verdicts.pop()


def _final_losses(runs: Sequence[Result]) -> str:
    finals = [f"{loss(settled_loss(r))}{'' if r.is_healthy else ' unhealthy'}" for r in runs if r.is_finished]
    return f"{runs[0].label}: {', '.join(finals)}"


def _with_factor(results: Results, place: Place, is_wanted: Callable[[float], bool]) -> Iterable[list[Result]]:
    """The runs of each constant factor that is wanted, where any has finished."""
    for runs in by_label(results.at(place)).values():
        tau = runs[0].cell.config["stabilizer"].get("tau", 1.0)
        if runs[0].stabilizer in CONSTANT_FACTOR and is_wanted(tau) and any(r.is_finished for r in runs):
            yield runs


def _full_rate_fails(results: Results) -> Iterable[Finding]:
    for place in _top(results):
        for runs in _with_factor(results, place, lambda tau: tau == 1.0):
            yield Finding(place=str(place), numbers=_final_losses(runs), verdict=_health(runs, wanted=False))


def _small_factor_is_stable(results: Results) -> Iterable[Finding]:
    for place in _top(results):
        for runs in _with_factor(results, place, lambda tau: tau <= 0.1):
            yield Finding(place=str(place), numbers=_final_losses(runs), verdict=_health(runs, wanted=True))


def _stable_at_top(stabilizer: str, *, wanted: bool = True) -> Callable[[Results], Iterable[Finding]]:
    def test(results: Results) -> Iterable[Finding]:
        for place in _top(results):
            runs = best_settings(results.at(place)).get(stabilizer, [])
            if any(r.is_finished for r in runs):
                yield Finding(place=str(place), numbers=_final_losses(runs), verdict=_health(runs, wanted=wanted))

    return test


# ------------------------------------------------------------------------------------------------ tests of losses


def _agree_at_the_lowest(results: Results) -> Iterable[Finding]:
    for place in _lowest(results):
        best = {name: runs for name, runs in best_settings(results.at(place)).items() if losses(runs)}
        pairs = [pair for a, b in itertools.combinations(best.values(), 2) if (pair := difference(a, b))]
        if pairs:
            widest = max(pairs, key=lambda pair: abs(pair.mean))
            verdict = _all_of([_agrees(pair) for pair in pairs if not pair.is_draw])
            numbers = f"largest difference {_numbers(widest)} (agreement: {AGREEMENT})"
            yield Finding(place=str(place), numbers=numbers, verdict=verdict)


def _agrees(pair: Difference) -> bool | None:
    """True if all of the interval is within AGREEMENT of zero, False if all of it is beyond, else None."""
    if pair.interval is None:
        return None
    if max(map(abs, pair.interval)) <= AGREEMENT:
        return True
    return False if excludes_zero(pair.interval, AGREEMENT) else None


def _higher_is_better(results: Results) -> Iterable[Finding]:
    """The best stabilizer at any higher rate against the best at the lowest, paired by seed."""
    for lowest in _lowest(results):
        low = _best_of_all(results, [lowest])
        higher = [p for p in results.places() if p[:2] == lowest[:2] and p.lr > lowest.lr]
        high = _best_of_all(results, higher)
        if low and high and (pair := difference(high, low)):
            what = f"{high[0].label} at {high[0].lr:g} minus {low[0].label} at {low[0].lr:g}"
            yield _is_lower(pair, lowest.attention, what)


def _is_better_at(
    which: Callable[[Results], list[Place]], better: str, worse: str
) -> Callable[[Results], Iterable[Finding]]:
    """Whether one stabilizer is better than another, each at its best setting."""

    def test(results: Results) -> Iterable[Finding]:
        for place in which(results):
            best = best_settings(results.at(place))
            if better in best and worse in best:
                pair = difference(best[better], best[worse])
                if pair:
                    yield _is_lower(pair, str(place))

    return test


def _is_lower(pair: Difference, place: str, what: str | None = None) -> Finding:
    return Finding(place=place, numbers=_numbers(pair, what), verdict=_is_first_better(pair))


def _is_first_better(pair: Difference) -> bool | None:
    """Whether the first is better; None if the seeds do not decide it."""
    return pair.mean < 0 if excludes_zero(pair.interval, ROUNDING) else None


def _numbers(pair: Difference, what: str | None = None) -> str:
    seeds = f"{len(pair.by_seed)} seed{'s' if len(pair.by_seed) > 1 else ''}"
    return f"{what or f'{pair.a} minus {pair.b}'} {interval(pair.mean, pair.interval)}, {seeds}"


def _is_best(stabilizer: str, attention: str, among: Sequence[str]) -> Callable[[Results], Iterable[Finding]]:
    """Whether a stabilizer is better than each of the others, all at their best settings; tested where all were run."""

    def test(results: Results) -> Iterable[Finding]:
        for place in results.places():
            best = best_settings(results.at(place))
            if place.attention != attention or place.condition or not {stabilizer, *among} <= best.keys():
                continue
            pairs = [difference(best[stabilizer], best[name]) for name in among if name != stabilizer]
            found = [pair for pair in pairs if pair is not None]
            if found:
                verdict = _all_of([None if pair is None else _is_first_better(pair) for pair in pairs])
                numbers = ", ".join(_numbers(pair) for pair in found)
                yield Finding(place=str(place), numbers=numbers, verdict=verdict)

    return test


def _norms_agree(stabilizer: str) -> Callable[[Results], Iterable[Finding]]:
    """Whether Frobenius and spectral norm give the same loss, for each tau."""

    def test(results: Results) -> Iterable[Finding]:
        for place in results.places():
            settings: dict[tuple[str, float], list[Result]] = {}
            for run in results.at(place):
                section = run.cell.config["stabilizer"]
                if run.stabilizer == stabilizer and "norm" in section:
                    settings.setdefault((section["norm"], section["tau"]), []).append(run)
            for (norm, tau), runs in settings.items():
                other = settings.get(("spectral", tau))
                if norm == "frobenius" and other and (pair := difference(runs, other)):
                    numbers = _numbers(pair, f"tau {tau:g}: frobenius minus spectral")
                    yield Finding(place=str(place), numbers=numbers, verdict=_agrees(pair))

    return test


# ------------------------------------------------------------------------------------------------ logits and speed


def _controls_logits(stabilizer: str, attention: str) -> Callable[[Results], Iterable[Finding]]:
    """Where the baseline has heads above the threshold: whether none is left, and logits and changes are smaller."""

    def test(results: Results) -> Iterable[Finding]:
        for place in results.places():
            best = best_settings(results.at(place))
            if place.attention != attention or place.condition or not {BASELINE, stabilizer} <= best.keys():
                continue
            sizes = {
                (name, key): _largest(best[name], key)
                for name in (BASELINE, stabilizer)
                for key in ("peak_logit", "delta_mean")
            }
            if None in sizes.values() or not any(r.blowup for r in best[BASELINE]):
                continue
            parts = [
                f"{word} {significant(sizes[stabilizer, key])} against {significant(sizes[BASELINE, key])}"
                for word, key in (("max logit", "peak_logit"), ("last mean |Δlogit|", "delta_mean"))
            ]
            is_smaller = all(
                (sizes[stabilizer, key] or 0.0) * CONTROL_FACTOR <= (sizes[BASELINE, key] or 0.0)
                for key in ("peak_logit", "delta_mean")
            )
            verdict = is_smaller and not any(r.blowup for r in best[stabilizer])
            yield Finding(place=str(place), numbers=", ".join(parts), verdict=verdict)

    return test


def _largest(runs: Sequence[Result], key: str) -> float | None:
    """The largest of the seeds; infinite if a run diverged without a finite number, None if nothing was measured."""
    values = [math.inf if r.is_diverged and r.number(key) is None else r.number(key) for r in runs if r.is_finished]
    return max((value for value in values if value is not None), default=None)


def _baseline_explodes(attention: str) -> Callable[[Results], Iterable[Finding]]:
    def test(results: Results) -> Iterable[Finding]:
        for place in (*_middle(results), *_top(results)):
            runs = best_settings(results.at(place)).get(BASELINE, [])
            if place.attention == attention and any(r.is_finished for r in runs):
                max_logit, change = _largest(runs, "peak_logit"), _largest(runs, "delta_mean")
                if max_logit is None:  # nothing was probed
                    continue
                verdicts = {r.blowup is not None for r in runs if r.is_finished}
                verdict = verdicts.pop() if len(verdicts) == 1 else None
                numbers = f"max logit {significant(max_logit)}, last mean |Δlogit| {significant(change)}"
                yield Finding(place=str(place), numbers=numbers, verdict=verdict)

    return test


def _is_faster(stabilizer: str, other: str) -> Callable[[Results], Iterable[Finding]]:
    """Tested only in sweeps without probes, which are made to measure speed; in others, runs share a machine."""

    def test(results: Results) -> Iterable[Finding]:
        if any(r.cell.config["trainer"].get("probe_every") for r in results.results):
            return
        for speed in speeds(results, against=other):
            if speed.stabilizer == stabilizer:
                bounds = speed.interval
                numbers = f"step time of {stabilizer} {speed.ratio:.3f} of {other}'s"
                numbers += f" [{bounds[0]:.3f}, {bounds[1]:.3f}], {speed.pairs} pairs" if bounds else ", 1 pair"
                verdict = None if bounds is None or bounds[0] <= 1 <= bounds[1] else speed.ratio < 1
                yield Finding(place=speed.attention, numbers=numbers, verdict=verdict)

    return test


def _best_of_all(results: Results, places: Sequence[Place]) -> list[Result]:
    """The runs of the best stabilizer and setting of these places.

    Only those with as many seeds as every place has for some stabilizer: in an unfinished sweep, a single seed with a
    low loss is not selected.
    """
    found = [[r for r in best_settings(results.at(place)).values() if losses(r)] for place in places]
    enough = min((max(len(losses(runs)) for runs in at_place) for at_place in found if at_place), default=0)
    candidates = [runs for at_place in found for runs in at_place if len(losses(runs)) >= enough]
    return min(candidates, key=lambda runs: fmean(losses(runs).values()), default=[])


_CLAIMS: list[tuple[str, str, Callable[[Results], Iterable[Finding]]]] = [
    ("Fig. 1", "at the top rate training fails with the full query/key rate", _full_rate_fails),
    ("Fig. 1", "a query/key factor of 0.1 or 0.01 alone makes the top rate stable", _small_factor_is_stable),
    ("Fig. 1", "QK norm is stable at the top rate", _stable_at_top("qk_norm")),
    ("Fig. 2", "at the lowest rate all stabilizers agree", _agree_at_the_lowest),
    ("Fig. 2", "higher rates are better", _higher_is_better),
    ("Fig. 2", "QuacK is better than QK clip at the middle rate", _is_better_at(_middle, "quack", "qk_clip")),
    ("Fig. 2", "QK clip is unstable at the top rate", _stable_at_top("qk_clip", wanted=False)),
    ("Fig. 2", "the fixed factor is stable at the top rate", _stable_at_top("fixed")),
    ("Fig. 2", "QuacK is stable at the top rate", _stable_at_top("quack")),
    ("Fig. 2", "QuacK is better than the fixed factor at the top rate", _is_better_at(_top, "quack", "fixed")),
    ("Fig. 2", "QK norm is best in MHA", _is_best("qk_norm", "mha", WITH_LATENT_CACHE)),
    (
        "Fig. 2",
        "QuacK is best in MLA among stabilizers that keep the latent cache",
        _is_best("quack", "mla", WITH_LATENT_CACHE),
    ),
    ("Fig. 3", "Frobenius or spectral norm makes little difference", _norms_agree("quack")),
    ("Fig. 4", "in MLA the logits explode without a stabilizer (1e4, changes of 1e2)", _baseline_explodes("mla")),
    ("Fig. 4", "QuacK controls the logits and their change", _controls_logits("quack", "mla")),
    ("Fig. 4", "QK norm controls the logits and their change", _controls_logits("qk_norm", "mla")),
    ("Fig. 4", "the fixed factor controls the logits and their change", _controls_logits("fixed", "mla")),
    ("Speed", "QuacK's steps are faster than QK norm's (by about 10%)", _is_faster("quack", "qk_norm")),
    ("Speed", "QuacK's steps are faster than QK clip's", _is_faster("quack", "qk_clip")),
]
