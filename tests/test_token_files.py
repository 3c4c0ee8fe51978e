"""Tokens that other programs have made: every format gives the same data set, however it is cut and read."""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import call
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import run_here

from quack_lm.data import token_files
from quack_lm.data.corpus import TokenCorpus
from quack_lm.data.manifest import SPLITS, TokenData
from quack_lm.data.prepare import prepare
from quack_lm.data.token_files import TokenFile, open_token_file, refuse_wider_numbers
from quack_lm.errors import UserError

EOT = 9


def make_documents(n: int = 40) -> list[list[int]]:
    rng = random.Random(1)
    others = [token for token in range(300) if token != EOT]
    return [rng.choices(others, k=rng.randint(1, 60)) for _ in range(n)]


DOCUMENTS = make_documents()


def corpus(directory: Path, *files: Path, **changes: Any) -> TokenCorpus:
    own: dict[str, Any] = {
        "dir": str(directory),
        "files": [str(file) for file in files],
        "tokenizer": None,
        "vocab_size": 300,
        "eot_id": EOT,
        "val_fraction": 0.2,
        "probe_fraction": 0.2,
        "shard_tokens": 100,
    }
    return TokenCorpus(**(own | changes))


# ------------------------------------------------------------------------------------------------ the formats


def row(documents: list[list[int]], *, first: bool = False) -> list[int]:
    """All tokens in a row, with the token between documents before or behind each."""
    return [token for d in documents for token in ([EOT, *d] if first else [*d, EOT])]


def write_nanogpt(path: Path) -> Path:
    path = path.with_suffix(".bin")
    path.write_bytes(struct.pack(f"<{len(row(DOCUMENTS))}H", *row(DOCUMENTS)))
    return path


def write_llm_c(path: Path) -> Path:
    tokens, path = row(DOCUMENTS, first=True), path.with_suffix(".bin")
    path.write_bytes(
        struct.pack("<256i", 20240520, 1, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)
    )
    return path


def write_llm_c_of_llama_3(path: Path) -> Path:
    tokens, path = row(DOCUMENTS, first=True), path.with_suffix(".bin")
    path.write_bytes(
        struct.pack("<256i", 20240801, 7, len(tokens), *[0] * 253) + struct.pack(f"<{len(tokens)}I", *tokens)
    )
    return path


def write_olmo(path: Path) -> Path:
    path = path.with_suffix(".npy")
    path.write_bytes(struct.pack(f"<{len(row(DOCUMENTS))}H", *row(DOCUMENTS)))
    return path


def write_numpy(path: Path) -> Path:
    np.save(path.with_suffix(".npy"), np.array(row(DOCUMENTS), np.int64))
    return path.with_suffix(".npy")


def write_datatrove(path: Path) -> Path:
    path = path.with_suffix(".ds")
    lengths = [len(document) + 1 for document in DOCUMENTS]
    path.write_bytes(struct.pack(f"<{len(row(DOCUMENTS))}H", *row(DOCUMENTS)))
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    path.with_name(path.name + ".metadata").write_text("unknown|2\n1\n1 T")
    return path


def write_megatron(path: Path, *, has_eod: bool = True, n_sequences: int = 1) -> Path:
    """As its builder does: a document is a number of sequences, and the end-of-document token is optional."""
    path, sequences, documents = path.with_suffix(".bin"), [], [0]
    for document in DOCUMENTS:
        tokens = [*document, EOT] if has_eod else document
        step = -(-len(tokens) // n_sequences)
        sequences += [tokens[i : i + step] for i in range(0, len(tokens), step)]
        documents.append(len(sequences))
    lengths = [len(sequence) for sequence in sequences]
    pointers = [4 * sum(lengths[:i]) for i in range(len(lengths))]
    path.write_bytes(b"".join(struct.pack(f"<{len(s)}i", *s) for s in sequences))
    path.with_suffix(".idx").write_bytes(
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, 4, len(lengths), len(documents))
        + struct.pack(f"<{len(lengths)}i", *lengths)
        + struct.pack(f"<{len(lengths)}q", *pointers)
        + struct.pack(f"<{len(documents)}q", *documents)
    )
    return path


