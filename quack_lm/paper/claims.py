"""The claims of the paper (arXiv 2511.21377, Figs. 1 to 4), tested on the runs of a sweep.

Each claim is a function of the results that yields, for every place with runs for it, the measured numbers and whether
they support the claim.

Each claim is its own family of tests: the paper stated it before these runs were made. It holds if every one of its
differences has p below 5% by itself, which needs no correction (an intersection-union test). It does not hold if any of
them points the other way, so these p-values are corrected by Holm's method for the number of differences in the claim.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from quack_lm.paper.figures import norm_and_tau
from quack_lm.report.comparison import (
    BASELINE,
    Best,
    Difference,
    Speed,
    best_settings,
    by_label,
    difference,
    losses,
    select_best,
    settled_loss,
    speeds,
)
from quack_lm.report.results import Place, Result, Results
from quack_lm.report.sections import Section, selection
from quack_lm.report.statistics import ALPHA, holm
from quack_lm.report.table import NO_NUMBER, Table, interval, loss, significant

# Losses agree up to this difference, in nats per token.
AGREEMENT = 0.05
PAPER_STEPS, PAPER_WIDTH = 5000, 2048
ALL = (BASELINE, "fixed", "qk_norm", "qk_clip", "quack")
# The paper compares QuacK in MLA with these. It leaves out QK norm, which it takes to need the full keys.
PAPER_RIVALS_IN_MLA = (BASELINE, "fixed", "qk_clip")
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
        intro="A claim holds if the runs support it at every place that can test it: each of its differences, paired "
        f"by seed, has p below {ALPHA:.0%}. It does not hold if one of them is decided the other way after Holm's "
        f"correction for the differences of that claim. Brackets are 95% t intervals. {selection(results)} Runs are "
        "called stable or unstable by the rules of trainer.unstable_* and only counted, not tested. Learning rates are "
        "matched to the paper's by steps x rate. Fig. 1 of the paper is the training loss, Fig. 2 the validation loss, "
        "Fig. 3 the norm used by QuacK, Fig. 4 the middle head of the middle layer.",
        table=as_table(claims(results)),
    )


def recipe(results: Results) -> Section:
    """What the runs do in another way than the paper, read from their configs."""
    models = [model if isinstance(model := r.cell.config.get("model"), dict) else {} for r in results.results]
    optimizers = [r.cell.config["optimizer"] for r in results.results]
    lines = [
        _where("embeddings are not tied to the output layer", [m.get("tied_embeddings") is False for m in models]),
        _where("gradients are not clipped", [o.get("max_grad_norm", 0) is None for o in optimizers]),
        _where(
            "embedding, head and norms have an AdamW rate of their own",
            [o.get("adamw_lr") is not None for o in optimizers],
        ),
        _where(
            f"fewer than the paper's {PAPER_STEPS} steps", [r.cell.total_steps < PAPER_STEPS for r in results.results]
        ),
        _where(
            f"a model narrower than the paper's {PAPER_WIDTH}",
            [isinstance(width := m.get("d_model"), int) and width < PAPER_WIDTH for m in models],
        ),
    ]
    return Section(
        title="Differences from the paper's recipe",
        intro="The verdicts below are about this recipe, which differs from the paper's where these lines say so.",
        lines=[line for line in lines if line],
    )


def _where(what: str, applies: Sequence[bool]) -> str:
    return "" if not any(applies) else what if all(applies) else f"{what} ({sum(applies)} of {len(applies)} runs)"


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
    """For each attention the place nearest to a rate of the paper by steps x rate, if within half a power of ten."""
    distance = {r.place: r.lr * r.cell.total_steps for r in results.results}
    nearest: dict[str, tuple[float, Place]] = {}
    for place in results.places():
        apart = abs(math.log10(distance[place] / (rate * PAPER_STEPS)))
        if not place.condition and apart < min(0.5, nearest.get(place.attention, (0.5, place))[0]):
            nearest[place.attention] = (apart, place)
    return [place for _, place in nearest.values()]


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


def _factor_is_stable(factor: float) -> Callable[[Results], Iterable[Finding]]:
    def test(results: Results) -> Iterable[Finding]:
        for place in _top(results):
            for runs in _with_factor(results, place, lambda tau: tau == factor):
                yield Finding(place=str(place), numbers=_final_losses(runs), verdict=_health(runs, wanted=True))

    return test


def _stable_at_top(stabilizer: str, *, wanted: bool = True) -> Callable[[Results], Iterable[Finding]]:
    def test(results: Results) -> Iterable[Finding]:
        for place in _top(results):
            runs = _runs(results, place, stabilizer)
            if any(r.is_finished for r in runs):
                yield Finding(place=str(place), numbers=_final_losses(runs), verdict=_health(runs, wanted=wanted))

    return test


def _runs(results: Results, place: Place, stabilizer: str) -> list[Result]:
    """The runs of a stabilizer at its best setting; none if it was not run there."""
    best = best_settings(results, place).get(stabilizer)
    return best.runs if best else []


# ------------------------------------------------------------------------------------------------ tests of losses


def _lower(tests: Iterable[tuple[str, str, Sequence[Difference | Speed | None]]]) -> Iterable[Finding]:
    """From (place, numbers, pairs): whether the first of each pair is lower; None is a pair that has not run."""
    found = list(tests)
    adjusted = iter(holm([pair.p_higher() for _, _, pairs in found for pair in pairs if pair is not None]))
    for place, numbers, pairs in found:
        verdicts = [None if pair is None else _is_lower(pair, next(adjusted)) for pair in pairs]
        yield Finding(place=place, numbers=numbers, verdict=_all_of(verdicts))


def _is_lower(pair: Difference | Speed, adjusted_p_higher: float) -> bool | None:
    if pair.p_lower() < ALPHA:
        return True
    return False if adjusted_p_higher < ALPHA else None


def _agree(tests: Iterable[tuple[str, str, Sequence[Difference]]]) -> Iterable[Finding]:
    """From (place, numbers, pairs): whether each pair agrees.

    A pair agrees if all of its interval is within AGREEMENT of zero, and does not if it is beyond by a corrected test.
    Losses that are equal for every seed say nothing.
    """
    found = [(place, numbers, [pair for pair in pairs if not pair.is_draw]) for place, numbers, pairs in tests]
    beyond = [min(p.p_lower(AGREEMENT), p.p_higher(AGREEMENT)) for _, _, pairs in found for p in pairs]
    adjusted = iter(holm(beyond))
    for place, numbers, pairs in found:
        verdicts = [_agrees(pair, next(adjusted)) for pair in pairs]
        yield Finding(place=place, numbers=numbers, verdict=_all_of(verdicts))


def _agrees(pair: Difference, adjusted_p_beyond: float) -> bool | None:
    if adjusted_p_beyond < ALPHA:
        return False
    return True if pair.interval and max(map(abs, pair.interval)) <= AGREEMENT else None


def _agree_at_the_lowest(results: Results) -> Iterable[Finding]:
    tests = []
    for place in _lowest(results):
        best = [found for found in best_settings(results, place).values() if losses(found.runs)]
        pairs = [pair for a, b in itertools.combinations(best, 2) if (pair := difference(a, b))]
        if pairs:
            widest = max(pairs, key=lambda pair: abs(pair.mean))
            tests.append((str(place), f"largest difference {_numbers(widest)} (agreement: {AGREEMENT})", pairs))
    return _agree(tests)


def _higher_is_better(results: Results) -> Iterable[Finding]:
    """The best stabilizer at any higher rate against the best at the lowest, paired by seed."""
    tests, at_edge = [], []
    for lowest in _lowest(results):
        same = [p for p in results.places() if p[:2] == lowest[:2]]
        low, high = (_best_of_all(results, places) for places in ([lowest], [p for p in same if p.lr > lowest.lr]))
        if low and high and (pair := difference(high, low)):
            what = f"{pair.a} at {high.runs[0].lr:g} minus {pair.b} at {low.runs[0].lr:g}"
            tests.append((lowest.attention, _numbers(pair, what), [pair]))
            at_edge.append(lowest.lr == min(p.lr for p in same) and pair.mean > 0)
    for finding, is_edge in zip(_lower(tests), at_edge, strict=True):
        if is_edge:
            numbers = (
                f"{finding.numbers}; the lowest rate that was run is the best: a grid that reaches lower is needed"
            )
            yield replace(finding, numbers=numbers, verdict=None)
        else:
            yield finding


def _is_better_at(
    which: Callable[[Results], list[Place]], better: str, worse: str
) -> Callable[[Results], Iterable[Finding]]:
    """Whether one stabilizer is better than another, each at its best setting."""

    def test(results: Results) -> Iterable[Finding]:
        tests = []
        for place in which(results):
            best = best_settings(results, place)
            if better in best and worse in best and (pair := difference(best[better], best[worse])):
                tests.append((str(place), _numbers(pair), [pair]))
        return _lower(tests)

    return test


def _numbers(pair: Difference, what: str | None = None) -> str:
    seeds = f"{len(pair.by_seed)} seed{'s' if len(pair.by_seed) > 1 else ''}"
    return f"{what or f'{pair.a} minus {pair.b}'} {interval(pair.mean, pair.interval)}, {seeds}"


def _in(attention: str) -> Callable[[Results], list[Place]]:
    return lambda results: [p for p in results.places() if p.attention == attention and not p.condition]


def _is_best(stabilizer: str, attention: str, among: Sequence[str]) -> Callable[[Results], Iterable[Finding]]:
    """Whether a stabilizer is better than each of the others, all at their best settings; tested where all were run."""

    def test(results: Results) -> Iterable[Finding]:
        tests = []
        for place in _in(attention)(results):
            best = best_settings(results, place)
            if {stabilizer, *among} <= best.keys():
                pairs = [difference(best[stabilizer], best[name]) for name in among if name != stabilizer]
                if any(pairs):
                    tests.append((str(place), ", ".join(_numbers(pair) for pair in pairs if pair), pairs))
        return _lower(tests)

    return test


def _norms_agree(stabilizer: str) -> Callable[[Results], Iterable[Finding]]:
    """Whether Frobenius and spectral norm give the same loss, for each tau."""

    def test(results: Results) -> Iterable[Finding]:
        tests = []
        for place in results.places():
            settings: dict[tuple[str, float], list[Result]] = {}
            for run in results.at(place):
                if run.stabilizer == stabilizer and (found := norm_and_tau(run)):
                    settings.setdefault(found, []).append(run)
            for (norm, tau), runs in settings.items():
                other = settings.get(("spectral", tau))
                if norm == "frobenius" and other:
                    pair = difference(select_best([runs]), select_best([other]))
                    if pair:
                        numbers = _numbers(pair, f"tau {tau:g}: frobenius minus spectral")
                        tests.append((str(place), numbers, [pair]))
        return _agree(tests)

    return test


# ------------------------------------------------------------------------------------------------ logits and speed


def _controls_logits(stabilizer: str, attention: str) -> Callable[[Results], Iterable[Finding]]:
    """Where the baseline has heads above the threshold: whether none is left, and logits and changes are smaller."""

    def test(results: Results) -> Iterable[Finding]:
        for place in results.places():
            best = {name: found.runs for name, found in best_settings(results, place).items()}
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
            runs = _runs(results, place, BASELINE)
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
        tests = []
        for speed in speeds(results, against=other):
            if speed.stabilizer == stabilizer:
                bounds = speed.interval
                numbers = f"step time of {stabilizer} {speed.ratio:.3f} of {other}'s"
                numbers += f" [{bounds[0]:.3f}, {bounds[1]:.3f}], {len(speed.logs)} pairs" if bounds else ", 1 pair"
                tests.append((speed.attention, numbers, [speed]))
        yield from _lower(tests)

    return test


def _best_of_all(results: Results, places: Sequence[Place]) -> Best | None:
    """The best stabilizer and setting of these places, on the seeds that have finished at each of them.

    So in an unfinished sweep, a single seed with a low loss is not selected.
    """
    at_places = [results.at(place) for place in places if losses(results.at(place))]
    if not at_places:
        return None
    seeds = set.intersection(*(set(losses(members)) for members in at_places))
    groups = [
        [run for run in runs if run.seed in seeds] for members in at_places for runs in by_label(members).values()
    ]
    best = select_best([runs for runs in groups if runs], results.plan.tune_seeds)
    return best if losses(best.runs) else None


_CLAIMS: list[tuple[str, str, Callable[[Results], Iterable[Finding]]]] = [
    ("Fig. 1", "at the top rate training fails with the full query/key rate", _full_rate_fails),
    ("Fig. 1", "a query/key factor of 0.1 alone makes the top rate stable", _factor_is_stable(0.1)),
    ("Fig. 1", "a query/key factor of 0.01 alone makes the top rate stable", _factor_is_stable(0.01)),
    ("Fig. 1", "QK norm is stable at the top rate", _stable_at_top("qk_norm")),
    ("Fig. 2", "at the lowest rate all stabilizers agree", _agree_at_the_lowest),
    ("Fig. 2", "higher rates are better", _higher_is_better),
    ("Fig. 2", "QuacK is better than QK clip at the middle rate", _is_better_at(_middle, "quack", "qk_clip")),
    ("Fig. 2", "QK clip is unstable at the top rate", _stable_at_top("qk_clip", wanted=False)),
    ("Fig. 2", "the fixed factor is stable at the top rate", _stable_at_top("fixed")),
    ("Fig. 2", "QuacK is stable at the top rate", _stable_at_top("quack")),
    ("Fig. 2", "QuacK is better than the fixed factor at the top rate", _is_better_at(_top, "quack", "fixed")),
    ("Fig. 2", "QK norm is best in MHA", _is_best("qk_norm", "mha", ALL)),
    (
        "Fig. 2",
        'QuacK is best in MLA among "stabilizers that keep the latent cache", for the paper none, fixed and QK clip',
        _is_best("quack", "mla", PAPER_RIVALS_IN_MLA),
    ),
    (
        "later work",
        "QuacK is better in MLA than QK norm, which keeps the latent cache, too (arXiv 2606.16310)",
        _is_better_at(_in("mla"), "quack", "qk_norm"),
    ),
    ("Fig. 3", "Frobenius or spectral norm makes little difference", _norms_agree("quack")),
    ("Fig. 4", "in MLA the logits explode without a stabilizer (1e4, changes of 1e2)", _baseline_explodes("mla")),
    ("Fig. 4", "QuacK controls the logits and their change", _controls_logits("quack", "mla")),
    ("Fig. 4", "QK norm controls the logits and their change", _controls_logits("qk_norm", "mla")),
    ("Fig. 4", "the fixed factor controls the logits and their change", _controls_logits("fixed", "mla")),
    ("Speed", "QuacK's steps are faster than QK norm's (by about 10%)", _is_faster("quack", "qk_norm")),
    ("Speed", "QuacK's steps are faster than QK clip's", _is_faster("quack", "qk_clip")),
]
