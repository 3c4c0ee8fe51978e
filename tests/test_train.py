"""Whole runs of the trainer, for real: one process, several under torchrun, stopped, killed, continued, diverging."""

import dataclasses
import hashlib
import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import call, snapshot
from safetensors.torch import load_file
from transformers import AutoTokenizer

from quack_lm.config import choices, compose
from quack_lm.errors import UserError
from quack_lm.training import build
from quack_lm.training.build import build_run, count_flops_per_token
from quack_lm.training.check import check_run, run_warnings
from quack_lm.training.loop import train
from quack_lm.training.run_dir import RunDir

REPOSITORY = Path(__file__).parents[1]
SMALL = [
    "experiment=tiny",
    "model.d_model=24",
    "model.n_layers=2",
    "model.n_heads=3",
    "model.d_ff=40",
    "optimizer.lr=0.1",
    "optimizer.warmup_steps=3",
    "optimizer.max_grad_norm=0.5",
    "trainer.steps=8",
    "trainer.seq_len=32",
    "trainer.global_batch_size=12",
    "trainer.micro_batch_size=2",
    "trainer.val_every=4",
    "trainer.val_sequences=7",
    "trainer.probe_every=3",
    "trainer.probe_sequences=5",
    "trainer.checkpoint_every=0",
    "trainer.compile=false",
    "logger.log_every=3",
    "logger.progress=false",
]


def run_here(overrides: list[str], run_dir: Path) -> dict[str, Any]:
    """Train in this process; the summary."""
    train(build_run(check_run(compose([*SMALL, *overrides, f"run_dir={run_dir}"]))))
    return summary(run_dir)


def command(overrides: list[str], run_dir: Path, ranks: int = 1) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*launcher, "scripts/train.py", *SMALL, *overrides, f"run_dir={run_dir}"]


