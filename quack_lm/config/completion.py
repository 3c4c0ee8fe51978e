"""Scripts that complete verbs, groups, choices and keys in bash and zsh.

The words stand in the script, so that completing them starts no Python: eval "$(quack-lm completion bash)".
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from quack_lm.config.groups import CONFIG_DIR, choices, groups, keys_by_choice

FLAGS = ("--config", "--check", "--help")

BASH = """\
_quack_lm() {
    local current="${COMP_LINE:0:COMP_POINT}" words
    current="${current##* }"
    case "$COMP_CWORD ${COMP_WORDS[1]}" in
        1\\ *) words="VERBS" ;;
CASES
    esac
    COMPREPLY=($(compgen -W "$words" -- "$current"))
    [[ ${#COMPREPLY[@]} == 0 ]] && COMPREPLY=($(compgen -f -- "${current##*=}")) && return
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2>/dev/null
    # Bash takes a word apart at each = sign; what is completed is the last part.
    [[ $current == *=* && $COMP_WORDBREAKS == *=* ]] && COMPREPLY=("${COMPREPLY[@]#"${current%"${current##*=}"}"}")
    return 0
}
complete -F _quack_lm quack-lm
"""

ZSH = """\
_quack_lm() {
    local -a all
    case "$CURRENT $words[2]" in
        2\\ *) all=(VERBS) ;;
CASES
    esac
    compadd -S '' -- ${(M)all:#*=}
    compadd -- ${all:#*=} || _files
}
compdef _quack_lm quack-lm
"""


def completion_script(shell: str, verbs: Iterable[str], sweep_verbs: Iterable[str], sweep_keys: Iterable[str]) -> str:
    """The script for `bash` or `zsh`."""
    settings = [*run_words(), *FLAGS]
    sweeps = [f"sweep={name}" for name in sorted(_sweep_names(CONFIG_DIR / "sweep"))]
    by_verb: Mapping[str, list[str]] = {
        "train": [*settings, "--cfg", "--info", "--multirun"],
        "prepare": settings,
        "preflight": settings,
        "submit": ["train", "prepare", "preflight", *settings],
        "plan": [*sweeps, "scale=", "world_size=", "card=", "mfu=", "measure=true", *run_words(), "--help"],
        "eval": ["--tasks", "--include-path", "--num-fewshot", "--limit", "--batch-size", "--help"],
        "lr-find": ["from=", "to=", "steps=", "out=", *run_words(), "--help"],
        "generate": ["--prompt", "--prompts", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--help"],
        "gpu-check": ["dir=", "only=", "minutes=", "--dry-run", "--help"],
        "completion": ["bash", "zsh"],
        "sweep": [*sweep_verbs, *sweeps, *(f"{key}=" for key in sweep_keys if key != "sweep"), *run_words(), "--help"],
    }
    number, words, template = {"bash": ("*", 'words="{}"', BASH), "zsh": ("*", "all=({})", ZSH)}[shell]
    quote = "'{}'" if shell == "zsh" else "{}"
    # A shell would expand, or run, other characters in the name of a yaml file.
    plain = {verb: [word for word in own if re.fullmatch(r"[\w./=+-]+", word)] for verb, own in by_verb.items()}
    cases = "\n".join(
        f"        {number}\\ {verb}) {words.format(' '.join(map(quote.format, own)))} ;;" for verb, own in plain.items()
    )
    return template.replace("VERBS", " ".join(verbs)).replace("CASES", cases)


def run_words() -> list[str]:
    """What can stand in the command line of a run: every choice, and every key up to its = sign."""
    chosen = [f"{group}={name}" for group in groups() for name in choices(group)]
    return [*chosen, "run_dir=", "seed=", *(f"{key}=" for own in keys_by_choice().values() for key in own)]


def _sweep_names(folder: Path) -> list[str]:
    return [str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml")]
