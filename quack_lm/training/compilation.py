"""Whether a run is compiled, and whether its machine has what that takes."""

import os
import shutil
from importlib.util import find_spec

from quack_lm.errors import UserError
from quack_lm.training.settings import TrainerSettings

# Compiling takes up to a minute and saves a tenth of a step on a CPU: a run of so many FLOPs takes a core about a
# quarter of an hour.
LEAST_CPU_FLOPS = 1e14


def check_compiler(settings: TrainerSettings, *, device: str) -> None:
    """Raise UserError where a run that is to be compiled cannot be."""
    missing = _missing(device)
    if settings.compile is True and missing:
        raise UserError(f"trainer.compile=true needs {missing}; install it, or use trainer.compile=false")


def is_compiled(settings: TrainerSettings, *, device: str, flops_per_token: float, ranks: int) -> bool:
    """What `trainer.compile` says; `auto` is yes on a GPU, and on a CPU for a long run, where there is a compiler.

    A function of the config and the number of ranks, not of the machine's speed: a run that continues decides alike.
    """
    if settings.compile != "auto":
        return settings.compile
    tokens = settings.steps * settings.global_batch_size * settings.seq_len / ranks
    return not _missing(device) and (device == "cuda" or tokens * flops_per_token >= LEAST_CPU_FLOPS)


def _missing(device: str) -> str | None:
    """What torch.compile needs and does not find."""
    compilers = (os.environ.get("CXX"), "g++", "clang++") if device == "cpu" else (os.environ.get("CC"), "gcc", "clang")
    if not any(name and shutil.which(name) for name in compilers):
        return "a C++ compiler" if device == "cpu" else "a C compiler"
    if device == "cuda" and find_spec("triton") is None:
        return "the triton package"
    return None
