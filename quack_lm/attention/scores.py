"""Causal attention behind one interface, optionally with each head's max logit.

    out, max_logits = attend(q, k, v, mask=mask, backend="sdpa", want_max=True)

`eager` is the reference; `sdpa` runs everywhere; `flash` (flash-attn) and `flex` (FlexAttention) need CUDA. A *logit*
is q . k / sqrt(K) in this whole project: scaled, before the mask and softmax. A maximum is over the visible logits
only. Axes: B batch, T time, H query heads, G key heads (G divides H), K width of queries and keys, V width of values.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from quack_lm.errors import UserError

Backend = Literal["sdpa", "eager", "flash", "flex"]

# Query rows whose logits exist at once where a backend does not report its maxima: few enough for the cache of a CPU,
# many enough for a GPU.
MIN_ROWS, MAX_ROWS = 64, 512
CPU_BLOCKS = 16
# FlexAttention's kernels multiply tiles of this many columns; narrower heads are filled up with zeros.
LEAST_FLEX_WIDTH = 16


@dataclass(frozen=True)
class Mask:
    """Who sees whom: causal, and within one document where `documents_BT` numbers them."""

    documents_BT: Tensor | None = None
    flex: Any = None  # FlexAttention's own form, built once for all layers

    def visible(self, rows: slice, length: int, device: torch.device) -> Tensor:
        """Whether query rows see keys 0..length-1: [rows, length], or [B, 1, rows, length] with documents."""
        keys = torch.arange(length, device=device)
        seen = keys <= torch.arange(rows.start, rows.stop, device=device)[:, None]
        if self.documents_BT is None:
            return seen
        same = self.documents_BT[:, rows, None] == self.documents_BT[:, None, :length]
        return (seen & same)[:, None]


def number_documents(tokens_BT: Tensor, eot_id: int) -> Tensor:
    """The number of each token's document within its sequence; an end-of-text token belongs to the document it ends."""
    ends = (tokens_BT == eot_id).long()
    return ends.cumsum(-1) - ends


def make_mask(backend: Backend, *, length: int, documents_BT: Tensor | None, device: torch.device) -> Mask:
    """The mask of one forward, shared by all layers."""
    if backend != "flex":
        return Mask(documents_BT)
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    def causal_in_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        assert documents_BT is not None
        return (q >= k) & (documents_BT[b, q] == documents_BT[b, k])

    rule, batch = (causal, None) if documents_BT is None else (causal_in_document, documents_BT.shape[0])
    return Mask(documents_BT, create_block_mask(rule, batch, None, length, length, device=device))


def check_backend(backend: Backend, *, device: str, precision: str) -> None:
    """Raise UserError, naming attention.backend and a backend that runs, where this one cannot."""
    if backend in ("flash", "flex") and device != "cuda":
        raise UserError(
            f"attention.backend={backend} needs a CUDA device and this run is on {device}; use attention.backend=sdpa"
        )
    if backend == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "attention.backend=flash needs the flash-attn package: pip install -e '.[flash]' --no-build-isolation, "
            "or use attention.backend=sdpa"
        )
    if backend == "flash" and precision != "bfloat16":
        raise UserError(f"attention.backend=flash needs trainer.precision=bfloat16, got {precision}")


def attend(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, *, mask: Mask, backend: Backend, want_max: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, H, T, V], and each head's largest visible logit [H] (float32, no gradient) if wanted."""
    out, max_H = _BACKENDS[backend](q_BHTK, k_BGTK, v_BGTV, mask, want_max)
    if want_max and max_H is None:
        max_H = max_logits(q_BHTK, k_BGTK, mask)
    return out, max_H


def logits(q_BHTK: Tensor, k_BGTK: Tensor, *, rows: slice | None = None) -> Tensor:
    """The slow and obvious logits of the given query rows against all keys: [B, H, rows, T], float32 or wider."""
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q_BHTK, k_BGTK))
    if rows is not None:
        q = q[:, :, rows]
    q_BGSRK = q.unflatten(1, (k.shape[1], -1))
    return (q_BGSRK @ k.unsqueeze(2).mT).flatten(1, 2) / math.sqrt(q.shape[-1])


def row_chunks(length: int, rows: int) -> list[slice]:
    """Slices of at most `rows` that cover the queries."""
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]


