"""The `data` section of a config: how every choice of data is read, and mixtures of several data sets."""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveFloat

from quack_lm.data.manifest import read_manifest
from quack_lm.errors import UserError

# The library that trains a tokenizer allocates all of it at once.
VocabSize = Annotated[int, Field(gt=0, le=10_000_000)]


@dataclass(frozen=True, kw_only=True)
class DataSettings(ABC):
    """What training needs of any choice of data: prepared directories, and how they are read.

    Args:
        mask_documents: whether attention stays within a document.
        verify_checksums: whether each start of a run reads all shards and compares their checksums.
    """

    choice: ClassVar[str]  # the `data=` that prepares one
    key: ClassVar[str] = "data.dir"  # what names the directories

    mask_documents: bool = False
    verify_checksums: bool = True

    @property
    @abstractmethod
    def directories(self) -> list[str]:
        """The prepared data sets that are read."""

    @abstractmethod
    def weights_of(self, train_tokens: Sequence[int]) -> list[Fraction]:
        """The weight of each in the training sequences, where they have so many training tokens."""

    @classmethod
    @abstractmethod
    def as_prepared(cls, section: dict[str, Any], explicit: Collection[str]) -> dict[str, Any]:
        """A section of a config as the manifests in its directories have it; the section where there are none.

        UserError where one of the `explicit` keys, which somebody has typed, says otherwise than a manifest.
        """


@dataclass(frozen=True, kw_only=True)
class Mixture(DataSettings):
    """Several prepared data sets of one tokenizer, in one order in which each has its share of the sequences.

    Args:
        dirs: directories of the prepared data sets.
        weights: share of each in the training sequences, in any unit; null: their training tokens.
        vocab_size: size of the vocabulary; null: that of the data sets.
    """

    choice = "..."
    key = "data.dirs"

    # No more, so that the largest share of a block is not below what rounding the others may leave for it.
    dirs: Annotated[list[str], Field(min_length=1, max_length=64)]
    weights: list[PositiveFloat] | None = None
    vocab_size: VocabSize | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dirs", [os.path.expanduser(path) for path in self.dirs])
        places = [os.path.realpath(path) for path in self.dirs]
        if len(set(places)) < len(places):
            twice = next(path for path, place in zip(self.dirs, places, strict=True) if places.count(place) > 1)
            raise UserError(f"data.dirs has {twice} twice: give each data set once, and its share in data.weights")
        if self.weights is not None and len(self.weights) != len(self.dirs):
            raise UserError(
                f"data.weights={self.weights} must have one weight for each of the {len(self.dirs)} data.dirs"
            )

    @property
    def directories(self) -> list[str]:
        return self.dirs

    def weights_of(self, train_tokens: Sequence[int]) -> list[Fraction]:
        # A weight is the decimal number that was typed: 0.7 is seven tenths.
        return [Fraction(str(weight)) for weight in self.weights or train_tokens]

    @classmethod
    def as_prepared(cls, section: dict[str, Any], explicit: Collection[str]) -> dict[str, Any]:
        dirs, typed = section.get("dirs"), section.get("vocab_size")
        if not isinstance(dirs, list) or not dirs or not all(isinstance(path, str) for path in dirs):
            raise UserError("data.dirs must be a list of prepared data sets, like 'data.dirs=[data/web,data/code]'")
        made = read_manifest(Path(os.path.expanduser(dirs[0])), key=cls.key)[0].vocab_size
        if "vocab_size" in explicit and typed not in (None, made):
            raise UserError(f"data.dirs: {dirs[0]} was made with data.vocab_size={made}, not {typed}")
        return {**section, "vocab_size": made}
