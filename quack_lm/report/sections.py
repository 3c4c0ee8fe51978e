"""The sections of the page as text, tables and lists."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from quack_lm.config import flatten
from quack_lm.report import runs
from quack_lm.report.comparison import (
    BASELINE,
    PLATEAU,
    ROUNDING,
    Difference,
    best_settings,
    by_label,
    comparisons,
    difference,
    in_bits_per_byte,
    losses,
    noise,
    over_rates,
    speeds,
)
from quack_lm.report.results import Result, Results
from quack_lm.report.statistics import ALPHA, holm, seeds_needed, t_interval
from quack_lm.report.table import BITS, NO_NUMBER, Table, count, interval, loss, significant

LEGEND = (
    "Losses in nats per token, of the last and of the best validation; max logit and mean |Δlogit| (the mean absolute "
    "change of the logits in one step) at the last probe; – means not measured or not finite. "
    "Unstable: the run did not diverge, but a stability rule flagged it; the reasons are in the notes on single runs."
)
LEGEND_OF_BITS = (
    f" {BITS}: the last validation loss in bits per byte of text, in which data sets with different tokenizers compare."
)
SIZES_ASKED_FOR = (0.01, 0.02, 0.05, 0.1)
LOWEST_BITS = f"lowest in {BITS}"
# Longer tables and lists are folded, and so many runs are shown by setting, too.
LONG = 300


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with a paragraph, and below it a table or a list of lines or of shell commands."""

    title: str
    intro: str
    table: Table | None = None
    lines: Sequence[str] = field(default_factory=list)
    are_commands: bool = False

    @property
    def length(self) -> int:
        """The number of its rows and lines; without any it is left out."""
        return len(self.lines) + (len(self.table.rows) if self.table else 0)


def before_figures(results: Results) -> list[Section]:
    """What is missing; sections without content are left out."""
    return _with_content(
        Section(
            title="Unfinished and missing runs",
            intro=f"Start or continue them with: {results.plan.command}",
            lines=runs.unfinished(results),
        ),
    )


def after_figures(results: Results, conclusions: Sequence[Section] = ()) -> list[Section]:
    """The conclusions, then the details: comparisons, costs and every run; sections without content are left out."""
    return _with_content(
        *conclusions,
        _over_rates(results),
        _conditions(results),
        _differences(results),
        _noise(results),
        _speeds(results),
        _bounds_of_change(results),
        _probe_costs(results),
        _blowups(results),
        Section(
            title="Notes on single runs",
            intro="Why runs ended or count as unstable, and their first head above trainer.unstable_logit.",
            lines=runs.notes(results),
        ),
        Section(
            title="Runs outside the plan",
            intro="These run directories belong to no cell of the current plan and are not included above.",
            lines=results.not_in_plan(),
        ),
        _settings(results),
        _all_runs(results),
        Section(
            title="Commands",
            intro="To repeat a run; run_dir=... sets its directory.",
            lines=[result.cell.bare_command() for result in results.results],
            are_commands=True,
        ),
    )


def _all_runs(results: Results) -> Section:
    table = runs.table(results)
    return Section(title="All runs", intro=LEGEND + LEGEND_OF_BITS * (BITS in table.header), table=table)


def _with_content(*sections: Section) -> list[Section]:
    return [section for section in sections if section.length]


def provenance(results: Results, report_command: str) -> dict[str, str]:
    """The commands, and the machine and versions that the runs recorded; all values, where runs differ."""
    facts = {"sweep": results.plan.command, "report": report_command}
    if results.plan.stop:
        facts["stop rule"] = str(results.plan.stop)
    seen: dict[str, list[str]] = {}
    for result in results.results:
        for key, value in flatten(result.environment).items():
            name = key.removeprefix("versions.").replace("_", " ")
            # The commands of the runs have a section of their own; what `made_of` says of the data is enough here.
            is_shown = key != "command" and ".source." not in key and value is not None
            if is_shown and str(value) not in seen.setdefault(name, []):
                seen[name].append(str(value))
    return facts | {name: "; ".join(values) for name, values in seen.items() if values}


