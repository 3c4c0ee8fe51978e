"""What decoding keeps of the tokens so far, and how new tokens attend to it.

An attention says in `cache_entries` what a token leaves in a layer, and computes in `decode` the outputs of new tokens.
Axes: B batch, T new tokens, S all tokens so far, of which the new ones are the last, H query heads, G key heads, K
width of queries and keys, V width of values, W width of an entry, 2SF rotary table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from quack_lm.attention.mask import Mask, number_documents
from quack_lm.attention.rope import rope_table


@dataclass(frozen=True)
class Entry:
    """What a token leaves in a layer: `width` numbers for each of `heads`, in the model's dtype or a wider one."""

    width: int
    heads: int = 1
    least_dtype: torch.dtype = torch.bfloat16

    def dtype(self, of_model: torch.dtype) -> torch.dtype:
        """The dtype in which a model keeps it."""
        return torch.promote_types(of_model, self.least_dtype)


Entries = Mapping[str, Entry]


def bytes_per_token(entries: Entries, dtype: torch.dtype) -> int:
    """What a token takes in a layer of a model of this dtype."""
    return sum(entry.heads * entry.width * entry.dtype(dtype).itemsize for entry in entries.values())


@runtime_checkable
class ScalesKeys(Protocol):
    """A transform of queries and keys that does no more to a key than multiply it by a fixed gain and by one number.

        key -> scale(key) * gain * key

    The gain can then be moved to the side of the query, and the number, one per token and head, is all that a cache of
    latents has to keep in addition (arXiv 2606.16310).
    """

    @property
    def key_gain_K(self) -> Tensor:
        """The fixed gain of each dimension, the same for every head."""

    def key_scale(self, k_BGTK: Tensor) -> Tensor:
        """The number of each token and head: [B, G, T], float32 or wider."""

    def transform_queries(self, q_BHTK: Tensor) -> Tensor:
        """What the transform makes of the queries."""


