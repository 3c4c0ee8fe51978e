"""Processes, sharding, and the few collectives; the rest of the project is written as if for one device.

Weights are sharded by rows (FSDP2's Shard(0)), unevenly where the world size does not divide them. Work that needs
full matrices (orthogonalization, spectral norms) is shared out: an all-to-all gives each rank some full matrices,
and another brings the results back. A single float32 process runs on plain tensors, without any wrapping.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from quack_lm import slurm
from quack_lm.errors import UserError, exit_without_teardown

T = TypeVar("T")
HostGroup = dist.ProcessGroup | None  # None: a single process on plain tensors


@dataclass(frozen=True)
class World:
    """This process among all that train together."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    mesh: DeviceMesh | None = None  # None: a single process on plain tensors

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Before: one tensor per rank. After: their sum, on every rank, in place."""
        if self.mesh is not None and self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Before: one tensor per rank. After: their maximum, on every rank, in place."""
        if self.mesh is not None and self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def max_over_ranks(self, *numbers: int) -> list[int]:
        """The largest of each number over the ranks; every rank gets the same, and no GPU is waited for."""
        return self.max(torch.tensor(numbers)).tolist() if self.size > 1 else list(numbers)

    def all_gather(self, value: T) -> list[T]:
        """Before: a small object per rank. After: those of all, in the order of the ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def to_device(self, tensor: Tensor) -> Tensor:
        """A host tensor on this rank's device, without waiting for what the device is doing."""
        # From ordinary memory a copy of more than 64 kB would queue behind the running kernels and block the host.
        pinned = tensor.pin_memory() if self.device.type == "cuda" else tensor
        return pinned.to(self.device, non_blocking=True)

    def barrier(self, group: HostGroup = None) -> None:
        """Wait for every rank, for as long as the group allows."""
        if self.mesh is not None:
            dist.barrier(group)

    def host_group(self, *, timeout_s: float | None = None) -> HostGroup:
        """A new group of all ranks for tensors on the host, whose collectives may run in a thread while others run."""
        if self.mesh is None:
            return None
        timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
        # Every rank is a member; for one that is not, torch 2.14 says that it returns a number.
        return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read on the host means something."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def leave(self) -> None:
        """Leave the process group, where there is one."""
        if self.mesh is not None:
            dist.destroy_process_group()

    def shutdown(self, code: int) -> int:
        """Leave the process group and end this process with an exit code; a process without a group gets it back.

        Threads of a group may still be freeing tensors of the last collective, for which they take the interpreter's
        lock; while Python tears itself down that aborts the process (pytorch/pytorch#190489). So there is no teardown.
        """
        if self.mesh is not None:
            self.leave()
            if code:
                slurm.flush_before_srun_kills()
            exit_without_teardown(code)
        return code