def selection(results: Results) -> str:
    """How the best settings were selected, and what that does to the numbers."""
    seeds = results.plan.tune_seeds
    if seeds:
        return (
            f"Seeds {seed_range(seeds)} select the setting of each stabilizer, and the other seeds judge it, so that "
            "the number of settings does not matter."
        )
    tries = [best.tries for place in results.places() for best in best_settings(results, place).values()]
    if max(tries, default=1) == 1:
        return "Each stabilizer has one setting."
    return (
        "The settings were selected on the same seeds that judge them: the loss of a stabilizer with several settings "
        "is lower than it would be on new seeds. Intervals and p-values are corrected for the number of settings "
        "(Bonferroni over the settings of a stabilizer, against every setting of the other), so that a stabilizer is "
        "not called better for having more of them; means are not corrected."
    )


def _over_rates(results: Results) -> Section:
    entries = over_rates(results)
    rows = [
        (
            entry.attention,
            entry.stabilizer,
            seed_range(entry.seeds),
            f"{entry.best_rate:g}" + (" (edge)" if entry.is_at_edge else ""),
            f"{loss(entry.best_loss)}{_bounds(entry.best_interval)}",
            loss(entry.best_bits_per_byte),
            entry.plateau_text or NO_NUMBER,
            loss(entry.sensitivity) + _bounds(entry.sensitivity_interval),
            NO_NUMBER if entry.largest_stable is None else f"{entry.largest_stable:g}",
            ", ".join(f"{lr:g}" for lr in entry.missing),
            NO_NUMBER if entry.cache_bytes is None else f"{entry.cache_bytes:,}",
        )
        for entry in entries
    ]
    at_edge = sum(entry.is_at_edge for entry in entries)
    edge = (
        f" For {at_edge} of these {len(entries)} rows the best rate is the lowest or the highest that was run (edge): "
        "a wider grid may have a better one, and the best rate, its loss and the LR sensitivity are those of the grid."
    )
    return Section(
        title="Best learning rate and LR sensitivity",
        intro="Each stabilizer at its best setting for each rate; means, with 95% t intervals, over the seeds that "
        "have finished at every rate. The interval of the best loss is corrected for the number of settings and rates "
        "from which these seeds selected it (Bonferroni); the sensitivity has none where they selected the settings. "
        f"Plateau: the rates around the best one whose loss is within {PLATEAU:g} nats of "
        "its, with ≤ or ≥ where it reaches the edge of the grid. LR sensitivity (Wortsman et al., arXiv 2309.14322) is "
        "the mean over the rates of min(loss, initial loss) minus the best loss, of each seed; small is robust. It "
        "needs finished runs at every planned rate, and evenly spaced logarithms of the rates. Largest stable lr: at "
        "this rate and at all lower ones every planned run is healthy. At decode: what a token leaves in the cache, in "
        "bfloat16, by what the attention and the stabilizer declare." + (edge if at_edge else ""),
        table=Table(
            header=(
                "attention",
                "stabilizer",
                "seeds",
                "best lr",
                "loss at best lr",
                BITS,
                "plateau",
                "LR sensitivity",
                "largest stable lr",
                "missing lr",
                "at decode: bytes per token and layer",
            ),
            rows=rows,
            numeric=range(2, 11),
        ).without_empty(BITS),
    )


def seed_range(seeds: Sequence[int]) -> str:
    """`0-2, 5`."""
    parts: list[list[int]] = []
    for seed in sorted(seeds):
        if parts and seed == parts[-1][-1] + 1:
            parts[-1].append(seed)
        else:
            parts.append([seed])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in parts) or NO_NUMBER


def _differences(results: Results) -> Section:
    found = comparisons(results)
    rows = [
        (
            str(one.place),
            one.pair.a,
            one.pair.b,
            interval(one.pair.mean, one.pair.interval),
            str(len(one.pair.by_seed)),
            NO_NUMBER if one.p is None else significant(min(one.pair.p_lower(), one.pair.p_higher()), 2),
            NO_NUMBER if one.p is None else significant(one.p, 2),
            NO_NUMBER if one.detectable is None else significant(one.detectable, 2),
            one.verdict,
        )
        for one in found
    ]
    tested = sum(one.p is not None for one in found)
    alone = sum(one.p is not None and min(one.pair.p_lower(), one.pair.p_higher()) < ALPHA for one in found)
    decided = sum(one.verdict != "not decided" for one in found)
    return Section(
        title="Pairwise differences",
        intro="Difference of the final validation losses, first minus second, each stabilizer at its best setting, "
        f"paired by seed, with its 95% t interval. {selection(results)} "
        f"This page tests {tested} differences. {alone} have p below 5% by themselves; {decided} have it after Holm's "
        "correction for their number. The verdict is on the first, by the corrected p-value, with "
        f"{ROUNDING:g} nats to spare. Detectable: the smallest difference that seeds with this noise find with 80% "
        "power at the level that the correction asks for. Where all losses are equal, nothing is tested; where both "
        "runs of a seed diverged, their difference is zero.",
        table=Table(
            header=(
                "place",
                "first",
                "second",
                "difference (nats)",
                "seeds",
                "p",
                "p, corrected",
                "detectable",
                "verdict",
            ),
            rows=rows,
            numeric=range(3, 8),
        ),
    )


