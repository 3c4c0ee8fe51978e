"""QK norm: RMSNorm with a learned gain on each head's queries and keys, before rotation (as in Qwen3).

In MLA it acts on the concatenated (nope, rope) query and key of each head. A key is multiplied by the gain and by its
inverse root mean square, one number per token and head: that is all that it adds to a cache of latents.
"""

from pydantic import PositiveFloat
from torch import Tensor, nn

from quack_lm.rms_norm import RMSNorm, inverse_rms
from quack_lm.stabilizers.base import Stabilizer


class QKNorm(Stabilizer):
    """Bound the logits by normalizing queries and keys.

    Args:
        eps: epsilon of the RMSNorms.
    """

    def __init__(self, *, eps: PositiveFloat = 1e-6) -> None:
        self.eps = eps

    def qk_transform(self, head_dim: int) -> nn.Module:
        """One gain vector for the queries and one for the keys of a layer, shared by its heads."""
        return QueryKeyNorm(head_dim, eps=self.eps)


class QueryKeyNorm(nn.Module):
    """RMSNorm over the head dimension of queries and keys."""

    def __init__(self, head_dim: int, *, eps: float) -> None:
        super().__init__()
        self.q_norm = RMSNorm(head_dim, eps=eps)
        self.k_norm = RMSNorm(head_dim, eps=eps)

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize both; shapes are kept."""
        return self.q_norm(q_BHTK), self.k_norm(k_BGTK)

    @property
    def key_gain_K(self) -> Tensor:
        """The gain of the keys."""
        return self.k_norm.weight

    def key_scale(self, k_BGTK: Tensor) -> Tensor:
        """The inverse root mean square of each key: [B, G, T]."""
        assert self.k_norm.eps is not None
        return inverse_rms(k_BGTK, self.k_norm.eps)

    def transform_queries(self, q_BHTK: Tensor) -> Tensor:
        """The normalized queries."""
        return self.q_norm(q_BHTK)
