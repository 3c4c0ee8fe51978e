"""What several test files need: few threads, and a small real data set."""

import os
import sysconfig
from pathlib import Path

# The tests' matrices are small: threads cost more than they give. Set before torch starts, and for child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from quack_lm.corpus import LocalCorpus
from quack_lm.preparation import prepare

settings.register_profile("quack_lm", deadline=None)
settings.load_profile("quack_lm")

# Ordinary modules that every Python has; cut into documents, they make about 200 kB.
MODULES = ("argparse", "dataclasses", "random", "statistics", "textwrap", "heapq", "bisect", "csv", "queue")
DOCUMENT_CHARACTERS = 2000


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides that use a small prepared data set: standard-library source with a vocabulary of 512.

    A document is a piece of a file, so that there are enough of them for every split.
    """
    directory = tmp_path_factory.mktemp("corpus")
    for module in MODULES:
        text = Path(sysconfig.get_paths()["stdlib"], f"{module}.py").read_text(encoding="utf-8")
        for start in range(0, len(text), DOCUMENT_CHARACTERS):
            piece = directory / f"{module}_{start:06d}.txt"
            piece.write_text(text[start : start + DOCUMENT_CHARACTERS], encoding="utf-8")
    data_dir = directory / "tokens"
    corpus = LocalCorpus(
        dir=str(data_dir),
        files=[str(directory / "*.txt")],
        format="text",
        tokenizer=None,
        vocab_size=512,
        val_fraction=0.15,
        probe_fraction=0.15,
        shard_tokens=20_000,
        workers=0,
    )
    prepare(corpus)
    return ["data=stdlib", f"data.dir={data_dir}"]
