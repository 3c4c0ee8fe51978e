"""Reading files of unknown origin, replacing files atomically, locks and digests."""

import errno
import fcntl
import hashlib
import json
import math
import os
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from quack_lm.errors import UserError, explaining

LOCK_POLL_S = 0.2
# What a node that died had locked is free again when the file server has noticed.
LOCK_WAIT_S = 180.0
HASHING_THREADS = 8
# Of what a run writes: a list in a section of a config in a state has 4.
MOST_LEVELS = 20
# Weights, rates and measurements are float32 on the device.
LARGEST_FLOAT = 3.4e38


def open_regular(path: Path, mode: str = "r", *, errors: str | None = None) -> IO[Any]:
    """`open` for a file that somebody else may have made: an OSError where it would wait forever, for a pipe, a device
    or a socket, or a link to one."""
    if path.exists() and not (path.is_file() or path.is_dir()):  # a directory is refused by `open` itself
        # Where only the `strerror` is shown, it still has to name the file.
        raise OSError(errno.ENXIO, f"{path} is not a regular file")
    return open(path, mode, encoding=None if "b" in mode else "utf-8", errors=errors)


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new text and nothing between."""
    write_together({path: text.encode()})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Replace the files of a set, each atomically, and none before all are written: a full disk leaves the old set."""
    temporaries = {path: path.with_name(path.name + ".tmp") for path in files}
    try:
        for path, temporary in temporaries.items():
            with temporary.open("wb") as file:
                file.write(files[path])
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in temporaries.items():
            temporary.replace(path)
    except OSError as error:
        error.filename = str(path)  # of a write that fails, the system names none
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)  # on a full disk every byte counts
        raise
    for directory in {path.parent for path in files}:
        sync_directory(directory)


def refuse_other_than_file(what: str, path: Path) -> None:
    """UserError where a result would go to a directory, or replace a link, a pipe or a device."""
    with explaining(what, "choose another"):
        is_other = not path.name or path.is_symlink() or (path.exists() and not path.is_file())
    if is_other:
        raise UserError(f"{what} must name a file, not a directory, a link, a pipe or a device; choose another")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A json file for people and programs, atomically; non-finite numbers become null."""
    write_atomically(path, json.dumps(finite(value), indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or it is damaged. Raises PermissionError."""
    try:
        with open_regular(path) as file:
            found = parse_json(file.read())
    except PermissionError:
        raise
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def parse_json(text: str | bytes) -> Any:
    """JSON of unknown origin; ValueError also where it is nested deeper than anything that a run writes.

    An integer of more than 64 bits is a float, which no other library refuses.
    """
    try:
        value = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [
            item for v in level if isinstance(v, dict | list) for item in (v.values() if isinstance(v, dict) else v)
        ]
    if level:
        raise ValueError("it is nested too deeply")
    return value


def metrics_line(line: str | bytes) -> dict[str, Any]:
    """The measurements in a line of metrics.jsonl; empty where it is damaged, or not such a line."""
    try:
        return measurements(parse_json(line))
    except ValueError:
        return {}


def measurements(record: Any) -> dict[str, Any]:
    """The entries of a record that a run can have measured, or nothing if it has no step: numbers of a float32, None
    for one that was not finite, and [layer][head] tables of them."""
    kept = {}
    for key, value in record.items() if isinstance(record, dict) else ():
        if _is_table(value) if str(key).endswith("_per_head") else _is_number(value) or _is_table(value):
            kept[key] = value
    is_line = all(type(kept.get(key, 0)) is int and 0 <= kept.get(key, 0) < 2**63 for key in ("step", "tokens"))
    return kept if "step" in kept and is_line else {}


def _is_number(value: Any) -> bool:
    return value is None or (type(value) in (int, float) and not abs(value) > LARGEST_FLOAT)


def _is_table(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(row, list) and row for row in value):
        return False
    return len({len(row) for row in value}) == 1 and all(_is_number(entry) for row in value for entry in row)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256s(paths: Sequence[Path]) -> list[str]:
    """The sha256 of each file, several at a time."""
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        return list(threads.map(file_sha256, paths))


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files by so many, as far as its hard limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def relative_note(path: str | Path) -> str:
    """What a message about a missing path adds to it: for a relative one, the directory that it was looked for in."""
    return "" if os.path.isabs(path) else f" (relative to the current directory, {Path.cwd()})"


def user_path(text: str) -> Path:
    """A path as somebody typed it: a shell leaves a quoted `~` as it is, and `~` after a `=`."""
    return Path(os.path.expanduser(text))


def nearest_existing_parent(path: Path) -> Path:
    """The path itself where it exists, else the nearest directory above it that does."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def take_lock(file: IO[Any], *, shared: bool = False, wait_s: float = 0.0) -> bool:
    """Lock an open file for as long as it is open; False where another process still has it after `wait_s`.

    UserError where the file system has no locks: then nothing would keep two runs apart.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise UserError(
                    f"{file.name} cannot be locked ({error.strerror}): mount its file system with flock, or choose a "
                    "directory on another one"
                ) from None
        if time.monotonic() >= deadline:
            return False
        time.sleep(LOCK_POLL_S)


@contextmanager
def holding(file: IO[Any], refusal: str) -> Iterator[None]:
    """Lock an open file, which is removed at the end; the system releases it when this process ends, however it ends.

    UserError, `refusal`, where another process has it.
    """
    with file:
        if not take_lock(file):
            raise UserError(refusal)
        try:
            yield
        finally:
            Path(file.name).unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Make renames and new names in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def finite(value: Any) -> Any:
    """The value with NaN and infinities as None, which is what JSON has."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list) else value