def run_process(overrides: list[str], run_dir: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(overrides, run_dir, ranks), cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def records(run_dir: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
    return [{k: v for k, v in line.items() if not k.startswith("throughput/")} for line in lines]


def tokens_per_byte(data_dir: Path) -> float:
    """Tokens of the validation split for each byte of its text, decoded from its shards."""
    tokens = np.concatenate([np.fromfile(path, "<u2") for path in sorted(data_dir.glob("val_*.bin"))])
    tokenizer = AutoTokenizer.from_pretrained(data_dir / "tokenizer")
    return len(tokens) / len(tokenizer.decode(tokens, skip_special_tokens=True).encode())


def final_tensors(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Everything in the newest checkpoint, by file: each rank's have the same names."""
    newest = sorted((run_dir / "checkpoints").glob("step_*"))[-1]
    return {(file.name, k): v for file in newest.glob("*.safetensors") for k, v in load_file(file).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    a, b = final_tensors(one), final_tensors(other)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def assert_close_records(one: Path, other: Path, tolerance: float) -> None:
    for a, b in zip(records(one), records(other), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            expected, seen = torch.tensor(value, dtype=torch.float64), torch.tensor(b[key], dtype=torch.float64)
            # A change is a difference of nearly equal logits, so rounding is a larger part of it.
            slack = tolerance * (10 if "delta" in key else 1)
            torch.testing.assert_close(seen, expected, rtol=slack, atol=slack, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["attention=mla", "stabilizer=quack", "trainer.probe_parts=true"],
        pytest.param(["attention=mha", "stabilizer=qk_clip"], marks=pytest.mark.slow),
    ],
)
def test_one_two_and_three_ranks_write_the_same_curves(
    overrides: list[str], tmp_path: Path, tiny_data: list[str]
) -> None:
    # 3 heads of 8 rows: shard edges cut heads on 2 ranks, and some ranks hold nothing of the narrow matrices.
    overrides = [*tiny_data, *overrides]
    if "stabilizer=qk_clip" in overrides:
        overrides += ["stabilizer.threshold=0.1"]
    run_here(overrides, tmp_path / "1")
    for ranks in (2, 3):
        own = ["trainer.reduce_every_micro_batch=false", "trainer.reshard_after_forward=always"] if ranks == 3 else []
        done = run_process([*overrides, *own], tmp_path / str(ranks), ranks)
        assert done.returncode == 0, done.stderr
        assert summary(tmp_path / str(ranks))["world_size"] == ranks
        assert_close_records(tmp_path / "1", tmp_path / str(ranks), 2e-4)


def test_curves_do_not_depend_on_micro_batches_recomputation_or_loss_chunks(
    tmp_path: Path, tiny_data: list[str]
) -> None:
    overrides = [*tiny_data, "attention=mla", "stabilizer=qk_clip", "stabilizer.threshold=0.1"]
    run_here(overrides, tmp_path / "plain")
    run_here([*overrides, "trainer.micro_batch_size=12"], tmp_path / "whole")
    run_here([*overrides, "trainer.activation_checkpointing=true", "trainer.loss_chunk=17"], tmp_path / "frugal")
    assert_close_records(tmp_path / "plain", tmp_path / "whole", 2e-4)
    assert_close_records(tmp_path / "plain", tmp_path / "frugal", 2e-4)
    frugal = ["trainer.activation_checkpointing=selective", "trainer.loss_chunk=17", "trainer.micro_batch_size=auto"]
    done = run_process([*overrides, *frugal], tmp_path / "ranks", ranks=3)
    assert done.returncode == 0, done.stderr
    assert "trainer.micro_batch_size=auto is 4 here" in done.stderr  # all sequences of a rank fit
    assert_close_records(tmp_path / "plain", tmp_path / "ranks", 2e-4)


def test_the_same_run_twice_is_the_same_to_the_last_bit(tmp_path: Path, tiny_data: list[str]) -> None:
    overrides = [*tiny_data, "stabilizer=quack"]
    run_here(overrides, tmp_path / "one")
    run_here(overrides, tmp_path / "two")
    assert records(tmp_path / "one") == records(tmp_path / "two")
    torch.set_float32_matmul_precision("medium")  # as a library may leave it
    run_here([*overrides, "trainer.deterministic=true"], tmp_path / "asked")
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.are_deterministic_algorithms_enabled()
    assert records(tmp_path / "asked") == records(tmp_path / "one")
    run_here([*overrides, "seed=1"], tmp_path / "other")
    assert not torch.are_deterministic_algorithms_enabled()
    assert records(tmp_path / "one") != records(tmp_path / "other")


def test_mfu_is_relative_to_the_peak_and_absent_without_one(
    tmp_path: Path, tiny_data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logged(*overrides: str) -> dict[str, Any]:
        run_here([*tiny_data, *overrides], tmp_path / str(len(overrides)))
        return json.loads((tmp_path / str(len(overrides)) / "metrics.jsonl").read_text().splitlines()[-1])

    line = logged("logger.peak_tflops=0.5")
    flops = count_flops_per_token(RunDir(tmp_path / "1").config())
    assert line["throughput/mfu"] == pytest.approx(line["throughput/tokens_per_s"] * flops / 0.5e12)
    # As on a GPU that is not known.
    monkeypatch.setattr(build, "peak_flops", lambda *_: None)
    line = logged()
    assert "throughput/mfu" not in line
    assert line["throughput/tokens_per_s"] > 0


def test_a_run_on_an_unknown_gpu_says_how_to_have_an_mfu(
    tmp_path: Path, tiny_data: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H800")
    for overrides, expected in (([], ["NVIDIA H800"]), (["logger.peak_tflops=900"], [])):
        plan = check_run(compose([*SMALL, *tiny_data, *overrides, f"run_dir={tmp_path / 'run'}"]))
        warnings = run_warnings(dataclasses.replace(plan, device="cuda"))
        assert [re.findall("NVIDIA H800", text)[0] for text in warnings] == expected


def test_a_run_from_the_written_config_is_the_same_run(tmp_path: Path, tiny_data: list[str]) -> None:
    run_here([*tiny_data, "attention=mla", "stabilizer=fixed", "stabilizer.tau=0.5"], tmp_path / "one")
    again = [
        sys.executable,
        "scripts/train.py",
        "--config",
        str(tmp_path / "one/config.yaml"),
        f"run_dir={tmp_path / 'two'}",
    ]
    done = subprocess.run(again, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert records(tmp_path / "one") == records(tmp_path / "two")
    assert summary(tmp_path / "one")["fingerprint"] == summary(tmp_path / "two")["fingerprint"]


@pytest.mark.parametrize("attention", choices("attention"))
@pytest.mark.parametrize("stabilizer", choices("stabilizer"))
def test_a_continued_run_equals_one_that_never_stopped(
    attention: str, stabilizer: str, tmp_path: Path, tiny_data: list[str]
) -> None:
    overrides = [*tiny_data, f"attention={attention}", f"stabilizer={stabilizer}"]
    # Logged at every step, so that stopping does not change when the log is due.
    overrides += ["logger.log_every=1", "trainer.val_every=2", "trainer.probe_every=2"]
    run_here(overrides, tmp_path / "straight")
    run_here([*overrides, "trainer.steps=4"], tmp_path / "stopped")
    assert summary(tmp_path / "stopped")["step"] == 4
    run_here(overrides, tmp_path / "stopped")
    assert records(tmp_path / "straight") == records(tmp_path / "stopped")
    assert_same_tensors(tmp_path / "straight", tmp_path / "stopped")


HALF = ["trainer.reduce_dtype=bfloat16", "optimizer.state_dtype=bfloat16"]
PAIRS = [f"{attention}/{stabilizer}" for attention in choices("attention") for stabilizer in choices("stabilizer")]


@pytest.mark.parametrize(
    ("pairs", "more"),
    [(["mla/qk_clip"], HALF), pytest.param(PAIRS, [], marks=pytest.mark.slow)],
    ids=["one pair", "every pair"],
)
def test_a_continued_run_of_two_ranks_equals_one_that_never_stopped(
    pairs: list[str], more: list[str], tmp_path: Path, tiny_data: list[str]
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    overrides = [*SMALL, *tiny_data, *more, "logger.log_every=1", "trainer.val_every=2", "trainer.probe_every=2"]
    done = subprocess.run(
        [*launcher, "tests/resume_worker.py", str(tmp_path), *pairs, "--", *overrides],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    for pair in pairs:
        straight, stopped = tmp_path / pair / "straight", tmp_path / pair / "stopped"
        assert (stopped / "checkpoints/step_00000004").exists()
        assert summary(stopped)["world_size"] == 2
        assert len({file for file, _ in final_tensors(straight)}) == 2
        assert records(straight) == records(stopped)
        assert_same_tensors(straight, stopped)


def test_a_checkpoint_of_two_ranks_continues_on_one(tmp_path: Path, tiny_data: list[str]) -> None:
    overrides = [*tiny_data, "attention=mla", "stabilizer=quack", "logger.log_every=1", "trainer.probe_every=2"]
    run_here(overrides, tmp_path / "straight")
    done = run_process([*overrides, "trainer.steps=4"], tmp_path / "moved", ranks=2)
    assert done.returncode == 0, done.stderr
    # One that lost a rank's file before its manifest was made must not leave its rows as they are in memory.
    shutil.copytree(tmp_path / "moved", tmp_path / "holed")
    last = tmp_path / "holed/checkpoints/step_00000004"
    listed = json.loads((last / "manifest.json").read_text())
    lost = next(name for name in listed["files"] if name.startswith("shard-00001"))
    del listed["files"][lost]
    (last / lost).unlink()
    (last / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"lacks .*a file is missing"):
        run_here(overrides, tmp_path / "holed")
    run_here(overrides, tmp_path / "moved")
    assert_close_records(tmp_path / "straight", tmp_path / "moved", 2e-4)


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until metrics.jsonl has that step."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run_dir / "metrics.jsonl"
        if path.exists() and path.read_text().count('"train/loss"') >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


@pytest.mark.parametrize("kind", [signal.SIGHUP, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_run_that_is_stopped_or_killed_continues_to_the_same_end(
    kind: signal.Signals, tmp_path: Path, tiny_data: list[str]
) -> None:
    overrides = [
        *tiny_data,
        "stabilizer=quack",
        "trainer.steps=400",
        "logger.log_every=1",
        "trainer.checkpoint_every=10",
    ]
    overrides += ["trainer.val_every=0", "trainer.probe_every=0"]
    process = subprocess.Popen(
        command(overrides, tmp_path / "stopped"), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path / "stopped", 25, process)
    process.send_signal(kind)
    process.communicate(timeout=60)
    if kind is signal.SIGHUP:
        assert process.returncode == 0
        assert summary(tmp_path / "stopped")["status"] == "interrupted"
    assert summary(tmp_path / "stopped")["step"] < 400
    run_here(overrides, tmp_path / "stopped")
    run_here(overrides, tmp_path / "straight")
    assert records(tmp_path / "straight") == records(tmp_path / "stopped")
    assert_same_tensors(tmp_path / "straight", tmp_path / "stopped")
    assert len(list((tmp_path / "straight/checkpoints").iterdir())) == 2


def test_the_first_interval_of_each_process_is_no_part_of_the_throughput(tmp_path: Path, tiny_data: list[str]) -> None:
    overrides = [*tiny_data, "logger.log_every=2"]
    run_here([*overrides, "trainer.steps=2"], tmp_path)
    run_here([*overrides, "trainer.steps=6"], tmp_path)
    state = json.loads((tmp_path / "checkpoints/step_00000006/state.json").read_text())
    assert state["progress"]["timed_tokens"] == 2 * 12 * 32, "of steps 5 and 6 alone"
    assert summary(tmp_path)["timed_tokens"] == 2 * 12 * 32


@pytest.mark.parametrize("lost", [(), ("summary.json",), ("summary.json", "metrics.jsonl")])
def test_fewer_steps_than_a_run_has_made_are_refused_and_change_nothing(
    lost: tuple[str, ...], tmp_path: Path, tiny_data: list[str]
) -> None:
    run_here(tiny_data, tmp_path)
    for name in lost:
        (tmp_path / name).write_text("{")
    before = snapshot(tmp_path)
    with pytest.raises(UserError, match=r"holds this run at step 8, beyond trainer\.steps=4"):
        run_here([*tiny_data, "trainer.steps=4"], tmp_path)
    assert snapshot(tmp_path) == before


def test_a_config_of_a_moved_run_asks_where_to_go_on(tmp_path: Path, tiny_data: list[str]) -> None:
    run_here([*tiny_data, "trainer.steps=2"], tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    shutil.copy(tmp_path / "new/config.yaml", tmp_path / "new/copy.yaml")
    for verb in ("train", "preflight"):
        for name in ("config.yaml", "copy.yaml"):
            code, _, stderr = call(verb, "--config", str(tmp_path / "new" / name), "trainer.steps=4")
            assert (code, stderr.count("\n")) == (2, 1)
            assert f"add run_dir={tmp_path / 'new'} to continue there" in stderr
    assert not (tmp_path / "old").exists()
    line = ["--config", str(tmp_path / "new/config.yaml"), "trainer.steps=4", f"run_dir={tmp_path / 'new'}"]
    code, _, stderr = call("train", *line)
    assert code == 0, stderr
    assert summary(tmp_path / "new")["step"] == 4


def test_ranks_whose_torchrun_was_killed_save_and_end(tmp_path: Path, tiny_data: list[str]) -> None:
    overrides = [*tiny_data, "trainer.steps=100000", "logger.log_every=1"]
    launcher = subprocess.Popen(
        command(overrides, tmp_path, ranks=2), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(tmp_path, 5, launcher)
    launcher.kill()
    deadline = time.monotonic() + 60
    while summary(tmp_path)["status"] == "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert summary(tmp_path)["status"] == "interrupted"
    assert summary(tmp_path)["checkpoint_step"] == summary(tmp_path)["step"]


def test_a_run_without_a_checkpoint_begins_again_only_if_it_never_had_one(tmp_path: Path, tiny_data: list[str]) -> None:
    overrides, run_dir = [*tiny_data, "logger.log_every=1"], tmp_path / "run"
    endless = [*overrides, "trainer.steps=100000"]
    process = subprocess.Popen(command(endless, run_dir), cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    wait_for_step(run_dir, 3, process)
    process.kill()
    process.communicate(timeout=60)
    assert summary(run_dir)["checkpoint_step"] is None
    assert run_here(overrides, run_dir)["checkpoint_step"] == 8
    assert [line["step"] for line in records(run_dir)] == list(range(9))
    # A sweep takes over finished runs like this.
    shutil.rmtree(run_dir / "checkpoints")
    assert check_run(compose([*SMALL, *overrides, f"run_dir={run_dir}"])).finished == "completed"
    with pytest.raises(UserError, match=r"no checkpoint \(the last one, by its summary\.json: step 8\)"):
        check_run(compose([*SMALL, *overrides, "trainer.steps=9", f"run_dir={run_dir}"]))


def test_a_run_whose_loss_is_no_number_ends_cleanly_as_diverged(tmp_path: Path, tiny_data: list[str]) -> None:
    # The rate overflows float32 in the first steps.
    done = run_process([*tiny_data, "optimizer=adamw", "optimizer.lr=1e36", "trainer.steps=40"], tmp_path / "run")
    assert done.returncode == 0, done.stderr
    seen = summary(tmp_path / "run")
    assert seen["status"] == "diverged"
    assert "loss" in seen["reason"]
    assert seen["step"] < 40
    assert seen["val_step"] == seen["step"]
    assert seen["tokens_per_s"] > 0
    assert seen["outside_s"]["probe"] > 0
    assert seen["outside_s"]["validation"] > 0
    assert seen["initial_val_loss"] == pytest.approx(math.log(512), rel=0.05)
    again = run_process([*tiny_data, "optimizer=adamw", "optimizer.lr=1e36", "trainer.steps=40"], tmp_path / "run")
    assert "finished already: diverged" in again.stdout


def test_a_loss_that_stays_far_above_its_best_ends_as_diverged(tmp_path: Path, tiny_data: list[str]) -> None:
    overrides = ["stabilizer=qk_norm", "optimizer=adamw", "optimizer.lr=30", "optimizer.warmup_steps=0"]
    overrides += ["trainer.global_batch_size=2", "trainer.steps=160"]
    seen = run_here([*tiny_data, *overrides], tmp_path / "run")
    assert seen["status"] == "diverged"
    assert "mean of 100 steps" in seen["reason"]


def test_a_run_with_a_bent_schedule_cannot_be_made_longer(tmp_path: Path, tiny_data: list[str]) -> None:
    overrides = [*tiny_data, "trainer.steps=2"]
    run_here([*overrides, "optimizer.schedule=cosine"], tmp_path / "run")
    with pytest.raises(UserError, match=r"trainer\.steps=2, not 4"):
        check_run(
            compose([*SMALL, *overrides, "optimizer.schedule=cosine", "trainer.steps=4", f"run_dir={tmp_path / 'run'}"])
        )


def test_a_run_is_not_continued_on_another_data_set(tmp_path: Path, tiny_data: list[str]) -> None:
    run_here([*tiny_data, "trainer.steps=2"], tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(tiny_data[1].removeprefix("data.dir="), other)
    shard = next(other.glob("train_*.bin"))
    shard.write_bytes(np.fromfile(shard, np.uint16)[::-1].tobytes())
    manifest = other / "manifest.json"
    manifest.write_text(
        re.sub(
            rf'("file": "{shard.name}",[^}}]*"sha256": ")[^"]*',
            lambda match: match[1] + hashlib.sha256(shard.read_bytes()).hexdigest(),
            manifest.read_text(),
        )
    )
    overrides = [*SMALL, *tiny_data, f"data.dir={other}", "trainer.steps=4"]
    check_run(compose([*overrides, f"run_dir={tmp_path / 'fresh'}"]))
    with pytest.raises(UserError, match=r"data\.dir=.*not the data set that run_dir"):
        check_run(compose([*overrides, f"run_dir={tmp_path / 'run'}"]))


def test_a_validation_has_its_loss_in_bits_per_byte_where_the_manifest_knows_the_bytes(
    tmp_path: Path, tiny_data: list[str]
) -> None:
    data = Path(tiny_data[1].removeprefix("data.dir="))
    shutil.copytree(data, tmp_path / "older")
    manifest = json.loads((data / "manifest.json").read_text())
    assert all(split.pop("text_bytes") for split in manifest["splits"].values())
    (tmp_path / "older/manifest.json").write_text(json.dumps(manifest))
    known = run_here([*tiny_data, "trainer.steps=2"], tmp_path / "known")
    for steps in (1, 2):
        unknown = run_here([f"data.dir={tmp_path / 'older'}", f"trainer.steps={steps}"], tmp_path / "unknown")
    lines, older = records(tmp_path / "known"), {line["step"]: line for line in records(tmp_path / "unknown")}
    for line in (line for line in lines if "val/loss" in line):
        expected = line["val/loss"] / math.log(2) * tokens_per_byte(data)
        assert line.pop("val/bits_per_byte") == pytest.approx(expected, rel=1e-9)
        assert line == older[line["step"]]
    assert known["val_bits_per_byte"] == pytest.approx(known["val_loss"] / math.log(2) * tokens_per_byte(data))
    assert unknown["val_loss"] == known["val_loss"]
    assert unknown["val_bits_per_byte"] is None


def test_a_damaged_checkpoint_is_skipped_and_the_run_still_ends_in_the_same_bits(
    tmp_path: Path, tiny_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*tiny_data, "stabilizer=quack", "logger.log_every=1", "trainer.val_every=2", "trainer.probe_every=2"]
    overrides += ["trainer.checkpoint_every=2"]
    run_here(overrides, tmp_path / "straight")
    run_here([*overrides, "trainer.steps=4"], tmp_path / "run")
    older, newer = sorted((tmp_path / "run/checkpoints").iterdir())
    (tensors,) = newer.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:1000])
    shutil.copytree(tmp_path / "run", tmp_path / "worse")
    run_here(overrides, tmp_path / "run")
    assert f"{newer} is not a valid checkpoint and is skipped" in capsys.readouterr().err
    assert records(tmp_path / "straight") == records(tmp_path / "run")
    assert_same_tensors(tmp_path / "straight", tmp_path / "run")
    # With no valid one left, nothing is overwritten.
    (tmp_path / "worse/checkpoints" / older.name / "state.json").unlink()
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in \S+worse/checkpoints is valid"):
        check_run(compose([*SMALL, *overrides, f"run_dir={tmp_path / 'worse'}"]))


def test_results_without_their_config_are_refused(tmp_path: Path, tiny_data: list[str]) -> None:
    run_here([*tiny_data, "trainer.steps=2"], tmp_path / "run")
    (tmp_path / "run/config.yaml").unlink()
    with pytest.raises(UserError, match=str(tmp_path / "run")):
        check_run(compose([*SMALL, *tiny_data, "trainer.steps=4", f"run_dir={tmp_path / 'run'}"]))


def test_a_checkpoint_of_another_config_is_refused_with_the_keys(tmp_path: Path, tiny_data: list[str]) -> None:
    run_here([*tiny_data, "trainer.steps=2"], tmp_path / "run")
    run_here([*tiny_data, "trainer.steps=2", "seed=3", "optimizer.lr=0.2"], tmp_path / "other")
    shutil.copytree(
        tmp_path / "other/checkpoints/step_00000002", tmp_path / "run/checkpoints/step_00000002", dirs_exist_ok=True
    )
    config = compose([*SMALL, *tiny_data, "trainer.steps=4", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"step_00000002 holds a run with optimizer\.lr=0\.2, not 0\.1, seed=3, not 0"):
        check_run(config)


def test_no_step_draws_from_a_global_random_generator(tmp_path: Path, tiny_data: list[str]) -> None:
    # Else its state would belong in a checkpoint.
    run = build_run(check_run(compose([*SMALL, *tiny_data, "stabilizer=quack", f"run_dir={tmp_path / 'run'}"])))
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    train(run)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


def test_a_second_run_in_a_directory_in_use_is_refused(tmp_path: Path, tiny_data: list[str]) -> None:
    config = compose([*SMALL, *tiny_data, f"run_dir={tmp_path / 'run'}"])
    first = build_run(check_run(config))
    with pytest.raises(UserError, match="in use by another process"):
        build_run(check_run(config))
    assert first.lock is not None
    first.lock.close()


def test_a_run_copies_its_log_to_the_sinks_that_it_is_given(tmp_path: Path, tiny_data: list[str]) -> None:
    done = run_process([*tiny_data, "logger.wandb=offline", "stabilizer=qk_clip"], tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


def test_the_environment_is_written_down(tmp_path: Path, tiny_data: list[str]) -> None:
    run_here([*tiny_data, "trainer.steps=1"], tmp_path / "run")
    seen = json.loads((tmp_path / "run/environment.json").read_text())
    # The package's version; torch adds its build, 2.14.1+cu130.
    assert seen["versions"]["torch"] == metadata.version("torch")
    assert torch.__version__.startswith(seen["versions"]["torch"])
    assert seen["world_size"] == 1
    assert seen["attention_kernel"] in ("sdpa: FLASH_ATTENTION", "sdpa: CUDNN_ATTENTION", "sdpa: EFFICIENT_ATTENTION")


def test_bfloat16_trains_close_to_float32(tmp_path: Path, tiny_data: list[str]) -> None:
    overrides = [*tiny_data, "stabilizer=qk_norm", "optimizer.lr=0.03", "trainer.steps=20"]
    exact = run_here(overrides, tmp_path / "float32")
    done = run_process([*overrides, *HALF, "trainer.precision=bfloat16"], tmp_path / "bfloat16")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "bfloat16")["val_loss"] == pytest.approx(exact["val_loss"], abs=0.05)
    assert exact["val_loss"] < exact["initial_val_loss"] - 0.3


@pytest.mark.slow
def test_compiled_blocks_train_like_plain_ones(tmp_path: Path, tiny_data: list[str]) -> None:
    overrides = [*tiny_data, "attention=mla", "stabilizer=qk_clip", "stabilizer.threshold=0.1"]
    run_here(overrides, tmp_path / "plain")
    for recomputed in ("false", "selective"):
        compiled = ["trainer.compile=true", f"trainer.activation_checkpointing={recomputed}"]
        run_here([*overrides, *compiled], tmp_path / recomputed)
        assert_close_records(tmp_path / "plain", tmp_path / recomputed, 1e-3)
