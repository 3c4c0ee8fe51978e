"""The forward that all attention variants share.

A variant supplies `project` (x -> q, k, v before rotation) and `logit_paths` (which weights multiply into its logits,
one matrix per symbol in the math). Here they are stabilized, rotated and attended. Axes: B batch, T time, D model
width, H query heads, G key heads, K width of queries and keys, V width of values, 2TF rotary table.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from quack_lm.attention.cache import Entries, Entry, LayerCache, Span, attend_cached
from quack_lm.attention.mask import Mask
from quack_lm.attention.rope import rotate
from quack_lm.attention.scores import Backend, MaxLogitKernel, attend, make_mask, packs_documents
from quack_lm.errors import UserError
from quack_lm.logit_paths import LogitPath


class QueryKeySeam(nn.Module):
    """Where queries and keys get their final form. Stabilizers act here, and the probe listens here."""

    def __init__(self, transform: nn.Module | None) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor, rope_2TF: Tensor) -> tuple[Tensor, Tensor]:
        """Transform, then rotate, so that a learned gain keeps its meaning per dimension."""
        if self.transform is not None:
            q_BHTK, k_BGTK = self.transform(q_BHTK, k_BGTK)
        return rotate(q_BHTK, rope_2TF), rotate(k_BGTK, rope_2TF)


class Attention(nn.Module, ABC):
    """Causal self-attention: [B, T, D] -> [B, T, D].

    `max_logits_H` holds each head's max logit over the training forwards since `reset_max_logits`, if tracked.
    """

    max_logits_H: Tensor
    rope_theta: float
    w_o: nn.Linear
    #: Whether the paths run from the layer's input to the logit with nothing but their factors on the way.
    has_plain_paths: bool = True
    #: Whether decoding keeps full keys and values, also where the attention has a smaller form: for comparisons.
    keeps_keys: bool = False

    def __init__(
        self,
        *,
        n_heads: int,
        qk_width: int,
        rope_width: int,
        backend: Backend,
        make_transform: Callable[[int], nn.Module | None] | None,
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qk_width = qk_width
        self.rope_width = rope_width
        self.backend: Backend = backend
        self.tracks_max_logits = False
        self.max_logit_kernel: MaxLogitKernel = "matmul"
        self.seam = QueryKeySeam(make_transform(qk_width) if make_transform else None)
        self.register_buffer("max_logits_H", torch.full((n_heads,), -torch.inf), persistent=False)

    @abstractmethod
    def project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, K], keys [B, G, T, K] and values [B, G, T, V], before transform and rotation."""

    @abstractmethod
    def logit_paths(self) -> tuple[LogitPath, ...]:
        """Which weights multiply into the logits, head by head."""

    @property
    def head_width(self) -> int:
        """The larger width of a head: of its queries and keys, or of its values."""
        return max(self.qk_width, self.w_o.in_features // self.n_heads)

    @property
    def wants_max_logits(self) -> bool:
        """Whether a forward keeps its maxima: those of validation and probe are not what a clip is decided on."""
        return self.tracks_max_logits and self.training

    def make_mask(self, x_BTD: Tensor, documents_BT: Tensor | None, n_documents: int | None = None) -> Mask:
        """The mask that `forward` reads with inputs like x, in this and all other layers."""
        return make_mask(
            self.backend,
            length=x_BTD.shape[1],
            documents_BT=documents_BT,
            device=x_BTD.device,
            n_documents=n_documents,
            packs_documents=packs_documents(self.backend, x_BTD, self.head_width),
            max_logits=self.max_logit_kernel if self.wants_max_logits else "matmul",
        )

    def forward(self, x_BTD: Tensor, rope_2TF: Tensor, mask: Mask) -> Tensor:
        """Project, stabilize and rotate, attend, project out."""
        q, k, v = self.project(x_BTD)
        q, k = self.seam(q, k, rope_2TF)
        out_BHTV, max_H = attend(q, k, v, mask=mask, backend=self.backend, want_max=self.wants_max_logits)
        if max_H is not None:
            # Maximum, not mean: activation recomputation may report a head twice, and a maximum does not mind.
            self.max_logits_H.copy_(torch.maximum(self.max_logits_H, max_H))
        return self.w_o(out_BHTV.transpose(1, 2).flatten(2))

    # ------------------------------------------------------------------------------------------------ decoding

    def cache_entries(self) -> Entries:
        """What a token leaves in the cache of a layer: here its input, from which `decode` computes all again."""
        return {"input": Entry(self.w_o.out_features)}

    def decode(self, x_BTD: Tensor, span: Span, cache: LayerCache) -> Tensor:
        """`forward` for new tokens behind those in the cache, [B, T, D]; the new ones are added to it.

        This default is right for every causal attention, and slow; `keys_and_values` and `decode_with_keys` are faster,
        for one whose forward is the one above and which projects each token by itself.
        """
        (x_B1SD,) = cache.append(input=x_BTD[:, None])
        x_BSD = x_B1SD[:, 0]
        return self.forward(x_BSD, span.rope, self.make_mask(x_BSD, span.mask.documents_BT))[:, span.start :]

    def keys_and_values(self, n_heads: int, v_width: int) -> Entries:
        """The entries of `decode_with_keys`, for `n_heads` key heads."""
        return {"keys": Entry(self.qk_width, n_heads), "values": Entry(v_width, n_heads)}

    def decode_with_keys(self, x_BTD: Tensor, span: Span, cache: LayerCache) -> Tensor:
        """`decode` with a cache of stabilized and rotated keys, and of values."""
        q, k, v = self.project(x_BTD)
        q, k = self.seam(q, k, span.new_rope)
        k, v = cache.append(keys=k, values=v)
        if span.start:
            out_BHTV = attend_cached(q, k, v, span)
        else:
            out_BHTV, _ = attend(q, k, v, mask=span.mask, backend=self.backend)
        return self.w_o(out_BHTV.transpose(1, 2).flatten(2))


def even_split(d_model: int, n_heads: int) -> int:
    """The head dimension d_model / n_heads; UserError if that is no integer."""
    if d_model % n_heads:
        raise UserError(
            f"attention.n_heads={n_heads} must divide model.d_model={d_model}, or set the head dimensions of attention"
        )
    return d_model // n_heads


def split_heads(x_BTE: Tensor, n_heads: int) -> Tensor:
    """[B, T, heads * width] -> [B, heads, T, width]."""
    return x_BTE.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def linear(d_in: int, d_out: int) -> nn.Linear:
    """A linear map without bias: [.., d_in] -> [.., d_out]."""
    return nn.Linear(d_in, d_out, bias=False)
