"""The cross-entropy in chunks against one in float64: values, gradients, and how much of the logits exists at once."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quack_lm.loss import cross_entropy

N, D, V = 37, 12, 50


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    return x, weight, torch.randint(V, (N,), generator=generator)


def reference(x: Tensor, weight: Tensor, targets: Tensor, token_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nats, and the gradients of their weighted sum, from the equations in float64."""
    x, weight, token_weights = x.detach().double(), weight.detach().double(), token_weights.double()
    logits = x @ weight.T
    p = logits.softmax(-1)
    grad_logits = (p - torch.eye(V, dtype=torch.float64)[targets]) * token_weights[:, None]
    return -p.log()[torch.arange(N), targets], grad_logits @ weight, grad_logits.T @ x


TOKEN_WEIGHTS = {
    "a mean": lambda nats: nats.mean(),
    "a weighted sum": lambda nats: (nats * torch.linspace(0, 2, N)).sum(),
    "a masked sum": lambda nats: (nats * (torch.arange(N) % 3 > 0)).sum(),
}


@pytest.mark.parametrize("reduce", TOKEN_WEIGHTS.values(), ids=TOKEN_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 1, 8, N, 1000])
def test_loss_and_gradients_are_those_of_the_equations(chunk: int | None, dtype: torch.dtype, reduce) -> None:
    x, weight, targets = inputs(dtype)
    nats = cross_entropy(x, weight, targets, chunk)
    reduce(nats).backward()
    probe = torch.zeros(N, requires_grad=True)
    (token_weights,) = torch.autograd.grad(reduce(probe), probe)
    expected = reference(x, weight, targets, token_weights)
    assert nats.dtype == torch.float32
    assert x.grad is not None
    assert weight.grad is not None
    assert (x.grad.dtype, weight.grad.dtype) == (dtype, dtype)
    # In bfloat16 the logits themselves, up to 15 here, are rounded to 8 bits.
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for seen, wanted in zip((nats, x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(seen.double(), wanted, **tolerance)


def test_bfloat16_in_chunks_is_about_as_exact_as_at_once() -> None:
    errors = []
    for chunk in (None, 8):
        x, weight, targets = inputs(torch.bfloat16)
        cross_entropy(x, weight, targets, chunk).mean().backward()
        expected = reference(x, weight, targets, torch.full((N,), 1 / N))[2]
        assert weight.grad is not None
        errors.append((weight.grad.double() - expected).norm())
    # The product of each chunk is rounded, before float32 adds them up.
    assert errors[1] < 1.25 * errors[0]


class Largest(TorchDispatchMode):
    """The largest number of elements of any tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.numel = max(
            self.numel, *(t.numel() for t in (made if isinstance(made, tuple) else (made,)) if isinstance(t, Tensor)), 0
        )
        return made


@pytest.mark.parametrize("reduce", TOKEN_WEIGHTS.values(), ids=TOKEN_WEIGHTS)
def test_the_logits_of_a_chunk_alone_exist_at_once(reduce) -> None:
    x, weight, targets = inputs(torch.float32)
    with Largest() as largest:
        reduce(cross_entropy(x, weight, targets, 4)).backward()
    assert largest.numel == max(4 * V, V * D, N * D) < N * V


def test_what_needs_no_gradient_gets_none() -> None:
    x, weight, targets = inputs(torch.float32)
    cross_entropy(x.detach(), weight, targets, 8).mean().backward()
    assert x.grad is None
    cross_entropy(x, weight.detach(), targets, 8).mean().backward()
    assert x.grad is not None
    with torch.no_grad():
        assert not cross_entropy(x, weight, targets, 8).requires_grad
