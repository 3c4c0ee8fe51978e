"""The table of all runs, and what is said about them one by one."""

from collections import Counter

from quack_lm.errors import printable
from quack_lm.report.results import Result, Results
from quack_lm.report.table import Table, duration, loss, per_second, significant

HEADER = ("attention", "stabilizer", "lr", "seed", "val loss", "best", "max logit", "mean |Δlogit|", "tok/s", "status")


def table(results: Results) -> Table:
    """One row per planned run."""
    return Table(
        header=HEADER,
        rows=[row(result) for result in results.results],
        numeric=range(2, 9),
        classes=[_health(result) for result in results.results],
    )


def as_text(results: Results) -> str:
    """What a terminal shows after a sweep."""
    extra = [counts(results), *(f"  {line}" for line in notes(results))]
    return "\n".join([table(results).as_text(), "", *map(printable, extra)])


def row(result: Result) -> tuple[str, ...]:
    return (
        f"{result.attention} {result.condition}".rstrip(),
        result.method,
        f"{result.lr:g}",
        str(result.seed),
        loss(result.number("val_loss")),
        loss(result.number("best_val_loss")),
        significant(result.number("max_logit")),
        significant(result.number("delta_mean")),
        per_second(result.number("tokens_per_s")),
        status(result),
    )


def status(result: Result) -> str:
    """The outcome, with the step where it is not the planned one, and a mark on runs that are quietly unhealthy."""
    step = f"@{result.step}" if "step" in result.summary and result.status != "completed" else ""
    return result.outcome + step + (", unstable" if result.unstable else "")


def notes(results: Results) -> list[str]:
    """One line for each thing about a run that the table has no column for."""
    lines = []
    for result in results.results:
        reasons = [*result.unstable, *([result.reason] if result.reason else [])]
        if result.stop_record:
            saved = f"{result.steps_saved} steps, {duration(result.seconds_saved)}, saved"
            reasons = [f"{results.plan.stop} ({saved})"]
        if result.blowup:
            reasons.append(str(result.blowup))
        if reasons:
            lines.append(f"{result.title}: {status(result)}: {'; '.join(dict.fromkeys(reasons))}")
    return lines


def unfinished(results: Results) -> list[str]:
    """The cells that have no final result yet."""
    return [f"{result.title}: {status(result)}" for result in results.results if not result.is_finished]


def counts(results: Results) -> str:
    """`10 runs: 9 completed (2 unstable), 1 diverged`."""
    by_status = Counter(result.outcome for result in results.results)
    unstable = Counter(result.outcome for result in results.results if result.unstable)
    marks = {name: f" ({count} unstable)" for name, count in unstable.items()}
    parts = [f"{count} {name}{marks.get(name, '')}" for name, count in by_status.items()]
    return f"{len(results.results)} runs: {', '.join(parts)}"


def _health(result: Result) -> str:
    if result.is_diverged or result.status == "failed":
        return "bad"
    if result.unstable or result.stop_record:
        return "unstable"
    return "" if result.is_finished else "unfinished"
