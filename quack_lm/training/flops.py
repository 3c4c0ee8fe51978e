"""FLOPs of a model and of the device it runs on: the two numbers behind model FLOPs utilization (MFU)."""

import math
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from quack_lm.model import Transformer
from quack_lm.training.accelerators import find_accelerator


def flops_per_token(meta_model: Transformer, seq_len: int) -> float:
    """FLOPs of forward and backward per token, counted on a meta model that is used for nothing else.

    Its attention backend is `eager`, which multiplies as the equations say.

    The backward pass costs twice the forward; recomputation is not counted (that is MFU, not hardware utilization).
    """
    return sum(_flops_by_operator(meta_model, seq_len).values())


def attention_flops_per_token(meta_model: Transformer, seq_len: int) -> float:
    """The part of `flops_per_token` that pairs positions, all of them: causal attention needs half of it."""
    return _flops_by_operator(meta_model, seq_len)["bmm"]  # products with a weight are `mm`


def _flops_by_operator(meta_model: Transformer, seq_len: int) -> dict[str, float]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_model(torch.zeros(1, seq_len, dtype=torch.long, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    return {operator.__name__: 3.0 * flops / seq_len for operator, flops in counts.items()}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The peak in FLOP/s: of a GPU by its data sheet, of a CPU what a large matrix product reaches; None if unknown."""
    if device.type != "cuda":
        return _measured_flops(device, getattr(torch, precision))
    known = find_accelerator(torch.cuda.get_device_name(device))
    return known.tflops * 1e12 if known and precision == "bfloat16" else None


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    # Some take a second for a large bfloat16 product: a small one, and never for long.
    size = 384
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b  # the first one may make its kernel
    best, start = math.inf, time.perf_counter()
    for _ in range(6):
        before = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - before)
        if time.perf_counter() - start > 0.3:
            break
    return 2 * size**3 / best