class LayerCache:
    """The entries of one layer, for up to `capacity` tokens of each sequence."""

    def __init__(
        self, entries: Entries, *, batch: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.length = 0
        self.tensors = {
            name: torch.empty(batch, e.heads, capacity, e.width, dtype=e.dtype(dtype), device=device)
            for name, e in entries.items()
        }

    def append(self, **new_BGTW: Tensor) -> tuple[Tensor, ...]:
        """Keep what new tokens leave; returns all so far of each entry, [B, G, S, W], as views, in the given order."""
        assert new_BGTW.keys() == self.tensors.keys()
        start, self.length = self.length, self.length + next(iter(new_BGTW.values())).shape[2]
        for name, new in new_BGTW.items():
            self.tensors[name][:, :, start : self.length] = new
        return tuple(self.tensors[name][:, :, : self.length] for name in new_BGTW)


class Cache:
    """What decoding keeps in all layers, and where its tokens are.

    Args:
        layers: the entries of each layer.
        rope_width, rope_theta: of the rotary table.
        batch, capacity: how many sequences, and the most tokens of each.
        dtype, device: of the model.
        pads_B: how many of a sequence's first tokens are no tokens, but fill it up to the length of the others.
        eot_id: the token at which documents end, where the model masks documents.
    """

    def __init__(
        self,
        layers: Sequence[Entries],
        *,
        rope_width: int,
        rope_theta: float,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        pads_B: Tensor | None = None,
        eot_id: int | None = None,
    ) -> None:
        self.layers = [
            LayerCache(entries, batch=batch, capacity=capacity, dtype=dtype, device=device) for entries in layers
        ]
        self.capacity = capacity
        self.length = 0
        self.rope = rope_table(capacity, rope_width, theta=rope_theta, device=device)
        self.pads_B = None if pads_B is None or not pads_B.any() else pads_B.to(device)
        if self.pads_B is not None:
            # The first real token of a sequence is at position 0.
            positions_BS = (torch.arange(capacity, device=device) - self.pads_B[:, None]).clamp_min(0)
            self.rope = self.rope[:, positions_BS].unsqueeze(2)
        self.eot_id = eot_id
        self._tokens = None if eot_id is None else torch.empty(batch, capacity, dtype=torch.long, device=device)

    @property
    def bytes(self) -> int:
        """The size of its entries, for all tokens that it has room for."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors.values())

    def extend(self, tokens_BT: Tensor) -> "Span":
        """The place of new tokens behind those of the cache; ValueError where it has no room for them."""
        start, stop = self.length, self.length + tokens_BT.shape[1]
        if stop > self.capacity:
            raise ValueError(f"{stop} tokens do not fit into a cache of {self.capacity}")
        self.length = stop
        documents = None
        if self._tokens is not None and self.eot_id is not None:
            self._tokens[:, start:stop] = tokens_BT
            documents = number_documents(self._tokens[:, :stop], self.eot_id) + 1
        if self.pads_B is not None:
            # What fills a sequence up is a document of its own, which no token sees.
            is_real_BS = torch.arange(stop, device=tokens_BT.device) >= self.pads_B[:, None]
            documents = is_real_BS.long() if documents is None else documents * is_real_BS
        mask = Mask(documents)
        if start and (documents is not None or stop - start > 1):
            mask = Mask(documents, dense=mask.visible(slice(start, stop), stop, tokens_BT.device))
        return Span(start, self.rope[..., :stop, :], mask)

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first `length`."""
        self.length = length
        for layer in self.layers:
            layer.length = length


@dataclass(frozen=True)
class Span:
    """The place of new tokens among all so far; made once and shared by all layers."""

    start: int  # how many were there before
    rope: Tensor  # of all tokens so far: [2, S, F], or [2, B, 1, S, F] where sequences are filled up
    mask: Mask  # of all tokens; `dense`: what the new ones see, [T, S] or [B, 1, T, S], None where they see all

    @property
    def new_rope(self) -> Tensor:
        """The part of the new tokens."""
        return self.rope[..., self.start :, :]


def attend_cached(q_BHTK: Tensor, k_BGSK: Tensor, v_BGSV: Tensor, span: Span) -> Tensor:
    """Outputs [B, H, T, V] of new queries that attend to the keys and values of all tokens so far."""
    seen, scale = span.mask.dense, q_BHTK.shape[-1] ** -0.5
    if q_BHTK.shape[2] > 1:
        return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSV, seen, scale=scale, enable_gqa=True)
    # The heads that read the same keys are rows of one product, so that each key is read once.
    q_BGRK = q_BHTK.unflatten(1, (k_BGSK.shape[1], -1)).squeeze(3)
    return F.scaled_dot_product_attention(q_BGRK, k_BGSK, v_BGSV, seen, scale=scale).flatten(1, 2).unsqueeze(2)


def attend_latents(
    q_BHTC: Tensor, k_BSC: Tensor, v_BSE: Tensor, span: Span, *, scale: float, key_scale_BHS: Tensor | None
) -> Tensor:
    """Outputs [B, H, T, E] of new queries, whose heads read the same keys and values: softmax(scale key_scale q k) v.

    No kernel of torch has a scale of each key and head.
    """
    heads = q_BHTC.shape[1:3]
    scores_BHTS = ((q_BHTC * scale).flatten(1, 2) @ k_BSC.mT).unflatten(1, heads)
    if key_scale_BHS is not None:
        scores_BHTS = scores_BHTS * key_scale_BHS[:, :, None]
    if span.mask.dense is not None:
        scores_BHTS = scores_BHTS.masked_fill(~span.mask.dense, -torch.inf)
    exact = torch.promote_types(scores_BHTS.dtype, torch.float32)
    weights_BHTS = scores_BHTS.softmax(-1, dtype=exact).to(v_BSE.dtype)
    return (weights_BHTS.flatten(1, 2) @ v_BSE).unflatten(1, heads)
