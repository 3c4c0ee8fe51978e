"""What several test files need: few threads, and a small real data set."""

import fcntl
import os
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

# The tests' matrices are small: threads cost more than they give. Set before torch starts, and for child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from quack_lm.data.corpus import LocalCorpus
from quack_lm.data.prepare import prepare

# CI tries the same examples every time, so that it fails for its commit alone; a developer's machine tries new ones.
settings.register_profile("quack_lm", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("quack_lm")

# Ordinary modules that every Python has; cut into documents, they make about 200 kB.
MODULES = ("argparse", "dataclasses", "random", "statistics", "textwrap", "heapq", "bisect", "csv", "queue")
DOCUMENT_CHARACTERS = 2000


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that use a small prepared data set: standard-library source with a vocabulary of 512.

    The processes of pytest-xdist share it: the first to come makes it.
    """
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny_data"
    root.mkdir(exist_ok=True)
    with (root / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (root / "tokens").exists():
            write_documents(root / "documents")
            prepare(tiny_corpus(root), progress=False)
    return ["data=local", f"data.dir={root / 'tokens'}"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MB, for root on Linux."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"NO SMALL DISK CAN BE MOUNTED HERE, A FULL DISK IS NOT TESTED: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def write_documents(directory: Path) -> None:
    """A document is a piece of a file, so that there are enough of them for every split."""
    directory.mkdir(exist_ok=True)
    for module in MODULES:
        text = Path(sysconfig.get_paths()["stdlib"], f"{module}.py").read_text(encoding="utf-8")
        for start in range(0, len(text), DOCUMENT_CHARACTERS):
            piece = directory / f"{module}_{start:06d}.txt"
            piece.write_text(text[start : start + DOCUMENT_CHARACTERS], encoding="utf-8")


def tiny_corpus(root: Path) -> LocalCorpus:
    return LocalCorpus(
        dir=str(root / "tokens"),
        files=[str(root / "documents" / "*.txt")],
        format="text",
        tokenizer=None,
        vocab_size=512,
        val_fraction=0.15,
        probe_fraction=0.15,
        shard_tokens=20_000,
        workers=0,
    )
