"""The loader: what is trained on depends on the seed and the step alone, and damaged data are refused."""

import copy
import hashlib
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quack_lm.data.batches import EvalBatches, Sequences, TrainBatches, permutation
from quack_lm.data.manifest import TokenData
from quack_lm.errors import UserError

sizes = st.integers(1, 6)


def counting_sequences(n_sequences: int, seq_len: int, shard_tokens: int = 7) -> Sequences:
    """Sequences over the tokens 0, 1, 2, ..., cut into small shards."""
    row = np.arange(n_sequences * seq_len + 1, dtype=np.uint16)
    return Sequences([row[i : i + shard_tokens] for i in range(0, len(row), shard_tokens)], seq_len)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_data_set(tmp_path: Path, train: Sequence[int] = (10, 5)) -> Path:
    """A small valid data set, written by hand: the train shards have so many tokens, val and probe one of 6."""
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    splits: dict[str, Any] = {}
    for split, lengths in {"train": train, "val": (6,), "probe": (6,)}.items():
        shards = []
        for number, length in enumerate(lengths):
            path = tmp_path / f"{split}_{number:05d}.bin"
            first = {"train": 10 * number, "val": 20, "probe": 30}[split]
            (np.arange(first, first + length) % 300).astype("<u2").tofile(path)
            shards.append({"file": path.name, "tokens": length, "sha256": sha256(path)})
        splits[split] = {"tokens": sum(lengths), "documents": 2, "shards": shards}
    manifest = {
        "format_version": 1,
        "vocab_size": 300,
        "eot_id": 0,
        "dtype": "uint16",
        "unigram_entropy": 2.5,
        "tokenizer": {"name": "by hand", "files": {"tokenizer.json": sha256(tmp_path / "tokenizer/tokenizer.json")}},
        "splits": splits,
        "source": {"corpus": "by hand"},
    }
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    return write_data_set(tmp_path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set whose manifest a test may replace, as often as it likes."""
    return write_data_set(tmp_path_factory.mktemp("scratch"))


# ------------------------------------------------------------------------------------------------ order


@given(n=st.integers(1, 200), seed=st.integers(0, 2**40), epoch=st.integers(0, 9))
@settings(deadline=None, max_examples=50)
def test_a_permutation_has_every_number_once(n: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(n, seed=seed, epoch=epoch).tolist()) == list(range(n))


def test_the_order_of_a_seed_never_changes() -> None:
    # Written down once: a run resumed after an update of NumPy must see the same data.
    assert permutation(8, seed=1, epoch=0).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]
    assert permutation(8, seed=1, epoch=1).tolist() != permutation(8, seed=1, epoch=0).tolist()
    assert permutation(8, seed=2, epoch=0).tolist() != permutation(8, seed=1, epoch=0).tolist()


@given(n_sequences=st.integers(1, 40), seq_len=sizes, world=st.integers(1, 3), per_rank=st.integers(1, 4), micro=sizes)
@settings(deadline=None, max_examples=60)
def test_the_global_batch_is_the_same_for_every_world_and_micro_batch_size(
    n_sequences: int, seq_len: int, world: int, per_rank: int, micro: int
) -> None:
    sequences = counting_sequences(n_sequences, seq_len)
    batch_size = world * per_rank * micro
    alone = TrainBatches(sequences, seed=3, global_batch_size=batch_size, micro_batch_size=1)
    for step in (5, 0, 1):
        expected = torch.cat(list(alone.micro_batches(step)))
        parts: list[torch.Tensor] = []
        for rank in range(world):
            rank_batches = TrainBatches(
                sequences, seed=3, global_batch_size=batch_size, micro_batch_size=micro, rank=rank, world_size=world
            )
            pieces = list(rank_batches.micro_batches(step))
            assert [piece.shape for piece in pieces] == [(micro, seq_len + 1)] * per_rank
            parts += pieces
        assert torch.cat(parts).equal(expected)


@given(n_sequences=st.integers(1, 30), batch=st.integers(1, 12), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_each_epoch_visits_each_sequence_exactly_once(n_sequences: int, batch: int, seed: int) -> None:
    batches = TrainBatches(
        counting_sequences(n_sequences, 3), seed=seed, global_batch_size=batch, micro_batch_size=batch
    )
    n_steps = -(-3 * n_sequences // batch)
    seen = torch.cat([micro for step in range(n_steps) for micro in batches.micro_batches(step)])[:, 0] // 3
    for epoch in seen[: 3 * n_sequences].split(n_sequences):
        assert sorted(epoch.tolist()) == list(range(n_sequences))
    assert batches.epoch(n_steps) == pytest.approx(n_steps * batch / n_sequences)


def test_batches_depend_on_seed_and_step_and_not_on_what_was_read_before() -> None:
    sequences = counting_sequences(50, 4)
    first = TrainBatches(sequences, seed=1, global_batch_size=6, micro_batch_size=3)
    history = [torch.cat(list(first.micro_batches(step))) for step in range(20)]
    late = TrainBatches(sequences, seed=1, global_batch_size=6, micro_batch_size=6)
    for step in (19, 8, 9, 0):
        assert torch.cat(list(late.micro_batches(step))).equal(history[step])
    other = TrainBatches(sequences, seed=2, global_batch_size=6, micro_batch_size=6)
    assert not torch.cat(list(other.micro_batches(0))).equal(history[0])


# ------------------------------------------------------------------------------------------------ evaluation


@given(n_sequences=st.integers(1, 40), wanted=st.integers(1, 50), world=st.integers(1, 4), micro=sizes)
@settings(deadline=None, max_examples=80)
def test_the_evaluation_set_is_the_same_for_every_world_size(
    n_sequences: int, wanted: int, world: int, micro: int
) -> None:
    sequences = counting_sequences(n_sequences, 3)
    alone = EvalBatches(sequences, n_sequences=wanted, micro_batch_size=1)
    expected = torch.cat([tokens for tokens, _ in alone])
    assert alone.n_sequences == len(expected) == len(expected.unique(dim=0)) == min(wanted, n_sequences)
    ranks = [
        EvalBatches(sequences, n_sequences=wanted, micro_batch_size=micro, rank=rank, world_size=world)
        for rank in range(world)
    ]
    assert len({len(list(rank)) for rank in ranks}) == 1
    tokens = torch.cat([tokens for rank in ranks for tokens, _ in rank])
    weights = torch.cat([weights for rank in ranks for _, weights in rank])
    assert weights.dtype == torch.float32
    assert tokens[weights > 0].equal(expected)
    assert weights.sum() == len(expected)


# ------------------------------------------------------------------------------------------------ files


@given(n_sequences=st.integers(1, 20), seq_len=sizes, shard_tokens=st.integers(1, 9))
@settings(deadline=None, max_examples=60)
def test_sequences_overlap_by_one_token_and_may_straddle_shards(
    n_sequences: int, seq_len: int, shard_tokens: int
) -> None:
    sequences = counting_sequences(n_sequences, seq_len, shard_tokens)
    assert len(sequences) == n_sequences
    read = sequences.read(np.arange(n_sequences))
    assert read.dtype == np.int64
    assert read.tolist() == [list(range(i * seq_len, (i + 1) * seq_len + 1)) for i in range(n_sequences)]


def test_a_data_set_opens_and_reads_back(data_set: Path) -> None:
    data = TokenData.open(data_set)
    sequences = data.sequences("train", 4)
    assert data.manifest.unigram_entropy == 2.5
    assert data.manifest_sha256 == sha256(data_set / "manifest.json")
    assert data.manifest.splits.val.tokens_per_byte is None  # the manifest is as earlier versions wrote it
    assert sequences.read(np.array([2, 0])).tolist() == [[8, 9, 10, 11, 12], [0, 1, 2, 3, 4]]
    assert len(data.sequences("val", 5)) == 1


READ_WITH_FEW_FILES = """
import resource, sys
from pathlib import Path
import numpy as np
from quack_lm.cli import exit_on_user_error
from quack_lm.data.manifest import SPLITS, TokenData
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
with exit_on_user_error():
    data = TokenData.open(Path(sys.argv[1]))
    train, *_ = [data.sequences(split, seq_len=5) for split in SPLITS]
    print(train.read(np.array([0, len(train) - 1])).tolist())
"""


def read_with_few_files(directory: Path, hard_limit: int) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-c", READ_WITH_FEW_FILES, str(directory), str(hard_limit)]
    return subprocess.run(line, capture_output=True, text=True)


def test_a_data_set_may_have_more_shards_than_a_process_may_usually_open(tmp_path: Path) -> None:
    # At the usual limit of 1024 files, a data set of more shards was refused with a traceback.
    directory = write_data_set(tmp_path, train=[10] * 100)
    done = read_with_few_files(directory, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    assert done.returncode == 0, done.stderr
    rows = [row % 300 for row in (np.arange(0, 6), np.arange(990, 996))]
    assert json.loads(done.stdout) == [row.tolist() for row in rows]
    done = read_with_few_files(directory, 64)
    assert done.returncode == 2
    assert done.stderr == "error: Too many open files; allow more open files with ulimit -n\n"


def test_a_split_shorter_than_a_sequence_names_seq_len_and_the_split(data_set: Path) -> None:
    with pytest.raises(UserError, match=r"trainer\.seq_len=6 .* val split .* 6 tokens: .* at most 5"):
        TokenData.open(data_set).sequences("val", 6)


def test_no_data_set_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no prepared data in .*missing.*quack-lm prepare data="):
        TokenData.open(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["train_00001.bin", "val_00000.bin", "tokenizer/tokenizer.json"])
def test_one_changed_byte_is_refused_by_name(data_set: Path, name: str) -> None:
    content = bytearray((data_set / name).read_bytes())
    content[1] ^= 1
    (data_set / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is damaged: its sha256 .*prepare it again"):
        TokenData.open(data_set)


def test_without_checksums_only_the_size_of_a_shard_is_checked(data_set: Path) -> None:
    shard = data_set / "train_00000.bin"
    shard.write_bytes(bytes(20))
    TokenData.open(data_set, verify_checksums=False)
    shard.write_bytes(bytes(18))
    with pytest.raises(UserError, match=r"train_00000\.bin .* it has 18 bytes, the manifest says 20"):
        TokenData.open(data_set, verify_checksums=False)


@pytest.mark.parametrize("name", ["probe_00000.bin", "tokenizer/tokenizer.json"])
def test_a_missing_file_is_refused_by_name(data_set: Path, name: str) -> None:
    (data_set / name).unlink()
    with pytest.raises(UserError, match=rf"{name} .* is missing"):
        TokenData.open(data_set)


def test_a_file_added_to_the_tokenizer_is_refused(data_set: Path) -> None:
    (data_set / "tokenizer" / "added_tokens.json").write_text("{}")
    with pytest.raises(UserError, match=r"added_tokens\.json .* does not know this file"):
        TokenData.open(data_set)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format_version",), 2),
        (("vocab_size",), "300"),
        (("vocab_size",), 70_000),
        (("eot_id",), 300),
        (("dtype",), "uint8"),
        (("unigram_entropy",), -1.0),
        (("surprise",), 1),
        (("splits", "extra"), {}),
        (("splits", "val", "tokens"), 7),
        (("splits", "val", "text_bytes"), 0),
        (("splits", "val", "shards"), []),
        (("splits", "train", "shards", 0, "file"), "../train_00000.bin"),
        (("splits", "train", "shards", 0, "file"), "/etc/passwd"),
        (("splits", "train", "shards", 0, "file"), ".."),
        (("splits", "train", "shards", 0, "tokens"), 10.0),
        (("splits", "train", "shards", 0, "sha256"), "0"),
        (("tokenizer", "files"), {}),
    ],
)
def test_a_manifest_with_a_wrong_entry_is_refused(data_set: Path, path: tuple[Any, ...], value: Any) -> None:
    manifest = json.loads((data_set / "manifest.json").read_text())
    entry = manifest
    for key in path[:-1]:
        entry = entry[key]
    entry[path[-1]] = value
    (data_set / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json is damaged"):
        TokenData.open(data_set)


def test_a_manifest_lacking_any_key_is_refused(data_set: Path) -> None:
    manifest = json.loads((data_set / "manifest.json").read_text())
    for key in manifest:
        (data_set / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != key}))
        with pytest.raises(UserError, match=rf"manifest\.json is damaged: {key}"):
            TokenData.open(data_set)


# ------------------------------------------------------------------------------------------------ any manifest at all

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from([2**63, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of everything inside of a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in inside for place in [(*path, key), *places(item, (*path, key))]]


def opens_or_is_refused(directory: Path, manifest: bytes) -> bool:
    """Whether the manifest is accepted; what is accepted can be read to its end."""
    original = (directory / "manifest.json").read_bytes()
    (directory / "manifest.json").write_bytes(manifest)
    try:
        data = TokenData.open(directory)
    except UserError:
        return False
    finally:
        (directory / "manifest.json").write_bytes(original)
    for split in ("train", "val", "probe"):
        sequences = data.sequences(split, 1)
        assert sequences.read(np.arange(len(sequences))).max() < data.manifest.vocab_size
    return True


@given(data=st.data())
@settings(max_examples=150)
def test_a_manifest_with_anything_anywhere_is_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    original = json.loads((scratch / "manifest.json").read_text())
    manifest = entry = copy.deepcopy(original)
    place = data.draw(st.sampled_from(places(manifest)))
    for key in place[:-1]:
        entry = entry[key]
    if data.draw(st.booleans()):
        entry[place[-1]] = data.draw(
            json_values | st.sampled_from(["../x", "val_00000.bin", 0, -1, 2**31, "\0", "\ud800"])
        )
    else:
        del entry[place[-1]]
    accepted = opens_or_is_refused(scratch, json.dumps(manifest).encode())
    # Of the numbers and names that are left, these decide nothing that is read.
    assert (
        not accepted
        or manifest == original
        or place[0] in ("source", "unigram_entropy", "vocab_size", "eot_id", "dtype")
        or place[-1] in ("name", "documents")
    )


@given(data=st.data())
@settings(max_examples=80)
def test_a_manifest_with_any_bytes_changed_is_read_or_refused(scratch: Path, data: st.DataObject) -> None:
    content = bytearray((scratch / "manifest.json").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    opens_or_is_refused(scratch, bytes(content))
