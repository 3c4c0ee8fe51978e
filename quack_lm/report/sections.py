"""The sections of the page as text, tables and lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from quack_lm.config import flatten
from quack_lm.report import runs
from quack_lm.report.comparison import (
    BASELINE,
    ROUNDING,
    best_settings,
    by_label,
    differences_at,
    losses,
    noise,
    over_rates,
    speeds,
)
from quack_lm.report.results import Results
from quack_lm.report.statistics import bootstrap_interval, seeds_needed
from quack_lm.report.table import NO_NUMBER, Table, count, interval, loss

LEGEND = (
    "Losses in nats per token, of the last and of the best validation; max logit and mean |Δlogit| (the mean absolute "
    "change of the logits in one step) at the last probe; – means not measured or not finite. "
    "Unstable: the run did not diverge, but a stability rule flagged it; the reasons are in the notes on single runs."
)
SIZES_ASKED_FOR = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with a paragraph, and below it a table or a list of lines or of shell commands."""

    title: str
    intro: str
    table: Table | None = None
    lines: Sequence[str] = field(default_factory=list)
    are_commands: bool = False

    def has_content(self) -> bool:
        return bool(self.lines) or (self.table is not None and bool(self.table.rows))


def before_figures(results: Results, lead: Sequence[Section] = ()) -> list[Section]:
    """The conclusions and the missing runs, after the sections of `lead`; sections without content are left out."""
    return _with_content(
        *lead,
        _over_rates(results),
        _conditions(results),
        Section(
            title="Unfinished and missing runs",
            intro=f"Start or continue them with: {results.plan.command}",
            lines=runs.unfinished(results),
        ),
    )


def after_figures(results: Results) -> list[Section]:
    """The details: comparisons, costs and every single run; sections without content are left out."""
    return _with_content(
        _differences(results),
        _noise(results),
        _speeds(results),
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
        Section(title="All runs", intro=LEGEND, table=runs.table(results)),
        Section(
            title="Commands",
            intro="To repeat a run; run_dir=... sets its directory.",
            lines=[result.cell.bare_command() for result in results.results],
            are_commands=True,
        ),
    )


def _with_content(*sections: Section) -> list[Section]:
    return [section for section in sections if section.has_content()]


def provenance(results: Results, report_command: str) -> dict[str, str]:
    """The commands, and the machine and versions that the runs recorded; all values, where runs differ."""
    facts = {"sweep": results.plan.command, "report": report_command}
    if results.plan.stop:
        facts["stop rule"] = str(results.plan.stop)
    seen: dict[str, list[str]] = {}
    for result in results.results:
        for key, value in flatten(result.environment).items():
            name = key.removeprefix("versions.").replace("_", " ")
            # The commands of the runs have a section of their own.
            if key != "command" and value is not None and str(value) not in seen.setdefault(name, []):
                seen[name].append(str(value))
    return facts | {name: "; ".join(values) for name, values in seen.items() if values}


def _over_rates(results: Results) -> Section:
    rows = [
        (
            entry.attention,
            entry.stabilizer,
            f"{entry.best_rate:g}",
            f"{loss(entry.best_loss)}{_bounds(entry.best_interval)}",
            loss(entry.sensitivity) + _bounds(entry.sensitivity_interval),
            NO_NUMBER if entry.largest_stable is None else f"{entry.largest_stable:g}",
            ", ".join(f"{lr:g}" for lr in entry.missing),
        )
        for entry in over_rates(results)
    ]
    return Section(
        title="Best learning rate and LR sensitivity",
        intro="Each stabilizer at its best setting for each rate; means over seeds with 95% bootstrap intervals. LR "
        "sensitivity (Wortsman et al., arXiv 2309.14322) is the mean over the rates of min(loss, initial loss) minus "
        "the best loss; small is robust. It needs finished runs at every planned rate, and evenly spaced logarithms "
        "of the rates. Largest stable lr: at this rate and at all lower ones every planned run is healthy.",
        table=Table(
            header=(
                "attention",
                "stabilizer",
                "best lr",
                "loss at best lr",
                "LR sensitivity",
                "largest stable lr",
                "missing lr",
            ),
            rows=rows,
            numeric=range(2, 7),
        ),
    )


def _differences(results: Results) -> Section:
    rows = []
    for place in results.places():
        for pair in differences_at(results, place):
            verdict = f"{pair.better} is better" if pair.better else "not decided"
            numbers = interval(pair.mean, pair.interval)
            rows.append((str(place), pair.a, pair.b, numbers, str(len(pair.by_seed)), verdict))
    return Section(
        title="Pairwise differences",
        intro="Difference of the final validation losses, first minus second, each stabilizer at its best setting, "
        "paired by seed. One is better if the 95% bootstrap interval of the difference excludes zero by more than "
        f"{ROUNDING:g} nats. With three seeds the interval is the range, so one of four pairs of equal stabilizers "
        "differs by chance (one of 2^(n-1) for n up to five seeds), and this page compares many pairs. With fewer "
        "seeds there is no interval. If both runs of a seed diverged, their difference is zero. The settings were "
        "selected on the same runs: a stabilizer with more settings has more tries.",
        table=Table(
            header=("place", "first", "second", "difference (nats)", "pairs", "verdict"), rows=rows, numeric=(3, 4)
        ),
    )


def _conditions(results: Results) -> Section:
    """One row per place, if the sweep varies settings beside stabilizer, attention, rate and seed; else no row."""
    places = results.places() if any(place.condition for place in results.places()) else []
    stabilizers = results.stabilizers()
    rows = []
    for place in places:
        found = {name: losses(runs) for name, runs in best_settings(results.at(place)).items()}
        means = {name: fmean(values.values()) for name, values in found.items() if values}
        texts = [_mean(list(found.get(name, {}).values())) for name in stabilizers]
        order = " < ".join(sorted(means, key=means.__getitem__))
        rows.append((f"{place.attention}, lr {place.lr:g}", place.condition or "most common settings", *texts, order))
    return Section(
        title="Comparison under other settings",
        intro="Final validation loss of each stabilizer at its best setting, mean over seeds with its 95% bootstrap "
        "interval; the last column orders the stabilizers by their means.",
        table=Table(
            header=("place", "settings", *stabilizers, "order"),
            rows=rows,
            numeric=range(2, 2 + len(stabilizers)),
        ),
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
            str(speed.pairs),
        )
        for speed in speeds(results)
    ]
    return Section(
        title=f"Step time relative to {BASELINE}",
        intro="Geometric mean over pairs of runs that differ only in the stabilizer, with 95% bootstrap intervals; "
        "above 1 is slower. Validation, probe and checkpoints are not included. Runs that share a machine slow each "
        "other down: measure speed with one run at a time (jobs=1).",
        table=Table(
            header=("attention", "stabilizer", "tok/s", f"step time / {BASELINE}", "pairs"),
            rows=rows,
            numeric=range(2, 5),
        ),
    )


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


def _mean(values: Sequence[float]) -> str:
    return loss(fmean(values)) + _bounds(bootstrap_interval(values)) if values else NO_NUMBER


def _bounds(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
