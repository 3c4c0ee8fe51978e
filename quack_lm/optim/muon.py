"""Muon (Keller Jordan, 2024): momentum, orthogonalized matrix by matrix, the work shared among the ranks.

B <- mu B + (1 - mu) G;   O = NewtonSchulz(G + mu (B - G));   W <- (1 - lr wd) W - lr scale O

A Newton-Schulz iteration multiplies X by a polynomial of its Gram matrix, X <- (a + b X X^T + c (X X^T)^2) X. For wide
matrices the polynomials are multiplied with each other first, on the small side, and with X afterwards.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quack_lm.parallel import local, map_full_matrices

Iteration = Literal["jordan", "polar_express"]
Coefficients = tuple[tuple[float, float, float], ...]  # (a, b, c) of each iteration in turn

# Chosen for slope at zero, so that five iterations bring singular values into about [0.7, 1.2].
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
# The best polynomials for singular values from 0.001 to 1, in turn (arXiv 2505.16932, algorithm 1).
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
SAFETY = 1.01  # that paper's, against rounding: singular values may be larger than one by so much
COEFFICIENTS: dict[Iteration, Coefficients] = {
    "jordan": JORDAN,
    "polar_express": tuple((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS),
}
# How many iterations share a Gram matrix. In bfloat16 its small eigenvalues are rounding errors, which every iteration
# amplifies by a^2: too many, and negative ones outgrow all others (Zhang et al., "Gram Newton-Schulz", 2026).
ITERATIONS_OF_A_GRAM: dict[Iteration, tuple[int, ...]] = {"jordan": (3, 2), "polar_express": (2, 2, 1)}
# Smaller matrices, and those nearer to a square, are faster multiplied one iteration at a time.
LEAST_GRAM_RATIO, LEAST_GRAM_ENTRIES = 2, 2**18

UpdateScale = Literal["jordan", "moonlight"]


class Muon(torch.optim.Optimizer):
    """Muon over matrices, each orthogonalized on its own.

    `update_scale` is `jordan`, max(1, rows / cols)^0.5, or `moonlight`, 0.2 max(rows, cols)^0.5 (arXiv 2502.16982).
    `ns` names the Newton-Schulz iteration, `ns_dtype` is the precision of its products, and `state_dtype` that of the
    momentum between two steps.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        update_scale: UpdateScale = "jordan",
        ns: Iteration = "jordan",
        ns_dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "update_scale": update_scale,
            "ns": ns,
            "ns_dtype": ns_dtype,
            "state_dtype": state_dtype,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            assert all(p.ndim == 2 for p in group["params"]), "Muon takes matrices only"

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
            for parameters in by_shape.values():
                self._step_equal_shapes(parameters, group)

    def _step_equal_shapes(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, dtype=group["state_dtype"])
        weights = [local(p) for p in parameters]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in parameters]
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        momenta = [b.to(g.dtype) for b, g in zip(buffers, gradients, strict=True)]  # the buffers where they are float32
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        if group["state_dtype"] != gradients[0].dtype:
            torch._foreach_copy_(buffers, momenta)
        directions = torch._foreach_lerp(gradients, momenta, group["momentum"]) if group["nesterov"] else momenta
        # One batch of matrices, cast first: half the bytes travel in bfloat16.
        stack_NrC = torch.stack([d.to(group["ns_dtype"]) for d in directions])
        newton_schulz = partial(orthogonalize, iteration=group["ns"])
        update_NrC = map_full_matrices(newton_schulz, stack_NrC, parameters[0]).to(weights[0].dtype)
        if group["weight_decay"]:
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * _update_scale(group["update_scale"], parameters[0].shape)
        torch._foreach_add_(weights, list(update_NrC.unbind()), alpha=-rate)


def orthogonalize(matrices_NRC: Tensor, iteration: Iteration = "jordan") -> Tensor:
    """U S V^T -> U S' V^T with S' near one, for a batch of matrices, by five Newton-Schulz iterations."""
    is_tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    wide = matrices_NRC.mT if is_tall else matrices_NRC
    wide = wide / wide.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    coefficients, (short, long) = COEFFICIENTS[iteration], wide.shape[-2:]
    if long < LEAST_GRAM_RATIO * short or short * long < LEAST_GRAM_ENTRIES:
        wide = _iterate(wide, coefficients)
    else:
        for number in ITERATIONS_OF_A_GRAM[iteration]:
            polynomial, coefficients = _gather(_gram(wide), coefficients[:number]), coefficients[number:]
            # Tall matrices keep their layout: transposed, every later pass over them would be slow.
            wide = (wide.mT @ polynomial).mT if is_tall else polynomial @ wide
    return wide.mT if is_tall else wide


def _gram(x_NRC: Tensor) -> Tensor:
    # torch's product of a batch of one with its transpose takes twice the time on a CPU in bfloat16.
    return (x_NRC[0] @ x_NRC[0].mT)[None] if len(x_NRC) == 1 else x_NRC @ x_NRC.mT


def _iterate(x_NRC: Tensor, coefficients: Coefficients) -> Tensor:
    for a, b, c in coefficients:
        gram = _gram(x_NRC)
        x_NRC = torch.baddbmm(x_NRC, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x_NRC, beta=a)
    return x_NRC


def _gather(gram_NRR: Tensor, coefficients: Coefficients) -> Tensor:
    """What iterations together multiply X by: with P = a + b G + c G^2, the product Q <- P Q while G <- P G P."""
    gathered = None
    for number, (a, b, c) in enumerate(coefficients, start=1):
        rest = torch.baddbmm(gram_NRR, gram_NRR, gram_NRR, beta=b, alpha=c)  # P - a: rounded apart from the larger a
        if number < len(coefficients):
            half = torch.baddbmm(gram_NRR, rest, gram_NRR, beta=a)
            gram_NRR = torch.baddbmm(half, rest, half, beta=a)
        if gathered is None:
            gathered = rest
            gathered.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            gathered = torch.baddbmm(gathered, rest, gathered, beta=a)
    assert gathered is not None
    return gathered


def _update_scale(kind: UpdateScale, shape: torch.Size) -> float:
    rows, columns = shape
    if kind == "moonlight":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5
