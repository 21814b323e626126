#!/usr/bin/env bash
# usage: train_torchrun.sh CONFIG [section.key=value ...]
#
# Starts this node's ranks of a run with torchrun, as the other nodes do with the same command.
# Ranks that fail are started again, on every node, and go on from the last checkpoint. On SIGUSR1 or SIGTERM the ranks
# finish their outer step, save and stop, and this ends with exit status 75. (docs/cluster.md)
#
#     NNODES=2                          nodes (1)
#     NPROC_PER_NODE=8                  ranks of each (the GPUs that nvidia-smi lists)
#     MASTER_ADDR=10.0.0.1              where nodes meet: an address of the first one (localhost)
#     MASTER_PORT=29500
#     NODE_RANK=0                       of this node: a fixed place (static). Unset: nodes find each other (elastic)
#     RUN_ID=run                        elastic: the same name on every node
#     LOCAL_ADDR=10.0.0.1               this node's own address, where its host name does not lead to it
#     MAX_RESTARTS=3                    starts after the first one, at most
#     PYTHON=.venv/bin/python           of the trainer's environment
set -euo pipefail
usage() { sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; }
case ${1:---} in
-h | --help) usage && exit ;;
-*) usage >&2 && exit 2 ;;
esac

PYTHON=${PYTHON:-.venv/bin/python}
NNODES=${NNODES:-1}
MASTER_ADDR=${MASTER_ADDR:-localhost}
MASTER_PORT=${MASTER_PORT:-29500}
NPROC_PER_NODE=${NPROC_PER_NODE:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
[ "$NPROC_PER_NODE" -gt 0 ] || { echo "error: no GPU is seen here: set NPROC_PER_NODE" >&2; exit 2; }

how=(--nnodes "$NNODES" --nproc-per-node "$NPROC_PER_NODE" --max-restarts "${MAX_RESTARTS:-3}")
if [ -n "${NODE_RANK:-}" ]; then
    how+=(--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
else
    how+=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "${RUN_ID:-run}")
    if [ -n "${LOCAL_ADDR:-}" ]; then # else torchrun asks the host name whether this is the node that the others meet at
        how+=(--rdzv-conf "is_host=$([ "$LOCAL_ADDR" = "$MASTER_ADDR" ] && echo true || echo false)")
    fi
fi
[ -z "${LOCAL_ADDR:-}" ] || how+=(--local-addr "$LOCAL_ADDR")

# torchrun dies of SIGUSR1, and of SIGTERM it kills the ranks after a while. So it ignores the one (its ranks do not),
# and is sent none: both are passed to the ranks themselves.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
(
    trap '' USR1
    exec "$PYTHON" -m torch.distributed.run "${how[@]}" -m megatron_gspo.cli train "$@" train.resume=true train.overwrite=false
) &
torchrun=$!

stopped=
stop() {
    stopped=1
    for rank in $(cat "/proc/$torchrun/task/$torchrun/children"); do
        kill -USR1 "$rank" || true
    done
}
trap stop USR1 TERM

status=0
while true; do # a signal ends `wait`, not what it waits for
    wait "$torchrun" && status=0 || status=$?
    kill -0 "$torchrun" 2>/dev/null || break
done
[ -z "$stopped" ] || [ "$status" != 0 ] || exit 75
exit "$status"
