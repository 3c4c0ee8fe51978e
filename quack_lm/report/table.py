"""A table, rendered as plain text, Markdown or HTML; and numbers as text with a sensible number of digits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from quack_lm.text import escape
from quack_lm.training.counts import format_count

NO_NUMBER = "–"
BITS = "bits/byte"  # the column of a loss in bits per byte of text


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text. The columns in `numeric` are right-aligned; `classes` are the CSS classes of the rows, if any."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    classes: Sequence[str] = field(default_factory=list)

    def without_empty(self, name: str) -> "Table":
        """The same without the column of this name, where none of its cells has a number."""
        at = self.header.index(name)
        if any(row[at] != NO_NUMBER for row in self.rows):
            return self
        header, *rows = ([*cells[:at], *cells[at + 1 :]] for cells in (self.header, *self.rows))
        return replace(self, header=header, rows=rows, numeric=[i - (i > at) for i in self.numeric if i != at])

    def as_text(self) -> str:
        """The table for a terminal, with padded columns."""
        rows = [[escape(cell) for cell in cells] for cells in (self.header, *self.rows)]
        widths = [max(len(cells[column]) for cells in rows) for column in range(len(self.header))]
        lines = ["  ".join(self._flush(i, cell, widths[i]) for i, cell in enumerate(cells)) for cells in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join(line.rstrip() for line in lines)

    def as_markdown(self) -> str:
        """The table in Markdown."""
        rule = ["---:" if i in self.numeric else ":---" for i in range(len(self.header))]
        rows = [[escape(cell, "markdown") for cell in cells] for cells in (self.header, *self.rows)]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (rows[0], rule, *rows[1:]))

    def as_html(self) -> str:
        """A table element that scrolls horizontally where the page is narrow."""
        header, *rows = ([escape(cell, "html") for cell in cells] for cells in (self.header, *self.rows))
        head = "".join(f"<th{self._class(i)}>{cell}</th>" for i, cell in enumerate(header))
        body = ""
        for number, cells in enumerate(rows):
            mark = f' class="{self.classes[number]}"' if self.classes else ""
            body += f"<tr{mark}>"
            body += "".join(f"<td{self._class(i)}>{cell}</td>" for i, cell in enumerate(cells)) + "</tr>\n"
        table = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
        return f'<div class="scroll">\n{table}\n</div>'

    def _flush(self, column: int, cell: str, width: int) -> str:
        return cell.rjust(width) if column in self.numeric else cell.ljust(width)

    def _class(self, column: int) -> str:
        return ' class="number"' if column in self.numeric else ""


# ------------------------------------------------------------------------------------------------ digits


def loss(value: float | None) -> str:
    """`3.782`, or NO_NUMBER for None, as below."""
    return NO_NUMBER if value is None else f"{value:.3f}"


def significant(value: float | None, digits: int = 3) -> str:
    """`0.0512`, `71.3`, `318`, and powers of ten outside of 0.001 to 10000: `1.02e4`."""
    if value is None:
        return NO_NUMBER
    if value == 0:
        return "0"
    if math.isinf(value):
        return "∞"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    if -3 <= int(exponent) < 4:
        return f"{float(f'{mantissa}e{exponent}'):.{max(0, digits - 1 - int(exponent))}f}"
    return f"{mantissa}e{int(exponent)}"


def count(value: float | None) -> str:
    """`412k`, `41.2k`, `980`."""
    return NO_NUMBER if value is None else format_count(value)


def interval(mean: float, bounds: tuple[float, float] | None, digits: int = 3) -> str:
    """`+0.021 [+0.010, +0.033]`."""
    text = f"{mean:+.{digits}f}"
    return text if bounds is None else f"{text} [{bounds[0]:+.{digits}f}, {bounds[1]:+.{digits}f}]"


def duration(seconds: float | None) -> str:
    """`45s`, `12min`, `3.1h`."""
    if seconds is None:
        return NO_NUMBER
    if seconds < 100:
        return f"{seconds:.0f}s"
    return f"{seconds / 60:.0f}min" if seconds < 6000 else f"{seconds / 3600:.1f}h"
