"""Configs: the paper's numbers, the names people rely on, and one clear line for every mistake."""

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quack_lm.build import make_model
from quack_lm.config import CONFIG_DIR, check, choice, choices, compose, fingerprint, flatten, instantiate
from quack_lm.errors import UserError

SCRIPT = CONFIG_DIR.parent / "scripts" / "train.py"
GROUPS = ("attention", "data", "experiment", "logger", "model", "optimizer", "stabilizer", "trainer")
ATTENTIONS, STABILIZERS = ("mha", "mla"), ("none", "fixed", "qk_norm", "qk_clip", "quack")


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    return compose(["experiment=tiny"])


# ------------------------------------------------------------------------------------------------ the paper


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_model_1b_is_the_papers_setting_number_by_number(attention: str) -> None:
    config = compose(["model=1b", f"attention={attention}"])
    assert config["model"] == {
        "_target_": "quack_lm.model.ModelSizes",
        "vocab_size": 49152,
        "d_model": 2048,
        "n_layers": 14,
        "n_heads": 32,
        "d_ff": 4 * 2048,
        "q_latent_dim": 512,
        "kv_latent_dim": 256,
        "tied_embeddings": True,
        "norm_eps": 1e-6,
        "init_std": 0.02,
        "embedding_std": 0.02,
    }
    heads = {"n_heads": 32, "rope_theta": 10_000.0, "backend": "sdpa"}
    # null: d_model / n_heads = 64, which test_model.py sees in the tensors.
    expected = {
        "mha": {"_target_": "quack_lm.attention.mha.MHA", **heads, "n_kv_heads": 32, "head_dim": None},
        "mla": {
            "_target_": "quack_lm.attention.mla.MLA",
            **heads,
            "q_latent_dim": 512,
            "kv_latent_dim": 256,
            "nope_dim": None,
            "rope_dim": None,
            "v_dim": None,
            "latent_norm": False,
            "norm_eps": 1e-6,
        },
    }
    assert config["attention"] == expected[attention]
    trainer = config["trainer"]
    assert (trainer["steps"], trainer["seq_len"], trainer["global_batch_size"]) == (5000, 2048, 96)
    assert trainer["global_batch_size"] * trainer["seq_len"] == 196_608
    assert trainer["precision"] == "bfloat16"
    # The paper's four GPUs, with gradient accumulation.
    assert 96 % (4 * trainer["micro_batch_size"]) == 0
    assert trainer["micro_batch_size"] < 96 // 4
    assert config["optimizer"] == {
        "_target_": "quack_lm.optim.recipe.MuonRecipe",
        "lr": 3e-3,
        "warmup_steps": 500,
        "schedule": "constant",
        "decay_fraction": 0.2,
        "final_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "momentum": 0.95,
        "is_nesterov": True,
        "update_scale": "jordan",
        "ns_dtype": "bfloat16",
        "adamw_lr": None,
        "adamw_beta1": 0.9,
        "adamw_beta2": 0.95,
        "adamw_eps": 1e-8,
    }
    data = config["data"]
    assert choice(data) == "corpus"
    assert (data["name"], data["subset"], data["split"]) == ("HuggingFaceTB/smollm-corpus", "cosmopedia-v2", "train")
    assert (data["tokenizer"], data["vocab_size"]) == ("HuggingFaceTB/cosmo2-tokenizer", 49152)
    assert data["mask_documents"] is False


def test_the_experiment_paper_is_the_default_run() -> None:
    assert fingerprint(compose(["experiment=paper"])) == fingerprint(compose([]))


@pytest.mark.parametrize(
    ("stabilizer", "expected"),
    [
        ("none", {}),
        ("fixed", {"tau": 0.1, "scales_weight_decay": True}),
        ("qk_norm", {"eps": 1e-6}),
        ("qk_clip", {"threshold": 100.0, "read_only": False}),
        ("quack", {"tau": 0.1, "norm": "frobenius", "scales_weight_decay": True}),
    ],
)
def test_stabilizers_start_from_values_that_the_paper_sweeps(stabilizer: str, expected: dict[str, Any]) -> None:
    section = compose([f"stabilizer={stabilizer}"])["stabilizer"]
    assert choice(section) == stabilizer
    assert {k: v for k, v in section.items() if k != "_target_"} == expected


# ------------------------------------------------------------------------------------------------ groups and names


def test_the_groups_of_configs_are_the_documented_ones() -> None:
    assert {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()} == {*GROUPS, "sweep"}
    assert set(choices("attention")) >= set(ATTENTIONS)
    assert set(choices("stabilizer")) >= set(STABILIZERS)
    assert set(choices("model")) >= {"tiny", "proxy", "100m", "1b"}
    assert set(choices("optimizer")) >= {"muon", "adamw"}
    assert set(choices("data")) >= {"stdlib", "local", "cosmopedia_v2"}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in choices(group)])
