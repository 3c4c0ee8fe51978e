"""Slurm's variables and commands; no other Python file knows them.

`srun` starts one task per rank and sets each task's rank in the environment, so no other launcher is needed: signals
reach every rank and exit codes pass through. Commands are argument lists, never shell strings, and have a time limit:
clients of a dead controller hang.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from quack_lm.errors import UserError

# The batch scripts: beside the package in a checkout, inside it in an installed wheel.
_PACKAGE = Path(__file__).resolve().parent
SLURM_DIR = _PACKAGE / "batch" if (_PACKAGE / "batch").is_dir() else _PACKAGE.parent / "slurm"

# A dead controller keeps clients for about 9 s before they give up by themselves; a busy one answers late.
TIMEOUT_S = 30.0
# Of the KillWait that a canceled job has, 30 s unless the site says otherwise.
CANCEL_TIMEOUT_S = 10.0
# When one rank fails, srun ends the others, and once one of them has died of that it reads no more output (slurm's
# step_launch.c, client_io_handler_abort). So the rank that prints the error waits this long before it exits.
SRUN_STDERR_GRACE_S = 2.0
# The words of `tell_job` after these signals. `#SBATCH --signal` sends SIGUSR1 before the time limit. SIGTERM comes
# with a preemption and with scancel; slurm/job.sh asks slurm which of the two it was.
WORDS = {"SIGUSR1": "time_is_up", "SIGTERM": "terminated"}
PORTS = {"least": 1, "most": 2**16 - 1}
# A job in one of these states has ended; in any other it may still run.
ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("PREEMPTED", "REVOKED", "TIMEOUT"),
}


# ------------------------------------------------------------------------------------------------ inside a job


@dataclass(frozen=True)
class Step:
    """The rank of this task among those that one srun started; local ones count on its node."""

    rank: int
    size: int
    local_rank: int
    local_size: int


def current_step(environment: Mapping[str, str] = os.environ) -> Step | None:
    """This process as a task of srun; None elsewhere.

    A batch script and a shell of salloc also see the variables of the job's tasks, but are none of them: only a step
    has a number.
    """
    if "SLURM_STEP_ID" not in environment:
        return None
    fix = "start the ranks with srun, or unset SLURM_STEP_ID for a process of its own"
    try:
        size = number(environment, "SLURM_STEP_NUM_TASKS", least=1)
        rank, local_rank, node = (number(environment, f"SLURM_{key}") for key in ("PROCID", "LOCALID", "NODEID"))
        local_size = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])[node]
    except UserError:
        raise
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"slurm's variables of this step are incomplete ({type(error).__name__}: {error}): {fix}"
        ) from None
    if rank >= size or local_rank >= local_size:
        raise UserError(
            f"SLURM_PROCID={rank} must be below SLURM_STEP_NUM_TASKS={size}, and SLURM_LOCALID={local_rank} below the "
            f"{local_size} tasks of node {node}: {fix}"
        )
    return Step(rank, size, local_rank, local_size)


def number(environment: Mapping[str, str], name: str, *, least: int = 0, most: int = 999_999_999) -> int:
    """The integer in an environment variable of a launcher; KeyError if unset, UserError if it is none in range."""
    text = environment[name]
    # Digits first: int() of thousands of digits raises another error.
    if not text.isdecimal() or len(text) > len(str(most)) or not least <= int(text) <= most:
        raise UserError(f"{name}={text!r} in the environment is not an integer from {least} to {most}: unset it")
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
    """(host, port) of this step's rendezvous: MASTER_ADDR and MASTER_PORT if set, else the step's first node and a port
    derived from the job's number."""
    return environment.get("MASTER_ADDR") or _first_host(environment.get("SLURM_STEP_NODELIST", "")), port(environment)


def port(environment: Mapping[str, str] = os.environ) -> int:
    """The port of `rendezvous`; calls no command."""
    if environment.get("MASTER_PORT"):
        return number(environment, "MASTER_PORT", **PORTS)
    # Below the ephemeral ports. Each task of an array has its own job number.
    numbers = [
        number(environment, name, most=2**32) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if name in environment
    ]
    return 10_000 + sum(numbers) % 20_000


