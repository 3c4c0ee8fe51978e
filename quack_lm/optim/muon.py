"""Muon (Keller Jordan, 2024): momentum, orthogonalized matrix by matrix, the work shared among the ranks.

B <- mu B + (1 - mu) G;   O = NewtonSchulz(G + mu (B - G));   W <- (1 - lr wd) W - lr scale O
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quack_lm.parallel import local, map_full_matrices

# Jordan's quintic: chosen for slope at zero, so that five steps bring singular values into about [0.7, 1.2].
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NS_STEPS = 5

UpdateScale = Literal["jordan", "moonlight"]


class Muon(torch.optim.Optimizer):
    """Muon over matrices, each orthogonalized on its own.

    `update_scale` is `jordan`, max(1, rows / cols)^0.5, or `moonlight`, 0.2 max(rows, cols)^0.5 (arXiv 2502.16982).
    `ns_dtype` is the precision of the Newton-Schulz products, `state_dtype` that of the momentum between two steps.
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
        ns_dtype: torch.dtype = torch.bfloat16,
        state_dtype: torch.dtype = torch.float32,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "update_scale": update_scale,
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
        update_NrC = map_full_matrices(orthogonalize, stack_NrC, parameters[0]).to(weights[0].dtype)
        torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        rate = group["lr"] * _update_scale(group["update_scale"], parameters[0].shape)
        torch._foreach_add_(weights, list(update_NrC.unbind()), alpha=-rate)


def orthogonalize(matrices_NRC: Tensor) -> Tensor:
    """U S V^T -> U S' V^T with S' near one, for a batch of matrices, by Newton-Schulz."""
    a, b, c = NS_COEFFICIENTS
    is_tall = matrices_NRC.shape[-2] > matrices_NRC.shape[-1]
    x = matrices_NRC.mT if is_tall else matrices_NRC
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(NS_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x


def _update_scale(kind: UpdateScale, shape: torch.Size) -> float:
    rows, columns = shape
    if kind == "moonlight":
        return 0.2 * max(rows, columns) ** 0.5
    return max(1.0, rows / columns) ** 0.5
