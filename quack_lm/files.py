"""Files that are whole or absent, whatever happens while they are written."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old or the new text and nothing between."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)  # on a full disk every byte counts
        raise
    sync_directory(path.parent)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """A json file for people and programs, atomically; non-finite numbers become null."""
    write_atomically(path, json.dumps(finite(value), indent=2) + "\n")


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
