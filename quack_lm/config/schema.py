"""What a config may contain: each section's keys are the keyword-only constructor parameters of its `_target_`.

pydantic checks them against the constructor's type hints. A positional constructor parameter is something the builder
supplies and no config can set. The meaning of a key is its line in the `Args:` of the class's docstring.
"""

import dataclasses
import hashlib
import importlib
import inspect
import json
import re
import typing
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import pydantic

from quack_lm.config.groups import ELSEWHERE, RENAMED, choices, keys_by_choice, nearest, suggest
from quack_lm.errors import UserError
from quack_lm.files import LARGEST_FLOAT
from quack_lm.text import refuse_secret

# The class that each section's `_target_` must be, or derive from.
SECTIONS = {
    "model": "quack_lm.model.ModelSizes",
    "attention": "quack_lm.attention.base.Attention",
    "stabilizer": "quack_lm.stabilizers.base.Stabilizer",
    "optimizer": "quack_lm.optim.recipe.Recipe",
    "data": "quack_lm.data.settings.DataSettings",
    "trainer": "quack_lm.training.settings.TrainerSettings",
    "logger": "quack_lm.training.metrics.LoggerSettings",
    "eval": "quack_lm.training.evaluation.EvalSettings",
}


@dataclass(frozen=True, kw_only=True)
class RunKeys:
    """The keys outside of any section.

    Args:
        run_dir: directory of the run; null: runs/<attention>-<stabilizer>-<fingerprint>.
        seed: seed of the initial weights and of the order of the data.
    """

    run_dir: str | None = None
    seed: Annotated[int, pydantic.Field(ge=0, lt=2**63)] = 0


# Sections that the config of an earlier version may lack.
NEW_SECTIONS: dict[str, dict[str, Any]] = {"eval": {"_target_": SECTIONS["eval"]}}

# Two configs that differ only here describe the same run: the keys change where it writes, not what it computes.
NOT_IDENTITY = (
    "run_dir",
    "logger",
    "eval",
    "trainer.resume",
    "trainer.keep_every",
    "trainer.async_checkpoints",
    "trainer.max_logits",
    "trainer.profile",
)

LARGEST_INT = 2**63 - 1  # counts are int64 on the device

_STRICT = pydantic.ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


def check(config: dict[Any, Any]) -> dict[str, Any]:
    """The config with every default filled in; raises UserError at the first unknown, missing or wrongly typed key."""
    scalars = [field.name for field in dataclasses.fields(RunKeys)]
    chosen = {n: choice(config[n]) for n in SECTIONS if isinstance(config.get(n), dict) and "_target_" in config[n]}
    _refuse_unknown("", config, [*scalars, *SECTIONS], chosen)
    own = {key: config[key] for key in scalars if key in config}
    checked = _check_fields("", own, _schema(RunKeys))
    for key, value in checked.items():
        _check_value(key, value)
    data = config.get("data")
    # Before the sections that refer to it.
    if missing := next((k for k, v in data.items() if v == "???"), None) if isinstance(data, dict) else None:
        raise _not_set(f"data.{missing}")
    return checked | {n: check_section(n, config.get(n, NEW_SECTIONS.get(n)), chosen) for n in SECTIONS}


def check_section(name: str, section: Any, chosen: dict[str, str] | None = None) -> dict[str, Any]:
    """One section with every default filled in; UserError at the first key that is wrong, or a class from elsewhere.

    `chosen`, {"stabilizer": "quack"}, makes suggestions better.
    """
    if not isinstance(section, dict):
        raise UserError(f"{name}={section!r} must be a section with keys; choose one of {name}={choices(name)}")
    target = _target_class(name, section)
    values = {k: v for k, v in section.items() if k != "_target_"}
    _refuse_unknown(f"{name}.", values, list(_schema(target).model_fields), chosen or {})
    checked = {"_target_": section["_target_"], **_check_fields(f"{name}.", values, _schema(target))}
    for key, value in flatten({name: checked}).items():
        _check_value(key, value)
    return checked


def as_prepared(section: dict[str, Any], explicit: Collection[str]) -> dict[str, Any]:
    """The data section of a run by the manifest of the data set that it names, which knows what it was made of.

    `explicit` are its keys that somebody has typed. UserError where they, or a manifest, contradict that.
    """
    found: dict[str, Any] = _target_class("data", section).as_prepared(section, explicit)  # type: ignore[attr-defined]
    if found is not section:
        try:
            check_section("data", found)
        except UserError as error:
            # What somebody has typed is for the check of the config to answer.
            key = re.search(r"data\.(\w+)", str(error))
            if key and (key[1] not in found or found[key[1]] != section.get(key[1])):
                raise UserError(f"data.dir={section.get('dir')}: its manifest.json is damaged: {error}") from None
    return found


