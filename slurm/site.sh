# Everything that differs from one cluster to the next. Edit this file only; the scripts beside it need no change.
#
# Read by slurm/submit.sh before submitting, and by every job before its first process. Values that should not be
# committed can go to a copy elsewhere: QUACK_SITE=~/my_site.sh names the file to read instead of this one.

# ---- how jobs are submitted: flags of sbatch, one per line; what is given on the command line comes later and wins
SBATCH_FLAGS=(
  # --partition=gpu
  # --account=my_project
  # --qos=normal
  # --constraint=h100
  # --mail-type=FAIL,END
  # --mail-user=me@example.org
)
# The type of GPU that --gpus-per-node=N means, where the cluster has several: h100, a100 ...
GPU_TYPE=""

# ---- what a job needs before Python runs: modules, an environment
# module load cuda/12.8
# source "$HOME/quack_lm/.venv/bin/activate"

# ---- how Python is called: as it is, or inside a container that has this project's packages
PYTHON=(python)
# PYTHON=(apptainer exec --nv "$HOME/quack_lm.sif" python)
# In a container without slurm's commands, export MASTER_ADDR as well.

# ---- whether slurm/submit.sh looks at the settings before it submits: no where Python cannot run on login nodes
# QUACK_PREFLIGHT=no

# ---- fast storage for caches that would fill a home directory
SCRATCH=""
# SCRATCH="/scratch/$USER"
if [[ -n $SCRATCH ]]; then
  export HF_HOME="$SCRATCH/huggingface" WANDB_CACHE_DIR="$SCRATCH/wandb" TRITON_CACHE_DIR="$SCRATCH/triton"
  export TORCHINDUCTOR_CACHE_DIR="$SCRATCH/torchinductor"
fi

# ---- network, where NCCL or gloo does not find the right one by itself
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# ---- a job that breaks down (not: a mistake in its settings) is queued again if it ran this long and was not restarted
# too often; starts after time limits and preemptions count, too
RETRY_AFTER_S=600
MAX_RESTARTS=20
