"""The preparation: the shards hold the texts, whatever the source, and whenever it was interrupted."""

import builtins
import dataclasses
import gzip
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quack_lm.config import CONFIG_DIR, choices, compose, instantiate
from quack_lm.config.groups import read_choice
from quack_lm.data.corpus import HUB_CHOICES, Corpus, HubCorpus, LocalCorpus, StdlibCorpus
from quack_lm.data.manifest import SPLITS, SplitName, Splits, TokenData
from quack_lm.data.prepare import is_prepared, prepare
from quack_lm.errors import UserError

EOT = "<|endoftext|>"
WORDS = ["attention", "logits", "change", "step,", "bound", "größer", "≤", "思", "🦆", "def f(x):\n\treturn x\n"]


def make_texts(n: int, *, seed: int = 0) -> list[str]:
    """Documents of 5 to 80 words; some equal, some that spell the end-of-text token."""
    rng = random.Random(seed)
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(5, 80))) for _ in range(n)]
    return [*texts[:-2], texts[0], f"a document that says {EOT} in its middle"]


def write_jsonl(path: Path, texts: list[str | None], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def local(directory: Path, files: list[str], **changes: Any) -> LocalCorpus:
    settings: dict[str, Any] = {
        "dir": str(directory),
        "files": files,
        "format": "jsonl",
        "tokenizer": None,
        "vocab_size": 300,
        "val_fraction": 0.2,
        "probe_fraction": 0.1,
        "shard_tokens": 700,
        "workers": 0,
    }
    return LocalCorpus(**(settings | changes))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def splits(directory: Path) -> Splits:
    """What the manifest of a valid data set counts."""
    return TokenData.open(directory).manifest.splits


def documents(directory: Path, split: SplitName) -> list[str]:
    """The texts of a split, decoded from its shards."""
    data = TokenData.open(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory / "tokenizer")
    sequences = data.sequences(split, data.manifest.split(split).tokens - 1)
    tokens = sequences.read(np.array([0]))[0]
    ends = np.flatnonzero(tokens == data.manifest.eot_id)
    assert ends[-1] == len(tokens) - 1
    return [str(tokenizer.decode(piece[piece != data.manifest.eot_id])) for piece in np.split(tokens, ends + 1)[:-1]]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return make_texts(150)


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("source") / "texts.jsonl", list(texts))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, jsonl: Path) -> Path:
    return prepare(local(tmp_path_factory.mktemp("data") / "set", [str(jsonl)]), progress=False)


# ------------------------------------------------------------------------------------------------ contents


def test_the_shards_decode_to_the_texts_in_order(prepared: Path, jsonl: Path, texts: list[str]) -> None:
    corpus = local(prepared, [str(jsonl)])
    manifest = TokenData.open(prepared).manifest
    for split in SPLITS:
        expected = [text for text in texts if corpus.split_of(text) == split]
        assert documents(prepared, split) == expected
        assert manifest.split(split).documents == len(expected)
        assert manifest.split(split).text_bytes == sum(len(text.encode()) for text in expected)
    sizes = [shard.tokens for shard in manifest.splits.train.shards]
    assert len(sizes) > 3
    assert set(sizes[:-1]) == {700}


def test_splits_share_no_document(prepared: Path) -> None:
    sets = [set(documents(prepared, split)) for split in SPLITS]
    assert sum(map(len, sets)) == len(set.union(*sets))


def test_unigram_entropy_is_that_of_the_train_tokens(prepared: Path) -> None:
    manifest = TokenData.open(prepared).manifest
    tokens = np.concatenate([np.fromfile(prepared / s.file, dtype="<u2") for s in manifest.splits.train.shards])
    p = np.array([np.mean(tokens == token) for token in np.unique(tokens)])
    assert manifest.unigram_entropy == pytest.approx(-np.sum(p * np.log(p)), rel=1e-9)


def test_blank_and_missing_documents_are_skipped(tmp_path: Path, texts: list[str]) -> None:
    rows: list[str | None] = [None, "", " \n"]
    source = write_jsonl(tmp_path / "blank.jsonl", rows + list(texts) + rows)
    directory = prepare(local(tmp_path / "set", [str(source)]), progress=False)
    manifest = TokenData.open(directory).manifest
    assert sum(manifest.split(split).documents for split in SPLITS) == len(texts)


def test_every_source_and_any_number_of_workers_gives_the_same_shards(
    tmp_path: Path, prepared: Path, texts: list[str]
) -> None:
    pq.write_table(pa.table({"n": range(len(texts)), "body": texts}), tmp_path / "t.parquet", row_group_size=7)
    halves = [write_jsonl(tmp_path / f"half_{i}.jsonl", list(t)) for i, t in enumerate((texts[:60], texts[60:]))]
    (tmp_path / "files").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "files" / f"{number:04d}.txt").write_text(text, newline="")
    corpora = [
        local(tmp_path / "a", [str(tmp_path / "t.parquet")], format="parquet", text_field="body"),
        local(tmp_path / "b", [str(half) for half in reversed(halves)], workers=2),
        local(tmp_path / "c", [str(tmp_path / "**" / "*.txt")], format="text"),
    ]
    expected = {name: content for name, content in contents(prepared).items() if name != "manifest.json"}
    for corpus in corpora:
        made = contents(prepare(corpus, progress=False))
        made.pop("manifest.json")
        assert made == expected
        assert splits(Path(corpus.dir)) == splits(prepared)


@pytest.mark.parametrize("format", ["jsonl", "parquet", "text"])
def test_a_name_that_is_also_a_pattern_is_the_file_of_that_name(tmp_path: Path, format: str) -> None:
    for name, text in (("a[1]", "the one that is meant"), ("a1", "another")):
        path = tmp_path / f"{name}.{format}"
        if format == "parquet":
            pq.write_table(pa.table({"text": [text]}), path)
        else:
            path.write_text(json.dumps({"text": text}) if format == "jsonl" else text)
    corpus = local(tmp_path / "set", [str(tmp_path / f"a[1].{format}")], format=format)
    assert [row["text"] for row in corpus.stream()] == ["the one that is meant"]