def instantiate(section: dict[str, Any], *supplied: Any) -> Any:
    """Build the object of a checked section; `supplied` are the constructor's positional arguments."""
    target = _import(section["_target_"])
    return target(*supplied, **{k: v for k, v in section.items() if k != "_target_"})


def choice(section: dict[str, Any]) -> str:
    """The group choice a section was made from: the last module name of its target, `quack_lm.attention.mla.MLA` ->
    `mla`."""
    return str(section["_target_"]).rpartition(".")[0].rpartition(".")[2]


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The flat keys and values that determine what a run computes."""
    return {k: v for k, v in flatten(config).items() if not any(k == n or k.startswith(n + ".") for n in NOT_IDENTITY)}


def from_identity(flat: dict[str, Any], where: str) -> dict[str, Any]:
    """A checked config with this identity, and defaults for the keys that are not part of it; of unknown origin.

    UserError that names `where` it is from, if it is none, or of another version.
    """
    config: dict[str, Any] = {"logger": {"_target_": SECTIONS["logger"]}}
    for key, value in flat.items():
        section, _, name = str(key).partition(".")
        if name and not isinstance(config.setdefault(section, {}), dict):
            raise UserError(f"{where}: {section} is a section and a value")
        (config[section] if name else config)[name or section] = value
    refuse_other_version(config, where)
    try:
        return check(config)
    except UserError as error:
        raise UserError(f"{where}: its config is not one of this version: {error}") from None


def older_identity(before: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The identity of a run of an earlier version, with the keys that are new since: they have their defaults."""
    found = dict(before)
    for key in identity(config).keys() - before.keys():
        section, _, name = key.partition(".")
        field = _schema(_target_class(section, config[section])).model_fields.get(name) if name else None
        if field is not None and not field.is_required():
            found[key] = field.get_default(call_default_factory=True)
    return found


def fingerprint(config: dict[str, Any]) -> str:
    """Twelve hex digits that are equal for two configs exactly when they describe the same run."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:12]


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def refuse_other_version(config: dict[Any, Any], where: str) -> None:
    """UserError where a run's config names classes that this version of quack_lm does not have."""
    for name, section in config.items():
        target = section.get("_target_") if isinstance(section, dict) and name in SECTIONS else None
        if isinstance(target, str) and re.fullmatch(r"quack_lm(\.[A-Za-z_]\w*)+", target) and _find(target) is None:
            raise UserError(
                f"{where} was written by another version of quack_lm, whose {name}._target_={target} does not exist "
                "in this one; use that version, or compose the run again"
            )


# ------------------------------------------------------------------------------------------------ keys, described


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a class, for help texts."""

    name: str
    type: str
    range: str
    default: str  # of the constructor; empty: required
    meaning: str


def describe(target: str) -> list[Key]:
    """The keys of a class, in the order of its constructor."""
    cls = _find(target) if target else RunKeys
    if cls is None:
        raise UserError(f"_target_={target} does not exist; correct the yaml file that names it")
    texts = meanings(cls)
    keys = []
    for name, field in _schema(cls).model_fields.items():
        # A type with its constraints; pydantic takes an Annotated apart.
        hint: Any = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
        parts = pydantic.TypeAdapter(hint).json_schema()
        options = parts.get("anyOf", [parts])
        keys.append(
            Key(
                name=name,
                type=" or ".join(_type_name(option) for option in options),
                range=", ".join(text for option in options for text in _bounds(option)),
                default="" if field.is_required() else as_yaml(field.get_default(call_default_factory=True)),
                meaning=texts.get(name, ""),
            )
        )
    return keys


def meanings(cls: type) -> dict[str, str]:
    """{key: meaning} from the `Args:` of a class's docstring and of those it derives from."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("Args:\n")
        for key, text in re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE):
            found[key] = " ".join(text.split())
    return found


