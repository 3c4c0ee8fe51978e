"""What surrounds a run: sinks, the profiler, tables for notebooks, reports of single runs, and lr-find."""

import gzip
import itertools
import json
import math
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from calls import call, call_here

from quack_lm import results
from quack_lm.cli.lr_find import Point, conclusions, first_above, lowest, turning
from quack_lm.config import compose
from quack_lm.errors import UserError
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run
from quack_lm.training.loop import train
from quack_lm.training.metrics import LoggerSettings
from quack_lm.training.sinks import Sink, TensorBoardSink, TrackioSink

SMALL = ["experiment=tiny", "model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.d_ff=48"]
SMALL += ["model.vocab_size=512", "trainer.seq_len=32", "trainer.micro_batch_size=2", "trainer.global_batch_size=4"]
SMALL += ["trainer.val_sequences=2", "trainer.probe_sequences=2", "logger.progress=false", "trainer.device=cpu"]


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ sinks


@pytest.fixture(scope="module")
def run_with_sinks(tiny_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, then continued to 6, with every sink that needs no account, and a trace."""
    root = tmp_path_factory.mktemp("sinks")
    sinks = ["logger.tensorboard=true", "logger.trackio=true", "logger.project=ducks", "logger.log_every=2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(root / "board"))
        for steps in (4, 6):
            settings = [*SMALL, *tiny_data, *sinks, "trainer.profile=[2,3]", f"trainer.steps={steps}"]
            settings.append("trainer.activation_checkpointing=true")
            train(build_run(check_run(compose([*settings, f"run_dir={root / 'run'}"]))))
    return root


def test_tensorboard_has_the_scalars_of_the_log_once_also_of_a_continued_run(run_with_sinks: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_with_sinks / "run" / "tensorboard"))
    events.Reload()
    expected = lines(run_with_sinks / "run")
    names = {name for line in expected for name, value in line.items() if not isinstance(value, list)} - {"step"}
    assert set(events.Tags()["scalars"]) == names
    for name in ("train/loss", "val/loss", "logits/max"):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in expected if name in line]


def test_trackio_has_the_scalars_of_the_log_in_one_run(run_with_sinks: Path) -> None:
    (database,) = (run_with_sinks / "board").glob("ducks*.db")
    with sqlite3.connect(database) as board:
        rows = board.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    (name,) = {name for name, *_ in rows}
    assert re.fullmatch("run-[0-9a-f]{6}", name), "two runs whose directories have one name are two"
    found = {step: json.loads(metrics) for _, step, metrics in rows}
    for line in lines(run_with_sinks / "run"):
        scalars = {name: value for name, value in line.items() if name != "step" and not isinstance(value, list)}
        assert found[line["step"]] == pytest.approx(scalars)


def test_a_sink_that_fails_says_so_once_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tensorboard").write_text("a file where a directory is to be")
    broken: Sink = TensorBoardSink(tmp_path, LoggerSettings(), first_step=0)
    for step in (1, 2):
        broken.log({"step": step, "x": 1.0})
    broken.close({})
    assert capsys.readouterr().out.count("TensorBoard failed and is off for the rest of this run") == 1


@pytest.mark.parametrize(
    ("setting", "package", "extra"),
    [
        ("tensorboard=true", "tensorboard", r"-e '\.\[tensorboard\]'"),
        ("trackio=true", "trackio", r"-e '\.\[trackio\]'"),
        ("wandb=offline", "wandb", "wandb"),
    ],
)
def test_a_sink_that_is_not_installed_is_named_with_its_command(
    setting: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks a module that cannot be imported
    with pytest.raises(UserError, match=rf"logger\.{setting} needs {package}: pip install {extra}"):
        check_run(compose([*SMALL, f"logger.{setting}"]))


def test_a_board_that_cannot_be_written_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "file" / "board"))
    sink = TrackioSink(Path("mine"), LoggerSettings(project="ponds"), {}, is_continued=False)
    sink.log({"step": 1, "x": 1.0})
    sink.close({})
    assert capsys.readouterr().out.count("trackio failed and is off for the rest of this run: NotADirectoryError") == 1


def test_trackio_starts_anew_unless_the_run_is_continued(run_with_sinks: Path) -> None:
    # Beside the board of that run, for trackio reads once where it is.
    for is_continued in (False, False, True):
        sink = TrackioSink(Path("mine"), LoggerSettings(project="ponds"), {}, is_continued=is_continued)
        sink.log({"step": 1, "x": 1.0})
        sink.close({})
    (database,) = (run_with_sinks / "board").glob("ponds*.db")
    with sqlite3.connect(database) as board:
        runs = {row[0] for row in board.execute("SELECT run_id FROM metrics")}
    assert len(runs) == 2


# ------------------------------------------------------------------------------------------------ profile


def test_a_trace_has_the_regions_of_the_steps_that_were_asked_for(run_with_sinks: Path) -> None:
    with gzip.open(run_with_sinks / "run" / "profile" / "trace_rank0.json.gz") as file:
        events = json.load(file)["traceEvents"]
    marked = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    # Two steps of two micro-batches each, and two layers, whose activations the backward computes again.
    expected = {"data": 4, "forward": 4, "backward": 4, "attention": 8, "clip_gradients": 2, "stabilizer": 4}
    assert {name: marked.count(name) for name in expected} == expected
    assert any(name.startswith("Optimizer.step#") for name in marked)


def test_a_trace_that_the_end_of_the_run_cuts_is_written_and_summarized(
    tmp_path: Path, tiny_data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*SMALL, *tiny_data, "trainer.profile=[3,99]", "trainer.steps=3", f"run_dir={tmp_path}"]
    train(build_run(check_run(compose(settings))))
    printed = capsys.readouterr().err
    assert (tmp_path / "profile" / "trace_rank0.json.gz").is_file()
    for word in ("ms a step", "stabilizer", "attention", "Self CPU", f"trace: {tmp_path / 'profile'}"):
        assert word in printed


def test_a_finished_run_says_what_it_was_trained_without(run_with_sinks, tiny_data, monkeypatch, capsys) -> None:
    run_dir = run_with_sinks / "run"
    settings = [*SMALL, *tiny_data, "trainer.steps=6", "trainer.profile=[2,3]", "eval.every=2", f"run_dir={run_dir}"]
    code, stdout, _ = call_here("train", settings, monkeypatch, capsys)
    assert code == 0
    assert stdout.startswith(f"{run_dir} is finished already: completed\nit was trained without eval.every=2; to train")


def test_a_trace_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(UserError, match=r"trainer\.profile=\[3, 2\] must be a first step and a last one"):
        check_run(compose([*SMALL, "trainer.profile=[3,2]"]))


# ------------------------------------------------------------------------------------------------ tables and reports


def test_a_run_is_two_tables(run_with_sinks: Path) -> None:
    run_dir = run_with_sinks / "run"
    runs, curves = results.load(run_dir)
    (row,) = runs.to_dict("records")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (row["run"], row["status"], row["config.trainer.steps"]) == ("run", "completed", 6)
    assert row["val_loss"] == summary["val_loss"]
    losses = curves[["step", "train/loss"]].dropna()
    assert [tuple(pair) for pair in losses.to_numpy()] == [
        (line["step"], pytest.approx(line["train/loss"], rel=1e-6)) for line in lines(run_dir) if "train/loss" in line
    ]


def test_several_directories_are_one_result_in_which_a_run_counts_once(
    run_with_sinks: Path, tiny_data: list[str], tmp_path: Path
) -> None:
    for name, seed in (("again", 0), ("other", 1)):
        settings = [*SMALL, *tiny_data, "trainer.steps=2", f"seed={seed}", f"run_dir={tmp_path / name}"]
        train(build_run(check_run(compose(settings))))
    runs, curves = results.load(run_with_sinks / "run", str(tmp_path / "other"), tmp_path / "other")
    assert sorted(runs["run"]) == ["other", "run"]
    assert set(curves["run"]) == {"other", "run"}
    # Two runs whose directories have one name.
    shutil.copytree(tmp_path / "other", tmp_path / "elsewhere" / "run")
    runs, curves = results.load(run_with_sinks / "run", tmp_path / "elsewhere" / "run")
    assert sorted(runs["run"]) == sorted({f"run-{own}" for own in runs["fingerprint"]}) == sorted(set(curves["run"]))
    code, _, stderr = call("report", str(tmp_path / "again"), str(tmp_path / "other"))
    assert (code, stderr) == (0, "")
    assert "2 runs" in (tmp_path / "report" / "report.md").read_text()
    with pytest.raises(UserError, match="is no directory of a run"):
        results.load(tmp_path)


# ------------------------------------------------------------------------------------------------ lr-find


def test_a_ramp_is_drawn_and_ends_where_the_loss_has_left_its_best(tmp_path: Path, tiny_data: list[str]) -> None:
    settings = [*SMALL, *tiny_data, "attention=mla", "from=1e-4", "to=1000", "steps=60", f"out={tmp_path}"]
    code, stdout, stderr = call("lr-find", *settings)
    assert (code, stderr) == (0, "")
    points = [json.loads(line) for line in (tmp_path / "ramp.jsonl").read_text().splitlines()]
    assert [p["step"] for p in points] == list(range(1, len(points) + 1))
    ratio = (1000 / 1e-4) ** (1 / 59)
    assert all(b["lr"] / a["lr"] == pytest.approx(ratio) for a, b in itertools.pairwise(points))
    assert points[0]["lr"] == 1e-4
    # The loss of untrained weights, then lower, then far above: a rate of 1000 leaves nothing of a model.
    assert points[0]["loss"] == pytest.approx(math.log(512), abs=0.3)
    assert min(p["smoothed"] for p in points) < points[0]["smoothed"] - 0.1
    assert points[-1]["max_logit"] is None or points[-1]["max_logit"] > 1000
    assert "loss turns up    at optimizer.lr=" in stdout
    assert (tmp_path / "ramp.png").read_bytes().startswith(b"\x89PNG")
    code, _, stderr = call("lr-find", *settings)
    assert (code, stderr) == (2, f"error: out={tmp_path} has ramp.jsonl of an earlier ramp; choose another out\n")


def test_the_rates_of_a_ramp_are_read_from_its_running_mean() -> None:
    losses = [6.0, 5.0, 4.0, 4.05, 4.2, math.nan]
    logits = [1.0, None, 50.0, None, 2000.0, None]
    points = [Point(10.0**i, x, x, y) for i, (x, y) in enumerate(zip(losses, logits, strict=True))]
    turned, above = turning(points), first_above(points, 1000.0)
    assert turned is not None
    assert above is not None
    assert (lowest(points).lr, turned.lr, above.lr) == (100.0, 1e4, 1e4)
    assert turning(points[:4]) is None
    assert "a sweep to start optimizer.lr=100,300,1000,3000,10000" in conclusions(points, 1000.0)
    assert conclusions(points[2:], 1000.0)[-1].startswith("no sweep to start: the loss never fell by 0.1 nats")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["from=0"], "from=0 must be a learning rate from 1e-36 to 1e+36"),
        (["from=1", "to=0.1"], "from=1 must be below to=0.1"),
        (["steps=3"], "steps=3 must be an integer from 10"),
        (["optimizer.lr=0.1"], "optimizer.lr is what the ramp changes; give from=... and to=..."),
        (["logger.tensorboard=true"], "logger.tensorboard has no effect: a ramp writes its own files alone"),
        (["+run_dir=x"], "run_dir is out=... here"),
        (["form=1e-4"], "unknown key form: did you mean from=1e-4?"),
        (["out=/proc/quack_lm"], "out=/proc/quack_lm: "),
        (["--fast"], "--fast"),
    ],
)
def test_a_mistake_in_a_ramp_is_one_line(arguments: list[str], words: str) -> None:
    code, stdout, stderr = call("lr-find", "experiment=tiny", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr


def test_the_dockerfile_passes_its_linter() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    command = [str(hadolint), str(Path(__file__).resolve().parents[1] / "Dockerfile")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
