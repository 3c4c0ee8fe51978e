"""Causal attention behind one interface, optionally with each head's max logit.

    out, max_logits = attend(q, k, v, mask=mask, backend="sdpa", want_max=True)

`eager` is the reference; `sdpa` runs everywhere; `flash` (flash-attn 4, 3 or 2) and `flex` (FlexAttention) need CUDA. A
*logit* is q . k / sqrt(K) in this whole project: scaled, before the mask and softmax. A maximum is over the visible
logits only. Axes: B batch, T time, H query heads, G key heads (G divides H), K width of queries and keys, V width of
values.
"""

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from quack_lm.attention import flash
from quack_lm.attention.mask import Mask, causal_blocks, document_blocks, document_cuts
from quack_lm.errors import UserError

Backend = Literal["sdpa", "eager", "flash", "flex", "auto"]
# How max logits are computed that a backend does not report.
MaxLogitKernel = Literal["auto", "flex", "matmul"]

# Query rows whose logits exist at once where a backend does not report its maxima: few enough for the cache of a CPU,
# many enough for a GPU.
MIN_ROWS, MAX_ROWS = 64, 512
CPU_BLOCKS = 16
# FlexAttention's kernels multiply tiles of this many columns; narrower heads are filled up with zeros.
LEAST_FLEX_WIDTH = 16


def resolve_backend(backend: Backend, *, device: str, precision: str, head_width: int) -> Backend:
    """The backend that a run uses, `auto` replaced: flash-attn where one runs, else sdpa.

    Raises UserError, naming attention.backend and a backend that runs, where this one cannot: flash-attn is imported,
    unless this machine has no GPU and only rehearses a run that will.
    """
    if backend in ("flash", "flex") and device != "cuda":
        raise UserError(
            f"attention.backend={backend} needs a CUDA device and this run is on {device}; use attention.backend=sdpa"
        )
    if backend == "flash" and precision != "bfloat16":
        raise UserError(f"attention.backend=flash needs trainer.precision=bfloat16, got {precision}")
    if backend == "flash" and not flash.installed_versions():
        raise UserError(
            "attention.backend=flash needs one of the packages flash-attn-4, kernels and flash-attn (docs, "
            "Installation), for example: pip install -e '.[flash4]'; or use attention.backend=sdpa"
        )
    width = flash.padded_width(head_width)
    can_ask = device == "cuda" and torch.cuda.is_available()
    if backend == "auto":
        backend = "flash" if can_ask and precision == "bfloat16" and flash.is_available(width) else "sdpa"
    if backend == "flash" and can_ask:
        flash.load(width)
    return backend


def resolve_max_logits(kernel: MaxLogitKernel, *, device: str) -> MaxLogitKernel:
    """`flex` or `matmul`: FlexAttention where Triton compiles it, unless the config says otherwise."""
    if kernel == "flex" and device != "cuda":
        raise UserError(
            f"trainer.max_logits=flex needs a CUDA device and this run is on {device}; use trainer.max_logits=auto"
        )
    if kernel == "auto":
        return "flex" if device == "cuda" and find_spec("triton") else "matmul"
    return kernel


def make_mask(
    backend: Backend,
    *,
    length: int,
    documents_BT: Tensor | None,
    device: torch.device,
    n_documents: int | None = None,
    packs_documents: bool = False,
    max_logits: MaxLogitKernel = "matmul",
) -> Mask:
    """The mask of one forward, in the forms that its backend, and the kernel of its max logits, read.

    `n_documents` is how many documents the batch has (`count_documents`), which a GPU need then not be asked for.
    """
    dense = cuts = blocks = None
    if documents_BT is not None and packs_documents:
        cuts = document_cuts(documents_BT, n_documents)
    elif backend == "eager" or (backend == "sdpa" and documents_BT is not None):
        dense = Mask(documents_BT).matrix(length, device)
    if backend == "flex" or max_logits == "flex":
        blocks = causal_blocks(length, device) if documents_BT is None else document_blocks(documents_BT)
    return Mask(documents_BT, dense, cuts, blocks)


