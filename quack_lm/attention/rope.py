"""Rotary positions (arXiv 2104.09864), in the half-split layout of Llama, Qwen3 and DeepSeek-V3 checkpoints."""

import torch
from torch import Tensor


def rope_table(length: int, dim: int, *, theta: float, device: torch.device | str) -> Tensor:
    """Cosines and sines of every position and frequency: [2, length, dim / 2], float32."""
    frequency = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x_BHTK: Tensor, rope_2TF: Tensor) -> Tensor:
    """Rotate the last 2F of the K dimensions by each position's angles; the dimensions before them carry no
    position.

    The table may have more axes, [2, B, 1, T, F], for positions that differ between sequences.
    """
    cos, sin = rope_2TF[..., : x_BHTK.shape[-2], :]
    still, first, second = x_BHTK.split([x_BHTK.shape[-1] - 2 * cos.shape[-1], cos.shape[-1], cos.shape[-1]], dim=-1)
    # The table is float32, so the products are; bfloat16 angles would blur far positions.
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHTK.dtype)
    return torch.cat([still, rotated], dim=-1) if still.shape[-1] else rotated
