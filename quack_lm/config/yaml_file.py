"""Reading yaml that may come from somebody else: plain values only, and an error message for anything else."""

import re
from pathlib import Path
from typing import Any

import yaml

from quack_lm.errors import UserError
from quack_lm.files import open_regular


class _PlainLoader(yaml.SafeLoader):
    """No tags, no aliases (a few lines of them stand for more values than fit into memory), no key twice."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not allowed; write values out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=deep)


class ConfigLoader(_PlainLoader):
    """The same, and 3e-3 is a number, as it is on the command line; yaml 1.1 reads it as text."""


ConfigLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path, what: str, loader: type[yaml.SafeLoader] = _PlainLoader) -> Any:
    """The values of a yaml file; UserError, beginning with `what`, if it cannot be read. Raises PermissionError."""
    try:
        with open_regular(path) as file:
            return loader(file.read()).get_single_data()
    except PermissionError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        where = "" if path.is_absolute() else f" (looked for in {Path.cwd()})"
        raise UserError(f"{what}: {reason[:1].lower()}{reason[1:]}{where}") from None
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise UserError(f"{what}: not a readable yaml file: {error.problem}{line}") from None
    except RecursionError:
        raise UserError(f"{what}: not a readable yaml file: it is nested too deeply") from None
    # ValueError: text that is not UTF-8, and dates and numbers that Python cannot hold.
    except (yaml.YAMLError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{what}: not a readable yaml file: {first}") from None
