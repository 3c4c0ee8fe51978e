"""The paper's equations once more, in float64 NumPy, written from its text and sharing nothing with the project.

Matrices are [rows out, columns in], so that a map is `W @ x`; a per-head weight is its heads' blocks of rows, stacked.
Slow and literal on purpose: one loop for each index that the paper writes.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Weights = dict[str, Array]
Norm = Callable[[Array], float]

NS_QUINTIC = (3.4445, -4.7750, 2.0315)


def frobenius(matrix: Array) -> float:
    """sqrt of the sum of squares."""
    return math.sqrt(sum(float(x) ** 2 for x in matrix.ravel()))


def spectral(matrix: Array) -> float:
    """The largest singular value, from an SVD."""
    return float(np.linalg.svd(matrix, compute_uv=False)[0])


def cut(matrix: Array, blocks: int) -> list[Array]:
    """The equal blocks of rows, first to last."""
    rows = len(matrix) // blocks
    assert rows * blocks == len(matrix)
    return [matrix[i * rows : (i + 1) * rows] for i in range(blocks)]


def scale_rows(matrix: Array, factors: list[float]) -> Array:
    """Each block of rows times its own factor."""
    return np.concatenate([f * b for f, b in zip(factors, cut(matrix, len(factors)), strict=True)])


# ------------------------------------------------------------------------------------------------ QuacK


def algorithm_1(
    now: Weights, start: Weights, *, n_heads: int, n_kv_heads: int, tau: float, norm: Norm = frobenius
) -> dict[str, list[float]]:
    """lr(W) / eta for W_Q[h] and W_K[g]; a key head's partner is the largest query head of its group."""

    def partners(weights: Weights) -> tuple[list[float], list[float]]:
        q = [norm(block) for block in cut(weights["w_q"], n_heads)]
        k = [norm(block) for block in cut(weights["w_k"], n_kv_heads)]
        group = n_heads // n_kv_heads
        partner_of_q = [k[h // group] for h in range(n_heads)]
        partner_of_k = [max(q[h] for h in range(n_heads) if h // group == g) for g in range(n_kv_heads)]
        return partner_of_q, partner_of_k

    (q_now, k_now), (q_start, k_start) = partners(now), partners(start)
    return {
        "w_q": [tau * n0 / n for n0, n in zip(q_start, q_now, strict=True)],
        "w_k": [tau * n0 / n for n0, n in zip(k_start, k_now, strict=True)],
    }


def mla_factors(weights: Weights, *, n_heads: int, norm: Norm = frobenius) -> dict[str, list[float]]:
    """The six factors of Algorithm 2."""
    uq, uk, qr = ([norm(block) for block in cut(weights[w], n_heads)] for w in ("w_uq", "w_uk", "w_qr"))
    dq, dkv, kr = (norm(weights[w]) for w in ("w_dq", "w_dkv", "w_kr"))
    heads = range(n_heads)
    return {
        "w_uq": [1 / (dq * uk[h] * dkv) for h in heads],
        "w_uk": [1 / (uq[h] * dq * dkv) for h in heads],
        "w_qr": [1 / (dq * kr) for h in heads],
        "w_dq": [min(1 / max(uq[h] * uk[h] * dkv for h in heads), 1 / max(qr[h] * kr for h in heads))],
        "w_dkv": [1 / max(uq[h] * dq * uk[h] for h in heads)],
        "w_kr": [1 / max(qr[h] * dq for h in heads)],
    }


def algorithm_2(
    now: Weights, start: Weights, *, n_heads: int, tau: float, norm: Norm = frobenius
) -> dict[str, list[float]]:
    """lr(W) / eta for the six weights."""
    factor, factor_0 = mla_factors(now, n_heads=n_heads, norm=norm), mla_factors(start, n_heads=n_heads, norm=norm)
    return {name: [tau * f / f0 for f, f0 in zip(factor[name], factor_0[name], strict=True)] for name in factor}


# ------------------------------------------------------------------------------------------------ QK clip


def gammas(max_logits: list[float], threshold: float) -> list[float]:
    """min(1, t / S_max), for positive maxima; 1 for the others, whose logits are far below any threshold."""
    return [min(1.0, threshold / s) if s > 0 else 1.0 for s in max_logits]


def clip_mha(max_logits: list[float], threshold: float) -> dict[str, list[float]]:
    """The factors on W_Q[h] and W_K[h]."""
    gamma = gammas(max_logits, threshold)
    return {"w_q": [math.sqrt(g) for g in gamma], "w_k": [math.sqrt(g) for g in gamma]}


def clip_gqa(max_logits: list[float], threshold: float) -> dict[str, list[float]]:
    """The factors on W_Q[h]; the shared key is left alone."""
    return {"w_q": gammas(max_logits, threshold)}


def clip_mla(max_logits: list[float], threshold: float) -> dict[str, list[float]]:
    """The factors on W_uq[h], W_uk[h] and W_qr[h]; W_kr is shared and left alone."""
    gamma = gammas(max_logits, threshold)
    root = [math.sqrt(g) for g in gamma]
    return {"w_uq": root, "w_uk": root, "w_qr": gamma}


# ------------------------------------------------------------------------------------------------ logits


def turn(x: Array, position: int, theta: float = 10_000.0) -> Array:
    """Rotary position: the pair (x[i], x[i + n/2]) is a complex number, turned by position * theta^(-2i/n)."""
    half = len(x) // 2
    angles = position * theta ** (-2 * np.arange(half) / len(x))
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag])


def mha_logits(x_TD: Array, weights: Weights, *, n_heads: int, n_kv_heads: int) -> Array:
    """[heads, T, T]: (R W_Q[h] x) . (R W_K[g] y) / sqrt(d_head)."""
    q_blocks, k_blocks = cut(weights["w_q"], n_heads), cut(weights["w_k"], n_kv_heads)
    length = len(x_TD)
    out = np.empty((n_heads, length, length))
    for h in range(n_heads):
        w_q, w_k = q_blocks[h], k_blocks[h * n_kv_heads // n_heads]
        for i in range(length):
            for j in range(length):
                out[h, i, j] = turn(w_q @ x_TD[i], i) @ turn(w_k @ x_TD[j], j) / math.sqrt(len(w_q))
    return out


def mla_logits(x_TD: Array, weights: Weights, *, n_heads: int) -> Array:
    """[heads, T, T]: (q_nope . k_nope + q_rope . k_rope) / sqrt(d_head)."""
    uq, uk, qr = (cut(weights[w], n_heads) for w in ("w_uq", "w_uk", "w_qr"))
    length = len(x_TD)
    out = np.empty((n_heads, length, length))
    for h in range(n_heads):
        d_head = len(uq[h]) + len(qr[h])
        for i in range(length):
            for j in range(length):
                latent = weights["w_dq"] @ x_TD[i]
                q_rope, k_rope = turn(qr[h] @ latent, i), turn(weights["w_kr"] @ x_TD[j], j)
                q_nope, k_nope = uq[h] @ latent, uk[h] @ (weights["w_dkv"] @ x_TD[j])
                out[h, i, j] = (q_nope @ k_nope + q_rope @ k_rope) / math.sqrt(d_head)
    return out


def visible_pairs(length: int, documents: list[int] | None = None) -> list[tuple[int, int]]:
    """(query, key) positions: the key is not later, and in the same document."""
    pairs = [(i, j) for i in range(length) for j in range(i + 1)]
    return [(i, j) for i, j in pairs if documents is None or documents[i] == documents[j]]


# ------------------------------------------------------------------------------------------------ optimizers


def newton_schulz(matrix: Array, coefficients: Sequence[tuple[float, float, float]] = (NS_QUINTIC,) * 5) -> Array:
    """Quintic iterations X <- a X + (b A + c A A) X with A = X X^T, from X / |X|_F, on the wide side."""
    x = matrix / frobenius(matrix)
    if len(x) > x.shape[1]:
        x = x.T
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


class Muon:
    """One matrix under Muon; `lr_rows` is a rate for each row."""

    def __init__(self, *, momentum: float = 0.95, nesterov: bool = True, update_scale: str = "jordan") -> None:
        self.momentum, self.nesterov, self.update_scale = momentum, nesterov, update_scale
        self.buffer: Array | float = 0.0

    def step(self, w: Array, gradient: Array, lr_rows: Array, decay_rows: Array) -> Array:
        """The weight after a step; `decay_rows` is learning rate times weight decay for each row."""
        mu = self.momentum
        self.buffer = mu * self.buffer + (1 - mu) * gradient
        direction = (1 - mu) * gradient + mu * self.buffer if self.nesterov else self.buffer
        rows, columns = w.shape
        scale = math.sqrt(max(1, rows / columns)) if self.update_scale == "jordan" else 0.2 * math.sqrt(max(w.shape))
        return w * (1 - decay_rows[:, None]) - lr_rows[:, None] * scale * newton_schulz(direction)


class AdamW:
    """One parameter under AdamW (arXiv 1711.05101)."""

    def __init__(self, *, beta1: float = 0.9, beta2: float = 0.95, eps: float = 1e-8) -> None:
        self.beta1, self.beta2, self.eps = beta1, beta2, eps
        self.first: Array | float = 0.0
        self.second: Array | float = 0.0
        self.steps = 0

    def step(self, w: Array, gradient: Array, lr_rows: Array, decay_rows: Array) -> Array:
        """The weight after a step; `decay_rows` is learning rate times weight decay for each row."""
        self.steps += 1
        self.first = self.beta1 * self.first + (1 - self.beta1) * gradient
        self.second = self.beta2 * self.second + (1 - self.beta2) * gradient**2
        mean = self.first / (1 - self.beta1**self.steps)
        size = np.sqrt(self.second / (1 - self.beta2**self.steps)) + self.eps
        column = (-1,) + (1,) * (w.ndim - 1)
        return w * (1 - decay_rows.reshape(column)) - lr_rows.reshape(column) * mean / size
