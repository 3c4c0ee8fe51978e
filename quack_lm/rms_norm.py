"""RMSNorm (arXiv 1910.07467), y = w x / sqrt(mean(x^2) + eps), with its gradient written out for CPUs.

On a GPU torch has a fused kernel, and torch.compile makes one; eager on a CPU it takes twice as long as what is here.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """torch's, over the last axis and with a gain."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        if x.dim() == 4 and x.stride(1) < x.stride(2):  # heads behind tokens in memory: no pass has to jump
            return _OnCPU.apply(x.transpose(1, 2), self.weight, self.eps).transpose(1, 2)
        return _OnCPU.apply(x, self.weight, self.eps)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis: [..., width] -> [...], float32 or wider."""
    exact = torch.promote_types(x.dtype, torch.float32)
    length = torch.linalg.vector_norm(x, dim=-1, dtype=exact)
    return length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _OnCPU(torch.autograd.Function):
    """With n = x r, the normalized input, and g the gradient by y: dw = sum(g n), dx = r (g w - n mean(g w n))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_W: Tensor, eps: float) -> Tensor:
        scale = inverse_rms(x, eps).unsqueeze(-1)
        normalized = torch.mul(x, scale, out=torch.empty_like(x))
        ctx.save_for_backward(normalized, weight_W, scale)
        return normalized * weight_W

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normalized, weight_W, scale = ctx.saved_tensors
        if grad.stride() != normalized.stride():  # one copy in place of passes that jump, two of which copy
            grad = torch.empty_like(normalized, dtype=grad.dtype).copy_(grad)
        product = grad * normalized
        grad_weight_W = product.flatten(0, -2).sum(0, dtype=scale.dtype).to(weight_W.dtype)
        mean = (product @ weight_W).div_(grad.shape[-1]).unsqueeze(-1)
        grad_x = (grad * weight_W).addcmul_(normalized, mean, value=-1).mul_(scale)
        return grad_x, grad_weight_W, None
