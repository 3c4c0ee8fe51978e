"""Queue a job on a slurm cluster.

    quack-lm submit [flags of sbatch] train|prepare|preflight [key=value ...]

    quack-lm submit --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8 --time=24:00:00 \\
        train attention=mla stabilizer=quack data.dir=/data/cosmopedia_v2
    quack-lm submit --cpus-per-task=32 --time=12:00:00 prepare data=cosmopedia_v2 data.workers=32
    quack-lm submit --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 preflight attention=mla

Each rank is a task of the job; what follows the verb are the arguments of quack-lm train, prepare or preflight. The
job works in the current directory, or in --chdir. A run saves and requeues itself before the time limit.

Site settings (partition, account, modules, container) come from the file that QUACK_SITE names, else from
slurm/site.sh below the current directory, else from {site}

The settings are checked first: for train and preflight by quack-lm preflight with the number of ranks that the flags
give, for prepare by quack-lm prepare --check. An error queues nothing. QUACK_PREFLIGHT=no skips the check.
Exit codes: that of sbatch; 2 for an error in the settings.
"""

import subprocess

from quack_lm import slurm
from quack_lm.errors import UserError
from quack_lm.text import echo

JOBS = ("train", "prepare", "preflight")


def main(arguments: list[str]) -> int:
    """Check the settings, then call sbatch."""
    if {"-h", "--help"} & set(arguments):
        echo(*(__doc__ or "").format(site=slurm.SLURM_DIR / "site.sh").splitlines())
        return 0
    flags, job = slurm.split_flags(arguments)
    if not job or job[0] not in JOBS:
        seen = f"cannot submit {job[0]}" if job else "nothing to submit"
        raise UserError(f"{seen}; after sbatch's flags comes one of {', '.join(JOBS)}: quack-lm submit --nodes=1 train")
    verb, *settings = job
    site = slurm.read_site()
    slurm.require("sbatch", site.environment)
    if site.runs_preflight:
        _check(site, slurm.split_flags(site.sbatch_flags)[0] | flags, verb, settings)
    command = slurm.sbatch_command(site, arguments[: len(arguments) - len(job)], f"{verb}.sbatch", *settings)
    return subprocess.run(command, env=site.environment).returncode


def _check(site: slurm.Site, flags: dict[str, str], verb: str, settings: list[str]) -> None:
    """Check the settings with the job's Python, in its directory; UserError if they are wrong."""
    # The job itself reads every byte of the data.
    ranks = [f"ranks={slurm.count_ranks(flags) or 'any'}", "data.verify_checksums=false"]
    check = ["prepare", "--check"] if verb == "prepare" else ["preflight", *ranks]
    command = [*site.python, "-m", "quack_lm", *check, *settings]
    try:
        done = subprocess.run(
            command,
            cwd=flags.get("chdir"),
            env=site.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        failure = f"{' '.join(done.stdout.splitlines()[-1:])} (exit code {done.returncode})"
    except OSError as error:
        done, failure = None, str(error)
    if done and done.returncode == 2:
        echo(*done.stdout.splitlines(), err=True)
        raise UserError("nothing is submitted; QUACK_PREFLIGHT=no skips this check, for files that another job makes")
    if not done or done.returncode:
        echo(f"warning: the settings cannot be checked on this machine: {failure}", err=True)
