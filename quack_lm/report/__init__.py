"""The report on a sweep directory: what was measured, how the stabilizers compare, and how it is shown.

plan.json, run directories --results--> comparison (on statistics) --sections--> page: report.html, report.md
or collected files                 \\--> figures, plateau, heat --draw--> figures/

It knows no stabilizer by name: what is about particular ones is handed to `write` by the caller.
"""

import errno
from collections.abc import Callable, Sequence
from pathlib import Path

from quack_lm.errors import explaining
from quack_lm.files import write_together
from quack_lm.report import collected, figures, page
from quack_lm.report.draw import draw, point_values, save
from quack_lm.report.figures import Plot
from quack_lm.report.heat import HeatMaps, heat_maps
from quack_lm.report.plateau import Plateaus
from quack_lm.report.results import Results
from quack_lm.report.sections import Section


def write(
    directories: Sequence[Path],
    out_dir: Path,
    *,
    command: str,
    conclusions: Sequence[Callable[[Results], Section]] = (),
    more_plots: Sequence[Callable[[Results], list[Plot]]] = (),
) -> Path:
    """Write the report of directories of sweeps and runs, finished or not, and return the path of its page.

    `command` is printed on the page. Each function of `conclusions` makes a section that follows the figures, each of
    `more_plots` figures beside the general ones.
    """
    results = collected.load(*directories)
    plots = figures.plots(results)
    appendix = [plot for plot in plots if plot.is_appendix]
    more = [plot for make in more_plots for plot in make(results)]
    shown: list[Plot | Plateaus | HeatMaps] = [plot for plot in plots if not plot.is_appendix]
    shown += [*more, *heat_maps(results), *appendix]
    pictures = []
    files: dict[str, bytes] = {}
    for plot in shown:
        figure = draw(plot)
        wide, narrow = save(figure), save(draw(plot, columns=1))
        figure.set_layout_engine("none")  # the layout is done, and repeating it takes most of the time
        files |= {f"figures/{plot.name}.png": wide, f"figures/{plot.name}.pdf": save(figure, "pdf")}
        pictures.append(
            page.Picture(
                name=plot.name,
                title=plot.title,
                caption=plot.caption,
                wide=wide,
                narrow=narrow,
                points=() if isinstance(plot, HeatMaps) else point_values(figure, plot),
            )
        )
    sections = [make(results) for make in conclusions]
    files["report.md"] = page.as_markdown(results, pictures, command, sections).encode()
    files["report.html"] = page.as_html(results, pictures, command, sections).encode()
    # Written last: an error above leaves an older report as it is.
    with explaining(f"-o {out_dir}", "or choose another directory with -o"):
        (out_dir / "figures").mkdir(parents=True, exist_ok=True)
        if in_the_way := [name for name in files if (out_dir / name).is_dir()]:
            raise IsADirectoryError(errno.EISDIR, f"{in_the_way[0]} is a directory")
        write_together({out_dir / name: content for name, content in files.items()})
    return out_dir / "report.html"
