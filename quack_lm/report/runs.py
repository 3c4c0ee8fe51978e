"""The table of all runs, and notes on single runs."""

from collections import Counter

from quack_lm.report.comparison import in_bits_per_byte
from quack_lm.report.results import Result, Results
from quack_lm.report.table import BITS, Table, count, duration, loss, significant
from quack_lm.text import escape

HEADER = (
    "attention",
    "stabilizer",
    "lr",
    "seed",
    "val loss",
    "best",
    BITS,
    "max logit",
    "mean |Δlogit|",
    "tok/s",
    "status",
)


def table(results: Results) -> Table:
    """The table with one row per planned run."""
    return Table(
        header=HEADER,
        rows=[row(result) for result in results.results],
        numeric=range(2, 10),
        classes=[_health(result) for result in results.results],
    ).without_empty(BITS)


def as_text(results: Results) -> str:
    """The table, the counts and the notes, for a terminal."""
    extra = [counts(results), *(f"  {line}" for line in notes(results))]
    return "\n".join([table(results).as_text(), "", *map(escape, extra)])


def row(result: Result) -> tuple[str, ...]:
    """The texts of HEADER's columns for one run."""
    return (
        f"{result.attention} {result.condition}".rstrip(),
        result.label,
        f"{result.lr:g}",
        str(result.seed),
        loss(result.number("val_loss")),
        loss(result.number("best_val_loss")),
        loss(in_bits_per_byte(result.number("val_loss"), [result])),
        significant(result.number("max_logit")),
        significant(result.number("delta_mean")),
        count(result.number("tokens_per_s")),
        status(result),
    )


def status(result: Result) -> str:
    """`completed`, `completed, unstable`, `diverged@120`: the outcome, and the step of a run that did not complete."""
    step = f"@{result.step}" if "step" in result.summary and result.status != "completed" else ""
    return result.outcome + step + (", unstable" if result.unstable else "")


def notes(results: Results) -> list[str]:
    """One line for each run with a reason, a warning or a head above the threshold."""
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
    """One line for each cell whose run has not finished."""
    return [f"{result.title}: {status(result)}" for result in results.results if not result.is_finished]


def counts(results: Results) -> str:
    """`10 runs: 9 completed (2 unstable), 1 diverged`."""
    by_status = Counter(result.outcome for result in results.results)
    unstable = Counter(result.outcome for result in results.results if result.unstable)
    marks = {name: f" ({n} unstable)" for name, n in unstable.items()}
    parts = [f"{n} {name}{marks.get(name, '')}" for name, n in by_status.items()]
    return f"{len(results.results)} runs: {', '.join(parts)}"


def _health(result: Result) -> str:
    if result.is_diverged or result.status == "failed":
        return "bad"
    if result.unstable or result.stop_record:
        return "unstable"
    return "" if result.is_finished else "unfinished"
