"""The software that a run uses."""

import platform
from importlib import metadata

from quack_lm import __version__

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "numpy", "hydra-core", "wandb", "safetensors")
MISSING = "missing"


def package_versions() -> dict[str, str]:
    """The versions of quack_lm, Python and the packages that decide a run's numbers or files; MISSING if absent."""
    versions = {"quack_lm": __version__, "python": platform.python_version()}
    return {**versions, **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING
