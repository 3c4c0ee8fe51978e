"""The comparison table, as plain text, Markdown and HTML from the same cells."""

import html
import math
from collections import Counter

from quack_lm.report.results import Result, Results

# Columns of numbers are set flush right.
HEADER = ("attention", "stabilizer", "lr", "seed", "val loss", "best", "max logit", "mean |Δlogit|", "tok/s", "status")
NUMERIC = range(2, 9)
NO_NUMBER = "–"


def row(result: Result) -> tuple[str, ...]:
    return (
        result.attention,
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
    step = f"@{result.summary['step']}" if "step" in result.summary and result.status != "completed" else ""
    return result.status + step + (", unstable" if result.unstable else "")


def notes(results: Results) -> list[str]:
    """One line for each thing about a run that the table has no column for."""
    lines = []
    for result in results.results:
        reasons = [*result.unstable, *([result.summary["reason"]] if result.summary.get("reason") else [])]
        if reasons:
            lines.append(f"{title(result)}: {status(result)}: {'; '.join(dict.fromkeys(reasons))}")
    return lines


def title(result: Result) -> str:
    return f"{result.attention} {result.method} lr {result.lr:g} seed {result.seed}"


def unfinished(results: Results) -> list[str]:
    """The cells that have no final result yet."""
    return [f"{title(result)}: {status(result)}" for result in results.results if not result.is_finished]


def counts(results: Results) -> str:
    """`10 runs: 9 completed (2 unstable), 1 diverged`."""
    by_status = Counter(result.status for result in results.results)
    unstable = Counter(result.status for result in results.results if result.unstable)
    marks = {name: f" ({count} unstable)" for name, count in unstable.items()}
    parts = [f"{count} {name}{marks.get(name, '')}" for name, count in by_status.items()]
    return f"{len(results.results)} runs: {', '.join(parts)}"


# ------------------------------------------------------------------------------------------------ three renderings


def as_text(results: Results) -> str:
    rows = [HEADER, *(row(result) for result in results.results)]
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEADER))]
    lines = ["  ".join(_flush(i, cell, widths[i]) for i, cell in enumerate(cells)) for cells in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    extra = ["", counts(results), *(f"  {line}" for line in notes(results))]
    return "\n".join(line.rstrip() for line in [*lines, *extra])


def as_markdown(results: Results) -> str:
    rule = ["---:" if i in NUMERIC else ":---" for i in range(len(HEADER))]
    rows = [HEADER, rule, *(row(result) for result in results.results)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows)


def as_html(results: Results) -> str:
    head = "".join(f"<th{_class(i)}>{html.escape(cell)}</th>" for i, cell in enumerate(HEADER))
    body = "".join(
        f'<tr class="{_health(result)}">'
        + "".join(f"<td{_class(i)}>{html.escape(cell)}</td>" for i, cell in enumerate(row(result)))
        + "</tr>\n"
        for result in results.results
    )
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"


def _flush(column: int, cell: str, width: int) -> str:
    return cell.rjust(width) if column in NUMERIC else cell.ljust(width)


def _class(column: int) -> str:
    return ' class="number"' if column in NUMERIC else ""


def _health(result: Result) -> str:
    if result.is_diverged or result.status == "failed":
        return "bad"
    if result.unstable:
        return "unstable"
    return "" if result.is_finished else "unfinished"


# ------------------------------------------------------------------------------------------------ digits


def loss(value: float | None) -> str:
    return NO_NUMBER if value is None else f"{value:.3f}"


def significant(value: float | None, digits: int = 3) -> str:
    """`0.0512`, `71.3`, `318`, and powers of ten outside of 0.001 to 10000: `1.02e4`."""
    if value is None:
        return NO_NUMBER
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -3 <= int(exponent) < 4:
        return f"{float(f'{mantissa}e{exponent}'):.{max(0, digits - 1 - int(exponent))}f}"
    return f"{mantissa}e{int(exponent)}"


def per_second(value: float | None) -> str:
    """`412k`, `41.2k`, `980`."""
    if value is None:
        return NO_NUMBER
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            scaled = value / unit
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled)))}f}{suffix}"
    return f"{value:.0f}"
