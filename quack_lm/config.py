"""From command-line overrides to one plain, checked dictionary; nothing else in the project reads raw configs.

Hydra composes the yaml files of `configs/`. Every section names a class of this package as its `_target_`; the
section's other keys are that class's keyword-only constructor parameters, checked by pydantic against the
constructor's own type hints. A positional constructor parameter is something the builder supplies and no config can
set.
"""

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import io
import json
import re
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pydantic
import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from quack_lm.errors import UserError
from quack_lm.files import open_regular

PACKAGE = Path(__file__).resolve().parent
# In a checkout it lies beside the package, in an installed wheel inside it.
CONFIG_DIR = PACKAGE / "configs" if (PACKAGE / "configs").is_dir() else PACKAGE.parent / "configs"

# The class that each section's `_target_` must be, or derive from.
SECTIONS = {
    "model": "quack_lm.model.ModelSizes",
    "attention": "quack_lm.attention.base.Attention",
    "stabilizer": "quack_lm.stabilizers.base.Stabilizer",
    "optimizer": "quack_lm.optim.recipe.Recipe",
    "data": "quack_lm.data.corpus.Corpus",
    "trainer": "quack_lm.training.settings.TrainerSettings",
    "logger": "quack_lm.training.metrics.LoggerSettings",
}
SCALARS: dict[str, Any] = {"run_dir": str | None, "seed": pydantic.NonNegativeInt}

DEEPEST_YAML = 50
FLOAT32_MAX = (2 - 2**-23) * 2.0**127

# Two configs that differ only here describe the same run: the keys change where it writes, not what it computes.
NOT_IDENTITY = ("run_dir", "logger", "trainer.resume", "trainer.keep_every", "trainer.async_checkpoints")


def read_flags(arguments: list[str]) -> tuple[Path | None, bool, list[str]]:
    """(--config's file, whether --check, the overrides) of a script's command line; UserError names an unknown flag."""
    file, is_check, overrides = None, False, []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config" or argument.startswith("--config="):
            value = argument.partition("=")[2] or next(rest, None)
            if value is None:
                raise UserError("--config needs a file")
            file = Path(value)
        elif argument == "--check":
            is_check = True
        elif argument.startswith("-"):
            raise UserError(f"unknown flag {argument}; settings are key=value, and --help explains")
        else:
            overrides.append(argument)
    return file, is_check, overrides


def compose(overrides: Iterable[str] = (), *, file: Path | None = None) -> dict[str, Any]:
    """The resolved and checked config of one run.

    `overrides` follow Hydra's grammar (`optimizer.lr=3e-3`, `attention=mla`). `file` is the `config.yaml` of an earlier
    run, which then takes the place of `configs/`. Raises UserError naming the key and the mend.
    """
    try:
        raw = _compose_file(file, list(overrides)) if file else _compose_groups(list(overrides))
        return check(_resolve(raw, raw, ()))
    except RecursionError:
        raise UserError("the config is nested too deeply, or refers to itself too often") from None


def check(config: dict[Any, Any]) -> dict[str, Any]:
    """The config with every default filled in; raises UserError at the first unknown, missing or wrongly typed key."""
    _refuse_unknown("", config, [*SCALARS, *SECTIONS])
    scalars = pydantic.create_model("config", __config__=_STRICT, **{k: (t, ...) for k, t in SCALARS.items()})  # type: ignore[call-overload]
    checked = _check_fields("", {k: config[k] for k in SCALARS if k in config}, scalars)
    for name in SECTIONS:
        section = config.get(name)
        if not isinstance(section, dict):
            raise UserError(f"{name}={section!r} must be a section with keys; choose one of {name}={choices(name)}")
        target = _target_class(name, section)
        values = {k: v for k, v in section.items() if k != "_target_"}
        checked[name] = {"_target_": section["_target_"], **_check_fields(f"{name}.", values, _schema(target))}
    for key, value in flatten(checked).items():
        for item in value if isinstance(value, list) else [value]:
            _refuse_unstorable(key, item)
    return checked


def instantiate(section: dict[str, Any], *supplied: Any) -> Any:
    """Build the object of a checked section; `supplied` are the constructor's positional arguments."""
    target = _import(section["_target_"])
    return target(*supplied, **{k: v for k, v in section.items() if k != "_target_"})


def choice(section: dict[str, Any]) -> str:
    """The group choice a section was made from: the last module name of its target, `quack_lm.attention.mla.MLA` ->
    `mla`."""
    return str(section["_target_"]).split(".")[-2]