def test_every_choice_of_every_group_composes_and_builds(group: str, name: str) -> None:
    extra = ["data.files=[x.txt]"] if (group, name) == ("data", "local") else []
    config = compose([f"{group}={name}", *extra])
    model = make_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    for section in ("data", "logger", "optimizer"):
        instantiate(config[section])
    if group in ("attention", "stabilizer"):
        assert choice(config[group]) == name


@pytest.mark.parametrize("model", ["tiny", "proxy", "100m"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_model_fits_every_attention(model: str, attention: str) -> None:
    make_model(compose([f"model={model}", f"attention={attention}"]))


RELIED_ON = {
    "run_dir": "runs/mine",
    "seed": 7,
    "model.d_model": 96,
    "model.n_layers": 3,
    "attention.n_heads": 6,
    "attention.n_kv_heads": 2,
    "stabilizer.tau": 0.25,
    "stabilizer.threshold": 30.0,
    "stabilizer.norm": "spectral",
    "optimizer.lr": 0.003,
    "optimizer.warmup_steps": 11,
    "data.dir": "elsewhere",
    "trainer.steps": 12,
    "trainer.seq_len": 13,
    "trainer.global_batch_size": 14,
    "trainer.micro_batch_size": 7,
    "trainer.precision": "bfloat16",
    "trainer.val_every": 15,
    "trainer.probe_every": 16,
    "trainer.checkpoint_every": 17,
    "trainer.resume": "never",
    "logger.wandb": "offline",
}


@pytest.mark.parametrize("stabilizer", ["quack", "qk_clip"])
def test_names_that_other_peoples_scripts_rely_on_exist(stabilizer: str) -> None:
    elsewhere = {"quack": {"stabilizer.threshold"}, "qk_clip": {"stabilizer.tau", "stabilizer.norm"}}[stabilizer]
    wanted = {key: value for key, value in RELIED_ON.items() if key not in elsewhere}
    flat = flatten(compose(["experiment=tiny", f"stabilizer={stabilizer}", *(f"{k}={v}" for k, v in wanted.items())]))
    assert {key: flat[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("trainer.precision", ["float32", "bfloat16"]),
        ("logger.wandb", ["online", "offline", "disabled"]),
        ("trainer.resume", ["auto", "never"]),
        ("attention.backend", ["sdpa", "eager", "flash", "flex"]),
    ],
)
def test_every_documented_value_is_accepted(key: str, values: list[str], tiny: dict[str, Any]) -> None:
    for value in values:
        assert flatten(check(changed(tiny, key, value)))[key] == value


def test_the_command_line_of_the_readme_reads_as_it_should() -> None:
    config = compose(
        ["experiment=tiny", "attention=mla", "stabilizer=quack", "stabilizer.tau=0.1", "optimizer.lr=3e-3"]
    )
    assert (choice(config["attention"]), choice(config["stabilizer"])) == ("mla", "quack")
    assert (config["stabilizer"]["tau"], config["optimizer"]["lr"]) == (0.1, 0.003)
    assert config["model"]["d_model"] == 64


def test_a_group_choice_after_an_experiment_wins() -> None:
    config = compose(["experiment=tiny", "model=proxy", "optimizer=adamw"])
    assert config["model"]["d_model"] == 128
    assert choice(config["optimizer"]) == "recipe"
    assert config["optimizer"]["_target_"].endswith("AdamWRecipe")


# ------------------------------------------------------------------------------------------------ mistakes in names


@pytest.mark.parametrize(
    ("override", "mend"),
    [
        ("sead=1", "seed"),
        ("rundir=x", "run_dir"),
        ("modle.d_model=64", "model"),
        ("trainr={}", "trainer"),
        ("model.dmodel=64", "model.d_model"),
        ("attention.n_head=4", "attention.n_heads"),
        ("stabilizer.tua=0.1", "stabilizer.tau"),
        ("optimizer.learning_rate=0.1", None),
        ("optimizer.lrs=0.1", "optimizer.lr"),
        ("data.directory=x", "data.dir"),
        ("trainer.global_batchsize=8", "trainer.global_batch_size"),
        ("trainer.sequence_len=8", "trainer.seq_len"),
        ("logger.wanbd=offline", "logger.wandb"),
        ("attention=mlaa", "mla"),
        ("stabilizer=quak", "quack"),
        ("model=1B", "1b"),
        ("optimizer=muonn", "muon"),
        ("data=stdlb", "stdlib"),
        ("trainer=tinny", "tiny"),
        ("logger=defualt", "default"),
        ("experiment=tinny", "tiny"),
    ],
)
def test_an_unknown_name_is_met_with_the_nearest_valid_one(override: str, mend: str | None) -> None:
    with pytest.raises(UserError) as caught:
        compose(["experiment=tiny", "stabilizer=quack", override])
    message = str(caught.value)
    key = override.partition("=")[0]
    assert any(name in message for name in (f"unknown key {key}:", f"unknown key {key.split('.')[0]}:", f"{override}:"))
    assert "choices: " in message
    assert mend is None or f"did you mean {mend}?" in message


# ------------------------------------------------------------------------------------------------ bad input


class Bad(NamedTuple):
    """Arguments after a valid command, and what the one line on stderr must match. TMP is the test's directory."""

    arguments: list[str]
    message: str
    files: dict[str, bytes] = {}  # noqa: RUF012
    env: dict[str, str] = {}  # noqa: RUF012


def one(argument: str, message: str, **more: Any) -> Bad:
    return Bad([argument], message, **more)


# Each is appended to: experiment=tiny, a prepared data set, trainer.steps=1, run_dir=TMP/run.
BAD: dict[str, Bad] = {
    # names
    "unknown_section": one("trainr.steps=3", r"unknown key trainr.*did you mean trainer\?"),
    "unknown_key": one("trainer.step=3", r"unknown key trainer\.step:.*did you mean trainer\.steps\?"),
    "key_of_another_stabilizer": one("stabilizer.tau=1", r"unknown key stabilizer\.tau"),
    "unknown_choice": one("stabilizer=quak", r"stabilizer=quak: did you mean quack\?"),
    "choice_by_path": one("model=../model/1b", r"model=\.\./model/1b: choices: .*tiny"),
    "null_choice": one("model=null", r"model=None: choices: .*tiny"),
    "dictionary_for_a_choice": one("model={d_model: 3}", r"model=.*choices: .*tiny"),
    "key_below_a_value": one("optimizer.lr.x=3", r"optimizer\.lr="),
    # types
    "string_for_int": one("model.d_model=wide", r"model\.d_model='wide': .*integer"),
    "quoted_number_for_int": one("model.d_model='64'", r"model\.d_model='64': .*integer"),
    "float_for_int": one("trainer.steps=3.0", r"trainer\.steps=3\.0: .*integer"),
    "bool_for_int": one("trainer.steps=true", r"trainer\.steps=True: .*integer"),
    "null_for_int": one("trainer.steps=null", r"trainer\.steps=None: .*integer"),
    "list_for_int": one("trainer.steps=[3]", r"trainer\.steps=\[3\]: .*integer"),
    "dictionary_for_int": one("seed={a: 3}", r"seed=.*integer"),
    "string_for_float": one("optimizer.lr=fast", r"optimizer\.lr='fast': .*number"),
    "bool_for_float": one("optimizer.lr=true", r"optimizer\.lr=True: .*number"),
    "int_for_bool": one("trainer.recompute=1", r"trainer\.recompute=1: .*boolean"),
    "string_for_bool": one("model.tied_embeddings='true'", r"model\.tied_embeddings='true': .*boolean"),
    "int_for_string": one("data.dir=3", r"data\.dir=3: .*string"),
    "null_for_string": one("data.dir=null", r"data\.dir=None: .*string"),
    "string_for_list": one("logger.tags=x", r"logger\.tags='x': .*list"),
    "int_in_a_list_of_strings": one("logger.tags=[1]", r"logger\.tags=\[1\]: .*string"),
    "number_for_run_dir": one("run_dir=3", r"run_dir=3: .*string"),
    "section_for_a_scalar": one("attention.backend={a: 1}", r"attention\.backend="),
    # values
    "negative_seed": one("seed=-1", r"seed=-1: .*greater than or equal to 0"),
    "zero_width": one("model.d_model=0", r"model\.d_model=0: .*greater than 0"),
    "zero_layers": one("model.n_layers=0", r"model\.n_layers=0: .*greater than 0"),
    "negative_steps": one("trainer.steps=-5", r"trainer\.steps=-5: .*greater than 0"),
    "zero_micro_batch": one("trainer.micro_batch_size=0", r"trainer\.micro_batch_size=0: .*greater than 0"),
    "negative_interval": one("trainer.val_every=-1", r"trainer\.val_every=-1: "),
    "zero_rate": one("optimizer.lr=0", r"optimizer\.lr=0: .*greater than 0"),
    "rate_not_a_number": one("optimizer.lr=nan", r"optimizer\.lr=nan: .*finite"),
    "infinite_rate": one("optimizer.lr=inf", r"optimizer\.lr=inf: .*finite"),
    "momentum_of_one": one("optimizer.momentum=1.0", r"optimizer\.momentum=1\.0: .*less than 1"),
    "negative_decay": one("optimizer.weight_decay=-0.1", r"optimizer\.weight_decay=-0\.1: "),
    "negative_tau": Bad(["stabilizer=quack", "stabilizer.tau=-1"], r"stabilizer\.tau=-1: .*greater than 0"),
    "zero_threshold": Bad(["stabilizer=qk_clip", "stabilizer.threshold=0"], r"stabilizer\.threshold=0: "),
    "unknown_norm": Bad(["stabilizer=quack", "stabilizer.norm=l1"], r"stabilizer\.norm='l1': .*frobenius.*spectral"),
    "unknown_precision": one("trainer.precision=float16", r"trainer\.precision='float16': .*float32.*bfloat16"),
    "unknown_backend": one("attention.backend=fast", r"attention\.backend='fast': .*sdpa"),
    "unknown_resume": one("trainer.resume=maybe", r"trainer\.resume='maybe': .*auto.*never"),
    "unknown_wandb_mode": one("logger.wandb=on", r"logger\.wandb=.*online.*offline.*disabled"),
    "unknown_schedule": one("optimizer.schedule=linear", r"optimizer\.schedule='linear': .*cosine"),
    "splits_beyond_everything": Bad(["data.val_fraction=0.6", "data.probe_fraction=0.5"], r"data\.val_fraction=0\.6"),
    # shapes
    "heads_do_not_divide_width": one("model.n_heads=5", r"attention\.n_heads=5 must divide model\.d_model=64"),
    "heads_do_not_divide_width_mla": Bad(["attention=mla", "attention.n_heads=5"], r"attention\.n_heads=5 must divide"),
    "kv_heads_do_not_divide_heads": one("attention.n_kv_heads=3", r"attention\.n_kv_heads=3 .*attention\.n_heads=4"),
    "odd_head": one("attention.head_dim=7", r"attention\.head_dim=7 must be even"),
    "odd_rope": Bad(["attention=mla", "attention.rope_dim=9"], r"attention\.rope_dim=9 must be even"),
    "micro_batch_does_not_divide_batch": one(
        "trainer.micro_batch_size=3", r"trainer\.global_batch_size=8 .*trainer\.micro_batch_size = 1 x 3"
    ),
    "three_processes": one("seed=0", r"trainer\.global_batch_size=8 .*3 x 8 = 24", env={"WORLD_SIZE": "3"}),
    "replicas_do_not_divide_processes": one("trainer.replicas=2", r"trainer\.replicas=2 .*processes, 1"),
    "window_longer_than_the_data": one(
        "trainer.seq_len=5000000", r"trainer\.seq_len=5000000 is too long for the train"
    ),
    "vocabulary_too_small": one("model.vocab_size=100", r"model\.vocab_size=100 .*data\.vocab_size=512"),
    "absurd_width": one("model.d_ff=10000000000000000000", r"model\.d_ff"),
    # what is not there
    "missing_data": one("data.dir=TMP/nowhere", r"data\.dir: .*TMP/nowhere.*prepare_data\.py"),
    "data_is_a_file": one("data.dir=TMP/file", r"data\.dir: .*TMP/file", files={"file": b"x"}),
    "data_without_manifest": one("data.dir=TMP/d", r"data\.dir: .*TMP/d .*manifest", files={"d/x": b""}),
    "flex_on_cpu": Bad(["attention.backend=flex", "trainer.device=cpu"], r"attention\.backend=flex .*sdpa"),
    "flash_on_cpu": Bad(["attention.backend=flash", "trainer.device=cpu"], r"attention\.backend=flash .*sdpa"),
    "unset_files": one("data=local", r"data\.files"),
    # run_dir
    "run_dir_is_a_file": one("run_dir=TMP/file", r"run_dir=TMP/file.*choose another run_dir", files={"file": b"x"}),
    "run_dir_below_a_file": one("run_dir=TMP/file/a/b", r"run_dir=TMP/file/a/b: .*TMP/file ", files={"file": b"x"}),
    "run_dir_with_a_broken_config": one(
        "run_dir=TMP/old", r"TMP/old/config\.yaml cannot be read", files={"old/config.yaml": b"\xff\xfe\x00"}
    ),
    "run_dir_with_a_long_name": one("run_dir=TMP/" + 300 * "a", r"run_dir=TMP/aaa"),
    # what a config from somebody else could try
    "target_os_system": one("model._target_=os.system", r"model\._target_='os\.system' must be a class of quack_lm"),
    "target_eval": one("stabilizer._target_=builtins.eval", r"stabilizer\._target_='builtins\.eval'"),
    "target_function": one("data._target_=quack_lm.config.compose", r"data\._target_='quack_lm\.config\.compose'"),
    "target_module": one("data._target_=quack_lm.corpus", r"data\._target_='quack_lm\.corpus'"),
    "target_through_an_import": one(
        "trainer._target_=quack_lm.train.Path", r"trainer\._target_='quack_lm\.train\.Path'"
    ),
    "target_deeper": one("trainer._target_=quack_lm.config.importlib.import_module", r"trainer\._target_="),
    "target_of_another_section": one("stabilizer._target_=quack_lm.attention.mha.MHA", r"stabilizer\._target_="),
    "target_missing": one("stabilizer._target_=quack_lm.stabilizers.nope.Nope", r"stabilizer\._target_="),
    "target_null": one("model._target_=null", r"model\._target_=None"),
    "target_with_dots": one("model._target_=quack_lm..model.ModelSizes", r"model\._target_="),
    "resolver": one("logger.name=${oc.env:HOME}", r"logger\.name='\$\{oc\.env:HOME\}'.*plain references"),
    "resolver_in_text": one("logger.name='a${oc.env:HOME}b'", r"logger\.name=.*plain references"),
    "resolver_in_a_list": one("logger.tags=['${oc.env:HOME}']", r"logger\.tags=.*plain references"),
    "resolver_in_a_nested_list": one("logger.tags=[['${oc.env:HOME}']]", r"logger\.tags=.*plain references"),
    "resolver_in_a_dictionary_in_a_list": one("logger.tags=[{a: '${oc.env:HOME}'}]", r"logger\.tags.*plain references"),
    "resolver_in_a_resolver": one("logger.name='${oc.decode:${seed}}'", r"logger\.name=.*plain references"),
    "resolver_from_pieces": Bad(
        ["logger.project='$'", "logger.group='${logger.project}{oc.env:HOME}'", "+logger.name='${logger.group}'"],
        r"logger\.\w+=.*plain references",
    ),
    "reference_to_nothing": one("logger.name='${logger.nope}'", r"logger\.nope"),
    "reference_to_itself": one("seed='${seed}'", r"seed"),
    # grammar
    "no_value": one("optimizer.lr", r"'optimizer\.lr'.*key=value"),
    "no_key": one("=3", r"'?=3'?.*key=value"),
    "two_equal_signs": one("run_dir=a=b", r"run_dir=a=b.*quote"),
    "unclosed_bracket": one("logger.tags=[a", r"logger\.tags=\[a.*key=value"),
    "sweep": one("optimizer.lr=0.1,0.2", r"optimizer\.lr=0\.1,0\.2: one run takes one value.*scripts/sweep\.py"),
    "sweep_of_choices": one("attention=mha,mla", r"attention=mha,mla: one run takes one value"),
    "range": one("seed=range(1,3)", r"seed=range\(1,3\): one run takes one value"),
    "deletion": one("~seed", r"~seed: write key=value; keys cannot be deleted"),
    "deletion_of_a_group": one("~model", r"~model: .*cannot be deleted"),
    "package": one("model@encoder=tiny", r"model@encoder=tiny: .*cannot be deleted or moved"),
    "hydra_section": one("hydra.run.dir=x", r"hydra\.run\.dir=x: .*no hydra section.*run_dir"),
    "hydra_group": one("hydra/launcher=basic", r"hydra/launcher=basic: .*no hydra section"),
    "unknown_flag": one("--multirun", r"unknown flag --multirun.*key=value"),
    # config files
    "no_config_file": Bad(["--config"], r"--config needs a file"),
    "missing_config_file": one("--config=TMP/nowhere.yaml", r"--config TMP/nowhere\.yaml: no such file"),
    "config_is_a_directory": one("--config=TMP/d", r"--config TMP/d: is a directory", files={"d/x": b""}),
}

# Contents of FILE in: --config FILE, with the other arguments of a valid command left out.
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "garbage": (b"a: [1, 2\nb: }", r"--config TMP/file\.yaml: not a readable yaml"),
    "binary": (bytes(range(256)), r"--config TMP/file\.yaml: not a readable yaml"),
    "list": (b"- 1\n- 2\n", r"--config TMP/file\.yaml: "),
    "text": (b"just words", r"unknown key just words"),
    "empty": (b"", r"TMP/file\.yaml|is not set|must be a section"),
    "duplicate_keys": (b"seed: 1\nseed: 2\n", r"--config TMP/file\.yaml: .*duplicate key seed"),
    "python_object": (b"seed: !!python/object/apply:os.system ['touch pwned']\n", r"--config TMP/file\.yaml: "),
    "section_missing": (b"seed: 1\nrun_dir: null\n", r"model=None must be a section.*tiny"),
    "section_is_a_string": (b"seed: 1\nrun_dir: null\nmodel: tiny\n", r"model='tiny' must be a section.*tiny"),
    "section_without_target": (b"seed: 1\nrun_dir: null\nmodel: {d_model: 3}\n", r"model\._target_=None must be"),
    "foreign_target": (
        b"seed: 1\nrun_dir: null\nmodel: {_target_: os.system, command: touch pwned}\n",
        r"'os\.system'",
    ),
    "foreign_section": (b"seed: 1\nhook: {_target_: os.system, command: touch pwned}\n", r"unknown key hook"),
    "resolver": (b"seed: 1\nrun_dir: '${oc.env:HOME}'\n", r"run_dir='\$\{oc\.env:HOME\}'.*plain references"),
    "number_as_a_key": (b"seed: 1\n3: 4\n", r"unknown key 3"),
    "anchors_into_themselves": (b"seed: &a [*a]\n", r"seed|TMP/file\.yaml"),
}


def contents(directory: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(directory)): p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))
    }


