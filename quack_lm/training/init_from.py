"""The weights that a new run begins with, `trainer.init_from`: of a checkpoint, or of a directory of transformers.

Weights alone: steps, optimizer state, schedule and data are the new run's own. Shapes and settings have to fit, and
each that does not is named. A run that is continued from its own checkpoint reads nothing from here.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quack_lm.config import choice, choices, flatten
from quack_lm.config.schema import as_yaml
from quack_lm.data.sources import DataSources
from quack_lm.errors import UserError
from quack_lm.files import file_sha256, user_path
from quack_lm.model import Transformer
from quack_lm.parallel import World, fill_parameters
from quack_lm.stabilizers.base import Stabilizer
from quack_lm.training import checkpoint

# Settings with which the weights of another run mean the same.
FREE = ("attention.backend", "model.init_std", "model.embedding_std", "num_nextn_predict_layers")
CONFIG_OF_TRANSFORMERS = "config.json"
TOKENIZER_FILE = "tokenizer.json"
SEAM = ".seam."  # in the name of a weight that the stabilizer adds to the model

Settings = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class InitialWeights:
    """Weights that were found to fit a run."""

    path: Path
    fill: Callable[[Transformer, World], None]  # puts them into a model on its device, on each rank what it holds
    stabilizer_source: Path | None  # the checkpoint whose state of the stabilizer is taken, too
    has_other_tokenizer: bool  # than the data of the run, as far as that can be told

    def load_stabilizer(self, stabilizer: Stabilizer, world: World) -> None:
        """Where the run asks for it, replace the state of an initialized stabilizer by that of the checkpoint."""
        if self.stabilizer_source is not None:
            tensors = checkpoint.stabilizer_tensors(stabilizer, world.device)
            checkpoint.load_tensors(self.stabilizer_source, tensors, world)
            checkpoint.load_stabilizer(stabilizer, tensors)


def find_source(init_from: str) -> Path:
    """The directory that `trainer.init_from` means: a checkpoint's, every byte of which is verified, or one of
    transformers; UserError where there is neither."""
    path = user_path(init_from)
    if (path / CONFIG_OF_TRANSFORMERS).exists():
        return path.absolute()
    return checkpoint.find_checkpoint(path, f"trainer.init_from={init_from}")


def open_initial_weights(
    path: Path, config: dict[str, Any], meta_model: Transformer, stabilizer: Stabilizer, data: DataSources
) -> InitialWeights:
    """The weights of what `find_source` has found, for a stabilizer that was initialized; UserError where they do not
    fit."""
    what, keeps = f"trainer.init_from={config['trainer']['init_from']}", config["trainer"]["init_stabilizer"]
    if not (path / CONFIG_OF_TRANSFORMERS).exists():
        return _of_checkpoint(path, what, config, meta_model, stabilizer if keeps == "checkpoint" else None, data)
    if keeps == "checkpoint":
        raise UserError(
            f"trainer.init_stabilizer=checkpoint: {path} is a directory of transformers, which has no state of a "
            "stabilizer; use trainer.init_stabilizer=weights"
        )
    return _of_transformers(path, what, config, meta_model, data)


def _of_checkpoint(
    path: Path,
    what: str,
    config: dict[str, Any],
    meta_model: Transformer,
    stabilizer: Stabilizer | None,
    data: DataSources,
) -> InitialWeights:
    source = checkpoint.read_config(path)
    there, here = (flatten({name: c[name] for name in ("model", "attention", "stabilizer")}) for c in (source, config))
    derived = {key for key in here if there.get(key) is None or here[key] is None}  # of others, which shapes show
    shapes = checkpoint.stored_shapes(path)
    _check_fit(
        what,
        (there, here),
        (
            {
                name.removeprefix(checkpoint.OF_MODEL): shape
                for name, shape in shapes.items()
                if name.startswith(checkpoint.OF_MODEL)
            },
            {name: tuple(parameter.shape) for name, parameter in meta_model.named_parameters()},
        ),
        derived,
    )
    if stabilizer is not None:
        state = checkpoint.stabilizer_tensors(stabilizer, torch.device("meta"))
        if any(shapes.get(name) != tuple(tensor.shape) for name, tensor in state.items()):
            raise UserError(
                f"trainer.init_stabilizer=checkpoint: {path} has no such state of stabilizer="
                f"{choice(config['stabilizer'])}; use trainer.init_stabilizer=weights"
            )
        norms = [settings.get("stabilizer.norm") for settings in (there, here)]
        if state and norms[0] != norms[1]:
            raise UserError(
                f"trainer.init_stabilizer=checkpoint: the state in {path} is of stabilizer.norm={norms[0]}, not "
                f"{norms[1]}; set stabilizer.norm={norms[0]}, or use trainer.init_stabilizer=weights"
            )
    for name, parameter in meta_model.named_parameters():
        checkpoint.read_weight(path, name, parameter.shape)  # which refuses what is not finite
    is_same_data = checkpoint.read_state(path)["manifest_sha256"] == data.manifest_sha256
    tokenizers = [c["data"].get("tokenizer") for c in (source, config)]  # null: one of its own, made from the data
    return InitialWeights(
        path,
        lambda model, world: checkpoint.load_tensors(path, checkpoint.named_tensors(model, []), world),
        stabilizer_source=None if stabilizer is None else path,
        has_other_tokenizer=not is_same_data and (None in tokenizers or tokenizers[0] != tokenizers[1]),
    )


def _of_transformers(
    path: Path, what: str, config: dict[str, Any], meta_model: Transformer, data: DataSources
) -> InitialWeights:
    # Imported late, for it loads transformers.
    from quack_lm.hf.counterpart import SETTINGS, as_it_is, counterpart
    from quack_lm.hf.directory import WeightFiles, compared, read_config

    theirs = read_config(path, what)
    ours = as_it_is(meta_model, config, "") if theirs.model_type == "quack_lm" else counterpart(meta_model, config)
    if theirs.model_type != ours.model_type:
        settings = SETTINGS.get(theirs.model_type)
        fix = f"choose {settings}" if settings else f"take weights of the type {' or '.join(SETTINGS)}"
        raise UserError(
            f"{what} is a model of the type {theirs.model_type}, and attention and stabilizer of this run make one of "
            f"the type {ours.model_type}; {fix} (docs, Hugging Face)"
        )
    if ours.is_folded:
        raise UserError(f"{what} has products of this model's weights; begin with the checkpoint that it was made of")
    files = WeightFiles(path, what)
    parameters = dict(meta_model.named_parameters())
    wanted = {w.name: tuple(w.pack(*(parameters[name] for name in w.ours)).shape) for w in ours.weights}
    # Copies of the embedding, and tables that transformers once saved with the weights.
    is_tied = ours.config.get("tie_word_embeddings", False)
    extra = [n for n in files.shapes if n.endswith("rotary_emb.inv_freq") or (is_tied and n == "lm_head.weight")]
    _check_fit(
        what, compared(ours, theirs), ({n: shape for n, shape in files.shapes.items() if n not in extra}, wanted)
    )
    for name in wanted:
        checkpoint.refuse_not_finite(files.read(name), f"{what}: {name}")
    origins = ours.origins()

    def value(name: str, _: torch.Size) -> Tensor:
        weight, number = origins[name]
        assert weight.unpack is not None
        return weight.unpack(files.read(weight.name))[number]

    tokenizer, known = path / TOKENIZER_FILE, data.manifest.tokenizer.files.get(TOKENIZER_FILE)
    return InitialWeights(
        path,
        lambda model, world: fill_parameters(model, value),
        stabilizer_source=None,
        has_other_tokenizer=not tokenizer.is_file() or file_sha256(tokenizer) != known,
    )


def _check_fit(
    what: str, settings: tuple[Settings, Settings], shapes: tuple[Shapes, Shapes], derived: Collection[str] = ()
) -> None:
    """UserError that names each setting and each shape, of all layers together, that is another one (there, here).

    Settings that are `derived` where they are null count where shapes differ.
    """
    there, here = map(_by_choice, settings)
    names = dict.fromkeys([*shapes[1], *shapes[0]])
    free = list(FREE)
    if shapes[0] == shapes[1]:
        free += derived
    # A stabilizer without weights of its own does with any others, whatever its settings.
    if not any(SEAM in name for name in names):
        free += ["stabilizer", *(key for key in here if key.startswith("stabilizer."))]
    wrong = [key for key in here if key not in free and there.get(key) != here[key]]
    # With another attention, its settings are others as well.
    wrong = [key for key in wrong if key.partition(".")[0] not in wrong or "." not in key]
    problems = [f"{key} is {as_yaml(there.get(key))} there and {as_yaml(here[key])} here" for key in wrong]
    for name in names:
        found, wanted = (" x ".join(map(str, own[name])) if name in own else None for own in shapes)
        if found != wanted:
            in_all_layers = re.sub(r"\.\d+\.", ".*.", name)
            if found and wanted:
                problems.append(f"{in_all_layers} is {found} there and {wanted} here")
            else:
                problems.append(f"{in_all_layers} is not {'here' if found else 'there'}")
    if problems:
        fixes = " ".join(
            f"{key}={as_yaml(there[key])}"
            for key in wrong
            if _is_ours(key, there.get(key)) and (there.get(key) is not None or (key in derived and key in there))
        )
        fix = f"set {fixes}" if fixes else "choose other weights, attention or stabilizer"
        raise UserError(f"{what} does not fit this run: {'; '.join(dict.fromkeys(problems))}; {fix}")


def _by_choice(settings: Settings) -> dict[str, Any]:
    """With `attention: mla` in place of the name of a class."""
    named = {}
    for key, value in settings.items():
        section = key.removesuffix("._target_")
        named[section] = value if section == key else choice({"_target_": value})
    return named


def _is_ours(key: str, value: Any) -> bool:
    section, dot, _ = key.partition(".")
    return section in ("model", "attention", "stabilizer") and bool(dot or value in choices(section))
