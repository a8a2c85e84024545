#!/usr/bin/env bash
# Two nodes of 8 GPUs under Slurm, for as many allocations as the run takes:
#     sbatch runs/slurm.sh --store stores/rapidai4eo --objective ijepa --variant sa
# The same line starts the run, and continues it where the last allocation was taken away. Only the
# first rank's machine needs the folder of --out; all of them need --store.
#SBATCH --job-name=crossscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

out=${OUT:-out/$SLURM_JOB_NAME}
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun keeps what dead ranks said in a store that all restarts share; each is to make its own
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# Slurm sends USR1 to each task, 300 s before the end: torchrun passes it on, and every rank ends
# its step, writes a checkpoint and leaves with 0; the first writes $out/stopped
srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_NNODES" --nproc_per_node=8 --max-restarts=3 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
    --signals-to-handle=SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout=120 \
    train.py --out "$out" "$@" || code=$?  # torchrun itself ends with an error on a signal

if [ -e "$out/stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "${code:-0}"
