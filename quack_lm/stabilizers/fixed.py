"""The paper's ablation: every query and key weight learns at `tau` times the base rate, for the whole run."""

from collections.abc import Mapping

from pydantic import PositiveFloat
from torch import Tensor

from quack_lm.logit_paths import declared_weights
from quack_lm.stabilizers.base import Paths, Scales, Stabilizer


class Fixed(Stabilizer):
    """lr(W) = tau * eta for all weights that multiply into the logits.

    Args:
        tau: learning rate of the query and key weights relative to optimizer.lr.
        scales_weight_decay: whether their weight decay is scaled as well; false: decay at the base rate.
    """

    def __init__(self, *, tau: PositiveFloat = 0.1, scales_weight_decay: bool = True) -> None:
        self.tau = tau
        self.scales_weight_decay = scales_weight_decay

    def step_scale(self, paths: Paths, norms: Mapping[str, Tensor]) -> Scales:
        """The same number for every block."""
        return dict.fromkeys(declared_weights(paths), self.tau)
