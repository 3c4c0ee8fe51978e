"""Which flash-attn computes attention on this card: 4 (`flash_attn.cute`), 3 (through `kernels`), or 2.

All of them take queries, keys and values as [B, T, heads, width], or [tokens, heads, width] with the cuts between
documents.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from quack_lm.errors import UserError

# The distribution that brings each version, newest version first.
DISTRIBUTIONS = {4: "flash-attn-4", 3: "kernels", 2: "flash-attn"}
# What `kernels` downloads from the Hugging Face Hub and runs: this repository, in the major version of its interface.
HUB_KERNEL, HUB_VERSION = "kernels-community/flash-attn3", 1
# The multiple that the kernels want head widths to be of.
WIDTH_MULTIPLE = 8


@dataclass(frozen=True)
class FlashAttention:
    """One version's functions: of equally long sequences, and of documents in a row.

    Those of versions 3 and 4 are no operators of torch, so compiled blocks call them uncompiled.
    """

    version: int
    dense: Callable[..., Any]
    packed: Callable[..., Any]


def padded_width(head_width: int) -> int:
    """The width that heads are filled up to with zeros, which change no logit."""
    return -(-head_width // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def newest_version(installed: Collection[int], capability: tuple[int, int], head_width: int) -> int | None:
    """The newest installed version with kernels, forward and backward, for a card and a width; None if there is none.

    On Blackwell version 4 is used up to 128 dimensions, everything else up to 256; version 3 is for Hopper alone. None
    is for AMD's cards, whose capabilities have the same numbers.
    """
    if torch.version.hip:
        return None
    major = capability[0]
    widest = {
        4: {9: 256, 10: 128}.get(major, 0),
        3: 256 if major == 9 else 0,
        2: 256 if major >= 8 else 0,
    }
    return max((one for one in installed if head_width <= widest[one]), default=None)


def installed_versions() -> set[int]:
    """The versions whose distribution is installed: a folder `flash_attn` alone may be that of 4 or of 2."""
    return {number for number, name in DISTRIBUTIONS.items() if _is_installed(name)}


def is_available(head_width: int) -> bool:
    """Whether an installed version has kernels for this machine's card and heads of this width."""
    return newest_version(installed_versions(), torch.cuda.get_device_capability(), head_width) is not None


# By the width of heads. Not functools.cache, through which torch.compile would trace the imports.
LOADED: dict[int, FlashAttention] = {}


def load(head_width: int) -> FlashAttention:
    """The version for this machine's card and heads of this width, imported; UserError where none can be.

    To be called once before a forward that is compiled.
    """
    if head_width not in LOADED:
        LOADED[head_width] = _load(head_width)
    return LOADED[head_width]


def _load(head_width: int) -> FlashAttention:
    installed = installed_versions()
    number = newest_version(installed, torch.cuda.get_device_capability(), head_width)
    if number is None:
        raise UserError(
            f"attention.backend=flash: no installed flash-attn ({', '.join(DISTRIBUTIONS[n] for n in installed)}) has "
            f"kernels for heads of {head_width} dimensions on {torch.cuda.get_device_name()}; use "
            "attention.backend=sdpa"
        )
    return load_version(number)


def load_version(number: int) -> FlashAttention:
    """Import a version; UserError where it does not import."""
    try:
        functions = _functions(number)
        return FlashAttention(number, *(functions if number == 2 else map(torch.compiler.disable, functions)))
    except Exception as error:  # of any kind: a missing symbol, no network, no build for this version of torch
        raise UserError(
            f"attention.backend=flash: {DISTRIBUTIONS[number]} does not load ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); reinstall it, or use attention.backend=sdpa"
        ) from error


def _functions(number: int) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if number == 4:
        from flash_attn.cute import flash_attn_func, flash_attn_varlen_func
    elif number == 3:
        from kernels import get_kernel

        kernel = get_kernel(HUB_KERNEL, version=HUB_VERSION)
        flash_attn_func, flash_attn_varlen_func = kernel.flash_attn_func, kernel.flash_attn_varlen_func
    else:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    return flash_attn_func, flash_attn_varlen_func


def _is_installed(distribution: str) -> bool:
    try:
        return bool(version(distribution))
    except PackageNotFoundError:
        return False
