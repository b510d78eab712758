#!/bin/bash
# A SLURM of six nodes on this machine, for the tests:  cluster.sh up | down   (root, Debian; installs what is missing)
#
# Each node is a slurmd of its own, with plain files in the place of GPUs, so that the recipes' --gpus-per-node is
# granted. All files lie in one folder; clients find the cluster by SLURM_CONF=/run/slope-slurm/slurm.conf.
#   main    n1, n2, 4 GPUs each: what the machine can bear at once, the rest waits
#   spot    n3, n4, 2 GPUs each: jobs of the partition `urgent` preempt those here
#   frail   n5, n6, 2 GPUs each: nodes that tests set down
set -euo pipefail

DIR=/run/slope-slurm
export SLURM_CONF=$DIR/slurm.conf
export DEBIAN_FRONTEND=noninteractive
NODES=(n1 n2 n3 n4 n5 n6)

down() {
  local file pid
  for file in "$DIR"/slurmctld.pid "$DIR"/n?.pid "$DIR"/munged.pid; do
    [ -s "$file" ] || continue
    pid=$(cat "$file")  # the daemon removes the file
    kill "$pid" 2>/dev/null || true
    for _ in {1..100}; do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
  done
  rm -rf "$DIR"
}

install_missing() {
  local name missing=
  for name in slurmctld slurmd sbatch munged; do command -v "$name" >/dev/null || missing=1; done
  [ -n "$missing" ] || return 0
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
}

configure() {
  mkdir -p "$DIR/state"
  chmod 755 "$DIR"
  touch "$DIR"/gpu{0..3}
  cat > "$DIR/gres.conf" <<CONF
NodeName=n[1-2] Name=gpu File=$DIR/gpu[0-3]
NodeName=n[3-6] Name=gpu File=$DIR/gpu[0-1]
CONF
  # cred_expire is also how long a requeued job waits before it starts again: 120 seconds if unset. It must exceed what
  # the old processes need to end, or the job is held.
  # MinJobAge keeps finished jobs for `scontrol show job`, as there is no accounting.
  cat > "$SLURM_CONF" <<CONF
ClusterName=slope
SlurmctldHost=$(hostname -s)(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$DIR/munge.socket,cred_expire=30
SlurmctldPort=27817
StateSaveLocation=$DIR/state
SlurmdSpoolDir=$DIR/%n.spool
SlurmctldPidFile=$DIR/slurmctld.pid
SlurmdPidFile=$DIR/%n.pid
SlurmctldLogFile=$DIR/slurmctld.log
SlurmdLogFile=$DIR/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=2
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=0
KillWait=30
MinJobAge=3600
CONF
  local name
  for name in "${NODES[@]}"; do
    local gpus=2; [[ $name = n[12] ]] && gpus=4
    echo "NodeName=$name NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=2781${name#n} CPUs=$gpus Gres=gpu:$gpus"
  done >> "$SLURM_CONF"
  cat >> "$SLURM_CONF" <<CONF
PartitionName=main Nodes=n[1-2] Default=YES
PartitionName=spot Nodes=n[3-4] PriorityTier=1
PartitionName=urgent Nodes=n[3-4] PriorityTier=10 PreemptMode=OFF
PartitionName=frail Nodes=n[5-6]
CONF
}

up() {
  local name
  [ "$(id -u)" = 0 ] || { echo "$0: run it as root" >&2; exit 1; }
  install_missing
  down
  configure
  (umask 077; head -c 128 /dev/urandom > "$DIR/munge.key")
  munged --key-file="$DIR/munge.key" --socket="$DIR/munge.socket" --pid-file="$DIR/munged.pid" \
    --log-file="$DIR/munged.log" --seed-file="$DIR/munge.seed"
  slurmctld
  for name in "${NODES[@]}"; do mkdir "$DIR/$name.spool"; slurmd -N "$name"; done
  for _ in {1..60}; do
    [ "$(sinfo --noheader --Node --states=idle --format=%N | sort -u | wc -l)" = "${#NODES[@]}" ] && return
    sleep 0.5
  done
  echo "$0: not all nodes came up:" >&2
  sinfo >&2
  tail -n 5 "$DIR"/*.log >&2
  exit 1
}

case "${1:-}" in
  up | down) "$1" ;;
  *) echo "usage: $0 up|down" >&2; exit 2 ;;
esac
