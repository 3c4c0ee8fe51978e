# Sourced first by the batch scripts: the site's settings, threads, and who may end the script.

# Slurm runs a copy of the batch script, so its own place says nothing; slurm/submit.sh passes the repository's.
QUACK_SITE=${QUACK_SITE:-$QUACK_ROOT/slurm/site.sh}
source "$QUACK_SITE"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
# Since 22.05 srun takes this only from its own variable.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
fi
# A preemption sends SIGTERM to this shell too, and with it gone slurm would not let the ranks finish their save.
trap : TERM
echo "job ${SLURM_JOB_ID} on ${SLURM_JOB_NODELIST}, start $((${SLURM_RESTART_COUNT:-0} + 1)), $(date -Is)"

# One task per rank: signals reach every rank, exit codes pass through, and when one rank dies the others do not wait.
run_ranks() {
  srun --kill-on-bad-exit=1 "${PYTHON[@]}" "$@"
}
