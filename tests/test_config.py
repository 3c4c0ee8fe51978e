"""Configs: the paper's numbers, the names people rely on, and one clear line for every mistake."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from calls import call_here, snapshot
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quack_lm.config import (
    CONFIG_DIR,
    check,
    choice,
    choices,
    compose,
    fingerprint,
    flatten,
    identity,
    instantiate,
    older_identity,
)
from quack_lm.errors import UserError
from quack_lm.training.build import make_model

SCRIPT = CONFIG_DIR.parent / "scripts" / "train.py"
GROUPS = ("attention", "data", "eval", "experiment", "logger", "model", "optimizer", "stabilizer", "trainer")
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
        "tied_embeddings": True,
        "norm_eps": 1e-6,
        "init_std": 0.02,
        "embedding_std": 0.02,
    }
    heads = {"n_heads": 32, "rope_theta": 10_000.0, "backend": "sdpa"}
    # null: the paper's 64, and latents of 512 and 256, which test_model.py sees in the tensors.
    expected = {
        "mha": {"_target_": "quack_lm.attention.mha.MHA", **heads, "n_kv_heads": 32, "head_dim": None},
        "mla": {
            "_target_": "quack_lm.attention.mla.MLA",
            **heads,
            "q_latent_dim": None,
            "kv_latent_dim": None,
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
        "min_lr_ratio": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "momentum": 0.95,
        "nesterov": True,
        "update_scale": "jordan",
        "ns": "jordan",
        "ns_dtype": "bfloat16",
        "adamw_lr": None,
        "adamw_beta1": 0.9,
        "adamw_beta2": 0.95,
        "adamw_eps": 1e-8,
        "state_dtype": "float32",
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
    assert {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()} == {*GROUPS, "sweep", "tasks"}
    assert set(choices("attention")) >= set(ATTENTIONS)
    assert set(choices("stabilizer")) >= set(STABILIZERS)
    assert set(choices("model")) >= {"tiny", "100m", "1b"}
    assert set(choices("optimizer")) >= {"muon", "adamw"}
    assert set(choices("data")) >= {"stdlib", "local", "cosmopedia_v2"}


@pytest.mark.parametrize(("group", "name"), [(group, name) for group in GROUPS for name in choices(group)])
def test_every_choice_of_every_group_composes_and_builds(group: str, name: str, tiny_data: list[str]) -> None:
    needed = {
        "local": ["data.files=[x.txt]"],
        "hub": ["data.name=owner/name"],
        "tokens": ["data.files=[x.bin]", "data.vocab_size=9", "data.eot_id=0"],
        "mixture": [f"data.dirs=[{tiny_data[1].removeprefix('data.dir=')}]"],
    }
    config = compose([f"{group}={name}", *(needed.get(name, []) if group == "data" else [])])
    model = make_model(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    for section in ("data", "logger", "optimizer"):
        instantiate(config[section])
    if group in ("attention", "stabilizer"):
        assert choice(config[group]) == name


@pytest.mark.parametrize("model", ["tiny", "100m"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_every_model_fits_every_attention(model: str, attention: str) -> None:
    make_model(compose([f"model={model}", f"attention={attention}"]))


def test_an_attention_brings_its_own_sizes_in_one_file_and_one_yaml(tiny_data, tmp_path) -> None:
    for folder in ("quack_lm", "configs"):
        source = CONFIG_DIR.parent / folder
        shutil.copytree(source, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "quack_lm" / "attention" / "low_rank.py").write_text(LOW_RANK)
    yaml_text = (
        "_target_: quack_lm.attention.low_rank.LowRank\nn_heads: ${model.n_heads}\nquery_rank: 8\nbackend: sdpa\n"
    )
    (tmp_path / "configs" / "attention" / "low_rank.yaml").write_text(yaml_text)
    arguments = ["experiment=tiny", "attention=low_rank", "stabilizer=quack", *tiny_data, "trainer.steps=3"]
    done = subprocess.run(
        [sys.executable, "-m", "quack_lm", "train", *arguments, "attention.query_rank=6", "run_dir=run"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["attention"]["query_rank"] == 6
    assert "scale/w_query_up" in (tmp_path / "run" / "metrics.jsonl").read_text()


LOW_RANK = """
from quack_lm.attention.base import Attention, even_split, linear, split_heads
from quack_lm.attention.scores import Backend
from quack_lm.logit_paths import Factor, LogitPath