def _conditions(results: Results) -> Section:
    """One row per place, if the sweep varies settings beside stabilizer, attention, rate and seed; else no row."""
    places = results.places() if any(place.condition for place in results.places()) else []
    stabilizers = results.stabilizers()
    best = {place: best_settings(results, place) for place in places}
    found = {place: {name: losses(one.runs) for name, one in best[place].items()} for place in places}
    means = {place: {n: fmean(v.values()) for n, v in found[place].items() if v} for place in places}
    orders = {place: sorted(means[place], key=means[place].__getitem__) for place in places}
    pairs: dict[tuple[int, str], Difference] = {}
    for number, place in enumerate(places):
        for low, high in itertools.pairwise(orders[place]):
            if pair := difference(best[place][low], best[place][high]):
                pairs[number, high] = pair
    p_values = dict(zip(pairs, holm([pair.p_lower() for pair in pairs.values()]), strict=True))
    alone = sum(pair.p_lower() < ALPHA for pair in pairs.values())
    decided = sum(p < ALPHA for p in p_values.values())
    rows = []
    for number, place in enumerate(places):
        order = "".join(
            (f" {'<' if p_values.get((number, name), 1.0) < ALPHA else '~'} " if rank else "") + name
            for rank, name in enumerate(orders[place])
        )
        texts = [_mean(list(found[place].get(name, {}).values())) for name in stabilizers]
        lowest = orders[place][0] if orders[place] else None
        bits = in_bits_per_byte(means[place][lowest], best[place][lowest].runs) if lowest else None
        settings = place.condition or "most common settings"
        rows.append((f"{place.attention}, lr {place.lr:g}", settings, *texts, loss(bits), order))
    return Section(
        title="Comparison under other settings",
        intro="Final validation loss of each stabilizer at its best setting, mean over seeds with its 95% t interval. "
        "The last column orders the stabilizers by their means, with < where the paired difference of neighbors is "
        f"decided after Holm's correction for the {len(pairs)} neighbors of this table, and ~ where it is not: "
        f"{alone} of them differ at 5% by themselves, {decided} after the correction.",
        table=Table(
            header=("place", "settings", *stabilizers, LOWEST_BITS, "order"),
            rows=rows,
            numeric=range(2, 3 + len(stabilizers)),
        ).without_empty(LOWEST_BITS),
    )


def _noise(results: Results) -> Section:
    found = noise(results)
    lines = []
    if found.of_losses is not None:
        lines.append(f"Standard deviation of the loss over seeds: {found.of_losses:.4f} nats.")
    if found.of_differences is not None:
        lines.append(
            "Standard deviation of the paired difference of two stabilizers at their best settings: "
            f"{found.of_differences:.4f} nats."
        )
        needed = ", ".join(f"{seeds_needed(size, found.of_differences)} for {size}" for size in SIZES_ASKED_FOR)
        lines.append(f"Paired seeds needed to detect a difference with 80% power: {needed} nats.")
    return Section(
        title="Noise over seeds",
        intro="From healthy runs that differ only in their seed, pooled over all places.",
        lines=lines,
    )


def _speeds(results: Results) -> Section:
    rows = [
        (
            speed.attention,
            speed.stabilizer,
            count(speed.tokens_per_s),
            f"{speed.ratio:.3f}" + _bounds(speed.interval),
            str(len(speed.logs)),
        )
        for speed in speeds(results)
    ]
    return Section(
        title=f"Step time relative to {BASELINE}",
        intro="Geometric mean over pairs of runs that differ only in the stabilizer, with 95% t intervals of the "
        "logarithm; above 1 is slower. Validation, probe and checkpoints are not included. Runs that share a machine "
        "slow each other down: measure speed with one run at a time (jobs=1).",
        table=Table(
            header=("attention", "stabilizer", "tok/s", f"step time / {BASELINE}", "pairs"),
            rows=rows,
            numeric=range(2, 5),
        ),
    )


