"""Rotary positions (arXiv 2104.09864), in the half-split layout of Llama, Qwen3 and DeepSeek-V3 checkpoints."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    if x_BHTK.device.type == "cpu" and not torch.compiler.is_compiling() and _is_constant(cos, x_BHTK):
        return _OnCPU.apply(x_BHTK, cos, sin)
    still, first, second = x_BHTK.split([x_BHTK.shape[-1] - 2 * cos.shape[-1], cos.shape[-1], cos.shape[-1]], dim=-1)
    # The table is float32, so the products are; bfloat16 angles would blur far positions.
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x_BHTK.dtype)
    return torch.cat([still, rotated], dim=-1) if still.shape[-1] else rotated


def _is_constant(cos: Tensor, x: Tensor) -> bool:
    """Whether a table neither makes the result larger than x nor has a gradient."""
    return not cos.requires_grad and torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1]) == x.shape[:-1]


class _OnCPU(torch.autograd.Function):
    """The same in four passes, whose gradient is the rotation back, and which keep the order of memory: a projection
    leaves heads behind tokens, and attention and the gradient of the projection read them like that.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n_still, out = x.shape[-1] - 2 * cos.shape[-1], torch.empty_like(x)
    out[..., :n_still] = x[..., :n_still]
    turning = x[..., n_still:].to(torch.promote_types(x.dtype, cos.dtype))
    turned = out[..., n_still:] if out.dtype == turning.dtype else torch.empty_like(turning)
    (first, second), (new_first, new_second) = turning.chunk(2, -1), turned.chunk(2, -1)
    torch.mul(first, cos, out=new_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=new_second).addcmul_(first, sin)
    if out.dtype != turned.dtype:
        out[..., n_still:] = turned
    return out