def launched_world() -> tuple[int, int, int]:
    """(rank, world size, local rank) as torchrun or srun set them; (0, 1, 0) for a plain process."""
    if "RANK" not in os.environ and (step := slurm.current_step()):
        return step.rank, step.size, step.local_rank
    rank, size, local_rank = (_launched(k, d) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if rank >= size:
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={size}: start with torchrun, or unset both")
    return rank, size, local_rank


def _launched(name: str, default: int) -> int:
    if name not in os.environ:
        return default
    return slurm.number(os.environ, name, least=1 if name.endswith("SIZE") else 0)


def ranks_on_this_machine() -> int:
    """How many of the launched processes share this machine."""
    if "RANK" not in os.environ and (step := slurm.current_step()):
        return step.local_size
    return _launched("LOCAL_WORLD_SIZE", _launched("LOCAL_RANK", 0) + 1)


def memory_of_a_rank(device: str) -> float:
    """The bytes that each process has: of its GPU, or its part of the machine's."""
    if device == "cuda":
        return torch.cuda.get_device_properties(launched_world()[2]).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks_on_this_machine()


def default_device() -> str:
    """`cuda` where there is a GPU, else `cpu`; UserError where slurm has given this job GPUs that torch cannot see."""
    if torch.cuda.is_available():
        return "cuda"
    slurm.refuse_unseen_gpus()
    return "cpu"


def resolve_device(wanted: str) -> str:
    """The device that `trainer.device` means on this machine: `auto` is the default one."""
    return default_device() if wanted == "auto" else wanted


def start_world(*, device: str, is_wrapped: bool, replicas: int = 1, timeout_s: float = 600.0) -> World:
    """Join the other ranks: gloo on CPU, NCCL on GPUs. `replicas` > 1 gives HSDP: shards inside, copies across."""
    rank, size, local_rank = launched_world()
    place = torch.device(device, local_rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    if not is_wrapped:
        return World(rank, size, local_rank, place)
    # Gloo in addition to NCCL: checkpoints and small objects travel between hosts without touching a GPU.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    bound = place if device == "cuda" else None  # NCCL connects at once, and an error shows here
    if size == 1 and ("RANK" not in os.environ or "MASTER_ADDR" not in os.environ):
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
    else:
        if "RANK" not in os.environ:  # tasks of srun, which says who they are but not the rendezvous
            address, port = slurm.rendezvous()
            os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        try:
            timeout = timedelta(seconds=timeout_s)
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, device_id=bound)
        except RuntimeError as error:  # no mistake in the settings: a slow or broken machine, and another try may work
            if "EADDRINUSE" in str(error):
                hint = f"another program listens at port {os.environ['MASTER_PORT']}; set MASTER_PORT to a free one"
            else:
                hint = "check for ranks that wrote nothing, MASTER_ADDR, and the network"
            raise RuntimeError(
                f"rank {rank} did not reach the other {size - 1} (at most {timeout_s:.0f} s): {hint}"
            ) from error
    return World(rank, size, local_rank, place, _mesh(device, size, replicas))


@contextmanager
def fake_world(*, size: int, is_wrapped: bool, replicas: int = 1) -> Iterator[World]:
    """Rank 0, which has the largest shards, of a world whose collectives send nothing, on the CPU of this process."""
    if not is_wrapped:
        yield World(0, size, 0, torch.device("cpu"))
        return
    dist.init_process_group("fake", rank=0, world_size=size)
    try:
        yield World(0, size, 0, torch.device("cpu"), _mesh("cpu", size, replicas))
    finally:
        dist.destroy_process_group()


def _mesh(device: str, size: int, replicas: int) -> DeviceMesh:
    if replicas > 1:
        return init_device_mesh(device, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device, (size,), mesh_dim_names=("shard",))


def check_launch() -> None:
    """Raise UserError where the environment does not say who this process is and where the rendezvous is."""
    _, size, _ = launched_world()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if _launched("WORLD_SIZE", 1) > 1 and name not in os.environ:
            raise UserError(f"WORLD_SIZE={size} is set in the environment and {name} is not: start with torchrun")
    if "RANK" in os.environ:
        if not os.environ.get("MASTER_ADDR", "unset").strip():
            raise UserError("MASTER_ADDR='' in the environment is no host: start with torchrun, or unset it")
        if "MASTER_PORT" in os.environ:
            slurm.number(os.environ, "MASTER_PORT", **slurm.PORTS)
    elif slurm.current_step():
        slurm.port()


def check_world(*, device: str) -> None:
    """Raise UserError where the launched processes and this machine do not fit."""
    check_launch()
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "trainer.device=cuda: torch sees no GPU here; use trainer.device=cpu or install a CUDA build of torch"
        )
    here = ranks_on_this_machine()
    if device == "cuda" and here > torch.cuda.device_count():
        raise UserError(
            f"{here} processes on a machine with {torch.cuda.device_count()} GPUs: start one process per GPU"
        )


# ------------------------------------------------------------------------------------------------ model


