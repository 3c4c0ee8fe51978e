"""From the yaml files of `configs/` and command-line overrides to one checked dictionary; the only user of Hydra."""

import copy
import functools
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from quack_lm.config.groups import CONFIG_DIR, choices, groups, nearest
from quack_lm.config.schema import SECTIONS, as_prepared, check, refuse_other_version
from quack_lm.config.yaml_file import ConfigLoader, read_yaml
from quack_lm.errors import UserError
from quack_lm.text import refuse_secret

# What to use here in place of Hydra's own settings.
HYDRA_KEYS = {
    "hydra.run.dir": "run_dir=... is the directory of a run",
    "hydra.sweep.dir": "dir=... is the directory of several runs",
    "hydra.sweep.subdir": "each run of a sweep has a directory with its own name in dir=...",
    "hydra.launcher": "quack-lm sweep submit sends runs to slurm, and jobs=N runs N at a time here",
    "hydra.sweeper": "give keys several values, as in seed=0,1, with quack-lm train -m or quack-lm sweep run",
    "hydra.mode": "quack-lm train -m and quack-lm sweep run train several values",
    "hydra.job.chdir": "it is not needed: the working directory never changes, and what a run writes is in run_dir",
    "hydra.job": "run_dir=... names a run's directory and logger.name=... the run in W&B",
    "hydra.job_logging": "what a run logs is in metrics.jsonl, and logger.log_every and logger.progress set how often",
    "hydra.verbose": "what a run logs is in metrics.jsonl, and logger.log_every and logger.progress set how often",
    "hydra.searchpath": f"configs are read from {CONFIG_DIR} alone; add a yaml file to a group there",
}


def compose(overrides: Iterable[str] = (), *, file: Path | None = None, reads_manifest: bool = True) -> dict[str, Any]:
    """The resolved and checked config of one run.

    `overrides` follow Hydra's grammar (`optimizer.lr=3e-3`, `attention=mla`). `file` is the `config.yaml` of an earlier
    run, which then takes the place of `configs/`. Where `data.dir` is prepared, its manifest says what the data are,
    unless a preparation is what is composed: `reads_manifest`. Raises UserError that names the key and suggests a fix.
    """
    return _compose(overrides, file, _compose_choices, reads_manifest=reads_manifest)


def compose_all(runs: Iterable[Iterable[str]]) -> Iterator[dict[str, Any]]:
    """The config of each of many runs, as `compose` makes it; Hydra composes every distinct choice of groups once."""
    compose_choices = functools.cache(_compose_choices)
    return (_compose(overrides, None, compose_choices) for overrides in runs)


def chosen_groups(overrides: Iterable[str]) -> dict[str, str | None]:
    """{"model": "tiny", ...}: the choice of each group after the defaults list, the experiment and the overrides."""
    chosen, _ = _split_choices([_parse_one(override) for override in overrides])
    return _compose_choices(chosen)[1]


@dataclass(frozen=True)
class Axis:
    """A key with several values: `optimizer.lr=3e-3,3e-2`."""

    key: str
    values: list[str]  # in the override grammar


def split_axes(overrides: Iterable[str]) -> tuple[list[str], list[Axis]]:
    """(the overrides with one value, those with several).

    Several values are Hydra's `a,b`, `choice(a,b)`, `range(0,5)`, and `glob(*)` of a group's choices.
    """
    plain: list[str] = []
    axes: list[Axis] = []
    for text in overrides:
        override = _parse_one(text, allow_several=True)
        key = override.key_or_group
        if not override.is_sweep_override():
            plain.append(text)
        elif any(axis.key == key for axis in axes):
            raise UserError(f"{text}: {key} has several values already; give all of them at once")
        elif isinstance(override.value(), Glob):
            axes.append(Axis(key, typing.cast(Glob, override.value()).filter(choices(key) if key in groups() else [])))
        elif override.value_type == ValueType.INTERVAL_SWEEP:
            raise UserError(f"{text}: an interval is continuous; write its values out, or range(start,stop,step)")
        else:
            axes.append(Axis(key, list(itertools.islice(override.sweep_string_iterator(), 10_001))))
    if empty := next((axis.key for axis in axes if not axis.values), None):
        raise UserError(f"{empty}: the list of values is empty; see quack-lm train --help {empty.split('.')[0]}")
    return plain, axes


# ------------------------------------------------------------------------------------------------ Hydra


# A config of the yaml files alone, and the choice of each group.
_Composed = tuple[DictConfig, dict[str, str | None]]
_ComposeChoices = Callable[[tuple[str, ...]], _Composed]


def _compose(
    overrides: Iterable[str], file: Path | None, compose_choices: _ComposeChoices, *, reads_manifest: bool = True
) -> dict[str, Any]:
    try:
        parsed = [_parse_one(override) for override in overrides]
        raw = _compose_file(file, parsed) if file else _compose_groups(parsed, compose_choices)
        if reads_manifest and isinstance(raw.get("data"), dict):
            explicit = {key.removeprefix("data.") for o in parsed if (key := o.key_or_group).startswith("data.")}
            explicit |= {"_target_" for o in parsed if o.key_or_group == "data"}  # which a choice of data sets
            raw["data"] = as_prepared(_resolve(raw["data"], raw, (), "data"), explicit)
        return check(_resolve(raw, raw, ()))
    except RecursionError:
        raise UserError("the config is nested too deeply, or refers to itself too often") from None


