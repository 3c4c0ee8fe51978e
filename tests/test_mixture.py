"""What a run is trained on: the manifest says it, and several data sets are mixed in one exact order."""

import json
import math
import random
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calls import call
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data import counting_sequences, sizes
from test_train import SMALL, assert_close_records, assert_same_tensors, records, run_here, run_process, tokens_per_byte

from quack_lm.config import compose, fingerprint
from quack_lm.data.batches import EvalBatches, MixtureOrder, SequenceMixture, Sequences, TrainBatches, permutation
from quack_lm.data.corpus import LocalCorpus
from quack_lm.data.manifest import TokenData
from quack_lm.data.prepare import prepare
from quack_lm.errors import UserError
from quack_lm.files import file_sha256
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run, run_warnings

lengths = st.lists(st.integers(1, 30), min_size=1, max_size=4)
weights = st.lists(st.fractions(Fraction(1, 50), 9, max_denominator=50), min_size=4, max_size=4)


def mixture(n_sequences: list[int], shares: list[Fraction], seq_len: int = 3) -> SequenceMixture:
    """Data sets that count tokens, each from another thousand on: a token says which sequence it is from."""
    rows = [1000 * i + np.arange(n * seq_len + 1, dtype=np.uint16) for i, n in enumerate(n_sequences)]
    names = [f"set {i}" for i in range(len(rows))]
    return SequenceMixture([Sequences([row], seq_len) for row in rows], shares[: len(rows)], names)


def batch(batches: TrainBatches, step: int) -> torch.Tensor:
    return torch.cat(list(batches.micro_batches(step)))


# ------------------------------------------------------------------------------------------------ order


