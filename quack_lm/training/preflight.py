"""Preflight checks before a long run: each rank checks its own machine, and one table has the results of all.

    config, batch, GPUs, packages, clocks -> data -> run directory, disk space -> the ranks reach each other

Nothing is created in the run directory. What can only be wrong inside a job (GPUs, other nodes) is checked there.
"""

import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from quack_lm.config import instantiate
from quack_lm.data.manifest import SPLITS
from quack_lm.data.settings import DataSettings
from quack_lm.data.sources import DataSources
from quack_lm.errors import UserError, explaining
from quack_lm.files import nearest_existing_parent
from quack_lm.model import Transformer, count_parameters
from quack_lm.parallel import World, check_world, default_device, launched_world
from quack_lm.training.build import choose_kernels, make_model, open_data
from quack_lm.training.check import check_initial_weights, check_memory, check_run_dir, check_same_data
from quack_lm.training.environment import MISSING, package_versions
from quack_lm.training.run_dir import RunDir
from quack_lm.training.settings import BYTES_PER_PARAMETER, TrainerSettings

# More than the hand-out of results through the group takes; ntp keeps clocks of a cluster within milliseconds.
MAX_CLOCK_SKEW_S = 2.0
BROKEN = "does not work"
ALL_REDUCE_BYTES = {"cpu": 1 << 22, "cuda": 1 << 28}


@dataclass(frozen=True)
class Row:
    """One line of the table; `is_ok` None is a remark."""

    check: str
    is_ok: bool | None
    found: str


# ------------------------------------------------------------------------------------------------ one rank alone


@dataclass
class Context:
    """What the checks of one rank know; `model` and `data` are filled in by the checks that make them."""

    config: dict[str, Any]
    device: str
    ranks: int | None  # of the job that a login node checks for, 0 for any number; None inside a job
    settings: TrainerSettings
    run_dir: RunDir
    model: Transformer | None = None
    data: DataSources | None = None

    @property
    def is_login_node(self) -> bool:
        """Whether the run will be elsewhere: no GPU is needed here for a job that will have some."""
        return self.ranks is not None


def check_this_rank(config: dict[str, Any], *, device: str, ranks: int | None) -> list[Row]:
    """The checks that a rank makes alone, the same ones in the same order on each."""
    settings = instantiate(config["trainer"])
    context = Context(config, device, ranks, settings, RunDir.of(config))
    rows = []
    for name, check in CHECKS.items():
        try:
            with explaining():
                rows.append(Row(name, True, check(context)))
        except (UserError, OSError) as error:
            rows.append(Row(name, False, " ".join(str(error).split())))
    return rows


def _check_model(context: Context) -> str:
    context.model = make_model(context.config)
    device = "cuda" if context.is_login_node and context.settings.device != "cpu" else context.device
    if device == "cuda" or context.settings.device == "cpu":
        choose_kernels(context.model, context.settings, device=device)
    return f"{count_parameters(context.model)['total']:,} parameters"


