"""The default run of the paper: one learning rate for all weights and nothing done about the logits."""

from quack_lm.stabilizers.base import Stabilizer


class NoStabilizer(Stabilizer):
    """No stabilizer: every weight learns at the base rate."""
