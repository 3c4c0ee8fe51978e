"""The software that a run uses."""

import platform
from importlib import metadata

PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "numpy", "hydra-core", "wandb", "safetensors")
MISSING = "missing"


def package_versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide a run's numbers or files; MISSING where not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return MISSING
