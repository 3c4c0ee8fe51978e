"""QuacK: a learning rate for the logits' weights that is inverse to the norm of the weights they multiply.

    lr(W) = tau * eta * factor(W) / factor_at_init(W),
    factor(W) = 1 / max over the paths and heads in which W takes part of the product of its partners' norms

(arXiv 2511.21377, Algorithms 1 and 2, which are this rule for MHA and MLA.)
"""

from collections.abc import Mapping
from typing import Literal

from pydantic import PositiveFloat
from torch import Tensor

from quack_lm.logit_paths import largest_partner_product
from quack_lm.stabilizers.base import Paths, Scales, Stabilizer


class QuacK(Stabilizer):
    """Bound the change of the logits by scaling the step of each head's query and key weights.

    Args:
        tau: learning rate of the query and key weights at initialization relative to optimizer.lr.
        norm: norm by which the weights are measured.
        scales_weight_decay: whether their weight decay is scaled as well; false: decay at the base rate.
    """

    def __init__(
        self,
        *,
        tau: PositiveFloat = 0.1,
        norm: Literal["frobenius", "spectral"] = "frobenius",
        scales_weight_decay: bool = True,
    ) -> None:
        self.tau = tau
        self.needs_norms = norm
        self.scales_weight_decay = scales_weight_decay
        self.initial: dict[str, Tensor] = {}
        self.scales: dict[str, Tensor] = {}

    def initialize(self, paths: Paths, norms: Mapping[str, Tensor]) -> None:
        """Keep the partners' norms at initialization: they are the reference for the whole run."""
        self.initial = largest_partner_product(paths, norms)

    def step_scale(self, paths: Paths, norms: Mapping[str, Tensor]) -> Scales:
        """tau * (partners' norms at initialization) / (partners' norms now)."""
        now = largest_partner_product(paths, norms)
        self.scales = {weight: self.tau * self.initial[weight] / now[weight] for weight in now}
        return self.scales

    def metrics(self) -> dict[str, Tensor]:
        """The factor on the learning rate of each weight block."""
        return {f"scale/{weight}": scale for weight, scale in self.scales.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The reference norms, [layers, blocks] for each weight."""
        return {f"initial.{weight}": product for weight, product in self.initial.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back the reference norms."""
        self.initial = {name.removeprefix("initial."): product for name, product in state.items()}
