"""The report on a sweep directory: results (what was measured), what it means, and how it is shown.

plan.json, run directories --results--> comparison, claims (on statistics) --sections--> page: report.html, report.md
or collected files                 \\--> figures, heat --draw--> figures/
"""

from pathlib import Path

from quack_lm.errors import UserError
from quack_lm.report import collected, page
from quack_lm.report.draw import draw, save
from quack_lm.report.figures import Plot, plots
from quack_lm.report.heat import HeatMaps, heat_maps


def write(sweep_dir: Path, out_dir: Path, *, command: str) -> Path:
    """Write the report of a sweep directory, finished or not, and return the path of its page."""
    measured = collected.load(sweep_dir)
    try:
        (out_dir / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{out_dir}: no report can be written there: {error.strerror}; choose another with -o"
        ) from None
    pictures = []
    lines = plots(measured)
    appendix = [plot for plot in lines if plot.is_appendix]
    shown: list[Plot | HeatMaps] = [*(plot for plot in lines if not plot.is_appendix), *heat_maps(measured), *appendix]
    for plot in shown:
        wide = draw(plot)
        for suffix in ("png", "pdf"):
            (out_dir / "figures" / f"{plot.name}.{suffix}").write_bytes(save(wide, suffix))
        narrow = save(draw(plot, columns=1))
        about = {"name": plot.name, "title": plot.title, "caption": plot.caption}
        pictures.append(page.Picture(**about, wide=save(wide), narrow=narrow))
    (out_dir / "report.md").write_text(page.as_markdown(measured, pictures, command), encoding="utf-8")
    path = out_dir / "report.html"
    path.write_text(page.as_html(measured, pictures, command), encoding="utf-8")
    return path