def test_two_stars_cross_directories_and_give_each_file_once_whatever_links_lead_to_it(
    tmp_path: Path, monkeypatch
) -> None:
    for name in ("top.md", "a/one.md", "a/deep/two.md", "b/.hidden/four.md", "b/[5]/five.md", "b/six.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b/up").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    every = ["five.md", "one.md", "top.md", "two.md"]
    for pattern in ("**/*.md", f"{tmp_path}/**/*.md"):
        files = local(tmp_path / "set", [pattern]).input_files()
        assert sorted(path.name for path in files) == every
    assert [path.name for path in local(tmp_path / "set", ["b/**/.hidden/*", "b/*.txt"]).input_files()] == [
        "four.md",
        "six.txt",
    ]


def test_stdlib_is_source_without_tests() -> None:
    corpus = instantiate(compose(["data=stdlib"])["data"])
    assert isinstance(corpus, StdlibCorpus)
    paths = [path.as_posix() for path in corpus.input_files()]
    assert paths == sorted(paths)
    assert not any(
        "/test" in path.split("/lib/", 1)[-1] or "packages/" in path for path in paths if "unittest" not in path
    )
    assert any(path.endswith("/argparse.py") for path in paths)
    assert sum(len(row["text"]) for row in corpus.stream()) > 5_000_000


def test_cosmopedia_settings_read_local_files_of_its_schema(tmp_path: Path, prepared: Path, texts: list[str]) -> None:
    n = len(texts)
    columns = {"prompt": ["write"] * n, "text": texts, "token_length": [5] * n, "audience": ["general"] * n}
    table = pa.table(columns | {"format": ["blogpost"] * n, "seed_data": ["auto_math_text"] * n})
    pq.write_table(table, tmp_path / "train-00000-of-00001.parquet")
    overrides = [
        "data=cosmopedia_v2",
        f"data.dir={tmp_path}/set",
        f"data.files=[{tmp_path}/train-*.parquet]",
        f"data.tokenizer={prepared}/tokenizer",
        "data.vocab_size=300",
        "data.val_fraction=0.2",
        "data.probe_fraction=0.1",
        "data.workers=0",
    ]
    corpus = instantiate(compose(overrides)["data"])
    assert isinstance(corpus, HubCorpus)
    directory = prepare(corpus, progress=False)
    for split in SPLITS:
        assert documents(directory, split) == documents(prepared, split)


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path, prepared: Path, jsonl: Path) -> None:
    shutil.copytree(prepared / "tokenizer", tmp_path / "large")
    state = json.loads((tmp_path / "large" / "tokenizer.json").read_text())
    state["model"]["vocab"] |= {f"never merged {number}": 300 + number for number in range(2**16)}
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(state))
    corpus = local(tmp_path / "set", [str(jsonl)], tokenizer=str(tmp_path / "large"), vocab_size=300 + 2**16)
    directory = prepare(corpus, progress=False)
    assert TokenData.open(directory).manifest.dtype == "uint32"
    assert documents(directory, "val") == documents(prepared, "val")


# ------------------------------------------------------------------------------------------------ interruptions

# Commits after every batch of five documents, so that a kill soon has something to come back to.
INTERRUPTIBLE = """
import json, sys, time
from quack_lm.data import corpus
from quack_lm.data import prepare as preparation
if __name__ == "__main__":
    preparation.BATCH_DOCUMENTS = 5
    settings, pause_s = json.loads(sys.argv[1]), float(sys.argv[2])
    make, commit = corpus.LocalCorpus(**settings), preparation._commit
    def commit_and_pause(*arguments):
        commit(*arguments)
        time.sleep(pause_s)
    preparation._commit = commit_and_pause
    preparation.prepare(make, progress=False, commit_every_s=0)
"""


def start_preparation(script: Path, settings: dict[str, Any], *, pause_s: float) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PYTHONPATH": str(CONFIG_DIR.parent)}
    return subprocess.Popen([sys.executable, str(script), json.dumps(settings), str(pause_s)], env=environment)


def committed_documents(partial: Path) -> int:
    try:
        return int(json.loads((partial / "progress.json").read_text())["documents"])
    except FileNotFoundError:
        return 0


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("format", "workers", "kill_after"), [("parquet", 2, [60]), ("text", 0, [20, 80])])
def test_a_killed_preparation_goes_on_to_the_same_bytes(
    tmp_path: Path, prepared: Path, texts: list[str], format: str, workers: int, kill_after: list[int]
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    if format == "parquet":
        pq.write_table(pa.table({"body": texts}), source / "t.parquet", row_group_size=7)
    for number, text in enumerate(texts if format == "text" else []):
        (source / f"{number:04d}.txt").write_text(text, newline="")
    corpus = local(tmp_path / "set", [f"{source}/*"], format=format, text_field="body", workers=workers)
    settings = dict(vars(corpus))
    script = tmp_path / "prepare.py"
    script.write_text(INTERRUPTIBLE)
    partial = tmp_path / "set.partial"

    for at_least in kill_after:
        process = start_preparation(script, settings, pause_s=0.02)
        while committed_documents(partial) < at_least:
            assert process.poll() is None
            time.sleep(0.01)
        helpers = children(process.pid)
        assert len(helpers) >= workers
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "set").exists()
        deadline = time.monotonic() + 20
        while any(is_alive(helper) for helper in helpers):
            assert time.monotonic() < deadline, "the workers outlive their killed parent"
            time.sleep(0.05)
        # What was written after the commit, and torn, must go.
        with (partial / "train_00000.bin").open("ab") as file:
            file.write(b"\xff" * 3)
        (partial / "val_00077.bin").write_bytes(b"\xff")
        assert committed_documents(partial) < len(texts)

    assert start_preparation(script, settings, pause_s=0).wait() == 0
    assert not partial.exists()
    expected, made = contents(prepared), contents(tmp_path / "set")
    del expected["manifest.json"], made["manifest.json"]
    assert made == expected
    assert splits(tmp_path / "set") == splits(prepared)


def test_a_preparation_killed_before_its_rename_only_renames(tmp_path: Path, jsonl: Path) -> None:
    corpus = local(tmp_path / "set", [str(jsonl)])
    finished = prepare(corpus, progress=False).rename(tmp_path / "set.partial")
    times = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    directory = prepare(corpus, progress=False)
    assert {path.name: path.stat().st_mtime_ns for path in directory.iterdir()} == times


