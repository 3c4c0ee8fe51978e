"""Multi-head attention, with grouped keys and values (GQA) when n_kv_heads < n_heads.

q = W_Q x,  k = W_K x,  v = W_V x,  logit = q . k / sqrt(head_dim)
"""

from collections.abc import Callable

from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from quack_lm.attention.base import Attention, even_split, linear, split_heads
from quack_lm.attention.cache import Entries, LayerCache, Span
from quack_lm.attention.scores import Backend
from quack_lm.errors import UserError
from quack_lm.logit_paths import Factor, LogitPath


class MHA(Attention):
    """Queries, keys and values each straight from the input.

    Args:
        n_heads: number of query heads.
        n_kv_heads: number of key and value heads; fewer than n_heads: grouped-query attention (GQA).
        head_dim: width of each head; null: d_model / n_heads.
        rope_theta: base of the rotary frequencies.
        backend: how attention is computed: sdpa (torch chooses the kernel), eager (the slow reference), flash
            (flash-attn 4, 3 or 2, CUDA), flex (FlexAttention, CUDA), auto (flash where one runs, else sdpa).
    """

    def __init__(
        self,
        d_model: int,
        make_transform: Callable[[int], nn.Module | None] | None = None,
        *,
        n_heads: PositiveInt,
        n_kv_heads: PositiveInt,
        head_dim: PositiveInt | None = None,
        rope_theta: PositiveFloat = 10_000.0,
        backend: Backend = "sdpa",
    ) -> None:
        if n_heads % n_kv_heads:
            raise UserError(f"attention.n_kv_heads={n_kv_heads} must divide attention.n_heads={n_heads}")
        head_dim = head_dim or even_split(d_model, n_heads)
        if head_dim % 2:
            raise UserError(f"attention.head_dim={head_dim} must be even: rotary positions turn pairs of dimensions")
        super().__init__(
            n_heads=n_heads, qk_width=head_dim, rope_width=head_dim, backend=backend, make_transform=make_transform
        )
        self.n_kv_heads = n_kv_heads
        self.rope_theta = rope_theta
        self.w_q = linear(d_model, n_heads * head_dim)
        self.w_k = linear(d_model, n_kv_heads * head_dim)
        self.w_v = linear(d_model, n_kv_heads * head_dim)
        self.w_o = linear(n_heads * head_dim, d_model)

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each a product of one matrix with the input; shapes as in the base class."""
        q_BHTK = split_heads(self.w_q(x_BTD), self.n_heads)
        k_BGTK = split_heads(self.w_k(x_BTD), self.n_kv_heads)
        return q_BHTK, k_BGTK, split_heads(self.w_v(x_BTD), self.n_kv_heads)

    def logit_paths(self) -> tuple[LogitPath, ...]:
        """{W_Q[h], W_K[group of h]}."""
        return (LogitPath("qk", (Factor("w_q", self.n_heads), Factor("w_k", self.n_kv_heads))),)

    def cache_entries(self) -> Entries:
        """The key and the value of each key head."""
        return self.keys_and_values(self.n_kv_heads, self.qk_width)

    def decode(self, x_BTD: Tensor, span: Span, cache: LayerCache) -> Tensor:
        """New tokens attend to the keys and values of all."""
        return self.decode_with_keys(x_BTD, span, cache)
