"""Calling the scripts as a user would, in this process, and what they leave on disk."""

import contextlib
import ctypes
import io
import os
import runpy
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quack_lm.cli import main
from quack_lm.config import CONFIG_DIR

SCRIPTS = CONFIG_DIR.parent / "scripts"


def call_here(
    script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Any, str, str]:
    """A script's own main block in this process: (exit code, stdout, stderr)."""
    path = str(SCRIPTS / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, *arguments])
    capsys.readouterr()
    code: Any = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    return code, *capsys.readouterr()


@contextlib.contextmanager
def as_any_user() -> Iterator[None]:
    """Files refuse what their permissions say, which root passes over otherwise, by two of its capabilities."""
    libc, header = ctypes.CDLL(None, use_errno=True), struct.pack("Ii", 0x20080522, 0)  # version 3, this thread
    held = ctypes.create_string_buffer(24)
    assert libc.capget(header, held) == 0
    effective, *rest = struct.unpack("6I", held.raw)
    cap_dac_override, cap_dac_read_search = 1, 2
    lowered = effective & ~(1 << cap_dac_override | 1 << cap_dac_read_search)
    assert libc.capset(header, struct.pack("6I", lowered, *rest)) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


def call(*arguments: str) -> tuple[Any, str, str]:
    """The same without fixtures, for many calls in one test; what cannot be encoded is an error, as on a terminal."""
    outputs = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=e) for e in ("strict", "backslashreplace")]
    code: Any = 0
    with contextlib.redirect_stdout(outputs[0]), contextlib.redirect_stderr(outputs[1]):
        try:
            main(arguments)
        except SystemExit as end:
            code = end.code or 0
    stdout, stderr = (output.detach().getvalue().decode() for output in outputs)  # type: ignore[attr-defined]
    return code, stdout, stderr


def snapshot(*directories: Path) -> dict[str, Any]:
    """Every name with its kind, and of files the time of the last change and the bytes."""
    seen: dict[str, Any] = {}
    for directory in directories:
        for path in sorted(directory.rglob("*")):
            if path.is_symlink():
                seen[str(path)] = ("link", path.readlink())
            elif path.is_file():
                seen[str(path)] = ("file", path.stat().st_mtime_ns, path.read_bytes())
            else:
                seen[str(path)] = ("other", path.stat().st_mode)
    return seen


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
