#!/bin/bash
# One node of a run. train.slurm starts it on every node; without a scheduler, for one node and on every one of several (NODE
# counts from 0):
#
#   bash examples/cluster/node.sh --config node_8gpu
#   MASTER_ADDR=host0 MASTER_PORT=29500 NODES=2 NODE=0 bash examples/cluster/node.sh --config node_8gpu groups.conditions=32
#
# Ends with 0 (done), 75 (stopped by SIGTERM after a checkpoint: start it again) or an error; always continues from the newest
# checkpoint that is whole.
set -u
. "$(dirname "${BASH_SOURCE[0]}")/finish.sh"
python=${PYTHON:-python}
node=${NODE:-${SLURM_NODEID:-0}}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}

run=
stopped=
# To the ranks: they finish the iteration, write a checkpoint and end with 75. Before torchrun has any, to what there is.
stop() {
    stopped=1
    [ -z "$run" ] || pkill -TERM -P "$run" || kill -TERM -- "-$run" 2>/dev/null || kill -TERM "$run" 2>/dev/null
}
trap stop TERM

# Every rank holds clips, shards and sockets open; page-locked memory (levers.streaming=host, scoring.take_turns) is locked.
ulimit -n "$(ulimit -Hn)"
ulimit -l unlimited 2>/dev/null || echo "node $node: at most $(ulimit -l) kB may be locked; levers.streaming=host needs more" >&2
ulimit -c 0 # a crash of eight ranks would write eight core files of the whole memory

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-8}
# Compilers write thousands of small files: to a local disk, one place for all ranks of the node, kept between restarts.
cache=${GEOALIGN_COMPILER_CACHE:-${TMPDIR:-/tmp}/geoalign-$(id -un)}
export TORCHINDUCTOR_CACHE_DIR=$cache/inductor TRITON_CACHE_DIR=$cache/triton TORCH_EXTENSIONS_DIR=$cache/extensions
export CUDA_CACHE_PATH=$cache/cuda PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
mkdir -p "$TORCHINDUCTOR_CACHE_DIR" "$TRITON_CACHE_DIR" "$TORCH_EXTENSIONS_DIR" "$CUDA_CACHE_PATH"
# train.rank_timeout_s decides how long ranks wait for each other, and ends them with a message. NCCL's own watchdog must be
# more patient than that: compilation and graph capture of the first iteration look like a hang to it.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=${TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC:-7200}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # NCCL_SOCKET_IFNAME=eth0 where a node has several networks

# Fixed places instead of elastic ones: a run has a fixed number of ranks, and rank 0 (log, checkpoints) is on the first node.
# In a session of its own: a signal to this task must not reach torchrun, which gives its ranks half a minute and kills them.
setsid "$python" -m torch.distributed.run --nnodes="${NODES:-1}" --node-rank="$node" --nproc-per-node="$gpus" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" --master-port="${MASTER_PORT:-29500}" --rdzv-conf=timeout=900 --max-restarts=0 \
    -m geoalign train "$@" --resume auto &
run=$!
[ -z "$stopped" ] || stop # the signal came before there was anything to pass it on to
finish "$run"
code=$?
[ "$code" -ne 0 ] && [ -n "$stopped" ] && exit 75 # torchrun turns every failure of a rank into 1
exit "$code"
