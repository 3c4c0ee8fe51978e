#!/usr/bin/env bash
# sbatch with the settings of slurm/site.sh:
#
#   bash slurm/submit.sh [flags of sbatch] slurm/train.sbatch attention=mla stabilizer=quack
#
# #SBATCH lines cannot read variables, so what differs between clusters is passed as flags from here.
set -euo pipefail
QUACK_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export QUACK_ROOT
QUACK_SITE=$(realpath "${QUACK_SITE:-$QUACK_ROOT/slurm/site.sh}")
export QUACK_SITE
# What it prints must not mix with the job number that `--parsable` prints; and environments read variables that may be
# unset.
set +u
source "$QUACK_SITE" >&2
set -u
if [[ $# -eq 0 ]]; then
  echo "error: nothing to submit; for example: bash slurm/submit.sh --nodes=1 slurm/train.sbatch experiment=tiny" >&2
  exit 2
fi
arguments=()
for argument in "$@"; do
  if [[ -n ${GPU_TYPE:-} && $argument =~ ^--gpus-per-node=[0-9]+$ ]]; then
    argument="--gpus-per-node=$GPU_TYPE:${argument#*=}"
  fi
  arguments+=("$argument")
done
# The jobs need what this shell and the site's file have set, also where SBATCH_EXPORT says otherwise.
exec sbatch --export=ALL ${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} "${arguments[@]}"
