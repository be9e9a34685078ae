#!/usr/bin/env bash
# Trains on hosts of a Slurm cluster, and goes on when its time is over or another job takes its place.
#
#   sbatch --nodes 4 scripts/launch/slurm.sh experiment=NAME data.path=PREPARED name=mine
#
# What is asked for below is a host of 8 GPUs; options before the script say otherwise. PROCESSES is as in torchrun.sh,
# by default the GPUs that Slurm gives a host.
# Slurm sends SIGUSR1 five minutes before the end, and SIGTERM where the job is preempted: the run saves and ends with
# status 75, on which the job is put into the queue again. Any other status ends it, and so does scancel, which gives the
# run KillWait (30 seconds, unless the cluster says otherwise) to save. A host that fails is Slurm's own matter
# (--requeue).
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
export HEAD NODES="$SLURM_JOB_NUM_NODES" RUN_ID="$SLURM_JOB_ID" PROCESSES="${PROCESSES:-${SLURM_GPUS_ON_NODE:-gpu}}"
export PORT="$((20000 + SLURM_JOB_ID % 10000))"       # jobs that share a host have ports of their own
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}" # srun takes one CPU for each task unless it is told
trap : TERM                                           # the run is told as well; this script waits for it

srun --kill-on-bad-exit=0 "$SLURM_SUBMIT_DIR/scripts/launch/torchrun.sh" "$@"
status=$?
# A job that scancel ends is no longer running here, and would be put into the queue as well.
if [ "$status" -eq 75 ] && [ "$(squeue --noheader --format %T --jobs "$SLURM_JOB_ID")" = RUNNING ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
