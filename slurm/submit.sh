#!/usr/bin/env bash
# sbatch with the settings of slurm/site.sh:
#
#   bash slurm/submit.sh [flags of sbatch] slurm/train.sbatch attention=mla stabilizer=quack
#
# #SBATCH lines cannot read variables, so what differs between clusters is passed as flags from here. A mistake in the
# arguments of train.sbatch or prepare_data.sbatch is told here, not after the wait in the queue (exit code 2).
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
if [[ -z ${PYTHON+set} ]]; then
  echo "error: PYTHON is not set in $QUACK_SITE, and the jobs need it: PYTHON=(python)" >&2
  exit 2
fi

# Which look suits the job, and the number of its ranks, where the flags tell; the later flag wins, as for sbatch.
look=() nodes=1 per_node=1 tasks="" place=.
words=(${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} "${arguments[@]}")
for ((i = 0; i < ${#words[@]}; i++)); do
  case ${words[i]} in
    --*=*) value=${words[i]#*=} ;;
    -[NnD]?*) value=${words[i]#-?} ;;
    *) value=${words[i + 1]:-} ;;
  esac
  case ${words[i]} in
    --wrap | --wrap=*) break ;;
    --chdir | --chdir=* | -D*) place=$value ;;
    --nodes | --nodes=* | -N*) nodes=$value ;;
    --ntasks-per-node | --ntasks-per-node=*) per_node=$value ;;
    --ntasks | --ntasks=* | -n*) tasks=$value ;;
    --ntasks-per-* | --gpus-per-task | --gpus-per-task=*) tasks=any ;;
    train.sbatch | */train.sbatch)
      ranks=any
      if [[ -n $tasks || $nodes$per_node =~ ^[0-9]+$ ]]; then
        ranks=${tasks:-$((10#$nodes * 10#$per_node))}
      fi
      # The job itself reads every byte of the data.
      look=(preflight "ranks=$ranks" data.verify_checksums=false "${words[@]:i+1}")
      break
      ;;
    prepare_data.sbatch | */prepare_data.sbatch)
      look=(prepare --check "${words[@]:i+1}")
      break
      ;;
  esac
done
if [[ ${#look[@]} -gt 0 && ${QUACK_PREFLIGHT:-} != no ]]; then
  code=0
  said=$(cd "$place" && "${PYTHON[@]}" -m quack_lm "${look[@]}" 2>&1) || code=$?
  if [[ $code == 2 ]]; then
    echo "$said" >&2
    echo "nothing is submitted; QUACK_PREFLIGHT=no submits without looking, for what another job makes first" >&2
    exit 2
  elif [[ $code != 0 ]]; then
    echo "$said" | tail -n 3 >&2
    echo "warning: the settings could not be looked at here (exit code $code); submitting as it is" >&2
  fi
fi

# The jobs need what this shell and the site's file have set, also where SBATCH_EXPORT says otherwise.
exec sbatch --export=ALL ${SBATCH_FLAGS[@]+"${SBATCH_FLAGS[@]}"} "${arguments[@]}"
