"""A sweep in three files: results.parquet and results.csv (a row per run), curves.parquet (a row per run and step).

The Parquet files hold all that the report needs: long curves in parts, as `curves.py` makes them, with the smallest and
the largest value of a part in columns of their own. In curves.parquet null means not due at this step, NaN not finite.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from quack_lm.config import flatten
from quack_lm.errors import UserError, explaining
from quack_lm.files import parse_json, write_together
from quack_lm.report.curves import TABLE, Array, Curve, CurveReader, as_table
from quack_lm.report.results import Blowup, Result, Results, from_runs, join, make_results
from quack_lm.sweep.file import StopRule
from quack_lm.sweep.plan import PLAN_FILE, Document, reason
from quack_lm.text import echo, escape
from quack_lm.training.run_dir import STATUSES, RunDir, checked_summary

RESULTS_FILE, CSV_FILE, CURVES_FILE = "results.parquet", "results.csv", "curves.parquet"

# Ends of the names of columns: the smallest and the largest value of each part of a curve.
LOW, HIGH = ":min", ":max"

BLOWUP = ("blowup_step", "blowup_layer", "blowup_head")
JSON_COLUMNS = ("overrides", "config", "summary", "environment", "stop")

# Facts about the user's machine that a run records; they stay out of these files, which are made to be shared.
PRIVATE = ("command", "host")


def write(directory: Path, out: Path | None = None) -> list[Path]:
    """Collect the runs of a sweep directory there, or in `out`; returns the paths of the files.

    Runs of the files that are there already are kept, with a line, where less of them is on disk.
    """
    results = from_runs(directory)
    directory = out or directory
    if (directory / RESULTS_FILE).is_file():
        results = _with_lost_runs(results, _read_valid(directory))
    rows = rows_of(results)
    plan = results.plan
    about = {"sweep": plan.sweep, "question": plan.question, "command": plan.command, "stop": _json(plan.stop)}
    about["tune_seeds"] = json.dumps(list(plan.tune_seeds))
    table = table_of(rows).replace_schema_metadata({f"quack_lm.{k}": v for k, v in about.items()})
    with explaining(f"out={directory}", "or choose another"):
        return _write(directory, table, rows, curves_of(results))


def _with_lost_runs(results: Results, collected: Results) -> Results:
    """The results on disk, but those of the collected files where a run has less on disk, or is not in the plan."""
    now = {result.cell.name: result for result in results.results}
    if now.keys().isdisjoint(result.cell.name for result in collected.results):
        if any(map(_extent, collected.results)):
            raise UserError(
                f"{collected.directory} has the collected results of another sweep, {collected.plan.sweep}, and none "
                f"of {results.directory}; choose another out"
            )
        return results
    lost = {
        result.cell.name: result
        for result in collected.results
        if _extent(result) > (_extent(now[result.cell.name]) if result.cell.name in now else ())
    }
    if not lost:
        return results
    echo(
        f"{len(lost)} runs of which {results.directory} has less than was collected, or nothing, are kept (to leave "
        f"them out, remove {collected.directory / RESULTS_FILE} first)"
    )
    return results.with_results([*(r for name, r in now.items() if name not in lost), *lost.values()])


def _extent(result: Result) -> tuple[float, ...]:
    """How much is known of a run: whether it is finished, its step, and how far its curves go; empty for nothing."""
    last = max((float(curve.steps[-1]) for curve in result.curves.values() if len(curve.steps)), default=-1.0)
    known = (float(result.is_finished), float(result.step), last)
    return known if known > (0.0, 0.0, -1.0) else ()


def _write(directory: Path, table: pa.Table, rows: list[dict[str, Any]], curves: pa.Table) -> list[Path]:
    # Measured values rarely repeat: leaving out dictionaries and splitting the bytes of floats saves two fifths.
    floats = [name + ".list.element.list.element" * _is_table(name) for name in curves.column_names[3:]]
    dense = {"compression_level": 19, "use_dictionary": ["run"], "use_byte_stream_split": floats}
    contents = {
        CURVES_FILE: _parquet(curves, **dense),
        CSV_FILE: _csv(rows).encode(),
        # Last: the curves of runs that it does not know do no harm.
        RESULTS_FILE: _parquet(table),
    }
    directory.mkdir(parents=True, exist_ok=True)
    write_together({directory / name: content for name, content in contents.items()})
    return [directory / name for name in (RESULTS_FILE, CSV_FILE, CURVES_FILE)]


def _parquet(table: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True, **options)
    return sink.getvalue()


def load(*directories: Path) -> Results:
    """The results of sweeps and of runs together: from the runs where there is a plan, else from collected files."""
    parts = [_load(directory) for directory in directories]
    return parts[0] if len(parts) == 1 else join(parts)


def _load(directory: Path) -> Results:
    with explaining(str(directory), "or name another"):
        has_results, has_plan, is_run = (
            (directory / name).is_file() for name in (RESULTS_FILE, PLAN_FILE, RunDir(directory).config_file.name)
        )
    if not (has_results or has_plan or is_run):
        raise UserError(
            f"{directory} is no directory of a run (config.yaml), of a sweep ({PLAN_FILE}), or of its collected files "
            f"({RESULTS_FILE}); name one that is"
        )
    return _read_valid(directory) if has_results and not has_plan else from_runs(directory)


def _read_valid(directory: Path) -> Results:
    try:
        return _read(directory)
    except PermissionError:
        raise
    # ArrowException, and what missing columns or columns of another type raise.
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{directory}: {RESULTS_FILE} or {CURVES_FILE} is invalid ({reason(error)}); remove both, and create them "
            "again with quack-lm sweep collect"
        ) from None


def _read(directory: Path) -> Results:
    table = pq.read_table(directory / RESULTS_FILE, page_checksum_verification=True)
    about = {k.decode().removeprefix("quack_lm."): v.decode() for k, v in (table.schema.metadata or {}).items()}
    rows = [row | {key: parse_json(row[f"{key}_json"]) for key in JSON_COLUMNS} for row in table.to_pylist()]
    cells = [{"name": row["run"], **{key: row[key] for key in ("fingerprint", "overrides", "config")}} for row in rows]
    rules = {key: parse_json(about[key]) for key in ("stop", "tune_seeds") if key in about}
    plan = Document.model_validate({**about, **rules, "cells": cells}).plan(directory)
    curves = _read_curves(directory / CURVES_FILE, {cell.name: cell.total_steps for cell in plan.cells})
    entries = []
    for cell, row in zip(plan.cells, rows, strict=True):
        summary = checked_summary(row["summary"])
        if summary is None or not isinstance(row["environment"], dict) or not isinstance(row["stop"], dict):
            raise ValueError(f"run {cell.name}: invalid summary, environment or stop record")
        if row["status"] not in STATUSES:
            raise ValueError(f"run {cell.name}: unknown status")
        blowup = None if row[BLOWUP[0]] is None else Blowup(*(int(row[name]) for name in BLOWUP))
        entries.append((cell, row["status"], summary, curves[cell.name], row["environment"], row["stop"], blowup))
    return make_results(directory, plan, entries)


def rows_of(results: Results) -> list[dict[str, Any]]:
    """A row for each run: settings, outcome and the numbers of its summary."""
    names = _names(results)
    return [_row(result, name) for result, name in zip(results.results, names, strict=True)]


def _names(results: Results) -> list[str]:
    """Of the runs, by which tables know them; those of several directories that have one name get their fingerprint."""
    counts = Counter(result.cell.name for result in results.results)
    cells = [result.cell for result in results.results]
    return [cell.name if counts[cell.name] == 1 else f"{cell.name}-{cell.fingerprint}" for cell in cells]


def _row(result: Result, name: str) -> dict[str, Any]:
    config = {k: v for k, v in flatten(result.cell.config).items() if k != "run_dir" and not k.startswith("logger.")}
    own = {
        "run": name,
        "fingerprint": result.cell.fingerprint,
        "attention": result.attention,
        "stabilizer": result.stabilizer,
        "method": result.label,
        "lr": result.lr,
        "seed": result.seed,
        "status": result.status,
        "outcome": result.outcome,
        **dict(zip(BLOWUP, result.blowup or (None, None, None), strict=True)),
    }
    told = {k: v for k, v in result.summary.items() if isinstance(v, int | float | str | None) and k.isidentifier()}
    return {
        **own,
        **{key: value for key, value in told.items() if key not in own},
        "steps_saved_by_rule": result.steps_saved,
        "hours_saved_by_rule": result.seconds_saved / 3600,
        **{f"config.{key}": value for key, value in config.items()},
        "overrides_json": json.dumps(result.cell.overrides),
        "config_json": json.dumps(result.cell.config),
        "summary_json": json.dumps(result.summary),
        "environment_json": json.dumps({k: v for k, v in result.environment.items() if k not in PRIVATE}),
        "stop_json": json.dumps(result.stop_record),
    }


def table_of(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows as a table; a column whose values differ in kind is text."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return pa.table({key: _column([row.get(key) for row in rows]) for key in keys})


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    # A setting that is a number in one run and text in another, an integer of many digits, or half a surrogate pair.
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        return pa.array(
            [None if value is None else str(value).encode(errors="backslashreplace").decode() for value in values]
        )


def _csv(rows: list[dict[str, Any]]) -> str:
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if not key.endswith("_json")]
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, extrasaction="ignore")
    for row in ({key: key for key in keys}, *rows):
        writer.writerow({k: escape(v, "csv") if isinstance(v, str) else v for k, v in row.items()})
    return text.getvalue()


def curves_of(results: Results) -> pa.Table:
    """A row for each run and step at which something was logged; null where it was not due."""
    columns = [_columns(result.curves) for result in results.results]
    keys = dict.fromkeys(key for own in columns for key in own)
    # For each run the steps of all its curves.
    steps = [np.unique(np.concatenate([[], *(s for s, _ in own.values())])).astype(np.int64) for own in columns]
    names = [[name] * len(own) for name, own in zip(_names(results), steps, strict=True)]
    tokens = [own * result.cell.tokens_per_step for result, own in zip(results.results, steps, strict=True)]
    table = {
        "run": pa.chunked_array(names, pa.string()).dictionary_encode(),
        "step": pa.chunked_array(steps, pa.int64()),
        "tokens": pa.chunked_array(tokens, pa.int64()),
    }
    for key in keys:
        kind = pa.list_(pa.list_(pa.float32())) if _is_table(key) else pa.float32()
        chunks = [_chunk(own, found.get(key), kind) for own, found in zip(steps, columns, strict=True)]
        table[key] = pa.chunked_array(chunks, kind)
    return pa.table(table)


def _columns(curves: Mapping[str, Curve]) -> dict[str, tuple[Array, Array]]:
    """By column, the steps and values of one run."""
    columns = {}
    for key, curve in curves.items():
        columns[key] = (curve.steps, curve.mean)
        if curve.is_in_parts:
            columns |= {key + LOW: (curve.steps, curve.low), key + HIGH: (curve.steps, curve.high)}
    return columns


def _chunk(steps: Array, found: tuple[Array, Array] | None, kind: pa.DataType) -> pa.Array:
    """The values at their steps, and null at the others."""
    if found is None:
        return pa.nulls(len(steps), kind)
    at, values = np.searchsorted(steps, found[0]), found[1]
    if pa.types.is_list(kind):
        tables = dict(zip(at.tolist(), values, strict=True))
        return pa.array([tables[i].tolist() if i in tables else None for i in range(len(steps))], kind)
    column, is_null = np.zeros(len(steps), np.float32), np.ones(len(steps), bool)
    column[at], is_null[at] = values, False
    return pa.array(column, kind, mask=is_null)


def _is_table(column: str) -> bool:
    return column.partition(":")[0].endswith(TABLE)


def _read_curves(path: Path, total_steps: Mapping[str, int]) -> dict[str, dict[str, Curve]]:
    """The curves of each run, whose number of steps is given."""
    readers = {run: CurveReader(n) for run, n in total_steps.items()}
    for batch in pq.ParquetFile(path, page_checksum_verification=True).iter_batches() if path.is_file() else []:
        runs, steps = (batch.column(name).to_pylist() for name in ("run", "step"))
        for key in [name for name in batch.schema.names if "/" in name]:
            column = batch.column(key)
            if not _is_table(key) and not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
                continue  # not what a run can have measured
            found = column.drop_null()
            values = (
                map(as_table, found.to_pylist()) if _is_table(key) else found.to_numpy(zero_copy_only=False).tolist()
            )
            for i, value in zip(np.flatnonzero(column.is_valid()).tolist(), values, strict=True):
                if runs[i] in readers and value is not None:
                    readers[runs[i]].add(steps[i], key, value)
    return {run: _with_parts(reader.curves()) for run, reader in readers.items()}


def _with_parts(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    return {
        key: replace(curve, low=curves[key + LOW].mean, high=curves[key + HIGH].mean) if key + LOW in curves else curve
        for key, curve in curves.items()
        if not key.endswith((LOW, HIGH))
    }


def _json(rule: StopRule | None) -> str:
    return json.dumps(asdict(rule) if rule else None)
