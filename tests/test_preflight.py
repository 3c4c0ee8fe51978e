"""Preflight checks, on a login node and inside a job of two ranks."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_train import REPOSITORY, SMALL, run_here

from quack_lm.config import compose
from quack_lm.errors import UserError
from quack_lm.training.preflight import BROKEN, Row, check_disk, check_write_access, compare, compare_clocks, merge
from quack_lm.training.run_dir import RunDir


def preflight(overrides: list[str], ranks: int = 1, own: list[str] = SMALL) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, "scripts/preflight.py", *own, *overrides]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)


def test_a_login_node_says_ready_and_leaves_nothing_behind(tmp_path: Path, tiny_data: list[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    done = preflight([*tiny_data, f"run_dir={tmp_path / 'run'}"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("ready to train\n")
    for check in ("model", "processes", "data", "run directory", "write access", "disk space", "packages", "GPUs"):
        assert f"\n{check} " in done.stdout
    assert "a new run" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before


def test_two_ranks_measure_their_all_reduce_and_clocks(tmp_path: Path, tiny_data: list[str]) -> None:
    done = preflight([*tiny_data, f"run_dir={tmp_path / 'run'}"], ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GB/s for 4 MiB" in done.stdout
    assert "within" in done.stdout
    assert "(0, 1)" in done.stdout
    # One table, whatever the number of ranks.
    assert done.stdout.count("ready to train") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_login_node_checks_the_batch_for_the_ranks_of_the_job(tmp_path: Path, tiny_data: list[str]) -> None:
    own = [*tiny_data, f"run_dir={tmp_path / 'run'}", "trainer.replicas=2"]
    done = preflight([*own, "ranks=6"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 in the job, 12 sequences a step" in done.stdout
    done = preflight([*own, "ranks=4"])
    assert done.returncode == 2
    assert "must be a multiple of ranks x trainer.micro_batch_size = 4 x 2 = 8" in done.stdout
    done = preflight([*own, "ranks=many"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "ranks=many must be an integer" in done.stderr


def test_a_login_node_needs_no_gpu_for_a_job_that_will_have_some(tmp_path: Path, tiny_data: list[str]) -> None:
    own = [*tiny_data, f"run_dir={tmp_path / 'run'}", "trainer.device=cuda"]
    done = preflight([*own, "ranks=2"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 in the job, 12 sequences a step" in done.stdout
    done = preflight([*own, "ranks=any", "trainer.replicas=7"])
    assert done.returncode == 0, done.stdout + done.stderr
    # What a GPU would not fix is still reported.
    done = preflight([*own, "ranks=2", "attention.backend=flash", "trainer.precision=float32"])
    assert done.returncode == 2
    assert "attention.backend=flash needs" in done.stdout


def test_a_model_that_cannot_fit_is_told(tmp_path: Path, tiny_data: list[str]) -> None:
    own = [*tiny_data, f"run_dir={tmp_path / 'run'}", "model.d_ff=2000000000"]
    done = preflight([*own, "trainer.device=cpu"])
    assert done.returncode == 2
    assert "model.d_ff=2000000000 is too large" in done.stdout
    assert done.stdout.count("FAIL  ") == 2, done.stdout  # nor can its checkpoints


def test_a_run_is_not_continued_on_another_data_set(tmp_path: Path, tiny_data: list[str]) -> None:
    run_here(tiny_data, tmp_path / "run")
    other = tmp_path / "other"
    shutil.copytree(tiny_data[-1].partition("=")[2], other)
    (other / "manifest.json").write_text((other / "manifest.json").read_text() + "\n")
    own = [f"run_dir={tmp_path / 'run'}", "trainer.steps=100"]
    assert "continues from" in preflight([*tiny_data, *own]).stdout
    done = preflight([tiny_data[0], f"data.dir={other}", *own])
    assert done.returncode == 2
    assert f"data.dir={other} is not the data set that run_dir={tmp_path / 'run'} was trained on" in done.stdout


def test_everything_that_is_wrong_is_in_the_table(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    done = preflight(["data.dir=/nowhere", f"run_dir={tmp_path / 'run'}", "trainer.micro_batch_size=7"])
    assert done.returncode == 2
    assert done.stdout.count("FAIL  ") == 3, done.stdout
    for said in ("/nowhere", "without their config.yaml", "trainer.global_batch_size=12 must be a multiple"):
        assert said in done.stdout
    assert done.stdout.endswith("FAILED: fix the checks marked FAIL\n")


def test_a_mistake_in_the_settings_is_one_line() -> None:
    done = preflight(["optimizer.lrr=1"])
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "did you mean optimizer.lr" in done.stderr


def test_space_is_needed_for_one_checkpoint_more_than_is_kept(tmp_path: Path) -> None:
    assert "for 2 + 1 checkpoints of up to 0.012 GB" in check_disk(
        RunDir(tmp_path / "run"), n_params=1_000_000, n_kept=2
    )
    with pytest.raises(UserError, match=r"missing at run_dir=.*trainer\.keep_checkpoints and trainer\.keep_every"):
        check_disk(RunDir(tmp_path / "run"), n_params=10**15, n_kept=2)


def test_a_directory_that_is_no_place_to_write_is_refused() -> None:
    with pytest.raises(UserError, match="run_dir=/proc/mine"):
        check_write_access(RunDir(Path("/proc/mine")))


def test_unequal_ranks_are_named() -> None:
    one = {"rank": 0, "host": "a", "gpus": ["H100 80 GiB"] * 2, "versions": {"python": "3", "torch": "2", "numpy": "2"}}
    same = {**one, "rank": 1}
    assert all(row.is_ok is not False for row in compare([one, same], device="cuda"))
    other = {**one, "rank": 1, "host": "b", "gpus": [], "versions": {**one["versions"], "torch": "1"}}
    bad = [row.found for row in compare([one, other], device="cuda") if row.is_ok is False]
    assert bad == [
        "torch is 1 on b but 2 on a; use one environment for all nodes",
        "rank 1 on b has none, rank 0 has ['H100 80 GiB', 'H100 80 GiB']",
    ]
    (found,) = [row for row in compare([{**one, "gpus": [f"{BROKEN}: ECC"]}] * 2, device="cuda") if row.is_ok is False]
    assert found.found == "rank 0 on a: a GPU does not work: ECC"


def test_the_clock_that_is_off_is_named_with_its_host() -> None:
    near = compare_clocks([5.0, 5.25, 4.5], ["a", "a", "b"])
    assert near == Row("clocks", True, "within 0.75 s: a +0.25 s, b -0.5 s")
    row = compare_clocks([5.0, 95.0], ["a", "b"])
    assert (row.is_ok, row.found.startswith("within 90 s: a +0 s, b +90 s; more than 2 s")) == (False, True)


def test_the_config_of_an_earlier_run_is_taken(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(compose([*SMALL, "data.dir=/nowhere"])))
    done = preflight(["--config", str(config), f"run_dir={tmp_path / 'again'}"], own=[])
    assert done.returncode == 2
    assert "/nowhere" in done.stdout
    assert f"{tmp_path / 'again'}: a new run" in done.stdout


def test_the_first_complaint_about_a_check_is_shown_with_its_rank() -> None:
    fine, bad = Row("data", True, "there"), Row("data", False, "gone")
    assert merge([[fine], [fine]], ["a", "b"]) == [fine]
    assert merge([[fine], [bad]], ["a", "b"]) == [Row("data", False, "rank 1 on b: gone")]
    assert merge([[bad]], ["a"]) == [bad]
