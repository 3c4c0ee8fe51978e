"""The check for a person with a GPU: its commands can be given, what fails is on its page, and so are real results."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from calls import call

from quack_lm.cli.bench import read as read_bench
from quack_lm.cli.gpu_check import MORE, Outcome, Part, page, parts, run
from quack_lm.config import compose, instantiate

PARTS = parts(Path("DIR"), is_small=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_there_is_one_line_and_no_directory(tmp_path: Path) -> None:
    code, stdout, stderr = call("gpu-check", f"dir={tmp_path / 'check'}")
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert "torch sees no GPU" in stderr
    assert not (tmp_path / "check").exists()


def test_a_dry_run_prints_each_command_and_runs_none(tmp_path: Path) -> None:
    code, stdout, stderr = call("gpu-check", "--dry-run", f"dir={tmp_path / 'check'}")
    assert (code, stderr) == (0, "")
    assert len(stdout.splitlines()) == len([part for part in PARTS if part.name not in MORE])
    assert not (tmp_path / "check").exists()
    one = call("gpu-check", "--dry-run", "only=run", f"dir={tmp_path / 'check'}")[1]
    assert one in stdout
    assert "train" in one


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_every_command_of_ours_is_one_that_could_be_given(part: Part) -> None:
    verb, *arguments = part.command[3:]
    if verb == "bench":
        configs = read_bench(arguments).configs
        assert {config["model"]["d_model"] for config in configs.values()} == {2048}
        assert {config["trainer"]["precision"] for config in configs.values()} == {"bfloat16"}
        # Of the small experiments it is float32, in which Newton-Schulz takes as long as forward and backward at 1B.
        assert {config["optimizer"].get("ns_dtype", "bfloat16") for config in configs.values()} == {"bfloat16"}
    elif verb == "train":
        config = compose(arguments)
        instantiate(config["trainer"]).check_ranks(1)
        assert config["trainer"]["steps"] == 20
        assert (config["model"]["n_layers"], config["trainer"]["precision"]) == (14, "bfloat16")
    elif verb == "prepare":
        compose(["experiment=tiny", *arguments])
    else:
        assert part.command[1:3] == ("-m", "pytest")
        assert Path(part.command[3], "test_gpu.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["only=run,rnu"], "there is no part 'rnu'; the parts are: tests, data, run"),
        (["model=1b"], "model=1b: quack-lm gpu-check has the keys dir=, only= and minutes="),
        (["minutes=soon"], "minutes=soon must be a number above 0"),
        (["minutes=0"], "minutes=0 must be a number above 0"),
        (["small=yes"], "small=yes must be true or false"),
        (["--fast"], "--fast"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], words: str) -> None:
    code, stdout, stderr = call("gpu-check", *arguments)
    assert (code, stdout, stderr.count("\n")) == (2, "", 1)
    assert words in stderr


def test_a_part_that_fails_is_on_the_page_with_the_end_of_its_errors(tmp_path: Path) -> None:
    code = "import sys; print('begun ```'); sys.exit('the last words')"
    outcome = run(Part("bad", "A bad part", (sys.executable, "-c", code)), tmp_path)
    assert (outcome.code, outcome.stdout) == (1, "begun ```\n")
    part = Part("slow", "A slow part", ("sleep", "9999"))
    slow, cut, unbegun = Outcome(part, None, 300.1), run(part, tmp_path, limit_s=0.2), run(part, tmp_path, limit_s=-1)
    assert (slow.is_left_out, cut.is_left_out, unbegun.is_left_out) == (False, True, True)
    text = page({"GPU": "none"}, [outcome, slow, cut, unbegun])
    assert "## A slow part: cut off: no time left" in text
    assert "## A slow part: left out: no time left" in text
    assert "## A bad part: FAILED (exit code 1)" in text
    assert "\nthe last words\n````\n" in text
    assert "## A slow part: stopped: too slow" in text


def test_small_sizes_go_through_on_a_cpu(tmp_path: Path, tiny_data: list[str]) -> None:
    directory = tmp_path / "check"
    directory.mkdir()
    (directory / "data").symlink_to(tiny_data[1].removeprefix("data.dir="))
    code, stdout, stderr = call("gpu-check", "small=true", "only=run,trace", f"dir={directory}")
    logs = "".join(path.read_text() for path in directory.glob("*.err"))
    assert (code, stderr) == (0, ""), stdout + logs
    text = (directory / "page.md").read_text()
    assert text.count(": passed\n") == 2
    assert re.search(r"MFU of the run \| 0?\.?\d", text.replace("&#46;", ".")), text
    assert "sdpa" in text
    assert "aten::" in text
    events = json.loads(gzip.decompress((directory / "trace.json.gz").read_bytes()))["traceEvents"]
    assert sum(event["name"] == "aten::scaled_dot_product_attention" for event in events) == 3 * 2 * 2
    short = ("gpu-check", "small=true", "only=run,trace", f"dir={tmp_path / 'short'}", "minutes=0.001")
    code, stdout, stderr = call(*short)
    assert (code, stderr) == (1, ""), "nothing passed"
    assert stdout.endswith("no time was left for some: quack-lm gpu-check only=data,run,trace minutes=30 dir=ANOTHER\n")
    code, _, stderr = call("gpu-check", "small=true", "only=run,trace", f"dir={directory}")
    assert (code, stderr.count("\n")) == (2, 1)
    assert "earlier check" in stderr
