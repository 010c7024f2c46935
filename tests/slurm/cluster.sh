#!/usr/bin/env bash
# A Slurm cluster of this one machine, for tests: cluster.sh start FOLDER | cluster.sh stop FOLDER.
# Needs root, and Debian's packages slurmctld, slurmd, slurm-client and munge. Its files and ports are its own; SLURM_CONF=FOLDER/slurm.conf reaches it.
# Snakemake's executor drops variables named SLURM_* inside of jobs, as these are inherited from an outer job: srun there reads /etc/slurm/slurm.conf, which is a link to ours while the cluster is up.
set -euo pipefail
action=$1 folder=$2
system=/etc/slurm/slurm.conf
stop() { [ "$(readlink $system 2>/dev/null)" != "$folder/slurm.conf" ] || rm "$system"; for f in slurmd slurmctld munged; do [ ! -f "$folder/$f.pid" ] || kill "$(cat "$folder/$f.pid")" 2>/dev/null || true; done; }
[ "$action" = start ] || { stop; exit 0; }
mkdir -p "$folder"/{state,spool} && chmod 700 "$folder"
node=$(hostname -s)
dd if=/dev/urandom of="$folder/key" bs=1 count=1024 status=none && chmod 600 "$folder/key"
cat > "$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmctldPort=17817
SlurmdPort=17818
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
MinJobAge=3600
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$(awk '/MemTotal/ {print int($2 / 1024 * .9)}' /proc/meminfo) State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF="$folder/slurm.conf"
mkdir -p /etc/slurm && ln -s "$folder/slurm.conf" "$system" || { echo "$system is there: another Slurm is set up on this machine" >&2; exit 1; }
munged --force --key-file="$folder/key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/seed"
slurmctld && slurmd -N "$node"
for _ in $(seq 40); do [ "$(sinfo -h -o %T 2>/dev/null)" != idle ] || exit 0; sleep .5; done
echo "the node did not become idle:" >&2; sinfo >&2 || true; tail -5 "$folder"/*.log >&2; stop; exit 1
