"""What the README tells people to write and type is true of the code."""

import re
from pathlib import Path

import torch

from quack_lm.config import CONFIG_DIR, choices
from quack_lm.logit_paths import Factor, LogitPath
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
