"""`quack-lm export` and `trainer.init_from`: transformers computes what was trained, and the way back."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from calls import call, snapshot, write_files
from models import ATTENTIONS, LONE, STABILIZERS, small_config, small_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import quack_lm.hf  # noqa: F401, registers the class that some directories need
from quack_lm.cli.export import writing
from quack_lm.config import compose, identity, instantiate
from quack_lm.data.batches import EvalBatches
from quack_lm.data.manifest import TokenData
from quack_lm.errors import UserError
from quack_lm.files import file_sha256
from quack_lm.hf.counterpart import as_it_is, counterpart
from quack_lm.hf.directory import WeightFiles, template, write_config, write_weights
from quack_lm.logit_paths import largest_partner_product
from quack_lm.model import Transformer, count_parameters
from quack_lm.step import LogitWeights
from quack_lm.training import checkpoint
from quack_lm.training.build import build_run, make_model
from quack_lm.training.check import check_run, run_warnings
from quack_lm.training.init_from import open_initial_weights
from quack_lm.training.loop import train
from quack_lm.training.state import TrainState

ROOT = Path(__file__).parents[1]
LLAMA, QWEN3, GLM, DEEPSEEK, OURS = (
    f"{name}ForCausalLM" for name in ("Llama", "Qwen3", "Glm4Moe", "DeepseekV3", "QuackLM")
)
# By attention: the class without and with QK norm; of one that is new, ours.
CLASSES = {
    **dict.fromkeys(("mha", "gqa", "mha_one_head"), (LLAMA, QWEN3)),
    **dict.fromkeys(("mla", "mla_one_head", "mla_wide_values"), (GLM, GLM)),
    "mla_latent_norm": (DEEPSEEK, OURS),
}
RUN = [
    "experiment=tiny",
    "model.d_model=24",
    "model.n_layers=2",
    "model.n_heads=3",
    "model.d_ff=40",
    "optimizer.lr=0.05",
    "optimizer.warmup_steps=0",
    "trainer.seq_len=32",
    "trainer.global_batch_size=4",
    "trainer.micro_batch_size=2",
    "trainer.val_sequences=7",
    "trainer.probe_sequences=2",
    "trainer.compile=false",
    "logger.progress=false",
]


def random_model(config: dict[str, Any]) -> Transformer:
    """Gains around one, matrices that keep the size of what they multiply: attention is far from uniform."""
    model = small_model(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(0, 1.5 * parameter.shape[1] ** -0.5, generator=generator)
    return model


def exported(config: dict[str, Any], model: Transformer, directory: Path, *, is_stock: bool = True, **options) -> Any:
    """The model of transformers that `quack-lm export` makes of one, loaded from its directory."""
    directory.mkdir()
    chosen = counterpart(model, config) if is_stock else as_it_is(model, config, "asked for")
    theirs = template(chosen, {"max_position_embeddings": 64})
    write_config(directory, theirs, torch.float32, generation={})
    write_weights(directory, theirs, chosen, dict(model.named_parameters()).__getitem__, torch.float32, **options)
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=False).eval()


def assert_same_logits(ours: Transformer, theirs: Any) -> None:
    batch = tokens(2, 23)
    with torch.no_grad():
        mine, reference = ours(batch), theirs(batch).logits
    assert mine.std() > 0.3
    torch.testing.assert_close(reference, mine, rtol=1e-4, atol=1e-4 * mine.abs().max().item())


# ------------------------------------------------------------------------------------------------ what is computed


@pytest.mark.parametrize("stabilizer", STABILIZERS)
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_transformers_computes_the_logits_of_every_attention_and_stabilizer_tied_and_untied(
    attention: str, stabilizer: str, tmp_path: Path
) -> None:
    for is_tied in (False, True):
        config = small_config(attention, stabilizer, f"model.tied_embeddings={str(is_tied).lower()}")
        ours = random_model(config)
        theirs = exported(config, ours, tmp_path / str(is_tied))
        assert_same_logits(ours, theirs)
        assert type(theirs).__name__ == CLASSES.get(attention, (OURS, OURS))[stabilizer == "qk_norm"]
        assert "auto_map" not in json.loads((tmp_path / str(is_tied) / "config.json").read_text())


@pytest.mark.parametrize(
    ("attention", "stabilizer", "overrides", "name"),
    [
        ("gqa", "qk_norm", ["stabilizer.eps=0.3"], QWEN3),
        ("mla", "qk_norm", ["stabilizer.eps=0.3"], GLM),
        ("mla_wide_values", "qk_norm", ["stabilizer.eps=0.3", "model.norm_eps=0.01"], GLM),
        ("mla_latent_norm", "none", ["attention.norm_eps=0.3", "attention.rope_dim=6"], DEEPSEEK),
        ("mha", "none", ["attention.n_heads=4", "attention.head_dim=6"], "MistralForCausalLM"),
        ("mla", "none", ["attention.nope_dim=47", "attention.rope_dim=2"], GLM),
    ],
)
def test_epsilons_and_widths_that_a_class_does_not_have_are_moved_into_the_weights(
    attention: str, stabilizer: str, overrides: list[str], name: str, tmp_path: Path
) -> None:
    config = small_config(attention, stabilizer, "attention.rope_theta=500.0", *overrides)
    ours = random_model(config)
    theirs = exported(config, ours, tmp_path / "out")
    assert type(theirs).__name__ == name
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("attention", ["gqa", "mla", "mla_latent_norm"])
def test_the_class_of_this_package_has_our_tensors_and_computes_the_same(attention: str, tmp_path: Path) -> None:
    config = small_config(attention, "qk_norm")
    ours = random_model(config)
    theirs = exported(config, ours, tmp_path / "out", is_stock=False)
    assert type(theirs).__name__ == OURS
    for name, parameter in ours.named_parameters():
        assert torch.equal(theirs.get_parameter(f"model.{name}"), parameter)
    assert_same_logits(ours, theirs)
    batch = tokens(2, 9)
    nats = F.cross_entropy(ours(batch)[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(theirs(batch, labels=batch).loss, nats)


def greedy(model: Transformer, prompt: Tensor, count: int) -> Tensor:
    """The prompt and the tokens after it, each by a forward over all before."""
    row = prompt
    for _ in range(count):
        with torch.no_grad():
            row = torch.cat([row, model(row[None])[0, -1].argmax().view(1)])
    return row


@pytest.mark.parametrize(
    ("attention", "stabilizer"),
    [
        ("mha", "none"),
        ("gqa", "qk_norm"),
        ("mla", "qk_norm"),
        ("mla_latent_norm", "none"),
        ("mla_latent_norm", "qk_norm"),
    ],
)
def test_transformers_generates_our_greedy_tokens_also_for_padded_prompts(
    attention: str, stabilizer: str, tmp_path: Path
) -> None:
    config = small_config(attention, stabilizer)
    ours = random_model(config)
    theirs = exported(config, ours, tmp_path / "out")
    long, short = tokens(1, 7)[0], tokens(1, 4, seed=1)[0]
    padded = torch.stack([long, F.pad(short, (3, 0))])
    mask = torch.ones_like(padded)
    mask[1, :3] = 0
    found = theirs.generate(padded, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(found[0], greedy(ours, long, 8))
    assert torch.equal(found[1, 3:], greedy(ours, short, 8))


def test_weights_above_the_size_of_a_file_get_several_and_an_index(tmp_path: Path) -> None:
    config = small_config("gqa", "qk_norm")
    ours = random_model(config)
    theirs = exported(config, ours, tmp_path / "out", shard_bytes=9000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all((tmp_path / "out" / file).stat().st_size < 9000 + 2000 for file in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert {*index["weight_map"].values()} == {*files}
    assert index["metadata"]["total_size"] == 4 * count_parameters(ours)["total"]
    assert_same_logits(ours, theirs)


def test_an_untrusted_config_names_no_class_of_another_package(tmp_path: Path) -> None:
    config = small_config("mla_latent_norm", "qk_norm")
    exported(config, random_model(config), tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(path.read_text().replace("quack_lm.attention.mla.MLA", "os.system"))
    with pytest.raises(UserError, match="must be a class of quack_lm"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


# ------------------------------------------------------------------------------------------------ the command


def trained(data: list[str], run_dir: Path, *overrides: str) -> Path:
    """A run of a few steps."""
    run = build_run(check_run(compose([*RUN, *data, "trainer.steps=4", *overrides, f"run_dir={run_dir}"])))
    train(run)
    assert run.lock is not None
    run.lock.close()
    return run_dir


@pytest.fixture(scope="module")
def quack_run(tiny_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tiny_data, tmp_path_factory.mktemp("export") / "run", "stabilizer=quack")


def newest(run_dir: Path) -> Path:
    return checkpoint.list_checkpoints(run_dir / "checkpoints")[-1]


def val_loss(run_dir: Path) -> float:
    return json.loads((run_dir / "summary.json").read_text())["val_loss"]


def loss_of(directory: Path, data: list[str]) -> float:
    """The mean loss on the validation sequences, by transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    split = TokenData.open(Path(data[1].removeprefix("data.dir="))).sequences("val", 32)
    nats = []
    for sequence, _ in EvalBatches(split, n_sequences=7, micro_batch_size=1):
        with torch.no_grad():
            nats.append(F.cross_entropy(model(sequence[:, :-1]).logits.flatten(0, 1), sequence[:, 1:].flatten()))
    return torch.stack(nats).mean().item()


