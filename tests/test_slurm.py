"""Real jobs on a real slurm: two nodes, counted GPUs and preemption, all on this machine (tests/slurm_cluster.sh)."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_faults import ranks_of
from test_train import SMALL, run_here, summary

from quack_lm import slurm
from quack_lm.config import compose
from quack_lm.errors import UserError
from quack_lm.files import take_lock
from quack_lm.sweep import cluster as jobs
from quack_lm.sweep.cell import Cell
from quack_lm.sweep.file import override_value
from quack_lm.sweep.plan import read_plan
from quack_lm.training.check import check_run

ROOT = Path(__file__).resolve().parents[1]
SWEEP = ROOT / "scripts" / "sweep.py"
CLUSTER = ROOT / "tests" / "slurm_cluster.sh"
SUBMIT = (sys.executable, "-m", "quack_lm", "submit", "--parsable")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")

# The GPUs of these nodes are only counted.
CPU = "trainer.device=cpu"
# Steps of some milliseconds, and nothing between them, for runs that a test interrupts.
PLAIN = ["trainer.val_every=0", "trainer.probe_every=0", "logger.log_every=1"]
ENDLESS = [*PLAIN, "trainer.steps=100000", "trainer.checkpoint_every=20"]


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free, above the rendezvous ports of ranks."""
    for first in range(30_000 + os.getpid() % 500 * count, 32_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The state directory of a running cluster."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        why = f"{', '.join(missing)} not found" if missing else "starting slurm needs root"
        message = f"NOT TESTED: slurm ({why}); `bash {CLUSTER.relative_to(ROOT)} install` as root installs it"
        warnings.warn(message, stacklevel=1)
        pytest.skip(message)
    state = tmp_path_factory.mktemp("slurm")
    start = subprocess.run(["bash", CLUSTER, "start", state, str(free_ports(3))], capture_output=True, text=True)
    try:
        assert start.returncode == 0, start.stderr
        yield state
    finally:
        subprocess.run(["bash", CLUSTER, "stop", state], check=True, timeout=120)


class Site:
    """A login node: commands with the cluster's environment, from a working directory of the test's own."""

    def __init__(self, state: Path, folder: Path) -> None:
        self.state, self.folder = state, folder
        self.environment = {**os.environ, "SLURM_CONF": str(state / "slurm.conf")}
        # The nodes' names are made up, and all on this machine.
        self.environment |= {"MASTER_ADDR": "127.0.0.1", "QUACK_SITE": str(folder / "site.sh"), "OMP_NUM_THREADS": "1"}
        # The check takes seconds each time, and these tests are about jobs.
        self.environment["QUACK_PREFLIGHT"] = "no"
        self.write_site()

    def write_site(self, *flags: str, more: Sequence[str] = ()) -> None:
        lines = [f"SBATCH_FLAGS=({shlex.join(flags)})", f"PYTHON=({shlex.quote(sys.executable)})", "RETRY_AFTER_S=0"]
        lines += more
        (self.folder / "site.sh").write_text("\n".join(lines) + "\n")

    def call(self, *command: object, check: bool = True) -> str:
        done = self.run(*command)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout.strip()

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(part) for part in command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=200,
        )

    def train(self, run_dir: Path, overrides: list[str], *flags: str) -> str:
        """Submit a run; the job's number."""
        return self.call(*SUBMIT, *flags, "train", *SMALL, CPU, *overrides, f"run_dir={run_dir}")

    def ranks(self, *lines: str, flags: Sequence[str] = ()) -> str:
        """Submit a batch script that sources slurm/job.sh and then does this; the job's number."""
        script = self.folder / "job.sh"
        head = ["#!/bin/bash", "set -euo pipefail", f"QUACK_SLURM_DIR={shlex.quote(str(slurm.SLURM_DIR))}"]
        script.write_text("\n".join([*head, "source $QUACK_SLURM_DIR/job.sh", *lines]))
        return self.call("sbatch", "--parsable", "--output=slurm-%j.out", *flags, script)

    def sweep(self, verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, SWEEP, verb, *arguments)

    def show(self, job: str) -> dict[str, str]:
        words = self.call("scontrol", "show", "job", "-o", job).split("\n")[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self, job: str) -> str:
        path = self.folder / f"slurm-{job}.out"
        return path.read_text() if path.exists() else "nothing"

    def wait_for(self, job: str, condition: Callable[[], Any], seconds: float = 200) -> None:
        """Until the condition holds; the two minutes that slurm lets a requeued job wait are cut short."""
        hurried = set()

        def holds() -> bool:
            seen = self.show(job)
            if seen["JobState"] == "PENDING" and seen["Reason"] == "BeginTime" and seen["Restarts"] not in hurried:
                hurried.add(seen["Restarts"])
                # A start within the second of the requeue gets a credential that the nodes were told to refuse.
                self.run("scontrol", "update", f"JobId={job}", "StartTime=now+3")
            return condition()

        until(holds, lambda: f"job {job} is {self.show(job)['JobState']}\n{self.log(job)}", seconds)

    def wait_for_end(self, job: str, seconds: float = 200) -> str:
        """The state in which the job has ended."""
        self.wait_for(job, lambda: self.show(job)["JobState"] in slurm.ENDED, seconds)
        return self.show(job)["JobState"]