def _compose_groups(overrides: list[Override], compose_choices: _ComposeChoices) -> dict[Any, Any]:
    chosen, values = _split_choices(overrides)
    config = copy.deepcopy(compose_choices(chosen)[0])
    for override in values:
        # What Hydra does with ++key=value: keys may be new, so that `check` names them.
        try:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError):  # ValueError: a name where a list has numbers
            raise UserError(f"Error merging override ++{str(override.input_line).lstrip('+')}") from None
    # References stay unread: OmegaConf's resolvers, which can do more, never run.
    return typing.cast(dict, OmegaConf.to_container(config, resolve=False))


def _compose_choices(overrides: tuple[str, ...]) -> _Composed:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            config = hydra_compose("train", overrides=list(overrides), return_hydra_config=True)
        choices_made = typing.cast(dict, OmegaConf.to_container(config.hydra.runtime.choices))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from None
    with open_dict(config):
        del config["hydra"]
    return config, {group: name for group, name in reversed(choices_made.items()) if not group.startswith("hydra/")}


def _compose_file(file: Path, overrides: list[Override]) -> dict[Any, Any]:
    config = read_yaml(file, f"--config {file}", ConfigLoader)
    if not isinstance(config, dict):
        raise UserError(f"--config {file}: expected the sections of a run's config.yaml")
    refuse_other_version(config, f"--config {file}")
    for override in overrides:
        _answer_hydra(override)
        *sections, key = override.key_or_group.split(".")
        node = config
        for name in sections:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(f"{override.input_line}: {name} is a value, not a section")
        if key in SECTIONS and not sections:
            raise UserError(
                f"{override.input_line}: {key} is already chosen by the config file; override single keys of it"
            )
        node[key] = override.value()
    return config


@functools.lru_cache(1024)  # the runs of a sweep have most overrides in common
def _parse_one(text: str, *, allow_several: bool = False) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:  # ValueError: a number with more digits than Python reads
        raise UserError(_unreadable(text, _one_line(error))) from None
    if override.is_delete():
        key = override.key_or_group
        raise UserError(f"{text}: keys cannot be deleted; where a key may be empty, write {key}=null")
    if override.package is not None:
        raise UserError(f"{text}: write key=value; groups cannot be moved to another section")
    if override.is_sweep_override() and not allow_several:
        raise UserError(
            f"{text} has several values: quack-lm train -m ... or quack-lm sweep run ... trains all of them; one value "
            f"with a comma is quoted, '{override.key_or_group}=\"a,b\"', and a list has brackets, "
            f"'{override.key_or_group}=[a,b]'"
        )
    # Here too, for the command itself is written down, with what a later override replaces.
    refuse_secret(override.key_or_group, str(override.value()))
    return override


def _unreadable(text: str, reason: str) -> str:
    key, equals, value = text.partition("=")
    if equals and value.startswith("["):
        return f"cannot read {text!r}: quote a list for the shell, like '{key}=[a,b]' or '{key}=[\"a b\",c]' ({reason})"
    return (
        f"cannot read {text!r}: write key=value, and quote a value with special characters, like run_dir='\"a=b\"' "
        f"({reason})"
    )


def _split_choices(overrides: list[Override]) -> tuple[tuple[str, ...], list[Override]]:
    """The choices of groups, checked, as Hydra gets them; and the overrides of single values."""
    chosen, values, known = [], [], groups()
    for override in overrides:
        key, line = override.key_or_group, str(override.input_line)
        if not key:
            raise UserError(f"cannot read {line!r}: write key=value")
        _answer_hydra(override)
        if key == "sweep":
            raise UserError(f"{line} is not a setting of a single run: quack-lm sweep run {line} trains it")
        if key not in known:
            values.append(override)
            continue
        value, options = override.value(), choices(key)
        if value not in options:
            raise UserError(f"{key}={value}: {nearest(str(value), options)}")
        # Only `experiment` may be absent from the defaults; Hydra wants a plus sign for nothing here.
        chosen.append(line.lstrip("+"))
    return tuple(chosen), values


def _answer_hydra(override: Override) -> None:
    key = override.key_or_group.replace("/", ".")
    if key.split(".")[0] != "hydra":
        return
    known = (answer for name, answer in HYDRA_KEYS.items() if key == name or key.startswith(name + "."))
    answer = next(known, "run_dir=... is the directory of a run, and dir=... that of several")
    raise UserError(f"{override.input_line}: hydra.* is not used here; {answer}")


def _resolve(value: Any, config: dict[Any, Any], trail: tuple[str, ...], key: str = "") -> Any:
    """The value with each reference `${a.b}` replaced by what it names.

    A reference is the complete value, and nothing else can be written with `${`: a resolver could read the environment,
    and its secrets.
    """
    if isinstance(value, dict):
        return {k: _resolve(v, config, trail, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_resolve(v, config, trail, key) for v in value]
    if not isinstance(value, str) or "$" not in value:
        return value
    reference = re.fullmatch(r"\$\{([\w.]+)\}", value)
    if reference is None:
        if "${" in value:
            raise UserError(
                f"{key}={value!r}: only plain references such as ${{model.n_heads}} are allowed in a config"
            )
        return value
    path = reference[1]
    if path in trail:
        raise UserError(f"{key}={value!r} refers to itself; give it a value")
    found: Any = config
    for name in path.split("."):
        if not isinstance(found, dict) or name not in found:
            raise UserError(f"{key}={value!r}: there is no setting {path}")
        found = found[name]
    if isinstance(found, dict | list):
        # Lists that refer to lists that refer to lists double with every line.
        raise UserError(f"{key}={value!r} refers to several values; refer to a single one, or write them out")
    return _resolve(found, config, (*trail, path), key)


def _one_line(error: Exception) -> str:
    """The first lines of a library's message that say something about the user's input."""
    lines = [line.strip() for line in str(error).splitlines()]
    return "; ".join([line for line in lines if line and not line.startswith(("object_type", "See https"))][:2])
