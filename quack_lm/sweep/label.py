"""Titles of a sweep's runs: each is named by the settings in which it differs from the others."""

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


def describe_differences(configs: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(stabilizer settings, other settings) by which each config differs from the others.

    Four configs with two values of tau and, in one of them, another width of MLA's values:

        [("tau=0.1", ""), ("tau=1", ""), ("tau=0.1", ""), ("tau=1", "v_dim=16")]

    A stabilizer's settings are named wherever they differ; others only where they are not what most configs have.
    Configs are compared with those that made the same choice in a section: tau of QuacK and of Fixed are two settings.
    """
    flat = [flatten(config) for config in configs]
    values: dict[tuple[str, Any], Counter[str]] = {}
    for config in flat:
        for key, value in config.items():
            values.setdefault((key, _section_choice(config, key)), Counter())[_text(value)] += 1
    differences = []
    for config in flat:
        stabilizer_settings: list[str] = []
        other_settings: list[str] = []
        for key, value in config.items():
            section, _, name = key.rpartition(".")
            among = values[key, _section_choice(config, key)]
            if len(among) == 1 or key in SHOWN_ELSEWHERE or section == "logger":
                continue
            text = f"{section}={value.split('.')[-2]}" if name == "_target_" else f"{name}={_text(value)}"
            if section == "stabilizer":
                stabilizer_settings.append(text)
            elif _text(value) != among.most_common(1)[0][0]:
                other_settings.append(text)
        differences.append((" ".join(dict.fromkeys(stabilizer_settings)), " ".join(dict.fromkeys(other_settings))))
    return differences


def _section_choice(config: dict[str, Any], key: str) -> Any:
    section, _, name = key.rpartition(".")
    return None if name == "_target_" else config.get(f"{section}._target_")


def title(config: dict[str, Any], stabilizer_settings: str, other_settings: str) -> str:
    """`mla quack tau=0.1 lr 0.3 seed 0`."""
    names = (choice(config["attention"]), choice(config["stabilizer"]), stabilizer_settings)
    rate = f"lr {config['optimizer']['lr']:g}"
    return " ".join(part for part in (*names, rate, other_settings, f"seed {config['seed']}") if part)


def titles(cells: Sequence[Cell]) -> dict[str, str]:
    """The title of each cell by its name."""
    configs = [cell.config for cell in cells]
    named = zip(cells, describe_differences(configs), strict=True)
    return {cell.name: title(cell.config, *label) for cell, label in named}


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