@pytest.fixture
def site(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    folder = tmp_path / "work"
    folder.mkdir()
    site = Site(cluster, folder)
    # For what a test asks of slurm in this process.
    monkeypatch.setenv("SLURM_CONF", site.environment["SLURM_CONF"])
    yield site
    # What a failed test leaves must not keep the nodes from the next one.
    environment = {**os.environ, "SLURM_CONF": str(cluster / "slurm.conf")}
    subprocess.run(["scancel", "--quiet", "--user=root"], env=environment, check=False)
    empty = lambda: not subprocess.run(["squeue", "-h"], env=environment, capture_output=True).stdout  # noqa: E731
    until(empty, lambda: "jobs do not end", 60)


def until(condition: Callable[[], Any], what: Callable[[], str], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)


def steps_of(run_dir: Path) -> list[int]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for_steps(site: Site, job: str, run_dir: Path, count: int) -> None:
    until(lambda: len(steps_of(run_dir)) > count, lambda: f"{site.show(job)}\n{site.log(job)}")


def assert_every_step_once(run_dir: Path) -> None:
    seen = summary(run_dir)
    assert steps_of(run_dir) == list(range(seen["step"] + 1))


# ------------------------------------------------------------------------------------------------ one run


def test_a_job_of_two_ranks_on_two_nodes_trains_like_torchrun_would(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    overrides = [*tiny_data, "stabilizer=quack"]
    job = site.train(tmp_path / "run", overrides, "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1")
    assert site.wait_for_end(job) == "COMPLETED", site.log(job)
    seen = summary(tmp_path / "run")
    assert (seen["status"], seen["world_size"], seen["step"]) == ("completed", 2, 8)
    assert site.show(job)["NumNodes"] == "2"
    # Only the first rank prints.
    assert site.log(job).count("completed at step 8") == 1
    run_here(overrides, tmp_path / "alone")
    assert summary(tmp_path / "alone")["val_loss"] == pytest.approx(seen["val_loss"], abs=2e-4)


def test_an_error_in_the_settings_fails_the_job_with_one_line(site: Site, tmp_path: Path) -> None:
    job = site.train(tmp_path / "run", ["data.dir=/nowhere"])
    assert site.wait_for_end(job) == "FAILED"
    assert site.show(job)["ExitCode"] == "2:0"
    assert site.show(job)["Restarts"] == "0"
    (line,) = [line for line in site.log(job).splitlines() if line.startswith("error: ")]
    assert "/nowhere" in line
    assert "Traceback" not in site.log(job)
    assert not (tmp_path / "run").exists()


def test_an_error_in_the_settings_is_reported_before_anything_is_queued(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    del site.environment["QUACK_PREFLIGHT"]
    submit = [*SUBMIT, "--hold"]
    train = ["train", *SMALL, f"run_dir={tmp_path / 'run'}"]
    ranks = ["-N", "2", "--ntasks-per-node=5"]
    for arguments, error in (
        ([*train, "data.dir=/nowhere"], "data.dir=/nowhere"),
        (["preflight", *SMALL, *tiny_data, "optimizer.lrr=1"], "optimizer.lrr"),
        ([*ranks, *train, *tiny_data], "a multiple of ranks x trainer.micro_batch_size = 10 x 2"),
        ([*train, *tiny_data, "ranks=2"], "ranks=2 comes after ranks=1"),
        (["-D", tmp_path, *train, "data.dir=elsewhere"], "data.dir=elsewhere"),
        (["prepare", "data=local", "data.files=[/nowhere/*.txt]"], "/nowhere/*.txt"),
        (["prepare", "data=stdlib", "data.tokenizer=/nowhere"], "data.tokenizer=/nowhere"),
    ):
        done = site.run(*submit, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert error in done.stderr
        assert "nothing is submitted" in done.stderr
    for arguments, error in (([], "nothing to submit"), (["job.sh"], "cannot submit job.sh")):
        done = site.run(*submit, *arguments)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert error in done.stderr
    assert site.call("squeue", "-h") == ""
    assert not (tmp_path / "run").exists()


def test_a_submission_is_checked_for_the_ranks_and_gpus_of_the_job_as_far_as_possible_here(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    del site.environment["QUACK_PREFLIGHT"]
    submit, train = [*SUBMIT, "--hold"], ["train", *SMALL, f"run_dir={tmp_path / 'run'}"]
    # The job will have the GPU that is not here, and the ranks of the nodes that it gets.
    here = Path(tiny_data[-1].partition("=")[2])
    relative = [f"--chdir={here.parent}", *train, f"data.dir={here.name}", "trainer.device=cuda"]
    for flags, replicas in ((["-HN2"], 2), (["--nodes=1-2"], 4), (["--gpus=4", "--gpus-per-task=1"], 4)):
        done = site.run(*submit, *flags, *relative, f"trainer.replicas={replicas}")
        assert (done.returncode, done.stderr) == (0, "")
        assert site.show(done.stdout.strip())["JobState"] == "PENDING"
    # Where Python cannot run, submitting still works.
    site.write_site(more=["PYTHON=(/nowhere/python)", "GPU_TYPE=h100"])
    done = site.run(*submit, *train, "data.dir=/nowhere")
    assert done.returncode == 0
    assert "warning: the settings cannot be checked on this machine: " in done.stderr
    assert "/nowhere/python" in done.stderr
    done = site.run(*submit, "--gpus-per-node", "1", *train)
    assert "gpu:h100:1" in site.show(done.stdout.strip())["TresPerNode"]
    for line, error in (("unset PYTHON", "PYTHON is not set"), ("false", "cannot be sourced")):
        site.write_site(more=[line])
        done = site.run(*submit, *train, *tiny_data)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
        assert error in done.stderr
        assert str(site.folder / "site.sh") in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("", 1),
        ("-HN2 --ntasks-per-node 3", 6),
        ("--nodes=4 --partition train -N2", 2),
        ("--hold -n 5 --nodes=2", 5),
        ("-vv --exclusive --nodes 2 --ntasks-per-n=2", 4),
        ("--gpus 8 -c4 -J job", 1),
        ("--nodes=1-2", None),
        ("--ntasks-per-gpu=2 --gpus=4", None),
        ("--gpus=4 --gpus-per-task=1", None),
    ],
)
def test_the_flags_of_sbatch_are_read_by_its_own_rules(words: str, ranks: int | None) -> None:
    flags, job = slurm.split_flags([*words.split(), "train", "--check", "-N3"])
    assert job == ["train", "--check", "-N3"]
    assert slurm.count_ranks(flags) == ranks


def test_a_user_error_of_one_rank_is_the_jobs_exit_code_though_slurm_kills_the_others(
    site: Site, tmp_path: Path
) -> None:
    # Slurm ends the second rank, and srun's exit code shows only that.
    (site.folder / "rank.py").write_text(
        "import os, time\nfrom quack_lm.cli import exit_on_user_error\nfrom quack_lm.errors import UserError\n"
        "with exit_on_user_error():\n"
        "    if os.environ['SLURM_PROCID'] == '0':\n        raise UserError('wrong key')\n"
        "    time.sleep(60)\n"
    )
    job = site.ranks("run_ranks rank.py", flags=["--nodes=2", "--ntasks-per-node=1"])
    assert (site.wait_for_end(job), site.show(job)["ExitCode"]) == ("FAILED", "2:0"), site.log(job)
    assert "error: wrong key\n" in site.log(job)
    assert "task 1: Terminated" in site.log(job)
    assert not list(site.folder.glob(".quack_job*"))


def test_a_traceback_is_in_the_log_though_slurm_kills_the_others(site: Site) -> None:
    code = "import os, time, quack_lm.cli as e\nwith e.exit_on_user_error(): "
    code += "time.sleep(60) if os.environ['SLURM_PROCID'] == '1' else 1 / 0"
    job = site.ranks(f"run_ranks -c {shlex.quote(code)}", flags=["--nodes=2", "--ntasks-per-node=1"])
    assert (site.wait_for_end(job), site.show(job)["ExitCode"]) == ("FAILED", "143:0"), site.log(job)
    assert "ZeroDivisionError: division by zero\n" in site.log(job)
    assert "task 0: Exited with exit code 1" in site.log(job)


def test_slurm_signals_the_program_itself(site: Site) -> None:
    # With anything between them, it would hear of no time limit where processes are tracked by cgroup.
    code = "import os; print('child of', open(f'/proc/{os.getppid()}/comm').read())"
    job = site.ranks(f"run_ranks -c {shlex.quote(code)}")
    assert site.wait_for_end(job) == "COMPLETED", site.log(job)
    assert "child of slurmstepd" in site.log(job)


def test_the_reason_that_an_earlier_start_of_a_job_left_does_not_count(site: Site) -> None:
    job = site.ranks("touch .quack_job_$SLURM_JOB_ID.user_error", "run_ranks -c 'print(\"fine\")'")
    assert site.wait_for_end(job) == "COMPLETED", site.log(job)
    assert "fine" in site.log(job)
    assert not list(site.folder.glob(".quack_job*"))


def test_a_job_in_a_directory_that_cannot_be_written_to_is_still_requeued_when_its_time_is_up(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    run_dir, elsewhere = tmp_path / "run", ["--chdir=/proc", f"--output={site.folder}/slurm-%j.out"]
    job = site.train(run_dir, [*tiny_data, *ENDLESS], *elsewhere)
    wait_for_steps(site, job, run_dir, 5)
    site.call("scancel", "--signal=USR1", job)  # what the time limit sends, without its minute
    until(lambda: "time is up: requeueing" in site.log(job), lambda: site.log(job))
    site.call("scancel", job)
    site.environment["TMPDIR"] = "/proc"
    job = site.train(tmp_path / "other", tiny_data, *elsewhere)
    assert (site.wait_for_end(job), site.show(job)["ExitCode"]) == ("FAILED", "2:0"), site.log(job)
    (line,) = [line for line in site.log(job).splitlines() if "rror" in line]
    assert line.startswith("error: neither /proc nor TMPDIR=/proc is writable")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_a_preempted_run_saves_and_is_requeued_once_to_the_same_end(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    run_dir, overrides = tmp_path / "run", [*tiny_data, "stabilizer=quack", *PLAIN, "trainer.steps=120"]
    overrides += ["logger.wandb=offline"]
    flags = ["--nodes=2", "--ntasks-per-node=1", "--exclusive"]
    job = site.train(run_dir, overrides, *flags)
    wait_for_steps(site, job, run_dir, 20)
    urgent = site.call("sbatch", "--parsable", "--partition=urgent", *flags, "--wrap", "sleep 1")
    assert site.wait_for_end(urgent) == "COMPLETED"
    until(lambda: site.show(job)["JobState"] == "PENDING", lambda: f"{site.show(job)}\n{site.log(job)}")
    stopped = summary(run_dir)
    assert (stopped["status"], stopped["reason"]) == ("interrupted", "asked to stop by SIGTERM")
    assert site.wait_for_end(job) == "COMPLETED"
    # Slurm requeued it, and not the job script.
    assert site.show(job)["Restarts"] == "1"
    assert "requeueing" not in site.log(job)
    assert site.log(job).count("start 1") == site.log(job).count("start 2") == 1
    assert summary(run_dir)["status"] == "completed"
    assert_every_step_once(run_dir)
    # One run on W&B, in two pieces that a sync joins by its id.
    pieces = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(pieces) == 2
    assert len({piece.name.rpartition("-")[2] for piece in pieces}) == 1


def test_a_run_that_is_preempted_with_a_grace_time_saves_and_is_requeued_to_the_same_end(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    run_dir = tmp_path / "run"
    job = site.train(run_dir, [*tiny_data, *ENDLESS, "trainer.steps=120"], "--partition=grace")
    wait_for_steps(site, job, run_dir, 5)
    preempt(site, "--nodes=2", "--exclusive")
    # Slurm itself would only end the job two minutes later; ended by itself, it would be lost as completed.
    until(lambda: f"preempted: requeueing job {job}," in site.log(job), lambda: f"{site.show(job)}\n{site.log(job)}")
    stopped = summary(run_dir)
    assert (stopped["status"], stopped["reason"]) == ("interrupted", "asked to stop by SIGTERM")
    assert site.wait_for_end(job) == "COMPLETED", site.log(job)
    assert site.show(job)["Restarts"] == "1"
    assert site.log(job).count("start 1") == site.log(job).count("start 2") == 1
    assert_every_step_once(run_dir)


@pytest.mark.slow
def test_a_program_without_an_answer_to_sigterm_is_requeued_too(site: Site) -> None:
    # As quack-lm prepare, which continues where it was.
    (site.folder / "rank.py").write_text(
        "import os, time\ntime.sleep(0 if 'SLURM_RESTART_COUNT' in os.environ else 99)"
    )
    everything = ["--nodes=2", "--exclusive"]
    job = site.ranks("run_ranks rank.py", flags=["--partition=grace", "--open-mode=append", *everything])
    until(lambda: "start 1" in site.log(job), lambda: site.log(job))
    preempt(site, *everything)
    until(lambda: f"preempted: requeueing job {job}," in site.log(job), lambda: site.log(job))
    assert site.wait_for_end(job) == "COMPLETED", site.log(job)
    # A canceled job is not requeued.
    job = site.ranks("run_ranks -c 'import time; time.sleep(99)'", flags=["--partition=grace"])
    until(lambda: "start 1" in site.log(job), lambda: site.log(job))
    site.call("scancel", job)
    assert site.wait_for_end(job) == "CANCELLED"
    assert "requeueing" not in site.log(job)


def preempt(site: Site, *flags: str) -> None:
    """Submit a job that takes the nodes from those of the other partitions."""
    site.call("sbatch", "--parsable", "--partition=urgent", *flags, "--wrap", "sleep 1")


def test_a_time_limit_saves_and_requeues_until_the_run_is_complete(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    run_dir, file = tmp_path / "run", tmp_path / "config.yaml"
    config = compose([*SMALL, CPU, *tiny_data, "stabilizer=quack", *ENDLESS])
    file.write_text(yaml.safe_dump(config))
    # Slurm looks at the clock every 30 s, so the signal comes between 29 and 59 s after the start.
    flags = ["--nodes=2", "--ntasks-per-node=1", "--time=1", "--signal=USR1@1"]
    job = site.call(*SUBMIT, *flags, "train", "--config", file, f"run_dir={run_dir}")
    until(lambda: "time is up: requeueing" in site.log(job), lambda: site.log(job), 150)
    stopped = summary(run_dir)
    assert (stopped["status"], stopped["reason"]) == ("interrupted", "asked to stop by SIGUSR1")
    # The rest at one go, whatever this machine's speed was.
    config["trainer"]["steps"] = stopped["step"] + 20
    file.write_text(yaml.safe_dump(config))
    site.call("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    assert site.wait_for_end(job) == "COMPLETED"
    assert site.show(job)["Restarts"] == "1"
    assert summary(run_dir)["status"] == "completed"
    assert_every_step_once(run_dir)


def test_a_canceled_job_saves_and_stays_canceled_and_the_same_command_continues(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    run_dir = tmp_path / "run"
    job = site.train(run_dir, [*tiny_data, *ENDLESS])
    wait_for_steps(site, job, run_dir, 5)
    site.call("scancel", job)
    assert site.wait_for_end(job) == "CANCELLED"
    until(lambda: summary(run_dir)["status"] == "interrupted", lambda: site.log(job))
    assert summary(run_dir)["reason"] == "the job was canceled (SIGTERM)"
    stopped = summary(run_dir)["step"]
    assert site.show(job)["Restarts"] == "0"
    job = site.train(run_dir, [*tiny_data, *ENDLESS, f"trainer.steps={stopped + 5}"])
    assert site.wait_for_end(job) == "COMPLETED", site.log(job)
    assert summary(run_dir)["step"] == stopped + 5
    assert_every_step_once(run_dir)


def test_a_run_goes_on_on_another_node_when_its_own_dies(site: Site, tmp_path: Path, tiny_data: list[str]) -> None:
    run_dir = tmp_path / "run"
    job = site.train(run_dir, [*tiny_data, *ENDLESS, "trainer.steps=400"])
    wait_for_steps(site, job, run_dir, 25)
    node = site.show(job)["NodeList"]
    kill_node(site, node, job)
    site.call("scontrol", "update", f"NodeName={node}", "State=down", "Reason=test")
    try:
        until(lambda: site.show(job)["Restarts"] == "1", lambda: f"{site.show(job)}\n{site.log(job)}")
        assert site.wait_for_end(job) == "COMPLETED", site.log(job)
        assert site.show(job)["NodeList"] != node
    finally:
        site.call("slurmd", "-N", node, "-f", site.environment["SLURM_CONF"])
        # Mostly it has come back by itself.
        site.run("scontrol", "update", f"NodeName={node}", "State=resume")
    assert summary(run_dir)["status"] == "completed"
    assert_every_step_once(run_dir)


@pytest.mark.slow
def test_a_hung_rank_ends_the_job_which_is_queued_again_and_completes(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    run_dir = tmp_path / "run"
    overrides = [*tiny_data, *ENDLESS, "trainer.steps=120", "trainer.timeout_s=8"]
    job = site.train(run_dir, overrides, "--nodes=2", "--ntasks-per-node=1")
    wait_for_steps(site, job, run_dir, 25)
    os.kill(ranks_of(run_dir)[1], signal.SIGSTOP)
    # While slurm ends what is left of the first start, it shows that one's state.
    site.wait_for(job, lambda: "start 2" in site.log(job))
    assert site.wait_for_end(job) == "COMPLETED", site.log(job)
    assert f"requeueing job {job}, which continues from its last checkpoint" in site.log(job)
    # Wherever it waited for the other.
    assert re.search(r"rank 0: nothing happened for .*loop\.py", site.log(job), flags=re.DOTALL)
    assert summary(run_dir)["status"] == "completed"
    assert_every_step_once(run_dir)


def kill_node(site: Site, node: str, job: str) -> None:
    """What a power cut leaves of a node and of the one job that ran there: nothing."""
    daemon = int((site.state / f"{node}.pid").read_text())
    steps = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(f"slurmstepd: [{job}.".encode()):
                steps.append(int(path.parent.name))
        except OSError:
            continue  # it ended meanwhile
    assert steps
    for pid in [daemon, *(pid for step in steps for pid in (step, *descendants(step)))]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue  # srun, for one, ends with its step


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
    ]
    return [process for child in children for process in (child, *descendants(child))]


def test_data_prepared_by_a_job_pass_the_preflight_of_two_ranks(
    site: Site, tmp_path: Path, tiny_data: list[str]
) -> None:
    documents = Path(tiny_data[-1].partition("=")[2]).with_name("documents") / "*.txt"
    data = ["data=local", f"data.dir={tmp_path / 'data'}", f"data.files=[{documents}]", "data.vocab_size=512"]
    data += ["data.format=text", "data.val_fraction=0.15", "data.probe_fraction=0.15"]
    prepared = site.call(*SUBMIT, "prepare", *data)
    arguments = [str(ROOT / "scripts/preflight.py"), *SMALL, *data, f"run_dir={tmp_path / 'run'}"]
    # The GPUs are only counted: torch does not see them, and a run would train on the CPU.
    lines = [f"run_ranks {shlex.join([*arguments, device])} || echo code $?" for device in (CPU, "trainer.device=auto")]
    flags = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", f"--dependency=afterok:{prepared}"]
    job = site.ranks(*lines, flags=flags)
    assert site.wait_for_end(job) == "COMPLETED", site.log(prepared) + site.log(job)
    assert site.show(prepared)["JobState"] == "COMPLETED"
    assert "unigram entropy" in site.log(prepared)
    on_cpu, on_gpu = site.log(job).split("\nready to train\n")
    assert "2 on cpu" in on_cpu
    assert "GB/s for 4 MiB" in on_cpu
    assert "slurm has allocated GPUs to this job (SLURM_GPUS_ON_NODE=1), but torch sees none" in on_gpu
    assert "FAILED: fix the checks" in on_gpu
    assert "code 2" in on_gpu


def test_only_a_task_of_srun_is_a_rank(site: Site) -> None:
    code = "from quack_lm.slurm import current_step as s; print('found', s())"
    script = site.folder / "job.sh"
    python = shlex.join([sys.executable, "-c", code])
    script.write_text(f"#!/bin/bash\necho bare; {python}; echo srun; srun --label {python}; srun -n1 -N1 {python}\n")
    job = site.call("sbatch", "--parsable", "--wait", "--nodes=2", "--ntasks-per-node=2", "--exclusive", script)
    bare, ranks = site.log(job).split("srun\n")
    assert "found None" in bare
    found = sorted(line for line in ranks.splitlines() if re.match(r"\d+: ", line))  # srun may say that it waits
    places = [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert found == [
        f"{rank}: found Step(rank={rank}, size=4, local_rank={local}, local_size=2)" for rank, local in places
    ]
    assert "found Step(rank=0, size=1, local_rank=0, local_size=1)" in ranks
    shell = site.call("salloc", "--nodes=2", sys.executable, "-c", code)
    assert "found None" in shell


# ------------------------------------------------------------------------------------------------ a sweep

GRID = "# Why?\nbase: [experiment=tiny]\ngrid: {attention: [mha, mla], stabilizer: [none, quack, qk_norm]}\n"


@pytest.fixture
def small_sweep(site: Site, tmp_path: Path, tiny_data: list[str]) -> Callable[..., list[str]]:
    """Writes a sweep file; the arguments for it. Its directory has a name that a shell would stumble over."""

    def write(text: str = GRID, *more: str) -> list[str]:
        (tmp_path / "mine.yaml").write_text(text)
        overrides = [one for one in SMALL if not one.startswith("experiment=")]
        name = override_value('it\'s $(touch pwned); "a b"\nc')
        return [
            *(f"sweep={tmp_path / 'mine.yaml'}", f"dir={directory(tmp_path)}", *tiny_data, *overrides, CPU),
            *(f"logger.name={name}", *more),
        ]

    return write


def directory(folder: Path) -> Path:
    return folder / 'it\'s 50% $(touch pwned); "a b"\n`c` | d'


@pytest.mark.timeout(400)
def test_a_sweep_is_submitted_split_and_completed_and_a_second_call_submits_nothing(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    # A cluster with MaxArraySize=4 takes six runs as two arrays. Held, so that they surely wait until they are let go.
    arguments = small_sweep()
    site.write_site("--hold")
    done = site.sweep("submit", *arguments, "concurrency=2", "time=10:00")
    assert done.returncode == 0, done.stderr
    assert "4 runs\n" in done.stdout
    assert "2 runs\n" in done.stdout
    again = site.sweep("submit", *arguments)
    assert "6 finished, running or queued before, 0 submitted now" in again.stdout, again.stderr
    status = site.sweep("status", f"dir={directory(tmp_path)}").stdout
    assert "pending" in status
    assert "pending" in status.rpartition("in slurm:")[2]
    # The plan grows while tasks wait, and in front of them: each task still trains what it was submitted for.
    grown = small_sweep(GRID.replace("stabilizer: [", "stabilizer: [fixed, "))
    more = site.sweep("submit", *grown, "concurrency=2")
    assert "submitted job" in more.stdout, more.stderr
    assert "8 runs: 6 finished, running or queued before, 2 submitted now" in more.stdout
    for job in re.findall(r"submitted job (\d+)", done.stdout + more.stdout):
        site.call("scontrol", "release", job)
    cells = read_plan(directory(tmp_path)).cells
    what = lambda: site.sweep("status", f"dir={directory(tmp_path)}").stdout  # noqa: E731
    until(lambda: all(cell.is_finished() for cell in cells), what, 250)
    assert len(cells) == 8
    for cell in cells:
        assert cell.run_dir.status() == "completed"
        assert steps_of(cell.run_dir.path)[-1] == 8
        assert cell.run_dir.summary()["step"] == 8
    until(lambda: "nothing queued" in what(), what)
    assert "completed" in what().rpartition("nothing queued")[0]
    nothing = site.sweep("submit", *grown)
    assert "8 finished, running or queued before, 0 submitted now" in nothing.stdout
    # A stray file would show that a shell has read a name.
    assert not list(tmp_path.rglob("pwned"))
    assert not (ROOT / "pwned").exists()


@pytest.mark.slow
def test_a_canceled_sweep_saves_and_goes_on_when_submitted_again_on_two_ranks(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    one = "# Why?\nbase: [experiment=tiny]\ngrid: {stabilizer: [quack]}\n"
    long = [item for item in ENDLESS if not item.startswith("trainer.steps")]
    arguments = small_sweep(one, *long, "trainer.steps=250")
    bystander = site.call("sbatch", "--parsable", "--wrap", "sleep 300")
    site.sweep("submit", *arguments)
    (cell,) = read_plan(directory(tmp_path)).cells
    until(
        lambda: len(steps_of(cell.run_dir.path)) > 5, lambda: site.sweep("status", f"dir={directory(tmp_path)}").stdout
    )
    assert cell.run_dir.status() == "running"
    (task,) = jobs.tasks_of(directory(tmp_path)).values()
    assert task.state == "RUNNING"
    canceled = site.sweep("cancel", f"dir={directory(tmp_path)}")
    assert f"canceled job {task.job}" in canceled.stdout, canceled.stderr
    assert site.wait_for_end(str(task.job)) == "CANCELLED"
    assert site.show(bystander)["JobState"] == "RUNNING"
    site.call("scancel", bystander)
    assert cell.run_dir.status() == "interrupted"
    assert 5 < cell.run_dir.summary()["step"] < 250
    done = site.sweep("submit", *arguments, "nodes=2")
    assert "1 submitted now" in done.stdout, done.stderr
    until(cell.is_finished, lambda: site.sweep("status", f"dir={directory(tmp_path)}").stdout)
    assert cell.run_dir.summary()["world_size"] == 2
    assert_every_step_once(cell.run_dir.path)


@pytest.mark.slow
def test_a_task_of_a_sweep_that_breaks_down_is_queued_again_and_its_neighbor_goes_on(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    two = "# Why?\nbase: [experiment=tiny]\ngrid: {stabilizer: [quack, qk_norm]}\n"
    long = [item for item in ENDLESS if not item.startswith("trainer.steps")]
    site.sweep("submit", *small_sweep(two, *long, "trainer.steps=150"))
    broken, neighbor = read_plan(directory(tmp_path)).cells
    what = lambda: site.sweep("status", f"dir={directory(tmp_path)}").stdout  # noqa: E731
    until(lambda: all(len(steps_of(cell.run_dir.path)) > 25 for cell in (broken, neighbor)), what)
    tasks = jobs.tasks_of(directory(tmp_path))
    os.kill(trainer_of(broken), signal.SIGKILL)
    job = str(tasks[broken.name])
    site.wait_for(job, lambda: int(site.show(job)["Restarts"]) == 1)
    site.wait_for(job, broken.is_finished)
    until(neighbor.is_finished, what)
    for cell in (broken, neighbor):
        assert cell.run_dir.status() == "completed"
        assert_every_step_once(cell.run_dir.path)
    assert site.show(str(tasks[neighbor.name]))["Restarts"] == "0"


@pytest.mark.slow
def test_a_task_of_a_sweep_that_is_preempted_with_a_grace_time_is_queued_again(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    site.write_site("--partition=grace")
    two = "# Why?\nbase: [experiment=tiny]\ngrid: {stabilizer: [quack, qk_norm]}\n"
    long = [item for item in ENDLESS if not item.startswith("trainer.steps")]
    # Each on a node of its own, and the second has the number of the whole array.
    site.sweep("submit", *small_sweep(two, *long, "trainer.steps=400"), "gpus=4", "tasks=1")
    cells = read_plan(directory(tmp_path)).cells
    what = lambda: site.sweep("status", f"dir={directory(tmp_path)}").stdout  # noqa: E731
    until(lambda: all(len(steps_of(cell.run_dir.path)) > 25 for cell in cells), what)
    tasks = jobs.tasks_of(directory(tmp_path))
    preempt(site, "--nodes=2", "--exclusive")
    for cell in cells:
        job = str(tasks[cell.name])
        site.wait_for(job, lambda job=job: site.show(job)["Restarts"] == "1")
        site.wait_for(job, cell.is_finished)
        assert cell.run_dir.status() == "completed"
        assert_every_step_once(cell.run_dir.path)
        log = directory(tmp_path) / jobs.FOLDER / f"slurm-{job}.out"
        assert f"preempted: requeueing job {job}," in log.read_text()


@pytest.mark.slow
def test_runs_that_still_save_are_waited_for_by_cancel_and_named_by_submit(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    # A rank that takes its time to end.
    slowly = site.folder / "slowly.sh"
    slowly.write_text(f"trap '' TERM\n{shlex.quote(sys.executable)} \"$@\"\nsleep 12\n")
    site.write_site(more=[f"PYTHON=(bash {shlex.quote(str(slowly))})"])
    arguments = small_sweep("# Why?\nbase: [experiment=tiny]\ngrid: {stabilizer: [quack]}\n", *ENDLESS)
    assert site.sweep("submit", *arguments).returncode == 0
    (cell,) = read_plan(directory(tmp_path)).cells
    until(
        lambda: len(steps_of(cell.run_dir.path)) > 5, lambda: site.sweep("status", f"dir={directory(tmp_path)}").stdout
    )
    (task,) = jobs.tasks_of(directory(tmp_path)).values()
    site.call("scancel", task.job)
    done = site.sweep("submit", *arguments)
    assert done.returncode == 1
    assert "0 finished, running or queued before, 0 submitted now" in done.stdout
    assert done.stderr == f"1 still ending, submit again in a moment: {cell.name}\n"
    assert jobs.tasks_of(directory(tmp_path))[cell.name].is_ending
    canceled = site.sweep("cancel", f"dir={directory(tmp_path)}")
    assert (canceled.returncode, canceled.stderr) == (0, "")
    assert f"canceled job {task.job}; waiting up to 120 s" in canceled.stdout
    assert not jobs.tasks_of(directory(tmp_path))[cell.name].is_active
    assert " canceled " in site.sweep("status", f"dir={directory(tmp_path)}").stdout
    site.write_site()
    assert "1 submitted now" in site.sweep("submit", *arguments).stdout


def test_a_site_may_print_read_unset_variables_and_wrap_sbatch(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    site.write_site(more=["echo Welcome", "echo $NOBODY_HAS_SET_THIS"])
    site.environment["SBATCH_EXPORT"] = "NONE"
    arguments = small_sweep("# Why?\nbase: [experiment=tiny]\ngrid: {stabilizer: [quack]}\n")
    done = site.sweep("submit", *arguments)
    assert done.returncode == 0, done.stderr
    assert "submitted job" in done.stdout
    (cell,) = read_plan(directory(tmp_path)).cells
    until(cell.is_finished, lambda: site.sweep("status", f"dir={directory(tmp_path)}").stdout)
    # An answer that is not understood is one line, and the job is known all the same.
    wrapper = tmp_path / "bin" / "sbatch"
    wrapper.parent.mkdir()
    wrapper.write_text(f'#!/bin/bash\n{shutil.which("sbatch")} "$@"\necho and good luck\n')
    wrapper.chmod(0o755)
    site.environment["PATH"] = f"{wrapper.parent}:{os.environ['PATH']}"
    other = f"dir={tmp_path / 'other'}"
    done = site.sweep("submit", *arguments, other)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "good luck' instead of the job number" in done.stderr
    assert "canceled job" in site.sweep("cancel", other).stdout


def test_files_that_are_damaged_or_gone_keep_no_job_from_being_canceled(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUACK_SITE", site.environment["QUACK_SITE"])
    site.write_site("--hold")
    assert site.sweep("submit", *small_sweep()).returncode == 0
    target = directory(tmp_path)
    plan, folder = read_plan(target), target / jobs.FOLDER

    def resubmit() -> list[str]:
        jobs.submit(target, plan, jobs.Resources(), concurrency=1)
        return sorted(path.name for path in folder.glob("*.json"))

    def cut(path: Path) -> None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "cells": []}))

    assert resubmit() == ["0001.json", "0002.json"]
    for damage in (cut, lambda path: path.write_text("{"), Path.unlink):
        newest = sorted(folder.glob("*.json"))[-2:]
        tasks = jobs.tasks_of(target)
        for path in newest:
            damage(path)
        with pytest.raises(UserError, match=f"{newest[0].name} is damaged or missing.*cancel"):
            resubmit()
        assert jobs.cancel(target) == sorted({task.job for task in tasks.values() if task.is_active})
        assert jobs.wait_for_end(target) == []
        assert not jobs.tasks_of(target)
        # A number that slurm knows is not used again: its tasks would be taken for those of other runs.
        assert len(resubmit()) == len(set(resubmit()))
        assert len(jobs.tasks_of(target)) == 6
    assert resubmit() == ["0001.json", "0002.json", "0003.json", "0004.json", "0007.json", "0008.json"]


def test_a_second_submission_at_the_same_time_is_refused_and_changes_nothing(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    target = directory(tmp_path)
    (target / jobs.FOLDER).mkdir(parents=True)
    with open(target / jobs.FOLDER / ".lock", "wb") as lock:
        assert take_lock(lock)
        done = site.sweep("submit", *small_sweep())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "another submission is running here" in done.stderr
    assert not (target / "plan.json").exists()


def trainer_of(cell: Cell) -> int:
    """The process that holds the log of a run open as its output."""
    log = cell.run_dir.log_file
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "fd/1").samefile(log):
                return int(path.name)
    raise AssertionError(f"no process writes {log}")


def test_errors_of_a_sweep_are_found_before_anything_is_written_or_queued(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    before = site.call("squeue", "-h", "-a")
    for more, message in [
        (["nodes=5", "tasks=1"], "trainer.global_batch_size=12 must be a multiple of ranks"),
        (["gpus=6"], "sbatch: "),
        (["nodes=3", "time=1:00"], "sbatch: "),
        (["time=soon"], "time=soon"),
        (["data.dir=/nowhere"], "data.files is not set"),
        (["concurrency=0"], "concurrency=0"),
        (["jobs=2"], "jobs=2 has no meaning for submit"),
    ]:
        done = site.sweep("submit", *small_sweep(), *more)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), (more, done.stderr)
        assert message in done.stderr
        assert not directory(tmp_path).exists()
    assert site.call("squeue", "-h", "-a") == before
    site.write_site("--partition=nosuch")
    done = site.sweep("submit", *small_sweep())
    assert done.returncode == 2
    assert "partition" in done.stderr


# ------------------------------------------------------------------------------------------------ no slurm


def test_without_slurm_or_its_controller_one_line_says_so(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    conf = Path(site.environment["SLURM_CONF"])
    deaf = tmp_path / "deaf.conf"
    port = next(line for line in conf.read_text().splitlines() if line.startswith("SlurmctldPort"))
    deaf.write_text(conf.read_text().replace(port, f"SlurmctldPort={free_ports(1)}\nMessageTimeout=5"))
    shutil.copy(conf.with_name("gres.conf"), deaf.with_name("gres.conf"))
    site.environment["SLURM_CONF"] = str(deaf)
    done = site.sweep("submit", *small_sweep())
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "scontrol ping" in done.stderr
    assert not directory(tmp_path).exists()
    site.environment["PATH"] = "/nonexistent"
    done = site.sweep("submit", *small_sweep())
    assert done.returncode == 2
    assert "scontrol not found" in done.stderr


def test_status_shows_the_run_directories_when_slurm_does_not_answer(
    site: Site, tmp_path: Path, small_sweep: Callable[..., list[str]]
) -> None:
    assert site.sweep("plan", *small_sweep()).returncode == 0
    target = directory(tmp_path)
    (target / jobs.FOLDER).mkdir()
    shutil.copy(target / "plan.json", target / jobs.FOLDER / "0001.json")
    site.environment["PATH"] = "/nonexistent"
    done = site.sweep("status", f"dir={target}")
    assert done.returncode == 2
    assert "6 runs: 6 pending" in done.stdout
    assert "squeue not found" in done.stderr


STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "2",
}


def test_a_step_knows_its_place_from_the_environment() -> None:
    assert slurm.current_step(STEP) == slurm.Step(rank=4, size=5, local_rank=0, local_size=1)
    assert slurm.current_step({key: STEP[key] for key in STEP if key != "SLURM_STEP_ID"}) is None
    with pytest.raises(UserError, match="SLURM_PROCID"):
        slurm.current_step({key: STEP[key] for key in STEP if key != "SLURM_PROCID"})


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("SLURM_PROCID", text) for text in ("5", "-1", "x", "", "9" * 5000, "1.0")),
        *(("SLURM_STEP_NUM_TASKS", text) for text in ("0", "-5", "many", "4")),
        *(("SLURM_LOCALID", text) for text in ("1", "-1", "x")),
        *(("SLURM_NODEID", text) for text in ("3", "-1", "x")),
        *(("SLURM_STEP_TASKS_PER_NODE", text) for text in ("", "2(x2", "0", "2(x9999999999)", "-2")),
    ],
)
def test_a_place_that_no_step_has_is_refused(name: str, text: str) -> None:
    with pytest.raises(UserError, match=r"SLURM_|slurm's variables.*start the ranks with srun"):
        slurm.current_step(STEP | {name: text})


def test_gpus_that_slurm_gave_and_torch_does_not_see_are_no_reason_to_train_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_data: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "4")
    config = compose([*SMALL, *tiny_data, f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"trainer.device=auto: .*SLURM_GPUS_ON_NODE=4.*or set trainer.device=cpu"):
        check_run(config)
    config["trainer"]["device"] = "cpu"
    check_run(config)


def test_the_rendezvous_is_the_given_address_or_the_first_node_and_a_port_of_the_job() -> None:
    job = {"SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "1"}
    assert slurm.rendezvous({**job, "MASTER_ADDR": "here"}) == ("here", 10_000 + 123457 % 20_000)
    assert slurm.rendezvous({**job, "MASTER_ADDR": "here", "MASTER_PORT": "77"}) == ("here", 77)
    for wrong in ("x", "0", "-1", "65536", "999999"):
        with pytest.raises(UserError, match=f"MASTER_PORT='{wrong}'"):
            slurm.rendezvous({**job, "MASTER_ADDR": "here", "MASTER_PORT": wrong})
    for key in job:
        with pytest.raises(UserError, match=f"{key}='abc'"):
            slurm.rendezvous({**job, "MASTER_ADDR": "here", key: "abc"})


def test_the_first_node_is_expanded_by_slurm(site: Site) -> None:
    assert slurm.rendezvous({"SLURM_STEP_NODELIST": "gpu[07-09,12],z1"})[0] == "gpu07"
    with pytest.raises(UserError, match="set MASTER_ADDR"):
        slurm.rendezvous({"SLURM_STEP_NODELIST": "gpu[07-"})
