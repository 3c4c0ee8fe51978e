"""Who sees whom, in the forms that the attention backends read; made once per forward and shared by all layers.

Axes: B batch, T time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Mask:
    """Causal, and within one document where `documents_BT` numbers them.

    The other fields say the same to one backend each; without them it works them out in every layer.
    """

    documents_BT: Tensor | None = None
    dense: Tensor | None = None  # boolean, [T, T] or [B, 1, T, T]: whether a query sees a key
    cuts: Tensor | None = None  # int32, [documents + 1]: where each document starts in the flattened batch, and its end
    blocks: Any = None  # FlexAttention's BlockMask

    def matrix(self, length: int, device: torch.device) -> Tensor:
        """`dense`, or what it would be."""
        return self.visible(slice(0, length), length, device) if self.dense is None else self.dense

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


def count_documents(tokens_BT: Tensor, eot_id: int) -> int:
    """How many documents `number_documents` tells apart in a batch: for tokens on the host, where it waits for
    nothing."""
    return len(tokens_BT) + int((tokens_BT[:, :-1] == eot_id).sum())


def document_cuts(documents_BT: Tensor, count: int | None = None) -> Tensor:
    """Where each document starts in the flattened batch, and the end: int32, [documents + 1].

    For kernels of variable length every document is a sequence. Without their `count`, a GPU is waited for.
    """
    starts_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    starts_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    flat = starts_BT.flatten()
    places = flat.nonzero() if count is None else torch.nonzero_static(flat, size=count)
    return F.pad(places.flatten(), (0, 1), value=flat.numel()).int()


@cache
def causal_blocks(length: int, device: torch.device) -> Any:
    """The block mask of causal attention, made once for a length and a device."""

    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    return _block_mask_maker(device.type)(causal, None, None, length, length, device=device)


def document_blocks(documents_BT: Tensor) -> Any:
    """The block mask of causal attention within documents."""

    def causal_in_document(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (documents_BT[b, q] == documents_BT[b, k])

    batch, length = documents_BT.shape
    make = _block_mask_maker(documents_BT.device.type)
    return make(causal_in_document, batch, None, length, length, device=documents_BT.device)


@cache
def _block_mask_maker(device_type: str) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled, it does not hold the whole [T, T] mask; on a CPU, only tests make one.
    return torch.compile(create_block_mask) if device_type == "cuda" else create_block_mask