def _first_host(nodes: str) -> str:
    try:
        host = call(["scontrol", "show", "hostnames", nodes]).split()[0]
        if not re.fullmatch(r"[\w.-]+", host):  # scontrol repeats what it cannot read
            raise UserError(f"scontrol printed {host!r}")
        return host
    except (UserError, IndexError) as error:
        raise UserError(
            f"SLURM_STEP_NODELIST={nodes!r} gives no host name ({error}); set MASTER_ADDR to the first node's"
        ) from None


def is_restart(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether slurm has started this job before."""
    return environment.get("SLURM_RESTART_COUNT", "0") != "0"


def refuse_unseen_gpus(environment: Mapping[str, str] = os.environ) -> None:
    """For a process in which torch sees no GPU: UserError if slurm has allocated some, which would stay idle."""
    given = environment.get("SLURM_GPUS_ON_NODE", "0")
    if given != "0":
        raise UserError(
            f"trainer.device=auto: slurm has allocated GPUs to this job (SLURM_GPUS_ON_NODE={given}), but torch sees "
            "none; install a CUDA build of torch, check nvidia-smi on that node, or set trainer.device=cpu"
        )


def was_canceled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a user is canceling this job; False if slurm does not answer, or ends the job for another reason."""
    if "SLURM_JOB_ID" not in environment:
        return False
    job = environment["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in environment:  # the last task of an array has the array's own number
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment['SLURM_ARRAY_TASK_ID']}"
    try:
        words = call(["scontrol", "show", "job", "-o", job], timeout_s=CANCEL_TIMEOUT_S).split()
    except UserError:
        return False
    job_shown = dict(word.split("=", 1) for word in words if "=" in word)
    # A job that slurm requeues, after a preemption for instance, has no end; in the grace time before one it runs.
    is_over = job_shown.get("JobState") == "COMPLETING" and job_shown.get("EndTime") != "Unknown"
    return is_over and job_shown.get("Reason") == "None" and job_shown.get("PreemptTime", "None") == "None"


def tell_job(word: str) -> None:
    """Tell slurm/job.sh why this process ends: srun's exit code does not show it once other ranks had to be killed."""
    if file := os.environ.get("QUACK_JOB"):
        with suppress(OSError):  # another rank was first
            os.rename(file, f"{file}.{word}")


def is_first_rank() -> bool:
    """Whether this is rank 0 of all, by what the launcher says; true without one."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def is_first_on_node() -> bool:
    """Whether this is the first rank on its machine, or its rank cannot be read, which may be the error to report."""
    rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return not rank.isdecimal() or int(rank) == 0


def is_one_of_many() -> bool:
    """Whether srun has started this process with others."""
    return os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def flush_before_srun_kills() -> None:
    """Flush stdout and stderr and, among several ranks, wait until srun has read them."""
    sys.stdout.flush()
    sys.stderr.flush()
    if is_one_of_many():
        time.sleep(SRUN_STDERR_GRACE_S)


# ------------------------------------------------------------------------------------------------ submitting


@dataclass(frozen=True)
class Site:
    """The settings of the site file."""

    python: list[str]
    sbatch_flags: list[str]
    gpu_type: str
    runs_preflight: bool
    #: For sbatch and the jobs: this process's environment with what the file exports.
    environment: dict[str, str]


_PRINT_SITE = r"""
set -e
source "$QUACK_SITE" >&2
printf '%s\0' "${#PYTHON[@]}" "${PYTHON[@]}" "${#SBATCH_FLAGS[@]}" "${SBATCH_FLAGS[@]}" "$GPU_TYPE" "$QUACK_PREFLIGHT"
env -0
"""


def read_site() -> Site:
    """Source $QUACK_SITE, else ./slurm/site.sh, else the one that comes with the package, in bash."""
    own = Path("slurm/site.sh")
    file = Path(os.environ.get("QUACK_SITE") or (own if own.is_file() else SLURM_DIR / "site.sh")).resolve()
    known = {"QUACK_SITE": str(file), "QUACK_SLURM_DIR": str(SLURM_DIR), "QUACK_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-c", _PRINT_SITE],
        env=os.environ | known,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",  # as os.environ
    )
    if done.returncode or not done.stdout:
        reason = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise UserError(f"{file} cannot be sourced: {reason}; correct it, or set QUACK_SITE to another file")
    fields = iter(done.stdout.split("\0"))
    python, flags = ([next(fields) for _ in range(int(next(fields)))] for _ in range(2))
    gpu_type, preflight, *variables = fields
    if not python:
        raise UserError(f"PYTHON is not set in {file}, and the jobs need it: PYTHON=(python)")
    environment = dict(variable.split("=", 1) for variable in variables if variable)
    return Site(python, flags, gpu_type, preflight != "no", environment)


# The flags whose values `count_ranks`, `sbatch_command` and the caller need.
NEEDED_FLAGS = ("chdir", "gpus-per-node", "gpus-per-task", "nodes", "ntasks", "ntasks-per-node")
LETTERS = {"D": "chdir", "N": "nodes", "n": "ntasks"}
# The flags after which no value follows, or only one after an equals sign; all others take the next word.
FLAGS_WITHOUT_VALUE = (
    *("contiguous", "exclusive", "get-user-env", "help", "hold", "ignore-pbs", "nice", "no-kill", "no-requeue"),
    *("overcommit", "oversubscribe", "parsable", "propagate", "quiet", "reboot", "requeue", "spread-job", "test-only"),
    *("usage", "use-min-nodes", "verbose", "version", "wait"),
)
LETTERS_WITHOUT_VALUE = "HOQVWhsv"


def split_flags(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """(sbatch's flags and their values, the words after them); a later flag replaces an earlier one, as in sbatch.

    Read by sbatch's rules: `--nodes=2`, `--nodes 2`, `-N2`, `-N 2` and `-HN2` are the same, `--ntasks-per-n` is an
    abbreviation, and the first word that is no flag ends them.
    """
    flags: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        if not re.match(r"--?\w", word):
            return flags, [*rest] if word == "--" else [word, *rest]
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            meant = [known for known in NEEDED_FLAGS if known.startswith(name)]
            name = meant[0] if len(meant) == 1 else name
            is_alone = bool(equals) or any(known.startswith(name) for known in FLAGS_WITHOUT_VALUE)
        else:
            letters = word[1:].lstrip(LETTERS_WITHOUT_VALUE)
            name, value = LETTERS.get(letters[:1], letters[:1]), letters[1:]
            is_alone = bool(value) or name in ("", "k")  # -k takes only an attached value
        flags[name] = value if is_alone else next(rest, "")
    return flags, []


def count_ranks(flags: Mapping[str, str]) -> int | None:
    """The number of tasks that sbatch starts with these flags of `split_flags`; None where they do not tell."""
    others = {name for name in flags if name.startswith("ntasks-per-")} - {"ntasks-per-node"}
    if "ntasks" not in flags and not others and "gpus-per-task" not in flags:
        counts = [flags.get(name, "1") for name in ("nodes", "ntasks-per-node")]
    else:
        counts = ["1", flags.get("ntasks", "any")]
    return int(counts[0]) * int(counts[1]) if all(re.fullmatch(r"\d{1,6}", count) for count in counts) else None


def sbatch_command(site: Site, flags: Sequence[str], script: str, *arguments: str) -> list[str]:
    """The command that submits a script of `SLURM_DIR` with the site's flags; it needs `site.environment`."""
    gpus = split_flags(flags)[0].get("gpus-per-node", "")
    typed = [f"--gpus-per-node={site.gpu_type}:{gpus}"] if site.gpu_type and gpus.isdecimal() else []
    # The jobs need the variables of the site file even where SBATCH_EXPORT says otherwise.
    return ["sbatch", "--export=ALL", *site.sbatch_flags, *flags, *typed, str(SLURM_DIR / script), *arguments]


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What each task of a job array gets; counts are per node."""

    nodes: int = 1
    gpus: int | None = None
    tasks: int | None = None  # ranks; one per GPU unless given
    cpus: int | None = None  # per rank
    time: str | None = None

    @property
    def tasks_per_node(self) -> int:
        return self.tasks or self.gpus or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.tasks_per_node

    def flags(self) -> list[str]:
        """The flags of sbatch that ask for these resources."""
        optional = {"gpus-per-node": self.gpus, "cpus-per-task": self.cpus, "time": self.time}
        given = [f"--{name}={value}" for name, value in optional.items() if value is not None]
        return [f"--nodes={self.nodes}", f"--ntasks-per-node={self.tasks_per_node}", *given]


@dataclass(frozen=True, kw_only=True)
class Array:
    """A job array that trains the cells of a file."""

    file: Path
    size: int
    concurrency: int
    resources: Resources

    def submit(self, *, after: Sequence[int] = ()) -> int:
        """Queue it behind the jobs `after`, which may end in any way; its job number."""
        dependency = [f"--dependency=afterany:{':'.join(map(str, after))}"] if after else []
        return _job_number(self._sbatch("--parsable", *dependency))

    def check(self) -> None:
        """Slurm's own checks of partition, account, GPUs and limits; queues nothing."""
        self._sbatch("--test-only")

    def _sbatch(self, *more: str) -> str:
        log = str(self.file.parent / "slurm").replace("%", "%%") + "-%A_%a.out"
        flags = [f"--job-name={job_name(self.file)}", f"--output={log}"]
        flags += [f"--array=0-{self.size - 1}%{self.concurrency}", *self.resources.flags(), *more]
        site = read_site()
        return call(sbatch_command(site, flags, "sweep.sbatch", f"file={self.file}"), environment=site.environment)


def _job_number(answer: str) -> int:
    """From `123;cluster`, the last line that sbatch prints; a site's wrapper may print more."""
    match = re.fullmatch(r"(\d+)(;.*)?", answer.strip().rpartition("\n")[2].strip())
    if match is None:
        raise UserError(
            f"sbatch printed {answer.strip()[-200:]!r} instead of the job number; quack-lm sweep status shows what is "
            "queued, and submit queues the rest"
        )
    return int(match[1])


# ------------------------------------------------------------------------------------------------ commands


def call(command: Sequence[str], *, environment: Mapping[str, str] = os.environ, timeout_s: float = TIMEOUT_S) -> str:
    """The output of one of slurm's commands; UserError if there is no slurm, or it refuses or does not answer."""
    name = command[0]
    require(name, environment)
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"{name} did not answer within {timeout_s:g} s: slurm's controller is down or busy; check it with "
            "scontrol ping, and try again"
        ) from None
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        unreachable = "; is slurmctld up? check it with scontrol ping, and try again"
        is_down = re.search(r"contact slurm controller|connect failure|configuration source|timed out", reason)
        raise UserError(f"{name}: {reason}{unreachable if is_down else ''}")
    return done.stdout


def require(command: str, environment: Mapping[str, str] = os.environ) -> None:
    """UserError where one of slurm's commands is missing."""
    if shutil.which(command, path=environment.get("PATH")) is None:
        raise UserError(
            f"{command} not found: this needs a machine of a slurm cluster; elsewhere use quack-lm train, or sweep run"
        )


def max_array_size() -> int:
    """The number of tasks that one job array may have."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", call(["scontrol", "show", "config"]), flags=re.MULTILINE)
    return int(match[1]) if match else 1001


@dataclass(frozen=True)
class Task:
    """One task of a job array, as squeue shows it."""

    job: int
    index: int
    state: str
    reason: str

    @property
    def is_active(self) -> bool:
        """Whether it is queued or running, or will be again."""
        return self.state not in ENDED

    @property
    def is_ending(self) -> bool:
        """Whether slurm is ending its processes, which save a checkpoint."""
        return self.state == "COMPLETING"

    def __str__(self) -> str:
        return f"{self.job}_{self.index}"


def job_name(file: Path) -> str:
    """The name of the job array that trains the cells of this file; unique for the file's path."""
    return f"quack-{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]}"


def array_tasks(names: Sequence[str]) -> dict[str, list[Task]]:
    """The tasks of the arrays with these job names, by name, as far as slurm still knows them."""
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
