#!/usr/bin/env bash
# Trains on hosts of a Slurm cluster, and goes on when its time is over or another job takes its place.
#
#   sbatch --nodes 4 scripts/launch/slurm.sh experiment=NAME data.path=PREPARED name=mine
#
# Slurm sends SIGUSR1 five minutes before the end, and SIGTERM where the job is preempted: the run saves and ends with
# status 75, on which the job is put into the queue again. Any other status ends it. A host that fails is Slurm's own
# matter (--requeue). Not tried on a cluster yet.
#SBATCH --job-name=moc
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=USR1@300
set -uo pipefail
HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export HEAD NODES="$SLURM_JOB_NUM_NODES" RUN_ID="$SLURM_JOB_ID" PROCESSES="${SLURM_GPUS_ON_NODE:-gpu}"
trap : TERM # the run is told as well; this script waits for it

srun --kill-on-bad-exit=0 "$SLURM_SUBMIT_DIR/scripts/launch/torchrun.sh" "$@"
status=$?
if [ "$status" -eq 75 ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
