#!/usr/bin/env bash
# A slurm cluster for the tests: two nodes on this one machine, with GPUs that are only counted and a partition that
# preempts the other. As root, from Debian's slurmctld, slurmd, slurm-client and munge.
#
#   slurm_cluster.sh start DIR PORT    all state in DIR; PORT for the controller, the next ones for the nodes
#   slurm_cluster.sh stop DIR          end what it started, and only that; the directory stays
#   slurm_cluster.sh install           the packages, where they are missing
#
# Clients find it by SLURM_CONF=DIR/slurm.conf.
set -euo pipefail
NODES="q1 q2" CPUS=8 GPUS=4

install_packages() {
  type slurmctld slurmd sbatch munged >/dev/null 2>&1 && return
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
}

# The process of a pid file, if it is alive and still the program that we started.
pid_of() {
  local pid
  pid=$(cat "$DIR/$1.pid" 2>/dev/null) && [[ $(cat "/proc/$pid/comm" 2>/dev/null) == "$2" ]] && echo "$pid"
}

write_config() {
  local host memory port=$PORT node gpu
  host=$(hostname -s)
  memory=$(awk '/MemTotal/ {print int($2 / 4096)}' /proc/meminfo)
  mkdir -p "$DIR/state" "$DIR/run" "$DIR/log"
  chmod 755 "$DIR"
  (umask 077 && head -c 1024 /dev/urandom >"$DIR/munge.key")
  cat >"$DIR/slurm.conf" <<CONF
ClusterName=quack
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$PORT
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/run/munge.socket
CredType=cred/munge
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/spool.%n
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/%n.pid
SlurmctldLogFile=$DIR/log/slurmctld.log
SlurmdLogFile=$DIR/log/%n.log
# Without cgroups and systemd, as in a container.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
# More cores than the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
# Schedule at once: a test waits for every second.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=10000,bf_interval=1,bf_min_age_reserve=0,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=30
InactiveLimit=0
MinJobAge=86400
# The rendezvous ports of ranks, 10000 to 30000, follow from a job's number, and test processes beside each other have a
# cluster each.
FirstJobId=$((PORT * 100))
# Small, so that a sweep of a few runs has to be split.
MaxArraySize=4
CONF
  for node in $NODES; do
    port=$((port + 1))
    mkdir -p "$DIR/spool.$node"
    echo "NodeName=$node NodeHostname=$host NodeAddr=127.0.0.1 Port=$port CPUs=$CPUS RealMemory=$memory Gres=gpu:$GPUS"
    for ((gpu = 0; gpu < GPUS; gpu++)); do
      # A GPU must be a character device: another name for /dev/null.
      [[ -c $DIR/run/$node-gpu$gpu ]] || mknod -m 666 "$DIR/run/$node-gpu$gpu" c 1 3
    done
    echo "NodeName=$node Name=gpu File=$DIR/run/$node-gpu[0-$((GPUS - 1))]" >>"$DIR/gres.conf"
  done >>"$DIR/slurm.conf"
  echo "PartitionName=main Nodes=ALL Default=YES PriorityTier=1 State=UP" >>"$DIR/slurm.conf"
  echo "PartitionName=urgent Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP" >>"$DIR/slurm.conf"
  # Preempted jobs get their signal at once, and this long before slurm itself ends them.
  echo "PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=120 State=UP" >>"$DIR/slurm.conf"
}

start() {
  local node tries
  write_config
  munged --force --key-file="$DIR/munge.key" --socket="$DIR/run/munge.socket" --pid-file="$DIR/munged.pid" \
    --log-file="$DIR/log/munged.log" --seed-file="$DIR/run/munged.seed" --num-threads=2 2>>"$DIR/log/start.log"
  slurmctld -f "$DIR/slurm.conf" </dev/null >>"$DIR/log/start.log" 2>&1
  for node in $NODES; do
    slurmd -N "$node" -f "$DIR/slurm.conf" </dev/null >>"$DIR/log/start.log" 2>&1
  done
  for ((tries = 0; tries < 100; tries++)); do
    [[ $(timeout 5 sinfo -h -N -p main -t idle -o %N 2>/dev/null | wc -l) -eq 2 ]] && return
    sleep 0.1
  done
  echo "the nodes did not come up:" >&2
  tail -n 5 "$DIR"/log/*.log >&2
  return 1
}

stop() {
  local daemon pid tries
  if pid_of slurmctld slurmctld >/dev/null; then
    timeout 15 scancel --quiet --user=root 2>/dev/null || true
    for ((tries = 0; tries < 100; tries++)); do
      [[ -z $(timeout 15 squeue -h 2>/dev/null) ]] && break
      sleep 0.1
    done
  fi
  for daemon in q1:slurmd q2:slurmd slurmctld:slurmctld munged:munged; do
    pid=$(pid_of "${daemon%%:*}" "${daemon##*:}") && kill "$pid"
  done
  return 0
}

DIR=${2:-}
PORT=${3:-}
export SLURM_CONF=$DIR/slurm.conf
case "$1" in
  install) install_packages ;;
  start) start ;;
  stop) stop ;;
  *) echo "start DIR PORT | stop DIR | install" >&2; exit 2 ;;
esac
