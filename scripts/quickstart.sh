#!/usr/bin/env bash
# From nothing to a comparison of the stabilizers: installs the project, prepares the embedded corpus, trains ten tiny
# models and writes a report page. A second call reuses the finished steps.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/env.sh

quack-lm prepare data=stdlib
quack-lm sweep run sweep=quickstart
quack-lm report runs/quickstart

cat <<NEXT

Open runs/quickstart/report/report.html in a browser. Then, in each new shell:

    source ${VIRTUAL_ENV#"$PWD/"}/bin/activate

and for example:

    quack-lm train experiment=tiny attention=mla stabilizer=quack    # one run
    quack-lm train --help                                            # its settings
NEXT