WRITERS = {
    "bare tokens": write_nanogpt,
    "llm.c": write_llm_c,
    "llm.c, Llama 3": write_llm_c_of_llama_3,
    "bare tokens, OLMo": write_olmo,
    "NumPy": write_numpy,
    "datatrove": write_datatrove,
    "Megatron": write_megatron,
    "Megatron, without a token": lambda path: write_megatron(path, has_eod=False),
    "Megatron, of parts": lambda path: write_megatron(path, n_sequences=3),
}


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "manifest.json"}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("imported")
    return prepare(corpus(place / "set", write_nanogpt(place / "train")), progress=False)


def test_the_shards_have_the_documents_in_order_each_in_the_split_of_its_tokens(imported: Path) -> None:
    data, found = TokenData.open(imported), {}
    for split in SPLITS:
        tokens = [t for s in data.manifest.split(split).shards for t in np.fromfile(imported / s.file, "<u2").tolist()]
        found[split], document = [], []
        for token in tokens:
            document = [*document, token] if token != EOT else found[split].append(document) or []
        assert document == []
        assert data.manifest.split(split).documents == len(found[split]) > 2
    by_split = {split: [d for d in DOCUMENTS if d in found[split]] for split in SPLITS}
    assert found == by_split
    assert sum(map(len, found.values())) == len(DOCUMENTS)
    assert (data.manifest.tokenizer.name, data.manifest.tokenizer.files) == ("unknown", {})
    assert not (imported / "tokenizer").exists()


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("window", [7, 1 << 20])
def test_every_format_gives_the_same_data_set(
    tmp_path: Path, imported: Path, kind: str, window: int, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(token_files, "WINDOW", window)
    path = WRITERS[kind](tmp_path / "source")
    made = prepare(corpus(tmp_path / "set", path), progress=False)
    assert contents(made) == contents(imported)
    assert f"1 file of {kind.partition(',')[0]}, tokens of " in capsys.readouterr().out


@given(
    tokens=st.lists(st.integers(0, 4), max_size=40),
    ends=st.lists(st.integers(0, 40), max_size=5),
    longest=st.none() | st.integers(1, 5),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_documents_end_where_they_should_from_any_place_on(
    tokens: list[int], ends: list[int], longest: int | None, data: st.DataObject
) -> None:
    places = sorted({min(end, len(tokens)) for end in ends})
    file = TokenFile(Path("x"), "x", np.array(tokens, np.uint16), np.array(places, np.int64))
    # One token after the other.
    expected: list[list[int]] = [[]]
    for place, token in enumerate(tokens):
        if place in places or token == 0 or (longest and len(expected[-1]) == longest):
            expected.append([])
        if token != 0:
            expected[-1].append(token)
    expected = [document for document in expected if document]
    token_files.WINDOW, before = data.draw(st.integers(1, 9)), token_files.WINDOW
    try:
        found, start = [], 0
        for pieces, behind in file.documents(0, 0, longest=longest):
            found += [piece.tolist() for piece in pieces if len(piece)]
            assert behind > start
            start = behind
            again = [p.tolist() for pieces, _ in file.documents(0, start, longest=longest) for p in pieces if len(p)]
            assert found + again == expected
        assert found == expected
    finally:
        token_files.WINDOW = before


def test_an_import_that_broke_continues_to_the_same_bytes(
    tmp_path: Path, imported: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(token_files, "WINDOW", 50)
    path = write_nanogpt(tmp_path / "train")
    good = path.read_bytes()
    path.write_bytes(good[:-200] + struct.pack("<H", 60_000) + good[-198:])
    os.utime(path, ns=(0, 1))
    with pytest.raises(UserError, match=r"has the token 60000, beyond data\.vocab_size=300: .*data\.dtype"):
        prepare(corpus(tmp_path / "set", path), progress=False, commit_every_s=0)
    path.write_bytes(good)
    os.utime(path, ns=(0, 1))  # as if the disk alone had failed
    documents = json.loads((tmp_path / "set.partial/progress.json").read_text())["documents"]
    assert 5 < documents < len(DOCUMENTS)
    prepare(corpus(tmp_path / "set", path), progress=False)
    assert f"after {documents} documents" in capsys.readouterr().out
    assert contents(tmp_path / "set") == contents(imported)


def test_tokens_in_a_row_are_cut_into_documents_on_request(tmp_path: Path) -> None:
    path = tmp_path / "shakespeare.bin"
    np.random.default_rng(0).integers(10, 65, 3000).astype(np.uint16).tofile(path)
    with pytest.raises(UserError, match=r"none of the 1 documents .*after so many tokens \(data\.document_tokens\)"):
        prepare(corpus(tmp_path / "set", path), progress=False)
    made = TokenData.open(prepare(corpus(tmp_path / "set", path, document_tokens=64), progress=False)).manifest
    assert sum(made.split(split).documents for split in SPLITS) == 3000 // 64 + 1
    assert sum(made.split(split).tokens for split in SPLITS) == 3000 + 3000 // 64 + 1


def test_a_file_that_has_no_end_of_a_document_is_not_read_into_memory(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(token_files, "WINDOW", 16)
    monkeypatch.setattr(token_files, "LONGEST", 64)
    np.full(1000, 3, np.uint16).tofile(tmp_path / "x.bin")
    with pytest.raises(
        UserError, match=r"x\.bin \(bare tokens\) has no token 9 in the 64 from 0 on: .*document_tokens"
    ):
        prepare(corpus(tmp_path / "set", tmp_path / "x.bin"), progress=False)


def test_a_run_trains_on_imported_tokens(imported: Path, tmp_path: Path) -> None:
    summary = run_here([f"data.dir={imported}", "trainer.seq_len=8", "trainer.steps=2"], tmp_path / "run")
    assert (summary["step"], summary["val_bits_per_byte"]) == (2, None)


def test_tasks_of_text_need_a_tokenizer(imported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.every=1 needs the tokenizer of the data"):
        run_here([f"data.dir={imported}", "trainer.seq_len=8", "eval.every=1"], tmp_path / "run")


def test_the_tokenizer_that_made_the_tokens_may_come_with_them(tiny_data: list[str], tmp_path: Path) -> None:
    source = Path(tiny_data[1].removeprefix("data.dir="))
    made = TokenData.open(source).manifest
    files = sorted(source.glob("train_*.bin"))
    own = corpus(tmp_path / "set", *files, tokenizer=str(source / "tokenizer"), vocab_size=512, eot_id=None)
    again = TokenData.open(prepare(own, progress=False)).manifest
    assert again.eot_id == made.eot_id
    assert again.tokenizer.files["tokenizer.json"] == made.tokenizer.files["tokenizer.json"]
    # A document across two files is two.
    assert sum(again.split(split).documents for split in SPLITS) - made.splits.train.documents in range(len(files))


# ------------------------------------------------------------------------------------------------ what is refused


def damaged(path: Path, edit: Any) -> None:
    path.write_bytes(edit(path.read_bytes()))


@pytest.mark.parametrize(
    ("kind", "suffix", "edit", "message"),
    [
        ("llm.c", ".bin", lambda b: b[:-2], r"has \d+ bytes, and by its header \d+ tokens of 2 bytes"),
        ("NumPy", ".npy", lambda b: b[:-8], r"length"),
        ("NumPy", ".npy", lambda b: b.replace(b"<i8", b"<f8"), r"is an array of float64 \[\d+\]"),
        ("NumPy", ".npy", lambda b: b.replace(b"<i8", b"|O8"), r"objects"),
        ("NumPy", ".npy", lambda b: b[:40], r"EOF"),
        ("NumPy", ".npy", lambda b: b.replace(b"}", b" ", 1), r"EOF in multi-line"),
        ("bare tokens", ".bin", lambda b: b[:-1], r"bytes are not a whole number of uint16: set data\.dtype"),
        ("datatrove", ".ds", lambda b: b[:-2], r"has \d+ bytes, and by source\.ds\.index \d+ tokens"),
        ("datatrove", ".ds.index", lambda b: b[8:16] + b[:8] + b[16:], r"and by source\.ds\.index"),
        ("datatrove", ".ds.index", lambda b: b[:-3], r"not a whole number of uint64"),
        ("Megatron", ".bin", lambda b: b[:-4], r"has \d+ bytes, and by source\.idx \d+ tokens of int32"),
        ("Megatron", ".idx", lambda b: b"MMIDIDY" + b[7:], r"is no index of Megatron's"),
        ("Megatron", ".idx", lambda b: b[:20], r"is no index of Megatron's"),
        ("Megatron", ".idx", lambda b: b[:-1], r"is shorter than its header says"),
        ("Megatron", ".idx", lambda b: b[:18] + b"\xff" * 8 + b[26:], r"is shorter than its header says"),
        ("Megatron", ".idx", lambda b: b[:17] + b"\x06" + b[18:], r"has version 1 and type 6"),
        ("Megatron", ".idx", lambda b: b[:34] + b"\xff" * 4 + b[38:], r"does not list its sequences one after"),
        ("Megatron", ".idx", lambda b: b[:-8] + b"\x7f" * 8, r"has documents of sequences that there are not"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_refused(
    tmp_path: Path, kind: str, suffix: str, edit: Any, message: str
) -> None:
    path = WRITERS[kind](tmp_path / "source")
    damaged(tmp_path / f"source{suffix}", edit)
    with pytest.raises(UserError, match=rf"data\.files: {path}.* cannot be read: .*{message}"):
        open_token_file(path, "uint16")


@pytest.mark.parametrize("wider", ["uint32", "int64"])
def test_bare_tokens_that_look_wider_than_the_vocabulary_asks_for_are_refused(tmp_path: Path, wider: str) -> None:
    path = tmp_path / "x.bin"
    np.arange(1, 400).astype(wider).tofile(path)
    with pytest.raises(UserError, match=rf"{path} is 0, as if its numbers were {wider} .*: set data\.dtype={wider}"):
        refuse_wider_numbers(open_token_file(path, "uint16"))
    refuse_wider_numbers(open_token_file(path, wider))
    np.arange(400).astype("uint16").tofile(path)
    refuse_wider_numbers(open_token_file(path, "uint16"))


@given(st.sampled_from(sorted(WRITERS)), st.data())
@settings(deadline=None, max_examples=60)
def test_a_file_with_any_bytes_changed_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, kind: str, data: st.DataObject
) -> None:
    path = WRITERS[kind](tmp_path_factory.mktemp("any") / "source")
    file = data.draw(st.sampled_from(sorted(path.parent.iterdir())))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(200, len(content) - 1)))] = data.draw(st.integers(0, 255))
    file.write_bytes(bytes(content[: data.draw(st.integers(0, len(content)))]) if data.draw(st.booleans()) else content)
    try:
        opened = open_token_file(path, "uint16")
    except UserError:
        return
    assert sum(len(piece) for pieces, _ in opened.documents(EOT, 0) for piece in pieces) <= len(opened.tokens)


def test_settings_that_say_too_little_are_answered_with_the_key(tmp_path: Path) -> None:
    path = write_nanogpt(tmp_path / "train")
    own = ["data=tokens", f"data.files=[{path}]", f"data.dir={tmp_path / 'set'}"]
    for more, message in (
        ([], "data.vocab_size is not set"),
        (["data.vocab_size=300"], "data.eot_id is not set"),
        (["data.vocab_size=300", "data.eot_id=300"], "data.eot_id=300 must be below data.vocab_size=300"),
        (["data.vocab_size=200", "data.eot_id=9"], "beyond data.vocab_size=200"),
    ):
        code, _, stderr = call("prepare", *own, *more)
        assert (code, stderr.count("\n")) == (2, 1)
        assert message in stderr
    code, stdout, _ = call(
        "prepare", *own, "data.vocab_size=300", "data.eot_id=9", "data.val_fraction=0.2", "data.probe_fraction=0.2"
    )
    assert code == 0
    assert "1 file of bare tokens, tokens of uint16" in stdout
