"""What the paper shows (arXiv 2511.21377, Figs. 1 to 4), tested against the runs of a sweep.

Each claim is a function of the results that gives the numbers it looked at and whether they bear it out; nothing where
the sweep has no runs for it. Only differences whose paired interval excludes zero count as differences.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from quack_lm.report.comparison import (
    ROUNDING,
    Difference,
    best_settings,
    by_method,
    difference,
    losses,
    settled_loss,
    speeds,
)
from quack_lm.report.results import Place, Result, Results
from quack_lm.report.sections import Section
from quack_lm.report.statistics import excludes_zero
from quack_lm.report.table import NO_NUMBER, Table, interval, loss, significant

# Losses no further apart than this count as agreeing, in nats per token.
AGREEMENT = 0.05
PAPER_STEPS = 5000
# Methods with which an MLA model still decodes from its latent cache, as the paper sees it.
WITH_LATENT_CACHE = ("none", "fixed", "qk_clip", "quack")

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "not decided", "not tested here"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one place says about a claim; `verdict` None where the seeds do not decide it."""

    place: str
    numbers: str
    verdict: bool | None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of the paper, and what this sweep has to say."""

    source: str
    text: str
    findings: list[Finding]

    @property
    def verdict(self) -> str:
        """It holds if it holds everywhere it was looked at."""
        if not self.findings:
            return UNTESTED
        return {True: HOLDS, False: FAILS, None: UNDECIDED}[_together([f.verdict for f in self.findings])]

    @property
    def numbers(self) -> str:
        marks = {True: "yes", False: "no", None: "not decided"}
        return "; ".join(f"{f.place}: {f.numbers} ({marks[f.verdict]})" for f in self.findings) or NO_NUMBER


def _together(verdicts: Sequence[bool | None]) -> bool | None:
    """False where one is, True where all are and there is one, else None."""
    if False in verdicts:
        return False
    return None if None in verdicts or not verdicts else True


def claims(results: Results) -> list[Claim]:
    """Every claim, also those that this sweep cannot test."""
    return [Claim(source=s, text=t, findings=list(test(results))) for s, t, test in _CLAIMS]


def section(results: Results) -> Section:
    """The table of all claims, as a section of a report."""
    return Section(
        title="What the paper shows, and what these runs show",
        intro="Computed from the runs: a claim holds where every place that can test it bears it out, and a "
        "difference counts only where its paired 95% interval excludes zero. The paper's rates are matched by "
        "distance travelled (steps x rate).",
        table=as_table(claims(results)),
    )


def as_table(found: Sequence[Claim]) -> Table:
    colors = {HOLDS: "good", FAILS: "bad", UNDECIDED: "unstable", UNTESTED: "unfinished"}
    return Table(
        header=("paper", "claim", "here", "measured"),
        rows=[(claim.source, claim.text, claim.verdict, claim.numbers) for claim in found],
        classes=[colors[claim.verdict] + " prose" for claim in found],
    )


# ------------------------------------------------------------------------------------------------ the rates


def _at(results: Results, rate: float) -> list[Place]:
    """The places whose rate stands for one of the paper's: the same distance travelled, steps x rate, to the nearest
    power of ten."""
    travelled = {r.place: r.lr * r.cell.total_steps for r in results.results}
    paper = rate * PAPER_STEPS
    return [p for p in results.places() if not p.condition and round(math.log10(travelled[p] / paper)) == 0]


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


def _ends(runs: Sequence[Result]) -> str:
    ends = [f"{loss(settled_loss(r))}{'' if r.is_healthy else ' unhealthy'}" for r in runs if r.is_finished]
    return f"{runs[0].method}: {', '.join(ends)}"


def _with_factor(results: Results, place: Place, is_wanted: Callable[[float], bool]) -> Iterable[list[Result]]:
    """The runs of each fixed factor; a run without a stabilizer has the factor 1."""
    for runs in by_method(results.at(place)).values():
        tau = runs[0].cell.config["stabilizer"].get("tau", 1.0)
        if runs[0].stabilizer in ("fixed", "none") and is_wanted(tau) and any(r.is_finished for r in runs):
            yield runs


def _full_rate_fails(results: Results) -> Iterable[Finding]:
    for place in _top(results):
        for runs in _with_factor(results, place, lambda tau: tau == 1.0):
            yield Finding(place=str(place), numbers=_ends(runs), verdict=_health(runs, wanted=False))


def _small_factor_is_stable(results: Results) -> Iterable[Finding]:
    for place in _top(results):
        for runs in _with_factor(results, place, lambda tau: tau <= 0.1):
            yield Finding(place=str(place), numbers=_ends(runs), verdict=_health(runs, wanted=True))


def _stable_at_top(stabilizer: str, *, wanted: bool = True) -> Callable[[Results], Iterable[Finding]]:
    def test(results: Results) -> Iterable[Finding]:
        for place in _top(results):
            runs = best_settings(results.at(place)).get(stabilizer, [])
            if any(r.is_finished for r in runs):
                yield Finding(place=str(place), numbers=_ends(runs), verdict=_health(runs, wanted=wanted))

    return test


# ------------------------------------------------------------------------------------------------ tests of losses


def _agree_at_the_lowest(results: Results) -> Iterable[Finding]:
    for place in _lowest(results):
        best = {name: runs for name, runs in best_settings(results.at(place)).items() if losses(runs)}
        pairs = [pair for a, b in itertools.combinations(best.values(), 2) if (pair := difference(a, b))]
        if pairs:
            widest = max(pairs, key=lambda pair: abs(pair.mean))
            verdict = _together([_agrees(pair) for pair in pairs if not pair.is_draw])
            numbers = f"widest {_numbers(widest)} (agreement: {AGREEMENT})"
            yield Finding(place=str(place), numbers=numbers, verdict=verdict)


def _agrees(pair: Difference) -> bool | None:
    """Whether all of the interval lies within what counts as agreeing, or all of it outside."""
    if pair.interval is None:
        return None
    if max(map(abs, pair.interval)) <= AGREEMENT:
        return True
    return False if excludes_zero(pair.interval, AGREEMENT) else None


def _higher_is_better(results: Results) -> Iterable[Finding]:
    """The best method at any higher rate against the best at the lowest, seed by seed."""
    for lowest in _lowest(results):
        low = _best_of_all(results, [lowest])
        higher = [p for p in results.places() if p[:2] == lowest[:2] and p.lr > lowest.lr]
        high = _best_of_all(results, higher)
        if low and high and (pair := difference(high, low)):
            what = f"{high[0].method} at {high[0].lr:g} less {low[0].method} at {low[0].lr:g}"
            yield _is_lower(pair, lowest.attention, what)


def _beats_at(
    which: Callable[[Results], list[Place]], better: str, worse: str
) -> Callable[[Results], Iterable[Finding]]:
    """Whether one stabilizer, at its best setting, beats another at its own."""

    def test(results: Results) -> Iterable[Finding]:
        for place in which(results):
            best = best_settings(results.at(place))
            if better in best and worse in best:
                pair = difference(best[better], best[worse])
                if pair:
                    yield _is_lower(pair, str(place))

    return test


def _is_lower(pair: Difference, place: str, what: str | None = None) -> Finding:
    return Finding(place=place, numbers=_numbers(pair, what), verdict=_wins(pair))


def _wins(pair: Difference) -> bool | None:
    """Whether the first is better; None where the seeds do not decide it."""
    return pair.mean < 0 if excludes_zero(pair.interval, ROUNDING) else None


def _numbers(pair: Difference, what: str | None = None) -> str:
    seeds = f"{len(pair.by_seed)} seed{'s' if len(pair.by_seed) > 1 else ''}"
    return f"{what or f'{pair.a} less {pair.b}'} {interval(pair.mean, pair.interval)}, {seeds}"


def _is_best(stabilizer: str, attention: str, among: Sequence[str]) -> Callable[[Results], Iterable[Finding]]:
    """Whether it beats each of the others, at its best setting each; a sweep without one of them cannot tell."""

    def test(results: Results) -> Iterable[Finding]:
        for place in results.places():
            best = best_settings(results.at(place))
            if place.attention != attention or place.condition or not {stabilizer, *among} <= best.keys():
                continue
            pairs = [difference(best[stabilizer], best[name]) for name in among if name != stabilizer]
            found = [pair for pair in pairs if pair is not None]
            if found:
                verdict = _together([None if pair is None else _wins(pair) for pair in pairs])
                numbers = ", ".join(_numbers(pair) for pair in found)
                yield Finding(place=str(place), numbers=numbers, verdict=verdict)

    return test


def _norms_agree(results: Results) -> Iterable[Finding]:
    for place in results.places():
        settings: dict[tuple[str, float], list[Result]] = {}
        for run in results.at(place):
            section = run.cell.config["stabilizer"]
            if run.stabilizer == "quack" and "norm" in section:
                settings.setdefault((section["norm"], section["tau"]), []).append(run)
        for (norm, tau), runs in settings.items():
            other = settings.get(("spectral", tau))
            if norm == "frobenius" and other and (pair := difference(runs, other)):
                numbers = _numbers(pair, f"tau {tau:g}: frobenius less spectral")
                yield Finding(place=str(place), numbers=numbers, verdict=_agrees(pair))


# ------------------------------------------------------------------------------------------------ logits and speed


def _controls_logits(stabilizer: str) -> Callable[[Results], Iterable[Finding]]:
    """Where the default run leaves its range in MLA: no head does, and logits and change are ten times smaller."""

    def test(results: Results) -> Iterable[Finding]:
        for place in results.places():
            best = best_settings(results.at(place))
            if place.attention != "mla" or place.condition or not {"none", stabilizer} <= best.keys():
                continue
            sizes = {
                (name, key): _largest(best[name], key)
                for name in ("none", stabilizer)
                for key in ("peak_logit", "delta_mean")
            }
            if None in sizes.values() or not any(r.blowup for r in best["none"]):
                continue
            parts = [
                f"{word} {significant(sizes[stabilizer, key])} against {significant(sizes['none', key])}"
                for word, key in (("largest logit", "peak_logit"), ("last mean |Δlogit|", "delta_mean"))
            ]
            is_smaller = all(
                (sizes[stabilizer, key] or 0.0) * 10 <= (sizes["none", key] or 0.0)
                for key in ("peak_logit", "delta_mean")
            )
            verdict = is_smaller and not any(r.blowup for r in best[stabilizer])
            yield Finding(place=str(place), numbers=", ".join(parts), verdict=verdict)

    return test


def _largest(runs: Sequence[Result], key: str) -> float | None:
    """The worst of the seeds; infinite where a run's number is no longer one."""
    values = [math.inf if r.is_diverged and r.number(key) is None else r.number(key) for r in runs if r.is_finished]
    return max((value for value in values if value is not None), default=None)


