"""A Qwen3-style decoder: RMSNorm, rotary positions, SwiGLU, no biases. Any attention fits in.

Built on the meta device, sharded, materialized, then initialized: nothing a constructor computes survives that.
Axes: B batch, T time, D model width, V vocabulary.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from quack_lm.attention.base import Attention, linear
from quack_lm.attention.cache import Cache, LayerCache, Span
from quack_lm.attention.mask import Mask, count_documents, number_documents
from quack_lm.attention.rope import rope_table
from quack_lm.loss import LossChunk, cross_entropy
from quack_lm.rms_norm import RMSNorm

# Which activations of a block the backward recomputes: none, all, or all but the results of `KEPT_BY_SELECTIVE`.
ActivationCheckpointing = bool | Literal["selective"]

# The product with a weight, and attention by each backend, but for flash-attn 3 and 4, which are no operators of torch;
# not `bmm`, whose results grow with the square of the length.
KEPT_BY_SELECTIVE = {
    "aten::mm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "torch_attn::_varlen_attn",
    "flex_attention",
    "inductor_compiled_code",
}


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a decoder and of its initialization.

    Args:
        vocab_size: rows of the embedding; the configs take the data's.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: number of query heads, which the attention configs refer to.
        d_ff: width of the SwiGLU layer.
        tied_embeddings: whether the output head is the embedding matrix.
        norm_eps: epsilon of every RMSNorm outside the attention.
        init_std: standard deviation of the initial hidden matrices; residual projections divide it by
            sqrt(2 n_layers).
        embedding_std: standard deviation of the initial embedding and head.
    """

    vocab_size: PositiveInt
    d_model: PositiveInt
    # Each is built before anything can run out of memory: a slip of the finger must not take hours.
    n_layers: Annotated[int, Field(gt=0, le=1000)]
    n_heads: PositiveInt
    d_ff: PositiveInt
    tied_embeddings: bool = True
    norm_eps: PositiveFloat = 1e-6
    init_std: PositiveFloat = 0.02
    embedding_std: PositiveFloat = 0.02


