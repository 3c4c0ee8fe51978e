"""Invalid input, of the user or in untrusted files: one line that names it and suggests a fix, exit code 2, no trace.

The rows below go through the scripts' own main blocks. What a manifest may not say is in test_data.py, what a corpus
may not be in test_corpus.py, a damaged checkpoint and a run directory in use in test_train.py.
"""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from calls import SCRIPTS, as_any_user, call_here, snapshot, write_files

from quack_lm.cli import exit_on_user_error
from quack_lm.config import CONFIG_DIR, compose
from quack_lm.files import file_sha256
from quack_lm.report import collected
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run
from quack_lm.training.loop import train


class Given(NamedTuple):
    """What a row may copy and damage: a prepared data set, and a finished run of two steps on it."""

    data: Path
    run: Path


class Bad(NamedTuple):
    """Arguments after a valid command, and what the one line on stderr must match. TMP is the test's directory."""

    arguments: list[str]
    message: str
    files: dict[str, bytes] = {}  # noqa: RUF012
    env: dict[str, str] = {}  # noqa: RUF012
    arrange: Callable[[Path, Given], object] | None = None


def one(argument: str, message: str, **more: Any) -> Bad:
    return Bad([argument], message, **more)


def secret(argument: str, message: str, *more: str) -> Bad:
    """An argument with a password that no line may repeat."""
    return Bad([argument, *more], rf"^(?!.*hunter2).*{message}")


# ------------------------------------------------------------------------------------------------ ways to do damage


def damaged_data(damage: Callable[[Path], object]) -> dict[str, Any]:
    """A copy of the data set in TMP/data, with this done to it."""

    def arrange(tmp_path: Path, given: Given) -> None:
        shutil.copytree(given.data, tmp_path / "data")
        damage(tmp_path / "data")

    return {"arrange": arrange}


def edited(file: str, edit: Callable[[Any], object]) -> Callable[[Path], None]:
    """Change what a json file says."""

    def damage(directory: Path) -> None:
        values = json.loads((directory / file).read_text())
        edit(values)
        (directory / file).write_text(json.dumps(values))

    return damage


def written(file: str, content: str | bytes) -> Callable[[Path], None]:
    """Write another content into the only file that matches."""

    def damage(directory: Path) -> None:
        (path,) = directory.glob(file)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def linked_out(file: str) -> Callable[[Path], None]:
    """Move a file out of the data set and leave a link to it, so that even its sha256 is right."""

    def damage(directory: Path) -> None:
        (directory / file).rename(directory.parent / "outside")
        (directory / file).symlink_to(directory.parent / "outside")

    return damage


def replaced_by_a_pipe(file: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        (directory / file).unlink()
        os.mkfifo(directory / file)

    return damage


def linked_to_zeros(file: str) -> Callable[[Path], None]:
    """A file without an end."""

    def damage(directory: Path) -> None:
        (directory / file).unlink()
        (directory / file).symlink_to("/dev/zero")

    return damage


def pipe(name: str) -> dict[str, Any]:
    """A pipe in TMP, which nobody writes to."""

    def arrange(tmp_path: Path, given: Given) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / name)

    return {"arrange": arrange}


def bad_data(damage: Callable[[Path], object], message: str) -> Bad:
    return one("data.dir=TMP/data", rf"data\.dir: TMP/data\S* is damaged: .*{message}", **damaged_data(damage))


def bad_run(damage: Callable[[Path], object], message: str, *arguments: str) -> Bad:
    """The finished run is copied to TMP/run, damaged, and made longer."""

    def arrange(tmp_path: Path, given: Given) -> None:
        shutil.copytree(given.run, tmp_path / "run")
        damage(tmp_path / "run")

    return Bad([*RUN, *arguments], message, arrange=arrange)


def bad_source(damage: Callable[[Path], object], message: str, *arguments: str) -> Bad:
    """The finished run is copied to TMP/source and damaged, and another one begins with its weights."""

    def arrange(tmp_path: Path, given: Given) -> None:
        shutil.copytree(given.run, tmp_path / "source")
        damage(tmp_path / "source")

    return Bad([*RUN, "trainer.init_from=TMP/source", *arguments], message, arrange=arrange)


def foreign_source(message: str, *arguments: str, **files: Any) -> Bad:
    """A directory of transformers with these files, by their names without the ending, to begin with."""
    named = {f"source/{name.replace('_index', '.safetensors.index')}.json": json.dumps(v) for name, v in files.items()}
    contents = {name: text.encode() for name, text in named.items()}
    return Bad(["trainer.init_from=TMP/source", *arguments], message, files=contents)


def foreign(run_dir: str, name: str, files: dict[str, bytes]) -> Bad:
    """A directory of other things, of which this is one."""
    message = rf"run_dir=\S+ is no directory of a run, for it holds {name}; choose a new directory"
    return one(f"run_dir={run_dir}", message, files=files)


def bad_checkpoint(damage: Callable[[Path], object], message: str = r"TMP/run/checkpoints/step_\S+") -> Bad:
    """The run's checkpoint is damaged by somebody who writes a right manifest for it."""

    def forge(run: Path) -> None:
        (checkpoint,) = run.glob("checkpoints/*")
        damage(checkpoint)
        paths = [path for path in checkpoint.iterdir() if path.name != "manifest.json"]
        files = {path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths}
        (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))

    return bad_run(forge, message)


def bad_progress(message: str, **changes: Any) -> Bad:
    return bad_checkpoint(
        edited("state.json", lambda s: s["progress"].update(changes)),
        rf"TMP/run/checkpoints/step_00000002: the progress in its state\.json cannot be used \({message}",
    )


def with_a_pipe(checkpoint: Path) -> None:
    """A checkpoint that lists a file which nobody writes to."""
    os.mkfifo(checkpoint / "pipe")
    edited("manifest.json", lambda m: m["files"].update(pipe={"bytes": 0, "sha256": "0" * 64}))(checkpoint)


