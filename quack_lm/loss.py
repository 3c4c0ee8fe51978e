"""Cross-entropy over a large vocabulary, whose logits never exist all at once.

Axes: N tokens, D model width, V vocabulary.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LossChunk = int | Literal["auto"] | None
# 256 MiB of float32, and on a GPU 1 GiB. On a CPU, fewer tokens at once are slower and more are not faster; on a GPU
# the gradient of the weight is added up once a chunk, which for 2^26 logits takes as long as one of its products.
LOGITS_OF_A_CHUNK = {"cpu": 2**26, "cuda": 2**28}


def cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk: LossChunk = None, *, is_compiled: bool = False
) -> Tensor:
    """Nats of each token [N], float32; with a chunk, the logits of so many tokens exist at once.

    With a chunk the gradient is made beside the loss, while the logits are there: three matrix products a token as
    without, where recomputing them in the backward pass takes four.
    """
    if chunk == "auto":
        chunk = automatic_chunk(len(weight_VD), x_ND.device.type)
    if chunk is None or chunk >= len(x_ND):
        return (_compiled(_whole) if is_compiled else _whole)(x_ND, weight_VD, targets_N)
    chunk = math.ceil(len(x_ND) / math.ceil(len(x_ND) / chunk))  # of equal size, or the last may be a few tokens
    chunk_loss = _compiled(_loss_and_gradient) if is_compiled else _loss_and_gradient
    return _InChunks.apply(x_ND, weight_VD, targets_N, chunk, chunk_loss)


def automatic_chunk(vocab_size: int, device: str) -> int:
    """The tokens whose logits exist at once where a config leaves it open."""
    return max(1, LOGITS_OF_A_CHUNK.get(device, LOGITS_OF_A_CHUNK["cpu"]) // vocab_size)


def _whole(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_ND, weight_VD).float(), targets_N, reduction="none")


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


class _InChunks(torch.autograd.Function):
    """Keeps the gradients for a gradient of one for each token.

    That of the inputs is [N, D] and can be scaled token by token; that of the weight is a sum over tokens, so if the
    tokens turn out to have different weights, it is computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        chunk: int,
        chunk_loss: Callable[..., tuple[Tensor, Tensor]],
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        nats, grads_x = [], []
        # In float32: the sum has a term for each chunk.
        grad_weight = torch.zeros_like(weight_VD, dtype=torch.float32) if needs_weight else None
        for x, targets in zip(x_ND.split(chunk), targets_N.split(chunk), strict=True):
            loss, grad_logits = chunk_loss(x, weight_VD, targets, needs_grad=needs_x or needs_weight)
            nats.append(loss)
            if needs_x:
                grads_x.append(grad_logits @ weight_VD)
            if grad_weight is not None:
                grad_weight += grad_logits.mT @ x
        ctx.chunk = chunk
        ctx.save_for_backward(x_ND, weight_VD, targets_N, torch.cat(grads_x) if grads_x else None, grad_weight)
        return torch.cat(nats)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight_VD, targets_N, grad_x, grad_weight = ctx.saved_tensors
        if grad_x is not None:
            grad_x = (grad_x * grad_N[:, None]).to(grad_x.dtype)
        if grad_weight is not None:
            # A sum or mean over all tokens hands back one number, expanded: to look at its values would wait for a GPU.
            if grad_N.stride() == (0,):
                grad_weight = grad_weight * grad_N[0]
            else:
                grad_weight = _weighted(x_ND, weight_VD, targets_N, grad_N, ctx.chunk)
            grad_weight = grad_weight.to(weight_VD.dtype)
        return grad_x, grad_weight, None, None, None


def _loss_and_gradient(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, needs_grad: bool
) -> tuple[Tensor, Tensor]:
    """Nats [N] and their gradient by the logits [N, V], in the precision of the weight."""
    log_p = F.log_softmax(F.linear(x_ND, weight_VD).float(), -1)
    index_N1 = targets_N[:, None]
    nats = -log_p.gather(-1, index_N1).squeeze(-1)
    if not needs_grad:
        return nats, log_p
    grad = log_p.exp_()
    grad.scatter_add_(-1, index_N1, grad.new_full(index_N1.shape, -1.0))
    return nats, grad.to(weight_VD.dtype)


def _weighted(x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, grad_N: Tensor, chunk: int) -> Tensor:
    """The gradient of the weight, float32, where each token has a gradient of its own."""
    total = torch.zeros_like(weight_VD, dtype=torch.float32)
    for x, targets, grad in zip(x_ND.split(chunk), targets_N.split(chunk), grad_N.split(chunk), strict=True):
        grad_logits = _loss_and_gradient(x, weight_VD, targets, needs_grad=True)[1]
        total += (grad_logits * grad[:, None]).to(x.dtype).mT @ x
    return total
