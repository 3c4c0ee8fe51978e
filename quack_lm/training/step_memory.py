"""What a training step takes of memory, from the step itself: it is made on fake tensors, which have no memory.

The model, FSDP2, the loss, the optimizers and the stabilizer are those of a run, at any size and on any number of
ranks; each storage counts from the operator that makes it until it is freed. Not counted are temporaries inside of an
operator, what a device's allocator loses to fragments, and what its libraries take for themselves.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from quack_lm.config import instantiate
from quack_lm.loss import automatic_chunk
from quack_lm.model import ActivationCheckpointing, Transformer
from quack_lm.optim.recipe import Recipe
from quack_lm.parallel import World, clip_gradients, fake_world, local, materialize, set_gradient_reduction
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.step import LogitWeights, stabilized_step
from quack_lm.training.build import initialize_stabilizer, make_model, shard_model
from quack_lm.training.settings import TrainerSettings

T = TypeVar("T")

# `communication`: weights gathered by FSDP, and what collectives send and receive. `buffers`: all that the backward,
# the optimizers and the stabilizer need for a moment.
CATEGORIES = ("weights", "gradients", "optimizer", "activations", "logits", "communication", "buffers")
LASTING = CATEGORIES[:3]  # from one step to the next
# Operators with a temporary of the size of their input: the exponentials that are summed.
COPYING = {"aten::logsumexp"}

# What a planned step may take of a device's memory. On a GPU the rest is for fragments, the context, NCCL and kernels;
# a CPU's memory has other users.
SHARE_OF_MEMORY = {"cuda": 0.9, "cpu": 0.5}


@dataclass(frozen=True)
class StepMemory:
    """The bytes of a rank by category, at the moment of a step at which they are most."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes of all categories."""
        return sum(self.parts.values())


