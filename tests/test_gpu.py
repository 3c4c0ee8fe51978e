"""Whole runs on a GPU: the curves of the CPU, the same bits again, compiled, under NCCL, and no waiting in a step."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import (
    REPOSITORY,
    SMALL,
    assert_close_records,
    assert_same_tensors,
    command,
    records,
    run_here,
    run_process,
    summary,
)

from quack_lm.config import choices, compose
from quack_lm.model import Transformer
from quack_lm.training import loop
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

ATTENTIONS, STABILIZERS = choices("attention"), choices("stabilizer")
CLIPS = {"qk_clip": ["stabilizer.threshold=0.1"]}
TIMED = ("accumulate_gradients", "clip_gradients", "stabilized_step")  # the part of a step that is timed


def settings(attention: str, stabilizer: str, data: list[str], *more: str) -> list[str]:
    return [*data, f"attention={attention}", f"stabilizer={stabilizer}", *CLIPS.get(stabilizer, []), *more]


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_a_gpu_writes_the_curves_of_the_cpu(
    attention: str, stabilizer: str, tmp_path: Path, tiny_data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # From the same weights, which each type of device draws from a generator of its own.
    drawn = Transformer.initial_value

    def moved(self: Transformer, name: str, shape: torch.Size, *, seed: int, device: torch.device) -> torch.Tensor:
        return drawn(self, name, shape, seed=seed, device=torch.device("cpu")).to(device)

    monkeypatch.setattr(Transformer, "initial_value", moved)
    overrides = settings(attention, stabilizer, tiny_data, "optimizer.ns_dtype=float32")
    run_here([*overrides, "trainer.device=cpu"], tmp_path / "cpu")
    run_here([*overrides, "trainer.device=cuda"], tmp_path / "cuda")
    assert_close_records(tmp_path / "cpu", tmp_path / "cuda", 2e-3)


@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_deterministic_run_continued_has_the_same_bits(
    attention: str, backend: str, tmp_path: Path, tiny_data: list[str]
) -> None:
    overrides = settings(attention, "qk_clip", tiny_data, f"attention.backend={backend}", "logger.log_every=1")
    overrides += ["trainer.deterministic=true", "trainer.precision=bfloat16"]
    # Due at the step where it stops, too.
    overrides += ["trainer.val_every=2", "trainer.probe_every=2"]
    # Each start in a process of its own, as of a job that was preempted.
    for run_dir, more in (("straight", []), ("stopped", ["trainer.steps=4"]), ("stopped", [])):
        done = run_process([*overrides, *more], tmp_path / run_dir)
        assert done.returncode == 0, done.stderr
    assert records(tmp_path / "straight") == records(tmp_path / "stopped")
    assert_same_tensors(tmp_path / "straight", tmp_path / "stopped")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", choices("optimizer"))
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_the_host_waits_for_nothing_in_a_step(
    attention: str,
    stabilizer: str,
    optimizer: str,
    precision: str,
    tmp_path: Path,
    tiny_data: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def guarded(phase: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            # The first step makes workspaces and the optimizers' state.
            torch.cuda.set_sync_debug_mode("error" if built.state.step > 0 else "default")
            try:
                return phase(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    overrides = settings(attention, stabilizer, tiny_data, "trainer.steps=4", f"optimizer={optimizer}")
    overrides += ["optimizer.lr=0.01", "optimizer.warmup_steps=1", f"trainer.precision={precision}"]
    built = build_run(check_run(compose([*SMALL, *overrides, f"run_dir={tmp_path / 'run'}"])))
    for name in TIMED:
        monkeypatch.setattr(loop, name, guarded(getattr(loop, name)))
    try:
        loop.train(built)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert summary(tmp_path / "run")["status"] == "completed"


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("stabilizer", STABILIZERS)
def test_compiled_blocks_train_like_plain_ones_on_a_gpu(
    attention: str, stabilizer: str, tmp_path: Path, tiny_data: list[str]
) -> None:
    overrides = settings(attention, stabilizer, tiny_data, "trainer.device=cuda", "optimizer.ns_dtype=float32")
    run_here(overrides, tmp_path / "plain")
    run_here([*overrides, "trainer.compile=true"], tmp_path / "compiled")
    assert_close_records(tmp_path / "plain", tmp_path / "compiled", 2e-3)


@pytest.mark.parametrize("is_reduced", ["true", "false"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchrun_trains_on_the_gpus_with_nccl(
    dtype: str, is_reduced: str, tmp_path: Path, tiny_data: list[str]
) -> None:
    ranks = min(torch.cuda.device_count(), 2)
    overrides = settings("mla", "quack", tiny_data, f"trainer.reduce_every_micro_batch={is_reduced}")
    overrides += [f"trainer.reduce_dtype={dtype}", f"optimizer.state_dtype={dtype}"]
    exact = run_here([*overrides, "trainer.device=cpu"], tmp_path / "cpu")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launcher, *command([*overrides, "trainer.precision=bfloat16"], tmp_path / "gpus")[1:]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "gpus")["world_size"] == ranks
    assert summary(tmp_path / "gpus")["val_loss"] == pytest.approx(exact["val_loss"], abs=0.05)
