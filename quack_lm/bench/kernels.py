"""The kernels that inductor makes of a step: a sign of fusion that does not depend on how fast a machine is.

Loss and gradient are one graph each, lowered as `torch.compile` does it, and the scheduler's nodes are counted after
fusion; nothing is compiled or run, but inductor needs a C++ compiler all the same. Bytes are what each node must read
and write at least; those of matrix products and attention are left out.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor import ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch.utils._python_dispatch import TorchDispatchMode

from quack_lm.bench.step import Phases, TrainingStep
from quack_lm.step import stabilized_step

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class KernelCounts(NamedTuple):
    """Of forward and backward over one micro-batch."""

    forward: int  # kernels that inductor generates
    backward: int
    matrix_products: int
    attentions: int
    other_calls: int  # of kernels that exist already
    bytes: int  # of all but matrix products and attention


class _ScheduledError(Exception):
    """Forward and backward are scheduled, and the forward would run now."""


class _Module:
    """What stands for the compiled module of a graph."""

    def call(self, *args: Any) -> NoReturn:
        raise _ScheduledError


def count_kernels(loss: Callable[[Tensor], Tensor], tokens: Tensor) -> KernelCounts:
    """Lower a loss of tokens and its gradient, and count."""
    counts: Counter[str] = Counter()

    def count_and_stop(graph: GraphLowering) -> _Module:
        graph.codegen()
        for node in graph.scheduler.nodes:
            kind = _kind(node) or ("backward" if graph.is_backward else "forward")
            counts[kind] += 1
            if kind in ("forward", "backward", "other"):
                counts["bytes"] += node.get_read_write_buffers_sizes()
        return _Module()

    torch.compiler.reset()
    with (
        # As torch._inductor.utils.get_code does it. Graphs that are found in a cache would not be scheduled.
        mock.patch.object(GraphLowering, "compile_to_module", count_and_stop),
        inductor_config.patch(fx_graph_cache=False),
        functorch_config.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True),
        suppress(_ScheduledError),
    ):
        torch.compile(loss, fullgraph=True)(tokens)
    torch.compiler.reset()
    return KernelCounts(
        *(counts[name] for name in ("forward", "backward", "matrix product", "attention", "other", "bytes"))
    )


def _kind(node: BaseSchedulerNode) -> str | None:
    """What a node is that is no kernel of inductor's own."""
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return "nothing"
    if node.is_template():
        return "matrix product"
    if not node.is_extern():
        return None
    called = getattr(node.node, "op_overload", None)
    name = called.name() if called is not None else str(getattr(node.node, "python_kernel_name", ""))
    name = name.removeprefix("aten::").removeprefix("extern_kernels.").split(".")[0]
    if name in MATRIX_PRODUCTS:
        return "matrix product"
    return "attention" if "attention" in name else "other"


def count_stabilizer_calls(step: TrainingStep) -> int:
    """The operators that a stabilized step calls around the optimizers; views, which run no kernel, left out."""
    step(Phases(step.world.device))  # gradients and the state of the optimizers exist
    calls = _Calls()
    hooks = []
    for optimizer in step.optimizers:
        hooks.append(optimizer.register_step_pre_hook(lambda *_: calls.count_next(False)))
        hooks.append(optimizer.register_step_post_hook(lambda *_: calls.count_next(True)))
    with calls:
        stabilized_step(step.optimizers, step.stabilizer, step.weights, step.world)
    for hook in hooks:
        hook.remove()
    return calls.count


class _Calls(TorchDispatchMode):
    """Counts operators while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._is_on = True

    def count_next(self, is_on: bool) -> None:
        self._is_on = is_on

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += self._is_on and not func.is_view and func.namespace == "aten"
        return func(*args, **(kwargs or {}))