def choices(group: str) -> list[str]:
    """The names that `group=...` accepts."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """What to say of a name that is not known: the nearest that is, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    everything = ", ".join(prefix + k for k in known) or "none"
    return f"did you mean {prefix}{close[0]}? (choices: {everything})" if close else f"choices: {everything}"


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The flat keys and values that determine what a run computes."""
    return {k: v for k, v in flatten(config).items() if not any(k == n or k.startswith(n + ".") for n in NOT_IDENTITY)}


def fingerprint(config: dict[str, Any]) -> str:
    """Twelve hex digits that are equal for two configs exactly when they describe the same run."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:12]


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def read_yaml(path: Path, what: str) -> Any:
    """The values of a yaml file that may come from a stranger; UserError, beginning with `what`, if it cannot be read.

    Aliases are refused: a few lines of them stand for more values than fit into memory.
    """
    return _read_yaml(path, what, lambda text: _UniqueKeys(text).get_single_data())


class _UniqueKeys(yaml.SafeLoader):
    """Plain values only; of a key that is given twice, the first would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


def _read_yaml(path: Path, what: str, load: Callable[[str], Any]) -> Any:
    try:
        with open_regular(path) as file:
            text = file.read()
        _refuse_traps(text, what)
        return load(text)
    except OSError as error:
        said = error.strerror or str(error)
        raise UserError(f"{what}: {said[:1].lower()}{said[1:]}") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise UserError(f"{what}: not a readable yaml file: {error.problem}{line}") from None
    except RecursionError:
        raise UserError(f"{what}: not a readable yaml file: it is nested too deeply") from None
    except UserError:
        raise
    # ValueError: what is no UTF-8, and dates and numbers that Python cannot hold.
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{what}: not a readable yaml file: {_one_line(error)}") from None


def _refuse_traps(text: str, what: str) -> None:
    depth = 0
    # Read event by event: the time that yaml takes grows with the square of the depth.
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST_YAML:
            raise UserError(f"{what}: not a readable yaml file: it is nested too deeply")
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{what}: yaml aliases are not allowed; write values out")


# ------------------------------------------------------------------------------------------------ Hydra


def _compose_groups(overrides: list[str]) -> dict[Any, Any]:
    groups = {path.name for path in CONFIG_DIR.iterdir() if path.is_dir()}
    ready = [_prepare(override, groups) for override in _parse(overrides)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONFIG_DIR)):
            return _plain(hydra_compose("train", overrides=ready))
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_one_line(error)) from None


def _compose_file(file: Path, overrides: list[str]) -> dict[Any, Any]:
    loaded = _read_yaml(file, f"--config {file}", lambda text: OmegaConf.load(io.StringIO(text)))
    if not isinstance(loaded, DictConfig):
        raise UserError(f"--config {file}: expected the sections of a run's config.yaml")
    config = _plain(loaded)
    for override in _parse(overrides):
        *sections, key = override.key_or_group.split(".")
        node = config
        for name in sections:
            node = node.setdefault(name, {})
            if not isinstance(node, dict):
                raise UserError(f"{override.input_line}: {name} is a value, not a section")
        if key in SECTIONS and not sections:
            raise UserError(
                f"{override.input_line}: the config file has its choice of {key}; override single keys of it"
            )
        node[key] = override.value()
    return config


def _plain(config: DictConfig) -> dict[Any, Any]:
    """The composed values with their references unread: OmegaConf's resolvers, which can do more, never run."""
    return typing.cast(dict, OmegaConf.to_container(config, resolve=False))


def _parse(overrides: list[str]) -> list[Override]:
    return [_parse_one(override) for override in overrides]


def _parse_one(text: str) -> Override:
    try:
        override = OverridesParser.create().parse_override(text)
    except (HydraException, ValueError) as error:  # ValueError: a number with more digits than Python reads
        raise UserError(
            f"cannot read {text!r}: write key=value, and quote a value with special characters, "
            f"like run_dir='\"a=b\"' ({_one_line(error)})"
        ) from None
    if override.is_sweep_override():
        raise UserError(f"{text}: one run takes one value per key; use quack-lm sweep for several")
    if override.is_delete() or override.package is not None:
        raise UserError(f"{text}: write key=value; keys cannot be deleted or moved")
    # Here too, for the command itself is written down, with what a later override replaces.
    refuse_password(override.key_or_group, str(override.value()))
    return override


