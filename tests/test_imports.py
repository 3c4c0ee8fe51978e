"""Which module may use what, read from the import statements."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "quack_lm"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "scripts").glob("*.py")])

# External packages with consequences stay in the modules that are about them.
OWNERS = {
    "hydra": {"quack_lm/config/compose.py"},
    "omegaconf": {"quack_lm/config/compose.py"},
    "wandb": {"quack_lm/training/sinks.py"},
    "torch.utils.tensorboard": {"quack_lm/training/sinks.py"},
    "lm_eval": {"quack_lm/cli/eval.py", "quack_lm/harness.py"},
    "trackio": {"quack_lm/training/sinks.py"},
    "torch.distributed": {
        "quack_lm/parallel.py",
        "quack_lm/training/checkpoint.py",
        "quack_lm/training/preflight.py",
    },
    "datasets": {"quack_lm/data/corpus.py", "quack_lm/data/prepare.py", "quack_lm/data/tokenizer.py"},
    "tokenizers": {"quack_lm/data/corpus.py", "quack_lm/data/prepare.py", "quack_lm/data/tokenizer.py"},
    "transformers": {
        "quack_lm/bench/peers.py",
        "quack_lm/data/corpus.py",
        "quack_lm/data/prepare.py",
        "quack_lm/data/tokenizer.py",
        "quack_lm/hf/__init__.py",
        "quack_lm/hf/directory.py",
        "quack_lm/hf/model.py",
    },
    "flash_attn": {"quack_lm/attention/flash.py"},
    "kernels": {"quack_lm/attention/flash.py"},
    "litgpt": {"quack_lm/bench/peers.py"},
    "torchtitan": {"quack_lm/bench/peers.py"},
    "torch._inductor": {"quack_lm/bench/kernels.py"},
    "matplotlib": {"quack_lm/report/draw.py"},
    "PIL": {"quack_lm/report/draw.py"},
    "pyarrow": {"quack_lm/data/documents.py", "quack_lm/report/collected.py"},
}

# What reading a file with these could run, a file from somebody else could make us run.
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNSAFE_CALLS = {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
}
UNSAFE_BUILTINS = {"eval", "exec", "compile", "__import__"}

# What each file or folder of the package may import from the others. Later ones stand on earlier ones, so
# there is no cycle.
LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "logit_paths": set(),
    "rms_norm": set(),
    "text": {"errors"},
    "files": {"errors"},
    "slurm": {"errors"},
    "config": {"errors", "files", "text"},
    "stabilizers": {"logit_paths", "rms_norm"},
    "attention": {"logit_paths", "errors", "rms_norm"},
    "loss": set(),
    "model": {"attention", "errors", "loss", "rms_norm"},
    "parallel": {"errors", "slurm"},
    "optim": {"errors", "parallel"},
    "step": {"attention", "logit_paths", "parallel", "stabilizers"},
    "probe": {"attention", "logit_paths", "parallel", "step"},
    "data": {"errors", "files", "text"},
    "hf": {"attention", "config", "errors", "files", "model", "stabilizers", "text"},
}
LAYERS["training"] = {*LAYERS}
LAYERS["generate"] = {"attention", "data", "errors", "files", "model", "parallel", "text", "training"}
LAYERS["harness"] = {"generate"}
LAYERS["sweep"] = {"config", "errors", "files", "slurm", "text", "training"}
LAYERS["report"] = {"config", "errors", "files", "slurm", "sweep", "text", "training"}
LAYERS["paper"] = {"report"}
LAYERS["results"] = {"errors", "files", "report"}
LAYERS["bench"] = {*LAYERS} - {"paper", "sweep", "generate", "harness", "results"}
LAYERS["cli"] = {*LAYERS}
LAYERS["__main__"] = {"cli"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imported(path: Path) -> frozenset[str]:
    """The dotted names that a file imports, at any depth; `from a import b` gives a.b."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


@cache
def attributes(path: Path) -> frozenset[str]:
    """The dotted names that a file uses, such as torch.distributed.get_rank."""
    return frozenset(ast.unparse(node) for node in nodes(path) if isinstance(node, ast.Attribute))


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_rules_are_about_files_that_exist() -> None:
    names = {name_of(path) for path in SOURCES}
    assert len(names) > 20
    assert set().union(*OWNERS.values()) <= names


@pytest.mark.parametrize("package", OWNERS)
def test_an_external_package_is_used_only_where_it_belongs(package: str) -> None:
    users = {name_of(p) for p in SOURCES if any(is_under(n, package) for n in imported(p) | attributes(p))}
    assert users, f"nothing uses {package} any more: remove its rule"
    assert users <= OWNERS[package]


def test_sharded_tensors_are_known_only_to_the_files_about_them() -> None:
    users = {name_of(p) for p in SOURCES if "DTensor" in p.read_text()}
    assert users <= OWNERS["torch.distributed"]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_only_the_layers_below_it(layer: str) -> None:
    for path in PACKAGE.rglob("*.py"):
        if layer_of(path) == layer:
            below = {name.split(".")[1] for name in imported(path) if is_under(name, "quack_lm")}
            assert below - {layer, "__version__"} <= LAYERS[layer], name_of(path)


def test_attention_and_stabilizers_never_import_each_other() -> None:
    for own, other in (("attention", "stabilizers"), ("stabilizers", "attention")):
        paths = list((PACKAGE / own).glob("*.py"))
        assert len(paths) > 3
        assert not any(is_under(name, f"quack_lm.{other}") for path in paths for name in imported(path))


def test_no_layer_stands_on_a_later_one() -> None:
    order = list(LAYERS)
    assert all(order.index(below) < order.index(layer) for layer in LAYERS for below in LAYERS[layer])
    present = {layer_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert present == {*LAYERS}


def test_scripts_only_start_the_command_line() -> None:
    for path in (ROOT / "scripts").glob("*.py"):
        own = {name for name in imported(path) if is_under(name, "quack_lm")}
        assert own == {"quack_lm.cli.main"} or path.name == "measure_checkpoints.py"
    assert not any(is_under(name, "scripts") for path in SOURCES for name in imported(path))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_nothing_read_from_a_file_can_run_code(path: Path) -> None:
    assert not {name.split(".")[0] for name in imported(path)} & UNSAFE_MODULES
    assert not attributes(path) & UNSAFE_CALLS
    calls = {n.func.id for n in nodes(path) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    assert not calls & UNSAFE_BUILTINS
    assert "allow_pickle" not in path.read_text()
    assert "weights_only=False" not in path.read_text()


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_only_one_module_writes_to_a_terminal_or_knows_what_a_medium_escapes(path: Path) -> None:
    if name_of(path) != "quack_lm/text.py" and path.is_relative_to(PACKAGE):
        calls = {ast.unparse(node.func) for node in nodes(path) if isinstance(node, ast.Call)}
        assert not calls & {"print", "sys.stdout.write", "sys.stderr.write", "sys.stdout.writelines", "html.escape"}
        assert not {"isprintable", "unicode_escape"} & {name.split(".")[-1] for name in attributes(path)}


def test_training_does_not_load_the_libraries_of_preparation_mirrors_and_plots() -> None:
    code = "import sys, quack_lm.training.build; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "torch" in loaded
    assert not {"transformers", "datasets", "tokenizers", "wandb", "matplotlib", "pandas", "pyarrow"} & set(loaded)