def test_the_exported_run_has_the_validation_loss_of_the_run_and_loads_without_this_package(
    quack_run: Path, tiny_data: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "some/model"
    code, stdout, stderr = call("export", str(quack_run), str(out), "--license", "apache-2.0")
    assert (code, stderr) == (0, "")
    assert f"class {LLAMA}: MHA and GQA without a norm of queries and keys are Llama's attention" in stdout
    assert loss_of(out, tiny_data) == pytest.approx(val_loss(quack_run), rel=1e-5)
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer; "
        f"model, tokenizer = (kind.from_pretrained({str(out)!r}) for kind in (AutoModelForCausalLM, AutoTokenizer)); "
        "prompt = tokenizer(['x', 'def main('], padding=True, return_tensors='pt'); "
        "print(*model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)[1].tolist()); "
        "assert not any(name.startswith('quack_lm') for name in sys.modules); assert model.dtype.is_floating_point"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = torch.tensor(list(map(int, done.stdout.split())))
    model = make_model(checkpoint.read_config(newest(quack_run)))
    model.to_empty(device="cpu").eval()
    model.load_state_dict(
        {k.removeprefix("model."): v for k, v in tensors_of(quack_run).items() if k.startswith("model.")}
    )
    assert torch.equal(row, greedy(model, row[:-5], 5))


def tensors_of(run_dir: Path) -> dict[str, Tensor]:
    return {k: v for file in newest(run_dir).glob("*.safetensors") for k, v in load_file(file).items()}


def test_the_model_card_says_what_was_trained_and_how_to_load_and_cite_it(quack_run: Path, tmp_path: Path) -> None:
    call("export", str(newest(quack_run)), str(tmp_path / "out"), "--dtype", "bfloat16", "--license", "cc-by-4.0")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert f"{val_loss(quack_run):.4f}" in card
    assert f"{math.exp(val_loss(quack_run)):.4f}" in card
    logged = [json.loads(line) for line in (quack_run / "metrics.jsonl").read_text().splitlines()]
    assert f"{logged[-1]['val/bits_per_byte']:.4f}" in card
    for text in (
        "stabilizer `quack`",
        "tau: 0.1",
        "LocalCorpus",
        "512 tokens",
        "2511.21377",
        "from_pretrained",
        LLAMA,
    ):
        assert text in card
    assert "profile:" not in card, "the checkpoint does not know whether the run has written a trace"
    (weights,) = (tmp_path / "out").glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert tokenizer.convert_ids_to_tokens(generation["eos_token_id"]) == "<|endoftext|>"


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(quack_run: Path, tmp_path: Path) -> None:
    damaged = tmp_path / newest(quack_run).name
    shutil.copytree(newest(quack_run), damaged)
    file = next(damaged.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    (tmp_path / "full").mkdir()
    (tmp_path / "other").mkdir()
    run, out = str(quack_run), str(tmp_path / "out")
    refused = {
        (): r"the following arguments are required: RUN_OR_CHECKPOINT, OUT; see --help",
        (run, str(tmp_path / "full")): rf"{tmp_path}/full exists already; choose another directory",
        (str(tmp_path / "nowhere"), out): rf"{tmp_path}/nowhere is neither a checkpoint nor the directory of a run",
        (str(damaged), out): rf"{damaged} is not a valid checkpoint: \S+ has another sha256",
        (run, out, "--data", str(tmp_path / "other")): r"no prepared data in .*; say where it is with --data DIR, or",
        (run, out, "--license", "a b"): r"--license a b: give an identifier",
        (run, out, "--without-tokenizer", "--data", str(tmp_path)): r"--data names the tokenizer, and --without-",
        (run, out, "--dtype", "int8"): r"argument --dtype: invalid choice",
    }
    before = snapshot(tmp_path)
    for arguments, message in refused.items():
        code, stdout, stderr = call("export", *arguments)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), stderr
        assert stderr.startswith("error: ")
        assert re.search(message, stderr), stderr
    assert snapshot(tmp_path) == before


def test_an_export_without_data_has_no_tokenizer(quack_run: Path, tmp_path: Path, tiny_data: list[str]) -> None:
    moved = tmp_path / "run"
    shutil.copytree(quack_run, moved)
    assert call("export", str(moved), str(tmp_path / "out"), "--without-tokenizer")[0] == 0
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert loss_of(tmp_path / "out", tiny_data) == pytest.approx(val_loss(quack_run), rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_export_that_is_interrupted_is_no_directory_and_leaves_nothing(number: int, tmp_path: Path) -> None:
    def interrupt() -> None:
        with writing(tmp_path / "out") as staging:
            (staging / "model.safetensors").touch()
            assert [path.name[0] for path in tmp_path.iterdir()] == ["."]
            signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        interrupt()
    assert list(tmp_path.iterdir()) == []


def test_an_export_removes_what_a_killed_one_has_left_and_waits_for_no_other(tmp_path: Path) -> None:
    write_files(tmp_path, {".out.partial/left.safetensors": b"x"})
    with writing(tmp_path / "out") as staging:
        (staging / "config.json").touch()
        with pytest.raises(UserError, match="out is being written by another process"), writing(tmp_path / "out"):
            pass
    assert [*snapshot(tmp_path)] == [f"{tmp_path}/out", f"{tmp_path}/out/config.json"]


def test_a_full_disk_is_one_line_and_leaves_nothing(quack_run: Path, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes((3 << 20) - 40_000))
    code, _, stderr = call("export", str(quack_run), str(small_disk / "out"))
    assert (code, stderr.count("\n")) == (2, 1), stderr
    assert [path.name for path in small_disk.iterdir()] == ["ballast"]


# ------------------------------------------------------------------------------------------------ init_from


@pytest.mark.parametrize(
    ("attention", "stabilizer", "overrides"),
    [
        ("mha", "none", ["model.tied_embeddings=true"]),
        ("gqa", "qk_norm", ["stabilizer.eps=0.3"]),
        ("mla_latent_norm", "none", ["attention.norm_eps=0.3", "attention.rope_dim=6"]),
        ("mla_latent_norm", "qk_norm", []),
    ],
)
def test_a_directory_that_transformers_has_written_gives_a_model_its_weights(
    attention: str, stabilizer: str, overrides: list[str], tmp_path: Path, tiny_data: list[str]
) -> None:
    config = small_config(attention, stabilizer, *overrides)
    ours = random_model(config)
    exported(config, ours, tmp_path / "out").save_pretrained(tmp_path / "theirs", max_shard_size="9KB")
    assert (tmp_path / "theirs/model.safetensors.index.json").exists()
    config = {**config, "trainer": {**config["trainer"], "init_from": str(tmp_path / "theirs")}}
    data = TokenData.open(Path(tiny_data[1].removeprefix("data.dir=")))
    steadies = instantiate(config["stabilizer"])
    initial = open_initial_weights(tmp_path / "theirs", config, make_model(config, steadies), steadies, data)
    fresh = small_model(config)
    initial.fill(fresh, LONE)
    for (name, mine), (_, loaded) in zip(ours.named_parameters(), fresh.named_parameters(), strict=True):
        torch.testing.assert_close(loaded, mine, rtol=1e-6, atol=0, msg=lambda m, n=name: n + m)
    assert initial.has_other_tokenizer


def test_a_run_begins_with_the_weights_of_a_checkpoint_and_resumes_without_them(
    quack_run: Path, tiny_data: list[str], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(quack_run, source)
    arguments = [*tiny_data, "stabilizer=quack", f"trainer.init_from={source}", "optimizer.lr=0.01", "seed=7"]
    trained(arguments[:2], tmp_path / "run", *arguments[2:], "trainer.checkpoint_every=2", "trainer.steps=2")
    first = json.loads((tmp_path / "run/summary.json").read_text())
    assert first["initial_val_loss"] == pytest.approx(val_loss(quack_run), rel=1e-6)
    assert first["step"] == 2
    shutil.rmtree(source)
    trained(arguments[:2], tmp_path / "run", *arguments[2:], "trainer.steps=3")
    assert json.loads((tmp_path / "run/summary.json").read_text())["step"] == 3
    with pytest.raises(UserError, match=r"holds a run with trainer\.init_from=\S+source, not None"):
        check_run(compose([*RUN, *arguments[:3], *arguments[4:], "trainer.steps=3", f"run_dir={tmp_path}/run"]))


def test_the_reference_norms_are_those_of_the_loaded_weights_or_of_the_original_run(
    quack_run: Path, tiny_data: list[str], tmp_path: Path
) -> None:
    kept = {k: v for k, v in tensors_of(quack_run).items() if k.startswith("stabilizer.")}
    references = {}
    for choice in ("weights", "checkpoint"):
        arguments = ["stabilizer=quack", f"trainer.init_from={quack_run}", f"trainer.init_stabilizer={choice}"]
        run = build_run(check_run(compose([*RUN, *tiny_data, *arguments, f"run_dir={tmp_path}/{choice}"])))
        references[choice] = {f"stabilizer.{k}": v for k, v in run.stabilizer.state_dict().items()}
        weights = LogitWeights(run.model.attentions)
        of_loaded = largest_partner_product(weights.paths, weights.norms("frobenius"))
        run.lock.close()
    assert references["weights"].keys() == references["checkpoint"].keys() == kept.keys()
    for name, value in kept.items():
        assert torch.equal(references["checkpoint"][name], value)
        assert torch.equal(references["weights"][name], of_loaded[name.removeprefix("stabilizer.initial.")])
        assert not torch.equal(references["weights"][name], value)


def test_two_ranks_begin_with_the_weights_of_one_and_their_checkpoint_is_exported(
    quack_run: Path, tiny_data: list[str], tmp_path: Path
) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [*RUN, *tiny_data, "trainer.steps=1", f"trainer.init_from={quack_run}", f"run_dir={tmp_path}/run"]
    done = subprocess.run(
        [*launcher, "scripts/train.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "another tokenizer" not in done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["world_size"] == 2
    assert summary["initial_val_loss"] == pytest.approx(val_loss(quack_run), rel=1e-5)
    assert call("export", str(tmp_path / "run"), str(tmp_path / "again"))[0] == 0
    assert loss_of(tmp_path / "again", tiny_data) == pytest.approx(summary["val_loss"], rel=1e-5)


def test_every_shape_and_setting_that_does_not_fit_is_named(
    quack_run: Path, tiny_data: list[str], tmp_path: Path
) -> None:
    assert call("export", str(quack_run), str(tmp_path / "out"))[0] == 0
    overrides = ["model.d_model=30", "model.n_layers=3", "attention.rope_theta=500.0", f"run_dir={tmp_path}/run"]
    in_both = [
        "model.d_model is 24 there and 30 here",
        "model.n_layers is 2 there and 3 here",
        "attention.rope_theta is 10000 there and 500 here",
        "set model.d_model=24",
    ]
    shapes = {
        quack_run: [
            "embedding.weight is 512 x 24 there and 512 x 30 here",
            "blocks.*.attention.w_q.weight is 24 x 24 there and 30 x 30 here",
            "blocks.*.mlp.w_down.weight is 24 x 40 there and 30 x 40 here",
            "blocks.*.mlp_norm.weight is not there",
        ],
        tmp_path / "out": [
            "attention.head_dim is 8 there and 10 here",
            "model.embed_tokens.weight is 512 x 24 there and 512 x 30 here",
            "model.layers.*.self_attn.q_proj.weight is 24 x 24 there and 30 x 30 here",
            "model.layers.*.mlp.down_proj.weight is 24 x 40 there and 30 x 40 here",
        ],
    }
    for source, messages in shapes.items():
        with pytest.raises(UserError) as error:
            check_run(compose([*RUN, *tiny_data, *overrides, f"trainer.init_from={source}"]))
        assert not [message for message in (*in_both, *messages) if message not in str(error.value)], error.value
    # A size that the run has left to a default.
    wider = ["attention.head_dim=12", f"trainer.init_from={quack_run}", f"run_dir={tmp_path}/run"]
    with pytest.raises(UserError, match=r"set attention\.head_dim=null$"):
        check_run(compose([*RUN, *tiny_data, *wider]))
    # A stabilizer that is part of the forward has settings of the model; those of others are the new run's.
    normed = trained(tiny_data, tmp_path / "normed", "stabilizer=qk_norm", "trainer.steps=1")
    other = ["stabilizer=qk_norm", "stabilizer.eps=0.1", f"trainer.init_from={normed}", f"run_dir={tmp_path}/run"]
    with pytest.raises(UserError, match=r"stabilizer\.eps is 1e-06 there and 0\.1 here; set stabilizer\.eps=1e-06$"):
        check_run(compose([*RUN, *tiny_data, *other]))
    quack = [*RUN, *tiny_data, "stabilizer=quack", f"trainer.init_from={quack_run}", f"run_dir={tmp_path}/run"]
    check_run(compose([*quack, "stabilizer.tau=0.7", "trainer.init_stabilizer=checkpoint"]))
    check_run(compose([*quack, "stabilizer.norm=spectral"]))
    with pytest.raises(UserError, match=r"is of stabilizer\.norm=frobenius, not spectral; set stabilizer\.norm=frob"):
        check_run(compose([*quack, "stabilizer.norm=spectral", "trainer.init_stabilizer=checkpoint"]))


def test_weights_that_are_not_finite_are_refused_wherever_they_are_read(
    quack_run: Path, tiny_data: list[str], tmp_path: Path
) -> None:
    assert call("export", str(quack_run), str(tmp_path / "theirs"))[0] == 0
    ours = tmp_path / newest(quack_run).name
    shutil.copytree(newest(quack_run), ours)
    for directory, name in ((ours, "model.blocks.0.attention.w_o.weight"), (tmp_path / "theirs", "model.norm.weight")):
        (file,) = (file for file in directory.glob("*.safetensors") if name in load_file(file))
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        tensors = load_file(file)
        tensors[name].view(-1)[3] = torch.nan
        save_file(tensors, file, metadata)
    manifest = json.loads((ours / "manifest.json").read_text())
    manifest["files"] = {
        name: {"bytes": (ours / name).stat().st_size, "sha256": file_sha256(ours / name)} for name in manifest["files"]
    }
    (ours / "manifest.json").write_text(json.dumps(manifest))
    message = r"w_o\.weight has values that are not finite; take other weights"
    for arguments in (
        ["export", str(ours), str(tmp_path / "out")],
        ["generate", str(ours), "--prompt", "a"],
        ["train", *RUN, *tiny_data, f"trainer.init_from={ours}", f"run_dir={tmp_path}/run"],
    ):
        code, _, stderr = call(*arguments)
        assert (code, stderr.count("\n")) == (2, 1), stderr
        assert re.search(message, stderr), stderr
    with pytest.raises(UserError, match=r"model\.norm\.weight has values that are not finite"):
        check_run(compose([*RUN, *tiny_data, f"trainer.init_from={tmp_path}/theirs", f"run_dir={tmp_path}/run"]))


def test_quantized_weights_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"trainer\.init_from=x: w in \S+ is of dtype I8; save the weights as one of: F64"
    ):
        WeightFiles(tmp_path, "trainer.init_from=x")


def test_weights_with_another_tokenizer_are_warned_of(quack_run: Path, tiny_data: list[str], tmp_path: Path) -> None:
    arguments = [*RUN, *tiny_data, f"trainer.init_from={quack_run}", f"run_dir={tmp_path}/run"]
    plan = check_run(compose(arguments))
    assert not any("tokenizer" in warning for warning in run_warnings(plan))
    other = replace(plan, initial=replace(plan.initial, has_other_tokenizer=True))
    assert any("another tokenizer" in warning for warning in run_warnings(other))


# ------------------------------------------------------------------------------------------------ one billion


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.xdist_group("one_billion")
@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_an_export_of_the_1b_model_needs_less_memory_than_one_copy_of_it(attention: str, tmp_path: Path) -> None:
    model = make_model(compose(["experiment=paper", f"attention={attention}"]))
    n_bytes = 4 * count_parameters(model)["total"]
    saved = ["import sys; sys.path.insert(0, 'tests'); import test_export; test_export.save_zeros(*sys.argv[1:])"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", *saved, attention, str(tmp_path / "step_00000001")],
        check=True,
        cwd=ROOT,
        env=environment,
    )
    command = [
        sys.executable,
        "-c",
        MEASURED,
        str(tmp_path / "step_00000001"),
        str(tmp_path / "out"),
        "--without-tokenizer",
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    shutil.rmtree(tmp_path)
    assert done.returncode == 0, done.stderr
    peak = 1024 * int(done.stdout.splitlines()[-1])
    print(f"\n{attention}: {n_bytes / 2**30:.2f} GiB of weights, peak {peak / 2**30:.2f} GiB\n{done.stdout}")
    assert peak < n_bytes


def save_zeros(attention: str, directory: str) -> None:
    """A checkpoint of the 1B model, of zeros; called in a process of its own."""
    config = compose(["experiment=paper", f"attention={attention}"])
    tensors = {f"model.{name}": torch.zeros(p.shape) for name, p in make_model(config).named_parameters()}
    staging = Path(directory).with_name("staging")
    staging.mkdir()
    checkpoint.TensorWriter(LONE, is_async=False).write(staging, tensors).result()
    state = {"progress": TrainState(step=1).as_json(), "manifest_sha256": "0" * 64, "config": identity(config)}
    state |= {"step": 1, "stabilizer_state": []}
    checkpoint.commit(staging, Path(directory), state, checkpoint.tensor_specs(tensors))


MEASURED = """
import resource, sys
from quack_lm.cli import main
try:
    main(["export", *sys.argv[1:]])
finally:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
