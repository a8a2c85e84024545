#!/usr/bin/env bash
# Four nodes of 8 GPUs without a batch system: the same line on each node, started in any order.
#     HEAD=node-1 runs/nodes.sh --store stores/rapidai4eo --objective ijepa --variant sa
# One node of 8 GPUs, in the same words:
#     NODES=1 runs/nodes.sh --store stores/rapidai4eo --objective ijepa --variant sa
# A rank that dies brings the job back by itself, from the last checkpoint. Where a whole node was
# lost, the same line on all nodes goes on. Each GPU holds all weights (DDP): up to ViT-H, which
# takes 12.6 GB with its gradients, EMA and AdamW's moments; --checkpoint-activations helps beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
nodes=${NODES:-4}
[ "$nodes" = 1 ] || : "${HEAD:?the name of one of the nodes, the same on all}"
# torchrun keeps what dead ranks said in a store that all restarts share, where the next ones would
# look for each other; so each restart is to make its own
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
torchrun --nnodes="$nodes" --nproc_per_node="${NPROC:-8}" --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="${HEAD:-localhost}:${PORT:-29500}" \
    --rdzv-id="${JOB:-crossscale}" --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 \
    --shutdown-timeout=120 train.py --out "${OUT:-out/nodes}" "$@"
