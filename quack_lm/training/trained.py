"""A trained model, from a checkpoint alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quack_lm.config import from_identity
from quack_lm.errors import UserError
from quack_lm.model import Transformer
from quack_lm.parallel import materialize
from quack_lm.training import checkpoint
from quack_lm.training.build import make_model
from quack_lm.training.run_dir import RunDir


@dataclass(frozen=True)
class Trained:
    """A model with the weights of a checkpoint, and what that says about its run.

    The config has defaults for the keys that are not part of a run's identity, such as `run_dir`.
    """

    model: Transformer
    config: dict[str, Any]
    checkpoint: Path
    manifest_sha256: str  # of the data set that it was trained on


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path names: its own directory, or that of a run, whose last valid one is taken.

    UserError where there is none, or it is damaged.
    """
    path = path.absolute()
    if not path.is_dir():
        raise UserError(f"{path}: no such directory; give that of a run, or checkpoints/step_... inside of it")
    if checkpoint.NAME.fullmatch(path.name):
        if wrong := checkpoint.validate_checkpoint(path, verify_checksums=True):
            raise UserError(f"{path} is not a valid checkpoint: {wrong}; use another one of its run")
        return path
    found = checkpoint.latest_valid_checkpoint(RunDir(path).checkpoints)
    if found is None:
        raise UserError(
            f"{path}: no checkpoint in it; give the directory of a run that has one, or that checkpoint's own"
        )
    return found


def load_trained(path: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Trained:
    """The model of a run or checkpoint, ready to evaluate on one device; UserError where it cannot be read.

    Documents are not masked: which token ends them is known to the tokenizer.
    """
    found = find_checkpoint(path)
    state = checkpoint.read_state(found)
    config = from_identity(state["config"], f"{found / checkpoint.STATE}")
    # The kernels of training may not run here; those of sdpa do.
    model = make_model({**config, "attention": {**config["attention"], "backend": "sdpa"}})
    materialize(model, None, device)
    checkpoint.load_weights(found, model)
    model.to(dtype).eval().requires_grad_(False)
    return Trained(model, config, found, state["manifest_sha256"])