def write_files(directory: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def run_here(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple:
    """The script's own main block in this process: (exit code, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return caught.value.code, *capsys.readouterr()


def assert_refused(code: Any, stdout: str, stderr: str, message: str, tmp_path: Path) -> None:
    assert code == 2
    assert stdout == ""
    assert stderr.startswith("error: "), stderr
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, "exactly one line"
    assert re.search(message.replace("TMP", re.escape(str(tmp_path))), stderr), stderr


def command(bad: Bad, tiny_data: list[str], tmp_path: Path) -> list[str]:
    arguments = ["experiment=tiny", *tiny_data, "trainer.steps=1", "run_dir=TMP/run", *bad.arguments]
    return [argument.replace("TMP", str(tmp_path)) for argument in arguments]


def test_the_command_that_bad_input_is_added_to_is_itself_accepted_and_checking_writes_nothing(
    tiny_data, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = command(Bad([], ""), tiny_data, tmp_path)
    code, stdout, stderr = run_here([*arguments, "--check"], monkeypatch, capsys)
    assert (code, stderr) == (0, "")
    assert yaml.safe_load(stdout.partition("\n\n")[0]) == compose(arguments)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_one_line_that_names_it_and_leaves_nothing(
    name: str, tiny_data, tmp_path, monkeypatch, capsys
) -> None:
    bad = BAD[name]
    write_files(tmp_path, bad.files)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    for key, value in bad.env.items():
        monkeypatch.setenv(key, value)
    assert_refused(*run_here(command(bad, tiny_data, tmp_path), monkeypatch, capsys), bad.message, tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_config_file_ends_with_one_line_that_names_it_and_runs_nothing(
    name: str, tmp_path, monkeypatch, capsys
) -> None:
    content, message = BAD_FILES[name]
    write_files(tmp_path, {"file.yaml": content})
    monkeypatch.chdir(tmp_path)
    assert_refused(*run_here([f"--config={tmp_path}/file.yaml"], monkeypatch, capsys), message, tmp_path)
    assert contents(tmp_path) == {"file.yaml": content}


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_a_clear_error(tiny_data, tmp_path, monkeypatch, capsys) -> None:
    bad = one("trainer.device=cuda", r"trainer\.device=cuda: .*no GPU.*trainer\.device=cpu")
    assert_refused(*run_here(command(bad, tiny_data, tmp_path), monkeypatch, capsys), bad.message, tmp_path)
    assert contents(tmp_path) == {}


def test_a_secret_of_the_environment_reaches_neither_config_nor_message(monkeypatch) -> None:
    monkeypatch.setenv("SECRET", "xyzzy")
    attempts = [
        ["logger.project='$'", "logger.group='${logger.project}{oc.env:SECRET}'", "logger.name='${logger.group}'"],
        ["logger.project='$'", "logger.group='${logger.project}{oc.env:SECRET}'", "logger.entity='${logger.group}'"],
        ["logger.tags=[['${oc.env:SECRET}']]"],
        ["logger.tags=[{a: '${oc.env:SECRET}'}]"],
        ["logger.tags={a: '${oc.env:SECRET}'}"],
        ["logger.name='${oc.env:SECRET}'"],
    ]
    for attempt in attempts:
        try:
            seen = str(compose(["experiment=tiny", *attempt]))
        except UserError as error:
            seen = str(error)
        assert "xyzzy" not in seen, attempt


# Real processes, for what a shell and a user would see.
@pytest.mark.parametrize(
    "name", ["unknown_key", "float_for_int", "three_processes", "missing_data", "target_os_system"]
)
def test_bad_input_to_a_real_process_ends_with_exit_code_2_and_one_line(name: str, tiny_data, tmp_path) -> None:
    bad = BAD[name]
    write_files(tmp_path, bad.files)
    before = contents(tmp_path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *command(bad, tiny_data, tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **bad.env},
    )
    assert_refused(done.returncode, done.stdout, done.stderr, bad.message, tmp_path)
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------------ a run's own config


@pytest.fixture(scope="module")
def finished_run(tiny_data, tmp_path_factory) -> tuple[Path, list[str]]:
    """A real run of two steps, and its overrides."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    overrides = [
        "experiment=tiny",
        *tiny_data,
        "attention=mla",
        "stabilizer=quack",
        "optimizer.lr=3e-3",
        "model.n_layers=1",
        "trainer.steps=2",
        "trainer.val_sequences=2",
        "trainer.device=cpu",
        "logger.progress=false",
        'logger.tags=["with space", "3"]',
        f"run_dir={run_dir}",
    ]
    subprocess.run([sys.executable, str(SCRIPT), *overrides], check=True, capture_output=True)
    return run_dir, overrides


def test_the_config_that_a_run_wrote_composes_to_itself(finished_run) -> None:
    run_dir, overrides = finished_run
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    again = compose(file=run_dir / "config.yaml")
    assert again == written == compose(overrides)
    assert (
        fingerprint(again)
        == fingerprint(written)
        == yaml.safe_load((run_dir / "summary.json").read_text())["fingerprint"]
    )


def test_overrides_on_top_of_a_config_file_equal_overrides_on_top_of_the_groups(finished_run) -> None:
    run_dir, overrides = finished_run
    more = ["seed=5", "optimizer.lr=2e-2", "logger.tags=[a,b]", "logger.name='x y'", "optimizer.max_grad_norm=0.5"]
    assert compose(more, file=run_dir / "config.yaml") == compose([*overrides, *more])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model=1b", r"model=1b: .*choice of model; override single keys"),
        ("experiment=paper", r"experiment"),
        ("trainer.step=3", r"unknown key trainer\.step:.*trainer\.steps"),
        ("trainer.steps=many", r"trainer\.steps='many'"),
        ("optimizer.lr.x=3", r"optimizer\.lr"),
        ("seed.x=3", r"seed"),
        ("hydra.run.dir=x", r"hydra"),
        ("logger.name=${oc.env:HOME}", r"logger\.name=.*plain references"),
        ("~seed", r"~seed: .*cannot be deleted"),
        ("seed=1,2", r"seed=1,2: one run takes one value"),
    ],
)
def test_bad_overrides_of_a_config_file_are_met_with_one_line(override: str, message: str, finished_run) -> None:
    run_dir, _ = finished_run
    with pytest.raises(UserError, match=message):
        compose([override], file=run_dir / "config.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["optimizer.lr=4e-3"],
            r"run_dir=\S+ holds a run with optimizer\.lr=0\.003, not 0\.004; choose another run_dir",
        ),
        (["attention=mha"], r"holds a run with attention\._target_=\S*MLA, not \S*MHA \(and \d+ more keys\)"),
        (["seed=9"], r"holds a run with seed=0, not 9"),
        (["trainer.resume=never"], r"trainer\.resume=auto continues it, or choose another run_dir"),
    ],
)
def test_a_run_directory_keeps_its_run(arguments: list[str], message: str, finished_run, monkeypatch, capsys) -> None:
    run_dir, overrides = finished_run
    before = contents(run_dir)
    assert_refused(*run_here([*overrides, *arguments], monkeypatch, capsys), message, run_dir)
    assert contents(run_dir) == before