def shard(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    world: World,
    *,
    precision: str,
    reduce_dtype: str = "float32",
    frees_blocks_after_forward: bool = True,
) -> None:
    """FSDP2 per block: float32 master weights; weights are gathered, and multiplied, in `precision`.

    What is outside of the blocks keeps its gathered weights from the forward to the backward, which needs it first; so
    does the last block, and with `frees_blocks_after_forward` false every block.
    """
    if world.mesh is None:
        return
    dtype = torch.bfloat16 if precision == "bfloat16" else None
    # The rotary table is a float32 argument of the blocks and must stay so.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=getattr(torch, reduce_dtype), cast_forward_inputs=False
    )
    # FSDP2 gathers the next block while this one computes, forward and backward; naming the next one would let the host
    # ask earlier, which it need not, since nothing in a block makes it wait.
    for block in blocks:
        reshards = frees_blocks_after_forward and block is not blocks[-1]
        fully_shard(block, mesh=world.mesh, mp_policy=policy, reshard_after_forward=reshards)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)


def materialize(
    model: nn.Module, initial_value: Callable[[str, torch.Size], Tensor] | None, device: torch.device
) -> None:
    """From the meta device to real memory; every rank draws each full initial value and keeps its own rows."""
    tracked = {name: buffer.shape for name, buffer in model.named_buffers()}
    model.to_empty(device=device)
    if initial_value is not None:
        fill_parameters(model, initial_value)
    for name in tracked:
        # The only buffers are running maxima.
        assert name.endswith("max_logits_H"), name
        model.get_buffer(name).fill_(-torch.inf)


@torch.no_grad()
def fill_parameters(model: nn.Module, value: Callable[[str, torch.Size], Tensor]) -> None:
    """Give each parameter its full value, by name and shape, of which every rank keeps its own rows."""
    for name, parameter in model.named_parameters():
        start, stop = local_rows(parameter)
        local(parameter).copy_(value(name, parameter.shape)[start:stop])


def set_gradient_reduction(model: nn.Module, is_reduced: bool) -> None:
    """Whether the next backward reduces the gradients over the ranks, or adds them up on each."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_reduced)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Forwards without gradients, in evaluation mode; afterwards the parameters are sharded again."""
    model.eval()
    with torch.no_grad():
        yield
    model.train()
    # What keeps its gathered weights after a forward does so for a backward, which does not come here; kept longer,
    # they would be those of before the next step.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


# ------------------------------------------------------------------------------------------------ sharded tensors


