"""Results as pandas tables, for notebooks.

from quack_lm import results

runs, curves = results.load("runs/quickstart")               # a sweep, or its collected files
runs, curves = results.load("runs/mine", "runs/other")       # several runs or sweeps
curves.merge(runs[["run", "stabilizer", "lr"]], on="run").pivot_table("val/loss", "step", "stabilizer")
"""

from os import PathLike
from typing import TYPE_CHECKING, NamedTuple

from quack_lm.errors import UserError
from quack_lm.files import user_path
from quack_lm.report import collected

if TYPE_CHECKING:
    import pandas


class Frames(NamedTuple):
    """The columns are those of `quack-lm sweep collect`."""

    runs: "pandas.DataFrame"  # a row for each run: settings as config.*, outcome, numbers of its summary
    curves: "pandas.DataFrame"  # a row for each run and logged step; NaN where a metric was not due or not finite


def load(*directories: str | PathLike[str]) -> Frames:
    """The runs of these directories, each that of a run, a sweep or collected files; UserError for any other."""
    if not directories:
        raise UserError('name a directory: results.load("runs/quickstart")')
    measured = collected.load(*(user_path(str(directory)) for directory in directories))
    rows = [{k: v for k, v in row.items() if not k.endswith("_json")} for row in collected.rows_of(measured)]
    return Frames(collected.table_of(rows).to_pandas(), collected.curves_of(measured).to_pandas())