def _check_ranks(context: Context) -> str:
    settings, size = context.settings, launched_world()[1]
    if context.is_login_node and size not in (1, context.ranks):
        raise UserError(f"ranks={context.ranks} is for a login node, and here are {size} processes: leave it out")
    if context.ranks == 0:
        return "as many as the job will have"
    if not context.is_login_node:
        if settings.device == "auto":
            default_device()  # raises where slurm has given GPUs that torch cannot see
        check_world(device=context.device)
    settings.check_ranks(context.ranks or size)
    if context.model and not context.is_login_node and (context.device == "cuda" or settings.device == "cpu"):
        check_memory(context.config, context.model, device=context.device, ranks_of_a_copy=size // settings.replicas)
    where = "in the job" if context.is_login_node else f"on {context.device}"
    return f"{context.ranks or size} {where}, {settings.global_batch_size} sequences a step"


def _check_data(context: Context) -> str:
    settings: DataSettings = instantiate(context.config["data"])
    data = open_data(settings, context.config["model"]["vocab_size"])
    for split in SPLITS:
        data.sequences(split, context.settings.seq_len)
    if settings.verify_checksums and launched_world()[2] == 0:  # one process per machine reads every byte
        data.verify_checksums()
    context.data = data
    return f"{', '.join(settings.directories)}, {data.train_tokens:,} training tokens"


def _check_run_dir(context: Context) -> str:
    resumes_from, finished = check_run_dir(context.run_dir, context.config, context.settings)
    if resumes_from and context.data:
        check_same_data(context.run_dir, resumes_from, context.data)
    elif not finished and context.model and context.data:
        stabilizer = instantiate(context.config["stabilizer"])
        check_initial_weights(context.config, context.settings, context.model, stabilizer, context.data)
    if finished:
        return f"{context.run_dir}: finished already: {finished}"
    return f"{context.run_dir}: {f'continues from {resumes_from}' if resumes_from else 'a new run'}"


def _check_disk(context: Context) -> str:
    settings = context.settings
    n_kept = settings.keep_checkpoints + (settings.steps // settings.keep_every if settings.keep_every else 0)
    n_params = count_parameters(context.model)["total"] if context.model else 0
    return check_disk(context.run_dir, n_params=n_params, n_kept=n_kept)


def check_write_access(run_dir: RunDir) -> str:
    """Write a file without a name, which is gone when closed; the permission bits alone do not decide on NFS."""
    place = nearest_existing_parent(run_dir.path)
    with explaining(f"run_dir={run_dir}", "or choose another"), tempfile.TemporaryFile(dir=place) as file:
        file.write(b"\0" * 4096)
        file.flush()
        os.fsync(file.fileno())
    if not os.access(place, os.W_OK):
        raise UserError(f"run_dir={run_dir} is not writable; choose another")
    return f"{place} is writable"


def check_disk(run_dir: RunDir, *, n_params: int, n_kept: int) -> str:
    """That the checkpoints which are kept fit, and the one that is written before the oldest is deleted."""
    needed = BYTES_PER_PARAMETER * n_params * (n_kept + 1)
    free = shutil.disk_usage(nearest_existing_parent(run_dir.path)).free + run_dir.checkpoint_bytes()
    text = f"{_size(free)} free for {n_kept} + 1 checkpoints of up to {_size(needed / (n_kept + 1))}"
    if free < needed:
        raise UserError(
            f"{text}: {_size(needed - free)} missing at run_dir={run_dir}; choose another run_dir, or fewer of "
            "trainer.keep_checkpoints and trainer.keep_every"
        )
    return text


CHECKS: dict[str, Callable[[Context], str]] = {
    "model": _check_model,
    "processes": _check_ranks,
    "data": _check_data,
    "run directory": _check_run_dir,
    "write access": lambda context: check_write_access(context.run_dir),
    "disk space": _check_disk,
}


def facts_of_this_rank(world: World) -> dict[str, Any]:
    """What has to be the same on every rank, and who this one is."""
    try:
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        gpus = [f"{gpu.name} {gpu.total_memory / 2**30:.0f} GiB" for gpu in found]
    except RuntimeError as error:  # what this table is for
        gpus = [f"{BROKEN}: {str(error).splitlines()[0]}"]
    return {
        "rank": world.rank,
        "host": platform.node(),
        "gpus": gpus,
        "versions": package_versions(),
    }


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB"


# ------------------------------------------------------------------------------------------------ all ranks


def compare(facts: Sequence[dict[str, Any]], *, device: str) -> list[Row]:
    """Whether the ranks have the same software and GPUs."""
    first = facts[0]
    rows = [_packages(facts), Row("ranks", None, f"{len(facts)} on {', '.join(_by_host(facts))}")]
    odd = next((other for other in facts if other["gpus"] != first["gpus"]), None)
    broken = next((fact for fact in facts if BROKEN in "".join(fact["gpus"])), None)
    if broken:
        rows.append(Row("GPUs", False, f"rank {broken['rank']} on {broken['host']}: a GPU {broken['gpus'][0]}"))
    elif odd:
        found = f"rank {odd['rank']} on {odd['host']} has {odd['gpus'] or 'none'}, rank 0 has {first['gpus'] or 'none'}"
        rows.append(Row("GPUs", device != "cuda", found))
    elif first["gpus"]:
        rows.append(Row("GPUs", True, f"{len(first['gpus'])} x {first['gpus'][0]} on every node"))
    else:
        rows.append(
            Row("GPUs", False if device == "cuda" else None, "none here, where trainer.device=auto means the CPU")
        )
    return rows


def _packages(facts: Sequence[dict[str, Any]]) -> Row:
    first = facts[0]["versions"]
    missing = sorted({name for fact in facts for name, version in fact["versions"].items() if version == MISSING})
    if missing:
        return Row("packages", False, f"{', '.join(missing)} missing: install the project, pip install -e .")
    for fact in facts[1:]:
        for name, version in fact["versions"].items():
            if version != first[name]:
                where = f"{name} is {version} on {fact['host']} but {first[name]} on {facts[0]['host']}"
                return Row("packages", False, f"{where}; use one environment for all nodes")
    return Row("packages", True, ", ".join(f"{name} {first[name]}" for name in ("python", "torch", "numpy")))


def _by_host(facts: Sequence[dict[str, Any]]) -> list[str]:
    hosts: dict[str, list[str]] = {}
    for fact in facts:
        hosts.setdefault(fact["host"], []).append(str(fact["rank"]))
    return [f"{host} ({', '.join(ranks)})" for host, ranks in hosts.items()]


def check_clocks(world: World, hosts: Sequence[str]) -> Row:
    """The ranks' clocks, read right after a barrier."""
    world.barrier()
    return compare_clocks(world.all_gather(time.time()), hosts)


def compare_clocks(clocks: Sequence[float], hosts: Sequence[str]) -> Row:
    """How far apart the clocks are, and which is off: on each host the one that differs most from rank 0's."""
    skew = max(clocks) - min(clocks)
    off: dict[str, float] = {}
    for clock, host in zip(clocks, hosts, strict=True):
        off[host] = max(off.get(host, 0.0), clock - clocks[0], key=abs)
    found = f"within {skew:.2g} s: " + ", ".join(f"{host} {seconds:+.2g} s" for host, seconds in off.items())
    advice = "" if skew <= MAX_CLOCK_SKEW_S else f"; more than {MAX_CLOCK_SKEW_S:g} s: is ntp running on every node?"
    return Row("clocks", skew <= MAX_CLOCK_SKEW_S, found + advice)


def check_all_reduce(world: World, *, device: str, timeout_s: float) -> Row:
    """That a sum over the ranks is right, and the bandwidth that it reaches on the bus, as NCCL's own tests count."""
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        # A separate group: that of the world is gloo, so that a broken GPU cannot keep the table from being made.
        group = cast(dist.ProcessGroup, dist.new_group(backend=backend, timeout=timedelta(seconds=timeout_s)))
        place = torch.device(device, world.local_rank) if device == "cuda" else torch.device(device)
        if device == "cuda":
            torch.cuda.set_device(place)
        n_bytes, best = ALL_REDUCE_BYTES[device], math.inf
        values = torch.empty(n_bytes // 4, device=place)
        complaint = ""
    except RuntimeError as error:
        complaint = str(error).splitlines()[0]
    # A rank that has no memory, for instance, must not keep the others waiting in the sum.
    for rank, failure in enumerate(world.all_gather(complaint)):
        if failure:
            return Row("all-reduce", False, f"{backend}: rank {rank}: {failure}")
    try:
        for _ in range(4):
            values.fill_(world.rank + 1)
            _wait(place)
            start = time.perf_counter()
            dist.all_reduce(values, group=group)
            _wait(place)
            best = min(best, time.perf_counter() - start)
        is_right = bool((values == world.size * (world.size + 1) / 2).all())
    except RuntimeError as error:
        return Row("all-reduce", False, f"{backend}: {str(error).splitlines()[0]}")
    bandwidth = 2 * (world.size - 1) / world.size * n_bytes / best / 1e9
    found = f"{backend}, {bandwidth:.3g} GB/s for {n_bytes >> 20} MiB" if is_right else f"{backend}: a wrong sum"
    return Row("all-reduce", is_right, found)


def _wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def merge(rows_by_rank: Sequence[Sequence[Row]], hosts: Sequence[str]) -> list[Row]:
    """One row per check: that of the first rank where all agree that it is fine, else the first complaint."""
    merged = []
    for rows in zip(*rows_by_rank, strict=True):
        bad = next((rank for rank, row in enumerate(rows) if row.is_ok is False), None)
        if bad is None:
            merged.append(rows[0])
        else:
            where = f"rank {bad} on {hosts[bad]}: " if len(rows) > 1 else ""
            merged.append(Row(rows[bad].check, False, where + rows[bad].found))
    return merged
