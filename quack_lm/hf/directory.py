"""Directories of transformers: their weights written and read one tensor at a time, and their config.json."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from quack_lm.config import flatten
from quack_lm.errors import UserError, explaining
from quack_lm.files import open_regular, parse_json, write_json
from quack_lm.hf.counterpart import Counterpart

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# The tensors of a file are together in memory before it is written.
SHARD_BYTES = 1 << 30
# Of weights that are read, in the words of safetensors.
DTYPES = ("F64", "F32", "F16", "BF16")
# Our keys for those of config.json files.
KEYS = {
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.d_model",
    "intermediate_size": "model.d_ff",
    "num_hidden_layers": "model.n_layers",
    "rms_norm_eps": "model.norm_eps",
    "tie_word_embeddings": "model.tied_embeddings",
    "num_attention_heads": "attention.n_heads",
    "num_key_value_heads": "attention.n_kv_heads",
    "head_dim": "attention.head_dim",
    "rope_theta": "attention.rope_theta",
    "q_lora_rank": "attention.q_latent_dim",
    "kv_lora_rank": "attention.kv_latent_dim",
    "qk_nope_head_dim": "attention.nope_dim",
    "qk_rope_head_dim": "attention.rope_dim",
    "v_head_dim": "attention.v_dim",
}


# ------------------------------------------------------------------------------------------------ writing


def template(counterpart: Counterpart, more: Mapping[str, Any]) -> PreTrainedModel:
    """The model of transformers on the meta device, with `more` in its config: its names and shapes, no weights."""
    config = AutoConfig.for_model(counterpart.model_type, **counterpart.config, **more)
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    expected = set(model.state_dict())
    if getattr(model.config, "tie_word_embeddings", False):
        expected.discard("lm_head.weight")
    names = {weight.name for weight in counterpart.weights}
    assert names == expected, f"{type(model).__name__} has other tensors: {sorted(names ^ expected)[:5]}"
    return model


def write_config(
    directory: Path, model: PreTrainedModel, dtype: torch.dtype, generation: Mapping[str, int | None]
) -> None:
    """Write config.json, with the rotary keys of transformers 4 as well, which many tools still read; and
    generation_config.json, with these special tokens."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    values = json.loads(config.to_json_string())
    rope = getattr(config, "rope_parameters", None) or {}
    old = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    write_json(directory / CONFIG, {**values, **old})
    known = {key: value for key, value in generation.items() if value is not None}
    has_cache = {} if config.model_type != "quack_lm" else {"use_cache": False}
    GenerationConfig(**known, **has_cache).save_pretrained(directory)


def write_weights(
    directory: Path,
    model: PreTrainedModel,
    counterpart: Counterpart,
    read: Callable[[str], Tensor],
    dtype: torch.dtype,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> tuple[list[str], int]:
    """Write the tensors of a `template`, made of those that `read` gives by our names; (the files, their numbers).

    After `write_config`. An index is written where there are several files. In memory is one file at a time, of at
    most `shard_bytes` or one tensor.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shards: list[list[Any]] = [[]]
    filled = 0
    for weight in counterpart.weights:
        n_bytes = shapes[weight.name].numel() * dtype.itemsize
        if shards[-1] and filled + n_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += n_bytes
    files: list[str] = []
    places: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, start=1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for weight in shard:
            tensor = weight.pack(*map(read, weight.ours)).to(dtype).contiguous()
            assert tensor.shape == shapes[weight.name], f"{weight.name}: {tensor.shape}, not {shapes[weight.name]}"
            tensors[weight.name] = tensor
            total += tensor.nbytes
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk, for example
            raise UserError(f"{directory / file} cannot be written ({error}); choose another directory") from None
        shutil.copymode(directory / CONFIG, directory / file)  # some versions let its owner alone read it
        del tensors, tensor
        files.append(file)
        places |= {weight.name: file for weight in shard}
    if len(files) > 1:
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})
    return files, total // dtype.itemsize


# ------------------------------------------------------------------------------------------------ reading


class WeightFiles:
    """The tensors in a directory's safetensors files, of which nothing is read but what is asked for.

    UserError, which begins with `what`, where there are none, or a file cannot be read.
    """

    def __init__(self, directory: Path, what: str) -> None:
        self._what = what
        self._places: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in self._files(directory):
            with self._reading(path) as file:
                for name in file.keys():  # noqa: SIM118, it is no dict
                    self._places[name] = path
                    tensor = file.get_slice(name)
                    self.shapes[name] = tuple(tensor.get_shape())
                    # Of integers and float8 the scales are elsewhere.
                    if (dtype := tensor.get_dtype()) not in DTYPES:
                        raise UserError(
                            f"{what}: {name} in {path} is of dtype {dtype}; save the weights as one of: "
                            f"{', '.join(DTYPES)}, without quantization"
                        )

    def read(self, name: str) -> Tensor:
        """A tensor, in float32."""
        with self._reading(self._places[name]) as file:
            return file.get_tensor(name).float()

    def _files(self, directory: Path) -> list[Path]:
        if (directory / INDEX).is_file():
            try:
                names = set(parse_json((directory / INDEX).read_text())["weight_map"].values())
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                raise UserError(f"{self._what}: {directory / INDEX} cannot be read; copy it again") from None
            # An untrusted index names files of its directory alone.
            if not all(isinstance(name, str) and os.path.basename(name) == name for name in names):
                raise UserError(f"{self._what}: {directory / INDEX} names files outside of its directory")
        elif (directory / WEIGHTS).exists():
            names = {WEIGHTS}
        else:
            raise UserError(
                f"{self._what}: {directory} has neither {WEIGHTS} nor {INDEX}; other formats, which may run code, are "
                "not read: save the model as safetensors"
            )
        return [directory / name for name in sorted(names)]

    def _reading(self, path: Path) -> Any:
        try:
            with explaining(self._what):
                open_regular(path, "rb").close()  # the library would wait for a pipe
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise UserError(f"{self._what}: {path} is damaged ({error}); copy it again") from None


def read_config(directory: Path, what: str) -> PreTrainedConfig:
    """The config.json of a directory, which runs no code of it; UserError that begins with `what`."""
    try:
        with explaining(what):
            open_regular(directory / CONFIG).close()
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # of an untrusted file, whose classes raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{what}: {directory / CONFIG} is no config of a known model ({reason})") from None


def compared(counterpart: Counterpart, config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a config.json says of the counterpart's settings, and what they are; flat, by our keys where we have
    them."""
    there = {key: getattr(config, key, None) for key in counterpart.config}
    return _named(there), _named(counterpart.config)


def _named(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = {re.sub("^(rope_parameters|sections)[.]", "", key): value for key, value in flatten(dict(config)).items()}
    return {KEYS.get(key, key): value for key, value in flat.items()}
