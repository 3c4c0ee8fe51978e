"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434), as in arXiv 2511.21377:

    q_nope = W_uq[h] W_dq x    q_rope = R W_qr[h] W_dq x    c_kv = W_dkv x
    k_nope = W_uk[h] c_kv      k_rope = R W_kr x            v    = W_uv[h] c_kv
    logit  = (q_nope . k_nope + q_rope . k_rope) / sqrt(nope_dim + rope_dim)

W_kr and the two down-projections are shared by all heads. So decoding keeps c_kv and k_rope of each token, and absorbs
W_uk and W_uv into the query and the output:

    q_nope . k_nope = (W_uk[h]^T q_nope) . c_kv       sum_t a_t v_t = W_uv[h] sum_t a_t c_kv[t]

A stabilizer that scales keys by a gain g and by one number r per token and head (QK norm: the inverse root mean square
of the key) leaves this form (arXiv 2606.16310); r is kept, too:

    logit = r (W_uk[h]^T (g_nope q_nope) . c_kv + q_rope . R (g_rope W_kr x)) / sqrt(nope_dim + rope_dim)
"""

from collections.abc import Callable

import torch
from pydantic import PositiveFloat, PositiveInt
from torch import Tensor, nn

from quack_lm.attention.base import Attention, even_split, linear, split_heads
from quack_lm.attention.cache import Entries, Entry, LayerCache, ScalesKeys, Span, attend_latents
from quack_lm.attention.rope import rotate
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
        q = self._queries(x_BTD)
        c_kv, k_rope = self._cached(x_BTD)
        return q, self._keys(c_kv, k_rope), split_heads(self.w_uv(c_kv), self.n_heads)

    def _queries(self, x_BTD: Tensor) -> Tensor:
        c_q = self.q_norm(self.w_dq(x_BTD))
        return torch.cat([split_heads(up(c_q), self.n_heads) for up in (self.w_uq, self.w_qr)], -1)

    def _cached(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The latent [B, T, C], and the rotary key before rotation [B, 1, T, R]: what the heads share."""
        return self.kv_norm(self.w_dkv(x_BTD)), split_heads(self.w_kr(x_BTD), 1)

    def _keys(self, c_kv_BTC: Tensor, k_rope_B1TR: Tensor) -> Tensor:
        k_nope = split_heads(self.w_uk(c_kv_BTC), self.n_heads)
        return torch.cat([k_nope, k_rope_B1TR.expand(-1, self.n_heads, -1, -1)], -1)

    def logit_paths(self) -> tuple[LogitPath, ...]:
        """{W_uq[h], W_dq, W_uk[h], W_dkv} and {W_qr[h], W_dq, W_kr}; a normalized latent hides its down-projection."""
        w_dq, w_dkv = ((), ()) if self.latent_norm else ((Factor("w_dq"),), (Factor("w_dkv"),))
        content = (Factor("w_uq", self.n_heads), *w_dq, Factor("w_uk", self.n_heads), *w_dkv)
        rope = (Factor("w_qr", self.n_heads), *w_dq, Factor("w_kr"))
        return (LogitPath("content", content), LogitPath("rope", rope))

    @property
    def is_absorbed(self) -> bool:
        """Whether decoding keeps latents: unless something else than a scale is between them and the keys."""
        return not self.keeps_keys and isinstance(self.seam.transform, ScalesKeys | None)

    def cache_entries(self) -> Entries:
        """The latent and the rotary key, which all heads share, and what a stabilizer scales each head's key by."""
        if not self.is_absorbed:
            return self.keys_and_values(self.n_heads, self.w_uv.out_features // self.n_heads)
        latent = {"latent": Entry(self.w_dkv.out_features + self.rope_width)}
        # A rounded scale would shift the logits of a token all together, so that it is never bfloat16.
        scale = Entry(1, self.n_heads, least_dtype=torch.float32)
        return latent if self.seam.transform is None else {**latent, "key_scale": scale}

    def decode(self, x_BTD: Tensor, span: Span, cache: LayerCache) -> Tensor:
        """New tokens attend to the latents of all; the first ones, which need no cache, as in training."""
        if not self.is_absorbed:
            return self.decode_with_keys(x_BTD, span, cache)
        q, (c_kv, k_rope) = self._queries(x_BTD), self._cached(x_BTD)
        nope, transform = self.qk_width - self.rope_width, self.seam.transform
        scale: dict[str, Tensor] = {}
        if isinstance(transform, ScalesKeys):
            scale = {"key_scale": transform.key_scale(self._keys(c_kv, k_rope))[..., None]}
            q, gain_K = transform.transform_queries(q), transform.key_gain_K
            # A gain does not commute with the rotation, so that its rotary part stays with the key.
            q, k_rope = torch.cat([q[..., :nope] * gain_K[:nope], q[..., nope:]], -1), k_rope * gain_K[nope:]
        latent = torch.cat([c_kv[:, None], rotate(k_rope, span.new_rope)], -1)
        latent, *key_scale = cache.append(latent=latent, **scale)
        if not span.start:
            return self.forward(x_BTD, span.rope, span.mask)
        w_uk, w_uv = (w.weight.unflatten(0, (self.n_heads, -1)) for w in (self.w_uk, self.w_uv))
        q_latent = torch.einsum("bhtn,hnc->bhtc", q[..., :nope], w_uk)
        out_BHTC = attend_latents(
            torch.cat([q_latent, rotate(q[..., nope:], span.new_rope)], -1),
            latent[:, 0],
            latent[:, 0, :, : -self.rope_width],
            span,
            scale=self.qk_width**-0.5,
            key_scale_BHS=key_scale[0][..., 0] if key_scale else None,
        )
        return self.w_o(torch.einsum("bhtc,hvc->bthv", out_BHTC, w_uv).flatten(2))