def test_what_other_settings_left_is_made_anew(tmp_path: Path, jsonl: Path, prepared: Path) -> None:
    other = local(tmp_path / "set", [str(jsonl)], val_fraction=0.4)
    prepare(other, progress=False).rename(tmp_path / "set.partial")
    assert contents(prepare(local(tmp_path / "set", [str(jsonl)]), progress=False)) == contents(prepared)


# ------------------------------------------------------------------------------------------------ the directory


def test_a_second_call_says_so_and_does_nothing(
    prepared: Path, jsonl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(prepared)
    prepare(local(prepared, [str(jsonl)], workers=3, mask_documents=True))
    assert "prepared already" in capsys.readouterr().out
    assert contents(prepared) == before


def test_other_settings_for_the_same_directory_are_refused(prepared: Path, jsonl: Path) -> None:
    before = contents(prepared)
    with pytest.raises(UserError, match=r"data\.dir=.*data\.val_fraction was 0\.2, is 0\.3.*another data\.dir"):
        prepare(local(prepared, [str(jsonl)], val_fraction=0.3))
    assert contents(prepared) == before


@pytest.mark.parametrize("place", ["set", "set.partial"])
def test_a_directory_with_a_users_files_is_left_alone(tmp_path: Path, jsonl: Path, place: str) -> None:
    (tmp_path / place).mkdir()
    (tmp_path / place / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"data\.dir.*another data\.dir"):
        prepare(local(tmp_path / "set", [str(jsonl)]), progress=False)
    assert (tmp_path / place / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["[]", '{"documents": 5}', '{"documents": '])
def test_progress_that_no_preparation_wrote_is_ignored(tmp_path: Path, jsonl: Path, prepared: Path, text: str) -> None:
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial/progress.json").write_text(text)
    assert contents(prepare(local(tmp_path / "set", [str(jsonl)]), progress=False)) == contents(prepared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakingCorpus(LocalCorpus):
    """One that raises the error of this name after 100 documents, when it is read for the `at`-th time."""

    error: str
    at: int

    def stream(self) -> Any:
        readings.append(1)
        return super().stream().map(self._break, with_indices=True)

    def _break(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        if index >= 100 and len(readings) == self.at:
            raise getattr(builtins, self.error)("broken")
        return row


readings: list[int] = []


# The first reading trains the tokenizer, the second one writes.
@pytest.mark.parametrize(
    ("error", "at", "is_kept"),
    [
        ("RuntimeError", 1, False),
        ("RuntimeError", 2, False),
        ("SystemExit", 2, False),
        ("KeyboardInterrupt", 1, False),
        ("KeyboardInterrupt", 2, True),
    ],
)
def test_what_breaks_before_its_first_commit_leaves_nothing_unless_a_user_stopped_it(
    tmp_path: Path, jsonl: Path, error: str, at: int, is_kept: bool
) -> None:
    readings.clear()
    corpus = BreakingCorpus(**vars(local(tmp_path / "new/set", [str(jsonl)])), error=error, at=at)
    with pytest.raises(UserError if error == "RuntimeError" else getattr(builtins, error)):
        prepare(corpus, progress=False)
    assert [path.name for path in tmp_path.rglob("*") if path.name == "set.partial"] == ["set.partial"] * is_kept
    assert (tmp_path / "new").exists() == is_kept


@pytest.mark.parametrize("is_older", [False, True])
def test_what_breaks_after_a_commit_goes_on_also_after_one_that_did_not_count_the_bytes_of_text(
    tmp_path: Path, jsonl: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch, is_older: bool
) -> None:
    readings.clear()
    monkeypatch.setattr("quack_lm.data.prepare.BATCH_DOCUMENTS", 5)
    corpus = BreakingCorpus(**vars(local(tmp_path / "set", [str(jsonl)])), error="RuntimeError", at=2)
    with pytest.raises(UserError, match="broken"):
        prepare(corpus, progress=False, commit_every_s=0)
    assert committed_documents(tmp_path / "set.partial") == 100
    if is_older:
        path = tmp_path / "set.partial/progress.json"
        progress = json.loads(path.read_text())
        assert all(counts.pop("text_bytes") for counts in progress["written"].values())
        path.write_text(json.dumps(progress))
    prepare(corpus, progress=False)
    made, expected = contents(tmp_path / "set"), contents(prepared)
    del made["manifest.json"], expected["manifest.json"]
    assert made == expected
    counts = splits(prepared).model_dump()
    if is_older:
        counts = {split: own | {"text_bytes": None} for split, own in counts.items()}
    assert splits(tmp_path / "set").model_dump() == counts


def test_a_second_preparation_of_a_directory_is_refused(tmp_path: Path, jsonl: Path, texts: list[str]) -> None:
    corpus = local(tmp_path / "set", [str(jsonl)])
    script = tmp_path / "prepare.py"
    script.write_text(INTERRUPTIBLE)
    first = start_preparation(script, dict(vars(corpus)), pause_s=60)
    try:
        while committed_documents(tmp_path / "set.partial") == 0:
            assert first.poll() is None
            time.sleep(0.01)
        with pytest.raises(UserError, match="another preparation"):
            prepare(corpus, progress=False)
    finally:
        first.kill()
        first.wait()
    prepare(corpus, progress=False)
    assert not (tmp_path / "set.lock").exists()


# ------------------------------------------------------------------------------------------------ refusals


def refusal(corpus: Corpus) -> str:
    with pytest.raises(UserError) as caught:
        prepare(corpus, progress=False)
    assert not Path(corpus.dir).exists()
    assert not Path(corpus.dir + ".partial").exists()
    return str(caught.value)


def test_a_vocabulary_of_another_size_names_the_value_to_set(tmp_path: Path, prepared: Path, jsonl: Path) -> None:
    for wrong in (299, 512):
        corpus = local(tmp_path / "set", [str(jsonl)], tokenizer=str(prepared / "tokenizer"), vocab_size=wrong)
        assert "set data.vocab_size=300" in refusal(corpus)
    assert "too small" in refusal(local(tmp_path / "set", [str(jsonl)], vocab_size=60_000))
    assert "at least 257" in refusal(local(tmp_path / "set", [str(jsonl)], vocab_size=256))


def test_a_missing_end_of_text_token_names_the_key(tmp_path: Path, prepared: Path, jsonl: Path) -> None:
    corpus = local(tmp_path / "set", [str(jsonl)], tokenizer=str(prepared / "tokenizer"), eot_token="</s>")
    assert "data.eot_token='</s>'" in refusal(corpus)
    assert EOT in refusal(corpus)


def test_a_missing_column_names_those_there_are(tmp_path: Path, jsonl: Path) -> None:
    message = refusal(local(tmp_path / "set", [str(jsonl)], text_field="body"))
    assert "data.text_field=body" in message
    assert "id, text" in message


def test_a_column_that_is_not_text_is_named(tmp_path: Path, jsonl: Path) -> None:
    assert "data.text_field" in refusal(local(tmp_path / "set", [str(jsonl)], text_field="id"))


def test_a_data_set_of_the_hub_that_is_a_script_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil/set").mkdir(parents=True)
    (tmp_path / "evil/set/set.py").write_text("import os\nos.mkdir('pwned')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    overrides = ["data=cosmopedia_v2", "data.streaming=false", "data.name=evil/set", f"data.dir={tmp_path}/new/set"]
    overrides += ["data.tokenizer=null"]
    message = refusal(instantiate(compose(overrides)["data"]))
    assert message.startswith("data.name=evil/set data.subset=cosmopedia-v2 data.split=train: cannot read it: ")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["evil", "set", "set.py"]


def test_a_data_set_of_the_hub_is_pinned_to_the_commit_that_its_revision_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = {"/api/datasets/owner/name": "a" * 40, "/api/datasets/owner/name/revision/v2": "b" * 40}

    class Hub(http.server.BaseHTTPRequestHandler):
        """What the hub answers of a data set."""

        def do_GET(self) -> None:
            commit = commits.get(self.path.partition("?")[0])
            answer = json.dumps({"id": "owner/name", "sha": commit}).encode()
            self.send_response(200 if commit else 404)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        for typed, commit in ((None, "a" * 40), ("v2", "b" * 40), ("c" * 40, "c" * 40)):
            overrides = ["data=hub", "data.name=owner/name", f"data.dir={tmp_path}/set"]
            corpus = instantiate(compose([*overrides, *([f"data.revision={typed}"] if typed else [])])["data"])
            settled = corpus.settled()
            assert (settled.revision, settled.settings()["revision"]) == (commit, commit)
            assert corpus.open_settings == (set() if typed == commit else {"revision"})
        server.shutdown()


def test_the_choices_that_are_data_sets_of_the_hub_are_known_by_their_names() -> None:
    of_hub = {name: read_choice("data", name) for name in choices("data")}
    named = {own["name"]: name for name, own in of_hub.items() if own["_target_"].endswith("HubCorpus")}
    assert {name: choice for name, choice in named.items() if choice != "hub"} == HUB_CHOICES


def test_a_preparation_ends_after_as_many_tokens_as_are_wanted(
    tmp_path: Path, jsonl: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quack_lm.data.prepare.BATCH_DOCUMENTS", 5)
    tokenizer = str(prepared / "tokenizer")
    manifest = TokenData.open(
        prepare(local(tmp_path / "set", [str(jsonl)], tokenizer=tokenizer, max_tokens=4000), progress=False)
    ).manifest
    whole = TokenData.open(prepared).manifest
    n, n_whole = (sum(m.split(split).tokens for split in SPLITS) for m in (manifest, whole))
    assert 4000 <= n < 4000 + 5 * 80 * 8 < n_whole
    assert documents(tmp_path / "set", "val") == documents(prepared, "val")[: manifest.splits.val.documents]


@pytest.mark.parametrize("suffix", [".jsonl", ".json.gz", ".parquet", ".txt", ""])
def test_the_format_of_files_is_that_of_their_names_and_the_manifest_has_it(
    tmp_path: Path, texts: list[str], prepared: Path, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"texts{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"text": texts}), path)
    elif suffix.startswith(".json"):
        write_jsonl(path, list(texts))
        path.write_bytes(gzip.compress(path.read_bytes()) if suffix.endswith(".gz") else path.read_bytes())
    else:
        path.write_text("\n\n".join(text.replace("\n", " ") for text in texts))
    corpus = local(tmp_path / "set", [str(path)], format="auto", tokenizer=str(prepared / "tokenizer"))
    made = TokenData.open(prepare(corpus, progress=False)).manifest
    kind = {".jsonl": "jsonl", ".json.gz": "jsonl", ".parquet": "parquet"}.get(suffix, "text")
    assert made.source["format"] == kind
    note = "(data.separator=auto)" if kind == "text" else f"{kind}, by the names of the files (data.format=auto)"
    assert note in capsys.readouterr().out
    assert sum(made.split(split).documents for split in SPLITS) == len(texts)
    path.unlink()
    prepare(corpus, progress=False)  # the same command, for a data set that is complete
    assert "is prepared already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("rows", "hint"),
    [
        ([{"id": "a12", "body": "a longer text", "n": 3}], "; the longest text is in body: set data.text_field=body"),
        (
            [{"id": "a", "doc": {"text": "a longer text"}}],
            "; the longest text is in doc.text: set data.text_field=doc.text",
        ),
        ([{"id": 1, "n": 3}], ""),
    ],
)
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_a_missing_column_is_answered_with_the_one_that_has_the_text(
    tmp_path: Path, rows: list[dict[str, Any]], hint: str, format: str
) -> None:
    if format == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x")
    else:
        (tmp_path / "x").write_text(json.dumps(rows))
    message = refusal(local(tmp_path / "set", [str(tmp_path / "x")], format=format))
    assert message.partition("; correct it")[0].endswith(hint or ("id, n" if format == "jsonl" else "are id, n"))


def test_a_corpus_too_small_for_three_splits_names_the_fraction(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "few.jsonl", [f"document {i} of the three there are" for i in range(3)])
    corpus = local(tmp_path / "set", [str(source)], vocab_size=257, val_fraction=0.001, probe_fraction=0.001)
    assert "raise data.val_fraction=0.001" in refusal(corpus)
    blank = write_jsonl(tmp_path / "blank.jsonl", ["", ""])
    assert "no documents" in refusal(local(tmp_path / "set", [str(blank)]))


# ------------------------------------------------------------------------------------------------ files as they are


def texts_of(corpus: Corpus) -> list[str | None]:
    return [row["text"] for row in corpus.stream()]


def gzipped(path: Path) -> Path:
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    return path.with_name(path.name + ".gz")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"text": "a", "id": 1}, {"text": "b", "id": "x1"}),
        ({"text": "a", "date": None}, {"text": "b", "date": "2024-01-01"}),
        ({"text": "a", "n": 1}, {"text": "b", "extra": "q"}),
        ({"text": None, "n": 1}, {"text": "b", "n": 1}),
        ({"n": 1, "text": "2024-01-01"}, {"text": "b"}),
    ],
)
@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_only_the_text_column_of_each_file_is_read(
    tmp_path: Path, format: str, first: dict[str, Any], second: dict[str, Any]
) -> None:
    for name, row in (("a", first), ("b", second)):
        if format == "jsonl":
            (tmp_path / name).write_text(json.dumps(row) + "\n\n" + json.dumps(row))
        else:
            pq.write_table(pa.Table.from_pylist([row, row]), tmp_path / name)
    corpus = local(tmp_path / "set", [f"{tmp_path}/a", f"{tmp_path}/b"], format=format)
    assert texts_of(corpus) == [first["text"], first["text"], "b", "b"]


def test_a_parquet_file_without_rows_has_no_documents(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["b"]}), tmp_path / "b.parquet")
    assert texts_of(local(tmp_path / "set", [f"{tmp_path}/*.parquet"], format="parquet")) == ["b"]