def packs_documents(backend: Backend, x: Tensor, head_width: int) -> bool:
    """Whether masked documents go to a kernel of variable length, for inputs like x: of flash-attn, or torch's own."""
    if backend == "flash":
        return True
    is_half = x.device.type == "cuda" and x.dtype in (torch.bfloat16, torch.float16) and not torch.version.hip
    # The bounds of the flash-attn 2 that torch brings.
    return backend == "sdpa" and is_half and head_width <= 256 and torch.cuda.get_device_capability(x.device)[0] >= 8


def implementation(backend: Backend, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, mask: Mask) -> str:
    """What computes `attend` for such tensors: the version of flash-attn, or the kernel that torch chooses for sdpa."""
    if backend == "flash":
        return f"flash-attn {flash.load(flash.padded_width(max(q_BHTK.shape[-1], v_BGTV.shape[-1]))).version}"
    if backend != "sdpa":
        return backend
    if mask.cuts is not None:
        return "sdpa: varlen_attn"
    from torch.nn.attention import SDPBackend

    q, k, v = _equal_widths(q_BHTK, k_BGTK, v_BGTV)
    is_causal = mask.documents_BT is None
    # What scaled_dot_product_attention itself asks; there is no public name for it.
    chosen = torch._fused_sdp_choice(
        q, k, v, mask.dense, 0.0, is_causal, scale=q.shape[-1] ** -0.5, enable_gqa=q.shape[1] != k.shape[1]
    )
    return f"sdpa: {SDPBackend(chosen).name}"


def attend(
    q_BHTK: Tensor, k_BGTK: Tensor, v_BGTV: Tensor, *, mask: Mask, backend: Backend, want_max: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Attention output [B, H, T, V], and each head's largest visible logit [H] (float32, no gradient) if wanted."""
    out, max_H = _BACKENDS[backend](q_BHTK, k_BGTK, v_BGTV, mask, want_max)
    if want_max and max_H is None:
        max_H = max_logits(q_BHTK, k_BGTK, mask) if mask.blocks is None else fused_max_logits(q_BHTK, k_BGTK, mask)
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
    q_BGSTK, k_BGTK = q_BHTK.unflatten(1, (k_BGTK.shape[1], -1)), k_BGTK.contiguous()
    n_sharing = q_BGSTK.shape[2]  # query heads of a key head, S: one product for all of them
    best = []
    for rows in row_chunks(length, n_rows):
        # In the working precision: a second pass in float32 would cost more than the attention itself. Keys times
        # queries, because a bfloat16 product on a CPU copies its transposed factor, and the rows are fewer.
        q_rows = q_BGSTK[..., rows, :].flatten(2, 3)
        scores_BGTSR = (k_BGTK[:, :, : rows.stop] @ q_rows.mT).unflatten(-1, (n_sharing, -1))
        # Of earlier keys only documents hide some.
        columns = rows if mask.documents_BT is None else slice(0, rows.stop)
        hidden = ~mask.visible(rows, rows.stop, device)[..., columns]
        scores_BGTSR[:, :, columns].masked_fill_(hidden.mT.contiguous().unsqueeze(-2), -torch.inf)
        best.append(scores_BGTSR.amax(2))
    return torch.cat(best, -1).amax((0, 3)).flatten().float() / math.sqrt(q_BHTK.shape[-1])


@torch.no_grad()
def fused_max_logits(q_BHTK: Tensor, k_BGTK: Tensor, mask: Mask) -> Tensor:
    """`max_logits` by a forward of FlexAttention, which keeps the scores on the chip, with values as narrow as can
    be."""
    _, max_H = _flex(q_BHTK, k_BGTK, k_BGTK[..., :LEAST_FLEX_WIDTH], mask, want_max=True)
    assert max_H is not None
    return max_H


# ------------------------------------------------------------------------------------------------ backends


def _eager(q: Tensor, k: Tensor, v: Tensor, mask: Mask, want_max: bool) -> tuple[Tensor, Tensor | None]:
    scores = logits(q, k).masked_fill(~mask.matrix(q.shape[-2], q.device), -torch.inf)
    weights_BGSTT = scores.softmax(-1).to(v.dtype).unflatten(1, (k.shape[1], -1))
    out = (weights_BGSTT @ v.unsqueeze(2)).flatten(1, 2)
    return out, scores.detach().amax((0, 2, 3)).float() if want_max else None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Mask, want_max: bool) -> tuple[Tensor, None]:
    width, scale, grouped = v.shape[-1], q.shape[-1] ** -0.5, q.shape[1] != k.shape[1]
    if mask.cuts is not None:
        from torch.nn.attention.varlen import varlen_attn

        def attention(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, length: int) -> Any:
            causal = (-1, 0)  # as a window: everything before, nothing after
            return varlen_attn(q, k, v, cuts, cuts, length, length, scale=scale, window_size=causal, enable_gqa=grouped)

        return packed(attention, q, k, v, mask.cuts), None
    q, k, v = _equal_widths(q, k, v)
    seen = None if mask.documents_BT is None else mask.matrix(q.shape[-2], q.device)
    out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=scale, enable_gqa=grouped)
    return out[..., :width], None


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Mask, want_max: bool) -> tuple[Tensor, None]:
    width = flash.padded_width(max(q.shape[-1], v.shape[-1]))
    loaded = flash.load(width)
    # Of the backward; flash-attn does not ask torch.
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    options = {"softmax_scale": q.shape[-1] ** -0.5, "causal": True, "deterministic": is_deterministic}

    def attention(q: Tensor, k: Tensor, v: Tensor, cuts: Tensor, length: int) -> Any:
        sizes = {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts, "max_seqlen_q": length, "max_seqlen_k": length}
        return _first(loaded.packed(q, k, v, **sizes, **options))

    if mask.documents_BT is not None:
        cuts = document_cuts(mask.documents_BT) if mask.cuts is None else mask.cuts
        return packed(attention, q, k, v, cuts), None
    wide = (x.transpose(1, 2) for x in _equal_widths(q, k, v, width=width))
    return _first(loaded.dense(*wide, **options)).transpose(1, 2)[..., : v.shape[-1]], None