def _prepare(override: Override, groups: set[str]) -> str:
    """The override as Hydra gets it: group choices are checked here, and other keys may be new, so that `check` names
    them."""
    key, line = override.key_or_group, str(override.input_line)
    if not key:
        raise UserError(f"cannot read {line!r}: write key=value")
    if re.split(r"[./]", key)[0] == "hydra":
        raise UserError(f"{line}: quack_lm has no hydra section; the run's directory is run_dir")
    if key not in groups:
        return "++" + line.lstrip("+")
    options = choices(key)
    value = override.value()
    if value not in options:
        raise UserError(f"{key}={value}: {nearest(str(value), options)}")
    # Only `experiment` may be absent from the defaults; Hydra wants a plus sign for nothing here.
    return line.lstrip("+")


def _resolve(value: Any, config: dict[Any, Any], trail: tuple[str, ...], key: str = "") -> Any:
    """The value with each reference `${a.b}` replaced by what it names.

    A reference is a whole value, and nothing else can be written with `${`: a resolver could read the environment, and
    its secrets.
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


# ------------------------------------------------------------------------------------------------ checks

_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def _import(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _target_class(section: str, values: dict[str, Any]) -> type:
    """The class that a section names: only classes of this package that fit the section are ever imported."""
    target = values.get("_target_")
    base = _import(SECTIONS[section])
    refusal = UserError(f"{section}._target_={target!r} must be a class of quack_lm derived from {SECTIONS[section]}")
    if not isinstance(target, str) or not re.fullmatch(r"quack_lm(\.[A-Za-z_]\w*)+", target):
        raise refusal
    try:
        cls = _import(target)
    except (ImportError, AttributeError):
        raise refusal from None
    # A class that a module has only imported would be called by that module's name.
    is_own = inspect.isclass(cls) and cls.__module__ == target.rpartition(".")[0]
    if not is_own or not issubclass(cls, base) or inspect.isabstract(cls):
        raise refusal
    return cls


def _schema(cls: type) -> type[pydantic.BaseModel]:
    """The keyword-only constructor parameters of `cls` as a pydantic model."""
    hints = typing.get_type_hints(cls.__init__, include_extras=True)  # type: ignore[misc]
    fields = {
        name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(cls).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.default_factory is not dataclasses.MISSING:
            fields[field.name] = (hints[field.name], pydantic.Field(default_factory=field.default_factory))
    return pydantic.create_model(cls.__name__, __config__=_STRICT, **fields)  # type: ignore[call-overload]


def _check_fields(prefix: str, values: dict[str, Any], schema: type[pydantic.BaseModel]) -> dict[str, Any]:
    _refuse_unknown(prefix, values, list(schema.model_fields))
    try:
        return schema.model_validate(values).model_dump()
    except pydantic.ValidationError as error:
        first, *more = error.errors()
        key = prefix + str(first["loc"][0])
        if first["type"] == "missing" or values.get(str(first["loc"][0])) == "???":
            message = f"{key} is not set; give it a value, for example on the command line: {key}=..."
        else:
            # A union reports each of its members; together they say what the key accepts.
            same = [e for e in (first, *more) if e["loc"][0] == first["loc"][0]]
            message = f"{key}={values[str(first['loc'][0])]!r}: {' or '.join(dict.fromkeys(e['msg'] for e in same))}"
        raise UserError(message) from None


def _refuse_unstorable(key: str, value: Any) -> None:
    if isinstance(value, str) and "\0" in value:
        raise UserError(f"{key}={value!r} has a NUL character; remove it")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{key}={value!r} is not UTF-8 text; no file could hold it")
    if isinstance(value, str):
        refuse_password(key, value)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise UserError(f"{key}={value} is beyond 64 bits; give a smaller number")
    if isinstance(value, float) and abs(value) > FLOAT32_MAX:
        raise UserError(f"{key}={value} is beyond float32, in which a run computes; give a smaller number")


def refuse_password(key: str, value: str) -> None:
    """UserError where a URL has something before the @ of its host: a token needs no colon to be one; `git` is none."""
    if re.search(r"://(?!git@)[^/@\s]+@", value):
        # The value is not repeated: it would stand in a log.
        raise UserError(
            f"{key} has a password in its URL, or a token, which would be written down; take what is before the @ out"
        )


def _refuse_unknown(prefix: str, values: dict[Any, Any], known: list[str]) -> None:
    for key in values:
        if key not in known:
            raise UserError(f"unknown key {prefix}{key}: {nearest(str(key), known, prefix)}")
