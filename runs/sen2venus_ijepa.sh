#!/usr/bin/env bash
# I-JEPA with spatial affinity on Sen2Venus (Sentinel-2 10 m, VENuS 5 m), as in arXiv 2601.12964, on 8 GPUs.
# VARIANT=mr, hr, sa-interp or sa-mse trains the other models of the paper, each to an OUT of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
torchrun --nproc_per_node="${NPROC:-8}" train.py --store "${STORE:-stores/sen2venus}" \
    --out "${OUT:-out/sen2venus-ijepa}" \
    --objective ijepa --variant "${VARIANT:-sa}" --model small --epochs 300 --compile "$@"
