"""Text from a checkpoint: how tokens are drawn, what is needed to load one, and the command."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import call, snapshot, write_files
from hypothesis import given
from hypothesis import strategies as st
from models import small_config, small_model
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from quack_lm.config import compose
from quack_lm.data.manifest import TokenData
from quack_lm.errors import UserError
from quack_lm.files import file_sha256
from quack_lm.generate import GrowingText, LanguageModel, Sampling, generate_tokens, load
from quack_lm.text import echo_piece
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run
from quack_lm.training.loop import train

GREEDY = Sampling(temperature=0)
# Of two, three and four bytes in UTF-8; a byte-level tokenizer of 512 entries has no token for any of them.
WIDE = "naïve – 😀𝔘"


@pytest.fixture(scope="module")
def run(tiny_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of MLA with QK norm that has two checkpoints."""
    run_dir = tmp_path_factory.mktemp("generate") / "run"
    settings = ["attention=mla", "stabilizer=qk_norm", "trainer.seq_len=64", "trainer.global_batch_size=4"]
    settings += ["trainer.micro_batch_size=4", "trainer.steps=40", "trainer.checkpoint_every=20", "optimizer.lr=0.1"]
    settings += ["optimizer.warmup_steps=0", "trainer.probe_every=0", "logger.progress=false", "trainer.compile=false"]
    settings += ["model.d_model=32", "model.n_layers=2", "model.n_heads=2", "model.d_ff=48"]
    train(build_run(check_run(compose(["experiment=tiny", *tiny_data, *settings, f"run_dir={run_dir}"]))))
    return run_dir


@pytest.fixture(scope="module")
def language_model(run: Path) -> LanguageModel:
    return load(run, device="cpu")


# ------------------------------------------------------------------------------------------------ drawing


def logits(seed: int, rows: int = 3, vocabulary: int = 23) -> Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 50),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([None, 1, 4, 22, 100]),
    top_p=st.sampled_from([1e-300, 1e-6, 0.3, 0.9, 0.999, 1.0]),
)
def test_probabilities_are_those_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float
) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, logits(seed))
    if top_k is not None:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    ours = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(logits(seed))
    torch.testing.assert_close(ours, scores.softmax(-1))


def test_tokens_are_drawn_with_their_probabilities() -> None:
    sampling, count = Sampling(temperature=2.0, top_k=5), 4000
    row = logits(0, rows=1)
    generators = [sampling.generator(number) for number in range(count)]
    drawn = sampling.draw(row.expand(count, -1), generators)
    frequencies = torch.bincount(drawn, minlength=row.shape[1]) / count
    expected = sampling.probabilities(row)[0]
    assert ((frequencies - expected).abs() <= 4 * (expected * (1 - expected) / count).sqrt()).all()


def made(prompts: list[list[int]], sampling: Sampling, **more: int) -> list[list[int | None]]:
    model = small_model(small_config("mla", "qk_norm")).eval()
    steps = generate_tokens(model, prompts, max_new_tokens=12, sampling=sampling, **more)
    return [list(row) for row in zip(*steps, strict=True)]


def test_the_draws_of_a_prompt_depend_on_seed_and_number_and_not_on_the_batch() -> None:
    prompts = [[1, 2, 3], [4], [1, 2, 3]]
    sampling = Sampling(seed=5)
    together = made(prompts, sampling)
    alone = [made([prompt], sampling, first_number=number)[0] for number, prompt in enumerate(prompts)]
    assert together == alone
    assert together[0] != together[2]
    assert made(prompts, sampling) == together != made(prompts, Sampling(seed=6))


def test_a_sequence_ends_at_the_stop_token_and_the_others_go_on() -> None:
    free = made([[1, 2, 3], [4]], Sampling(seed=1))
    stop = next(token for token in free[0][3:] if token not in free[1])
    assert stop is not None
    until = free[0].index(stop)
    first, second = made([[1, 2, 3], [4]], Sampling(seed=1), stop_id=stop)
    assert first == free[0][:until] + [None] * (12 - until)
    assert second == free[1]
    # When all have ended, nothing more is made.
    assert made([[1, 2, 3]], Sampling(seed=1), stop_id=stop) == [free[0][:until]]


