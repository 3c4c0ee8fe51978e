"""Write the report of a sweep: a page with its tables and figures (HTML and Markdown), and the figures as PNG and PDF.

    quack-lm report runs/quickstart [-o DIR]

Works on a sweep that is still running: the page lists the missing runs.
"""

from quack_lm import report
from quack_lm.cli.flags import Parser
from quack_lm.files import user_path
from quack_lm.paper import claims, figures
from quack_lm.text import echo, shell_line


def main(arguments: list[str]) -> int:
    """Write the report of a sweep directory and return the exit code."""
    parser = Parser("report", __doc__)
    parser.add_argument(
        "sweep_dir", type=user_path, help="a directory of quack-lm sweep run, or of its collected files"
    )
    parser.add_argument("-o", "--out", type=user_path, metavar="DIR", help="where to write (default: SWEEP_DIR/report)")
    options = parser.parse_args(arguments)
    command = shell_line(["quack-lm", "report", *arguments])
    path = report.write(
        options.sweep_dir,
        options.out or options.sweep_dir / "report",
        command=command,
        conclusions=[claims.recipe, claims.section],
        more_plots=[figures.plots],
    )
    echo(f"report: {path}")
    return 0