def local(tensor: Tensor) -> Tensor:
    """The rows of a tensor that this rank holds: all of them where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_rows(tensor: Tensor) -> tuple[int, int]:
    """The first row held here and the one after the last."""
    if not isinstance(tensor, DTensor):
        return 0, tensor.shape[0]
    group = _shard_group(tensor)
    sizes = _rows_by_rank(tensor.shape[0], group.size())
    start = sum(sizes[: group.rank()])
    return start, start + sizes[group.rank()]


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """Before: one tensor per rank of a shard group. After: their sum on each. `like` is any tensor sharded that way."""
    if isinstance(like, DTensor) and like.device_mesh.size() > 1:
        dist.all_reduce(values, group=_shard_group(like))
    return values


def map_full_matrices(function: Callable[[Tensor], Tensor], shards_NrC: Tensor, like: Tensor) -> Tensor:
    """Apply a function of full matrices, [n, R, C] -> [n, R, C], to N row-sharded matrices; the ranks share the work.

    `shards_NrC` are this rank's rows of N matrices shaped and sharded like `like`; so is the result.
    """
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return function(shards_NrC)
    group, replicas = _shard_group(like), _replica_group(like)
    count, rows, columns = len(shards_NrC), like.shape[0], like.shape[1]
    sizes = _rows_by_rank(rows, group.size())
    result = function(_to_owners(shards_NrC, like))
    # Before: full results of the matrices owned here. After: this rank's rows of all its replica's matrices.
    whole, rest = result.split(_rows_of_whole_pieces(sizes), dim=1)
    send = torch.cat([whole.unflatten(1, (-1, sizes[0])).transpose(0, 1).reshape(-1), rest.reshape(-1)])
    mine, each = sizes[group.rank()], len(result)
    back = send.new_empty(group.size() * each * mine * columns)
    dist.all_to_all_single(
        back, send, [each * mine * columns] * group.size(), [each * r * columns for r in sizes], group
    )
    back_MrC = back.view(group.size() * each, mine, columns)
    if replicas is not None:
        # Before: each replica has the results of its own share. After: all of them.
        everything = back_MrC.new_empty(replicas.size() * back_MrC.shape[0], mine, columns)
        dist.all_gather(list(everything.chunk(replicas.size())), back_MrC, group=replicas)
        back_MrC = everything
    return back_MrC[:count]


def measure_full_matrices(function: Callable[[Tensor], Tensor], shards_NrC: Tensor, like: Tensor) -> Tensor:
    """Apply a function of full matrices, [n, R, C] -> [n, M], to N row-sharded matrices: [N, M] on every rank."""
    if not isinstance(like, DTensor) or like.device_mesh.size() == 1:
        return function(shards_NrC)
    group, replicas = _shard_group(like), _replica_group(like)
    owned = _to_owners(shards_NrC, like)
    measured = function(owned)
    share = 0 if replicas is None else replicas.rank()
    first = (share * group.size() + group.rank()) * len(owned)
    n_shares = 1 if replicas is None else replicas.size()
    table = measured.new_zeros(n_shares * group.size() * len(owned), *measured.shape[1:])
    table[first : first + len(owned)] = measured
    # Before: each rank has the rows of its own matrices. After: all rows; adding zeros is exact.
    dist.all_reduce(table, group=group)
    if replicas is not None:
        dist.all_reduce(table, group=replicas)
    return table[: len(shards_NrC)]


def _to_owners(shards_NrC: Tensor, like: DTensor) -> Tensor:
    """Before: each rank has its rows of all matrices. After: each rank has all rows of its own n matrices, [n, R,
    C]."""
    group, replicas = _shard_group(like), _replica_group(like)
    count, mine, columns = shards_NrC.shape
    n_shares = 1 if replicas is None else replicas.size()
    each = math.ceil(count / (group.size() * n_shares))
    padded = shards_NrC.new_zeros(n_shares, group.size() * each, mine, columns)
    padded.flatten(0, 1)[:count] = shards_NrC
    send = padded[0 if replicas is None else replicas.rank()].reshape(-1)
    sizes = _rows_by_rank(like.shape[0], group.size())
    receive = send.new_empty(each * like.shape[0] * columns)
    splits_out = [each * rows * columns for rows in sizes]
    dist.all_to_all_single(receive, send, splits_out, [each * mine * columns] * group.size(), group)
    n_whole, n_rest = _rows_of_whole_pieces(sizes)
    whole, rest = receive.split([each * n_whole * columns, each * n_rest * columns])
    whole_nRC = whole.view(-1, each, sizes[0], columns).transpose(0, 1).reshape(each, n_whole, columns)
    return torch.cat([whole_nRC, rest.view(each, n_rest, columns)], dim=1)


def _rows_by_rank(rows: int, size: int) -> list[int]:
    """FSDP2 cuts like torch.chunk: equal pieces, the last ones shorter or empty."""
    step = math.ceil(rows / size)
    return [max(0, min(step, rows - rank * step)) for rank in range(size)]


def _rows_of_whole_pieces(sizes: list[int]) -> list[int]:
    """(rows in the pieces as large as the first one, rows in the shorter one behind them)."""
    whole = sum(size for size in sizes if size == sizes[0])
    return [whole, sum(sizes) - whole]


def _shard_group(tensor: DTensor) -> dist.ProcessGroup:
    dims = [dim for dim, placement in enumerate(tensor.placements) if isinstance(placement, Shard)]
    assert len(dims) == 1, f"expected one sharded dimension, got {tensor.placements}"
    return tensor.device_mesh.get_group(dims[0])


def _replica_group(tensor: DTensor) -> dist.ProcessGroup | None:
    return tensor.device_mesh.get_group(0) if tensor.device_mesh.ndim == 2 else None


@torch.profiler.record_function("clip_gradients")
@torch.no_grad()
def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float | None) -> Tensor:
    """The global gradient norm; gradients are scaled down to `max_norm` where it is given and exceeded."""
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    squares = torch.stack(torch._foreach_norm(gradients)).square().sum()
    # Before: each rank has the squared norm of its shards. After: the whole.
    norm = sum_over_shards(squares, parameters[0]).sqrt()
    if max_norm is not None:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp_max(1.0))
    return norm