def _bounds_of_change(results: Results) -> Section:
    """How far the bound on the change of the logits is above the change, where the probe measured both."""
    rows = []
    for place in results.places():
        for label, members in by_label(results.at(place)).items():
            if ratios := [ratio for run in members for ratio in _bound_ratios(run)]:
                numbers = (significant(value) for value in (min(ratios), median(ratios), max(ratios)))
                rows.append((str(place), label, *numbers, str(len(ratios))))
    return Section(
        title="Bound and measured change of the logits",
        intro="The bound of the largest change of a logit by the layer's own weights (from the norms of weights and "
        "updates), divided by the measured one: smallest, median and largest of all probes and seeds. 1 would be "
        "tight.",
        table=Table(
            header=("place", "stabilizer", "smallest", "median", "largest", "probes"), rows=rows, numeric=range(2, 6)
        ),
    )


def _bound_ratios(run: Result) -> list[float]:
    measured, bound = (run.curve(f"logits/delta_weights_max{end}") for end in ("", "_bound"))
    both = zip((value for _, value in measured), (value for _, value in bound), strict=False)
    # A stabilizer that normalizes between weights and logits has no bound: nan.
    return [above / change for change, above in both if change > 0 and math.isfinite(above / change)]


def _probe_costs(results: Results) -> Section:
    costs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result in results.results:
        kind = "probe with parts" if result.cell.config["trainer"].get("probe_parts") else "probe"
        if result.probe_cost:
            costs.setdefault((result.attention, kind), []).append(result.probe_cost)
    rows = []
    for (attention, kind), found in costs.items():
        seconds, steps = (median(values) for values in zip(*found, strict=True))
        rows.append((attention, kind, f"{1e3 * seconds:.3g} ms", f"{steps:.2f}", str(len(found))))
    return Section(
        title="Cost of the probe",
        intro="Time of one probe, in milliseconds and in training steps of the same run; medians over runs. The "
        "throughput does not include it.",
        table=Table(header=("attention", "probe", "time", "in steps", "runs"), rows=rows, numeric=range(2, 5)),
    )


def _blowups(results: Results) -> Section:
    rows = []
    for place in results.places():
        for label, members in by_label(results.at(place)).items():
            if found := [r for r in members if r.blowup]:
                first = min(found, key=lambda r: r.blowup or ())
                numbers = (*(first.blowup or ()), first.seed)
                rows.append((str(place), label, f"{len(found)} of {len(members)}", *map(str, numbers)))
    return Section(
        title="First head above the threshold",
        intro="The earliest probe of any seed at which the max logit of a head was above trainer.unstable_logit, and "
        "the head with the largest max logit at that probe; layers and heads count from 0. The notes on single runs "
        "have the first head of each run.",
        table=Table(
            header=("place", "stabilizer", "runs", "step", "layer", "head", "seed"), rows=rows, numeric=range(2, 7)
        ),
    )


def _settings(results: Results) -> Section:
    """One row for each stabilizer with its settings at each place, if there are too many runs to read one by one."""
    rows = []
    for place in results.places() if len(results.results) > LONG else []:
        for label, members in by_label(results.at(place)).items():
            finished = [r for r in members if r.is_finished]
            found = (
                max((v for r in finished if (v := r.number(key)) is not None), default=None)
                for key in ("max_logit", "delta_mean")
            )
            numbers = (sum(r.is_diverged for r in finished), sum(bool(r.unstable) for r in finished))
            seeds = f"{len(finished)} of {len(members)}"
            values = list(losses(members).values())
            bits = loss(in_bits_per_byte(fmean(values), members)) if values else NO_NUMBER
            rows.append((str(place), label, seeds, _mean(values), bits, *map(significant, found), *map(str, numbers)))
    return Section(
        title="Runs by setting",
        intro="Final validation loss, at most the initial one, which a diverged run has: mean over seeds with its 95% "
        "t interval. Largest max logit and mean |Δlogit| of any seed at the last probe.",
        table=Table(
            header=(
                "place",
                "stabilizer",
                "finished",
                "val loss",
                BITS,
                "max logit",
                "mean |Δlogit|",
                "diverged",
                "unstable",
            ),
            rows=rows,
            numeric=range(2, 9),
        ).without_empty(BITS),
    )


def _mean(values: Sequence[float]) -> str:
    return loss(fmean(values)) + _bounds(t_interval(values)) if values else NO_NUMBER


def _bounds(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