def resaved(
    edit: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    *,
    part: str = "model.",
    about: str = "",
) -> Callable[[Path], None]:
    """A checkpoint with another first matrix of this part of it, or with other words about where its pieces lie."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    def damage(checkpoint: Path) -> None:
        (path,) = checkpoint.glob("*.safetensors")
        with safe_open(path, "pt") as file:
            own, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        name = next(name for name in tensors if name.startswith(part) and tensors[name].ndim == 2)
        tensors[name] = edit(tensors[name]).clone()
        save_file(tensors, path, own | {"DCP_SHARDING_INFO": about} if about else own)

    return damage


def bad_tokenizer(damage: Callable[[Path], object], message: str) -> Bad:
    """The tokenizer of the data set is copied to TMP/t and damaged."""

    def arrange(tmp_path: Path, given: Given) -> None:
        shutil.copytree(given.data / "tokenizer", tmp_path / "t")
        damage(tmp_path / "t")

    return one("data.tokenizer=TMP/t", rf"data\.tokenizer=TMP/t: {message}", arrange=arrange)


def tokenizer_settings(**changes: Any) -> Callable[[Path], None]:
    return edited("tokenizer_config.json", lambda settings: settings.update(changes))


def words_without_an_unknown(state: dict[str, Any]) -> None:
    """A tokenizer that loads, and fails at the first word that it does not know."""
    vocabulary = {"<|endoftext|>": 0} | {f"w{number}": number for number in range(1, 300)}
    state["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    state["added_tokens"] = []


def sweep_file(text: str | bytes, message: str, *arguments: str) -> Bad:
    content = text if isinstance(text, bytes) else text.encode()
    return Bad(["plan", "sweep=TMP/mine.yaml", "dir=TMP/runs", *arguments], message, files={"mine.yaml": content})


def laughs(levels: int = 12) -> str:
    """Lists of ten times the list before: a kilobyte that stands for 10^levels values."""
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


def doubling(levels: int = 60) -> str:
    """The same without aliases: lists that refer to the list before, twice."""
    lines = ["a0: [x]"] + [f"a{i}: ['${{a{i - 1}}}', '${{a{i - 1}}}']" for i in range(1, levels)]
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------ scripts/train.py

TOO_LARGE = r"is too large, .* parameters take .* GiB of the .* GiB"
# The environment of one process among many; a row adds what is wrong with it.
LAUNCHED = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
SMALL = ["model.n_layers=1", "trainer.val_sequences=2", "trainer.probe_sequences=2", "trainer.device=cpu"]
LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "num_attention_heads": 4}
RUN = [*SMALL, "stabilizer=quack", "optimizer.warmup_steps=0", "trainer.steps=4"]

# One task of two that srun started.
STEP = {
    **{"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2"},
    **{"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "MASTER_ADDR": "127.0.0.1"},
}


def launched(message: str, base: dict[str, str] = LAUNCHED, **changes: str) -> Bad:
    return one("trainer.device=cpu", message, env=base | changes)


LAUNCHES: dict[str, Bad] = {
    "port_not_a_number": launched(r"MASTER_PORT='abc' in the environment", MASTER_PORT="abc"),
    "port_beyond_all_ports": launched(r"MASTER_PORT='999999' in the environment", MASTER_PORT="999999"),
    "port_negative": launched(r"MASTER_PORT='-1' in the environment", MASTER_PORT="-1"),
    "port_empty": launched(r"MASTER_PORT='' in the environment", MASTER_PORT=""),
    "address_empty": launched(r"MASTER_ADDR='' in the environment is no host", MASTER_ADDR=""),
    "port_of_many_not_a_number": launched(r"MASTER_PORT='abc'", MASTER_PORT="abc", WORLD_SIZE="2"),
    "task_not_a_number": launched(r"SLURM_PROCID='first' in the environment", STEP, SLURM_PROCID="first"),
    "task_negative": launched(r"SLURM_PROCID='-1' in the environment", STEP, SLURM_PROCID="-1"),
    "task_beyond_the_step": launched(r"SLURM_PROCID=5 must be below SLURM_STEP_NUM_TASKS=2", STEP, SLURM_PROCID="5"),
    "task_of_no_node": launched(r"slurm's variables of this step .*IndexError", STEP, SLURM_NODEID="1"),
    "task_beyond_its_node": launched(r"SLURM_LOCALID=0 below the 0 tasks", STEP, SLURM_STEP_TASKS_PER_NODE="0"),
    "step_of_nobody": launched(r"SLURM_STEP_NUM_TASKS='0' in the environment", STEP, SLURM_STEP_NUM_TASKS="0"),
    "job_not_a_number": launched(r"SLURM_JOB_ID='abc' in the environment", STEP, SLURM_JOB_ID="abc"),
    "port_of_a_step_not_a_number": launched(r"MASTER_PORT='abc' in the environment", STEP, MASTER_PORT="abc"),
    "world_of_words_inside_a_step": launched(r"WORLD_SIZE='two' in the environment", STEP, WORLD_SIZE="two"),
}

# Each is appended to: experiment=tiny, a prepared data set, trainer.steps=1, run_dir=TMP/run.
TRAIN: dict[str, Bad] = {
    # names
    "unknown_section": one("trainr.steps=3", r"unknown key trainr\.steps: did you mean trainer\.steps=3\?"),
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
    "int_for_bool": one("trainer.activation_checkpointing=1", r"trainer\.activation_checkpointing=1: .*boolean"),
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
    "wandb_project": one("logger.project='a/b c'", r"logger\.project=.*pattern"),
    "wandb_tag": one(f"logger.tags=[{'t' * 78}]", r"logger\.tags.*64 characters"),
    "wandb_empty_tag": one("logger.tags=['']", r"logger\.tags.*1 character"),
    "rate_beyond_floats": one("optimizer.lr=1e308", r"optimizer\.lr=1e\+308: .*less than or equal"),
    "rate_of_the_rest_beyond_floats": one(
        "optimizer.adamw_lr=1e308", r"optimizer\.adamw_lr=1e\+308: .*less than or equal"
    ),
    "threshold_beyond_floats": Bad(
        ["stabilizer=qk_clip", "stabilizer.threshold=1e308"], r"stabilizer\.threshold=1e\+308 is too large for"
    ),
    "chunk_beyond_everything": one(
        "trainer.loss_chunk=9223372036854775807", r"trainer\.loss_chunk=9223372036854775807: .*less than"
    ),
    "momentum_of_one": one("optimizer.momentum=1.0", r"optimizer\.momentum=1\.0: .*less than 1"),
    "moments_too_slow_for_bfloat16": Bad(
        ["optimizer.state_dtype=bfloat16", "optimizer.adamw_beta2=0.999"], r"optimizer\.adamw_beta2=0\.999 .*float32"
    ),
    "negative_decay": one("optimizer.weight_decay=-0.1", r"optimizer\.weight_decay=-0\.1: "),
    "negative_tau": Bad(["stabilizer=quack", "stabilizer.tau=-1"], r"stabilizer\.tau=-1: .*greater than 0"),
    "zero_threshold": Bad(["stabilizer=qk_clip", "stabilizer.threshold=0"], r"stabilizer\.threshold=0: "),
    "unknown_norm": Bad(["stabilizer=quack", "stabilizer.norm=l1"], r"stabilizer\.norm='l1': .*frobenius.*spectral"),
    "unknown_precision": one("trainer.precision=float16", r"trainer\.precision='float16': .*float32.*bfloat16"),
    "unknown_backend": one("attention.backend=fast", r"attention\.backend='fast': .*sdpa"),
    "unknown_resume": one("trainer.resume=maybe", r"trainer\.resume='maybe': .*auto.*never"),
    "unknown_wandb_mode": one("logger.wandb=on", r"logger\.wandb=.*online.*offline.*disabled"),
    "unknown_schedule": one("optimizer.schedule=linear", r"optimizer\.schedule='linear': .*cosine"),
    "splits_beyond_everything": Bad(
        ["data.dir=TMP/nowhere", "data.val_fraction=0.6", "data.probe_fraction=0.5"], r"data\.val_fraction=0\.6"
    ),
    # shapes
    "heads_do_not_divide_width": one("model.n_heads=5", r"attention\.n_heads=5 must divide model\.d_model=64"),
    "heads_do_not_divide_width_mla": Bad(["attention=mla", "attention.n_heads=5"], r"attention\.n_heads=5 must divide"),
    "kv_heads_do_not_divide_heads": one("attention.n_kv_heads=3", r"attention\.n_kv_heads=3 .*attention\.n_heads=4"),
    "odd_head": one("attention.head_dim=7", r"attention\.head_dim=7 must be even"),
    "odd_rope": Bad(["attention=mla", "attention.rope_dim=9"], r"attention\.rope_dim=9 must be even"),
    "micro_batch_does_not_divide_batch": one(
        "trainer.micro_batch_size=3", r"trainer\.global_batch_size=8 .*trainer\.micro_batch_size = 1 x 3"
    ),
    "three_processes": one("seed=0", r"trainer\.global_batch_size=8 .*3 x 8 = 24", env=LAUNCHED | {"WORLD_SIZE": "3"}),
    "replicas_do_not_divide_processes": one("trainer.replicas=2", r"trainer\.replicas=2 .*ranks, 1"),
    "sequence_longer_than_the_data": one(
        "trainer.seq_len=500000", r"trainer\.seq_len=500000 is too long for the train"
    ),
    "vocabulary_too_small": one("model.vocab_size=100", r"model\.vocab_size=100 .*set model\.vocab_size=512"),
    "absurd_width": one("model.d_ff=10000000000000000000", r"model\.d_ff"),
    # what no machine has room for
    "feed_forward_of_billions": one("model.d_ff=2000000000", rf"model\.d_ff=2000000000 {TOO_LARGE}"),
    "width_of_a_million": one("model.d_model=1000000", rf"model\.d_model=1000000 {TOO_LARGE}"),
    "heads_of_billions": one("attention.head_dim=2000000000", rf"attention\.head_dim=2000000000 {TOO_LARGE}"),
    "latent_of_billions": Bad(
        ["attention=mla", "attention.kv_latent_dim=2000000000"], rf"attention\.kv_latent_dim=2000000000 {TOO_LARGE}"
    ),
    "vocabulary_of_billions": one("model.vocab_size=2000000000", rf"model\.vocab_size=2000000000 {TOO_LARGE}"),
    # what is not there
    "missing_data": one(
        "data.dir=TMP/nowhere", r"in TMP/nowhere, .*quack-lm prepare data=stdlib data\.dir=TMP/nowhere\n"
    ),
    "missing_data_of_a_relative_directory": one("data.dir=nowhere", r"in nowhere \(relative to .*, TMP\), manifest"),
    "data_is_a_file": one("data.dir=TMP/file", r"data\.dir: .*TMP/file", files={"file": b"x"}),
    "data_without_manifest": one(
        "data.dir=TMP/d", r"data\.dir: no prepared data in TMP/d, manifest", files={"d/x": b""}
    ),
    "flex_on_cpu": Bad(["attention.backend=flex", "trainer.device=cpu"], r"attention\.backend=flex .*sdpa"),
    "flash_on_cpu": Bad(["attention.backend=flash", "trainer.device=cpu"], r"attention\.backend=flash .*sdpa"),
    "flex_maxima_on_cpu": Bad(["trainer.max_logits=flex", "trainer.device=cpu"], r"trainer\.max_logits=flex .*auto"),
    "mixture_with_a_set_that_is_not_there": Bad(
        ["data=mixture", "data.dirs=[TMP/nowhere]"],
        r"data\.dirs: no prepared data in TMP/nowhere, .*quack-lm prepare data=\.\.\. data\.dir=TMP/nowhere\n",
    ),
    "mixture_of_nothing": one("data=mixture", r"data\.dirs must be a list of prepared data sets, like"),
    "unset_files": Bad(["data=local", "data.dir=TMP/nowhere"], r"data\.files"),
    # run_dir
    "run_dir_is_a_file": one("run_dir=TMP/file", r"run_dir=TMP/file.*choose another run_dir", files={"file": b"x"}),
    "run_dir_below_a_file": one("run_dir=TMP/file/a/b", r"run_dir=TMP/file/a/b: .*TMP/file ", files={"file": b"x"}),
    "run_dir_with_a_broken_config": one(
        "run_dir=TMP/old", r"run_dir=TMP/old: .*config\.yaml cannot be read", files={"old/config.yaml": b"\xff\xfe\x00"}
    ),
    "run_dir_with_a_long_name": one("run_dir=TMP/" + 300 * "a", r"run_dir=TMP/aaa"),
    # what a config from somebody else could try
    "target_os_system": one("model._target_=os.system", r"model\._target_='os\.system' must be a class of quack_lm"),
    "target_eval": one("stabilizer._target_=builtins.eval", r"stabilizer\._target_='builtins\.eval'"),
    "target_function": one("data._target_=quack_lm.config.compose", r"data\._target_='quack_lm\.config\.compose'"),
    "target_module": one("data._target_=quack_lm.data.corpus", r"data\._target_='quack_lm\.data\.corpus'"),
    "target_through_an_import": one(
        "trainer._target_=quack_lm.training.loop.Path", r"trainer\._target_='quack_lm\.training\.loop\.Path'"
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
    "unclosed_bracket": one("logger.tags=[a", r"logger\.tags=\[a.*quote a list for the shell"),
    "sweep": one(
        "optimizer.lr=0.1,0.2", r"optimizer\.lr=0\.1,0\.2 has several values: quack-lm train -m .*quack-lm sweep run"
    ),
    "sweep_of_choices": one("attention=mha,mla", r"attention=mha,mla has several values"),
    "range": one("seed=range(1,3)", r"seed=range\(1,3\) has several values"),
    "deletion": one("~seed", r"~seed: keys cannot be deleted.*seed=null"),
    "deletion_of_a_group": one("~model", r"~model: .*cannot be deleted"),
    "package": one("model@encoder=tiny", r"model@encoder=tiny: .*cannot be moved"),
    "hydra_section": one("hydra.run.dir=x", r"hydra\.run\.dir=x: .*not used here.*run_dir"),
    "hydra_group": one("hydra/launcher=basic", r"hydra/launcher=basic: .*not used here"),
    "unknown_flag": one("--fast", r"unknown flag --fast.*key=value"),
    # config files
    "no_config_file": Bad(["--config"], r"--config needs a value, as in --config FILE"),
    "missing_config_file": one("--config=TMP/nowhere.yaml", r"--config TMP/nowhere\.yaml: no such file"),
    "config_is_a_directory": one("--config=TMP/d", r"--config TMP/d: is a directory", files={"d/x": b""}),
    # sizes that no machine has
    "seed_beyond_64_bits": one("seed=100000000000000000000", r"seed=100000000000000000000: .*less than"),
    "seed_of_5000_digits": one("seed=" + "9" * 5000, r"seed|cannot read"),
    "steps_beyond_64_bits": one("trainer.steps=10000000000000000000", r"trainer\.steps=\d+ is too large for"),
    "batch_beyond_64_bits": Bad(
        ["trainer.global_batch_size=10000000000000000000", "trainer.micro_batch_size=10000000000000000000"],
        r"trainer\.\w+_batch_size=\d+ is too large for",
    ),
    "million_layers": one("model.n_layers=1000000", r"model\.n_layers=1000000: .*less than or equal to 1000"),
    "million_workers": one("data.workers=1000000", r"data\.workers=1000000: .*less than or equal to 1024"),
    "endless_timeout": one("trainer.timeout_s=1e300", r"trainer\.timeout_s=1e\+300: .*less than or equal"),
    "timeout_not_a_number": one("trainer.timeout_s=nan", r"trainer\.timeout_s=nan: "),
    "negative_infinity": one("optimizer.weight_decay=-inf", r"optimizer\.weight_decay=-inf: "),
    "overflowing_float": one("optimizer.lr=1e999", r"optimizer\.lr=inf: .*finite"),
    "tau_not_a_number": Bad(["stabilizer=quack", "stabilizer.tau=nan"], r"stabilizer\.tau=nan: .*finite"),
    "gradient_clip_not_a_number": one("optimizer.max_grad_norm=nan", r"optimizer\.max_grad_norm=nan: .*finite"),
    "list_of_lists": one("logger.tags=" + "[" * 300 + "]" * 300, r"logger\.tags|nested too deeply"),
    "reference_to_a_section": one("logger.name='${model}'", r"logger\.name='\$\{model\}' refers to several values"),
    "reference_to_a_list": Bad(
        ["logger.tags=[a]", "logger.name='${logger.tags}'"], r"logger\.name=.* refers to several values"
    ),
    # contradictions
    "evaluation_longer_than_its_split": Bad(
        ["trainer.seq_len=20000"], r"trainer\.seq_len=20000 is too long for the \w+ split .* set trainer\.seq_len to"
    ),
    "latent_of_nothing": Bad(["attention=mla", "attention.kv_latent_dim=0"], r"attention\.kv_latent_dim=0: "),
    "decay_beyond_the_end": one("optimizer.decay_fraction=1.5", r"optimizer\.decay_fraction=1\.5: "),
    "other_vocabulary": Bad(["data.vocab_size=300"], r"data\.dir=\S+ was made with data\.vocab_size=512, not 300"),
    "other_tokenizer": one("data.tokenizer=gpt2", r"data\.dir=\S+ was made with data\.tokenizer=.*, not gpt2"),
    "choice_of_other_data": one(
        "data=fineweb_edu", r"was made with data=local, not fineweb_edu; leave data=fineweb_edu"
    ),
    "init_stabilizer_alone": one(
        "trainer.init_stabilizer=checkpoint",
        r"trainer\.init_stabilizer=checkpoint has no effect without trainer\.init_from",
    ),
    "trace_after_the_end": one("trainer.profile=[2,3]", r"trainer\.profile=\[2, 3\] begins after .*trainer\.steps=1:"),
    "evaluation_on_nothing": Bad(["eval.every=1", "eval.tasks=[]"], r"eval\.every=1 has no eval\.tasks: .*every=0"),
    "gpu_without_a_gpu": one("trainer.device=cuda", r"trainer\.device=cuda: .*no GPU.*trainer\.device=cpu"),
    # the environment
    "rank_not_a_number": one("seed=0", r"RANK='first' in the environment", env=LAUNCHED | {"RANK": "first"}),
    "rank_negative": one("seed=0", r"RANK='-1' in the environment", env=LAUNCHED | {"RANK": "-1"}),
    "rank_beyond_the_world": one(
        "seed=0", r"RANK=3 must be below WORLD_SIZE=2", env=LAUNCHED | {"RANK": "3", "WORLD_SIZE": "2"}
    ),
    "world_of_nobody": one("seed=0", r"WORLD_SIZE='0' in the environment", env=LAUNCHED | {"WORLD_SIZE": "0"}),
    "world_empty": one("seed=0", r"WORLD_SIZE='' in the environment", env=LAUNCHED | {"WORLD_SIZE": ""}),
    "world_with_a_fraction": one("seed=0", r"WORLD_SIZE='2\.0' in the", env=LAUNCHED | {"WORLD_SIZE": "2.0"}),
    "world_of_5000_digits": one("seed=0", r"WORLD_SIZE='9+' in the", env=LAUNCHED | {"WORLD_SIZE": "9" * 5000}),
    "local_rank_not_a_number": one("seed=0", r"LOCAL_RANK='x' in the", env=LAUNCHED | {"LOCAL_RANK": "x"}),
    "local_world_not_a_number": one(
        "trainer.device=cpu", r"LOCAL_WORLD_SIZE='many' in the", env=LAUNCHED | {"LOCAL_WORLD_SIZE": "many"}
    ),
    "world_without_a_rank": one("seed=0", r"WORLD_SIZE=2 .* RANK is not: .*torchrun", env={"WORLD_SIZE": "2"}),
    "world_without_an_address": one(
        "seed=0", r"WORLD_SIZE=2 .* MASTER_ADDR is not", env={"WORLD_SIZE": "2", "RANK": "0"}
    ),
    **LAUNCHES,
    # data sets
    "manifest_nested": bad_data(written("manifest.json", '{"source": ' + "[" * 99_999), r""),
    "manifest_with_billions_of_digits": bad_data(
        written("manifest.json", '{"format_version": ' + "9" * 4299 + "}"), r"format_version"
    ),
    "manifest_steers_the_terminal": bad_data(
        edited("manifest.json", lambda m: m.update({"\x1b]0;pwned\x07\x1b[2J": 1})), r"\\x1b\]0;pwned\\x07"
    ),
    "manifest_is_a_link": bad_data(linked_out("manifest.json"), r"link to a file outside"),
    "manifest_is_a_pipe": bad_data(replaced_by_a_pipe("manifest.json"), r"not a regular file"),
    "manifest_is_a_directory": one(
        "data.dir=TMP/d", r"data\.dir: TMP/d/manifest\.json", files={"d/manifest.json/x": b""}
    ),
    "shard_is_a_link": bad_data(linked_out("val_00000.bin"), r"link to a file outside"),
    "shard_is_a_pipe": bad_data(replaced_by_a_pipe("val_00000.bin"), r"not a regular file"),
    "shard_is_endless": bad_data(linked_to_zeros("val_00000.bin"), r"link to a file outside"),
    "tokenizer_is_a_pipe": bad_data(replaced_by_a_pipe("tokenizer/tokenizer.json"), r"not a regular file"),
    "tokenizer_is_a_link": bad_data(linked_out("tokenizer/tokenizer.json"), r"link to a file outside"),
    "shard_has_tokens_beyond_the_vocabulary": bad_data(
        lambda data: foreign_tokens(data), r"it has tokens beyond the vocabulary"
    ),
    "data_dir_has_a_long_name": one("data.dir=TMP/" + 300 * "a", r"data\.dir: TMP/a+.*: File name too long"),
    # run directories
    "run_dir_where_nothing_can_be_made": one(
        "run_dir=/proc/quack_lm/run", r"run_dir=/proc/quack_lm/run.*another run_dir"
    ),
    "run_dir_with_results_of_nobody": one(
        "run_dir=TMP/old", r"run_dir=TMP/old holds results without their config", files={"old/metrics.jsonl": b""}
    ),
    "run_dir_of_runs": foreign("TMP/runs", "mine/", {"runs/mine/config.yaml": b"seed: 1"}),
    "run_dir_of_sweeps": foreign("TMP/runs", "sweep/", {"runs/sweep/mine/config.yaml": b"seed: 1"}),
    "run_dir_of_a_planned_sweep": foreign("TMP/sweep", "plan.json", {"sweep/plan.json": b"{}"}),
    "run_dir_of_the_checkpoints_of_a_run": foreign(
        "TMP/run/checkpoints", "step_00000002/", {"run/checkpoints/step_00000002/state.json": b"{}"}
    ),
    "run_dir_of_configs": foreign(str(CONFIG_DIR), "attention/", {}),
    "run_dir_that_is_the_data": Bad(
        ["data.dir=TMP/data", "run_dir=TMP/data"],
        r"run_dir=TMP/data is no directory of a run, for it holds manifest\.json; choose a new directory",
        **damaged_data(lambda data: None),
    ),
    "run_dir_whose_config_is_a_directory": one(
        "run_dir=TMP/old",
        r"run_dir=TMP/old: its config\.yaml cannot be read; choose another run_dir.*directory",
        files={"old/config.yaml/x": b""},
    ),
    "run_dir_whose_config_laughs": one(
        "run_dir=TMP/old", r"run_dir=TMP/old: .*aliases", files={"old/config.yaml": laughs().encode()}
    ),
    "run_dir_whose_config_is_nested": one(
        "run_dir=TMP/old", r"run_dir=TMP/old: .*too deeply", files={"old/config.yaml": b"[" * 20_000}
    ),
    "run_dir_whose_config_has_a_tag": one(
        "run_dir=TMP/old",
        r"run_dir=TMP/old: .*not a readable yaml",
        files={"old/config.yaml": b"seed: !!python/object/apply:os.system ['touch pwned']\n"},
    ),
    "run_dir_whose_config_is_a_list": one(
        "run_dir=TMP/old", r"run_dir=TMP/old: .*sections of a run", files={"old/config.yaml": b"- 1\n"}
    ),
    "run_dir_of_an_older_run": one(
        "run_dir=TMP/old",
        r"run_dir=TMP/old was written by an earlier version of quack_lm.*another run_dir",
        files={"old/config.yaml": b"seed: 1\n"},
    ),
    "run_dir_whose_config_is_a_pipe": one(
        "run_dir=TMP/old", r"run_dir=TMP/old: .*config\.yaml is not a regular file", **pipe("old/config.yaml")
    ),
    "run_dir_whose_config_is_endless": bad_run(linked_to_zeros("config.yaml"), r"config\.yaml is not a regular file"),
    "run_dir_whose_lock_is_a_pipe": bad_run(replaced_by_a_pipe(".lock"), r"run_dir=.*\.lock is not a regular file"),
    "run_dir_whose_lock_is_endless": bad_run(linked_to_zeros(".lock"), r"run_dir=.*\.lock is not a regular file"),
    "run_dir_whose_log_is_a_pipe": bad_run(
        replaced_by_a_pipe("metrics.jsonl"), r"metrics\.jsonl is not a regular file"
    ),
    "run_dir_whose_log_is_endless": bad_run(linked_to_zeros("metrics.jsonl"), r"metrics\.jsonl is not a regular file"),
    # weights of another run
    "init_from_nowhere": one(
        "trainer.init_from=TMP/nowhere", r"trainer\.init_from=TMP/nowhere is neither a checkpoint nor"
    ),
    "init_from_a_run_without_checkpoints": bad_source(
        lambda run: shutil.rmtree(run / "checkpoints"), r"trainer\.init_from=TMP/source is neither a checkpoint nor"
    ),
    "init_from_a_damaged_run": bad_source(
        written("checkpoints/*/*.safetensors", b"x"),
        r"none of the 1 checkpoints in TMP/source/checkpoints is valid.*; restore one$",
    ),
    "init_from_another_size": bad_source(
        lambda run: None,
        r"trainer\.init_from=TMP/source does not fit this run: model\.d_ff is (\d+) there and 44 here; .*"
        r"blocks\.\*\.mlp\.w_up\.weight is .* here; .*; set model\.d_ff=\1",
        "model.d_ff=44",
    ),
    "init_from_another_attention": bad_source(
        lambda run: None,
        r"does not fit this run: attention is mha there and mla here; .*set attention=mha",
        "attention=mla",
    ),
    "init_from_another_norm": bad_source(
        lambda run: None,
        r"stabilizer is (\w+) there and qk_norm here; blocks\.\*\.attention\.seam\.transform\.q_norm\.weight is not "
        r"there.*; set stabilizer=\1",
        "stabilizer=qk_norm",
    ),
    "init_from_no_weights": foreign_source(r"TMP/source has neither model\.safetensors nor", config=LLAMA),
    "init_from_another_class": foreign_source(
        r"is a model of the type gpt2, and .* llama; take weights of the type llama or qwen3 or deepseek_v3",
        config={"model_type": "gpt2"},
    ),
    "init_from_a_class_with_another_norm": foreign_source(
        r"is a model of the type qwen3, and .* llama; choose attention=mha and stabilizer=qk_norm",
        config={"model_type": "qwen3"},
    ),
    "init_from_remote_code": foreign_source(
        r"TMP/source/config\.json is no config of a known model",
        config={"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
    ),
    "init_from_an_index_that_leaves": foreign_source(
        r"model\.safetensors\.index\.json names files outside", config=LLAMA, model_index={"weight_map": {"a": "../a"}}
    ),
    "init_stabilizer_of_transformers": foreign_source(
        r"trainer\.init_stabilizer=checkpoint: .*no state of a stabilizer",
        "trainer.init_stabilizer=checkpoint",
        config=LLAMA,
    ),
    "run_of_another_seed": bad_run(lambda run: None, r"run_dir=TMP/run holds a run with seed=0, not 7", "seed=7"),
    "run_not_to_be_resumed": bad_run(
        lambda run: None, r"run_dir=TMP/run already holds this run; trainer\.resume=auto", "trainer.resume=never"
    ),
    "run_without_its_checkpoints": bad_run(
        lambda run: shutil.rmtree(run / "checkpoints"), r"run_dir=TMP/run has the log of a run and no .*: step 2\)"
    ),
    "run_without_its_checkpoints_and_summary": bad_run(
        lambda run: [shutil.rmtree(run / "checkpoints"), (run / "summary.json").unlink()],
        r"run_dir=TMP/run has the log of a run and no checkpoint .*: step unknown\)",
    ),
    "run_with_an_empty_directory_of_checkpoints": bad_run(
        lambda run: shutil.rmtree(next(run.glob("checkpoints/*"))), r"run_dir=TMP/run has the log of a run and no "
    ),
    "run_whose_checkpoints_are_a_file": bad_run(
        lambda run: [shutil.rmtree(run / "checkpoints"), (run / "checkpoints").touch()],
        r"TMP/run/checkpoints is not a writable directory",
    ),
    "run_whose_checkpoints_are_a_link_to_nothing": bad_run(
        lambda run: [shutil.rmtree(run / "checkpoints"), (run / "checkpoints").symlink_to(run / "nowhere")],
        r"TMP/run/checkpoints is not a writable directory",
    ),
    "run_whose_checkpoints_are_read_only": bad_run(
        lambda run: (run / "checkpoints").chmod(0o500), r"TMP/run/checkpoints is not a writable directory"
    ),
    "fresh_run_whose_checkpoints_are_a_link_to_nothing": Bad(
        [],
        r"TMP/run/checkpoints is not a writable directory",
        arrange=lambda tmp_path, given: [(tmp_path / "run").mkdir(), (tmp_path / "run/checkpoints").symlink_to("x")],
    ),
    # checkpoints
    "checkpoint_is_cut": bad_run(
        written("checkpoints/*/*.safetensors", b"\0" * 100), r"none of the 1 checkpoints in .*100 bytes"
    ),
    "checkpoint_has_no_manifest": bad_run(
        lambda run: next(run.glob("checkpoints/*/manifest.json")).unlink(),
        r"none of the 1 checkpoints .*manifest\.json",
    ),
    "state_is_no_text": bad_checkpoint(written("state.json", b"\xff\xfe")),
    "state_is_nested": bad_checkpoint(written("state.json", "[" * 99_999)),
    "state_is_a_list": bad_checkpoint(written("state.json", "[]")),
    "state_with_foreign_progress": bad_checkpoint(edited("state.json", lambda s: s.update(progress={"pace": 3}))),
    "state_with_progress_in_words": bad_checkpoint(edited("state.json", lambda s: s["progress"].update(step="far"))),
    "state_of_another_step": bad_checkpoint(edited("state.json", lambda s: s.update(step=77)), r"of another step"),
    "state_without_config": bad_checkpoint(edited("state.json", lambda s: s.update(config="mine"))),
    "state_of_another_config": bad_checkpoint(
        edited("state.json", lambda s: s["config"].update({"seed": 9})), r"step_\S+ holds a run with seed=9, not 0"
    ),
    "state_of_another_stabilizer": bad_checkpoint(edited("state.json", lambda s: s.update(stabilizer_state=["norms"]))),
    "state_of_other_data": bad_checkpoint(
        edited("state.json", lambda s: s.update(manifest_sha256="0" * 64)), r"data\.dir=\S+ is not the data set"
    ),
    "state_without_progress": bad_checkpoint(
        edited("state.json", lambda s: s.update(progress={})), r"step_\S+: the progress .*step: Field required"
    ),
    "state_without_a_key_of_progress": bad_checkpoint(
        edited("state.json", lambda s: s["progress"].pop("probes")), r"step_\S+: the progress .*probes: Field required"
    ),
    "state_with_progress_of_another_step": bad_progress(r"it is of step 1\)", step=1),
    "state_with_a_negative_step": bad_progress(r"step: .*greater than or equal to 0", step=-5),
    "state_with_a_step_beyond_64_bits": bad_progress(r"step: .*integer", step=2**70),
    "state_with_a_step_that_is_true": bad_progress(r"step: .*integer", step=True),
    "state_with_a_list_of_seconds": bad_progress(r"outside_s: .*dictionary", outside_s=[1]),
    "state_with_seconds_in_words": bad_progress(r"outside_s\.probe: .*number", outside_s={"probe": "1"}),
    "state_with_endless_seconds": bad_progress(r"elapsed_s: .*finite", elapsed_s="inf"),
    "state_with_a_list_of_losses": bad_progress(r"best_val_loss: .*number", best_val_loss=[1]),
    "state_without_seconds": bad_progress(r"elapsed_s: .*number", elapsed_s=None),
    "state_without_the_stabilizers_state": bad_checkpoint(
        edited("state.json", lambda s: s.update(stabilizer_state=[])), r"step_\S+: .*another stabilizer"
    ),
    "state_with_one_more_of_the_stabilizers": bad_checkpoint(
        edited("state.json", lambda s: s["stabilizer_state"].append("initial.w_x")), r"step_\S+: .*another stabilizer"
    ),
    "manifest_with_endless_bytes": bad_run(
        lambda run: edited("manifest.json", lambda m: m["files"]["state.json"].update(bytes=float("inf")))(
            next(run.glob("checkpoints/*"))
        ),
        r"none of the 1 checkpoints .*manifest\.json is not what a run writes",
    ),
    "checkpoint_has_a_pipe": bad_run(
        lambda run: with_a_pipe(next(run.glob("checkpoints/*"))),
        r"none of the 1 checkpoints .*pipe is not a regular",
    ),
    "tensors_of_another_shape": bad_checkpoint(resaved(lambda matrix: matrix[:1, :1])),
    "tensors_with_rows_missing": bad_checkpoint(
        resaved(lambda matrix: matrix[:-1]), r"step_\S+: it has \d+ rows of mod"
    ),
    "tensors_of_another_dtype": bad_checkpoint(
        resaved(lambda matrix: matrix.int()), r"step_\S+: it has model\.\S+ as torch\.int32, not torch\.float32"
    ),
    "tensors_of_the_optimizer_of_another_dtype": bad_checkpoint(
        resaved(lambda matrix: matrix.half(), part="optimizer."),
        r"step_\S+: it has optimizer\.\S+ as torch\.float16, not torch\.float32",
    ),
    "tensors_of_the_stabilizer_of_another_shape": bad_checkpoint(
        resaved(lambda table: table[:, :-1], part="stabilizer."), r"step_\S+: stabilizer\.\S+ has another shape"
    ),
    "places_of_tensors_in_no_json": bad_checkpoint(resaved(about="{"), r"step_\S+ is damaged \(JSONDecodeError"),
    "places_of_tensors_in_a_list": bad_checkpoint(resaved(about="[]"), r"step_\S+ is damaged \(TypeError"),
    "places_of_tensors_missing": bad_checkpoint(resaved(about='{"x": 1}'), r"step_\S+ is damaged \(KeyError"),
    "places_of_tensors_in_words": bad_checkpoint(resaved(about='"here"'), r"step_\S+ is damaged \(TypeError"),
    "places_of_tensors_nested": bad_checkpoint(resaved(about="[" * 99_999), r"step_\S+ is damaged \(RecursionError"),
    "tensors_are_a_pickle": bad_checkpoint(written("*.safetensors", b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")),
    # more that a config from somebody else could try
    "target_train": one(
        "trainer._target_=quack_lm.training.loop.train", r"trainer\._target_='quack_lm\.training\.loop\.train'"
    ),
    "target_check_run": one(
        "model._target_=quack_lm.training.check.check_run", r"model\._target_='quack_lm\.training\.check\.check_run'"
    ),
    "target_run": one(
        "trainer._target_=quack_lm.training.loop.Run", r"trainer\._target_='quack_lm\.training\.loop\.Run'"
    ),
    "target_prepare": one("data._target_=quack_lm.data.prepare.prepare", r"data\._target_='quack_lm\.data\.prep"),
    "target_base_class": one(
        "data._target_=quack_lm.data.corpus.Corpus", r"data\._target_='quack_lm\.data\.corpus\.Corpus'"
    ),
    "target_subprocess": one("logger._target_=quack_lm.training.build.subprocess.Popen", r"logger\._target_="),
    "target_dunder": one("logger._target_=quack_lm.training.metrics.LoggerSettings.__init__", r"logger\._target_="),
    "password_in_a_url": Bad(
        ["data=local", "data.files=['https://duck:hunter2@pond.example/x.jsonl']"],
        r"^error: data\.files has a password in its URL(?!.*hunter2)",
    ),
    "token_in_a_url": secret("logger.name='https://hunter2@pond.example/x'", r"logger\.name has a password"),
    "token_in_a_url_that_is_replaced": secret(
        "logger.name='https://hunter2@pond.example/x'", r"logger\.name has a password", "logger.name=pond"
    ),
    "token_in_a_query": secret(
        "data.dir='https://h/x?token=hunter2'", r"data\.dir has a password in its URL.*~/\.netrc"
    ),
    "token_in_a_fragment": secret("run_dir='https://h/x#access_token=hunter2'", r"run_dir has a password"),
    "signed_url": secret("data.tokenizer=https://h/x?X-Amz-Signature=hunter2", r"data\.tokenizer has a password"),
    "password_in_what_cannot_be_read": secret("logger.tags=[https://duck:hunter2@h/x", r"logger\.tags has a password"),
    "password_in_a_key": secret("https://duck:hunter2@h/x=3", r"quack-lm train has a password"),
    "password_in_the_name_of_a_file": secret("--config=https://duck:hunter2@h/x", r"--config has a password"),
    "password_for_wandb": Bad(
        ["logger.wandb=online"],
        r"^error: WANDB_BASE_URL in the environment has a password in its URL(?!.*hunter2)",
        env={"WANDB_BASE_URL": "https://hunter2@wandb.example"},
    ),
    "data_set_of_the_hub_that_is_a_loader": Bad(
        ["data=cosmopedia_v2", "data.dir=TMP/nowhere", "data.name=pickle"], r"data\.name='pickle': "
    ),
}


def foreign_tokens(data: Path) -> None:
    """A data set whose checksums are right and whose tokens are not."""
    import hashlib

    path = data / "val_00000.bin"
    path.write_bytes(b"\xff" * path.stat().st_size)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edited("manifest.json", lambda m: m["splits"]["val"]["shards"][0].update(sha256=digest))(data)


# Contents of FILE in: --config FILE, and nothing else.
CONFIG_FILES: dict[str, tuple[bytes, str]] = {
    "garbage": (b"a: [1, 2\nb: }", r"--config TMP/file\.yaml: not a readable yaml"),
    "binary": (bytes(range(256)), r"--config TMP/file\.yaml: not a readable yaml"),
    "list": (b"- 1\n- 2\n", r"--config TMP/file\.yaml: "),
    "text": (b"just words", r"expected the sections of a run's config\.yaml"),
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
    "password_for_a_number": (b"seed: 'https://duck:hunter2@h/x'\nrun_dir: x\n", r"^(?!.*hunter2).*seed='https://\*"),
    "token_for_a_number": (
        b"seed: 'https://h/x?sig=hunter2'\nrun_dir: x\n",
        r"^(?!.*hunter2).*seed='https://h/x\?sig=\*",
    ),
    "number_as_a_key": (b"seed: 1\n3: 4\n", r"unknown key 3"),
    "anchors_into_themselves": (b"seed: &a [*a]\n", r"seed|TMP/file\.yaml"),
    "not_utf8": ("seed: größer\n".encode("latin-1"), r"--config TMP/file\.yaml: not a readable yaml"),
    "nested": (b"[" * 20_000, r"--config TMP/file\.yaml: .*too deeply|not a readable yaml"),
    "nested_mappings": (b"{a: " * 3_000 + b"1" + b"}" * 3_000, r"too deeply|TMP/file\.yaml"),
    "aliases": (laughs().encode(), r"--config TMP/file\.yaml: .*aliases are not allowed"),
    "lists_of_references": (doubling().encode(), r"a\d+=.* refers to several values"),
    "number_of_5000_digits": (b"seed: " + b"9" * 5000 + b"\n", r"TMP/file\.yaml|less than"),
    "foreign_callable_of_ours": (
        b"seed: 1\nrun_dir: null\nmodel: {_target_: quack_lm.data.prepare.prepare, corpus: x}\n",
        r"model\._target_='quack_lm\.data\.prepare\.prepare'",
    ),
    "partial_of_hydra": (
        b"seed: 1\nrun_dir: null\nmodel: {_target_: quack_lm.model.ModelSizes, _partial_: true}\n",
        r"unknown key model\._partial_",
    ),
}


# ------------------------------------------------------------------------------------------------ preparing data


def parquet(columns: dict[str, list[Any]] | pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns) if isinstance(columns, dict) else columns, sink)
    return sink.getvalue().to_pybytes()


def results_with(**values: str) -> bytes:
    """The collected results of a sweep, with another value in every row."""
    table = pq.read_table(CONFIG_DIR.parent / "docs/results/sensitivity/results.parquet")
    for name, value in values.items():
        table = table.set_column(table.column_names.index(name), name, pa.array([value] * len(table)))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


NOT_OURS = r"not a transformers tokenizer directory"
ROWS_OF_TEXT = b"".join(json.dumps({"text": f"document {number} " * 9}).encode() + b"\n" for number in range(999))


def table_file(name: str, content: bytes, message: str = r"cannot read it", format: str = "jsonl") -> Bad:
    """The only file of the corpus, named in the message."""
    arguments = [f"data.format={format}", f"data.files=[TMP/{name}]"]
    return Bad(arguments, rf"data\.\w+.*: TMP/{re.escape(name)}.*{message}", files={name: content})


# Each is appended to: data=local data.dir=TMP/new/set data.files=[TMP/text.txt] data.workers=0 data.vocab_size=300.
PREPARE: dict[str, Bad] = {
    "unknown_key": one("data.fiels=[x]", r"unknown key data\.fiels:.*did you mean data\.files\?"),
    "unknown_corpus": one("data=cosmopedia", r"data=cosmopedia: did you mean cosmopedia_v2\?"),
    "unknown_flag": one("--fast", r"--fast"),
    "no_files": one("data.files=[]", r"data\.files=\[\]: .*at least 1"),
    "files_not_a_list": one("data.files=TMP/text.txt", r"data\.files='\S+': .*list"),
    "missing_file": one(
        "data.files=[nowhere/*.txt]", r"data\.files: nowhere/\*\.txt matches no file \(relative.* TMP\)"
    ),
    "url": one(
        "data.files=['https://pond.example/x.txt']", r"data\.files: https://pond\.example/x\.txt matches no file"
    ),
    "one_of_two_files_missing": one("data.files=[TMP/text.txt,TMP/more.txt]", r"TMP/more\.txt matches no file"),
    "unknown_format": one("data.format=csv", r"data\.format='csv': .*text.*jsonl.*parquet"),
    "text_that_is_no_text": one(
        "data.files=[TMP/b.txt]", r"data\.files: TMP/b\.txt is not UTF-8", files={"b.txt": b"\xff\xfe" * 99}
    ),
    "text_as_parquet": one(
        "data.format=parquet", r"data\.files: TMP/text\.txt \(by its name.*set data\.format=text\): cannot read it"
    ),
    "utf16_as_jsonl": Bad(
        ["data.format=jsonl", "data.files=[TMP/b.txt]"],
        r"TMP/b\.txt line 1: not UTF-8 .*by its name it is text: set data\.format=text",
        files={"b.txt": "text".encode("utf-16")},
    ),
    "text_as_jsonl": one("data.format=jsonl", r"data\.files: TMP/text\.txt line 1: not JSON.*set data\.format=text"),
    "jsonl_as_text": table_file("x.jsonl.gz", b"{}", r"set data\.format=jsonl", format="text"),
    "parquet_as_text": table_file("x.parquet", parquet({"text": ["a"]}), r"set data\.format=parquet", format="text"),
    "parquet_as_jsonl": table_file("x", parquet({"text": ["a"]}), r"set data\.format=parquet"),
    "parquet_and_jsonl": Bad(
        ["data.format=jsonl", "data.files=[TMP/a.parquet,TMP/b.jsonl]"],
        r"TMP/a\.parquet is parquet and TMP/b\.jsonl is jsonl by its name: .*files of one format",
        files={"a.parquet": parquet({"text": ["a"]}), "b.jsonl": ROWS_OF_TEXT},
    ),
    "parquet_with_a_column_twice": Bad(
        ["data.format=parquet", "data.files=[TMP/x.parquet]"],
        r"data\.files: TMP/x\.parquet has 2 columns data\.text_field=text: its columns are text, text",
        files={"x.parquet": parquet(pa.table([["a"], ["b"]], names=["text", "text"]))},
    ),
    "parquet_in_gzip": table_file(
        "x.parquet.gz", gzip.compress(parquet({"text": ["a"]})), r"compressed once more: unpack", format="parquet"
    ),
    "mixture": one("data=mixture", r"data=mixture is for training: prepare each of its data\.dirs"),
    "text_and_jsonl_by_their_names": Bad(
        ["data.files=[TMP/text.txt,TMP/b.jsonl]"],
        r"TMP/\S+ is \w+ and TMP/\S+ is \w+ by its name: .* say which it is with data\.format",
        files={"b.jsonl": ROWS_OF_TEXT},
    ),
    "column_of_another_name": table_file(
        "x.jsonl", b'{"id": "a", "body": "a long text"}', r"the longest text is in body: set data\.text_field=body"
    ),
    "separator_of_nothing": one("data.separator=''", r"data\.separator='': .*at least 1"),
    "separator_that_occurs_nowhere": Bad(
        ["data.separator='\\n---\\n'", "data.files=[TMP/text.txt,TMP/b.txt]"],
        r"data\.separator='\\n---\\n' occurs in none of data\.files: TMP/b\.txt, TMP/text\.txt; .*separator=null",
        files={"b.txt": b"Words\n--- \nof a text"},
    ),
    "blank_lines_that_occur_nowhere": one(
        "data.separator=blank_lines", r"data\.separator='blank_lines' occurs in none of data\.files: TMP/text\.txt"
    ),
    "jsonl_empty": table_file("x.jsonl", b"", r"no documents"),
    "jsonl_of_a_blank_line": table_file("x.jsonl", b"\n", r"no documents"),
    "jsonl_of_numbers": table_file("x.jsonl", b"1\n2\n", r"line 1: expected an object.*found int 1"),
    "json_array_torn": table_file(
        "x.json", b'[\n{"text": "a"},\n{"text', r"line 1: not JSON \(Unterminated.* character 19\)"
    ),
    "jsonl_nested": table_file("x.jsonl", b'{"text": ' + b"[" * 99_999 + b"\n", r"line 1: .*recursion"),
    "jsonl_torn_late": table_file("x.jsonl", ROWS_OF_TEXT + b'{"text": \n', r"line 1000: not JSON.*on_bad_record=skip"),
    "jsonl_with_half_a_character": table_file(
        "x.jsonl", ROWS_OF_TEXT + b'{"text": "a \\ud83e"}\n', r"line 1000: character 3 is half of a surrogate pair"
    ),
    "jsonl_not_utf8": table_file("x.jsonl", ROWS_OF_TEXT + b'{"text": "\xff"}\n', r"line 1000: not UTF-8"),
    "column_of_one_file_missing": Bad(
        ["data.format=parquet", "data.files=[TMP/a.parquet,TMP/b.parquet]"],
        r"data\.files: TMP/b\.parquet has no column data\.text_field=text: its columns are body",
        files={"a.parquet": parquet({"text": ["a"]}), "b.parquet": parquet({"body": ["a"]})},
    ),
    "column_of_numbers": table_file(
        "x.parquet", parquet({"text": [1, 2]}), r"is int64, and not text", format="parquet"
    ),
    "gzip_cut": table_file("x.jsonl.gz", gzip.compress(ROWS_OF_TEXT)[:-99]),
    "gzip_empty": table_file("x.jsonl.gz", gzip.compress(b""), r"no documents"),
    "gzip_that_is_none": table_file("x.jsonl.gz", b"\x1f\x8b" + ROWS_OF_TEXT),
    "xz_cut": table_file("x.jsonl.xz", lzma.compress(ROWS_OF_TEXT)[:-99]),
    "bz2_cut": table_file("x.jsonl.bz2", bz2.compress(ROWS_OF_TEXT)[:-99]),
    "zip_that_is_none": table_file("x.jsonl.zip", b"PK\x03\x04" + bytes(99)),
    "parquet_empty": table_file("x.parquet", b"", format="parquet"),
    "parquet_cut": table_file("x.parquet", parquet({"text": ["a", "b"]})[:-9], format="parquet"),
    "second_file_is_cut": Bad(
        ["data.format=jsonl", "data.files=[TMP/a.jsonl,TMP/b.jsonl.gz,TMP/c.jsonl]"],
        r"data\.files: TMP/b\.jsonl\.gz: cannot read it",
        files={"a.jsonl": ROWS_OF_TEXT, "b.jsonl.gz": gzip.compress(ROWS_OF_TEXT)[:-99], "c.jsonl": ROWS_OF_TEXT},
    ),
    "too_small_for_its_vocabulary": one(
        "data.vocab_size=60000", r"data\.vocab_size=60000 .*too small.*set data\.vocab"
    ),
    "vocabulary_beyond_any_text": one("data.vocab_size=10000001", r"data\.vocab_size=10000001: .*less than or equal"),
    "empty_shards": one("data.shard_tokens=0", r"data\.shard_tokens=0: .*greater than 0"),
    "fraction_not_a_number": one("data.val_fraction=nan", r"data\.val_fraction=nan: "),
    "fraction_of_everything": one("data.val_fraction=1.0", r"data\.val_fraction=1\.0: .*less than 1"),
    "tokenizer_missing": one(
        "data.tokenizer=./nowhere", r"data\.tokenizer=\./nowhere: no such directory \(relative.* TMP\)"
    ),
    "tokenizer_empty": one("data.tokenizer=TMP/t", r"data\.tokenizer=TMP/t: not a tr", files={"t/x": b""}),
    "tokenizer_torn": one(
        "data.tokenizer=TMP/t",
        r"data\.tokenizer=TMP/t: not a transformers .*: TMP/t/tokenizer\.json is damaged .*; copy it again",
        files={"t/tokenizer.json": b'{"version": '},
    ),
    "tokenizer_is_a_list": bad_tokenizer(written("tokenizer.json", "[]"), NOT_OURS),
    "tokenizer_is_null": bad_tokenizer(written("tokenizer.json", "null"), NOT_OURS),
    "tokenizer_is_nested": bad_tokenizer(written("tokenizer.json", "[" * 99_999), NOT_OURS),
    "tokenizer_is_a_pipe": bad_tokenizer(replaced_by_a_pipe("tokenizer.json"), rf"{NOT_OURS}.*not a regular file"),
    "tokenizer_is_endless": bad_tokenizer(linked_to_zeros("tokenizer.json"), rf"{NOT_OURS}.*not a regular file"),
    "tokenizer_with_settings_in_a_list": bad_tokenizer(written("tokenizer_config.json", "[]"), NOT_OURS),
    "tokenizer_of_a_number": bad_tokenizer(tokenizer_settings(tokenizer_class=5), NOT_OURS),
    "tokenizer_mapped_to_a_number": bad_tokenizer(tokenizer_settings(auto_map=5), NOT_OURS),
    "tokenizer_with_a_number_for_a_token": bad_tokenizer(tokenizer_settings(added_tokens_decoder={"x": 5}), NOT_OURS),
    "tokenizer_of_a_missing_package": bad_tokenizer(
        tokenizer_settings(tokenizer_class="MarianTokenizer"), rf"{NOT_OURS}.*requires"
    ),
    "tokenizer_without_the_words": bad_tokenizer(
        edited("tokenizer.json", words_without_an_unknown), r"it cannot encode a document: .*UNK"
    ),
    "directory_is_a_file": one("data.dir=TMP/text.txt", r"data\.dir=TMP/text\.txt.*choose another data\.dir"),
    "directory_below_a_file": one("data.dir=TMP/text.txt/set", r"data\.dir=TMP/text\.txt/set"),
    "directory_with_a_long_name": one("data.dir=TMP/" + 300 * "a", r"data\.dir=TMP/a+: .*too long"),
    "directory_that_cannot_be": one("data.dir=/proc/quack_lm/set", r"data\.dir=/proc/quack_lm/set"),
    "data_set_with_a_damaged_manifest": one(
        "data.dir=TMP/data", r"manifest\.json is damaged", **damaged_data(written("manifest.json", "{"))
    ),
}

# ------------------------------------------------------------------------------------------------ scripts/sweep.py

GRID = """\
# Which one? Held fixed: the rest.
base: [experiment=tiny]
grid: {attention: [mha, mla], optimizer.lr: [0.003, 0.3]}
seeds: [0, 1]
scales:
  big: [model=100m]
  small: {base: [trainer.steps=7], grid: {optimizer.lr: [0.1]}}