def test_text_may_be_inside_of_another_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"doc": {"text": "a", "n": 1}, "n": 2}, {"doc": None, "n": 2}, {"doc": {"text": None, "n": 3}, "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for format in ("jsonl", "parquet"):
        corpus = local(tmp_path / "set", [f"{tmp_path}/a.{format}"], format=format, text_field="doc.text")
        assert texts_of(corpus) == ["a", None, None]
    hub = instantiate(compose(["data=cosmopedia_v2", "data.text_field=doc.text"])["data"])
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    monkeypatch.setattr(HubCorpus, "_hub_stream", lambda self: stream)
    assert texts_of(hub) == ["a", None, None]


def test_a_json_array_is_its_items_and_a_dot_may_be_part_of_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("\n \n" + json.dumps([{"a.b": "one"}, {"a": {"b": "two"}}], indent=1))
    assert texts_of(local(tmp_path / "set", [f"{tmp_path}/a.json"], text_field="a.b")) == ["one", "two"]
    pq.write_table(pa.table({"a": [{"b": "of another column"}], "a.b": ["one"]}), tmp_path / "a.parquet")
    corpus = local(tmp_path / "set", [f"{tmp_path}/a.parquet"], format="parquet", text_field="a.b")
    assert texts_of(corpus) == ["one"]


@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_compression_and_a_byte_order_mark_change_nothing(tmp_path: Path, format: str) -> None:
    content = "größer" if format == "text" else json.dumps({"text": "größer"}, ensure_ascii=False)
    (tmp_path / "a").write_text(content, encoding="utf-8-sig")
    (tmp_path / "b").write_text(content, encoding="utf-8")
    gzipped(tmp_path / "a")
    (tmp_path / "c.zst").write_bytes(pa.compress((tmp_path / "a").read_bytes(), codec="zstd", asbytes=True))
    assert texts_of(local(tmp_path / "set", [f"{tmp_path}/*"], format=format, separator=None)) == ["größer"] * 4


# ------------------------------------------------------------------------------------------------ parts of a text file

STORIES = ["One.\nAnd more.", "Two.", "Three."]
PARAGRAPHS = "\n\n".join(f"Paragraph {i}." for i in range(9))


@pytest.mark.parametrize(
    ("joint", "separator", "end"),
    [
        (f"\n{EOT}\n", "auto", EOT),
        (EOT, "auto", EOT),
        ("\n \n\n", "auto", "blank lines"),
        ("\n\n", "blank_lines", None),
        ("\n---\n", "---", None),
        ("\n\n\n", r"\n\n\n", None),
        # With the line ends of Windows, no separator of two lines was ever found.
        ("\r\n---\r\n", r"\n---\n", None),
        ("\r\n---\r\n", r"\r\n---\r\n", None),
        ("\r\n \r\n", "auto", "blank lines"),
    ],
)
def test_documents_of_a_text_file_end_at_the_separator(tmp_path: Path, joint: str, separator: str, end: str) -> None:
    (tmp_path / "a.txt").write_text(joint.join(STORIES) + "\n", newline="")
    corpus = local(tmp_path / "set", [f"{tmp_path}/a.txt"], format="text", separator=separator)
    assert [text for text in texts_of(corpus) if text] == STORIES
    note = f"data.files: {tmp_path}/a.txt: documents end at {end} (data.separator=auto)"
    assert corpus.notes() == [note] * (end is not None)


@pytest.mark.parametrize("mention", [f"The token {EOT} ends it.", f"`{EOT}`", f"end = '{EOT}'", f"\n{EOT}\n"])
def test_a_mention_of_the_end_of_text_token_separates_no_documents(tmp_path: Path, mention: str) -> None:
    # One made a file of 400 paragraphs two documents.
    (tmp_path / "a.txt").write_text(f"{PARAGRAPHS}\n\n{mention}\n\n{PARAGRAPHS}")
    corpus = local(tmp_path / "set", [f"{tmp_path}/a.txt"], format="text")
    assert len(texts_of(corpus)) == 19
    (note,) = corpus.notes()
    assert note.endswith(f"blank lines (data.separator=auto); {EOT} is in them 1 times, but seems not to end documents")


def test_without_blank_lines_each_line_of_a_single_text_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("emma\nolivia\n")
    assert [t for t in texts_of(local(tmp_path / "s", [f"{tmp_path}/*"], format="text")) if t] == ["emma", "olivia"]


def test_a_separator_across_chunks_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes("ein<end>\r\ngrößer<end>\ndrei".encode())
    for size in range(1, 12):
        monkeypatch.setattr("quack_lm.data.documents.CHUNK_BYTES", size)
        corpus = local(tmp_path / "set", [f"{tmp_path}/a.txt"], format="text", separator=r"<end>\n")
        assert texts_of(corpus) == ["ein", "größer", "drei"]


@pytest.mark.parametrize("n_files", [2, 3, 90])
@pytest.mark.parametrize("joint", [EOT, f"\n{EOT}\n", f" {EOT}\n"])
def test_text_files_of_any_number_are_split_at_the_end_of_text_token(tmp_path: Path, n_files: int, joint: str) -> None:
    # Three or more were a document each, with hundreds of these in it.
    for number in range(n_files):
        (tmp_path / f"{number:02}").write_text(f"{PARAGRAPHS}{joint}{number}{joint}")
    corpus = local(tmp_path / "set", [f"{tmp_path}/??"], format="text")
    expected = [text for number in range(n_files) for text in (PARAGRAPHS, str(number))]
    assert [text.rstrip() for text in texts_of(corpus) if text] == expected
    (note,) = corpus.notes()
    assert note.startswith(f"data.files: {tmp_path}/00")
    assert note.endswith(f": documents end at {EOT} (data.separator=auto)")


def test_text_files_without_end_of_text_tokens_are_a_document_each_where_they_fill_the_splits(tmp_path: Path) -> None:
    texts = [f"{PARAGRAPHS}\n", "b\n", f"One line\n{EOT}\nof a manual\n"]
    for name, text in zip("abc", texts, strict=True):
        (tmp_path / name).write_text(text)
    corpus = local(tmp_path / "set", [f"{tmp_path}/?"], format="text", val_fraction=1e-6, probe_fraction=1e-6)
    assert ": documents end at blank lines (data.separator=auto)" in corpus.notes()[0]
    assert len(texts_of(corpus)) > len(texts)
    more = [f"{number}\n\nof many\n" for number in range(100)]
    for number, text in enumerate(more):
        (tmp_path / f"file{number:03}").write_text(text)
    corpus = local(tmp_path / "set", [f"{tmp_path}/file*"], format="text", val_fraction=0.3, probe_fraction=0.3)
    assert texts_of(corpus) == more
    assert ": each file is a document (data.separator=auto)" in corpus.notes()[0]
    split = local(tmp_path / "set", [f"{tmp_path}/?"], format="text", separator=EOT)
    assert texts_of(split)[2:] == ["One line", "of a manual"]


@pytest.mark.parametrize("name", ["a.csv", "B.TSV", "a.csv.gz"])
def test_a_table_is_not_taken_for_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("text,label\none,1\n")
    with pytest.raises(UserError, match=r"is a table by its name, .*: convert it to jsonl or parquet"):
        local(tmp_path / "set", [f"{tmp_path}/*"], format="auto").notes()


def test_a_damaged_file_among_texts_is_named_while_it_is_asked_where_documents_end(tmp_path: Path) -> None:
    for number in range(70):  # so many that not every one is looked at for a separator
        (tmp_path / f"{number:02}.txt").write_text("The same text.\n")
    (tmp_path / "01.txt.gz").write_bytes(gzip.compress(b"A text.\n" * 999)[:-20])
    with pytest.raises(UserError, match=r"01\.txt\.gz: cannot read it"):
        local(tmp_path / "set", [f"{tmp_path}/*"], format="auto").notes()


def test_what_auto_chose_is_said_before_a_preparation_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("The only paragraph.\n\nAnd another one.\n")
    refusal(local(tmp_path / "set", [f"{tmp_path}/a.txt"], format="text"))
    assert "a.txt: documents end at blank lines (data.separator=auto)" in capsys.readouterr().out


def test_too_few_documents_for_the_splits_are_said_to_be_too_few(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the only document there is, long enough for a few merges " * 5)
    corpus = local(tmp_path / "set", [f"{tmp_path}/a.txt"], format="text", val_fraction=0.01, vocab_size=257)
    assert re.search(r"none of the 1 documents .*: add documents, or say where .*data\.separator", refusal(corpus))
    corpus = local(tmp_path / "set", [f"{tmp_path}/a.txt"], format="text", val_fraction=0.99, probe_fraction=0.001)
    assert "no documents to train a tokenizer on: all 1 of the corpus fell into the other splits" in refusal(corpus)


# ------------------------------------------------------------------------------------------------ bad records


def test_bad_records_are_left_out_and_counted_on_request(
    tmp_path: Path, prepared: Path, texts: list[str], capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    lines = [json.dumps({"text": text}).encode() for text in texts]
    bad = [b'{"text": "torn', b'{"text": "\\ud800"}', b'{"text": 5}', b'"\xff"', b'{"text": ' + 5000 * b"9" + b"}"]
    for i, line in enumerate(bad):
        lines.insert(9 * i + 1, line)
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    corpus = local(tmp_path / "set", [f"{tmp_path}/a.jsonl"], on_bad_record="skip")
    message = f"data.files: {tmp_path}/a.jsonl line 2: not JSON"
    assert message in refusal(dataclasses.replace(corpus, on_bad_record="error"))
    # A preparation that stops after a commit, and goes on, has not forgotten the first of them.
    monkeypatch.setattr("quack_lm.data.prepare.BATCH_DOCUMENTS", 5)
    readings.clear()
    with pytest.raises(UserError, match="broken"):
        prepare(BreakingCorpus(**vars(corpus), error="RuntimeError", at=2), progress=False, commit_every_s=0)
    progress = tmp_path / "set.partial/progress.json"
    progress.write_text(progress.read_text().replace('"BreakingCorpus"', '"LocalCorpus"'))
    prepare(corpus, progress=False)
    assert f"left out 5 bad records, the first: {message}" in capsys.readouterr().out
    for split in SPLITS:
        assert documents(tmp_path / "set", split) == documents(prepared, split)


@pytest.mark.parametrize(
    ("format", "rows", "text_field", "error"),
    [
        # Each was counted as one record, however many the file has.
        (
            "jsonl",
            [{"body": "a"}] * 5,
            "text",
            "line 1: no field data.text_field=text: no 'text' among the fields body",
        ),
        ("parquet", [{"body": "a"}] * 5, "text", "has no column data.text_field=text: its columns are body"),
        ("parquet", [{"text": b"a"}] * 5, "text", "column data.text_field=text is binary, and not text"),
        # These were dropped without a word, where another record of the file has the field.
        ("jsonl", [{"text": "ok"}, {"a": 1, "b": 2}], "text", "line 2: no field data.text_field=text: no 'text' among"),
        ("jsonl", [{"c": {"d": "ok"}}, {"c": {}}], "c.d", "line 2: no field data.text_field=c.d: no 'd' among"),
        (
            "jsonl",
            [{"c": {"d": "ok"}}, {"c": "x"}],
            "c.d",
            "line 2: no field data.text_field=c.d: no 'd' inside of str",
        ),
    ],
)
def test_each_record_without_the_text_field_is_a_bad_record(
    tmp_path: Path, format: str, rows: list[dict[str, Any]], text_field: str, error: str
) -> None:
    if format == "jsonl":
        (tmp_path / "a").write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a")
    corpus = local(tmp_path / "set", [f"{tmp_path}/a"], format=format, text_field=text_field)
    read = list(corpus.stream())
    assert [row["text"] for row in read if row["error"] is None] == ["ok"] * (len(rows) == 2)
    assert len(read) == len(rows)
    assert error in next(row["error"] for row in read if row["error"])
    assert "data.on_bad_record=skip" in refusal(corpus)


def test_bytes_that_are_no_text_are_a_bad_record_of_a_parquet_file_at_its_row(tmp_path: Path) -> None:
    values = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    rows = list(local(tmp_path / "set", [f"{tmp_path}/a.parquet"], format="parquet").stream())
    assert [row["text"] for row in rows] == ["a", None, "c"]
    assert rows[1]["error"].startswith(f"data.files: {tmp_path}/a.parquet row 2: expected text")


# ------------------------------------------------------------------------------------------------ tokenizers


def other_tokenizer(path: Path, model: Any, *, normalizer: Any = None, added: list[Any] | None = None) -> str:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace() if not added else None
    tokenizer.normalizer = normalizer
    tokenizer.add_tokens(added or [])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return str(path)


def unigram(*pieces: str) -> Any:
    letters = [(letter, -5.0) for letter in "abcdefghijklmnopqrstuvwxyz </>|"]
    return tokenizers.models.Unigram([("<unk>", -9.0), *((piece, -1.0) for piece in pieces), *letters], unk_id=0)


@pytest.mark.parametrize("kind", ["piece", "added", "normalized"])
def test_no_text_of_a_document_is_an_end_token_whatever_the_tokenizer(tmp_path: Path, kind: str) -> None:
    added = {"added": [tokenizers.AddedToken("</s>", special=False)]}.get(kind)
    model = unigram("a") if added else unigram("</s>")
    normalizer = tokenizers.normalizers.Lowercase() if kind == "normalized" else None
    name = other_tokenizer(tmp_path / "t", model, normalizer=normalizer, added=added)
    size = len(AutoTokenizer.from_pretrained(name))
    end = "</S>" if kind == "normalized" else "</s>"
    source = write_jsonl(tmp_path / "a.jsonl", [f"a {'x' * i} b {end}{end} c {end}" for i in range(60)])
    corpus = local(tmp_path / "set", [str(source)], tokenizer=name, vocab_size=size, eot_token="</s>")
    manifest = TokenData.open(prepare(corpus, progress=False)).manifest
    tokens = np.concatenate([np.fromfile(p, dtype="<u2") for p in (tmp_path / "set").glob("*.bin")])
    assert np.sum(tokens == manifest.eot_id) == sum(manifest.split(split).documents for split in SPLITS) == 60


def test_an_end_token_that_is_also_that_of_unknown_text_is_refused(tmp_path: Path) -> None:
    model = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    name = other_tokenizer(tmp_path / "t", model)
    source = write_jsonl(tmp_path / "a.jsonl", ["a a b"] * 9)
    message = refusal(local(tmp_path / "set", [str(source)], tokenizer=name, vocab_size=2, eot_token="[UNK]"))
    assert re.search(r"data\.eot_token='\[UNK\]' is what data\.tokenizer=.* makes of text as well, of 'b'", message)


@pytest.mark.parametrize("kind", ["unknown", "dropped", "changed"])
def test_characters_that_a_tokenizer_loses_are_counted(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["ducks", "swim", "[UNK]", "</s>"]
    vocabulary = {word: i for i, word in enumerate(words)}
    model: Any = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    if kind == "dropped":  # a BPE without an unknown token
        model = tokenizers.models.BPE({letter: i for i, letter in enumerate(["</s>", *"ducksim", "w"])}, [])
    normalizer = tokenizers.normalizers.Lowercase() if kind == "changed" else None
    name = other_tokenizer(tmp_path / "t", model, normalizer=normalizer)
    odd = "Ducks swim" if kind == "changed" else "日日"
    texts = [*(f"ducks swim {'swim ' * i}" for i in range(60)), odd]
    source = write_jsonl(tmp_path / "a.jsonl", list(texts))
    size = len(AutoTokenizer.from_pretrained(name))
    corpus = local(tmp_path / "set", [str(source)], tokenizer=name, vocab_size=size, eot_token="</s>", workers=2)
    manifest = TokenData.open(prepare(corpus, progress=False)).manifest
    said = capsys.readouterr().out
    lost = {"changed": r"\(1\).*'D' \(1\)"}.get(kind, r"\(2\).*'日' \(2\)")
    assert re.search(rf"warning: 0\.0\d+% of the characters {lost}", said), said
    is_empty = kind == "dropped"
    assert ("left out 1 documents of which data.tokenizer makes no tokens" in said) == is_empty
    assert sum(manifest.split(split).documents for split in SPLITS) == 61 - is_empty
    # What is lost of a document is part of its text.
    assert sum(manifest.split(split).text_bytes or 0 for split in SPLITS) == sum(
        len(text.encode()) for text in texts[: 61 - is_empty]
    )


def test_one_long_run_of_a_character_is_no_word_of_a_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    # As one word, which takes a minute, its merges doubled it up to a token of 131,072 letters.
    corpus = local(tmp_path / "set", [str(tmp_path / "a.jsonl")])
    run = next(run for letter in "abcdef" if corpus.split_of(run := letter * 200_000) == "train")
    write_jsonl(tmp_path / "a.jsonl", [*texts, run])
    directory = prepare(corpus, progress=False)
    state = json.loads((directory / "tokenizer/tokenizer.json").read_text())
    assert max(map(len, state["model"]["vocab"])) <= 1000
    assert state["pre_tokenizer"]["type"] == "ByteLevel"
    assert documents(directory, "train")[-1] == run


# A word without a bound keeps the library that trains a tokenizer busy for a minute, in which it sees no signal.
TRAINING = """
import sys
from quack_lm.cli import main
from quack_lm.data import tokenizer
tokenizer.WORD_BYTES = 10**7
sys.argv[0:1] = ["quack-lm", "prepare"]
sys.exit(main())
"""
PREPARING = """
import sys
from quack_lm.cli import main
if __name__ == "__main__":
    sys.argv[0:1] = ["quack-lm", "prepare"]
    sys.exit(main())
"""


def interrupt(tmp_path: Path, script: str, begins: Path, *overrides: str, after_s: float) -> float:
    """Press Ctrl-C so long after a file of a preparation exists; returns the seconds that it took to end."""
    environment = os.environ | {"PYTHONPATH": str(CONFIG_DIR.parent)}
    (tmp_path / "script.py").write_text(script)
    command = [sys.executable, str(tmp_path / "script.py"), "data=local", f"data.dir={tmp_path}/set", *overrides]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    try:
        while not begins.exists():
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(after_s)  # the reading of the texts
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        return time.monotonic() - pressed
    finally:
        process.kill()


def test_ctrl_c_ends_the_training_of_a_tokenizer(tmp_path: Path, texts: list[str]) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [*texts, *(letter * 200_000 for letter in "abcdefgh")])
    overrides = ["data.format=jsonl", f"data.files=[{source}]", "data.workers=0", "data.vocab_size=300"]
    interrupt(tmp_path, TRAINING, tmp_path / "set.partial", *overrides, after_s=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "script.py"]


@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_ends_the_encoding_of_a_long_document(tmp_path: Path, workers: int) -> None:
    # It was encoded to its end first, by the workers too: a line of 30 MB took 17 s.
    (tmp_path / "a.txt").write_text("\n".join([*("Z" * n for n in range(1, 99)), "Z" * 60_000_000]))
    merges = {f"{'Z' * 2**i}": i + 1 for i in range(9)}
    model = tokenizers.models.BPE({"</s>": 0} | merges, [(piece, piece) for piece in list(merges)[:-1]])
    name = other_tokenizer(tmp_path / "t", model)
    overrides = [f"data.files=[{tmp_path}/a.txt]", f"data.tokenizer={name}", "data.eot_token='</s>'"]
    overrides += ["data.vocab_size=10", f"data.workers={workers}"]
    assert interrupt(tmp_path, PREPARING, tmp_path / "set.partial/progress.json", *overrides, after_s=6) < 10


# ------------------------------------------------------------------------------------------------ paths and manifests


def test_a_quoted_tilde_is_the_home_directory(
    tmp_path: Path, prepared: Path, jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(prepared / "tokenizer", tmp_path / "t")
    shutil.copy(jsonl, tmp_path)
    overrides = ['data.dir="~/set"', 'data.files=["~/*.jsonl"]', 'data.tokenizer="~/t"', "data.format=jsonl"]
    overrides += ["data=local", "data.vocab_size=300", "data.val_fraction=0.2", "data.probe_fraction=0.1"]
    assert prepare(instantiate(compose(overrides)["data"]), progress=False) == tmp_path / "set"
    assert documents(tmp_path / "set", "val") == documents(prepared, "val")


def test_a_manifest_older_than_a_setting_had_its_default(tmp_path: Path, prepared: Path, jsonl: Path) -> None:
    shutil.copytree(prepared, tmp_path / "set")
    manifest = json.loads((prepared / "manifest.json").read_text())
    for key in ("separator", "on_bad_record"):
        del manifest["source"][key]
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    assert is_prepared(local(tmp_path / "set", [str(jsonl)]))
    with pytest.raises(UserError, match=r"data\.separator was 'auto', is 'x'"):
        is_prepared(local(tmp_path / "set", [str(jsonl)], separator="x"))


# ------------------------------------------------------------------------------------------------ the script


def test_the_script_prepares_prints_a_table_and_refuses_in_one_line(tmp_path: Path, jsonl: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CONFIG_DIR.parent / "scripts" / "prepare_data.py"), *arguments]
        # The hub, for this test: a port where nobody listens.
        environment = os.environ | {"PYTHONPATH": str(CONFIG_DIR.parent), "HF_ENDPOINT": "http://127.0.0.1:9"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)

    overrides = ["data=local", "data.dir=set", "data.format=jsonl", "data.vocab_size=300", "data.val_fraction=0.2"]
    overrides += ["data.probe_fraction=0.1", f"data.files=[{jsonl}]", "data.workers=0"]
    done = run("--check", *overrides)
    assert (done.returncode, done.stdout) == (0, "set is not prepared yet; its settings are valid\n"), done.stderr
    assert not list(tmp_path.glob("set*"))
    done = run(*overrides)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[-4:]] == ["split", *SPLITS]
    TokenData.open(tmp_path / "set")
    assert run("--check", *overrides).stdout == "set is prepared already\n"
    for wrong, named in (
        (["data=local", "data.dir=other"], "data.files"),
        (["data=cosmopedia_v2"], "no connection"),
        (["data.dir=other"], "no data chosen"),
        ([], "quack-lm prepare data=stdlib"),
    ):
        refused = run(*wrong)
        assert refused.returncode == 2
        assert named in refused.stderr
        assert len(refused.stderr.splitlines()) == 1
    assert re.findall("data=([a-z0-9_]+) ", refused.stdout) == choices("data")
