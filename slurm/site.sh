# Everything that differs between clusters. Edit this file or a copy; the scripts in this directory need no change.
#
# Sourced by quack-lm submit and quack-lm sweep submit, and by every job before its first process. They read the file
# that QUACK_SITE names, else slurm/site.sh below the current directory, else the one that comes with the package.

# ---- flags of sbatch, one per line; the flags on the command line come later and win
SBATCH_FLAGS=(
  # --partition=gpu
  # --account=my_project
  # --qos=normal
  # --constraint=h100
  # --mail-type=FAIL,END
  # --mail-user=me@example.org
)
# On a cluster with several types of GPU, the one that --gpus-per-node=N means: h100, a100 ...
GPU_TYPE=""

# ---- modules and environments that a job needs before Python starts
# module load cuda/12.8
# source "$HOME/quack_lm/.venv/bin/activate"

# ---- the Python command of the jobs: by default the interpreter that submits
PYTHON=("${QUACK_PYTHON:-python}")
# PYTHON=(python) # of the environment activated above
# PYTHON=(apptainer exec --nv "$HOME/quack_lm.sif" python)
# In a container without slurm's commands, export MASTER_ADDR as well.

# ---- submit without checking the settings first, where Python cannot run on login nodes
# QUACK_PREFLIGHT=no

# ---- storage for caches that would fill the home directory
SCRATCH=""
# SCRATCH="/scratch/$USER"
if [[ -n $SCRATCH ]]; then
  export HF_HOME="$SCRATCH/huggingface" WANDB_CACHE_DIR="$SCRATCH/wandb" TRITON_CACHE_DIR="$SCRATCH/triton"
  export TORCHINDUCTOR_CACHE_DIR="$SCRATCH/torchinductor"
fi

# ---- the network interface, where NCCL or gloo does not find the right one
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# ---- a failed job (not one with an error in its settings) is requeued if it ran this long and was restarted fewer times
# than this; restarts after time limits and preemptions count, too
RETRY_AFTER_S=600
MAX_RESTARTS=20