def test_a_finished_run_is_left_alone(finished_run, monkeypatch, capsys) -> None:
    run_dir, overrides = finished_run
    before = contents(run_dir)
    code, stdout, stderr = run_here(overrides, monkeypatch, capsys)
    assert (code, stderr) == (0, "")
    assert "finished already: completed" in stdout
    assert contents(run_dir) == before


def test_help_lists_every_choice_of_every_group(monkeypatch, capsys) -> None:
    code, stdout, stderr = run_here(["--help"], monkeypatch, capsys)
    assert (code, stderr) == (0, "")
    for group in GROUPS:
        line = next(line for line in stdout.splitlines() if line.strip().startswith(f"{group}="))
        assert all(name in line for name in choices(group))


@pytest.mark.parametrize(("attention", "total"), [("mha", "1,040,246,784"), ("mla", "998,041,600")])
def test_checking_the_1b_model_prints_its_parameters_by_component(
    attention: str, total: str, tiny_data, tmp_path, monkeypatch, capsys
) -> None:
    arguments = [
        "model=1b",
        f"attention={attention}",
        *tiny_data,
        "model.vocab_size=49152",
        f"run_dir={tmp_path}/run",
        "--check",
    ]
    code, stdout, _ = run_here(arguments, monkeypatch, capsys)
    assert code == 0
    table = {line.split()[-1]: line.split()[0] for line in stdout.rpartition("\n\n")[2].splitlines() if "," in line}
    assert table["total"] == total
    assert table["embedding"] == "100,663,296"
    assert table["mlp.w_down"] == "234,881,024"
    assert {"mha": "attention.w_q", "mla": "attention.w_uq"}[attention] in table
    assert contents(tmp_path) == {}