def _first(result: Any) -> Tensor:
    """The output alone: version 4 also returns the log-sum-exp."""
    return result[0] if isinstance(result, tuple) else result


def packed(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, cuts: Tensor) -> Tensor:
    """The output [B, H, T, V] of a kernel of variable length, to which each document is a sequence.

    `attention(q, k, v, cuts, length)` gets [B * T, heads, width], the cuts, and a bound on a document's length.
    """
    width, length = v.shape[-1], q.shape[-2]
    wide = _equal_widths(q, k, v, width=flash.padded_width(max(q.shape[-1], width)))
    out = attention(*(x.transpose(1, 2).flatten(0, 1) for x in wide), cuts, length)
    return out.unflatten(0, (-1, length)).transpose(1, 2)[..., :width]


@cache
def _flex_attention(is_compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return cast(Callable[..., Any], torch.compile(flex_attention) if is_compiled else flex_attention)


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Mask, want_max: bool) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest

    assert mask.blocks is not None
    # max_scores is [B, H, T], after the softmax scale and the mask: this project's logit.
    request = AuxRequest(max_scores=True) if want_max else None
    width, scale, grouped = v.shape[-1], q.shape[-1] ** -0.5, q.shape[1] != k.shape[1]
    q, k, v = (F.pad(x, (0, max(0, LEAST_FLEX_WIDTH - x.shape[-1]))) for x in (q, k, v))
    flex = _flex_attention(q.device.type == "cuda")
    result = flex(q, k, v, block_mask=mask.blocks, scale=scale, enable_gqa=grouped, return_aux=request)
    out, aux = result if want_max else (result, None)
    out = out[..., :width]
    if aux is None:
        return out, None
    return out, aux.max_scores.detach().amax((0, 2)).float()


def _equal_widths(*tensors: Tensor, width: int = 0) -> list[Tensor]:
    """Zeros up to the largest width, which change no logit: kernels for unequal widths are slower or missing."""
    width = max(width, *(x.shape[-1] for x in tensors))
    return [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors]


_BACKENDS: dict[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "eager": _eager,
    "sdpa": _sdpa,
    "flash": _flash,
    "flex": _flex,
}
