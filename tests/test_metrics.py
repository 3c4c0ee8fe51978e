"""What a run writes: metrics.jsonl line by line, files that are complete or absent, and a W&B mirror that may fail."""

import json
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from hypothesis import given
from hypothesis import strategies as st
from wandb.proto import wandb_internal_pb2 as wandb_pb

from quack_lm.config import compose
from quack_lm.files import open_regular, read_json, write_atomically, write_json
from quack_lm.parallel import World
from quack_lm.training.accelerators import Accelerator, find_accelerator
from quack_lm.training.build import make_model
from quack_lm.training.counts import format_count
from quack_lm.training.flops import flops_per_token, peak_flops
from quack_lm.training.metrics import LoggerSettings, RunLog
from quack_lm.training.sinks import WandbSink

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, CPU)
QUIET = LoggerSettings(progress=False)


def make_log(directory: Path, *, world: World = ALONE, settings: LoggerSettings = QUIET) -> RunLog:
    return RunLog(directory / "metrics.jsonl", settings, world, batch_tokens=10, total_steps=100)


def read(directory: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, refusing the NaN and Infinity that Python writes and JSON does not have."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (directory / "metrics.jsonl").read_text()
    assert text == "" or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


# ------------------------------------------------------------------------------------------------ metrics.jsonl


def test_values_of_a_step_share_a_line_whoever_adds_them(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.add(0, {"val/loss": 6.5})
    log.add_loss(1, torch.tensor(6.25))
    log.add(1, {"optim/lr": 0.5, "optim/grad_norm": torch.tensor(2.0)})
    log.add(1, {"logits/max_per_head": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert log.flush() == [6.25]
    assert read(tmp_path) == [
        {"step": 0, "tokens": 0, "val/loss": 6.5},
        {
            "step": 1,
            "tokens": 10,
            "optim/lr": 0.5,
            "optim/grad_norm": 2.0,
            "logits/max_per_head": [[1.0, 2.0], [3.0, 4.0]],
            "train/loss": 6.25,
        },
    ]


def test_nothing_is_written_before_a_flush_and_nothing_twice(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.add_loss(1, torch.tensor(1.0))
    assert not (tmp_path / "metrics.jsonl").exists()
    assert log.pending_steps == 1
    log.flush()
    assert log.pending_steps == 0
    assert log.flush() == []
    assert [line["step"] for line in read(tmp_path)] == [1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_become_null_at_any_depth(bad: float, tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.add_loss(1, torch.tensor(bad))
    log.add(1, {"plain": bad, "tensor": torch.tensor(bad), "table": torch.tensor([[1.0, bad], [bad, 2.0]])})
    (loss,) = log.flush()
    assert not math.isfinite(loss), "who decides on divergence sees the number itself"
    (line,) = read(tmp_path)
    assert line["train/loss"] is line["plain"] is line["tensor"] is None
    assert line["table"] == [[1.0, None], [None, 2.0]]


@given(
    values=st.lists(st.tuples(st.integers(1, 3), st.floats(width=32), st.booleans()), max_size=20),
)
def test_every_step_has_one_line_in_order_with_its_tokens_whenever_the_log_is_flushed(
    values: list[tuple[int, float, bool]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.mktemp("log")
    log = make_log(directory)
    step, expected, losses = 0, [], []
    for gap, value, is_flushed in values:
        step += gap
        log.add(step, {"late": value})
        log.add_loss(step, torch.tensor(value))
        expected.append((step, 10 * step, value if math.isfinite(value) else None))
        if is_flushed:
            losses += log.flush()
    losses += log.flush()
    seen = read(directory)
    assert [(line["step"], line["tokens"], line["late"]) for line in seen] == expected
    assert [line["train/loss"] for line in seen] == [value for *_, value in expected]
    assert str(losses) == str([value for _, value, _ in values])


def test_only_the_main_process_writes_and_all_get_the_losses(tmp_path: Path) -> None:
    log = make_log(tmp_path, world=World(1, 2, 1, CPU))
    log.add_loss(1, torch.tensor(3.0))
    log.start_progress(0, "nobody sees this")
    assert log.flush() == [3.0]
    log.rewind(-1)
    log.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "cut",
    [
        *("", "{", '{"step": 4, "tok', '{"step": 4, "tokens": 40', '{"tokens": 40}', "4", "\0\0\0"),
        *("[" * 99_999, '{"step": ' + "9" * 5000 + "}"),
    ],
    ids=lambda text: text[:30],
)
def test_rewinding_drops_later_steps_and_what_a_crash_cut_short(cut: str, tmp_path: Path) -> None:
    log = make_log(tmp_path)
    for step in (0, 1, 2, 3):
        log.add(step, {"x": float(step)})
    log.flush()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    log.rewind(2)
    assert [line["step"] for line in read(tmp_path)] == [0, 1, 2]
    log.add(3, {"x": 33.0})
    log.flush()
    assert [(line["step"], line["x"]) for line in read(tmp_path)] == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 33.0)]


def test_rewinding_to_before_the_start_drops_everything_and_needs_no_file(tmp_path: Path) -> None:
    log = make_log(tmp_path)
    log.rewind(-1)
    log.add(0, {"x": 1.0})
    log.flush()
    log.rewind(-1)
    assert read(tmp_path) == []


def test_the_progress_line_shows_the_loss_the_speed_and_the_step(tmp_path: Path, capfd) -> None:
    log = make_log(tmp_path, settings=LoggerSettings(progress=True))
    log.start_progress(20, "mla/quack")
    log.add_loss(50, torch.tensor(4.25))
    log.add(50, {"throughput/tokens_per_s": 412_345.0, "val/loss": 4.5})
    log.flush()
    log.close()
    last = capfd.readouterr().err.split("\r")[-1]
    for text in ("mla/quack", "50/100", "loss=4.2500", "val=4.5000", "tok/s=412k"):
        assert text in last


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (7.25, "7.25"),
        (999, "999"),
        (1000, "1k"),
        (412_345, "412k"),
        (999_950, "1M"),
        (1_040_246_784, "1.04B"),
        (2.5e6, "2.5M"),
    ],
)
def test_counts_are_shown_with_three_digits(value: float, text: str) -> None:
    assert format_count(value) == text


# ------------------------------------------------------------------------------------------------ files


def test_writing_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for text in ("first, and longer than the second", "second"):
        write_atomically(path, text)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", Accelerator(989, 80, 7)),
        ("NVIDIA GeForce RTX 4090", Accelerator(165.2, 24)),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", Accelerator(989 * 3 / 7, 40)),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb+me", Accelerator(312 / 7, 10)),
        ("NVIDIA A30 MIG 2g.12gb", Accelerator(165 / 2, 12)),
        ("NVIDIA B300 SXM6 AC MIG 7g.269gb", Accelerator(2250, 269)),
        # A part of an instance, whose share the name does not say.
        ("NVIDIA H100 80GB HBM3 MIG 1c.3g.40gb", None),
        ("NVIDIA H800 MIG 3g.40gb", None),
        ("NVIDIA GeForce RTX 4090 MIG 3g.40gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 0g.10gb", None),
        ("NVIDIA H100 80GB HBM3 MIG 3g.160gb", None),
        ("NVIDIA H800", None),
        ("NVIDIA H100", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("H100", None),
    ],
)
def test_an_accelerator_is_that_of_the_full_name_or_unknown(name: str, expected: Accelerator | None) -> None:
    assert find_accelerator(name) == expected


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")  # half of a surrogate pair has no encoding
    assert path.read_text() == "old"


def test_a_reader_never_sees_a_file_half_written(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    texts = ["a" * 300_000, "b" * 200_000]
    write_atomically(path, texts[0])

    def write() -> None:
        for number in range(40):
            write_atomically(path, texts[number % 2])

    writer = threading.Thread(target=write)
    writer.start()
    seen = {path.read_text()}
    while writer.is_alive():
        seen.add(path.read_text())
    writer.join()
    assert seen <= set(texts)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def socket_file(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


# To open one of them, or to read it, would take for ever.
@pytest.mark.timeout(10)
@pytest.mark.parametrize("make", [pipe, endless, socket_file])
def test_what_is_no_ordinary_file_is_refused_or_as_good_as_absent(make: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "file"
    make(path)
    for mode in ("r", "rb", "a", "w"):
        with pytest.raises(OSError, match="file is not a regular file") as caught:
            open_regular(path, mode)
        assert str(path) in caught.value.strerror
    assert read_json(path) == {}
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match=r"metrics\.jsonl is not a regular file"):
        make_log(tmp_path).rewind(3)
    write_atomically(path, '{"a": 1}')
    assert read_json(path) == {"a": 1}


def test_files_are_opened_as_ever(tmp_path: Path) -> None:
    path = tmp_path / "größer.txt"
    with pytest.raises(FileNotFoundError):
        open_regular(path)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    for text in ("≤ ", "🦆\n"):
        with open_regular(path, "a") as file:
            file.write(text)
    (tmp_path / "link").symlink_to(path)
    with open_regular(tmp_path / "link") as file:
        assert file.read() == "≤ 🦆\n"


def test_json_files_have_null_for_what_is_not_finite(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": math.nan, "b": {"c": [1.5, math.inf]}, "d": None, "e": "NaN", "f": True})
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text) == {"a": None, "b": {"c": [1.5, None]}, "d": None, "e": "NaN", "f": True}
    assert "Infinity" not in text


# ------------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_flops_per_token_are_six_per_weight_and_the_attention_products(attention: str) -> None:
    overrides = [
        "experiment=tiny",
        "model.d_model=24",
        "model.n_heads=3",
        "data.dir=none",  # whatever a checkout holds
        "data.vocab_size=50",
        f"attention={attention}",
    ]
    model = make_model(compose(overrides))
    weights = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2 and not n.startswith("embedding"))
    key_width, value_width = {"mha": (8, 8), "mla": (16, 16)}[attention]
    # Each of four layers and three heads multiplies with every key and every value, forward and (twice) backward.
    products = 3 * 4 * 3 * 2 * 20 * (key_width + value_width)
    assert flops_per_token(model, 20) == 6 * weights + products


def test_a_cpus_peak_is_measured() -> None:
    assert 1e8 < peak_flops(CPU, "float32") < 1e14


# ------------------------------------------------------------------------------------------------ weights and biases


@pytest.fixture
def wandb_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings or credentials of this machine, and nothing that answers."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def wandb_records(directory: Path) -> Iterator[Any]:
    """The records of a finished offline run: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    # Its service writes the last of them when it ends, as it does with a process that trains.
    wandb.teardown()
    (path,) = directory.glob("wandb/offline-run-*/*.wandb")
    data, offset, parts = path.read_bytes(), 7, b""
    while offset < len(data):
        room = 32768 - offset % 32768
        if room < 7:
            offset += room
            continue
        length, kind = int.from_bytes(data[offset + 4 : offset + 6], "little"), data[offset + 6]
        parts += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_pb.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def items_of(message: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in message}


@pytest.mark.usefixtures("wandb_alone")
def test_an_offline_wandb_run_holds_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    settings = LoggerSettings(
        wandb="offline",
        project="ducks",
        group="pond",
        name="mallard",
        tags=["wet", "loud"],
        per_head=True,
        progress=False,
    )
    log = make_log(tmp_path, settings=settings)
    config = {"seed": 3, "optimizer": {"lr": 0.25}}
    log.sinks = [WandbSink(tmp_path, settings, config, None)]
    (sink,) = log.sinks
    assert sink.id
    for step in range(1, 301):  # more than one block of the file
        log.add_loss(step, torch.tensor(6.0 / step))
        log.add(step, {"optim/lr": 0.5, "throughput/tokens_per_s": 100.0 * step})
        if step % 50 == 0:
            log.add(step, {"logits/max_per_head": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, step]])})
            log.add(step, {"norms/w_q_per_block": torch.tensor([[0.5], [0.25]])})
            log.flush()
    log.close()

    records = list(wandb_records(tmp_path))
    runs = [record.run for record in records if record.HasField("run")]
    assert (runs[0].project, runs[0].run_group, runs[0].display_name) == ("ducks", "pond", "mallard")
    assert list(runs[0].tags) == ["wet", "loud"]
    assert runs[0].run_id == sink.id
    seen_config = items_of(runs[0].config.update)
    assert {key: seen_config[key] for key in config} == config
    rows = [items_of(record.history.item) for record in records if record.HasField("history")]
    lines = read(tmp_path)
    assert len(rows) == len(lines) == 300
    for row, line in zip(rows, lines, strict=True):
        assert row["_step"] == line["step"]
        scalars = {key: value for key, value in line.items() if not isinstance(value, list)}
        tables = {}
        if line["step"] % 50 == 0:
            maxima, norms = line["logits/max_per_head"], line["norms/w_q_per_block"]
            tables = {f"logits/max/layer{i}/head{j}": maxima[i][j] for i in range(2) for j in range(3)}
            tables |= {f"norms/w_q/layer{i}/head0": norms[i][0] for i in range(2)}
        assert {key: value for key, value in row.items() if not key.startswith("_")} == scalars | tables


@pytest.mark.usefixtures("wandb_alone")
def test_without_per_head_wandb_gets_no_tables(tmp_path: Path) -> None:
    settings = LoggerSettings(wandb="offline", progress=False)
    log = make_log(tmp_path, settings=settings)
    log.sinks = [WandbSink(tmp_path, settings, {}, None)]
    log.add(1, {"x": 1.0, "logits/max_per_head": torch.ones(2, 2)})
    log.flush()
    log.close()
    records = list(wandb_records(tmp_path))
    (row,) = (items_of(record.history.item) for record in records if record.HasField("history"))
    assert {key for key in row if not key.startswith("_")} == {"step", "tokens", "x"}
    (run,) = (record.run for record in records if record.HasField("run"))
    assert run.display_name == tmp_path.name, "a run is called like its directory"


@pytest.mark.usefixtures("wandb_alone")
@pytest.mark.parametrize("run_id", [None, "resumed1"])
def test_when_wandb_cannot_start_it_says_so_once_and_the_log_goes_on(
    run_id: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "no key is this short")
    settings = LoggerSettings(wandb="online", progress=False)
    log = make_log(tmp_path, settings=settings)
    log.sinks = [WandbSink(tmp_path, settings, {}, run_id)]
    for step in (1, 2):
        log.add_loss(step, torch.tensor(2.0))
        assert log.flush() == [2.0]
    log.close()
    assert [line["step"] for line in read(tmp_path)] == [1, 2]
    assert log.sinks[0].id == run_id
    assert capsys.readouterr().out.count("W&B failed") == 1


# A process of its own, since nothing of W&B works in it afterwards. It kills only its own children.
LOG_WITH_A_DYING_SERVICE = """
import os, signal, sys
from pathlib import Path
import torch
from quack_lm.training.metrics import LoggerSettings, RunLog
from quack_lm.training.sinks import WandbSink
from quack_lm.parallel import World

directory = Path(sys.argv[1])
settings = LoggerSettings(wandb="offline", progress=False)
world = World(0, 1, 0, torch.device("cpu"))
log = RunLog(directory / "metrics.jsonl", settings, world, batch_tokens=10, total_steps=50)
log.sinks = [WandbSink(directory, settings, {}, None)]
for step in range(1, 51):
    log.add_loss(step, torch.tensor(1.0))
    log.flush()
    if step == 5:
        children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        assert children, "the service of W&B runs"
        for child in children:
            os.kill(int(child), signal.SIGKILL)
            os.waitpid(int(child), 0)
log.close()
print("the run ends")
"""


@pytest.mark.usefixtures("wandb_alone")
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_when_wandbs_service_dies_the_log_goes_on_to_the_end(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOG_WITH_A_DYING_SERVICE, str(tmp_path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read(tmp_path)] == list(range(1, 51))
    assert done.stdout.count("W&B failed") == 1
    assert done.stdout.endswith("the run ends\n")


LOG_WITHOUT_A_SERVER = """
import sys
from pathlib import Path
import torch
from quack_lm.training.metrics import LoggerSettings, RunLog
from quack_lm.training.sinks import WandbSink
from quack_lm.parallel import World

directory = Path(sys.argv[1])
settings = LoggerSettings(wandb="online", progress=False)
log = RunLog(directory / "metrics.jsonl", settings, World(0, 1, 0, torch.device("cpu")), batch_tokens=10, total_steps=3)
log.sinks = [WandbSink(directory, settings, {}, None)]
for step in (1, 2, 3):
    log.add_loss(step, torch.tensor(1.0))
    log.flush()
log.close()
print("the run ends")
"""


@pytest.mark.slow
@pytest.mark.usefixtures("wandb_alone")
def test_without_a_server_to_reach_the_log_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", 40 * "0")
    done = subprocess.run(
        [sys.executable, "-c", LOG_WITHOUT_A_SERVER, str(tmp_path)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in read(tmp_path)] == [1, 2, 3]
    assert done.stdout.count("W&B failed") == 1
    assert "the run ends\n" in done.stdout  # then W&B says where its own logs are
