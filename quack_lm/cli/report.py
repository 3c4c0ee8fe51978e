"""Write the report of a sweep: its table and figures as a page that opens from disk, and as Markdown, PNG and PDF.

    quack-lm report runs/quickstart [-o DIR]

Works on a sweep that is still running: what is missing is listed.
"""

import argparse
from pathlib import Path
from typing import NoReturn

from quack_lm import report
from quack_lm.errors import UserError
from quack_lm.paper import claims
from quack_lm.sweep.cell import shell_line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main(arguments: list[str]) -> int:
    """Write the report that the arguments ask for."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep_dir", type=Path, help="a directory that quack-lm sweep made")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="where to write; SWEEP_DIR/report unless given")
    options = parser.parse_args(arguments)
    command = shell_line(["quack-lm", "report", *arguments])
    path = report.write(
        options.sweep_dir, options.out or options.sweep_dir / "report", command=command, lead=[claims.section]
    )
    print(f"report: {path}")
    return 0
