#!/usr/bin/env bash
# Trains on this host, together with the others on which the same command runs.
#
#   NODES=2 HEAD=host0 scripts/launch/torchrun.sh experiment=NAME data.path=PREPARED
#
# NODES      how many hosts there are (1)
# HEAD       one of them, which all reach by this name (localhost)
# PORT       a free port of that one (29500)
# RUN_ID     a name that the hosts of one launch share (moc)
# PROCESSES  how many processes this host starts: a number, or gpu, one for each GPU (gpu)
#
# Hosts mount the same outputs and data at the same place. SIGTERM, SIGUSR1 and SIGINT are handed on to every process,
# which then save. The exit status is 75 where the run is not finished and the same command goes on: torchrun's own is 1
# then, so the processes make a file that tells it.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
PATH="$PWD/.venv/bin:$PATH"
MOC_UNFINISHED="$(mktemp -u)"
export MOC_UNFINISHED

torchrun --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-gpu}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv-id "${RUN_ID:-moc}" \
    --signals-to-handle SIGTERM,SIGINT,SIGUSR1 train.py "$@" &
child=$!
for signal in TERM INT USR1; do
    # shellcheck disable=SC2064  # the values of now are meant
    trap "kill -$signal $child 2>/dev/null" "$signal"
done
wait "$child"
status=$?
while [ "$status" -gt 128 ] && kill -0 "$child" 2>/dev/null; do # a signal ended the wait, not the child
    wait "$child"
    status=$?
done
if [ -e "$MOC_UNFINISHED" ]; then
    rm -f "$MOC_UNFINISHED"
    exit 75
fi
exit "$status"
