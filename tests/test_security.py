"""The proof of SECURITY.md: an untrusted file is read or refused, and can do nothing else.

A section for each kind of file that somebody else may have made, then shells and secrets. That a data set reads no file
outside of its directory, and that pipes, devices and damaged files are refused, is in test_refusals.py; what becomes of
text from such files in test_text.py.
"""

import ast
import contextlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from calls import SCRIPTS, call_here, snapshot, write_files

from quack_lm.config import CONFIG_DIR, compose
from quack_lm.errors import UserError
from quack_lm.text import shell_line
from quack_lm.training.build import build_run
from quack_lm.training.check import check_run
from quack_lm.training.loop import train

ROOT = CONFIG_DIR.parent
SOURCES = sorted([*(ROOT / "quack_lm").rglob("*.py"), *(ROOT / "scripts").glob("*.py")])
SMALL = ["model.n_layers=1", "trainer.val_sequences=2", "trainer.probe_sequences=2", "trainer.device=cpu"]
SMALL += ["optimizer.warmup_steps=0", "logger.progress=false"]
# Names that a person or a program could choose for runs, groups, directories and settings.
HOSTILE = [
    "two words",
    "it's",
    'say "x"',
    "$(touch pwned)",
    "`touch pwned`",
    "a; touch pwned",
    "a\ntouch pwned\n",
    "a\rb\tc",
    "&& touch pwned #",
    "--help",
    "~/*",
    "\\'; touch pwned; '",
    "größer 🦆",
    "$x$ and $\\frac{$",
    "<script>touch('pwned')</script>",
    "![](http://pond.example/seen)",
]


class Pwned:
    """Unpickling it leaves a file: the proof that code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_the_proof_that_code_ran_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Pwned(tmp_path / "pwned")))
    assert (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------------------ configs and sweeps


@pytest.mark.parametrize("tag", ["python/object/apply:os.mkdir", "python/object/new:os.mkdir"])
@pytest.mark.parametrize("place", ["config", "sweep", "run_dir"])
def test_tags_in_yaml_never_run(tag: str, place: str, tiny_data: list[str], tmp_path, monkeypatch, capsys) -> None:
    text = f"# Why?\nseed: !!{tag} ['{tmp_path}/pwned']\n"
    write_files(tmp_path, {"file.yaml": text.encode(), "run/config.yaml": text.encode()})
    script, arguments = {
        "config": ("train", [f"--config={tmp_path}/file.yaml"]),
        "sweep": ("sweep", ["plan", f"sweep={tmp_path}/file.yaml", f"dir={tmp_path}/runs"]),
        "run_dir": ("train", ["experiment=tiny", *tiny_data, f"run_dir={tmp_path}/run"]),
    }[place]
    assert call_here(script, arguments, monkeypatch, capsys)[0] == 2
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def run(tiny_data: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run of two steps and its overrides."""
    run_dir = tmp_path_factory.mktemp("given") / "run"
    overrides = ["experiment=tiny", *tiny_data, *SMALL]
    train(build_run(check_run(compose([*overrides, "trainer.steps=2", f"run_dir={run_dir}"]))))
    return run_dir, overrides


def test_pickles_laid_into_a_checkpoint_are_never_read(run: tuple[Path, list[str]], tmp_path: Path) -> None:
    given, overrides = run
    shutil.copytree(given, tmp_path / "run")
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    # The names that torch's own formats have, among them those of the format that ours derives from.
    for name in (".metadata", "model.pt", "pytorch_model.bin", "__0_0.distcp", "state.pkl"):
        (checkpoint / name).write_bytes(pickle.dumps(Pwned(tmp_path / "pwned")))
    config = compose([*overrides, "trainer.steps=3", f"run_dir={tmp_path}/run"])
    with contextlib.suppress(UserError):  # a checkpoint with more files than it should have may be refused
        assert train(build_run(check_run(config))).name == "completed"
    assert not (tmp_path / "pwned").exists()


