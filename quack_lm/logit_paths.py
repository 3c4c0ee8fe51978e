"""Which weights multiply into an attention logit, head by head: pure arithmetic on names, norms and heads.

A logit is a sum over *paths*; a path is a product of *factors*; a factor is a linear map inside the attention, used
whole by every head or cut into equal blocks of rows, one for each head or group of heads (PAPER.md, "Both algorithms
are one rule"). Attentions declare their paths; stabilizers compute from them and never see an attention or a sharded
weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Factor:
    """A linear map whose output enters a logit."""

    weight: str  # attribute name of the map inside the attention, such as "w_uq"
    heads: int | None = None  # equal blocks of rows: n_heads or n_kv_heads; None where every head uses the whole matrix

    @property
    def blocks(self) -> int:
        """The number of blocks of rows that norms and scales are taken over."""
        return self.heads or 1


@dataclass(frozen=True)
class LogitPath:
    """A product of factors that is one part of every logit."""

    name: str
    factors: tuple[Factor, ...]


def declared_weights(paths: tuple[LogitPath, ...]) -> dict[str, int]:
    """Each declared weight with its number of blocks."""
    return {factor.weight: factor.blocks for path in paths for factor in path.factors}


def count_heads(paths: tuple[LogitPath, ...]) -> int:
    """The number of query heads: every path has a factor that is cut into them."""
    return max(factor.blocks for path in paths for factor in path.factors)


def per_head(blocks_LB: Tensor, n_heads: int) -> Tensor:
    """[layers, blocks] -> [layers, n_heads]: what each head reads from its block."""
    return blocks_LB.repeat_interleave(n_heads // blocks_LB.shape[-1], dim=-1)


def largest_per_block(heads_LH: Tensor, blocks: int) -> Tensor:
    """[layers, n_heads] -> [layers, blocks]: the largest value among the heads that share a block."""
    return heads_LH.unflatten(-1, (blocks, -1)).amax(-1)


def largest_partner_product(paths: tuple[LogitPath, ...], norms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """For each declared weight the largest product of its partners' norms over the paths and heads it takes part in.

    `norms[weight]` is [layers, blocks]; so is each result. Its inverse is QuacK's factor (Algorithms 1 and 2).
    """
    n_heads = count_heads(paths)
    largest: dict[str, Tensor] = {}
    for path in paths:
        for factor in path.factors:
            product = None
            for partner in path.factors:
                if partner is not factor:
                    norm_LH = per_head(norms[partner.weight], n_heads)
                    product = norm_LH if product is None else product * norm_LH
            assert product is not None, f"path {path.name} has a single factor"
            product = largest_per_block(product, factor.blocks)
            known = largest.get(factor.weight)
            largest[factor.weight] = product if known is None else known.maximum(product)
    return largest


def largest_change_of_product(
    paths: tuple[LogitPath, ...], norms: Mapping[str, Tensor], changes: Mapping[str, Tensor]
) -> Tensor:
    """How much a change of the weights by these norms can change the product along the paths, at most: [layers, heads].

        sum over paths of  prod(norm + change) - prod(norm)

    For two factors this is Lemma 1: |W_Q| |dW_K| + |dW_Q| |W_K| + |dW_Q| |dW_K|, for inputs of norm one.
    """
    n_heads = count_heads(paths)
    total = None
    for path in paths:
        before = after = None
        for factor in path.factors:
            norm_LH = per_head(norms[factor.weight], n_heads)
            grown_LH = norm_LH + per_head(changes[factor.weight], n_heads)
            before = norm_LH if before is None else before * norm_LH
            after = grown_LH if after is None else after * grown_LH
        assert before is not None
        assert after is not None
        total = after - before if total is None else total + after - before
    assert total is not None
    return total