"""
MHA = "# Why?\nbase: [experiment=tiny]\ngrid: {attention: [mha]}\n"

SWEEP: dict[str, Bad] = {
    "nothing": Bad([], r"say which sweep"),
    "unknown_verb": Bad(["plam", "sweep=quickstart"], r"unknown verb plam; did you mean plan\?"),
    "no_value": Bad(["plan", "quickstart"], r"cannot read quickstart; .*key=value"),
    "unknown_sweep": Bad(["plan", "sweep=quikstart"], r"sweep=quikstart: .*did you mean quickstart\?"),
    "sweep_is_a_directory": one("sweep=TMP/d.yaml", r"sweep=TMP/d\.yaml: there is no", files={"d.yaml/x": b""}),
    "no_sweep_to_plan": Bad(["plan", "dir=TMP/runs"], r"say which sweep: sweep=quickstart"),
    "jobs_not_a_number": Bad(["sweep=quickstart", "jobs=all"], r"jobs=all must be an integer"),
    "jobs_without_end": Bad(["sweep=quickstart", "jobs=99999999999"], r"jobs=9+ must be an integer from 1 to 9999"),
    "threads_without_end": Bad(["sweep=quickstart", "threads=" + "9" * 5000], r"threads=9+ must be an integer"),
    "speed_not_a_number": Bad(["plan", "sweep=quickstart", "mfu=nan", "tflops=1"], r"mfu=nan must be a number above 0"),
    "speed_infinite": Bad(["plan", "sweep=quickstart", "mfu=0.4", "tflops=inf"], r"tflops=inf must be a number"),
    "half_a_speed": Bad(["plan", "sweep=quickstart", "mfu=0.4"], r"mfu=\.\.\. and tflops=\.\.\. go together"),
    "reuse_of_nothing": Bad(["sweep=quickstart", "reuse=TMP"], r"reuse=TMP must be a sweep directory, .*plan\.json"),
    "status_of_nothing": Bad(["status", "dir=TMP"], r"TMP: no plan\.json here"),
    "collect_of_nothing": Bad(["collect", "dir=TMP/nowhere"], r"TMP/nowhere: no plan\.json here"),
    "directory_is_a_file": Bad(["plan", "sweep=quickstart", "dir=TMP/f"], r"dir=TMP/f", files={"f": b""}),
    "plan_is_no_json": Bad(["status", "dir=TMP"], r"TMP/plan\.json is invalid", files={"plan.json": b"\xff"}),
    "plan_of_a_run_outside": Bad(
        ["status", "dir=TMP"],
        r"TMP/plan\.json is invalid \(cells\.0\.name",
        files={"plan.json": b'{"sweep": "s", "question": "q", "command": "c", "cells": [{"name": "../x"}]}'},
    ),
    "unknown_key_for_every_run": sweep_file(MHA, r"unknown key trainer\.step:", "trainer.step=3"),
    "value_of_an_axis": sweep_file(MHA, r"attention=mla: the sweep mine sets this key itself", "attention=mla"),
    "value_of_the_seed": sweep_file(MHA + "seeds: [0, 1]\n", r"seed=5: .* sets this key itself", "seed=5"),
    "seed_in_the_base": sweep_file("# Why?\nbase: [seed=5]\n", r"seed=5: .* seeds: \[\.\.\.\]"),
    "seed_on_an_axis": sweep_file("# Why?\ngrid: {seed: [1, 2]}\n", r"seed=1: .* seeds: \[\.\.\.\]"),
    "run_dir_in_the_base": sweep_file("# Why?\nbase: [run_dir=x]\n", r"run_dir=x: a sweep names the directories"),
    "run_dir_for_every_run": sweep_file(MHA, r"run_dir=x: a sweep names the directories", "run_dir=x"),
    "two_axes_for_a_key": sweep_file(
        "# Why?\ngrid: {attention: [mha], both: {a: [attention=mla]}}\n", r"attention: two axes of the sweep mine"
    ),
    "too_many_extra_points": sweep_file("# Why?\nextra: [" + "[a=1], " * 10_001 + "]\n", r"make 10\d\d\d runs, above"),
    "out_of_a_plan": Bad(["plan", "sweep=quickstart", "out=x"], r"out=x has no meaning for plan, only for collect"),
    "index_without_end": Bad(["task", "file=x", "index=" + "9" * 5000], r"index=9+ must be an integer"),
    "unknown_scale": sweep_file(GRID, r"scale=smal: did you mean small\?", "scale=smal"),
    "no_scale": sweep_file(GRID, r"has scales: choose one with scale=big or scale=small"),
    "token_in_a_url_for_every_run": sweep_file(
        MHA, r"^(?!.*hunter2).*logger\.name has a password", "logger.name='https://hunter2@pond.example/x'"
    ),
    "token_in_a_url_of_the_file": sweep_file(
        "# Why?\nbase: [experiment=tiny, 'data.dir=\"https://h/x?token=hunter2\"', data.dir=x]\n"
        "grid: {attention: [mha]}\n",
        r"^(?!.*hunter2).*data\.dir has a password",
    ),
    "token_in_the_directory": sweep_file(MHA, r"^(?!.*hunter2).*dir has a password", "dir=https://h/x?token=hunter2"),
    "scale_of_a_file_without": sweep_file(MHA, r"has no scales", "scale=small"),
    "scale_with_an_unknown_key": sweep_file(
        GRID.replace("{base", "{sedes: [1], base"), r"unknown key scales\.small\.sedes; did you mean", "scale=small"
    ),
    "scale_that_is_a_word": sweep_file(GRID.replace("[model=100m]", "model=100m"), r"scales must give", "scale=big"),
    "no_question": sweep_file("grid: {seed: [1]}\n", r"TMP/mine\.yaml: must open with a comment"),
    "empty_file": sweep_file("", r"TMP/mine\.yaml: expected keys at the top level"),
    "file_is_a_list": sweep_file("# Why?\n- a\n", r"expected keys at the top level"),
    "not_yaml": sweep_file("# Why?\na: [\n", r"TMP/mine\.yaml: not a readable yaml file"),
    "not_utf8": sweep_file("# Größer?\n".encode("latin-1"), r"TMP/mine\.yaml: not a readable yaml file"),
    "date_that_is_none": sweep_file("# Why?\nseeds: [2026-99-99]\n", r"TMP/mine\.yaml: not a readable yaml"),
    "duplicate_key": sweep_file(MHA + "base: [model=100m]\n", r"TMP/mine\.yaml: .*duplicate key base"),
    "tag": sweep_file("# Why?\nbase: !!python/object/apply:os.system ['touch pwned']\n", r"not a readable yaml file"),
    "aliases": sweep_file("# Why?\n" + laughs() + "base: *a11\n", r".*aliases are not allowed"),
    "nested_lists": sweep_file("# Why?\nbase: " + "[" * 9000, r"TMP/mine\.yaml: .*too deeply|not a readable yaml"),
    "unknown_key": sweep_file("# Why?\ngird: {}\n", r"unknown key gird; did you mean grid\?"),
    "base_is_a_word": sweep_file("# Why?\nbase: experiment=tiny\n", r"base='experiment=tiny': .*valid list"),
    "empty_axis": sweep_file("# Why?\ngrid: {attention: []}\n", r"grid\.attention is empty"),
    "axis_is_a_word": sweep_file("# Why?\ngrid: {attention: mha}\n", r"grid\.attention"),
    "axis_is_not_a_key": sweep_file(MHA.replace("attention:", "optimizer.lrr:"), r"unknown key optimizer\.lrr"),
    "seed_is_a_word": sweep_file("# Why?\nseeds: [a]\n", r"seeds\.0='a'"),
    "no_seeds": sweep_file("# Why?\nseeds: []\n", r"seeds is empty"),
    "too_many_runs": sweep_file(
        "# Why?\ngrid:\n" + "".join(f"  a{i}: [{', '.join('0123456789')}]\n" for i in range(12)),
        r"make 1000000000000 runs, above 10000",
    ),
    "exclusion_of_an_unknown_axis": sweep_file(MHA + "exclude: [{atention: mha}]\n", r"did you mean attention\?"),
    "exclusion_of_an_unknown_value": sweep_file(MHA + "exclude: [{attention: mhaa}]\n", r"did you mean mha\?"),
    "exclusion_of_everything": sweep_file(MHA + "exclude: [{}]\n", r"would exclude everything"),
    "exclusion_of_every_run": sweep_file(MHA + "exclude: [{attention: mha}]\n", r"has no runs: everything is excluded"),
    "rule_below_the_best": sweep_file("# Why?\nstop: {loss_above_best: 0.5, for_steps: 3}\n", r"stop\.loss_above_best"),
    "rule_without_a_factor": sweep_file("# Why?\nstop: {for_steps: 3}\n", r"stop\.loss_above_best"),
    "rule_that_never_stops": sweep_file(
        "# Why?\nstop: {loss_above_best: .inf, for_steps: 3}\n", r"stop\.loss_above_best"
    ),
    "rule_with_an_unknown_key": sweep_file(
        "# Why?\nstop: {loss_above_best: 2, for_steps: 3, patience: 9}\n", r"stop\.patience"
    ),
    "rule_of_a_true_step": sweep_file("# Why?\nstop: {loss_above_best: 2, for_steps: true}\n", r"stop\.for_steps=True"),
    "rule_of_nothing": sweep_file("# Why?\nstop: {}\n", r"stop\.loss_above_best"),
}

# ------------------------------------------------------------------------------------------------ scripts/report.py


def plan_json(**changes: Any) -> dict[str, bytes]:
    """A small plan in the format of sweep.py, with something changed in its only cell."""
    config = {
        "seed": 0,
        "attention": {"_target_": "quack_lm.attention.mha.MHA"},
        "stabilizer": {"_target_": "quack_lm.stabilizers.none.NoStabilizer"},
        "optimizer": {"_target_": "quack_lm.optim.recipe.MuonRecipe", "lr": 0.3},
        "trainer": {"steps": 3, "global_batch_size": 2, "seq_len": 4},
    }
    cell = {"name": "run", "fingerprint": "0" * 12, "overrides": [], "config": config | changes.pop("config", {})}
    plan = {"sweep": "s", "question": "q", "command": "c", "stop": None, "cells": [cell | changes]}
    return {"plan.json": json.dumps(plan).encode()}


def bad_plan(files: dict[str, bytes], message: str) -> Bad:
    return one("TMP", rf"TMP/plan\.json is invalid \({message}", files=files)


REPORT: dict[str, Bad] = {
    "no_argument": Bad([], r"DIR; see --help"),
    "unknown_flag": Bad(["TMP", "--fast"], r"--fast; see --help"),
    "missing_directory": one("TMP/nowhere", r"TMP/nowhere is no directory of a run \(config\.yaml\), of a sweep"),
    "directory_without_a_plan": one("TMP", r"TMP is no directory of a run"),
    "directory_is_a_file": one("TMP/f", r"TMP/f is no directory of a run", files={"f": b""}),
    "plan_is_a_directory": one("TMP", r"TMP is no directory of a run", files={"plan.json/x": b""}),
    "output_is_a_file": Bad(
        ["TMP", "-o", "TMP/f"], r"-o TMP/f: .* choose another directory with -o", files=plan_json() | {"f": b""}
    ),
    "plan_is_cut": bad_plan({"plan.json": plan_json()["plan.json"][:100]}, r"Invalid JSON"),
    "plan_is_empty": bad_plan({"plan.json": b""}, r"Invalid JSON"),
    "plan_is_a_list": bad_plan({"plan.json": b"[]"}, r"Input should be an object"),
    "plan_without_cells": bad_plan({"plan.json": b'{"sweep": "s", "question": "q", "command": "c"}'}, r"cells"),
    "plan_is_nested": bad_plan({"plan.json": b"[" * 99_999}, r".*recursion"),
    "run_outside": bad_plan(plan_json(name="../run"), r"cells\.0\.name"),
    "run_at_the_root": bad_plan(plan_json(name="/etc"), r"cells\.0\.name"),
    "run_without_a_name": bad_plan(plan_json(name=""), r"cells\.0\.name"),
    "run_without_a_config": bad_plan(plan_json(config={"attention": None}), r"cells\.0\.config"),
    "run_of_no_stabilizer": bad_plan(plan_json(config={"stabilizer": {"_target_": "x"}}), r"cells\.0\.config"),
    "run_with_a_rate_in_words": bad_plan(
        plan_json(config={"optimizer": {"_target_": "a.b.c", "lr": "fast"}}), r"cells\.0\.config"
    ),
    "run_of_no_steps": bad_plan(
        plan_json(config={"trainer": {"steps": 0, "global_batch_size": 2, "seq_len": 4}}), r"cells\.0\.config"
    ),
    "run_at_no_rate": bad_plan(plan_json(config={"optimizer": {"_target_": "a.b.c", "lr": 0}}), r"cells\.0\.config"),
    "run_with_a_name_without_end": bad_plan(plan_json(name="x" * 201), r"cells\.0\.name"),
    "run_with_a_name_that_steers_the_terminal": bad_plan(plan_json(name="x\x1b]0;y\x07"), r"cells\.0\.name"),
    "run_with_a_limit_in_words": bad_plan(
        plan_json(config={"trainer": {"steps": 1, "global_batch_size": 2, "seq_len": 4, "unstable_logit": "x"}}),
        r"cells\.0\.config",
    ),
    "directory_with_a_name_without_end": one("TMP/" + "x" * 300, r"x{300}/results\.parquet: File name too long"),
    "page_is_a_directory": Bad(
        ["TMP", "-o", "TMP/out"],
        r"-o TMP/out: report\.html is a directory; .*choose another directory with -o",
        files=plan_json() | {"out/report.html/x": b"", "out/figures/x": b""},
    ),
    "results_are_no_parquet": one("TMP", r"TMP: results\.parquet .* is invalid", files={"results.parquet": b"PAR1"}),
    "results_of_something_else": one(
        "TMP",
        r"TMP: results\.parquet .* is invalid .*collect",
        files={"results.parquet": parquet({"a": [1]})},
    ),
    "results_with_a_status_that_no_run_has": one(
        "TMP", r"unknown status", files={"results.parquet": results_with(status="evil\x1b[31m")}
    ),
    "results_are_cut": one(
        "TMP", r"TMP: results\.parquet .* is invalid", files={"results.parquet": parquet({"a": [1]})[:-9]}
    ),
}

# ------------------------------------------------------------------------------------------------ the tests

# By command, what a user may have no permission for; `data`, `run` and `sweep` are copies of the given ones.
LOCKED_UP = {
    "train experiment=tiny data.dir=TMP/data run_dir=TMP/run": [
        *("data", "data/manifest.json", "data/tokenizer", "data/tokenizer/tokenizer.json", "data/train_00000.bin"),
        *("run", "run/.lock", "run/config.yaml", "run/environment.json", "run/summary.json", "run/metrics.jsonl"),
        *("run/checkpoints", "run/checkpoints/step_00000002/state.json"),
    ],
    "prepare_data data=local data.dir=TMP/out/set data.files=[TMP/data/*.json] data.workers=0": [
        *("data/manifest.json", "out"),
    ],
    "sweep status dir=TMP/sweep": [
        *("sweep", "sweep/plan.json", "sweep/run/summary.json", "sweep/run/metrics.jsonl", "sweep/run/train.log")
    ],
    "sweep collect dir=TMP/sweep out=TMP/out": ["sweep/run/metrics.jsonl", "out"],
    "report TMP/sweep -o TMP/out": ["sweep/run/environment.json", "out"],
    "report TMP/out": ["out/results.parquet", "out/curves.parquet"],
}

# What keeps the ranks from meeting keeps preflight from making its table; what else is wrong is a line of that table.
PREFLIGHT = LAUNCHES | {
    name: TRAIN[name]
    for name in ("world_without_a_rank", "world_without_an_address", "rank_not_a_number", "unknown_key")
}
TABLES = {
    "train": TRAIN,
    "preflight": PREFLIGHT,
    "config": {name: one("--config=TMP/file.yaml", m, files={"file.yaml": c}) for name, (c, m) in CONFIG_FILES.items()},
    "prepare_data": PREPARE,
    "sweep": SWEEP,
    "report": REPORT,
}
ROWS = [(table, name) for table, rows in TABLES.items() for name in rows]


def skip_where_it_is_no_mistake(name: str) -> None:
    if name == "gpu_without_a_gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    if name == "run_whose_checkpoints_are_read_only" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")


@pytest.fixture(scope="module")
def given(tiny_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Given:
    run_dir = tmp_path_factory.mktemp("given") / "run"
    overrides = ["experiment=tiny", *tiny_data, *RUN, "trainer.steps=2", "logger.progress=false", f"run_dir={run_dir}"]
    train(build_run(check_run(compose(overrides))))
    return Given(data=Path(tiny_data[1].removeprefix("data.dir=")), run=run_dir)


def arranged(table: str, name: str, given: Given, tmp_path: Path) -> tuple[str, list[str], Bad]:
    """Puts a row's files into the test's directory: (the script, its arguments, the row)."""
    bad = TABLES[table][name]
    write_files(tmp_path, bad.files)
    if bad.arrange:
        bad.arrange(tmp_path, given)
    before = {
        "train": ["experiment=tiny", f"data.dir={given.data}", "trainer.steps=1", "run_dir=TMP/run"],
        "prepare_data": [
            *("data=local", "data.dir=TMP/new/set", "data.files=[TMP/text.txt]", "data.workers=0"),
            "data.vocab_size=300",
        ],
    }.get("train" if table == "preflight" else table, [])
    if table == "prepare_data":
        (tmp_path / "text.txt").write_text("a text of a few words, too short for much of a vocabulary\n" * 9)
    script = "train" if table == "config" else table
    return script, [argument.replace("TMP", str(tmp_path)) for argument in (*before, *bad.arguments)], bad


def assert_refused(code: Any, stdout: str, stderr: str, message: str, tmp_path: Path) -> None:
    assert code == 2, stdout + stderr
    # A preparation says first what `auto` chose, which may be what is wrong.
    assert re.fullmatch(r"(data\.files: .*\(data\.(separator|format)=auto\).*\n)?", stdout), stdout
    assert stderr.startswith("error: "), stderr
    assert stderr.endswith("\n")
    assert stderr.count("\n") == 1, f"exactly one line, not {stderr}"
    assert re.search(message.replace("TMP", re.escape(str(tmp_path))), stderr), stderr


# In one process, through the scripts' main blocks: a process each would take most of an hour to import torch.
@pytest.mark.timeout(60)
@pytest.mark.parametrize(("table", "name"), ROWS)
def test_bad_input_ends_with_one_line_that_names_it_and_leaves_nothing(
    table: str, name: str, given: Given, tmp_path, monkeypatch, capsys
) -> None:
    skip_where_it_is_no_mistake(name)
    script, arguments, bad = arranged(table, name, given, tmp_path)
    monkeypatch.chdir(tmp_path)
    for key, value in bad.env.items():
        monkeypatch.setenv(key, value)
    before = snapshot(tmp_path, given.data, given.run)
    assert_refused(*call_here(script, arguments, monkeypatch, capsys), bad.message, tmp_path)
    assert snapshot(tmp_path, given.data, given.run) == before


@pytest.mark.parametrize(
    ("command", "locked"), [(command, path) for command, paths in LOCKED_UP.items() for path in paths]
)
def test_a_file_without_permission_is_named_in_one_line(
    command: str, locked: str, given: Given, tmp_path, monkeypatch, capsys
) -> None:
    # Unless the code at hand expected it, each of these was a traceback; an unreadable summary.json, a run not begun.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(given.data, "data")
    shutil.copytree(given.run, "run")
    write_files(tmp_path / "sweep", plan_json() | {"run/train.log": b"", "run/summary.json": b"{}"})
    (tmp_path / "sweep/run/metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "sweep/run/environment.json").write_text("{}")
    collected.write(Path("sweep"), Path("out"))
    before = snapshot(tmp_path)
    script, *arguments = command.replace("TMP", str(tmp_path)).split() + (RUN if command.startswith("train") else [])
    mode = (tmp_path / locked).stat().st_mode
    (tmp_path / locked).chmod(0)
    try:
        with as_any_user():
            code, stdout, stderr = call_here(script, arguments, monkeypatch, capsys)
    finally:
        (tmp_path / locked).chmod(mode)
    assert_refused(code, stdout, stderr, "Permission denied|not writable|not a writable directory", tmp_path)
    assert str(tmp_path / locked) in stderr
    assert snapshot(tmp_path) == before


def test_only_what_a_system_refuses_is_a_line_and_an_error_of_the_program_keeps_its_traceback(tmp_path) -> None:
    with pytest.raises(FileNotFoundError), exit_on_user_error():
        (tmp_path / "nowhere").read_text()


@pytest.fixture(scope="module")
def seconds() -> Iterator[list[float]]:
    """How long each real process took; the numbers are shown with -s, and judged by whoever reads them."""
    measured: list[float] = []
    yield measured
    usual, slow = (statistics.quantiles(measured, n=10)[i] if len(measured) > 1 else measured[0] for i in (4, 8))
    print(f"\n{len(measured)} refused: half in {usual:.1f} s, 9 of 10 in {slow:.1f} s, all in {max(measured):.1f} s")


# What a shell and a user see: one for each script, and those where a process differs from a call; the others are slow.
FEW = {
    ("train", "three_processes"),
    ("train", "target_os_system"),
    ("train", "local_rank_not_a_number"),
    ("preflight", "world_without_an_address"),
    ("prepare_data", "text_that_is_no_text"),
    ("sweep", "unknown_sweep"),
    ("report", "no_argument"),
}


@pytest.mark.parametrize(
    ("table", "name"), [pytest.param(*row, marks=() if row in FEW else pytest.mark.slow) for row in ROWS]
)
def test_bad_input_to_a_real_process_ends_with_exit_code_2_and_one_line(
    table: str, name: str, given: Given, tmp_path, seconds: list[float]
) -> None:
    skip_where_it_is_no_mistake(name)
    script, arguments, bad = arranged(table, name, given, tmp_path)
    before = snapshot(tmp_path, given.data, given.run)
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **bad.env},
    )
    seconds.append(time.perf_counter() - start)
    assert_refused(done.returncode, done.stdout, done.stderr, bad.message, tmp_path)
    assert snapshot(tmp_path, given.data, given.run) == before


def test_the_commands_that_bad_input_is_added_to_are_themselves_accepted_and_checking_writes_nothing(
    given: Given, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "experiment=tiny",
        f"data.dir={given.data}",
        "trainer.steps=1",
        f"run_dir={tmp_path}/run",
    ]
    code, stdout, stderr = call_here("train", [*arguments, "optimizer.warmup_steps=0", "--check"], monkeypatch, capsys)
    assert (code, stderr) == (0, "")
    assert yaml.safe_load(stdout.partition("\n\n")[0]) == compose([*arguments, "optimizer.warmup_steps=0"])
    assert snapshot(tmp_path) == {}


def test_a_run_that_ends_before_its_warm_up_is_warned_of_in_one_line(
    given: Given, tmp_path, monkeypatch, capsys
) -> None:
    arguments = ["experiment=tiny", f"data.dir={given.data}", f"run_dir={tmp_path}/run", "--check"]
    for steps, expected in ((39, r"warning: trainer\.steps=39 .*optimizer\.warmup_steps=40 .*\n"), (40, "")):
        code, _, stderr = call_here("train", [*arguments, f"trainer.steps={steps}"], monkeypatch, capsys)
        assert code == 0
        assert re.fullmatch(expected, stderr), stderr


def test_only_the_first_process_of_a_machine_reports_a_mistake(given: Given, tmp_path, monkeypatch, capsys) -> None:
    for key, value in {**LAUNCHED, "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    assert call_here("train", ["experiment=tinny"], monkeypatch, capsys) == (2, "", "")


def test_the_refused_plans_are_a_good_plan_with_one_thing_wrong(tmp_path, monkeypatch, capsys) -> None:
    write_files(tmp_path, plan_json())
    code, stdout, _ = call_here("sweep", ["status", f"dir={tmp_path}"], monkeypatch, capsys)
    assert code == 0
    assert "1 runs: 1 pending" in stdout