def as_yaml(value: Any) -> str:
    """A value as it is written in a yaml file and on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _type_name(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return " or ".join(as_yaml(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type_name(schema['items'])}"
    names = {"integer": "int", "number": "float", "boolean": "bool", "string": "text", "null": "null"}
    return names[schema["type"]]


def _bounds(schema: dict[str, Any]) -> list[str]:
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    found = [f"{sign} {as_yaml(schema[name])}" for name, sign in signs.items() if name in schema]
    return found + (["not empty"] if schema.get("minItems") else [])


# ------------------------------------------------------------------------------------------------ checks


def _import(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _find(path: str) -> type | None:
    """The class of this name; None where there is none, UserError where its module exists and cannot be imported."""
    module = path.rpartition(".")[0]
    try:
        return _import(path)
    except AttributeError:
        return None
    except (ImportError, SyntaxError) as error:
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?"):
            return None
        raise UserError(f"_target_={path}: {module} cannot be imported: {type(error).__name__}: {error}") from None


def _target_class(section: str, values: dict[str, Any]) -> type:
    """The class that a section names; a name outside of this package is refused before anything is imported."""
    target = values.get("_target_")
    refusal = UserError(f"{section}._target_={target!r} must be a class of quack_lm derived from {SECTIONS[section]}")
    if not isinstance(target, str) or not re.fullmatch(r"quack_lm(\.[A-Za-z_]\w*)+", target):
        raise refusal
    cls = _find(target)
    # A class that a module has only imported would be called by that module's name.
    is_own = inspect.isclass(cls) and cls.__module__ == target.rpartition(".")[0]
    if cls is None or not is_own or not issubclass(cls, _import(SECTIONS[section])) or inspect.isabstract(cls):
        raise refusal
    return cls


@cache
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
    try:
        return schema.model_validate(values).model_dump()
    except pydantic.ValidationError as error:
        first, *more = error.errors()
        key = prefix + str(first["loc"][0])
        value = values.get(str(first["loc"][0]))
        if first["type"] == "missing" or value == "???":
            raise _not_set(key) from None
        # A union reports each of its members; together they say what the key accepts.
        same = [e for e in (first, *more) if e["loc"][0] == first["loc"][0]]
        message = f"{key}={value!r}: {' or '.join(dict.fromkeys(e['msg'] for e in same))}"
        message += f"; write a list as '{key}=[a,b]'" if first["type"] == "list_type" else ""
        raise UserError(message) from None


def _not_set(key: str) -> UserError:
    return UserError(f"{key} is not set; give it a value, for example on the command line: {key}=...")


def _check_value(key: str, value: Any) -> None:
    """What types and ranges do not say: no number beyond the device's, no secret, no text that no file can have."""
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, str):
            refuse_secret(key, item)
            if re.search("[\0\ud800-\udc7f\udd00-\udfff]", item):
                raise UserError(f"{key}={item!r} has a character that no file name can have, nor a message: remove it")
        if isinstance(item, int | float) and abs(item) > (LARGEST_INT if isinstance(item, int) else LARGEST_FLOAT):
            raise UserError(f"{key}={item} is too large for a 64-bit integer or a float32; give a smaller number")


def _refuse_unknown(prefix: str, values: dict[Any, Any], known: list[str], chosen: dict[str, str]) -> None:
    for key in values:
        if key not in known:
            raise UserError(unknown_key(f"{prefix}{key}", known, chosen, values[key]))


def unknown_key(key: str, known: list[str], chosen: dict[str, str], value: Any) -> str:
    """What to say of a key that the chosen classes do not have; `known` are the keys that they do have."""
    if key in RENAMED:
        return f"{key} is now {RENAMED[key]}"
    section, _, name = key.rpartition(".")
    if owners := keys_by_choice().get(section, {}).get(key):
        return f"unknown key {key}: it belongs to {' and '.join(f'{section}={owner}' for owner in owners)}"
    given = key
    if isinstance(value, dict) and len(value) == 1:  # a section that does not exist: the key in it may exist elsewhere
        ((inner, value),) = value.items()
        name = str(inner)
        given = f"{key}.{name}"
    found = suggest(given, chosen)
    where, _, last = (found or "").rpartition(".")
    is_foreign = name in ELSEWHERE
    is_here = where == section and last in known and not is_foreign  # then the list of the keys here helps more
    is_meant = not section or last == name or is_foreign or found in RENAMED.values()
    if found and is_meant and not is_here and not isinstance(value, dict):
        return f"unknown key {given}: did you mean {found}={as_yaml(value)}?"
    return f"unknown key {key}: {nearest(name, known, section + '.' if section else '')}"
