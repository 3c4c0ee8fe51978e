"""A prepared data set: the schema of its manifest, and the checks of its files against it.

<data.dir>/
    manifest.json                 counts, vocabulary, tokenizer, settings, and the sha256 of every file
    train_00000.bin ...           raw little-endian token ids; also val_*, probe_*
    tokenizer/                    the tokenizer that made the ids, as transformers saves it, where it is known
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from quack_lm.data.batches import Sequences
from quack_lm.errors import UserError, explained
from quack_lm.files import allow_open_files, file_sha256, file_sha256s, relative_note
from quack_lm.text import shell_line

FORMAT_VERSION: Literal[1] = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer"
UNKNOWN = "unknown"  # the name of the tokenizer of tokens that came without one

# A manifest is untrusted: its names stay inside the directory.
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_\-][A-Za-z0-9_.\-]*$")]
Count = Annotated[int, Field(gt=0, lt=2**63)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SplitName = Literal["train", "val", "probe"]
SPLITS: tuple[SplitName, ...] = ("train", "val", "probe")


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class Shard(_Strict):
    """One file of raw little-endian token ids."""

    file: FileName
    tokens: Count
    sha256: Sha256


class Split(_Strict):
    """The shards of one split, in order; `text_bytes` are those of its documents in UTF-8, None where unknown."""

    tokens: Count
    documents: Count
    text_bytes: Count | None = None  # unknown in manifests of earlier versions, and of tokens made elsewhere
    shards: list[Shard]

    @model_validator(mode="after")
    def _counts_agree(self) -> Self:
        if self.tokens != sum(shard.tokens for shard in self.shards):
            raise ValueError("tokens is not the sum of its shards' tokens")
        return self

    @property
    def tokens_per_byte(self) -> float | None:
        """Tokens, end-of-text tokens included, per byte of text; None where the bytes are unknown."""
        return self.tokens / self.text_bytes if self.text_bytes else None


class Splits(_Strict):
    """The three splits; no document is in two of them."""

    train: Split
    val: Split
    probe: Split


class TokenizerFiles(_Strict):
    """Which tokenizer made the ids, and the files of its copy in `tokenizer/`; none of an UNKNOWN one."""

    name: str
    files: dict[FileName, Sha256]

    @model_validator(mode="after")
    def _is_there(self) -> Self:
        if not self.files and self.name != UNKNOWN:
            raise ValueError("files must have those of the tokenizer")
        return self


class Manifest(_Strict):
    """What a prepared data set contains; `unigram_entropy` is that of the train split, in nats per token."""

    format_version: Literal[1]
    vocab_size: PositiveInt
    eot_id: NonNegativeInt
    dtype: Literal["uint16", "uint32"]
    unigram_entropy: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    tokenizer: TokenizerFiles
    splits: Splits
    source: dict[str, Any]

    @model_validator(mode="after")
    def _ids_fit(self) -> Self:
        if self.eot_id >= self.vocab_size:
            raise ValueError("eot_id is not below vocab_size")
        if self.vocab_size > 2 ** (8 * self.token_dtype.itemsize):
            raise ValueError("dtype is too small for vocab_size")
        return self

    @property
    def token_dtype(self) -> np.dtype[Any]:
        """The dtype of the ids in the shards, little-endian on any machine."""
        return np.dtype(self.dtype).newbyteorder("<")

    def split(self, name: SplitName) -> Split:
        """The split of this name."""
        split: Split = getattr(self.splits, name)
        return split


@dataclass(frozen=True)
class TokenData:
    """A prepared data set whose files have been checked against its manifest."""

    directory: Path
    manifest: Manifest
    manifest_sha256: str

    @classmethod
    def open(
        cls, directory: Path, *, verify_checksums: bool = True, key: str = "data.dir", choice: str = "..."
    ) -> Self:
        """Read and check a data set; without checksums, shards are still checked for their size.

        UserError where it is missing or damaged, which names the key and suggests `quack-lm prepare data=CHOICE`.
        """
        manifest, digest = read_manifest(directory, key=key, choice=choice)
        check_tokenizer(directory, manifest)
        _check_sizes(directory, manifest)
        data = cls(directory, manifest, digest)
        if verify_checksums:
            data.verify_checksums()
        return data

    def verify_checksums(self) -> None:
        """Read every byte of the shards; UserError at the first that is not what the manifest says."""
        _check_bytes(self.directory, self.manifest)

    @property
    def n_bytes(self) -> int:
        """The size of all shards together."""
        return sum(self.manifest.split(name).tokens for name in SPLITS) * self.manifest.token_dtype.itemsize

    def sequences(self, split: SplitName, seq_len: int) -> Sequences:
        """The sequences of a split, memory-mapped; UserError where it is shorter than one."""
        tokens = self.manifest.split(split).tokens
        if tokens < seq_len + 1:
            raise UserError(
                f"trainer.seq_len={seq_len} is too long for the {split} split of {self.directory}, which has {tokens} "
                f"tokens: set trainer.seq_len to at most {tokens - 1} or prepare more data"
            )
        shards = self.manifest.split(split).shards
        files = [self.directory / shard.file for shard in shards]
        allow_open_files(len(files))  # Python keeps the file of each mapping open
        mapped = [np.memmap(file, dtype=self.manifest.token_dtype, mode="r") for file in files]
        return Sequences(list(mapped), seq_len, files=files)


def read_manifest(directory: Path, *, key: str = "data.dir", choice: str = "...") -> tuple[Manifest, str]:
    """The checked manifest of a data set and the sha256 of its file."""
    command = shell_line(["quack-lm", "prepare", f"data={choice}", f"data.dir={directory}"])
    settings = "this run's data settings" if key == "data.dir" else "the data.tokenizer of the others"
    path = directory / MANIFEST
    try:
        _refuse_link_out(directory, path)
        raw = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{key}: no prepared data in {directory}{relative_note(directory)}, {MANIFEST} is missing; create it "
            f"with {settings}, for example: {command}"
        ) from None
    except OSError as error:
        raise UserError(explained(error, key)) from None
    try:
        manifest = Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise damaged(directory, path, f"{where}: {first['msg']}" if where else first["msg"]) from None
    return manifest, hashlib.sha256(raw).hexdigest()


def check_tokenizer(directory: Path, manifest: Manifest) -> None:
    """UserError where the tokenizer of a data set is not the one of its manifest."""
    folder = directory / TOKENIZER
    expected = manifest.tokenizer.files
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    for name in sorted(expected.keys() | present):
        if name not in present:
            raise damaged(directory, folder / name, "the file is missing")
        if name not in expected:
            raise damaged(directory, folder / name, "the manifest does not know this file")
        _refuse_link_out(directory, folder / name)
        if not (folder / name).is_file() or file_sha256(folder / name) != expected[name]:
            raise damaged(directory, folder / name, "its sha256 is not that of the manifest")


def _check_sizes(directory: Path, manifest: Manifest) -> None:
    for shard in _all_shards(manifest):
        path = directory / shard.file
        size = shard.tokens * manifest.token_dtype.itemsize
        _refuse_link_out(directory, path)
        if not path.is_file():
            raise damaged(directory, path, "the shard is missing")
        if path.stat().st_size != size:
            raise damaged(directory, path, f"it has {path.stat().st_size} bytes, the manifest says {size}")


def _check_bytes(directory: Path, manifest: Manifest) -> None:
    shards = _all_shards(manifest)
    paths = [directory / shard.file for shard in shards]
    for shard, path, digest in zip(shards, paths, file_sha256s(paths), strict=True):
        if digest != shard.sha256:
            raise damaged(directory, path, "its sha256 is not that of the manifest")
        if np.memmap(path, dtype=manifest.token_dtype, mode="r").max() >= manifest.vocab_size:
            raise damaged(directory, path, "it has tokens beyond the vocabulary")


def _all_shards(manifest: Manifest) -> list[Shard]:
    return [shard for split in SPLITS for shard in manifest.split(split).shards]


def _refuse_link_out(directory: Path, path: Path) -> None:
    """An untrusted data set reads no file but its own; the directory itself may be reached through a link."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(directory)):
        raise damaged(directory, path, "it is a link to a file outside of the data set")
    if path.exists() and not path.is_file() and not path.is_dir():
        raise damaged(directory, path, "it is not a regular file")


def damaged(directory: Path, path: Path, what: str) -> UserError:
    return UserError(f"data.dir: {path} is damaged: {what}; remove {directory} and prepare it again")


def manifest_json(manifest: Manifest) -> str:
    """The manifest as it is written to disk."""
    return json.dumps(manifest.model_dump(), indent=2) + "\n"
