"""Look before a long run: takes the arguments of quack-lm train, trains nothing, prints one table and one verdict.

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
from pathlib import Path
from typing import Any

from quack_lm.config import compose, read_flags
from quack_lm.errors import UserError

# Long enough for a node whose file system is slow to load Python from.
JOIN_TIMEOUT_S = 180.0
# Long enough for one rank of each machine to read every byte of the data, and rank 0 also of a checkpoint.
DATA_TIMEOUT_S = 7200.0


def main(arguments: list[str]) -> int:
    """Check, print, and say how it went."""
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    file, _, overrides = read_flags([one for one in arguments if not one.startswith("ranks=")])
    ranks = expected_ranks([one for one in arguments if one.startswith("ranks=")])
    config = compose(overrides, file=file)

    # An NCCL that hangs then raises, and the table is still made, instead of ending the process.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")

    # Imported late: --help and a mistake in the settings need not wait for it.
    from quack_lm.parallel import check_launch, default_device, launched_world, start_world
    from quack_lm.report.table import Table
    from quack_lm.training.preflight import (
        Row,
        check_all_reduce,
        check_clocks,
        compare,
        facts_of_this_rank,
        gather,
        merge,
    )

    check_launch()
    wanted = config["trainer"]["device"]
    try:
        device = default_device() if wanted == "auto" else wanted
    except UserError:  # said in the table
        device = "cuda"
    try:
        # On the CPU whatever the run uses: a GPU that does not work must not keep the ranks from telling.
        world = start_world(device="cpu", is_wrapped=launched_world()[1] > 1, timeout_s=JOIN_TIMEOUT_S)
    except RuntimeError as error:
        raise UserError(str(error)) from None
    patient = world.host_group(timeout_s=DATA_TIMEOUT_S)
    mine = own_rows(config, device, ranks)
    world.barrier(patient)
    facts = gather(facts_of_this_rank(world), world)
    everyone = gather([[row.check, row.is_ok, row.found] for row in mine], world)
    rows = merge([[Row(*row) for row in rows] for rows in everyone], [fact["host"] for fact in facts])
    rows += compare(facts, device=device if ranks is None else "cpu")
    if world.size > 1:
        rows.append(check_clocks(world, [fact["host"] for fact in facts]))
        if not any(row.check == "GPUs" and row.is_ok is False for row in rows):
            rows.append(check_all_reduce(world, device=device, timeout_s=JOIN_TIMEOUT_S))
    is_ready = not gather(any(row.is_ok is False for row in rows), world).count(True)
    if world.is_main:
        words = {True: "ok", False: "WRONG", None: "-"}
        print(Table(header=("check", "", "found"), rows=[(r.check, words[r.is_ok], r.found) for r in rows]).as_text())
        print("\nready to train" if is_ready else "\nNOT READY: mend what is marked WRONG")
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
        raise UserError(
            f"ranks={text} must be a whole number of at least 1 (nodes x tasks per node of the job), or any"
        )
    return int(text)


def own_rows(config: dict[str, Any], device: str, ranks: int | None) -> list[Any]:
    """The checks that a rank makes alone, the same ones in the same order on each."""
    from quack_lm.attention.scores import check_backend
    from quack_lm.config import instantiate
    from quack_lm.data.manifest import TokenData
    from quack_lm.model import count_parameters
    from quack_lm.parallel import check_world, default_device, launched_world
    from quack_lm.training.check import (
        check_memory,
        check_ranks,
        check_run_dir,
        check_same_data,
        default_run_dir,
        make_model,
        open_data,
    )
    from quack_lm.training.preflight import attempt, check_disk, check_write_access

    settings = instantiate(config["trainer"])
    run_dir = Path(config["run_dir"] or default_run_dir(config))
    counts: dict[str, int] = {}
    found: list[TokenData] = []
    # A login node needs no GPU for a job that will have some.
    is_login_node = ranks is not None
    there = "cuda" if is_login_node and settings.device != "cpu" else device

    def model() -> str:
        counts.update(count_parameters(make_model(config, backend="eager")))
        if there == "cuda" or settings.device == "cpu":
            check_backend(config["attention"]["backend"], device=there, precision=settings.precision)
        return f"{counts['total']:,} parameters"

    def processes() -> str:
        here = launched_world()[1]
        if is_login_node and here not in (1, ranks):
            raise UserError(f"ranks={ranks} is for a login node, and here are {here} processes: leave it out")
        if ranks == 0:
            return "as many as the job will have"
        if not is_login_node:
            if settings.device == "auto":
                default_device()  # which says what is wrong
            check_world(device=device)
        check_ranks(settings, ranks or here)
        if counts and not is_login_node and (device == "cuda" or settings.device == "cpu"):
            shape = make_model(config, backend="eager")
            check_memory(config, shape, device=device, ranks_of_a_copy=here // settings.replicas)
        where = "in the job" if is_login_node else f"on {device}"
        return f"{ranks or here} {where}, {settings.global_batch_size} sequences a step"

    def data() -> str:
        opened = open_data(instantiate(config["data"]), config["model"]["vocab_size"])
        for split in ("train", "val", "probe"):
            opened.windows(split, settings.seq_len)
        found.append(opened)
        return f"{config['data']['dir']}, {opened.manifest.split('train').tokens:,} training tokens"

    def directory() -> str:
        resumes_from, finished = check_run_dir(run_dir, config, settings)
        if resumes_from and found:
            check_same_data(run_dir, resumes_from, found[0])
        state = f"finished already: {finished}" if finished else f"continues from {resumes_from}"
        return f"{run_dir}: {state if finished or resumes_from else 'a new run'}"

    def disk() -> str:
        kept = settings.keep_checkpoints + (settings.steps // settings.keep_every if settings.keep_every else 0)
        return check_disk(run_dir, n_params=counts.get("total", 0), kept=kept)

    looks = {"model": model, "processes": processes, "data": data, "run directory": directory}
    looks |= {"write access": lambda: check_write_access(run_dir), "disk space": disk}
    return [attempt(check, look) for check, look in looks.items()]
