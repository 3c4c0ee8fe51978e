"""What the README tells people to write and type is true of the code."""

import re
from pathlib import Path
from statistics import fmean

import torch
from test_refusals import TABLES

from quack_lm.config import CONFIG_DIR, choices
from quack_lm.logit_paths import Factor, LogitPath
from quack_lm.report import collected
from quack_lm.report.comparison import best_settings, losses, over_rates
from quack_lm.stabilizers.base import Stabilizer

README = (CONFIG_DIR.parent / "README.md").read_text()


def test_the_stabilizer_shown_works_as_written() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, type] = {}
    exec(code, names)  # our own README
    halved = names["Halved"](rate=0.25)
    assert isinstance(halved, Stabilizer)
    scales = halved.step_scale((LogitPath("qk", (Factor("w_q", 3), Factor("w_k", 3))),), {})
    assert scales.keys() == {"w_q", "w_k"}
    assert all(torch.equal(scale, torch.full((1, 1), 0.25)) for scale in scales.values())


def test_every_choice_of_every_group_is_in_the_table() -> None:
    groups = [path.name for path in CONFIG_DIR.iterdir() if path.is_dir() and path.name != "sweep"]
    for group in groups:
        (row,) = re.findall(rf"^\| `{group}` \| (.*?) \|", README, flags=re.MULTILINE)
        assert sorted(re.findall(r"`(\w+)`", row)) == choices(group)


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:quack_lm|scripts|configs|tests)/[\w/.]+)`", README))
    assert named
    missing = [name for name in named if not Path(CONFIG_DIR.parent, name).exists() and "halved" not in name]
    assert not missing


def test_the_counts_of_refused_inputs_are_those_of_the_tests() -> None:
    shown = {
        key: int(count) for key, count in re.findall(r"^\| `([\w. -]+)`.* \| (\d+) \|$", README, flags=re.MULTILINE)
    }
    names = {"config": "train.py --config"} | {table: f"{table}.py" for table in TABLES if table != "config"}
    assert {names[table]: len(rows) for table, rows in TABLES.items()} == shown
    assert f"Each of the {sum(shown.values())} ends" in README


def test_the_losses_of_the_proxy_are_those_of_the_committed_runs() -> None:
    measured = collected.load(CONFIG_DIR.parent / "docs" / "results" / "fig2-proxy")
    columns = ("none", "qk_clip", "fixed", "quack", "qk_norm")
    checked = 0
    for place in measured.places():
        (row,) = re.findall(rf"^\| {place.attention.upper()}, {place.lr:g} \| (.*) \|$", README, flags=re.MULTILINE)
        for name, cell in zip(columns, row.split(" | "), strict=True):
            runs = best_settings(measured.at(place))[name]
            assert cell.startswith(f"{fmean(losses(runs).values()):.3f}"), (place, name)
            assert ("**U**" in cell) is not all(run.is_healthy for run in runs)
            if "tau" in cell:
                assert f"(tau {runs[0].cell.config['stabilizer']['tau']:g})" in cell
            checked += 1
    assert checked == 30
    for entry in over_rates(measured):
        (row,) = re.findall(rf"^\| LR sensitivity, {entry.attention.upper()} \| (.*) \|$", README, flags=re.MULTILINE)
        assert row.split(" | ")[columns.index(entry.stabilizer)] == f"{entry.sensitivity:.3f}"
