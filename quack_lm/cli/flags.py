"""The parser of verbs with ordinary flags."""

import argparse
from typing import NoReturn

from quack_lm.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are a UserError and whose --help is the docstring of the verb's module."""

    def __init__(self, verb: str, description: str | None) -> None:
        super().__init__(
            prog=f"quack-lm {verb}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise UserError(f"{message}; see --help")
