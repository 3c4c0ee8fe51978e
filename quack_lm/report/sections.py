"""What the page says, section by section, as text, tables and lists."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median

from quack_lm.config import flatten
from quack_lm.report import runs
from quack_lm.report.comparison import (
    ROUNDING,
    best_settings,
    by_method,
    differences_at,
    losses,
    noise,
    over_rates,
    speeds,
)
from quack_lm.report.results import Results
from quack_lm.report.statistics import bootstrap_interval, seeds_needed
from quack_lm.report.table import NO_NUMBER, Table, interval, loss, per_second

LEGEND = (
    "Losses in nats per token, of the last and of the best validation; max logit and mean |Δlogit| (the mean absolute "
    "change of the logits in one step) at the last probe; – means not measured or not finite. "
    "Unstable: the run reached its end, but not in health; the reasons are below."
)
SIZES_ASKED_FOR = (0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with what is below it."""

    title: str
    intro: str
    table: Table | None = None
    lines: Sequence[str] = field(default_factory=list)
    are_commands: bool = False

    def has_content(self) -> bool:
        return bool(self.lines) or (self.table is not None and bool(self.table.rows))


def before_figures(results: Results, lead: Sequence[Section] = ()) -> list[Section]:
    """Conclusions, and what is missing for them; `lead` comes first; a section with nothing to say is left out."""
    return _with_content(
        *lead,
        _over_rates(results),
        _conditions(results),
        Section(
            title="Unfinished and missing runs",
            intro=f"{results.plan.command} starts or continues them.",
            lines=runs.unfinished(results),
        ),
    )


def after_figures(results: Results) -> list[Section]:
    """Everything one by one."""
    return _with_content(
        _differences(results),
        _noise(results),
        _speeds(results),
        _measuring(results),
        _blowups(results),
        Section(title="Runs to look at", intro="What the runs reported about themselves.", lines=runs.notes(results)),
        Section(
            title="Runs outside the plan",
            intro="In this directory, but in no cell of the present sweep file, and shown nowhere above.",
            lines=results.not_in_plan(),
        ),
        Section(title="All runs", intro=LEGEND, table=runs.table(results)),
        Section(
            title="The command of each run",
            intro="From the root of the repository; run_dir=... chooses the directory.",
            lines=[result.cell.bare_command() for result in results.results],
            are_commands=True,
        ),
    )


def _with_content(*sections: Section) -> list[Section]:
    return [section for section in sections if section.has_content()]