@torch.no_grad()
def max_logits(q_BHTK: Tensor, k_BGTK: Tensor, mask: Mask) -> Tensor:
    """Each head's largest visible logit, [H] float32, a block of query rows at a time: memory stays linear in T."""
    length, device = q_BHTK.shape[-2], q_BHTK.device
    n_rows = min(max(MIN_ROWS, length // CPU_BLOCKS), MAX_ROWS) if device.type == "cpu" else MAX_ROWS
    best = []
    for rows in row_chunks(length, n_rows):
        # In the working precision: a second pass in float32 would cost more than the attention itself.
        k_seen = k_BGTK[:, :, : rows.stop].unsqueeze(2)
        scores = (q_BHTK[:, :, rows].unflatten(1, (k_BGTK.shape[1], -1)) @ k_seen.mT).flatten(1, 2)
        # Of earlier keys only documents hide some.
        columns = rows if mask.documents_BT is None else slice(0, rows.stop)
        hidden = ~mask.visible(rows, rows.stop, device)[..., columns]
        scores[..., columns].masked_fill_(hidden, -torch.inf)
        best.append(scores.amax((0, 2, 3)))
    return torch.stack(best).amax(0).float() / math.sqrt(q_BHTK.shape[-1])


# ------------------------------------------------------------------------------------------------ backends


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask, want_max: bool) -> tuple[Tensor, Tensor | None]:
    scores = logits(q, k)
    length = q.shape[-2]
    scores = scores.masked_fill(~mask.visible(slice(0, length), length, q.device), -torch.inf)
    weights_BGSTT = scores.softmax(-1).to(v.dtype).unflatten(1, (k.shape[1], -1))
    out = (weights_BGSTT @ v.unsqueeze(2)).flatten(1, 2)
    return out, scores.detach().amax((0, 2, 3)).float() if want_max else None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, want_max: bool) -> tuple[Tensor, None]:
    length, width = q.shape[-2], v.shape[-1]
    seen = None if mask.documents_BT is None else mask.visible(slice(0, length), length, q.device)
    scale, grouped = q.shape[-1] ** -0.5, q.shape[1] != k.shape[1]
    q, k, v = _equal_widths(q, k, v)
    out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=grouped)
    return out[..., :width], None


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask, want_max: bool) -> tuple[Tensor, None]:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    width, length, scale = v.shape[-1], q.shape[-2], q.shape[-1] ** -0.5
    is_deterministic = torch.are_deterministic_algorithms_enabled()  # of the backward; flash-attn does not ask torch
    q, k, v = (x.transpose(1, 2) for x in _equal_widths(q, k, v))
    if mask.documents_BT is None:
        out = flash_attn_func(q, k, v, softmax_scale=scale, causal=True, deterministic=is_deterministic)
    else:
        # For the kernel every document is a sequence: cut where the number changes, and between sequences.
        starts_BT = torch.ones_like(mask.documents_BT, dtype=torch.bool)
        starts_BT[:, 1:] = mask.documents_BT[:, 1:] != mask.documents_BT[:, :-1]
        cuts = F.pad(starts_BT.flatten().nonzero().flatten(), (0, 1), value=starts_BT.numel()).int()
        flat = (x.flatten(0, 1) for x in (q, k, v))
        out = flash_attn_varlen_func(
            *flat, cuts, cuts, length, length, softmax_scale=scale, causal=True, deterministic=is_deterministic
        )
        out = out.unflatten(0, (-1, length))
    return out.transpose(1, 2)[..., :width], None


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, want_max: bool) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest

    # max_scores is [B, H, T], after the softmax scale and the mask: this project's logit.
    request = AuxRequest(max_scores=True) if want_max else None
    width, scale, grouped = v.shape[-1], q.shape[-1] ** -0.5, q.shape[1] != k.shape[1]
    q, k, v = (F.pad(x, (0, max(0, LEAST_FLEX_WIDTH - x.shape[-1]))) for x in (q, k, v))
    result = _compiled_flex()(q, k, v, block_mask=mask.flex, scale=scale, enable_gqa=grouped, return_aux=request)
    out, aux = result if want_max else (result, None)
    out = out[..., :width]
    if aux is None:
        return out, None
    return out, aux.max_scores.detach().amax((0, 2)).float()


def _equal_widths(*tensors: Tensor) -> list[Tensor]:
    """Zeros up to the largest width, which change no logit: kernels for unequal widths are slower or missing."""
    width = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors]


_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "flash": _flash,
    "flex": _flex,
}
