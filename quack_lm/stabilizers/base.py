"""The hooks of a stabilizer. Each gets and returns small tensors over [layers, blocks]; none sees a parameter."""

from collections.abc import Mapping

from torch import Tensor, nn

from quack_lm.logit_paths import LogitPath

# weight -> [layers, blocks], or one number for the whole weight in all layers.
Scales = Mapping[str, Tensor | float]
Paths = tuple[LogitPath, ...]


class Stabilizer:
    """A stabilizer that does nothing: every hook returns "leave it alone"."""

    #: The norm that `initialize` and `step_scale` need of every declared weight block; None: they get no norms.
    needs_norms: str | None = None
    #: Whether `weight_scale` needs each head's max logit since the last step.
    needs_max_logits: bool = False
    #: Whether weight decay follows the scaled rate of a block (the paper's wording) or keeps the base rate.
    scales_weight_decay: bool = True

    def qk_transform(self, head_dim: int) -> nn.Module | None:
        """A module on (q, k) of one layer, both [B, heads, T, head_dim], applied before rotation; None for none.

        One that only scales keys says so (`ScalesKeys` in attention/cache.py), and keeps a cache of latents possible.
        """
        return None

    def initialize(self, paths: Paths, norms: Mapping[str, Tensor]) -> None:
        """Called before the first step, with the norms of the freshly initialized weights, [layers, blocks] each.

        In a run that continues, the norms are without values (on the meta device), and `load_state_dict` follows.
        """

    def step_scale(self, paths: Paths, norms: Mapping[str, Tensor]) -> Scales:
        """The factor on this step's learning rate for each weight block."""
        return {}

    def weight_scale(self, paths: Paths, max_logits_LH: Tensor) -> Scales:
        """The factor on the weights themselves after the step."""
        return {}

    def metrics(self) -> dict[str, Tensor]:
        """What to log under the stabilizer's name: scalars and [layers, blocks] tables of the last step."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint must hold."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what `state_dict` gave."""
        assert not state, f"{type(self).__name__} has no state, got {sorted(state)}"
