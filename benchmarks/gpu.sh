#!/usr/bin/env bash
# All tests and measurements that need a GPU, in under nine minutes, into one file:
#
#     benchmarks/gpu.sh [RESULTS.json]          by default benchmarks/results/gpu.json
#
# Tests of the GPU kernels; the scan's times beside their lower bounds; the layers beside their formulas; LaMamba beside
# DiT (forward at 256, 512 and 1024 pixels, a training step at 256); two minutes of bfloat16 training on the digits
# against the CPU's loss. It needs torch and triton, no network, and no installation of this package. Without a GPU it
# prints that and exits with status 0. A step that fails or runs out of time does not stop the others; the status is then
# 1. Where the checkout has no .git, LAMAMBA_COMMIT may name the commit.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON="${PYTHON:-$(command -v python || command -v python3)}"

if ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU that torch can use here: nothing was measured"
    exit 0
fi
exec "$PYTHON" benchmarks/gpu.py "$@"
