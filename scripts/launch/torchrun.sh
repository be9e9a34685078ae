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
# which then save, however long that takes. The exit status is 75 where the run is not finished and the same command
# goes on: torchrun's own is 1 then, so the processes make a file that tells it.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
PATH="$PWD/.venv/bin:$PATH"
MOC_UNFINISHED="$(mktemp -u)"
export MOC_UNFINISHED

told=""
for signal in TERM INT USR1; do
    # shellcheck disable=SC2064  # the value of now is meant
    trap "told=$signal" "$signal"
done
# torchrun itself must hear none of them: it would kill the processes 30 seconds later, in the middle of a save, and
# leave them at the second signal, which Slurm sends to all that it finds.
(
    trap '' TERM INT USR1
    exec torchrun --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-gpu}" \
        --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv-id "${RUN_ID:-moc}" \
        --signals-to-handle SIGQUIT train.py "$@"
) &
child=$!
processes() { # those that torchrun has started; slim containers have neither ps nor pkill
    grep -ls "^PPid:[[:space:]]*$child\$" /proc/[0-9]*/status | cut -d / -f 3
}
wait "$child"
status=$?
while [ "$told" ] && kill -0 "$child" 2>/dev/null; do # again and again, since a process that starts hears nothing yet
    for process in $(processes); do
        kill "-$told" "$process" 2>/dev/null
    done
    sleep 1
done
if [ "$told" ]; then
    wait "$child"
    status=$?
fi
if [ -e "$MOC_UNFINISHED" ]; then
    rm -f "$MOC_UNFINISHED"
    exit 75
fi
exit "$status"