# ------------------------------------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("place", ["data.tokenizer", "an interrupted preparation"])
def test_code_in_a_tokenizers_directory_never_runs(
    place: str, tiny_data: list[str], tmp_path, monkeypatch, capsys
) -> None:
    evil = tmp_path / ("tokenizer" if place == "data.tokenizer" else "set.partial/tokenizer")
    shutil.copytree(Path(tiny_data[1].removeprefix("data.dir=")) / "tokenizer", evil)
    settings = json.loads((evil / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (evil / "tokenizer_config.json").write_text(json.dumps(settings))
    code = (
        f"import os\nos.mkdir({str(tmp_path / 'pwned')!r})\nfrom transformers import PreTrainedTokenizerFast as Mine\n"
    )
    write_files(evil, {"mine.py": code.encode(), "tokenization_mine.py": code.encode()})
    write_files(tmp_path, {"text.txt": b"some words\n" * 99})
    arguments = ["data=local", f"data.dir={tmp_path}/set", f"data.files=[{tmp_path}/text.txt]", "data.workers=0"]
    arguments += ["data.vocab_size=512", *([f"data.tokenizer={evil}"] if place == "data.tokenizer" else [])]
    monkeypatch.chdir(tmp_path)
    # transformers would ask a person.
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    call_here("prepare_data", arguments, monkeypatch, capsys)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tokenizers_and_data_sets_are_loaded_without_their_code(path: Path) -> None:
    for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
        trusts = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "trust_remote_code"]
        is_loader = isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
        assert trusts == (["False"] if is_loader else [])


# ------------------------------------------------------------------------------------------------ data sets and results


def parquet_with_pickles(path: Path, proof: Path, columns: dict[str, list[Any]]) -> None:
    """Columns of the extension type that old versions of pyarrow unpickled (CVE-2023-47248)."""
    payload = pickle.dumps(Pwned(proof))
    about = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    arrays = [pa.array(values) for values in columns.values()]
    fields = [pa.field(name, a.type, metadata=about) for name, a in zip(columns, arrays, strict=True)]
    pq.write_table(pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata={b"huggingface": payload})), path)


def test_pickles_in_parquet_never_run(tmp_path: Path, monkeypatch, capsys) -> None:
    proof = tmp_path / "pwned"
    parquet_with_pickles(tmp_path / "results.parquet", proof, {"run": ["a"], "status": ["completed"]})
    parquet_with_pickles(tmp_path / "text.parquet", proof, {"text": ["some words"] * 9})
    assert call_here("report", [str(tmp_path)], monkeypatch, capsys)[0] == 2
    arguments = [f"data.dir={tmp_path}/set", f"data.files=[{tmp_path}/text.parquet]", "data.format=parquet"]
    call_here("prepare_data", ["data=local", "data.workers=0", *arguments], monkeypatch, capsys)
    assert not proof.exists()


# ------------------------------------------------------------------------------------------------ shells

PROCESS_CALLS = (
    "subprocess.run",
    "subprocess.Popen",
    "subprocess.call",
    "subprocess.check_call",
    "subprocess.check_output",
)
SHELL_CALLS = (
    "os.popen",
    "os.system",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "asyncio.create_subprocess_shell",
)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_process_is_started_from_a_list_and_without_a_shell(path: Path) -> None:
    tree = ast.parse(path.read_text())
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        assert not any(keyword.arg == "shell" for keyword in call.keywords)
        name = ast.unparse(call.func)
        assert name not in SHELL_CALLS
        if name in PROCESS_CALLS:
            assert isinstance(call.args[0], ast.List | ast.Name), "a list, or a variable that has one"


def printed_by_bash(lines: list[str], directory: Path) -> list[list[str]]:
    """The arguments that a real shell gives to `python` for each line."""
    script = "python() { printf '%s\\0' \"$@\"; printf '\\1\\0'; }\n" + "\n".join(lines)
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, check=True, cwd=directory, env=os.environ | {"LC_ALL": "C.UTF-8"}
    )
    assert done.stderr == b""
    calls: list[list[str]] = [[]]
    for text in done.stdout.decode().split("\0")[:-1]:
        if text == "\1":
            calls.append([])
        else:
            calls[-1].append(text)
    return calls[:-1]


