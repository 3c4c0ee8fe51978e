"""Preflight checks before a long run: the arguments of quack-lm train, nothing trained, one table and one verdict.

    quack-lm preflight attention=mla stabilizer=quack ranks=16                          # on the login node
    srun --nodes=2 --ntasks-per-node=8 --gpus-per-node=8 quack-lm preflight ...         # inside a job
    torchrun --nproc-per-node 8 -m quack_lm preflight ...

ranks=N says on a login node how many ranks the job will have, or ranks=any: the batch and trainer.replicas are checked
for them, and no GPU is asked for. quack-lm submit does this before it submits a run.

Checked are the config, the data against their checksums, that the run directory can be written to and holds no other
run, space for the checkpoints, and package versions; with several processes also that all find the same GPUs, data
and packages, that they reach each other and how fast, and their clocks. Nothing is created in the run directory.
Exit codes: 0 ready; 2 something is wrong.
"""

import os

from quack_lm.cli.train import compose_run
from quack_lm.config import read_flags
from quack_lm.errors import UserError
from quack_lm.text import echo

# Long enough for a node whose file system is slow to load Python from.
JOIN_TIMEOUT_S = 180.0
# Long enough for one rank of each machine to read every byte of the data, and rank 0 also of a checkpoint.
DATA_TIMEOUT_S = 7200.0


def main(arguments: list[str]) -> int:
    """Check, print, and say how it went."""
    if {"-h", "--help"} & set(arguments):
        echo(*(__doc__ or "").splitlines())
        return 0
    file, _, overrides = read_flags([one for one in arguments if not one.startswith("ranks=")])
    ranks = expected_ranks([one for one in arguments if one.startswith("ranks=")])
    config = compose_run(overrides, file)

    # An NCCL that hangs then raises, and the table is still made, instead of ending the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")

    # Imported late: --help and a mistake in the settings need not wait for it.
    from quack_lm.parallel import check_launch, launched_world, resolve_device, start_world
    from quack_lm.report.table import Table
    from quack_lm.training.preflight import (
        check_all_reduce,
        check_clocks,
        check_this_rank,
        compare,
        facts_of_this_rank,
        merge,
    )

    check_launch()
    wanted = config["trainer"]["device"]
    try:
        device = resolve_device(wanted)
    except UserError:  # reported in the table
        device = "cuda"
    try:
        # On the CPU whatever the run uses: a GPU that does not work must not keep the ranks from telling.
        world = start_world(device="cpu", is_wrapped=launched_world()[1] > 1, timeout_s=JOIN_TIMEOUT_S)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    patient = world.host_group(timeout_s=DATA_TIMEOUT_S)
    mine = check_this_rank(config, device=device, ranks=ranks)
    world.barrier(patient)
    facts = world.all_gather(facts_of_this_rank(world))
    rows = merge(world.all_gather(mine), [fact["host"] for fact in facts])
    rows += compare(facts, device=device if ranks is None else "cpu")
    if world.size > 1:
        rows.append(check_clocks(world, [fact["host"] for fact in facts]))
        if not any(row.check == "GPUs" and row.is_ok is False for row in rows):
            rows.append(check_all_reduce(world, device=device, timeout_s=JOIN_TIMEOUT_S))
    is_ready = not world.all_gather(any(row.is_ok is False for row in rows)).count(True)
    if world.is_main:
        words = {True: "ok", False: "FAIL", None: "-"}
        table = Table(header=("check", "", "found"), rows=[(r.check, words[r.is_ok], r.found) for r in rows])
        echo(*table.as_text().splitlines(), "", "ready to train" if is_ready else "FAILED: fix the checks marked FAIL")
    return world.shutdown(0 if is_ready else 2)


def expected_ranks(arguments: list[str]) -> int | None:
    """The number after `ranks=`, 0 for any; None where it is not given."""
    if not arguments:
        return None
    if len(arguments) > 1:
        raise UserError(f"{arguments[-1]} comes after {arguments[0]}: say it once (quack-lm submit says it by itself)")
    text = arguments[0].partition("=")[2]
    if text == "any":
        return 0
    if not text.isdecimal() or len(text) > 6 or int(text) == 0:
        raise UserError(f"ranks={text} must be an integer of at least 1 (nodes x tasks per node of the job), or any")
    return int(text)
