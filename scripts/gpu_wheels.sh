#!/usr/bin/env bash
# Fetches what scripts/gpu_check.sh needs beyond torch and the like into a folder, for a GPU machine
# without a network: FlashInfer without its dependencies, and what the tests use.
# Usage: scripts/gpu_wheels.sh [FOLDER] [PYTHON_VERSION]     default: gpu-wheels 3.12
set -euo pipefail
folder=${1:-gpu-wheels}
version=${2:-3.12}
fetch() { python3 -m pip download --quiet --no-deps --only-binary :all: --python-version "$version" \
    --platform manylinux2014_x86_64 --platform manylinux_2_28_x86_64 --dest "$folder" "$@"; }
fetch flashinfer-python==0.6.4 apache-tvm-ffi tabulate nvidia-ml-py einops ninja
fetch pytest pluggy iniconfig packaging pygments hypothesis sortedcontainers
fetch gguf psutil rich markdown-it-py mdurl
du -sh "$folder"
