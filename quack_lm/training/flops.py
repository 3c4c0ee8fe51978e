"""FLOPs of a model and of the device it runs on: the two numbers behind model FLOPs utilization (MFU)."""

import math
import re
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from quack_lm.model import Transformer
from quack_lm.parallel import World

# Dense bfloat16 peaks in TFLOP/s by the full name that CUDA gives a device, from the vendors' data sheets (without
# sparsity, whose figures are twice as large). A device that matches none, a MIG slice for instance, is measured.
PEAK_TFLOPS = {
    r"NVIDIA (GH200 \d+GB?.*|H200|H100 \d+GB HBM\d\w?)": 989.0,
    r"NVIDIA (H100|H200) NVL": 835.0,
    r"NVIDIA H100 PCIe": 756.0,
    r"NVIDIA A100(-(SXM4?|PCIE)-\d+GB| 80GB PCIe)": 312.0,
    r"NVIDIA B200": 2250.0,
    r"NVIDIA GB200": 2500.0,
    r"NVIDIA L40S": 362.0,
}


def known_peak_tflops(name: str) -> float | None:
    """The dense bfloat16 peak of the device with this full name; None where it is not known."""
    if " MIG " in name:
        return None
    return next((peak for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)), None)


def flops_per_token(meta_model: Transformer, seq_len: int) -> float:
    """FLOPs of forward and backward per token, counted on a meta model that is used for nothing else.

    Its attention backend is `eager`, which multiplies as the equations say.

    The backward pass costs twice the forward; recomputation is not counted (that is MFU, not hardware utilization).
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        meta_model(torch.zeros(1, seq_len, dtype=torch.long, device="meta"))
    return 3.0 * counter.get_total_flops() / seq_len


def peak_flops(device: torch.device, precision: str) -> float:
    """The device's peak in FLOP/s: from its data sheet, or what a large matrix product reaches where that is
    unknown."""
    if device.type == "cuda":
        known = known_peak_tflops(torch.cuda.get_device_name(device))
        if known and precision == "bfloat16":
            return known * 1e12
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
