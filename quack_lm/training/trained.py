"""A trained model, from a checkpoint alone."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

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
    manifest_sha256: str  # of the data set that it was trained on


def load_trained(path: Path, *, device: torch.device, dtype: torch.dtype = torch.float32) -> Trained:
    """The model of a run or checkpoint, ready to evaluate on one device; UserError where it cannot be read.

    Documents are not masked: which token ends them is known to the tokenizer.
    """
    found = checkpoint.find_checkpoint(path, str(path))
    config = checkpoint.read_config(found)
    # The kernels of training may not run here; those of sdpa do.
    model = make_model({**config, "attention": {**config["attention"], "backend": "sdpa"}})
    materialize(model, None, device)
    checkpoint.load_weights(found, model)
    model.to(dtype).eval().requires_grad_(False)
    return Trained(model, config, found, checkpoint.read_state(found)["manifest_sha256"])
