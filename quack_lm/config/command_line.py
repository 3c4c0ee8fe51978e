"""The flags around the `key=value` settings, and answers to flags that Hydra or argparse users try."""

from collections.abc import Collection
from pathlib import Path

from quack_lm.config.groups import CONFIG_DIR, groups, suggest
from quack_lm.errors import UserError
from quack_lm.files import user_path

# Hydra's own flags that have no part here, with what to use instead.
ELSEWHERE = {
    "--config-name -cn": "the config is always configs/train.yaml: choose an experiment=... or give --config FILE",
    "--config-path -cp --config-dir -cd": f"configs are read from {CONFIG_DIR} alone; add a yaml file to a group there",
    "--multirun -m": "only quack-lm train takes it; quack-lm sweep run, plan and submit take several values without it",
    "--cfg -c --info -i --resolve": "quack-lm train --cfg job prints the resolved config of a run",
    "--package -p": "--cfg job prints the complete config, and --help GROUP.KEY one key",
    "--run -r": "it is not needed: without -m, one run is trained",
    "--shell-completion -sc": 'eval "$(quack-lm completion bash)" turns completion on (or zsh)',
    "--hydra-help": "--help lists the flags and groups",
    "--experimental-rerun": "--config RUN_DIR/config.yaml runs an earlier run again",
}


def read_flags(arguments: list[str]) -> tuple[Path | None, bool, list[str]]:
    """(--config's file, whether --check, the overrides) of a command line; UserError names an unknown flag."""
    file, rest = take_flag(arguments, "--config")
    overrides = [argument for argument in rest if argument != "--check"]
    for i, argument in enumerate(overrides):
        if argument.startswith("-"):
            raise UserError(unknown_flag(argument, overrides[i + 1 :]))
    return user_path(file) if file is not None else None, "--check" in rest, overrides


def take_flag(arguments: list[str], *names: str) -> tuple[str | None, list[str]]:
    """(the value of `--flag VALUE` or `--flag=VALUE`, or None; the other arguments)."""
    value, rest = None, list(arguments)
    for i, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if name not in names:
            continue
        following = arguments[i + 1] if i + 1 < len(arguments) else ""
        value = text if equals else following
        if not value or (not equals and value.startswith("-")):
            raise UserError(f"{name} needs a value, as in {name} {'FILE' if name == '--config' else 'VALUE'}")
        rest = arguments[:i] + arguments[i + (1 if equals else 2) :]
        break
    return value, rest


def take_keys(arguments: list[str], names: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """(the values of a command's own `key=value`, the other arguments); UserError for a flag, and a key given twice."""
    own: dict[str, str] = {}
    rest = []
    for argument in arguments:
        if argument.startswith("-"):
            raise UserError(unknown_flag(argument, []))
        name, _, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
        elif not value:
            raise UserError(f"{name} needs a value: {name}=...")
        elif name in own:
            raise UserError(f"{argument}: {name}={own[name]} is given, too; choose one")
        else:
            own[name] = value
    return own, rest


def help_topic(arguments: list[str]) -> str | None:
    """What `--help TOPIC` asks about; empty for help in general, None where nobody asked for help."""
    for i, argument in enumerate(arguments):
        if argument in ("-h", "--help"):
            following = arguments[i + 1] if i + 1 < len(arguments) else ""
            return "" if following.startswith("-") else following
        if argument.startswith("--help="):
            return argument.partition("=")[2]
    return None


def unknown_flag(flag: str, following: list[str]) -> str:
    """What to say of a flag that does not exist; `following` are the arguments after it."""
    name, equals, value = flag.partition("=")
    for names, answer in ELSEWHERE.items():
        if name in names.split():
            return f"{name} is a flag of Hydra: {answer}"
    key = name.lstrip("-")
    if not equals and following and "=" not in following[0] and not following[0].startswith("-"):
        equals, value = "=", following[0]
    full = key if key in groups() else suggest(key)
    if full:
        return f"unknown flag {name}: settings are key=value, without dashes; did you mean {full}={value or '...'}?"
    return f"unknown flag {name}; settings are key=value, and --help explains"