def _default_explodes(results: Results) -> Iterable[Finding]:
    for place in (*_middle(results), *_top(results)):
        runs = best_settings(results.at(place)).get("none", [])
        if place.attention == "mla" and any(r.is_finished for r in runs):
            largest, change = _largest(runs, "peak_logit"), _largest(runs, "delta_mean")
            if largest is None:  # nothing was probed
                continue
            verdicts = {r.blowup is not None for r in runs if r.is_finished}
            verdict = verdicts.pop() if len(verdicts) == 1 else None
            numbers = f"largest logit {significant(largest)}, last mean |Δlogit| {significant(change)}"
            yield Finding(place=str(place), numbers=numbers, verdict=verdict)


def _faster_than(other: str) -> Callable[[Results], Iterable[Finding]]:
    """Of sweeps made to measure speed, which do not probe; elsewhere runs share a machine and disturb each other."""

    def test(results: Results) -> Iterable[Finding]:
        if any(r.cell.config["trainer"].get("probe_every") for r in results.results):
            return
        for speed in speeds(results, against=other):
            if speed.stabilizer == "quack":
                bounds = speed.interval
                numbers = f"step time of quack {speed.ratio:.3f} of {other}'s"
                numbers += f" [{bounds[0]:.3f}, {bounds[1]:.3f}], {speed.pairs} pairs" if bounds else ", 1 pair"
                verdict = None if bounds is None or bounds[0] <= 1 <= bounds[1] else speed.ratio < 1
                yield Finding(place=speed.attention, numbers=numbers, verdict=verdict)

    return test