def test_tokens_that_the_tokenizer_does_not_have_are_never_drawn() -> None:
    (free,), (bounded,) = (made([[1, 2]], Sampling(temperature=9.0), **more) for more in ({}, {"n_ids": 5}))
    assert max(token or 0 for token in free) >= 5
    assert all(token is not None and token < 5 for token in bounded)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, r"temperature=-1\.0 must be 0 or a number from"),
        ({"temperature": float("nan")}, r"temperature=nan must"),
        ({"temperature": 1e-40}, r"temperature=1e-40 must be 0 or a number from 1e-06 on"),
        ({"top_k": 0}, r"top_k=0 must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, r"top_p=1\.5 must"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**settings)


def test_calls_that_mean_nothing_are_refused(language_model: LanguageModel) -> None:
    assert language_model.generate([]) == list(language_model.stream([])) == []
    for prompts, settings, message in (
        ("abc", {}, r"prompts is a list of texts: write \[prompt\]"),
        (["a"], {"batch_size": 0}, r"batch_size=0 must be at least 1"),
        (["a"], {"max_new_tokens": -1}, r"max_new_tokens=-1 must be at least 1"),
        (["\ud800"], {}, r"prompt '\\ud800' must be text that UTF-8 can encode"),
    ):
        with pytest.raises(UserError, match=message):
            language_model.generate(prompts, **settings)


def test_a_token_is_not_chosen_among_logits_that_are_not_finite() -> None:
    model = small_model(small_config("mha", "none")).eval()
    with torch.no_grad():
        model.norm.weight.fill_(torch.inf)
    with pytest.raises(UserError, match=r"the model's logits are not finite; take float32"):
        next(generate_tokens(model, [[1]], max_new_tokens=1, sampling=GREEDY))


def test_a_cache_beyond_the_memory_is_refused_before_it_is_allocated() -> None:
    model = small_model(small_config("mla", "qk_norm")).eval()
    with pytest.raises(UserError, match=r"max_new_tokens=100000000000: the cache of 1 texts of .* GiB, .*; lower it"):
        next(generate_tokens(model, [[1]], max_new_tokens=10**11, sampling=GREEDY))


# ------------------------------------------------------------------------------------------------ texts


def test_the_pieces_of_a_stream_make_the_text(language_model: LanguageModel) -> None:
    for prompts in (["import ", "", "def main(x):\n    return "], [WIDE]):
        pieces = list(language_model.stream(prompts, max_new_tokens=30, sampling=Sampling(temperature=3.0)))
        texts = language_model.generate(prompts, max_new_tokens=30, sampling=Sampling(temperature=3.0))
        assert ["".join(parts) for parts in zip(*pieces, strict=True)] == texts
        assert len(pieces) > 5


def test_the_bytes_of_a_character_are_shown_together(language_model: LanguageModel) -> None:
    ids = language_model.encode(WIDE)
    assert len(ids) > len(WIDE)
    text = GrowingText(language_model.tokenizer, [])
    pieces = [text.add(token) for token in ids]
    assert "".join(pieces) == WIDE
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_that_spells_a_special_token_is_text(language_model: LanguageModel) -> None:
    eot = language_model.tokenizer.eot_id
    assert language_model.encode("") == [eot]
    ids = language_model.encode("<|endoftext|>")
    assert eot not in ids
    assert language_model.tokenizer.decode(ids) == "<|endoftext|>"


def test_a_small_batch_makes_the_texts_of_a_large_one(language_model: LanguageModel) -> None:
    prompts = ["import", "a", "class Foo:\n", ""]
    texts = [language_model.generate(prompts, max_new_tokens=8, batch_size=n) for n in (1, 3, 16)]
    assert texts[0] == texts[1] == texts[2]


def test_control_characters_of_a_text_do_nothing_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    echo_piece("a\x1b[2J\n\tb\r")
    assert capsys.readouterr().out == "a\\x1b[2J\n\tb\\r"


# ------------------------------------------------------------------------------------------------ loading


def test_a_checkpoint_and_a_tokenizer_are_all_that_is_needed(
    run: Path, tiny_data: list[str], tmp_path: Path, language_model: LanguageModel
) -> None:
    data = Path(tiny_data[1].removeprefix("data.dir="))
    shutil.copytree(run / "checkpoints" / "step_00000040", tmp_path / "step_00000040")
    shutil.copytree(data / "tokenizer", tmp_path / "tokenizer")
    moved = load(tmp_path / "step_00000040", tokenizer=tmp_path / "tokenizer", device="cpu")
    expected = language_model.generate(["import"], sampling=GREEDY)
    assert moved.generate(["import"], sampling=GREEDY) == expected
    assert moved.note is None
    assert load(run, tokenizer=data, device="cpu").generate(["import"], sampling=GREEDY) == expected


def test_a_runs_directory_is_its_last_checkpoint_and_every_checkpoint_has_its_own_weights(
    run: Path, language_model: LanguageModel
) -> None:
    earlier = load(run / "checkpoints" / "step_00000020", device="cpu")
    assert language_model.trained.checkpoint.name == "step_00000040"
    ids = torch.tensor([language_model.encode("import os\n")])
    assert not torch.allclose(earlier.model(ids), language_model.model(ids))


def test_the_loaded_model_has_the_validation_loss_of_the_run(
    run: Path, tiny_data: list[str], language_model: LanguageModel
) -> None:
    sequences = TokenData.open(Path(tiny_data[1].removeprefix("data.dir="))).sequences("val", 64)
    count = min(language_model.trained.config["trainer"]["val_sequences"], len(sequences))
    batch = torch.from_numpy(sequences.read(np.arange(count)))
    nats = language_model.model(batch[:, :-1], batch[:, 1:]).double().mean().item()
    assert nats == pytest.approx(json.loads((run / "summary.json").read_text())["val_loss"], rel=1e-5)


def test_the_python_of_the_documentation_works(
    run: Path, language_model: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    page = (Path(__file__).parents[1] / "docs" / "generation.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mla").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    exec(code, {})  # our own page
    second = language_model.generate(["class Node:"], max_new_tokens=50, sampling=GREEDY)[0]
    third = language_model.generate(["import "], sampling=Sampling(top_p=0.9, seed=1))[0]
    assert capsys.readouterr().out == f"{second}\n{third}"


def test_documents_are_masked_as_in_the_run(tiny_data: list[str], tmp_path: Path) -> None:
    settings = ["trainer.steps=1", "optimizer.warmup_steps=0", "logger.progress=false", "trainer.seq_len=32"]
    masked = ["data.mask_documents=true", f"run_dir={tmp_path}/masked"]
    train(build_run(check_run(compose(["experiment=tiny", *tiny_data, *settings, *masked]))))
    loaded = load(tmp_path / "masked", device="cpu")
    assert loaded.model.eot_id == loaded.tokenizer.eot_id


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_shows_prompt_and_text(run: Path, language_model: LanguageModel) -> None:
    flags = ("--max-new-tokens", "20", "--device", "cpu")
    code, stdout, stderr = call("generate", str(run), "--prompt", "def main(", "--temperature", "0", *flags)
    (text,) = language_model.generate(["def main("], max_new_tokens=20, sampling=GREEDY)
    assert (code, stdout) == (0, f"def main({text}\n")
    assert re.fullmatch(rf"{run}/checkpoints/step_00000040, [\d.]+ s\n", stderr)


def test_the_command_takes_prompts_from_files_and_writes_texts(
    run: Path, tmp_path: Path, language_model: LanguageModel
) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffimport\n\nclass A:\n")  # with a byte-order mark
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "import"}\n{"prompt": "class A:"}\n')
    flags = ("--max-new-tokens", "9", "--seed", "3", "--top-k", "20", "--top-p", "0.9", "--device", "cpu")
    sampling = Sampling(seed=3, top_k=20, top_p=0.9)
    prompts = ["import", "class A:"]
    texts = language_model.generate(prompts, max_new_tokens=9, sampling=sampling)
    for name in ("prompts.txt", "prompts.jsonl"):
        out = tmp_path / "new" / "texts.jsonl"
        code, stdout, _ = call("generate", str(run), "--prompts", str(tmp_path / name), *flags, "-o", str(out))
        assert (code, stdout) == (0, f"2 texts: {out}\n")
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert lines == [{"prompt": p, "text": t} for p, t in zip(prompts, texts, strict=True)]
    code, stdout, _ = call("generate", str(run), *flags, "--prompt", "import", "--prompt", "class A:")
    shown = "".join(f"--- {i}\n{p}{t}\n" for i, (p, t) in enumerate(zip(prompts, texts, strict=True), start=1))
    assert (code, stdout) == (0, shown)


def test_a_text_longer_than_the_sequences_of_training_is_noted(run: Path) -> None:
    code, _, stderr = call("generate", str(run), "--max-new-tokens", "64", "--device", "cpu")
    assert code == 0
    assert stderr.startswith("note: up to 65 tokens, and the model was trained on sequences of 64 (trainer.seq_len)\n")


def damaged(run: Path, tmp_path: Path, edit: str) -> Path:
    copy = tmp_path / "step_00000040"
    shutil.copytree(run / "checkpoints" / copy.name, copy)
    if edit == "shard":
        (shard,) = copy.glob("*.safetensors")
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    else:
        (copy / "manifest.json").unlink()
    return copy


REFUSED = {
    "no checkpoint": ([], r"the following arguments are required: checkpoint; see --help"),
    "unknown flag": (["RUN", "--tempe=1"], r"--help"),
    "nowhere": (["TMP/nowhere"], r"TMP/nowhere is neither a checkpoint nor the directory of a run"),
    "no run": (["TMP"], r"TMP is neither a checkpoint nor the directory of a run"),
    "damaged": (["SHARD"], r"step_00000040 is not a valid checkpoint: shard-.* has another sha256"),
    "incomplete": (["MANIFEST"], r"step_00000040 is not a valid checkpoint: it has no manifest\.json"),
    "no tokenizer": (["RUN", "--tokenizer", "TMP/nowhere"], r"tokenizer=TMP/nowhere: no such directory; give"),
    "not a tokenizer": (["RUN", "--tokenizer", "TMP"], r"tokenizer=TMP: .*not a transformers tokenizer directory"),
    "other tokenizer": (["RUN", "--tokenizer", "TMP/other"], r"tokenizer=TMP/other is another tokenizer .*; leave it"),
    "damaged tokenizer": (["RUN", "--tokenizer", "TMP/torn"], r"TMP/torn/tokenizer\.json is damaged .*; copy it again"),
    "temperature": (["RUN", "--temperature=-1"], r"temperature=-1\.0 must be 0 or a number from"),
    "temperature that is a word": (["RUN", "--temperature=hot"], r"--temperature: invalid float value: 'hot'"),
    "no tokens": (["RUN", "--max-new-tokens=0"], r"--max-new-tokens 0 must be at least 1"),
    "out is a directory": (["RUN", "-o", "TMP"], r"-o TMP must name a file"),
    "out is in a file": (["RUN", "-o", "TMP/empty.txt/o"], r"-o TMP/\S+: TMP/empty.txt is not a writable directory"),
    "prompt that is no text": (["RUN", "--prompt", "\udcff"], r"--prompt '\\udcff' is not UTF-8 text"),
    "prompts with half a character": (
        ["RUN", "--prompts", "TMP/half.jsonl"],
        r"half\.jsonl, line 1: expected .* UTF-8",
    ),
    "no prompts": (["RUN", "--prompts", "TMP/none.txt"], r"--prompts TMP/none\.txt: .*No such file or directory"),
    "empty prompts": (["RUN", "--prompts", "TMP/empty.txt"], r"empty\.txt has no prompt; write one in each line"),
    "prompts that are no json": (["RUN", "--prompts", "TMP/bad.jsonl"], r'bad\.jsonl, line 2: expected \{"prompt"'),
    "prompts that are no text": (["RUN", "--prompts", "TMP/latin.txt"], r"latin\.txt is not UTF-8 text"),
}
if not torch.cuda.is_available():
    REFUSED["no GPU"] = (["RUN", "--device", "cuda"], r"--device cuda: torch sees no GPU here; use --device cpu")


@pytest.mark.parametrize("name", REFUSED)
def test_a_mistake_is_one_line_and_writes_nothing(name: str, run: Path, tiny_data: list[str], tmp_path: Path) -> None:
    arguments, message = REFUSED[name]
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
    (tmp_path / "half.jsonl").write_text('{"prompt": "\\ud800"}\n')
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    tokenizer = Path(tiny_data[1].removeprefix("data.dir="), "tokenizer", "tokenizer.json").read_text()
    swapped = tokenizer.replace('"x": ', '"?": ', 1).replace('"y": ', '"x": ', 1).replace('"?": ', '"y": ', 1)
    write_files(tmp_path, {"other/tokenizer.json": swapped.encode(), "torn/tokenizer.json": tokenizer[:999].encode()})
    places = {"TMP": tmp_path, "RUN": run}
    for edit in {"SHARD", "MANIFEST"} & {*arguments}:
        places[edit] = damaged(run, tmp_path, edit.lower())
    for word, place in places.items():
        arguments = [argument.replace(word, str(place)) for argument in arguments]
    before = snapshot(tmp_path, run)
    code, stdout, stderr = call("generate", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
    assert re.search(message.replace("TMP", re.escape(str(tmp_path))), stderr), stderr
    assert snapshot(tmp_path, run) == before


def test_data_that_was_prepared_again_is_not_taken_for_the_runs(
    run: Path, tiny_data: list[str], tmp_path: Path
) -> None:
    # The same run, whose data.dir is now another data set.
    data = Path(tiny_data[1].removeprefix("data.dir="))
    copy = tmp_path / "step_00000040"
    shutil.copytree(run / "checkpoints" / copy.name, copy)
    shutil.copytree(data, tmp_path / "data")
    manifest = json.loads((tmp_path / "data" / "manifest.json").read_text())
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({**manifest, "source": {"other": 1}}))
    rewrite_config(copy, {"data.dir": str(tmp_path / "data")})
    with pytest.raises(UserError, match=r"is not the data set that .* was trained on; .*--tokenizer DIR"):
        load(copy, device="cpu")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(UserError, match=rf"no prepared data in {tmp_path}/data, .*--tokenizer DIR"):
        load(copy, device="cpu")
    note = load(copy, tokenizer=data / "tokenizer", device="cpu").note
    assert "was not compared with the tokenizer of the run's data" in (note or "")


def test_tokens_without_a_tokenizer_need_one_for_text_and_none_for_an_export(
    run: Path, tiny_data: list[str], tmp_path: Path
) -> None:
    copy = tmp_path / "step_00000040"
    shutil.copytree(run / "checkpoints" / copy.name, copy)
    shutil.copytree(Path(tiny_data[1].removeprefix("data.dir=")), tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "tokenizer")
    path = tmp_path / "data" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer": {"name": "unknown", "files": {}}}))
    rewrite_config(copy, {"data.dir": str(tmp_path / "data")}, manifest_sha256=file_sha256(path))
    with pytest.raises(UserError, match=rf"data\.dir={tmp_path}/data of .* has no tokenizer, .*--tokenizer DIR"):
        load(copy, device="cpu")
    code, stdout, stderr = call("export", str(copy), str(tmp_path / "out"))
    assert (code, stderr) == (0, "")
    assert f"no tokenizer: {tmp_path}/data has none" in stdout
    assert "AutoTokenizer" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"attention._target_": "os.system"}, r"state\.json: its config is not one of this version: .*os\.system"),
        ({"attention._target_": "quack_lm.attention.gone.Gone"}, r"another version of quack_lm"),
        ({"model.width": 3}, r"its config is not one of this version: unknown key model\.width"),
        ({"model": 3}, r"model=3 must be a section with keys"),
        ({"model.d_model": 36}, r"belongs to another model|has another shape"),
    ],
)
def test_an_untrusted_config_of_a_checkpoint_builds_nothing_but_a_model(
    edit: dict, message: str, run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "step_00000040"
    shutil.copytree(run / "checkpoints" / copy.name, copy)
    rewrite_config(copy, edit)
    with pytest.raises(UserError, match=message):
        load(copy, device="cpu")


def rewrite_config(checkpoint: Path, edit: dict, **more: str) -> None:
    """Change the config in a checkpoint, and more of its state; its manifest agrees again afterwards."""
    state, manifest = (json.loads((checkpoint / name).read_text()) for name in ("state.json", "manifest.json"))
    state = {**state, **more, "config": {**state["config"], **edit}}
    path = checkpoint / "state.json"
    path.write_text(json.dumps(state))
    manifest["files"]["state.json"] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
