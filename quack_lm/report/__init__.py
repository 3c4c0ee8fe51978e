"""The report on a sweep directory: results (what was measured), what it means, and how it is shown.

plan.json, run directories --results--> comparison, claims (on statistics) --sections--> page: report.html, report.md
or collected files                 \\--> figures, heat --draw--> figures/
"""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

from quack_lm.errors import UserError
from quack_lm.report import collected, page
from quack_lm.report.draw import draw, save
from quack_lm.report.figures import Plot, plots
from quack_lm.report.heat import HeatMaps, heat_maps
from quack_lm.report.results import Results
from quack_lm.report.sections import Section


def write(sweep_dir: Path, out_dir: Path, *, command: str, lead: Sequence[Callable[[Results], Section]] = ()) -> Path:
    """Write the report of a sweep directory, finished or not, and return the path of its page.

    `lead` makes the sections that come first: what is known of one paper's claims, for instance.
    """
    measured = collected.load(sweep_dir)
    pictures = []
    files: dict[str, bytes] = {}
    lines = plots(measured)
    appendix = [plot for plot in lines if plot.is_appendix]
    shown: list[Plot | HeatMaps] = [*(plot for plot in lines if not plot.is_appendix), *heat_maps(measured), *appendix]
    for plot in shown:
        figure = draw(plot)
        wide, narrow = save(figure), save(draw(plot, columns=1))
        figure.set_layout_engine("none")  # everything has its place now, and finding it takes most of the time
        files |= {f"figures/{plot.name}.png": wide, f"figures/{plot.name}.pdf": save(figure, "pdf")}
        about = {"name": plot.name, "title": plot.title, "caption": plot.caption}
        pictures.append(page.Picture(**about, wide=wide, narrow=narrow))
    first = [make(measured) for make in lead]
    files["report.md"] = page.as_markdown(measured, pictures, command, first).encode()
    files["report.html"] = page.as_html(measured, pictures, command, first).encode()
    # Only now, when nothing can go wrong but the writing.
    try:
        (out_dir / "figures").mkdir(parents=True, exist_ok=True)
        if in_the_way := [name for name in files if (out_dir / name).is_dir()]:
            raise IsADirectoryError(errno.EISDIR, f"{in_the_way[0]} is a directory")
        for name, content in files.items():
            (out_dir / name).write_bytes(content)
    except OSError as error:
        raise UserError(
            f"{out_dir}: no report can be written there: {error.strerror}; choose another with -o"
        ) from None
    return out_dir / "report.html"
