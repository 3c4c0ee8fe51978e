#!/usr/bin/env bash
# Lint, types and tests; arguments go to pytest: bash scripts/test.sh tests/test_sweep.py -m slow
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

ruff check
ruff format --check
mypy
python -m pytest -n auto --maxprocesses 4 "$@"
