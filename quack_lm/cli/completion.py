"""Turn on shell completion of verbs, groups, choices and keys.

eval "$(quack-lm completion bash)"       # in ~/.bashrc
eval "$(quack-lm completion zsh)"        # in ~/.zshrc, after compinit
"""

from quack_lm.cli import VERBS
from quack_lm.cli.sweep import KEYS
from quack_lm.cli.sweep import VERBS as SWEEP_VERBS
from quack_lm.config.completion import completion_script
from quack_lm.errors import UserError
from quack_lm.text import echo


def main(arguments: list[str]) -> int:
    """Print the script of a shell."""
    if {"-h", "--help"} & set(arguments):
        echo(*(__doc__ or "").splitlines())
        return 0
    if arguments not in (["bash"], ["zsh"]):
        raise UserError("say for which shell: quack-lm completion bash, or zsh")
    echo(*completion_script(arguments[0], VERBS, SWEEP_VERBS, KEYS).splitlines())
    return 0
