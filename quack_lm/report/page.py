"""The report as one self-contained HTML page and as Markdown."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass

from quack_lm.config import flatten
from quack_lm.report import runs
from quack_lm.report.figures import Plot
from quack_lm.report.results import Results

LEGEND = (
    "Losses in nats per token, of the last and of the best validation; max logit and mean |Δlogit| (the mean absolute "
    "change of the logits in one step) at the last probe; – means not measured or not finite. "
    "Unstable: the run reached its end, but not in health; the reasons are below."
)

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.question { border-left: 4px solid #009E73; padding-left: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .55rem; text-align: left; white-space: nowrap; border-bottom: 1px solid #e3e3e3; }
th { border-bottom: 2px solid #888; } .number { text-align: right; }
tr.bad td { background: #fde3dc; } tr.unstable td { background: #fdf3d6; } tr.unfinished td { color: #666; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
figcaption { font-size: .85rem; color: #444; } .small { font-size: .85rem; color: #444; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
code { font-size: .8rem; overflow-wrap: anywhere; } li { margin: .3rem 0; }
@media print {
  body { max-width: none; font-size: 10pt; padding: 0; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; } figure, tr, li { break-inside: avoid; } h2 { break-after: avoid; }
  tr { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One drawn figure: its wide and its one-column form as PNG."""

    plot: Plot
    wide: bytes
    narrow: bytes


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with a list of lines below it."""

    title: str
    intro: str
    lines: list[str]
    are_commands: bool = False


def as_html(results: Results, pictures: Sequence[Picture], report_command: str) -> str:
    title = f"Sweep {results.plan.sweep}"
    facts = "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>\n" for k, v in provenance(results, report_command).items())
    before, after = sections(results)
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
<p class="question">{_e(results.plan.question)}</p>
<p>{_e(runs.counts(results))}.</p>
{runs.table(results).as_html()}
<p class="small">{_e(LEGEND)}</p>
{"".join(_section_html(section) for section in before)}
<h2>Figures</h2>
{"".join(_picture_html(picture) for picture in pictures) or "<p>No run has written any metrics yet.</p>"}
<h2>Where this comes from</h2>
<dl>
{facts}</dl>
{"".join(_section_html(section) for section in after)}
</body>
</html>
"""


def as_markdown(results: Results, plots: Sequence[Plot], report_command: str) -> str:
    before, after = sections(results)
    question = "\n".join(f"> {line}" for line in results.plan.question.splitlines())
    facts = "\n".join(f"- {key}: {value}" for key, value in provenance(results, report_command).items())
    figures = "\n\n".join(f"![{plot.title}](figures/{plot.name}.png)\n\n{plot.caption}" for plot in plots)
    parts = [
        f"# Sweep {results.plan.sweep}",
        question,
        f"{runs.counts(results)}.",
        runs.table(results).as_markdown(),
        LEGEND,
        *(_section_markdown(section) for section in before),
        "## Figures",
        figures or "No run has written any metrics yet.",
        "## Where this comes from",
        facts,
        *(_section_markdown(section) for section in after),
    ]
    return "\n\n".join(parts) + "\n"


def sections(results: Results) -> tuple[list[Section], list[Section]]:
    """The lists before and after the figures; a list with nothing to say is left out."""
    before = [
        Section(title="Runs to look at", intro="What the runs reported about themselves.", lines=runs.notes(results)),
        Section(
            title="Unfinished and missing runs",
            intro=f"{results.plan.command} starts or continues them.",
            lines=runs.unfinished(results),
        ),
        Section(
            title="Runs outside the plan",
            intro="In this directory, but in no cell of the present sweep file, and shown nowhere above.",
            lines=results.not_in_plan(),
        ),
    ]
    commands = Section(
        title="The command of each run",
        intro="From the root of the repository.",
        lines=[result.cell.command() for result in results.results],
        are_commands=True,
    )
    return [section for section in before if section.lines], [commands]


def provenance(results: Results, report_command: str) -> dict[str, str]:
    """The commands, and what the runs recorded about machine and versions; several values where they differ."""
    facts = {"sweep": results.plan.command, "report": report_command}
    seen: dict[str, list[str]] = {}
    for result in results.results:
        for key, value in flatten(result.environment).items():
            name = key.removeprefix("versions.").replace("_", " ")
            # Each run's own command has a section below.
            if key != "command" and value is not None and str(value) not in seen.setdefault(name, []):
                seen[name].append(str(value))
    return facts | {name: "; ".join(values) for name, values in seen.items() if values}


def _section_html(section: Section) -> str:
    lines = (f"<code>{_e(line)}</code>" if section.are_commands else _e(line) for line in section.lines)
    items = "\n".join(f"<li>{line}</li>" for line in lines)
    return f'<h2>{_e(section.title)}</h2>\n<p class="small">{_e(section.intro)}</p>\n<ul>\n{items}\n</ul>\n'


def _section_markdown(section: Section) -> str:
    lines = "\n".join(f"- `{line}`" if section.are_commands else f"- {line}" for line in section.lines)
    return f"## {section.title}\n\n{section.intro}\n\n{lines}"


def _picture_html(picture: Picture) -> str:
    wide, narrow = (f"data:image/png;base64,{base64.b64encode(png).decode()}" for png in (picture.wide, picture.narrow))
    return (
        f'<figure>\n<picture><source media="screen and (max-width: 640px)" srcset="{narrow}">'
        f'<img src="{wide}" alt="{_e(picture.plot.title)}"></picture>\n'
        f"<figcaption>{_e(picture.plot.caption)}</figcaption>\n</figure>\n"
    )


def _e(text: str) -> str:
    return html.escape(text)