# ------------------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_ignores_where_a_run_writes_and_whether_it_resumes(tiny: dict[str, Any]) -> None:
    identity = fingerprint(tiny)
    assert re.fullmatch(r"[0-9a-f]{12}", identity)
    ignored = [key for key in flatten(tiny) if key == "run_dir" or key.startswith("logger.") or key == "trainer.resume"]
    assert len(ignored) > 5
    for key in ignored:
        assert fingerprint(changed(tiny, key, "something else")) == identity, key


def test_the_fingerprint_changes_with_everything_else(tiny: dict[str, Any]) -> None:
    kept = [key for key in flatten(tiny) if key not in ("run_dir", "trainer.resume") and not key.startswith("logger.")]
    seen = {fingerprint(changed(tiny, key, "something else")) for key in kept} | {fingerprint(tiny)}
    assert len(seen) == len(kept) + 1


def test_the_fingerprint_does_not_depend_on_the_order_of_keys(tiny: dict[str, Any]) -> None:
    turned = {section: dict(reversed(v.items())) if isinstance(v, dict) else v for section, v in reversed(tiny.items())}
    assert list(turned) != list(tiny)
    assert fingerprint(turned) == fingerprint(tiny)


# ------------------------------------------------------------------------------------------------ any input at all


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """The config with another value at a flat key."""
    config = deepcopy(config)
    *sections, key = path.split(".")
    place = config
    for section in sections:
        place = place[section]
    place[key] = value
    return config


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**400)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.dates()
    | st.sampled_from(["quack_lm.model.ModelSizes", "os.system", "quack_lm", "${seed}", "auto", "float32"])
)
keys = (
    st.text(max_size=6)
    | st.sampled_from(["model", "_target_", "seed", "lr", "dir", "steps"])
    | st.integers()
    | st.none()
)
garbage = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=8
)
sections = st.sampled_from(
    ["model", "attention", "stabilizer", "optimizer", "data", "trainer", "logger", "seed", "run_dir"]
)


