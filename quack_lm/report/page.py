"""The report as one self-contained HTML page, and as Markdown."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from quack_lm.report import runs
from quack_lm.report.draw import PointValue
from quack_lm.report.results import Results
from quack_lm.report.sections import LONG, Section, after_figures, before_figures, provenance
from quack_lm.text import Medium, escape

CSS = """
:root { color-scheme: light dark; --page: #fff; --clear: #fff0; --text: #1b1b1b; --muted: #555; --line: #e3e3e3;
  --strong: #888; --shade: #0004; --accent: #009E73; --bad: #fde3dc; --good: #dff3ea; --unstable: #fdf3d6; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181c; --clear: #16181c00; --text: #e4e4e4; --muted: #a6a6a6; --line: #34373d; --strong: #777;
    --shade: #000c; --accent: #3fbf98; --bad: #51241a; --good: #133b2d; --unstable: #4a3a10; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 62rem;
  margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.question { border-left: 4px solid var(--accent); padding-left: .8rem; }
/* A shadow at the edge behind which there are more columns. */
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--page) 2rem, var(--clear)) left / 3rem 100% local no-repeat,
  linear-gradient(to left, var(--page) 2rem, var(--clear)) right / 3rem 100% local no-repeat,
  linear-gradient(to right, var(--shade), #0000) left / .9rem 100% no-repeat,
  linear-gradient(to left, var(--shade), #0000) right / .9rem 100% no-repeat; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { border-bottom: 2px solid var(--strong); } .number { text-align: right; }
tr.bad td { background: var(--bad); } tr.good td { background: var(--good); }
tr.prose td { white-space: normal; vertical-align: top; } tr.prose td:nth-child(-n+3) { min-width: 5.5rem; }
tr.prose td:last-child { min-width: 22rem; } tr.unstable td { background: var(--unstable); }
tr.unfinished td { color: var(--muted); }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; display: block; }
/* Figures are drawn on white. */
.plot { position: relative; width: fit-content; max-width: 100%; margin: 0 auto; background: #fff; }
.plot i { position: absolute; width: 14px; height: 14px; margin: -7px 0 0 -7px; border-radius: 50%; }
.plot i:hover { outline: 2px solid #1b1b1b; }
figcaption { font-size: .85rem; color: var(--muted); } .small { font-size: .85rem; color: var(--muted); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
code { font-size: .8rem; overflow-wrap: anywhere; } li { margin: .3rem 0; }
@media screen and (max-width: 640px) {
  .plot i { display: none; }
  thead:has(+ tbody .prose) { display: none; } tr.prose, tr.prose td { display: block; border-bottom: none; }
  tr.prose { border-bottom: 1px solid var(--strong); } tr.prose td:nth-child(3) { font-weight: bold; }
  tr.prose td, tr.prose td:last-child { min-width: 0; padding: .1rem .55rem; }
}
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; } figure, tr, li { break-inside: avoid; } h2 { break-after: avoid; }
  tr { print-color-adjust: exact; -webkit-print-color-adjust: exact; } .commands { display: none; }
}
"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawn figure: PNG files of its wide and its one-column form."""

    name: str  # of its files, without extension
    title: str
    caption: str
    wide: bytes
    narrow: bytes
    points: Sequence[PointValue] = ()  # shown on hover over the wide form


def as_html(
    results: Results, pictures: Sequence[Picture], report_command: str, conclusions: Sequence[Section] = ()
) -> str:
    """The page with everything in it, figures included; nothing is fetched when it opens."""
    title = f"Sweep {results.plan.sweep}"
    question = "\n".join(map(_e, results.plan.question.splitlines()))
    facts = "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>\n" for k, v in provenance(results, report_command).items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_e(title)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{_e(title)}</h1>
<p class="question">{question}</p>
<p>{_e(runs.counts(results))}.</p>
{"".join(_section_html(section) for section in before_figures(results))}
<h2>Figures</h2>
{"".join(_picture_html(picture) for picture in pictures) or f"<p>{no_pictures(results)}</p>"}
{"".join(_section_html(section) for section in after_figures(results, conclusions))}
<h2>Provenance</h2>
<dl>
{facts}</dl>
</body>
</html>
"""


def as_markdown(
    results: Results, pictures: Sequence[Picture], report_command: str, conclusions: Sequence[Section] = ()
) -> str:
    """The same page in Markdown; it refers to the files figures/NAME.png."""
    question = "\n".join(f"> {_md(line)}" for line in results.plan.question.splitlines())
    facts = "\n".join(f"- {_md(key)}: {_md(value)}" for key, value in provenance(results, report_command).items())
    figures = "\n\n".join(f"![{_md(p.title)}](figures/{p.name}.png)\n\n{_md(p.caption)}" for p in pictures)
    parts = [
        f"# Sweep {_md(results.plan.sweep)}",
        question,
        f"{_md(runs.counts(results))}.",
        *(_section_markdown(section) for section in before_figures(results)),
        "## Figures",
        figures or no_pictures(results),
        *(_section_markdown(section) for section in after_figures(results, conclusions)),
        "## Provenance",
        facts,
    ]
    return "\n\n".join(parts) + "\n"


def no_pictures(results: Results) -> str:
    """The text that replaces the figures if there are none."""
    if any(result.step for result in results.results):
        return "No figures: the curves of these runs are missing (curves.parquet, or the run directories)."
    return "No run has written any metrics yet."


def _section_html(section: Section) -> str:
    lines = (f"<code>{_e(line)}</code>" if section.are_commands else _e(line) for line in section.lines)
    items = "\n".join(f"<li>{line}</li>" for line in lines)
    table = section.table.as_html() if section.table else ""
    content = table + (f"\n<ul>\n{items}\n</ul>\n" if items else "\n")
    if section.length > LONG:
        content = f"<details><summary>{section.length} entries</summary>\n{content}</details>\n"
    block = f'<h2>{_e(section.title)}</h2>\n<p class="small">{_e(section.intro)}</p>\n{content}'
    return f'<div class="commands">\n{block}</div>\n' if section.are_commands else block


def _section_markdown(section: Section) -> str:
    medium: Medium = "markdown code" if section.are_commands else "markdown"
    lines = "\n".join(f"- {escape(line, medium)}" for line in section.lines)
    table = section.table.as_markdown() if section.table else ""
    content = [table, lines]
    if section.length > LONG:
        content = [f"<details><summary>{section.length} entries</summary>", *content, "</details>"]
    return "\n\n".join(part for part in (f"## {section.title}", _md(section.intro), *content) if part)


def _picture_html(picture: Picture) -> str:
    wide, narrow = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (picture.wide, picture.narrow))
    points = "".join(
        f'<i style="left:{100 * p.left:.2f}%;top:{100 * p.top:.2f}%" title="{_e(p.text)}"></i>' for p in picture.points
    )
    return (
        '<figure>\n<div class="plot"><picture>'
        f'<source media="screen and (max-width: 640px)" srcset="{narrow}">'
        f'<img src="{wide}" alt="{_e(picture.title)}"></picture>{points}</div>\n'
        f"<figcaption>{_e(picture.caption)}</figcaption>\n</figure>\n"
    )


def _e(text: str) -> str:
    return escape(text, "html")


def _md(text: str) -> str:
    return escape(text, "markdown")