class FakeStep:
    """The step of a config on fake tensors, for `memory` to make as often as there are questions."""

    def __init__(self, config: dict[str, Any], world: World, device: str) -> None:
        self.settings: TrainerSettings = instantiate(config["trainer"])
        recipe: Recipe = instantiate(config["optimizer"])
        self.world = world
        # The model comes from the meta device, as ever.
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.storages = _Storages(self.fake_mode)
        self.stabilizer: Stabilizer = instantiate(config["stabilizer"])
        self.model = _model(config, self.stabilizer)
        if device == "cuda":
            _fuse_norms(self.model)
        if self.model.loss_chunk == "auto":  # which goes by the device of the tensors, and fake ones are on a CPU
            self.model.loss_chunk = automatic_chunk(self.model.sizes.vocab_size, device)
        # A compiled block keeps fewer activations; which ones is not known before it is compiled. Sharded before the
        # tensors are fake: FSDP makes a tensor for every rank of the world.
        shard_model(self.model, self.settings, world)
        with self.fake_mode, self.storages:
            materialize(self.model, None, world.device)
            self.parameters = list(self.model.parameters())
            self.storages.label("weights", self.parameters)
            self.optimizers = recipe.build(self.model)
            self.weights = LogitWeights(self.model.attentions)
            initialize_stabilizer(self.stabilizer, self.weights)
            self.max_grad_norm = recipe.max_grad_norm
            # The state of an optimizer comes with its first step.
            self._fill_gradients()
            self._update()
            state = [value for optimizer in self.optimizers for value in tree_leaves(dict(optimizer.state))]
            self.storages.label("optimizer", [value for value in state if isinstance(value, Tensor)])
            self._zero_gradients()
        self.probe_bytes = probe_bytes(config, ranks=world.size)
        self._watch_phases()
        if world.mesh is not None and world.size == 1:
            # A lone rank casts its weights where others gather them: which storages are for that shows from then on.
            self.memory(micro_batch_size=1)

    def memory(
        self, *, micro_batch_size: int, activation_checkpointing: ActivationCheckpointing | None = None
    ) -> StepMemory:
        """The peak of a step, not the first, with a setting of activation checkpointing other than the config's."""
        settings, model = self.settings, self.model
        if activation_checkpointing is None:
            activation_checkpointing = settings.activation_checkpointing
        for block in model.blocks:
            block.activation_checkpointing = activation_checkpointing  # type: ignore[assignment]
        is_accumulated = settings.global_batch_size > micro_batch_size * self.world.size
        self.storages.peak = StepMemory({})
        with self.fake_mode, self.storages:
            if is_accumulated:
                # The memory of the micro-batches before the last one: their gradients.
                if settings.reduce_every_micro_batch or self.world.mesh is None:
                    self._fill_gradients()
                else:
                    self._accumulate(micro_batch_size, is_reduced=False)
            self._accumulate(micro_batch_size, is_reduced=True)
            self._update()
            self._zero_gradients()
        return self.storages.peak

    def largest_micro_batch(
        self, budget: float, activation_checkpointing: ActivationCheckpointing | None = None
    ) -> tuple[int, StepMemory] | None:
        """The largest micro-batch whose step takes at most `budget` bytes, and its memory; None where none does.

        It divides this rank's sequences of a step, during which the probe keeps its own.
        """
        budget -= self.probe_bytes
        sequences = self.settings.global_batch_size // self.world.size
        small = [size for size in range(1, math.isqrt(sequences) + 1) if sequences % size == 0]
        sizes = sorted({*small, *(sequences // size for size in small)})
        found, low, high = None, 0, len(sizes)
        # All at once first: without accumulation there are no gradients yet. Below, more sequences take more.
        middle = high - 1
        while low < high:
            taken = self.memory(micro_batch_size=sizes[middle], activation_checkpointing=activation_checkpointing)
            if taken.total <= budget:
                found, low = (sizes[middle], taken), middle + 1
            else:
                high = middle
            middle = (low + high) // 2
        return found

    def _accumulate(self, micro_batch_size: int, *, is_reduced: bool) -> None:
        storages = self.storages
        set_gradient_reduction(self.model, is_reduced)
        tokens = torch.zeros(micro_batch_size, self.settings.seq_len + 1, dtype=torch.long)
        storages.category = "activations"
        loss = self.model(tokens[:, :-1], tokens[:, 1:]).sum() / tokens.numel()
        storages.new.clear()
        loss.backward()
        storages.category = "buffers"
        # What is left of a backward are gradients, wherever FSDP keeps them; and weights that it gathers.
        for key in storages.new:
            if storages.categories[key] != "communication":
                storages.relabel(key, "gradients")

    def _update(self) -> None:
        clip_gradients(self.parameters, self.max_grad_norm)
        stabilized_step(self.optimizers, self.stabilizer, self.weights, self.world)

    def _fill_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.storages.label("gradients", [p.grad for p in self.parameters if p.grad is not None])

    def _zero_gradients(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def _watch_phases(self) -> None:
        """Tell what belongs to the logits: what is made after the last norm, and in the backward until it is back."""

        def enter_logits(_module: nn.Module, _arguments: Any, x_BTD: Tensor) -> None:
            self.storages.category = "logits"
            if x_BTD.requires_grad:
                x_BTD.register_hook(leave_logits)

        def leave_logits(_gradient: Tensor) -> None:
            self.storages.category = "buffers"

        self.model.norm.register_forward_hook(enter_logits)
        for parameter in self.parameters if self.world.mesh is None else ():
            parameter.register_post_accumulate_grad_hook(lambda p: self.storages.label("gradients", [p.grad]))


@contextmanager
def fake_step(config: dict[str, Any], *, world_size: int, device: str) -> Iterator[FakeStep]:
    """The step of a config as rank 0 of a world makes it on a `cpu` or on `cuda`, of which none need be there."""
    settings: TrainerSettings = instantiate(config["trainer"])
    is_wrapped = settings.is_wrapped(world_size)
    with fake_world(size=world_size, is_wrapped=is_wrapped, replicas=settings.replicas) as world:
        yield FakeStep(config, world, device)


def largest_micro_batch(config: dict[str, Any], *, world_size: int, device: str, budget: float) -> int | None:
    """The largest micro-batch of a config whose step takes at most `budget` bytes; None where not even 1 does."""
    with fake_step(config, world_size=world_size, device=device) as step:
        found = step.largest_micro_batch(budget)
    return found[0] if found else None


def plan_memory(configs: Sequence[dict[str, Any]], *, world_size: int, device: str) -> list[StepMemory]:
    """The memory of each config's step, at its own micro-batch."""
    found = []
    for config in configs:
        with fake_step(config, world_size=world_size, device=device) as step:
            found.append(step.memory(micro_batch_size=step.settings.sequences_at_once))
    return found


def probe_bytes(config: dict[str, Any], *, ranks: int) -> int:
    """What the probe keeps on a rank while it waits for a step: the queries and keys of its sequences in all layers."""
    settings: TrainerSettings = instantiate(config["trainer"])
    model = make_model(config)
    x_BTD = torch.empty(1, settings.seq_len, model.sizes.d_model, device="meta")
    q, k, _ = model.attentions[0].project(x_BTD)
    item_bytes = 2 if settings.precision == "bfloat16" else 4
    n_sequences = math.ceil(settings.probe_sequences / ranks)
    return n_sequences * model.sizes.n_layers * (q.numel() + k.numel()) * item_bytes


def in_own_process(function: Callable[[], T]) -> T:
    """Call a function of this module where it leaves nothing behind.

    A process that has had a fake world keeps its place in it, in the caches of torch's sharded tensors.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function).result()


def _model(config: dict[str, Any], stabilizer: Stabilizer) -> Transformer:
    """The config's model on the meta device, with a backend that fake tensors know.

    Flash and flex keep for the backward what torch's own attention keeps: queries, keys, values, output, and a number
    for each row.
    """
    attention = config["attention"]
    is_elsewhere = attention["backend"] not in ("sdpa", "eager")
    model = make_model(
        {**config, "attention": {**attention, "backend": "sdpa"} if is_elsewhere else attention}, stabilizer
    )
    # Only these two need the mask of documents as a tensor; which token ends one is of no consequence.
    model.eot_id = 0 if config["data"]["mask_documents"] and not is_elsewhere else None
    return model


class _Storages(TorchDispatchMode):
    """The storages that exist, each with its size and category, and the peak of their sum."""

    def __init__(self, fake_mode: FakeTensorMode) -> None:
        super().__init__()
        self.fake_mode = fake_mode
        self.category = "buffers"
        self.sizes: dict[int, int] = {}
        self.categories: dict[int, str] = {}
        self.new: set[int] = set()  # since somebody cleared it
        self.references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.parts = dict.fromkeys(CATEGORIES, 0)
        self.peak = StepMemory({})
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> "_Storages":
        super().__enter__()

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            self._see(storage, "communication")
            self.relabel(storage._cdata, "communication")

        # FSDP frees and takes gathered weights so, which is no operator.
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(kind not in (FakeTensor, nn.Parameter, Tensor) for kind in types):
            return NotImplemented  # a sharded tensor's operator becomes one of plain tensors
        result = operator(*args, **(kwargs or {}))
        name = operator.name()
        if name.startswith(("c10d::", "fsdp::")):
            # In float32 the weights themselves are sent.
            moved = [t for t in self._tensors((args, kwargs)) if self._category_of(t) not in LASTING]
            self.label("communication", moved)
            if "reduce_scatter" in name:
                self.label("gradients", self._tensors(args[0]))
        if name in COPYING:
            self._take_peak(extra=args[0].untyped_storage().nbytes())
        # A recomputed forward is one with gradients, in the backward.
        is_recomputed = self.category == "buffers" and torch.is_grad_enabled()
        for tensor in self._tensors(result):
            self._see(tensor.untyped_storage(), "activations" if is_recomputed else self.category)
        return result

    def label(self, category: str, tensors: list[Any]) -> None:
        """Say what the storages of some tensors, sharded ones too, are for."""
        for tensor in tensors:
            storage = local(tensor.detach()).untyped_storage()
            self._see(storage, category)
            self.relabel(storage._cdata, category)

    def relabel(self, key: int, category: str) -> None:
        """Say what a storage is for."""
        size = self.sizes[key]
        self.parts[self.categories[key]] -= size
        self.parts[category] += size
        self.categories[key] = category

    def _category_of(self, tensor: Tensor) -> str | None:
        return self.categories.get(tensor.untyped_storage()._cdata)

    def _see(self, storage: torch.UntypedStorage, category: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        before = self.sizes.get(key)
        if before is None:
            self.categories[key] = category
            self.new.add(key)
            self.references[key] = weakref.ref(storage, lambda _: self._forget(key))
        elif before == size:
            return
        self.sizes[key] = size
        self.parts[self.categories[key]] += size - (before or 0)
        self._take_peak()

    def _take_peak(self, extra: int = 0) -> None:
        if sum(self.parts.values()) + extra > self.peak.total:
            self.peak = StepMemory({**self.parts, self.category: self.parts[self.category] + extra})

    def _forget(self, key: int) -> None:
        self.parts[self.categories.pop(key)] -= self.sizes.pop(key)
        del self.references[key]
        self.new.discard(key)

    def _tensors(self, values: Any) -> list[FakeTensor]:
        """The tensors among some values, without those of other modes, in which torch propagates shapes."""
        leaves = tree_leaves(values)
        return [leaf for leaf in leaves if isinstance(leaf, FakeTensor) and leaf.fake_mode is self.fake_mode]


def _fuse_norms(model: nn.Module) -> None:
    """RMSNorm takes the memory that it takes on CUDA, where it is one operator; a CPU's is made of many."""

    def forward(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        return _FusedNorm.apply(x, norm.weight)

    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            module.forward = partial(forward, module)  # type: ignore[method-assign]


class _FusedNorm(torch.autograd.Function):
    """Keeps its input, its weight and a number for each row; the values are those of fake tensors, which have none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
