"""FLOPs of a model and of the device it runs on: the two numbers behind model FLOPs utilization (MFU)."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from quack_lm.model import Transformer
from quack_lm.parallel import World

# Dense bfloat16 peaks in TFLOP/s, from the vendors' data sheets (without sparsity, whose figures are twice as large).
PEAK_TFLOPS = {
    "GH200": 989.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
}


def flops_per_token(meta_model: Transformer, seq_len: int) -> float:
    """FLOPs of forward and backward per token, counted on a meta model with the reference attention.

    The backward pass costs twice the forward; recomputation is not counted (that is MFU, not hardware utilization).
    """
    with _reference_attention(meta_model), FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_model(torch.zeros(1, seq_len, dtype=torch.long, device="meta"))
    return 3.0 * counter.get_total_flops() / seq_len


@contextmanager
def _reference_attention(model: Transformer) -> Iterator[None]:
    """Within, every layer multiplies as the equations say, whatever kernel the config chose."""
    backends = [attention.backend for attention in model.attentions]
    for attention in model.attentions:
        attention.backend = "eager"
    try:
        yield
    finally:
        for attention, backend in zip(model.attentions, backends, strict=True):
            attention.backend = backend


def peak_flops(device: torch.device, precision: str) -> float:
    """The device's peak in FLOP/s: from its data sheet, or what a large matrix product reaches where that is
    unknown."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = [peak for part, peak in PEAK_TFLOPS.items() if all(word in name for word in part.split())]
        if known and precision == "bfloat16":
            return known[0] * 1e12
    return _measured_flops(device, getattr(torch, precision))


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    # Some CPUs take a second for a bfloat16 product that a GPU does not notice: small there, and never for long.
    size = 8192 if device.type == "cuda" else 384
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    here, best, start = World(0, 1, 0, device), math.inf, time.perf_counter()
    for _ in range(6):
        here.synchronize()
        before = time.perf_counter()
        a @ b
        here.synchronize()
        best = min(best, time.perf_counter() - before)
        if time.perf_counter() - start > 0.3:
            break
    return 2 * size**3 / best