class Transformer(nn.Module):
    """Tokens [B, T] -> logits [B, T, V], or the cross-entropy of given targets.

    `eot_id` turns on document masking. `loss_chunk` bounds the tokens whose vocabulary logits exist at once.
    """

    def __init__(
        self,
        sizes: ModelSizes,
        make_attention: Callable[[], Attention],
        *,
        eot_id: int | None = None,
        activation_checkpointing: ActivationCheckpointing = False,
        loss_chunk: LossChunk = None,
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.eot_id = eot_id
        self.loss_chunk = loss_chunk
        self.is_compiled = False
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.d_model)
        self.blocks = nn.ModuleList(
            Block(sizes, make_attention(), activation_checkpointing) for _ in range(sizes.n_layers)
        )
        self.norm = RMSNorm(sizes.d_model, eps=sizes.norm_eps)
        self.head = None if sizes.tied_embeddings else linear(sizes.d_model, sizes.vocab_size)

    @property
    def attentions(self) -> list[Attention]:
        """The attention of each layer."""
        return [block.attention for block in self.blocks]  # type: ignore[misc]

    @property
    def head_weight(self) -> Tensor:
        """The matrix of the output layer, [V, D]."""
        return self.embedding.weight if self.head is None else self.head.weight

    def count_documents(self, tokens_BT: Tensor) -> int | None:
        """How many documents the attention tells apart in tokens on the host; None where it does not."""
        return None if self.eot_id is None else count_documents(tokens_BT, self.eot_id)

    def forward(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor | None = None,
        n_documents: int | None = None,
        *,
        with_head: bool = True,
    ) -> Tensor:
        """Logits [B, T, V]; with targets the cross-entropy of each token, [B * T], in nats and float32.

        Without the head: its input, [B, T, D]. With the tokens' `count_documents`, no GPU is asked for it.
        """
        documents = None if self.eot_id is None else number_documents(tokens_BT, self.eot_id)
        x_BTD = self.hidden(tokens_BT, documents, n_documents)
        if not with_head:
            return x_BTD
        if targets_BT is None:
            return self.logits(x_BTD)
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        return cross_entropy(x_ND, self.head_weight, targets_N, self.loss_chunk, is_compiled=self.is_compiled)

    def hidden(self, tokens_BT: Tensor, documents_BT: Tensor | None, n_documents: int | None = None) -> Tensor:
        """What the head reads, [B, T, D]; attention stays within the given numbers of documents, if any."""
        first = self.attentions[0]
        rope = rope_table(tokens_BT.shape[1], first.rope_width, theta=first.rope_theta, device=tokens_BT.device)
        x = self.embedding(tokens_BT)
        mask = first.make_mask(x, documents_BT, n_documents)
        for block in self.blocks:
            x = block(x, rope, mask)
        return self.norm(x)

    def logits(self, x_BTD: Tensor) -> Tensor:
        """The head's logits [B, T, V] of what it reads."""
        return F.linear(x_BTD, self.head_weight)

    def make_cache(self, batch: int, capacity: int, *, pads_B: Tensor | None = None) -> Cache:
        """An empty cache for `batch` sequences of at most `capacity` tokens, the first `pads_B` of which only fill."""
        first, weight = self.attentions[0], self.embedding.weight
        return Cache(
            [attention.cache_entries() for attention in self.attentions],
            rope_width=first.rope_width,
            rope_theta=first.rope_theta,
            batch=batch,
            capacity=capacity,
            dtype=weight.dtype,
            device=weight.device,
            pads_B=pads_B,
            eot_id=self.eot_id,
        )

    @torch.no_grad()
    def decode(self, tokens_BT: Tensor, cache: Cache, *, n_logits: int = 1) -> Tensor:
        """Logits of the last `n_logits` of new tokens behind those in the cache, [B, n_logits, V]; extends the cache.

        As `forward` of all tokens so far computes them, but for rounding.
        """
        span, x = cache.extend(tokens_BT), self.embedding(tokens_BT)
        if not span.start:
            span = replace(span, mask=self.attentions[0].make_mask(x, span.mask.documents_BT))
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block.decode(x, span, layer)  # type: ignore[operator]
        return self.logits(self.norm(x[:, -n_logits:]))

    def compile_parts(self) -> None:
        """torch.compile each block, and the loss: parts, because between them FSDP gathers weights."""
        self.is_compiled = True
        for block in self.blocks:
            block.compile()

    def initial_value(self, name: str, shape: torch.Size, *, seed: int, device: torch.device) -> Tensor:
        """The whole initial value of a parameter: a function of its name, the seed and the type of device alone.

        So the same matrix starts equal for every stabilizer, attention, world size and sharding.
        """
        if name.endswith("norm.weight"):
            return torch.ones(shape, device=device)
        std = self.sizes.init_std
        if name.startswith(("embedding.", "head.")):
            std = self.sizes.embedding_std
        elif name.endswith(("w_o.weight", "w_down.weight")):
            std /= math.sqrt(2 * self.sizes.n_layers)  # two residual additions per layer
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.empty(shape, device=device).normal_(0, std, generator=generator)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    `activation_checkpointing` trades a second forward for activation memory; `selective` repeats all but its products.
    """

    def __init__(
        self, sizes: ModelSizes, attention: Attention, activation_checkpointing: ActivationCheckpointing = False
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.attention_norm = RMSNorm(sizes.d_model, eps=sizes.norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(sizes.d_model, eps=sizes.norm_eps)
        self.mlp = SwiGLU(sizes.d_model, sizes.d_ff)

    def forward(self, x_BTD: Tensor, rope_2TF: Tensor, mask: Mask) -> Tensor:
        """[B, T, D] -> [B, T, D], with checkpointed activations if asked for."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Nothing in a block is random, so there is no generator state to restore.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
            if self.activation_checkpointing == "selective":
                options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
            return checkpoint(self._layer, x_BTD, rope_2TF, mask, **options)
        return self._layer(x_BTD, rope_2TF, mask)

    def _layer(self, x_BTD: Tensor, rope_2TF: Tensor, mask: Mask) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), rope_2TF, mask)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))

    def decode(self, x_BTD: Tensor, span: Span, cache: LayerCache) -> Tensor:
        """`forward` for new tokens behind those in the cache."""
        x_BTD = x_BTD + self.attention.decode(self.attention_norm(x_BTD), span, cache)
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


def _keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    is_kept = operator.name().partition(".")[0] in KEPT_BY_SELECTIVE
    return CheckpointPolicy.MUST_SAVE if is_kept else CheckpointPolicy.PREFER_RECOMPUTE


class SwiGLU(nn.Module):
    """w_down(silu(w_gate x) * w_up x) (arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.w_gate = linear(d_model, d_ff)
        self.w_up = linear(d_model, d_ff)
        self.w_down = linear(d_ff, d_model)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]; positions do not interact."""
        return self.w_down(F.silu(self.w_gate(x_BTD)) * self.w_up(x_BTD))


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by component: embedding, each kind of attention weight, mlp, norms, head, and their `total`."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        parts = [part for part in name.split(".") if not part.isdigit() and part not in ("blocks", "weight")]
        component = "norms" if parts[-1].endswith("norm") else ".".join(parts)
        counts[component] = counts.get(component, 0) + parameter.numel()
    return {**counts, "total": sum(counts.values())}
