"""The report on a sweep directory: results (what was measured), table, figures (what to show), draw, page.

plan.json, run directories --results--> table, figures --draw--> page: report.html, report.md, figures/
"""

from pathlib import Path

from quack_lm.report import collected, page
from quack_lm.report.draw import draw, save
from quack_lm.report.figures import plots


def write(sweep_dir: Path, out_dir: Path, *, command: str) -> Path:
    """Write the report of a sweep directory, finished or not, and return the path of its page."""
    measured = collected.load(sweep_dir)
    shown = plots(measured)
    (out_dir / "figures").mkdir(parents=True, exist_ok=True)
    pictures = []
    for plot in shown:
        wide = draw(plot)
        for suffix in ("png", "pdf"):
            (out_dir / "figures" / f"{plot.name}.{suffix}").write_bytes(save(wide, suffix))
        pictures.append(page.Picture(plot=plot, wide=save(wide), narrow=save(draw(plot, columns=1))))
    (out_dir / "report.md").write_text(page.as_markdown(measured, shown, command), encoding="utf-8")
    path = out_dir / "report.html"
    path.write_text(page.as_html(measured, pictures, command), encoding="utf-8")
    return path
