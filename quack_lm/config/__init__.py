"""Configs: composed by Hydra from yaml files and overrides, checked against the classes that they configure.

    groups: the files of configs/ -> compose: one dictionary -> schema: checked, with every default
    command_line: flags -> reference: help texts and docs/configuration.md -> completion: for bash and zsh

Hydra and OmegaConf are imported here and nowhere else.
"""

from quack_lm.config.command_line import help_topic, read_flags, take_flag, take_keys, unknown_flag
from quack_lm.config.compose import Axis, chosen_groups, compose, compose_all, split_axes
from quack_lm.config.groups import CONFIG_DIR, choices, groups, nearest
from quack_lm.config.reference import help_text, reference_markdown
from quack_lm.config.schema import (
    check,
    check_section,
    choice,
    fingerprint,
    flatten,
    from_identity,
    identity,
    instantiate,
    older_identity,
)
from quack_lm.config.yaml_file import read_yaml

__all__ = [
    "CONFIG_DIR",
    "Axis",
    "check",
    "check_section",
    "choice",
    "choices",
    "chosen_groups",
    "compose",
    "compose_all",
    "fingerprint",
    "flatten",
    "from_identity",
    "groups",
    "help_text",
    "help_topic",
    "identity",
    "instantiate",
    "nearest",
    "older_identity",
    "read_flags",
    "read_yaml",
    "reference_markdown",
    "split_axes",
    "take_flag",
    "take_keys",
    "unknown_flag",
]
