"""Help texts and `docs/configuration.md`, made of the yaml files, type hints and docstrings."""

import re
from dataclasses import dataclass

from quack_lm.config.groups import (
    RENAMED,
    choices,
    groups,
    nearest,
    opening_comment,
    read_choice,
    suggest,
)
from quack_lm.config.schema import NOT_IDENTITY, SECTIONS, Key, as_yaml, describe, flatten
from quack_lm.errors import UserError


@dataclass(frozen=True)
class Row:
    """A key of a group with the choices that have it, and the values their yaml files give it."""

    key: Key
    owners: list[str]
    values: dict[str, str]

    @property
    def default(self) -> str:
        """The yaml's value where all choices agree, else each of them; without one, the constructor's."""
        own = {name: self.values.get(name, self.key.default) for name in self.owners}
        if len(set(own.values())) == 1:
            return next(iter(own.values())) or "required"
        return ", ".join(f"{name}: {value or 'required'}" for name, value in own.items())

    @property
    def type(self) -> str:
        return f"{self.key.type} {self.key.range}".strip()


def rows(group: str) -> list[Row]:
    """Every key of a group, merged over its choices."""
    found: dict[Key, Row] = {}
    for name in choices(group):
        section = read_choice(group, name)
        if not isinstance(section.get("_target_"), str):
            raise UserError(f"{group}={name}: its yaml file has no _target_")
        for key in describe(section["_target_"]):
            row = found.setdefault(key, Row(key, [], {}))
            row.owners.append(name)
            if key.name in section:
                row.values[name] = as_yaml(section[key.name])
    return list(found.values())


def help_text(topic: str) -> str:
    """Help on a group, a key, a choice, or in the form of `docs/configuration.md`; UserError for anything else."""
    topic = topic.removesuffix("=")
    group, _, name = topic.partition("=")
    if topic == "markdown":
        return reference_markdown()
    if topic in groups():
        return _group_text(topic)
    if name in (choices(group) if group in groups() else []):
        return f"{topic}\n{opening_comment(group, name)}\n\n" + "\n".join(
            f"    {key}: {as_yaml(value)}" for key, value in flatten(read_choice(group, name)).items()
        )
    key = topic if topic in ("seed", "run_dir") else RENAMED.get(topic, topic)
    section, _, last = key.rpartition(".")
    known = _run_rows() if not section else rows(section) if section in SECTIONS else []
    entries = [
        _entry(row, f"{section}." if section else "", choices(section) if section else [])
        for row in known
        if row.key.name == last
    ]
    if entries:
        return "\n".join(entries)
    found = suggest(topic)
    raise UserError(f"--help {topic}: " + (f"did you mean --help {found}?" if found else nearest(topic, groups())))


def reference_markdown() -> str:
    """The text of docs/configuration.md."""
    free = ", ".join(f"`{name}{'.*' * (name in SECTIONS)}`" for name in NOT_IDENTITY)
    parts = [INTRODUCTION.replace("{free}", free), "## The run itself\n", _table(_run_rows(), "", [])]
    for group in groups():
        parts += [f"## {group}\n", _choices_markdown(group)]
        if group in SECTIONS:
            parts.append(_table(rows(group), f"{group}.", choices(group)))
    return "\n".join(parts)


INTRODUCTION = """\
# Configuration

This page is generated from the code: `quack-lm train --help=markdown > docs/configuration.md`.

A run is described by one config, composed from the yaml files of `configs/` and the command line:

- **A group takes one of its choices**: `attention=mla` reads `configs/attention/mla.yaml`. `configs/train.yaml` lists
  the defaults, and an experiment such as `experiment=tiny` chooses several groups and values at once.
- **Every key inside a group can be set individually**: `optimizer.lr=3e-3`. Keys on the command line win over yaml
  files, and yaml files over the defaults of the classes that they name as `_target_`.
- **The grammar is Hydra's**: `null`, `true`, `3e-3`, `[a,b]`, and quotes around a value with special characters,
  `run_dir='"a=b"'`. A value `${model.n_heads}` refers to another key.
- **Several values make several runs**: `quack-lm train -m attention=mha,mla 'seed=range(0,5)'`.
- `--cfg job` prints the resolved config, `--info defaults` the chosen groups, `--check` checks a run without training,
  `--help optimizer` and `--help optimizer.lr` explain keys, and `--config FILE` runs the `config.yaml` of an earlier
  run again.

An unknown key is an error. The fingerprint of a run is the hash of all keys but these, which do not change what it
computes: {free}.
"""


def _run_rows() -> list[Row]:
    return [Row(key, [], {"": key.default}) for key in describe("")]


def _group_text(group: str) -> str:
    width = max(map(len, choices(group)))
    lines = [f"{group}={name:{width}}  {opening_comment(group, name)}".rstrip() for name in choices(group)]
    if group in SECTIONS:
        lines += ["", *(_entry(row, f"{group}.", choices(group)) for row in rows(group))]
    return "\n".join(lines)


def _entry(row: Row, prefix: str, everyone: list[str]) -> str:
    only = "" if row.owners == everyone else f" (of {', '.join(row.owners)})"
    differs = row.key.default and set(row.values.values()) - {row.key.default}
    own = f"; {row.key.default} where no yaml sets it" if differs else ""
    return f"{prefix}{row.key.name}: {row.type}, default {_default(row)}{own}{only}\n    {row.key.meaning}"


def _default(row: Row) -> str:
    return row.default if row.owners else row.key.default or "required"


def _table(table: list[Row], prefix: str, everyone: list[str]) -> str:
    if not table:
        return ""
    lines = ["| key | type | default | range | meaning |", "|---|---|---|---|---|"]
    for row in table:
        only = "" if row.owners == everyone else f" Only of {', '.join(f'`{name}`' for name in row.owners)}."
        cells = (f"`{prefix}{row.key.name}`", row.key.type, _default(row), row.key.range, row.key.meaning + only)
        lines.append("| " + " | ".join(re.sub(r"<(?=\w)", "&lt;", cell).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _choices_markdown(group: str) -> str:
    lines = []
    for name in choices(group):
        values = {k: v for k, v in flatten(read_choice(group, name)).items() if not k.endswith("_target_")}
        text = ", ".join(f"`{key}: {as_yaml(value)}`" for key, value in values.items())
        lines.append(f"- `{group}={name}`: {opening_comment(group, name)}" + (f" {text}" if text else ""))
    return "\n".join(lines) + "\n"
