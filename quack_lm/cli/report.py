"""Write a report: a page with tables and figures (HTML and Markdown), and the figures as PNG and PDF.

    quack-lm report runs/quickstart [-o DIR]           # a sweep
    quack-lm report runs/mine                          # a run
    quack-lm report runs/mine runs/other [-o DIR]      # several sweeps and runs, together

Works on a sweep that is still running: the page lists the missing runs. A run that several directories have counts
once.
"""

from quack_lm import report
from quack_lm.cli.flags import Parser
from quack_lm.files import user_path
from quack_lm.paper import claims, figures
from quack_lm.text import echo, shell_line


def main(arguments: list[str]) -> int:
    """Write the report of some directories and return the exit code."""
    parser = Parser("report", __doc__)
    parser.add_argument(
        "directories",
        type=user_path,
        nargs="+",
        metavar="DIR",
        help="a directory of quack-lm sweep run, of its collected files, or of a run",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=user_path,
        metavar="OUT",
        help="where to write (default: DIR/report; of several directories, report beside the first)",
    )
    options = parser.parse_args(arguments)
    first, *others = options.directories
    command = shell_line(["quack-lm", "report", *arguments])
    path = report.write(
        options.directories,
        options.out or (first.parent if others else first) / "report",
        command=command,
        conclusions=[claims.recipe, claims.section],
        more_plots=[figures.plots],
    )
    echo(f"report: {path}")
    return 0
