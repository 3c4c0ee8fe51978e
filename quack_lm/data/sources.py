"""The prepared data sets that a run reads: one, or several with weights, which are of one tokenizer."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

from quack_lm.data.batches import SequenceMixture
from quack_lm.data.manifest import TOKENIZER, Manifest, SplitName, TokenData
from quack_lm.data.settings import DataSettings
from quack_lm.errors import UserError

# Of a tokenizer's directory, by the ends of their names.
LOADING = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class DataSources:
    """The data sets, with the weight and the name of each, by which the log calls it."""

    sets: list[TokenData]
    weights: list[Fraction]
    names: list[str]

    @classmethod
    def open(cls, settings: DataSettings) -> Self:
        """The data sets of a config, not yet verified by checksum; UserError where one is missing or damaged, or does
        not have the tokens of the others."""
        paths = [Path(directory) for directory in settings.directories]
        key, choice = settings.key, settings.choice
        sets = [TokenData.open(path, verify_checksums=False, key=key, choice=choice) for path in paths]
        first = sets[0]
        for other in sets[1:]:
            for key, of_first, of_other in (
                ("vocab_size", first.manifest.vocab_size, other.manifest.vocab_size),
                ("eot_id", first.manifest.eot_id, other.manifest.eot_id),
                ("tokenizer", _vocabulary(first), _vocabulary(other)),
            ):
                if of_first != of_other:
                    known = first if of_first else other
                    raise UserError(
                        f"data.dirs: {first.directory} and {other.directory} differ in their {key}; prepare one of "
                        f"them again with data.tokenizer={known.directory / TOKENIZER}"
                    )
        weights = settings.weights_of([data.manifest.splits.train.tokens for data in sets])
        return cls(sets, weights, _names(paths))

    @property
    def directory(self) -> Path:
        """The directory of the first, whose tokenizer is that of all."""
        return self.sets[0].directory

    @property
    def manifest(self) -> Manifest:
        """The manifest of the first: vocabulary, end-of-text token and tokenizer are those of all."""
        return self.sets[0].manifest

    @property
    def manifest_sha256(self) -> str:
        """What identifies the data: the sha256 of the manifest, or of those of all data sets in order."""
        return sha256_of_all([data.manifest_sha256 for data in self.sets])

    @property
    def unigram_entropy(self) -> float:
        """Nats per token of a model that knows each data set's frequencies of tokens, and from which a sequence is."""
        entropies = [data.manifest.unigram_entropy for data in self.sets]
        return float(sum(w * h for w, h in zip(map(float, self.shares), entropies, strict=True)))

    @property
    def shares(self) -> list[Fraction]:
        """The weights, which sum to 1."""
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def train_tokens(self) -> int:
        """The tokens of all train splits together."""
        return sum(data.manifest.splits.train.tokens for data in self.sets)

    def val_tokens_per_byte(self, sequences_of: Sequence[int]) -> dict[str, float]:
        """Tokens per byte of text, by the ends of the names of metrics: "" for a validation on so many sequences of
        each data set, "/NAME" for one of them; those that are unknown are left out."""
        ratios = [data.manifest.splits.val.tokens_per_byte for data in self.sets]
        found = {f"/{name}": ratio for name, ratio in zip(self.names, ratios, strict=True) if ratio is not None}
        if len(found) == len(self.sets):
            # The sequences are a part of the splits, whose bytes are taken to be in proportion to their tokens.
            n_bytes = sum(n / ratio for n, ratio in zip(sequences_of, found.values(), strict=True))
            found[""] = sum(sequences_of) / n_bytes
        return found

    @property
    def n_bytes(self) -> int:
        """The size of all shards together."""
        return sum(data.n_bytes for data in self.sets)

    def verify_checksums(self) -> None:
        """Read every byte of the shards; UserError at the first that is not what its manifest says."""
        for data in self.sets:
            data.verify_checksums()

    def sequences(self, split: SplitName, seq_len: int) -> SequenceMixture:
        """The sequences of a split, memory-mapped; UserError where a data set's is shorter than one."""
        return SequenceMixture([data.sequences(split, seq_len) for data in self.sets], self.weights, self.names)

    def description(self) -> dict[str, Any]:
        """What a run writes down of its data: for each data set where it is from, and what identifies it."""
        return {
            name: {
                "made_of": _made_of(data.manifest.source),
                "share": float(share),
                "train_tokens": data.manifest.splits.train.tokens,
                "tokenizer": data.manifest.tokenizer.name,
                "manifest_sha256": data.manifest_sha256,
                "source": data.manifest.source,
            }
            for name, share, data in zip(self.names, self.shares, self.sets, strict=True)
        }


def sha256_of_all(manifests: Sequence[str]) -> str:
    """What identifies data sets together, by the sha256 of the manifest of each."""
    return manifests[0] if len(manifests) == 1 else hashlib.sha256("\n".join(manifests).encode()).hexdigest()


def _vocabulary(data: TokenData) -> dict[str, str]:
    """The sha256 of the files that decide which ids a text has; the others say how the tokenizer was loaded, too."""
    return {name: digest for name, digest in data.manifest.tokenizer.files.items() if not name.endswith(LOADING)}


def _made_of(source: dict[str, Any]) -> str:
    told = [f"{key}={source[key]}" for key in ("name", "subset", "split", "revision", "files") if source.get(key)]
    return " ".join([str(source.get("corpus")), *told])


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of the paths that tell them apart, as names of metrics may have them."""
    parts = [path.absolute().parts for path in paths]
    for n_last in range(1, max(map(len, parts)) + 1):
        names = [re.sub(r"[^\w.-]+", "_", "_".join(own[-n_last:])) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name}_{number}" for number, name in enumerate(names)]
