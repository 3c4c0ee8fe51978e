"""What slurm says of this process, and what is asked of slurm: the only file that knows its variables and commands.

`srun` starts one task per rank and tells each its place in the environment, so no other launcher is needed: signals
reach every rank and exit codes pass through. Commands are argument lists, never shell strings, and have a time limit:
clients of a dead controller hang.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quack_lm.errors import UserError

# A dead controller keeps clients for about 9 s before they give up by themselves; a busy one answers late.
TIMEOUT_S = 30.0
# Of the KillWait that a canceled job has, 30 s unless the site says otherwise.
CANCEL_TIMEOUT_S = 10.0
# What slurm/job.sh is told after these signals. `#SBATCH --signal` sends SIGUSR1 before the time limit. SIGTERM comes
# with a preemption and with scancel, and which of the two it was slurm/job.sh asks slurm.
WORDS = {"SIGUSR1": "time_is_up", "SIGTERM": "terminated"}
PORTS = {"least": 1, "most": 2**16 - 1}
# In these states a job will do nothing any more; in all others it may.
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}


# ------------------------------------------------------------------------------------------------ inside a job


@dataclass(frozen=True)
class Step:
    """This task among those that one srun started."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def current_step(environment: Mapping[str, str] = os.environ) -> Step | None:
    """This process as a task of srun; None elsewhere.

    A batch script and a shell of salloc are told of the whole job's tasks too, but start none of them: only a step has
    a number.
    """
    if "SLURM_STEP_ID" not in environment:
        return None
    mend = "start the ranks with srun, or unset SLURM_STEP_ID for a process of its own"
    try:
        size = number(environment, "SLURM_STEP_NUM_TASKS", least=1)
        rank, local_rank, node = (number(environment, f"SLURM_{key}") for key in ("PROCID", "LOCALID", "NODEID"))
        local_size = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]
    except UserError:
        raise
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"slurm's variables of this step are incomplete ({type(error).__name__}: {error}): {mend}"
        ) from None
    if rank >= size or local_rank >= local_size:
        raise UserError(
            f"SLURM_PROCID={rank} must be below SLURM_STEP_NUM_TASKS={size}, and SLURM_LOCALID={local_rank} below the "
            f"{local_size} tasks of node {node}: {mend}"
        )
    return Step(rank, size, local_rank, local_size)


def number(environment: Mapping[str, str], name: str, *, least: int = 0, most: int = 999_999_999) -> int:
    """A whole number that a launcher left in the environment; KeyError where there is none, UserError for nonsense."""
    text = environment[name]
    # As text first: Python reads no number of thousands of digits.
    if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
        raise UserError(f"{name}={text!r} in the environment is not a whole number from {least} to {most}: unset it")
    return int(text)


