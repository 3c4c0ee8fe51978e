"""`quack-lm train`: see `python scripts/train.py --help`."""

import sys

try:
    from quack_lm.cli import main
except ModuleNotFoundError as error:
    sys.exit(
        f"error: {error}; activate the environment: source .venv/bin/activate (bash scripts/quickstart.sh makes it)"
    )

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
