"""A trained model, from a checkpoint alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quack_lm.config import instantiate
from quack_lm.data.manifest import Manifest, check_tokenizer, read_manifest
from quack_lm.data.settings import DataSettings
from quack_lm.data.sources import sha256_of_all
from quack_lm.errors import UserError
from quack_lm.files import user_path
from quack_lm.model import Transformer
from quack_lm.parallel import materialize
from quack_lm.training import checkpoint
from quack_lm.training.build import make_model


@dataclass(frozen=True)
class Trained:
    """A model with the weights of a checkpoint, and what that says about its run.

    The config has defaults for the keys that are not part of a run's identity, such as `run_dir`.
    """

    model: Transformer
    config: dict[str, Any]
    checkpoint: Path


def load_trained(path: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Trained:
    """The model of a run or checkpoint, ready to evaluate on one device; UserError where it cannot be read.

    Documents are not masked: which token ends them is known to the tokenizer.
    """
    found = checkpoint.find_checkpoint(path, str(path))
    config = checkpoint.read_config(found)
    # The kernels of training may not run here; those of sdpa do.
    model = make_model({**config, "attention": {**config["attention"], "backend": "sdpa"}})
    checkpoint.check_weights(found, model)  # first: sizes that no weights have could fill the memory
    materialize(model, None, device)
    checkpoint.load_weights(found, model)
    model.to(dtype).eval().requires_grad_(False)
    return Trained(model, config, found)


def find_run_data(
    path: Path, config: dict[str, Any], directory: Path | None = None, *, fix: str
) -> tuple[Path, Manifest]:
    """The data set with the tokenizer of a checkpoint's run, and its manifest, which may know of no tokenizer.

    UserError, which ends with `fix`, where it is not there, is damaged, or is another one.

    Args:
        path, config: the checkpoint, and the config in it.
        directory: where the data set is; None: the run's data.dir. Of a mixture, the first.
        fix: what to do where there is none.
    """
    data = config["data"]
    first, *others = [user_path(name) for name in data.get("dirs", [data.get("dir")])]
    first = directory or first
    try:
        settings: DataSettings = instantiate(data)
        manifest, digest = read_manifest(first, choice=settings.choice)
        digests = [digest, *(read_manifest(one)[1] for one in others)]
        check_tokenizer(first, manifest)
    except UserError as error:
        raise UserError(f"the tokenizer is with the data: {error}; {fix}") from None
    if sha256_of_all(digests) != checkpoint.read_state(path)["manifest_sha256"]:
        raise UserError(f"{first} is not the data set that {path} was trained on; {fix}")
    return first, manifest
