#!/usr/bin/env bash
# From nothing to a comparison of the stabilizers: installs the project, prepares the embedded corpus, trains ten tiny
# models and writes a report page. A second call reuses what is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

python scripts/prepare_data.py data=stdlib
python scripts/sweep.py run sweep=quickstart
python scripts/report.py runs/quickstart
