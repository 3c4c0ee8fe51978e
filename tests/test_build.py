"""Building a run: one stabilizer object, nothing built twice, and a directory that knows which version wrote it."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from models import ATTENTIONS
from torch import Tensor, nn

from quack_lm.attention.base import Attention
from quack_lm.config import compose
from quack_lm.data.batches import Sequences
from quack_lm.errors import UserError
from quack_lm.model import Transformer
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.stabilizers.quack import QuacK
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run
from quack_lm.training.loop import train
from quack_lm.training.run_dir import RunDir

SMALL = ["trainer=tiny", "model=tiny", "model.n_layers=3", "model.d_model=24", "model.d_ff=40", "optimizer=muon_small"]
SMALL += ["trainer.steps=2", "trainer.seq_len=16", "trainer.val_sequences=4", "logger.progress=false"]


class Counting(Stabilizer):
    """Reports, from the half that sees the step, what happened to the half that changes the forward."""

    def __init__(self) -> None:
        self.n_transforms = 0

    def qk_transform(self, head_dim: int) -> nn.Module | None:
        self.n_transforms += 1
        return None

    def metrics(self) -> dict[str, Tensor]:
        return {"n_transforms": torch.tensor(self.n_transforms)}


class Remembering(Stabilizer):
    """Its step half reads a tensor that its forward half has seen."""

    def __init__(self) -> None:
        self.seen = torch.zeros(())

    def qk_transform(self, head_dim: int) -> nn.Module:
        return _Watch(self)

    def metrics(self) -> dict[str, Tensor]:
        return {"seen": self.seen}


class _Watch(nn.Module):
    def __init__(self, owner: Remembering) -> None:
        super().__init__()
        self.owner = owner

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        self.owner.seen = torch.maximum(self.owner.seen, q.detach().abs().amax())
        return q, k


@pytest.fixture
def stateful(monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the package with stabilizers that need both halves, as files of the package would have them."""
    module = ModuleType("quack_lm.stabilizers.stateful")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for cls in (Counting, Remembering):
        setattr(module, cls.__name__, cls)
        monkeypatch.setattr(cls, "__module__", module.__name__)
    return module.__name__


@pytest.mark.parametrize("name", ATTENTIONS)
def test_the_stabilizer_that_changes_the_forward_is_the_one_that_sees_the_step(
    name: str, stateful: str, tmp_path: Path, tiny_data: list[str]
) -> None:
    def logged(cls: str, metric: str) -> list[float]:
        overrides = [*SMALL, *ATTENTIONS[name], *tiny_data, f"stabilizer._target_={stateful}.{cls}"]
        run = build_run(
            check_run(compose(["stabilizer=none", "model.n_heads=3", *overrides, f"run_dir={tmp_path / cls}"]))
        )
        train(run)
        lines = [json.loads(line) for line in RunDir(tmp_path / cls).metrics_file.read_text().splitlines()]
        return [line[f"stateful/{metric}"] for line in lines if f"stateful/{metric}" in line]

    counts = logged("Counting", "n_transforms")
    assert counts
    assert set(counts) == {3}, "once for each layer, all on the object whose metrics are logged"
    largest = logged("Remembering", "seen")
    assert largest
    assert min(largest) > 0, "a tensor of the run's own forwards, not of a check on the meta device"


def test_checking_and_building_make_each_object_once(
    tmp_path: Path, tiny_data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = compose([*SMALL, *tiny_data, "attention=mla", "stabilizer=quack", f"run_dir={tmp_path}"])
    made: Counter[str] = Counter()

    def count(cls: type) -> None:
        plain = cls.__init__

        def counted(self: Any, *arguments: Any, **options: Any) -> None:
            made[cls.__name__] += 1
            plain(self, *arguments, **options)

        monkeypatch.setattr(cls, "__init__", counted)

    for cls in (QuacK, Attention, Transformer, Sequences):
        count(cls)
    build_run(check_run(config))
    # The run's own, and a copy of the model on which FLOPs are counted.
    assert made == {"QuacK": 2, "Attention": 2 * 3, "Transformer": 2, "Sequences": 3}


def test_a_run_of_another_version_is_refused_by_its_name(tmp_path: Path, tiny_data: list[str]) -> None:
    config = compose([*SMALL, *tiny_data, f"run_dir={tmp_path}"])
    train(build_run(check_run(config)))
    run_dir = RunDir(tmp_path)
    environment = run_dir.environment()
    environment["versions"]["quack_lm"] = "0.1.7"
    run_dir.environment_file.write_text(json.dumps(environment))
    with pytest.raises(UserError, match=r"was written by quack_lm 0\.1\.7, this is .*choose another run_dir"):
        check_run(config)
    run_dir.environment_file.unlink()
    with pytest.raises(UserError, match="was written by an earlier version of quack_lm"):
        check_run(config)


FAULTS = """
import resource, sys, torch
from quack_lm.training.memory import keep_freed_memory

def step():
    x = torch.ones(1 << 24)
    y = x + 1
    del x
    return y * 2

if sys.argv[1] == "kept" and not keep_freed_memory():
    print("no glibc")
    raise SystemExit
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again_without_page_faults() -> None:
    counts = []
    for how in ("as it comes", "kept"):
        done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True)
        counts.append(done.stdout.strip())
    if counts[1] == "no glibc":
        pytest.skip("another C library has no such setting")
    assert int(counts[1]) < int(counts[0]) / 3