def provenance(results: Results, report_command: str) -> dict[str, str]:
    """The commands, and what the runs recorded about machine and versions; several values where they differ."""
    facts = {"sweep": results.plan.command, "report": report_command}
    if results.plan.stop:
        facts["stop rule"] = str(results.plan.stop)
    seen: dict[str, list[str]] = {}
    for result in results.results:
        for key, value in flatten(result.environment).items():
            name = key.removeprefix("versions.").replace("_", " ")
            # Each run's own command has a section below.
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
        title="Over the learning rates",
        intro="Each method at its best setting for each rate; means over seeds with 95% bootstrap intervals. LR "
        "sensitivity (Wortsman et al., arXiv 2309.14322) is the mean over the rates of min(loss, initial loss) less "
        "the best loss: small is robust. It needs finished runs at every planned rate, and rates evenly spaced in "
        "their logarithm. Largest stable: the largest rate at which, as at all below, every planned run ended healthy.",
        table=Table(
            header=(
                "attention",
                "method",
                "best lr",
                "loss there",
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
            said = f"{pair.winner} is better" if pair.winner else "not decided"
            numbers = interval(pair.mean, pair.interval)
            rows.append((str(place), pair.a, pair.b, numbers, str(len(pair.by_seed)), said))
    return Section(
        title="Method against method",
        intro="Difference of the final validation losses, first less second, each at its best setting, paired by seed. "
        f"Better is said only where the 95% bootstrap interval excludes zero, and {ROUNDING:g} nats on its side of it. "
        "With three seeds that interval is the range, so one pair of equal methods in four is called different by "
        "chance (one in 2^(n-1) for n up to five seeds), and this page compares many. With fewer there is no interval. "
        "Where both runs of a seed diverged, that seed is a draw. Settings were chosen by the same runs: a method with "
        "more of them has more tries.",
        table=Table(header=("place", "first", "second", "difference (nats)", "pairs", "so"), rows=rows, numeric=(3, 4)),
    )


def _conditions(results: Results) -> Section:
    """One row per choice that a sweep varies beside the methods; empty where it varies none."""
    places = results.places() if any(place.condition for place in results.places()) else []
    methods = results.stabilizers()
    rows = []
    for place in places:
        found = {name: losses(runs) for name, runs in best_settings(results.at(place)).items()}
        means = {name: fmean(values.values()) for name, values in found.items() if values}
        texts = [_mean(list(found.get(name, {}).values())) for name in methods]
        order = " < ".join(sorted(means, key=means.__getitem__))
        rows.append((f"{place.attention}, lr {place.lr:g}", place.condition or "as most runs", *texts, order))
    return Section(
        title="Does the comparison depend on the other choices?",
        intro="Final validation loss of each method at its best setting, mean over seeds with its 95% bootstrap "
        "interval, under each choice; the last column orders the methods by their means.",
        table=Table(header=("attention", "choice", *methods, "order"), rows=rows, numeric=range(2, 2 + len(methods))),
    )


def _noise(results: Results) -> Section:
    found = noise(results)
    lines = []
    if found.of_losses is not None:
        lines.append(f"The loss of a healthy method has a standard deviation of {found.of_losses:.4f} over seeds.")
    if found.of_differences is not None:
        lines.append(
            "The paired difference of two healthy methods at their best settings has one of "
            f"{found.of_differences:.4f}."
        )
        needed = ", ".join(f"{seeds_needed(size, found.of_differences)} for {size}" for size in SIZES_ASKED_FOR)
        lines.append(f"Paired seeds needed to find a difference four times out of five: {needed} nats.")
    return Section(
        title="Noise", intro="From runs that differ in their seed only, pooled over all places.", lines=lines
    )


def _speeds(results: Results) -> Section:
    rows = [
        (
            speed.attention,
            speed.stabilizer,
            per_second(speed.tokens_per_s),
            f"{speed.ratio:.3f}" + _bounds(speed.interval),
            str(speed.pairs),
        )
        for speed in speeds(results)
    ]
    return Section(
        title="Step time relative to none",
        intro="Geometric mean over pairs of runs that differ in the method only, with 95% bootstrap intervals; above 1 "
        "is slower. Validation, probe and checkpoints do not count. Runs beside others on one machine disturb each "
        "other: sweep=paper/speed with jobs=1 is the measurement.",
        table=Table(
            header=("attention", "method", "tok/s", "step time / none", "pairs"), rows=rows, numeric=range(2, 5)
        ),
    )


def _measuring(results: Results) -> Section:
    costs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for result in results.results:
        what = "probe with its parts" if result.cell.config["trainer"].get("probe_parts") else "probe"
        if result.probe_cost:
            costs.setdefault((result.attention, what), []).append(result.probe_cost)
    rows = []
    for (attention, what), found in costs.items():
        seconds, steps = (median(values) for values in zip(*found, strict=True))
        rows.append((attention, what, f"{1e3 * seconds:.3g} ms", f"{steps:.2f}", str(len(found))))
    return Section(
        title="What measuring costs",
        intro="Medians over runs of the time of one probe, alone and in units of the run's own training steps. It is "
        "never part of the throughput.",
        table=Table(header=("attention", "what", "each", "in steps", "runs"), rows=rows, numeric=range(2, 5)),
    )


def _blowups(results: Results) -> Section:
    rows = []
    for place in results.places():
        for method, members in by_method(results.at(place)).items():
            if found := [r for r in members if r.blowup]:
                first = min(found, key=lambda r: r.blowup or ())
                numbers = (*(first.blowup or ()), first.seed)
                rows.append((str(place), method, f"{len(found)} of {len(members)}", *map(str, numbers)))
    return Section(
        title="Which head leaves its range first",
        intro="The earliest probe of any seed at which a head's largest logit was above trainer.unstable_logit, and "
        "the head that was then the largest; layers and heads count from 0. Each run's own is below.",
        table=Table(
            header=("place", "method", "runs", "step", "layer", "head", "seed"), rows=rows, numeric=range(2, 7)
        ),
    )


def _mean(values: Sequence[float]) -> str:
    return loss(fmean(values)) + _bounds(bootstrap_interval(values)) if values else NO_NUMBER


def _bounds(bounds: tuple[float, float] | None) -> str:
    return "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