class LowRank(Attention):
    def __init__(self, d_model, make_transform=None, *, n_heads: int, query_rank: int, backend: Backend):
        width = even_split(d_model, n_heads)
        super().__init__(
            n_heads=n_heads, qk_width=width, rope_width=width, backend=backend, make_transform=make_transform
        )
        self.rope_theta = 10_000.0
        self.w_query_down, self.w_query_up = linear(d_model, query_rank), linear(query_rank, d_model)
        self.w_k, self.w_v, self.w_o = (linear(d_model, d_model) for _ in range(3))

    def project(self, x):
        parts = self.w_query_up(self.w_query_down(x)), self.w_k(x), self.w_v(x)
        return tuple(split_heads(part, self.n_heads) for part in parts)

    def logit_paths(self):
        factors = (Factor("w_query_up", self.n_heads), Factor("w_query_down"), Factor("w_k", self.n_heads))
        return (LogitPath("qk", factors),)
"""


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
        ("attention.backend", ["sdpa", "eager", "flash", "flex", "auto"]),
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
    config = compose(["experiment=tiny", "model=100m", "optimizer=adamw"])
    assert config["model"]["d_model"] == 640
    assert choice(config["optimizer"]) == "recipe"
    assert config["optimizer"]["_target_"].endswith("AdamWRecipe")


# ------------------------------------------------------------------------------------------------ mistakes in names


@pytest.mark.parametrize(
    ("override", "suggestion"),
    [
        ("sead=1", "seed"),
        ("rundir=x", "run_dir"),
        ("trainr={}", "trainer"),
        ("model.dmodel=64", "model.d_model"),
        ("attention.n_head=4", "attention.n_heads"),
        ("stabilizer.tua=0.1", "stabilizer.tau"),
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
def test_an_unknown_name_is_answered_with_the_nearest_valid_one(override: str, suggestion: str) -> None:
    with pytest.raises(UserError) as caught:
        compose(["experiment=tiny", "stabilizer=quack", override])
    message = str(caught.value)
    key = override.partition("=")[0]
    assert any(name in message for name in (f"unknown key {key}:", f"unknown key {key.split('.')[0]}:", f"{override}:"))
    assert "choices: " in message
    assert f"did you mean {suggestion}?" in message


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
        ("model=1b", r"model=1b: .*already chosen by the config file; override single keys"),
        ("experiment=paper", r"experiment"),
        ("trainer.step=3", r"unknown key trainer\.step:.*trainer\.steps"),
        ("trainer.steps=many", r"trainer\.steps='many'"),
        ("optimizer.lr.x=3", r"optimizer\.lr"),
        ("seed.x=3", r"seed"),
        ("hydra.run.dir=x", r"hydra"),
        ("logger.name=${oc.env:HOME}", r"logger\.name=.*plain references"),
        ("~seed", r"~seed: .*cannot be deleted"),
        ("seed=1,2", r"seed=1,2 has several values: .*train -m"),
    ],
)
def test_bad_overrides_of_a_config_file_give_one_line(override: str, message: str, finished_run) -> None:
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
        (
            ["attention=mha", "optimizer.lr=4e-3", "seed=9"],
            r"holds a run with attention\._target_=\S*MLA, not \S*MHA, attention\.latent_norm.*\(and \d+ more keys\)",
        ),
        (["seed=9"], r"holds a run with seed=0, not 9"),
        (["trainer.resume=never"], r"trainer\.resume=auto continues it, or choose another run_dir"),
    ],
)
def test_a_run_directory_keeps_its_run(arguments: list[str], message: str, finished_run, monkeypatch, capsys) -> None:
    run_dir, overrides = finished_run
    before = snapshot(run_dir)
    code, stdout, stderr = call_here("train", [*overrides, *arguments], monkeypatch, capsys)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert re.search(message, stderr), stderr
    assert snapshot(run_dir) == before


def test_a_finished_run_is_left_alone(finished_run, monkeypatch, capsys) -> None:
    run_dir, overrides = finished_run
    before = snapshot(run_dir)
    code, stdout, stderr = call_here("train", overrides, monkeypatch, capsys)
    assert (code, stderr) == (0, "")
    assert "finished already: completed" in stdout
    assert snapshot(run_dir) == before


def test_help_lists_every_choice_of_every_group(monkeypatch, capsys) -> None:
    code, stdout, stderr = call_here("train", ["--help"], monkeypatch, capsys)
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
    code, stdout, _ = call_here("train", arguments, monkeypatch, capsys)
    assert code == 0
    table = {line.split()[-1]: line.split()[0] for line in stdout.rpartition("\n\n")[2].splitlines() if "," in line}
    assert table["total"] == total
    assert table["embedding"] == "100,663,296"
    assert table["mlp.w_down"] == "234,881,024"
    assert {"mha": "attention.w_q", "mla": "attention.w_uq"}[attention] in table
    assert snapshot(tmp_path) == {}


# ------------------------------------------------------------------------------------------------ fingerprint


def test_the_fingerprint_ignores_where_a_run_writes_and_whether_it_resumes(tiny: dict[str, Any]) -> None:
    identity = fingerprint(tiny)
    assert re.fullmatch(r"[0-9a-f]{12}", identity)
    ignored = [key for key in flatten(tiny) if key == "run_dir" or key.startswith("logger.") or key == "trainer.resume"]
    assert len(ignored) > 5
    for key in ignored:
        assert fingerprint(changed(tiny, key, "something else")) == identity, key


def test_the_fingerprint_changes_with_everything_else(tiny: dict[str, Any]) -> None:
    free = ("run_dir", "logger.", "trainer.resume", "trainer.keep_every", "trainer.async_checkpoints")
    free += ("trainer.max_logits", "trainer.profile", "eval.")
    kept = [key for key in flatten(tiny) if not key.startswith(free)]
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
    ["model", "attention", "stabilizer", "optimizer", "data", "trainer", "logger", "eval", "seed", "run_dir"]
)


def only_user_errors(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except UserError:
        return None


def test_a_run_of_an_earlier_version_had_the_defaults_of_keys_that_are_new() -> None:
    config = compose(["optimizer=muon"])
    before = {k: v for k, v in identity(config).items() if k not in ("optimizer.ns", "trainer.reduce_dtype")}
    assert older_identity(before, config) == identity(config)
    changed = compose(["optimizer=muon", "optimizer.ns=polar_express"])
    assert older_identity(before, changed) == identity(config)


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


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


values = (
    st.text(max_size=8)
    | st.from_regex(r"[\[\]{}:,$'\" a-z0-9.+-]{0,12}", fullmatch=True)
    | st.sampled_from(
        ["nan", "-inf", "1e999", "9" * 5000, "[" * 200, "'${seed}'", "${oc.env:HOME}", "choice(1,2)", "'\0'"]
    )
)
overrides = (
    st.text(max_size=12)
    | st.from_regex(r"[~+]{0,2}[a-z_.@/]{1,8}=?[a-z0-9{}\[\],:$'\" ]{0,8}", fullmatch=True)
    | st.builds("{}={}".format, st.sampled_from([*RELIED_ON, *GROUPS, "model._target_", "hydra.run.dir"]), values)
)


@given(st.lists(overrides, min_size=1, max_size=3))
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
def test_any_overrides_compose_or_raise_a_user_error_and_make_no_file(empty: Path, overrides: list[str]) -> None:
    with contextlib.chdir(empty):
        config = only_user_errors(lambda: compose(["experiment=tiny", *overrides]))
    assert snapshot(empty) == {}
    if config is not None:
        assert check(config) == config


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_the_papers_batch_is_shared_by_every_usual_number_of_ranks(ranks: int) -> None:
    instantiate(compose(["experiment=paper"])["trainer"]).check_ranks(ranks)


@pytest.mark.parametrize(("ranks", "fix"), [(2, "trainer.micro_batch_size=2"), (3, "trainer.global_batch_size=24")])
def test_ranks_that_cannot_share_the_batch_are_told_what_they_could_share(ranks: int, fix: str) -> None:
    overrides = ["experiment=tiny", "trainer.global_batch_size=20", "trainer.micro_batch_size=4"]
    with pytest.raises(UserError, match=f"; for example {re.escape(fix)}$"):
        instantiate(compose(overrides)["trainer"]).check_ranks(ranks)
    instantiate(compose([*overrides, fix])["trainer"]).check_ranks(ranks)
