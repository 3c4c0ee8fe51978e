"""How a sweep's runs are told apart in words: each is named by what it has and others have not."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from quack_lm.config import choice, flatten
from quack_lm.sweep.cell import Cell

# Settings that have a column, a panel or a style of their own; every other difference between runs goes into the label.
SHOWN_ELSEWHERE = (
    "run_dir",
    "seed",
    "attention._target_",
    "stabilizer._target_",
    "optimizer.lr",
    "trainer.probe_parts",
)


def labels(configs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(variation, condition) of each config, among the configs with the same choice in the section of a setting.

    A stabilizer's settings are named wherever they differ; others only where they are not what most configs have.
    """
    flat = [flatten(config) for config in configs]
    values: dict[tuple[str, Any], Counter[str]] = {}
    for config in flat:
        for key, value in config.items():
            values.setdefault((key, _kind(config, key)), Counter())[_text(value)] += 1
    found = []
    for config in flat:
        variation: dict[str, None] = {}
        condition: dict[str, None] = {}
        for key, value in config.items():
            section, _, name = key.rpartition(".")
            among = values[key, _kind(config, key)]
            if len(among) == 1 or key in SHOWN_ELSEWHERE or section == "logger":
                continue
            text = f"{section}={value.split('.')[-2]}" if name == "_target_" else f"{name}={_text(value)}"
            if section == "stabilizer":
                variation[text] = None
            elif _text(value) != among.most_common(1)[0][0]:
                condition[text] = None
        found.append((" ".join(variation), " ".join(condition)))
    return found


def _kind(config: dict[str, Any], key: str) -> Any:
    """The choice made in the section of a setting: with another one, the setting is another thing."""
    section, _, name = key.rpartition(".")
    return None if name == "_target_" else config.get(f"{section}._target_")


def title(config: dict[str, Any], variation: str, condition: str) -> str:
    """`mla quack tau=0.1 lr 0.3 seed 0`."""
    names = (choice(config["attention"]), choice(config["stabilizer"]), variation)
    rate = f"lr {config['optimizer']['lr']:g}"
    return " ".join(part for part in (*names, rate, condition, f"seed {config['seed']}") if part)


def titles(cells: Sequence[Cell]) -> dict[str, str]:
    """The title of each cell by its name."""
    configs = [cell.config for cell in cells]
    named = zip(cells, labels(configs), strict=True)
    return {cell.name: title(cell.config, *label) for cell, label in named}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