def _best_of_all(results: Results, places: Sequence[Place]) -> list[Result]:
    """The runs of the single best method and setting of these places, among those with as many seeds as every place
    has for some method: one lucky seed of a sweep that is under way does not win."""
    found = [[r for r in best_settings(results.at(place)).values() if losses(r)] for place in places]
    enough = min((max(len(losses(runs)) for runs in at_place) for at_place in found if at_place), default=0)
    candidates = [runs for at_place in found for runs in at_place if len(losses(runs)) >= enough]
    return min(candidates, key=lambda runs: fmean(losses(runs).values()), default=[])


_CLAIMS: list[tuple[str, str, Callable[[Results], Iterable[Finding]]]] = [
    ("Fig. 1", "at the top rate training fails with the full query/key rate", _full_rate_fails),
    ("Fig. 1", "a query/key factor of 0.1 or 0.01 alone makes the top rate stable", _small_factor_is_stable),
    ("Fig. 1", "QK norm is stable at the top rate", _stable_at_top("qk_norm")),
    ("Fig. 2", "at the lowest rate all methods agree", _agree_at_the_lowest),
    ("Fig. 2", "higher rates are better", _higher_is_better),
    ("Fig. 2", "QuacK beats QK clip at the middle rate", _beats_at(_middle, "quack", "qk_clip")),
    ("Fig. 2", "QK clip is unstable at the top rate", _stable_at_top("qk_clip", wanted=False)),
    ("Fig. 2", "the fixed factor is stable at the top rate", _stable_at_top("fixed")),
    ("Fig. 2", "QuacK is stable at the top rate", _stable_at_top("quack")),
    ("Fig. 2", "QuacK beats the fixed factor at the top rate", _beats_at(_top, "quack", "fixed")),
    ("Fig. 2", "QK norm is best in MHA", _is_best("qk_norm", "mha", WITH_LATENT_CACHE)),
    (
        "Fig. 2",
        "QuacK is best in MLA among methods that keep the latent cache",
        _is_best("quack", "mla", WITH_LATENT_CACHE),
    ),
    ("Fig. 3", "Frobenius or spectral norm makes little difference", _norms_agree),
    ("Fig. 4", "in MLA the default run's logits leave their range (1e4, changes of 1e2)", _default_explodes),
    ("Fig. 4", "QuacK controls the logits and their change", _controls_logits("quack")),
    ("Fig. 4", "QK norm controls the logits and their change", _controls_logits("qk_norm")),
    ("Fig. 4", "the fixed factor controls the logits and their change", _controls_logits("fixed")),
    ("Speed", "QuacK's steps are faster than QK norm's (by about a tenth)", _faster_than("qk_norm")),
    ("Speed", "QuacK's steps are faster than QK clip's", _faster_than("qk_clip")),
]
