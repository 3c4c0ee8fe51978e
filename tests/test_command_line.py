"""Help, the generated reference, shell completion, and answers to what Hydra users type."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from calls import call, call_here

from quack_lm.cli.completion import main as print_completion
from quack_lm.config import CONFIG_DIR, choices, compose, groups, help_text, reference_markdown
from quack_lm.config.groups import constructor_keys, read_choice, suggest
from quack_lm.config.schema import SECTIONS, describe
from quack_lm.errors import UserError

TARGETS = sorted({read_choice(group, name)["_target_"] for group in SECTIONS for name in choices(group)})


@pytest.mark.parametrize("target", ["", *TARGETS])
def test_every_key_of_every_class_has_a_line_of_meaning(target: str) -> None:
    for key in describe(target):
        assert key.meaning.endswith("."), f"{target}: {key.name} has no line in the Args of the class's docstring"
        assert key.type


@pytest.mark.parametrize("target", TARGETS)
def test_the_keys_read_from_source_are_those_of_the_constructor(target: str) -> None:
    assert set(constructor_keys(target)) == {key.name for key in describe(target)}


def test_the_configuration_page_is_what_the_code_says() -> None:
    page = CONFIG_DIR.parent / "docs" / "configuration.md"
    assert page.read_text() == reference_markdown(), "quack-lm train --help=markdown > docs/configuration.md"


@pytest.mark.parametrize("group", groups())
def test_help_on_a_group_has_every_choice_and_key(group: str) -> None:
    text = help_text(group)
    assert all(f"{group}={name}" in text for name in choices(group))
    for name in choices(group) if group in SECTIONS else ():
        assert all(f"{group}.{key}: " in text for key in constructor_keys(read_choice(group, name)["_target_"]))


@pytest.mark.parametrize(
    ("topic", "expected"),
    [
        ("optimizer.lr", "optimizer.lr: float > 0, <= 1e+36, default adamw: 0.001, muon: 0.003, muon_small: 0.003"),
        ("trainer.probe_parts", "trainer.probe_parts: bool, default false\n    split the change of the logits"),
        ("stabilizer.tau", "stabilizer.tau: float > 0, default 0.1 (of fixed)"),
        ("trainer.keep_every", "trainer.keep_every: int >= 0, default 0\n    checkpoints of every so many"),
        ("trainer.recompute", "trainer.activation_checkpointing: bool or selective, default false"),
        ("seed", "seed: int >= 0, < 9223372036854775808, default 0\n    seed of"),
        ("stabilizer=quack", "stabilizer=quack\nQuacK: learning rates"),
        ("trainer=tiny", "    val_sequences: 256"),
    ],
)
def test_help_on_one_topic(topic: str, expected: str, monkeypatch, capsys) -> None:
    code, stdout, stderr = call_here("train", ["--help", topic], monkeypatch, capsys)
    assert (code, stderr) == (0, "")
    assert expected in stdout


@pytest.mark.parametrize(
    ("topic", "message"),
    [("lr", r"--help lr: did you mean --help optimizer\.lr\?"), ("optimiser", r"did you mean optimizer\?")],
)
def test_help_on_an_unknown_topic_suggests_one(topic: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        help_text(topic)


@pytest.mark.parametrize("flags", [["--cfg", "job"], ["-c", "job"], ["--cfg=job", "--resolve"]])
def test_cfg_job_prints_the_resolved_config(flags: list[str], monkeypatch, capsys) -> None:
    overrides = ["experiment=tiny", "attention=mla", "optimizer.lr=0.5"]
    code, stdout, stderr = call_here("train", [*overrides, *flags], monkeypatch, capsys)
    assert (code, stderr) == (0, "")
    assert yaml.safe_load(stdout) == compose(overrides)


def test_info_defaults_prints_the_choice_of_every_group(monkeypatch, capsys) -> None:
    code, stdout, _ = call_here("train", ["experiment=tiny", "-i", "defaults", "model=100m"], monkeypatch, capsys)
    assert code == 0
    assert dict(line.split("=") for line in stdout.split()) == {
        "model": "100m",
        "attention": "mha",
        "stabilizer": "none",
        "optimizer": "muon_small",
        "data": "stdlib",
        "trainer": "tiny",
        "logger": "default",
        "eval": "default",
        "experiment": "tiny",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr=3e-3"], "did you mean optimizer.lr=0.003?"),
        (["tau=0.1"], "did you mean stabilizer.tau=0.1?"),
        (["steps=5"], "did you mean trainer.steps=5?"),
        (["d_modle=5"], "did you mean model.d_model=5?"),
        (["stabilizer.tau=1"], "stabilizer.tau: it belongs to stabilizer=fixed and stabilizer=quack"),
        (["checkpoint.interval=10"], "unknown key checkpoint: did you mean eval? (choices: run_dir, seed, model, "),
        (["--lr", "1e-3"], "settings are key=value, without dashes; did you mean optimizer.lr=1e-3?"),
        (["--optimizer.lr=1e-3"], "did you mean optimizer.lr=1e-3?"),
        (["--batch-size", "8"], "unknown flag --batch-size"),
        (["optimizer.is_nesterov=true"], "optimizer.is_nesterov is now optimizer.nesterov"),
        (["optimizer.final_ratio=0"], "optimizer.final_ratio is now optimizer.min_lr_ratio"),
        (["trainer.recompute=true"], "trainer.recompute is now trainer.activation_checkpointing"),
        (["model.q_latent_dim=8"], "model.q_latent_dim is now attention.q_latent_dim"),
        (["sweep=quickstart"], "quack-lm sweep run sweep=quickstart"),
        (["data.files=[a,"], "quote a list for the shell, like 'data.files=[a,b]'"),
        (["logger.tags=x"], "write a list as 'logger.tags=[a,b]'"),
        (["logger.tags=[a]", "logger.tags.x=b"], "Error merging override ++logger.tags.x=b"),
        (["seed=1,2"], "seed=1,2 has several values: quack-lm train -m"),
        (["~seed"], "keys cannot be deleted; where a key may be empty, write seed=null"),
        (["hydra.run.dir=x"], "run_dir=... is the directory of a run"),
        (["hydra.sweep.dir=x"], "dir=... is the directory of several runs"),
        (["hydra/launcher=submitit"], "quack-lm sweep submit sends runs to slurm"),
        (["hydra.job.chdir=true"], "not needed: the working directory never changes"),
        (["--config-name=x"], "choose an experiment=... or give --config FILE"),
        (["--config-dir", "x"], "add a yaml file to a group there"),
        (["--cfg", "all"], "only --cfg job exists"),
        (["--info", "plugins"], "only --info defaults exists"),
        (["--config", "nowhere.yaml"], f"no such file or directory (looked for in {Path.cwd()})"),
        (["-m", "experiment=tiny"], "several values of a key such as seed=0,1"),
    ],
)
def test_what_users_of_hydra_and_argparse_type_gets_an_answer(
    arguments: list[str], message: str, monkeypatch, capsys
) -> None:
    code, stdout, stderr = call_here("train", arguments, monkeypatch, capsys)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert message in stderr


def test_a_quoted_tilde_is_the_home_directory_wherever_a_path_is_given(
    tmp_path, tiny_data: list[str], monkeypatch
) -> None:
    home = tmp_path / "home"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(home))
    home.mkdir()
    (home / "s.yaml").write_text("# Why?\nbase: [experiment=tiny]\ngrid: {attention: [mha]}\nseeds: [0]\n")
    (home / "c.yaml").write_text(yaml.safe_dump(compose(["experiment=tiny", *tiny_data])))
    for arguments in (
        ["sweep", "plan", "sweep=~/s.yaml", "dir=~/sw", *tiny_data],
        ["sweep", "plan", "sweep=~/s.yaml", "dir=~/other", "reuse=~/sw", *tiny_data],
        ["sweep", "collect", "dir=~/sw", "out=~/coll"],
        ["report", "~/coll", "-o", "~/rep"],
        ["train", "--config", "~/c.yaml", 'run_dir="~/run"', "--check"],
    ):
        code, stdout, stderr = call(*arguments)
        assert code == 0, stderr
    made = {path.name for path in home.glob("[!.]*")}  # and matplotlib's cache
    assert made == {"s.yaml", "c.yaml", "sw", "other", "coll", "rep"}
    assert f"ready to train in {home}/run" in stdout
    assert call("report", "~no_such_user/sw")[0] == 2
    assert list(Path.cwd().iterdir()) == []


def test_a_config_of_another_version_says_so(tmp_path, monkeypatch, capsys) -> None:
    config = compose(["experiment=tiny"])
    config["trainer"]["_target_"] = "quack_lm.train.TrainerSettings"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    code, _, stderr = call_here("train", ["--config", str(tmp_path / "config.yaml")], monkeypatch, capsys)
    assert code == 2
    assert "was written by another version of quack_lm, whose trainer._target_=quack_lm.train.TrainerSettings" in stderr


# ------------------------------------------------------------------------------------------------ completion

WORDS = [
    ("quack-lm sw", ["sweep"]),
    ("quack-lm train attention=", ["attention=mha", "attention=mla"]),
    ("quack-lm train experiment=tiny stabilizer.t", ["stabilizer.tau=", "stabilizer.threshold="]),
    ("quack-lm train trainer.keep_e", ["trainer.keep_every="]),
    ("quack-lm sweep run sweep=paper/fig1", ["sweep=paper/fig1"]),
    ("quack-lm sweep pl", ["plan"]),
]


def script(shell: str, capsys) -> str:
    capsys.readouterr()
    assert print_completion([shell]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(("line", "expected"), WORDS)
def test_bash_completes_verbs_choices_and_keys(line: str, expected: list[str], capsys) -> None:
    ask = f"""
