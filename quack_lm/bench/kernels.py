"""The kernels that inductor makes of a step: a sign of fusion that does not depend on how fast a machine is.

Loss and gradient are compiled as one graph, and the scheduler's nodes are counted after fusion. Bytes are what each
node must read and write at least; those of matrix products and attention are left out.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._inductor import compile_fx, ir, metrics
from torch._inductor.scheduler import BaseSchedulerNode, NopKernelSchedulerNode
from torch._inductor.utils import fresh_cache
from torch.utils._python_dispatch import TorchDispatchMode

from quack_lm.bench.step import Phases, TrainingStep
from quack_lm.step import stabilized_step

MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm")


class KernelCounts(NamedTuple):
    """Of forward and backward over one micro-batch."""

    kernels: int  # that inductor generates
    matrix_products: int
    attentions: int
    other_calls: int  # of kernels that exist already
    bytes: int  # of all but matrix products and attention


def count_kernels(loss: Callable[[Tensor], Tensor], tokens: Tensor) -> KernelCounts:
    """Compile a loss of tokens with its gradient, run both once, and count."""
    torch.compiler.reset()
    metrics.reset()
    log = compile_fx.inductor_metrics_log
    level, is_propagated = log.level, log.propagate
    try:
        # Where the log is on, and only there, the nodes are kept.
        log.setLevel(logging.INFO)
        log.propagate = False
        with fresh_cache():
            torch.compile(loss, fullgraph=True)(tokens).backward()
        kinds: Counter[str] = Counter()
        n_bytes = 0
        for node, n_numbers in metrics.nodes_num_elem:  # bytes / 4
            kind = _kind(node)
            kinds[kind] += 1
            n_bytes += 4 * n_numbers if kind in ("kernel", "other") else 0
    finally:
        log.setLevel(level)
        log.propagate = is_propagated
        metrics.reset()
    return KernelCounts(kinds["kernel"], kinds["matrix product"], kinds["attention"], kinds["other"], n_bytes)


def _kind(node: BaseSchedulerNode) -> str:
    if isinstance(node, NopKernelSchedulerNode) or isinstance(node.node, ir.MultiOutput):
        return "nothing"
    if node.is_template():
        return "matrix product"
    if not node.is_extern():
        return "kernel"
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
        self.count += self._is_on and not func.is_view
        return func(*args, **(kwargs or {}))