def test_a_line_to_paste_gives_a_shell_the_same_arguments(tmp_path: Path) -> None:
    lines = [shell_line(["python", text, "x" + text]) for text in HOSTILE]
    assert all(len(line.splitlines()) == 1 for line in lines)
    assert printed_by_bash(lines, tmp_path) == [[text, "x" + text] for text in HOSTILE]
    assert snapshot(tmp_path) == {}


@pytest.fixture
def hostile_sweep(tmp_path: Path) -> Path:
    """A sweep whose file, directory, labels and settings all have hostile names."""
    from quack_lm.sweep.file import override_value

    axis = {text: [f"data.dir={override_value(text)}"] for text in HOSTILE}
    grid = json.dumps({"where": axis}, ensure_ascii=False)
    text = f"# {HOSTILE[-2]} {HOSTILE[-1]}\nbase: [experiment=tiny]\ngrid: {grid}\n"
    path = tmp_path / "$(touch pwned) `touch pwned` <script>'.yaml"
    path.write_text(text)
    return path


def test_hostile_names_reach_every_run_as_they_are_and_no_shell(
    hostile_sweep: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "plan",
        f"sweep={hostile_sweep}",
        f"dir={tmp_path}/a b'\n$(touch pwned)",
        "logger.name='$(touch pwned)'",
    ]
    code, stdout, stderr = call_here("sweep", arguments, monkeypatch, capsys)
    assert (code, stderr) == (0, "")
    lines = [line.partition("quack-lm ")[2] for line in stdout.splitlines() if "quack-lm train" in line]
    calls = printed_by_bash(["python " + line for line in lines], tmp_path)
    assert [compose(overrides)["data"]["dir"] for _, *overrides in calls] == HOSTILE
    assert {compose(overrides)["logger"]["group"] for _, *overrides in calls} == {hostile_sweep.stem}
    assert {str(Path(compose(overrides)["run_dir"]).parent) for _, *overrides in calls} == {arguments[2][4:]}
    assert not list(tmp_path.rglob("pwned"))


# ------------------------------------------------------------------------------------------------ secrets


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


SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_" + "Quackquackquackquackquackquackquack",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI/K7MDENG/quackEXAMPLEKEY",
    "HTTPS_PROXY": "http://duck:proxyhunter2@127.0.0.1:9",
}
PASSWORDS = ("remotehunter3", "proxyhunter2")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git repository whose remote has a token in its URL, as the trainer's working directory."""
    directory = tmp_path / "checkout"
    directory.mkdir()
    for arguments in (
        ["init", "-q"],
        ["remote", "add", "origin", "https://ghp_remotehunter3:x-oauth-basic@pond.example/duck.git"],
    ):
        subprocess.run(["git", *arguments], cwd=directory, check=True)
    return directory


def files_of(directory: Path) -> Iterator[tuple[Path, bytes]]:
    for path in directory.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def test_no_secret_is_in_anything_that_a_run_writes_or_its_report_says(
    tiny_data: list[str], checkout: Path, tmp_path: Path
) -> None:
    """A real run, mirrored to W&B offline, whose records are not compressed: bytes can be looked for."""
    runs = tmp_path / "runs"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")} | SECRETS
    environment |= {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    write_files(tmp_path, {"mine.yaml": b"# Why?\nbase: [experiment=tiny]\ngrid: {stabilizer: [quack]}\n"})

    def call(script: str, *arguments: str) -> str:
        command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments]
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    overrides = [*tiny_data, *SMALL, "trainer.steps=2", "logger.wandb=offline", "logger.group=pond-group"]
    said = call("sweep", f"sweep={tmp_path}/mine.yaml", f"dir={runs}", "jobs=1", *overrides)
    said += call("report", str(runs))
    written = dict(files_of(tmp_path))
    mirrored = b"".join(content for path, content in written.items() if path.suffix == ".wandb")
    assert b"pond-group" in mirrored, "what is mirrored can be found by its bytes"
    assert sum(path.name == "environment.json" for path in written) == 1
    del written[checkout / ".git/config"]
    for secret in (*SECRETS.values(), *PASSWORDS):
        assert secret not in said
        assert [path for path, content in written.items() if secret.encode() in content] == []