@given(n_sequences=lengths, shares=weights, world=st.integers(1, 3), per_rank=st.integers(1, 4), micro=sizes)
@settings(deadline=None, max_examples=40)
def test_the_global_batch_of_a_mixture_is_the_same_for_every_world_and_micro_batch_size(
    n_sequences: list[int], shares: list[Fraction], world: int, per_rank: int, micro: int
) -> None:
    mixed, size = mixture(n_sequences, shares), world * per_rank * micro
    alone = TrainBatches(mixed, seed=3, global_batch_size=size, micro_batch_size=1)
    for step in (5, 0, 300):
        ranks = [
            TrainBatches(mixed, seed=3, global_batch_size=size, micro_batch_size=micro, rank=rank, world_size=world)
            for rank in range(world)
        ]
        assert torch.cat([batch(rank, step) for rank in ranks]).equal(batch(alone, step))
        sources = torch.cat([source for rank in ranks for source in rank.sources(step)])
        assert sources.equal(batch(alone, step)[:, 0] // 1000)


@given(n_sequences=lengths, shares=weights, seed=st.integers(0, 9), first=st.integers(0, 9000))
@settings(deadline=None, max_examples=25)
def test_each_data_set_of_a_mixture_is_read_in_its_own_order_epoch_by_epoch(
    n_sequences: list[int], shares: list[Fraction], seed: int, first: int
) -> None:
    mixed = mixture(n_sequences, shares)
    order = MixtureOrder(mixed, seed=seed)
    # One after the other, with a counter for each data set.
    read = [0] * len(n_sequences)
    for source in order.sources(0, first).tolist():
        read[source] += 1
    assert order.counts(first) == read
    expected = []
    for source in order.sources(first, 50).tolist():
        epoch, position = divmod(read[source], n_sequences[source])
        start = sum(n_sequences[:source])
        expected.append(start + int(permutation(n_sequences[source], seed=seed, epoch=epoch)[position]))
        read[source] += 1
    assert order.indices(first, 50).tolist() == expected


@given(shares=weights, blocks=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_after_each_block_every_data_set_has_had_its_share(shares: list[Fraction], blocks: int) -> None:
    mixed = mixture([3, 4, 5, 6], shares)
    n = blocks * MixtureOrder.BLOCK
    counts = MixtureOrder(mixed, seed=1).counts(n)
    assert sum(counts) == n
    for count, share in zip(counts, mixed.shares, strict=True):
        assert abs(count - share * n) < len(counts) - 1 if share == max(mixed.shares) else 0 <= share * n - count < 1


def test_data_sets_alternate_within_a_block_and_another_seed_alternates_them_otherwise() -> None:
    mixed = mixture([30, 30], [Fraction(3), Fraction(1)])
    sources = MixtureOrder(mixed, seed=0).sources(0, 512)
    assert 96 < sources.sum() < 160  # a quarter of them is 128
    assert np.diff(sources).any(0)
    assert (MixtureOrder(mixed, seed=1).sources(0, 512) != sources).any()


def test_the_order_of_a_mixture_never_changes() -> None:
    order = MixtureOrder(mixture([3, 5], [Fraction(1), Fraction(2)]), seed=7)
    # Written down once: a run that is resumed with a later version must see the same data.
    assert order.sources(0, 12).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1]
    assert order.indices(0, 12).tolist() == [2, 1, 7, 6, 5, 4, 3, 4, 7, 0, 1, 6]


@given(n_sequences=st.integers(1, 40), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=20)
def test_a_mixture_of_one_data_set_is_that_data_set(n_sequences: int, seed: int) -> None:
    sequences = counting_sequences(n_sequences, 4)
    own = {"seed": seed, "global_batch_size": 6, "micro_batch_size": 3}
    alone = TrainBatches(sequences, **own)
    mixed = TrainBatches(SequenceMixture([sequences], [Fraction(7)], ["it"]), **own)
    order = np.concatenate([permutation(n_sequences, seed=seed, epoch=epoch) for epoch in range(-(-30 // n_sequences))])
    for step in range(5):
        assert batch(mixed, step).equal(batch(alone, step))
        assert batch(alone, step)[:, 0].tolist() == (4 * order[6 * step : 6 * step + 6].astype(int)).tolist()
    assert not list(alone.source_tokens(0))


@given(n_sequences=lengths, shares=weights, wanted=st.integers(4, 60), world=st.integers(1, 3), micro=sizes)
@settings(deadline=None, max_examples=40)
def test_the_evaluation_set_of_a_mixture_has_the_shares_as_far_as_there_are_sequences(
    n_sequences: list[int], shares: list[Fraction], wanted: int, world: int, micro: int
) -> None:
    mixed = mixture(n_sequences, shares)
    ranks = [
        EvalBatches(mixed, n_sequences=wanted, micro_batch_size=micro, rank=rank, world_size=world)
        for rank in range(world)
    ]
    rows = torch.cat([tokens[weight > 0] for rank in ranks for tokens, weight in rank])
    assert len(rows.unique(dim=0)) == len(rows) == ranks[0].n_sequences
    sources = [source[weight > 0] for rank in ranks for source, (_, weight) in zip(rank.sources(), rank, strict=True)]
    assert torch.cat(sources).equal(rows[:, 0] // 1000)
    found = np.bincount(rows[:, 0] // 1000, minlength=len(n_sequences))
    for count, share, n in zip(found, mixed.shares, n_sequences, strict=True):
        assert count == min(n, int(share * wanted)) or share == max(mixed.shares)


# ------------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def tokens(tiny_data: list[str]) -> Path:
    """The small data set that all tests share."""
    return Path(tiny_data[1].removeprefix("data.dir="))


@pytest.fixture(scope="module")
def words(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another data set of the same tokenizer, from a jsonl file."""
    place, rng = tmp_path_factory.mktemp("words"), random.Random(0)
    texts = [
        " ".join(rng.choices(["import", "logit", "def", "0.5", "größer"], k=rng.randint(20, 90))) for _ in range(60)
    ]
    (place / "words.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return prepare(
        LocalCorpus(
            dir=str(place / "words"),
            files=[str(place / "words.jsonl")],
            format="auto",
            tokenizer=str(tokens / "tokenizer"),
            vocab_size=512,
            val_fraction=0.2,
            probe_fraction=0.2,
            shard_tokens=1000,
            workers=0,
        ),
        progress=False,
    )


@pytest.fixture(scope="module")
def mixed(tokens: Path, words: Path) -> list[str]:
    return ["data=mixture", f"data.dirs=[{tokens},{words}]", "data.weights=[1,0.5]"]


def test_a_run_on_a_mixture_logs_each_data_set_and_their_losses_make_the_loss(
    tmp_path: Path, tokens: Path, words: Path, mixed: list[str]
) -> None:
    overrides = [*SMALL, *mixed, "logger.log_every=1", f"run_dir={tmp_path / 'run'}"]
    run = build_run(check_run(compose(overrides)))
    # The first batch once more, each data set by itself and by its own shards.
    first = torch.cat(list(run.batches.micro_batches(0)))
    sources = torch.cat(list(run.batches.sources(0)))
    with torch.no_grad():
        losses = run.model(first[:, :-1], first[:, 1:]).view(len(first), -1).mean(1)
    for number, path in enumerate((tokens, words)):
        own = TokenData.open(path).sequences("train", 32)
        rows = {tuple(row) for row in own.read(np.arange(len(own))).tolist()}
        assert all(
            (tuple(row) in rows) == (source == number) for row, source in zip(first.tolist(), sources, strict=True)
        )
    run.lock.close()  # type: ignore[union-attr]
    summary = run_here([*mixed, "logger.log_every=1"], tmp_path / "run")
    lines = records(tmp_path / "run")
    assert lines[1]["train/loss/tokens"] == pytest.approx(losses[sources == 0].mean().item(), rel=1e-5)
    assert lines[1]["train/loss/words"] == pytest.approx(losses[sources == 1].mean().item(), rel=1e-5)
    read = {"tokens": 0.0, "words": 0.0}
    for before, line in zip([{}, *lines[1:]], lines[1:], strict=False):
        new = {name: line[f"data/tokens/{name}"] - before.get(f"data/tokens/{name}", 0) for name in read}
        parts = [new[name] * line[f"train/loss/{name}"] for name in read if new[name]]
        assert sum(new.values()) == 12 * 32
        assert sum(parts) / sum(new.values()) == pytest.approx(line["train/loss"], rel=1e-5)
        for name, path in (("tokens", tokens), ("words", words)):
            n_sequences = (TokenData.open(path).manifest.splits.train.tokens - 1) // 32
            assert line[f"data/epoch/{name}"] == pytest.approx(line[f"data/tokens/{name}"] / 32 / n_sequences)
    held_out = [line for line in lines if "val/loss" in line]
    assert all({"val/loss/tokens", "val/loss/words"} <= line.keys() for line in held_out)
    # Seven sequences by the weights: five and two.
    assert [(5 * x["val/loss/tokens"] + 2 * x["val/loss/words"]) / 7 for x in held_out] == pytest.approx(
        [x["val/loss"] for x in held_out]
    )
    # The same in bits per byte of text: each data set by its own, and all by the text of these sequences.
    ratios = [tokens_per_byte(tokens), tokens_per_byte(words)]
    for line in held_out:
        nats = line["val/loss/tokens"], line["val/loss/words"]
        own = [line["val/bits_per_byte/tokens"], line["val/bits_per_byte/words"]]
        assert own == pytest.approx([x * ratio / math.log(2) for x, ratio in zip(nats, ratios, strict=True)])
        bits, n_bytes = (5 * nats[0] + 2 * nats[1]) / math.log(2), 5 / ratios[0] + 2 / ratios[1]
        assert line["val/bits_per_byte"] == pytest.approx(bits / n_bytes)
    assert summary["val_bits_per_byte"] == held_out[-1]["val/bits_per_byte"]
    described = json.loads((tmp_path / "run/environment.json").read_text())["data"]
    assert [one["manifest_sha256"] for one in described.values()] == [
        file_sha256(path / "manifest.json") for path in (tokens, words)
    ]
    assert described["words"]["source"]["files"] == [str(words.parent / "words.jsonl")]
    assert described["words"]["share"] == pytest.approx(1 / 3)
    assert summary["manifest_sha256"] not in [one["manifest_sha256"] for one in described.values()]


def test_a_mixture_has_the_same_curves_on_two_ranks_and_after_an_interruption(tmp_path: Path, mixed: list[str]) -> None:
    changes = [*mixed, "trainer.device=cpu"]
    run_here(changes, tmp_path / "alone")
    done = run_process(changes, tmp_path / "two", ranks=2)
    assert done.returncode == 0, done.stderr
    assert_close_records(tmp_path / "alone", tmp_path / "two", 2e-4)
    run_here([*changes, "trainer.steps=3"], tmp_path / "parts")
    run_here(changes, tmp_path / "parts")
    assert_same_tensors(tmp_path / "alone", tmp_path / "parts")
    of_alone, of_parts = records(tmp_path / "alone"), {line["step"]: line for line in records(tmp_path / "parts")}
    for line in of_alone:
        again = of_parts[line["step"]]
        assert line.items() <= again.items()


def test_a_run_on_a_mixture_continues_only_with_the_same_data_sets(
    tmp_path: Path, tokens: Path, words: Path, mixed: list[str]
) -> None:
    run_here([*mixed, "trainer.steps=1"], tmp_path / "run")
    shutil.copytree(words, tmp_path / "words")
    moved = ["data=mixture", f"data.dirs=[{tokens},{tmp_path / 'words'}]", "data.weights=[1,0.5]"]
    assert check_run(compose([*SMALL, *moved, f"run_dir={tmp_path / 'run'}"])).resumes_from
    manifest = tmp_path / "words/manifest.json"
    manifest.write_text(manifest.read_text().replace('"unigram_entropy": ', '"unigram_entropy": 1'))
    with pytest.raises(UserError, match=r"data\.dirs=.*words is not the data set that run_dir=.* was trained on"):
        check_run(compose([*SMALL, *moved, f"run_dir={tmp_path / 'run'}"]))
    other = [*mixed[:2], "data.weights=[1,0.6]"]
    with pytest.raises(UserError, match=r"data\.weights=\[1\.0, 0\.5\], not \[1\.0, 0\.6\]"):
        check_run(compose([*SMALL, *other, f"run_dir={tmp_path / 'run'}"]))


def test_without_weights_each_token_weighs_the_same(tokens: Path, words: Path, tmp_path: Path) -> None:
    plan = check_run(compose([*SMALL, "data=mixture", f"data.dirs=[{tokens},{words}]", f"run_dir={tmp_path / 'run'}"]))
    n_tokens = [TokenData.open(path).manifest.splits.train.tokens for path in (tokens, words)]
    assert plan.data.shares == [Fraction(n, sum(n_tokens)) for n in n_tokens]


def test_a_weight_that_gives_a_data_set_no_sequence_is_warned_of(mixed: list[str], words: Path, tmp_path: Path) -> None:
    plan = check_run(compose([*SMALL, *mixed, "data.weights=[1,1e-300]", f"run_dir={tmp_path / 'run'}"]))
    n_sequences = plan.settings.steps * plan.settings.global_batch_size
    expected = f"data.weights gives {words} none of the {n_sequences} sequences of this run"
    assert expected in run_warnings(plan)


def test_data_sets_of_the_same_name_are_called_by_more_of_their_paths(
    tokens: Path, words: Path, tmp_path: Path
) -> None:
    shutil.copytree(words, tmp_path / "other one" / "tokens")
    dirs = f"data.dirs=[{tokens},'{tmp_path / 'other one' / 'tokens'}']"
    plan = check_run(compose([*SMALL, "data=mixture", dirs, f"run_dir={tmp_path / 'run'}"]))
    assert plan.data.names == [f"{tokens.parent.name}_tokens", "other_one_tokens"]


def test_data_sets_of_other_tokenizers_are_refused(tokens: Path, words: Path, tmp_path: Path) -> None:
    shutil.copytree(words, tmp_path / "set")
    (tmp_path / "set/tokenizer/more.json").write_text("{}")
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    manifest["tokenizer"]["files"]["more.json"] = file_sha256(tmp_path / "set/tokenizer/more.json")
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=rf"{tokens} and .*set differ in their tokenizer; prepare one .*tokenizer={tokens}"
    ):
        check_run(
            compose([*SMALL, "data=mixture", f"data.dirs=[{tokens},{tmp_path / 'set'}]", f"run_dir={tmp_path}/r"])
        )


# ------------------------------------------------------------------------------------------------ the manifest


def test_a_prepared_directory_is_all_that_a_run_needs_and_the_run_says_what_it_was_made_of(
    words: Path, tmp_path: Path
) -> None:
    config = compose([*SMALL, f"data.dir={words}", "data.mask_documents=true"])
    # The experiment has another choice of data, of another vocabulary.
    assert config["data"]["_target_"] == "quack_lm.data.corpus.LocalCorpus"
    assert config["data"]["files"] == [str(words.parent / "words.jsonl")]
    assert (config["data"]["format"], config["data"]["mask_documents"]) == ("jsonl", True)
    assert config["model"]["vocab_size"] == config["data"]["vocab_size"] == 512
    run_here([f"data.dir={words}", "trainer.steps=1"], tmp_path / "run")
    written = compose([], file=tmp_path / "run/config.yaml")
    assert written["data"] == {**config["data"], "mask_documents": False}
    assert fingerprint(compose([*SMALL, f"data.dir={words}", "trainer.steps=1"])) == fingerprint(written)
    described = json.loads((tmp_path / "run/environment.json").read_text())["data"]["words"]
    assert described["made_of"] == f"LocalCorpus files=['{words.parent / 'words.jsonl'}']"
    assert described["manifest_sha256"] == file_sha256(words / "manifest.json")


def test_a_vocabulary_that_no_choice_has_comes_from_the_manifest(words: Path, tmp_path: Path) -> None:
    shutil.copytree(words, tmp_path / "set")
    path = tmp_path / "set/manifest.json"
    path.write_text(path.read_text().replace('"vocab_size": 512', '"vocab_size": 600'))
    config = compose(["experiment=tiny", f"data.dir={tmp_path / 'set'}"])
    assert config["model"]["vocab_size"] == config["data"]["vocab_size"] == 600
    assert (
        compose(["experiment=tiny", f"data.dir={tmp_path / 'set'}", "model.vocab_size=640"])["model"]["vocab_size"]
        == 640
    )


@pytest.mark.parametrize(
    "typed", ["data.val_fraction=0.3", "data.files=[x]", "data.tokenizer=gpt2", "data.format=text", "data=hub"]
)
def test_what_is_typed_and_contradicts_the_manifest_is_refused(words: Path, typed: str) -> None:
    with pytest.raises(UserError, match=rf"data\.dir={words} was made with {typed.partition('=')[0]}=.*, not "):
        compose(["experiment=tiny", f"data.dir={words}", typed])


def test_what_is_typed_and_agrees_with_the_manifest_changes_nothing(words: Path) -> None:
    own = ["experiment=tiny", f"data.dir={words}"]
    assert compose([*own, "data=local", "data.val_fraction=0.2", "data.vocab_size=512", "data.workers=0"]) == compose(
        own
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": "by hand"}, r"source\.corpus='by hand' is none of .*HubCorpus, LocalCorpus"),
        ({"corpus": ["x"]}, r"source\.corpus=\['x'\] is none of"),
        ({"corpus": "HubCorpus"}, r"data\.\w+ is not set|unknown key data\.\w+"),
        ({"val_fraction": "half"}, r"data\.val_fraction='half': .*number"),
        ({"surprise": 1}, r"unknown key data\.surprise"),
    ],
)
def test_a_manifest_of_an_odd_source_is_refused(
    words: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"manifest\.json is damaged: ({message})"):
        compose(["experiment=tiny", f"data.dir={with_source(words, tmp_path, change)}"])


def test_a_manifest_chooses_neither_a_class_nor_a_directory(words: Path, tmp_path: Path) -> None:
    directory = with_source(words, tmp_path, {"_target_": "os.system", "dir": "/x", "workers": 9})
    data = compose(["experiment=tiny", f"data.dir={directory}"])["data"]
    assert (data["_target_"], data["dir"], data["workers"]) == ("quack_lm.data.corpus.LocalCorpus", str(directory), 0)


def with_source(words: Path, tmp_path: Path, change: dict[str, Any]) -> Path:
    shutil.copytree(words, tmp_path / "set")
    manifest = json.loads((tmp_path / "set/manifest.json").read_text())
    manifest["source"] |= change
    (tmp_path / "set/manifest.json").write_text(json.dumps(manifest))
    return tmp_path / "set"


def test_preparing_asks_no_manifest_what_to_prepare(words: Path) -> None:
    code, _, stderr = call("prepare", "data=stdlib", f"data.dir={words}", "--check")
    assert code == 2
    assert "holds a data set made with other settings (data.corpus was 'LocalCorpus', is 'StdlibCorpus')" in stderr
    code, stdout, _ = call("prepare", "data=mixture", f"data.dirs=[{words}]")
    assert (code, stdout) == (2, "")
