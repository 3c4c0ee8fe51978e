"""Write the report of a sweep: its table and figures as a page that opens from disk, and as Markdown, PNG and PDF.

    python scripts/report.py runs/quickstart [-o DIR]

Works on a sweep that is still running: what is missing is listed.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from quack_lm import report
from quack_lm.errors import UserError, exit_on_user_error
from quack_lm.sweep.cell import shell_line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def main() -> None:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep_dir", type=Path, help="a directory that scripts/sweep.py made")
    parser.add_argument("-o", "--out", type=Path, metavar="DIR", help="where to write; SWEEP_DIR/report unless given")
    options = parser.parse_args()
    command = shell_line(["python", "scripts/report.py", *sys.argv[1:]])
    path = report.write(options.sweep_dir, options.out or options.sweep_dir / "report", command=command)
    print(f"report: {path}")


if __name__ == "__main__":
    with exit_on_user_error():
        main()