def only_user_errors(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except UserError:
        return None


@given(st.dictionaries(sections | keys, garbage, max_size=9))
def test_checking_garbage_raises_user_errors_only(config: dict[Any, Any]) -> None:
    only_user_errors(lambda: check(config))


@given(data=st.data())
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_checking_a_damaged_config_raises_user_errors_only_and_checking_twice_changes_nothing(
    data: st.DataObject, tiny: dict[str, Any]
) -> None:
    path = data.draw(st.sampled_from([*flatten(tiny), "model", "trainer", "data", "model.extra", "attention.extra"]))
    damaged = changed(tiny, path, data.draw(garbage))
    checked = only_user_errors(lambda: check(damaged))
    if checked is not None:
        assert check(checked) == checked


@given(data=st.data(), attention=st.sampled_from(ATTENTIONS), stabilizer=st.sampled_from(STABILIZERS))
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_a_config_with_any_sizes_builds_or_raises_a_user_error(
    data: st.DataObject, attention: str, stabilizer: str, by_choice: dict[tuple[str, str], dict[str, Any]]
) -> None:
    config = by_choice[attention, stabilizer]
    numbers = [
        k for k, v in flatten(config).items() if isinstance(v, int | None) and k.split(".")[0] in ("model", "attention")
    ]
    for path in data.draw(st.lists(st.sampled_from(numbers), min_size=1, max_size=4, unique=True)):
        config = changed(config, path, data.draw(st.integers(-1, 40) | st.none() | st.booleans()))
    model = only_user_errors(lambda: make_model(check(config)))
    if model is not None:
        # Whatever was accepted runs.
        assert model(torch.zeros(1, 3, dtype=torch.long, device="meta")).shape == (1, 3, config["model"]["vocab_size"])


@pytest.fixture(scope="module")
def by_choice() -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (a, s): compose(["experiment=tiny", f"attention={a}", f"stabilizer={s}"])
        for a in ATTENTIONS
        for s in STABILIZERS
    }


@given(st.text(max_size=12) | st.from_regex(r"[~+]{0,2}[a-z_.@/]{1,8}=?[a-z0-9{}\[\],:$'\" ]{0,8}", fullmatch=True))
@settings(max_examples=40)
def test_any_override_composes_or_raises_a_user_error(override: str) -> None:
    only_user_errors(lambda: compose(["experiment=tiny", override]))