COMP_LINE={line!r}; COMP_POINT=${{#COMP_LINE}}; read -ra COMP_WORDS <<< "$COMP_LINE"
COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_quack_lm; printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", script("bash", capsys) + ask], capture_output=True, text=True, check=True)
    # Bash replaces what follows the last = sign.
    assert done.stdout.split() == [
        word.partition("=")[2] or word if "=" in line.split()[-1] else word for word in expected
    ]
    assert done.stderr == ""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_completes_a_choice_and_a_key(tmp_path, capsys) -> None:
    (tmp_path / "completion").write_text(script("zsh", capsys))
    drive = rf"""
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "autoload -Uz compinit; compinit -u -D; source {tmp_path}/completion; bindkey '^I' complete-word"
zpty -w z "dump() {{ print -r -- \$BUFFER > {tmp_path}/line; zle kill-whole-line }}; zle -N dump; bindkey '^X' dump"
zpty -n -w z $'quack-lm train attention=ml\t optimizer.warm\t\C-x'
repeat 200 {{ [[ -s {tmp_path}/line ]] && break; sleep 0.1 }}
zpty -d z
"""
    subprocess.run(["zsh", "-f", "-c", drive], timeout=60, check=False)
    assert (tmp_path / "line").read_text().split() == ["quack-lm", "train", "attention=mla", "optimizer.warmup_steps="]


def test_completion_loads_no_torch() -> None:
    code = "import sys, quack_lm.cli.completion as c; c.main(['bash']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "matplotlib", "pyarrow"} & set(done.stderr.split())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("_target_: quack_lm.stabilizers.quack.Quackk\n", r"quack_lm\.stabilizers\.quack\.Quackk does not exist"),
        ("_target_: quack_lm.stabilizers.nowhere.X\n", r"quack_lm\.stabilizers\.nowhere\.X does not exist"),
        ("tau: [\n", r"stabilizer=broken: .*broken\.yaml: not a readable yaml file"),
        ("# nothing but a comment\n", r"stabilizer=broken: its yaml file has no _target_"),
    ],
)
def test_a_broken_variant_is_named_and_breaks_no_suggestion_for_the_others(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONFIG_DIR, tmp_path / "configs")
    (tmp_path / "configs/stabilizer/broken.yaml").write_text(text)
    monkeypatch.setattr(sys.modules["quack_lm.config.groups"], "CONFIG_DIR", tmp_path / "configs")
    assert suggest("lr") == "optimizer.lr"
    assert "optimizer.lr" in help_text("optimizer")
    with pytest.raises(UserError, match=said):
        help_text("stabilizer")


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("trainer.lr=3e-3", "optimizer.lr"),
        ("optimizer.tau=0.1", "stabilizer.tau"),
        ("learning_rate=1e-3", "optimizer.lr"),
        ("batch_size=8", "trainer.global_batch_size"),
        ("optimizer.learning_rate=1e-3", "optimizer.lr"),
        ("training.learning_rate=1e-3", "optimizer.lr"),
        ("trainer.batch_size=8", "trainer.global_batch_size"),
        ("training.steps=8", "trainer.steps"),
        ("modle.d_model=64", "model.d_model"),
        ("optim.adamw_beta1=0.9", "optimizer.adamw_beta1"),
    ],
)
def test_a_key_in_the_wrong_section_or_of_another_codebase_is_suggested(override: str, suggested: str) -> None:
    value = override.partition("=")[2]
    with pytest.raises(UserError, match=re.escape(f"did you mean {suggested}={float(value):g}?")):
        compose(["experiment=tiny", "stabilizer=quack", override])