def tasks_per_node(text: str) -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,6})(?:\(x(\d{1,6})\))?", part)
        if match is None:
            raise ValueError(f"cannot read {text!r} as tasks per node")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def rendezvous(environment: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """(host, port) where the ranks of this step meet: MASTER_ADDR and MASTER_PORT where given, else the step's first
    node and a port that follows from the job's number."""
    return environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", "")), port(environment)


def port(environment: Mapping[str, str] = os.environ) -> int:
    """The port of `rendezvous`, which asks no command."""
    if environment.get("MASTER_PORT"):
        return number(environment, "MASTER_PORT", **PORTS)
    # Below the ports that systems hand out to clients; each task of an array has a number of its own.
    numbers = [
        number(environment, name, most=2**32) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if name in environment
    ]
    return 10_000 + sum(numbers) % 20_000


def _first_host(nodes: str) -> str:
    try:
        host = call(["scontrol", "show", "hostnames", nodes]).split()[0]
        if not re.fullmatch(r"[\w.-]+", host):  # scontrol repeats what it cannot read
            raise UserError(f"scontrol says {host!r}")
        return host
    except (UserError, IndexError) as error:
        raise UserError(
            f"no host name follows from SLURM_STEP_NODELIST={nodes!r} ({error}); set MASTER_ADDR to the first node's"
        ) from None


def is_restart(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether slurm has started this job before."""
    return environment.get("SLURM_RESTART_COUNT", "0") != "0"


def refuse_unseen_gpus(environment: Mapping[str, str] = os.environ) -> None:
    """For a process in which torch sees no GPU: UserError where slurm has given it some, which it would leave idle."""
    given = environment.get("SLURM_GPUS_ON_NODE", "0")
    if given != "0":
        raise UserError(
            f"trainer.device=auto: slurm has given this job GPUs (SLURM_GPUS_ON_NODE={given}) and torch sees none; "
            "install a CUDA build of torch, look at nvidia-smi on that node, or set trainer.device=cpu"
        )


def was_canceled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether somebody is canceling this job; not so where slurm does not say, or ends it for reasons of its own."""
    if "SLURM_JOB_ID" not in environment:
        return False
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:  # the last task of an array has the array's own number
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        words = call(["scontrol", "show", "job", "-o", job], timeout_s=CANCEL_TIMEOUT_S).split()
    except UserError:
        return False
    said = dict(word.split("=", 1) for word in words if "=" in word)
    # A job that slurm queues again, after a preemption for instance, has no end; in the grace time before one it runs.
    is_over = said.get("JobState") == "COMPLETING" and said.get("EndTime") != "Unknown"
    return is_over and said.get("Reason") == "None" and said.get("PreemptTime", "None") == "None"


# ------------------------------------------------------------------------------------------------ outside of it


def call(command: Sequence[str], *, name: str | None = None, timeout_s: float = TIMEOUT_S) -> str:
    """What one of slurm's commands prints; UserError where there is no slurm, or it refuses or does not answer.

    `name` is the command that a script in its place ends up as.
    """
    name = name or command[0]
    if shutil.which(name) is None:
        raise UserError(f"{name} not found: this needs a machine of a slurm cluster; sweep.py run needs none")
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout_s
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{name} did not answer within {timeout_s:g} s: the controller of slurm is down or busy; look at "
            "scontrol ping, and try again"
        ) from None
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        unreachable = "; is slurmctld up? look at scontrol ping, and try again"
        is_down = re.search(r"contact slurm controller|connect failure|configuration source|timed out", said)
        raise UserError(f"{name}: {said}{unreachable if is_down else ''}")
    return done.stdout


def max_array_size() -> int:
    """The number of tasks that one job array may have."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", call(["scontrol", "show", "config"]), flags=re.MULTILINE)
    return int(match[1]) if match else 1001


@dataclass(frozen=True)
class Task:
    """One task of a job array as slurm shows it."""

    job: int
    index: int
    state: str
    reason: str

    @property
    def is_active(self) -> bool:
        """Whether it is queued, running, or about to be again."""
        return self.state not in ENDED

    @property
    def is_ending(self) -> bool:
        """Whether its processes are being ended: they save."""
        return self.state == "COMPLETING"

    def __str__(self) -> str:
        return f"{self.job}_{self.index}"


def job_name(file: Path) -> str:
    """The name of the job array that trains the cells of this file: no other file has it, wherever it lies."""
    return f"quack-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"


def array_tasks(names: Sequence[str]) -> dict[str, list[Task]]:
    """The tasks that slurm still remembers of the arrays with these job names."""
    if not names:
        return {}
    tasks: dict[str, list[Task]] = {}
    wanted = [f"--name={','.join(names)}", "--format=%j|%F|%K|%T|%r"]
    for line in call(["squeue", "--noheader", "--array", "--states=all", *wanted]).splitlines():
        name, job, index, state, reason = (part.strip() for part in line.split("|", 4))
        if index.isdecimal():
            tasks.setdefault(name, []).append(Task(int(job), int(index), state, reason))
    return tasks


def cancel(jobs: Sequence[int]) -> None:
    """Cancel these jobs with all tasks of their arrays."""
    if jobs:
        call(["scancel", *map(str, sorted(set(jobs)))])
