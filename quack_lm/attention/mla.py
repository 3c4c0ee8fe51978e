"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), as in arXiv 2511.21377:

    q_nope = W_uq[h] W_dq x    q_rope = R W_qr[h] W_dq x    c_kv = W_dkv x
    k_nope = W_uk[h] c_kv      k_rope = R W_kr x            v    = W_uv[h] c_kv
    logit  = (q_nope . k_nope + q_rope . k_rope) / sqrt(nope_dim + rope_dim)

W_kr and the two down-projections are shared by all heads.
"""

from collections.abc import Callable

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from quack_lm.attention.base import Attention, even_split, linear, split_heads
from quack_lm.attention.scores import Backend
from quack_lm.errors import UserError
from quack_lm.logit_paths import Factor, LogitPath
from quack_lm.rms_norm import RMSNorm


class MLA(Attention):
    """Queries from one latent, keys and values from another, positions from a narrow rotary part.

    Args:
        n_heads: number of query heads.
        q_latent_dim: width of the query latent; null: d_model / 4, at least 32 (the paper: 512 at width 2048).
        kv_latent_dim: width of the latent of keys and values; null: d_model / 8, at least 16 (the paper: 256).
        nope_dim: query and key dimensions without a position; null: d_model / n_heads (the paper: 64).
        rope_dim: query and key dimensions with a rotary position; null: d_model / n_heads (the paper: 64).
        v_dim: width of the values of each head; null: nope_dim + rope_dim (the paper: 128).
        latent_norm: RMSNorm on both latents, as in DeepSeek-V3; the paper's equations have none.
        norm_eps: epsilon of these norms.
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
        q_latent_dim: PositiveInt | None = None,
        kv_latent_dim: PositiveInt | None = None,
        nope_dim: PositiveInt | None = None,
        rope_dim: PositiveInt | None = None,
        v_dim: PositiveInt | None = None,
        latent_norm: bool = False,
        norm_eps: PositiveFloat = 1e-6,
        rope_theta: PositiveFloat = 10_000.0,
        backend: Backend = "sdpa",
    ) -> None:
        # The paper's proportions, with a floor: at width 64 a quarter would leave 16 dimensions for all queries.
        q_latent_dim = q_latent_dim or max(d_model // 4, 32)
        kv_latent_dim = kv_latent_dim or max(d_model // 8, 16)
        nope_dim = nope_dim or even_split(d_model, n_heads)
        rope_dim = rope_dim or even_split(d_model, n_heads)
        v_dim = v_dim or nope_dim + rope_dim
        if rope_dim % 2:
            raise UserError(f"attention.rope_dim={rope_dim} must be even: rotary positions turn pairs of dimensions")
        super().__init__(
            n_heads=n_heads,
            qk_width=nope_dim + rope_dim,
            rope_width=rope_dim,
            backend=backend,
            make_transform=make_transform,
        )
        self.rope_theta = rope_theta
        self.latent_norm = latent_norm
        self.has_plain_paths = not latent_norm
        self.w_dq = linear(d_model, q_latent_dim)
        self.w_uq = linear(q_latent_dim, n_heads * nope_dim)
        self.w_qr = linear(q_latent_dim, n_heads * rope_dim)
        self.w_dkv = linear(d_model, kv_latent_dim)
        self.w_uk = linear(kv_latent_dim, n_heads * nope_dim)
        self.w_uv = linear(kv_latent_dim, n_heads * v_dim)
        self.w_kr = linear(d_model, rope_dim)
        self.w_o = linear(n_heads * v_dim, d_model)
        self.q_norm = RMSNorm(q_latent_dim, eps=norm_eps) if latent_norm else nn.Identity()
        self.kv_norm = RMSNorm(kv_latent_dim, eps=norm_eps) if latent_norm else nn.Identity()

    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Down to the latents, up to the heads; the rotary key is repeated for every head."""
        c_q = self.q_norm(self.w_dq(x_BTD))
        c_kv = self.kv_norm(self.w_dkv(x_BTD))
        q_nope, q_rope, k_nope, v = (
            split_heads(up, self.n_heads) for up in (self.w_uq(c_q), self.w_qr(c_q), self.w_uk(c_kv), self.w_uv(c_kv))
        )
        k_rope = split_heads(self.w_kr(x_BTD), 1).expand(-1, self.n_heads, -1, -1)
        return torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1), v

    def logit_paths(self) -> tuple[LogitPath, ...]:
        """{W_uq[h], W_dq, W_uk[h], W_dkv} and {W_qr[h], W_dq, W_kr}; a normalized latent hides its down-projection."""
        w_dq, w_dkv = ((), ()) if self.latent_norm else ((Factor("w_dq"),), (Factor("w_dkv"),))
        content = (Factor("w_uq", self.n_heads), *w_dq, Factor("w_uk", self.n_heads), *w_dkv)
        rope = (Factor("w_qr", self.n_heads), *w_dq, Factor("w_kr"))
        return (LogitPath("content", content), LogitPath("rope", rope))
