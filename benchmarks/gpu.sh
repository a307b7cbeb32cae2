#!/usr/bin/env bash
# All tests and measurements that need a GPU, in under nine minutes, into one file, one table and one picture:
#
#     benchmarks/gpu.sh [RESULTS.json]          by default benchmarks/results/gpu.json, gpu.md, gpu.png
#     benchmarks/gpu.sh --dry-run [RESULTS.json]          every step on the CPU, with tiny sizes and Triton's interpreter
#
# Compiles all Triton kernels on all cores; tests of the GPU kernels; the scan's times beside their lower bounds; the
# layers beside their formulas; LaMamba-XL beside DiT-XL/2 (forward at 256 to 2048 pixels, a training step at 256, peak
# memory, a profile by kernel). It needs no network and no installation of this package, but torch 2.11 with its triton,
# numpy, scipy, matplotlib, pillow, tqdm, safetensors, huggingface_hub and pytest, and these, of which wheels can be
# carried (pip download --no-deps --only-binary=:all: NAMES; pip install --no-index --no-deps *.whl):
#
#     diffusers tyro docstring-parser pydantic pydantic-core annotated-types typing-inspection typing-extensions
#
# With pytest-xdist the tests run in parallel. What is missing is said in one line, with status 2. Without a GPU it prints
# that and exits with status 0. A step that fails or runs out of time does not stop the others, and what it has measured
# by then is in the file; the status is then 1. Where the checkout has no .git, LAMAMBA_COMMIT may name the commit.
set -u
cd "$(dirname "$0")/.." || exit 1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
PYTHON="${PYTHON:-$(command -v python || command -v python3)}"

if [[ " $* " == *" --dry-run "* ]]; then
    export CUDA_VISIBLE_DEVICES=
elif ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no GPU that torch can use here: nothing was measured"
    exit 0
fi
exec "$PYTHON" benchmarks/gpu.py "$@"
