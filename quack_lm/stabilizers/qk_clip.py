"""QK clip: after the step, shrink the weights of each head whose max logit passed a threshold.

    gamma = min(1, threshold / S_max[head])

(Kimi K2, arXiv 2507.20534, Algorithm 1). A weight that several heads share is never clipped, since that would change
heads within bounds: each path's own weights of the head take the whole factor, split evenly in the exponent. That
gives sqrt(gamma) on W_Q and W_K in MHA and on W_uq and W_uk in MLA, gamma on MLA's W_qr, and under GQA gamma on W_Q
alone.
"""

import torch
from pydantic import PositiveFloat
from torch import Tensor

from quack_lm.stabilizers.base import Paths, Scales, Stabilizer


class QKClip(Stabilizer):
    """Bound the logits by editing the weights after the step.

    Args:
        threshold: max logit that a head may reach before its weights are clipped.
        read_only: measure and log the max logits without clipping.
    """

    needs_max_logits = True

    def __init__(self, *, threshold: PositiveFloat = 100.0, read_only: bool = False) -> None:
        self.threshold = threshold
        self.read_only = read_only
        self.last: dict[str, Tensor] = {}

    def weight_scale(self, paths: Paths, max_logits_LH: Tensor) -> Scales:
        """gamma ** (1 / number of the head's own weights in the path), for those weights."""
        # Clamping from below leaves heads within bounds at exactly 1, those without a positive logit included.
        gamma_LH = self.threshold / max_logits_LH.clamp_min(self.threshold)
        self.last = {"max_logits": max_logits_LH, "gamma": gamma_LH}
        if self.read_only:
            return {}
        scales: dict[str, Tensor] = {}
        for path in paths:
            own = [factor.weight for factor in path.factors if factor.heads == max_logits_LH.shape[-1]]
            scales |= {weight: gamma_LH ** (1 / len(own)) for weight in own}
        return scales

    def metrics(self) -> dict[str, Tensor]:
        """The last step's maxima and clip factors per head, and the share of heads clipped."""
        if not self.last:
            return {}
        return {**self.last, "fraction": torch.mean((self.last["gamma"] < 1).float())}
