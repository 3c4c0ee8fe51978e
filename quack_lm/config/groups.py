"""The yaml files of `configs/`: groups, their choices, and the keys of each choice.

Read from yaml and source text alone, so that shell completion and suggestions need not import torch.
"""

import ast
import difflib
import itertools
from functools import cache
from pathlib import Path
from typing import Any

from quack_lm.config.yaml_file import ConfigLoader, read_yaml
from quack_lm.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
# In a checkout these lie beside the package, in an installed wheel inside it.
CONFIG_DIR = _PACKAGE / "configs" if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent / "configs"

# Old names of keys: the error for one suggests the new name.
RENAMED = {
    "optimizer.is_nesterov": "optimizer.nesterov",
    "optimizer.final_ratio": "optimizer.min_lr_ratio",
    "trainer.recompute": "trainer.activation_checkpointing",
    "model.q_latent_dim": "attention.q_latent_dim",
    "model.kv_latent_dim": "attention.kv_latent_dim",
}
# What other codebases call a key, in whatever section.
ELSEWHERE = {"learning_rate": "optimizer.lr", "batch_size": "trainer.global_batch_size"}


def groups() -> list[str]:
    """The names before the `=` of a choice: attention, data, experiment ..."""
    return sorted(path.name for path in CONFIG_DIR.iterdir() if path.is_dir() and path.name not in ("sweep", "tasks"))


def choices(group: str) -> list[str]:
    """The names that `group=...` accepts; a file whose name begins with an underscore is only included by others."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("[!_]*.yaml"))


def read_choice(group: str, name: str) -> dict[str, Any]:
    """The keys that one yaml file sets, those of the files in its defaults list included; references unresolved."""
    path = CONFIG_DIR / group / f"{name}.yaml"
    own = read_yaml(path, f"{group}={name}: {path}", ConfigLoader) or {}
    if not isinstance(own, dict):
        raise UserError(f"{group}={name}: {path} must have keys with values")
    bases = [base for base in own.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    merged: dict[str, Any] = {}
    for base in bases:
        merged |= read_choice(group, base)
    return merged | own


def opening_comment(group: str, name: str) -> str:
    """What a yaml file says of itself in its first lines."""
    lines = (CONFIG_DIR / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = [line.lstrip("# ") for line in itertools.takewhile(lambda line: line.startswith("#"), lines)]
    return " ".join(line for line in comment if not line.startswith("@package"))


@cache
def constructor_keys(target: str) -> tuple[str, ...]:
    """The keyword-only constructor parameters of a class of this package, from its source; () if there is no class.

    A variant that cannot be read must not break the suggestions for all others; choosing it says what is wrong.
    """
    module, _, name = target.rpartition(".")
    source = _PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
    try:
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return ()
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return ()
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init:
        return tuple(argument.arg for argument in init.args.kwonlyargs)
    origin = {n.name: module for n in tree.body if isinstance(n, ast.ClassDef)}
    origin |= {a.name: str(n.module) for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
    bases = [base.id for base in node.bases if isinstance(base, ast.Name)]
    keys = [
        key
        for base in bases
        if origin.get(base, "").startswith("quack_lm")
        for key in constructor_keys(f"{origin[base]}.{base}")
    ]
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and "ClassVar" not in ast.unparse(n.annotation)]
        keys += [field.target.id for field in fields if isinstance(field.target, ast.Name)]
    return tuple(dict.fromkeys(keys))


def keys_by_choice() -> dict[str, dict[str, tuple[str, ...]]]:
    """{"stabilizer.tau": {...}}: every key inside a group, with the choices that have it."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for group in groups():
        own: dict[str, list[str]] = {}
        for name in choices(group):
            try:
                target = read_choice(group, name).get("_target_")
            except UserError:
                continue
            for key in constructor_keys(target) if isinstance(target, str) else ():
                own.setdefault(f"{group}.{key}", []).append(name)
        found[group] = {key: tuple(names) for key, names in own.items()}
    return found


def nearest(name: str, known: list[str], prefix: str = "") -> str:
    """What to say of an unknown name: the nearest known one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    everything = ", ".join(prefix + k for k in known) or "none"
    return f"did you mean {prefix}{close[0]}? (choices: {everything})" if close else f"choices: {everything}"


def suggest(key: str, chosen: dict[str, str] | None = None) -> str | None:
    """The full key that is probably meant by `key`: one that ends in it, one with a similar name, or a renamed one.

    `stabilizer.tau` for `tau`; a key of the choices in `chosen`, {"stabilizer": "quack"}, is preferred.
    """
    name = key.replace("-", "_")
    if name in RENAMED:
        return RENAMED[name]
    known: dict[str, tuple[str, ...]] = {}
    for own in keys_by_choice().values():
        known |= own
    last = name.rpartition(".")[2]
    endings = {full.rpartition(".")[2]: full for full in reversed([*known, "run_dir", "seed"])}
    same = [full for full in known if full == name or full.endswith("." + last)]
    preferred = [full for full in same if (chosen or {}).get(full.split(".")[0]) in known[full]]
    if same:
        return (preferred or same)[0]
    old = next((new for was, new in (RENAMED | ELSEWHERE).items() if was.rpartition(".")[2] == last), None)
    close = difflib.get_close_matches(last, endings, n=1, cutoff=0.75)
    return old or (endings[close[0]] if close else None)
