#!/usr/bin/env bash
# Everything that needs a GPU, in one call of less than ten minutes: compiles the kernels for the
# GPU that is here, runs the tests marked gpu, times attention and the engine, and leaves the results.
# Usage: scripts/gpu_check.sh [RESULTS]     RESULTS: a folder, default $OUT or gpu-results
# Environment: PYTHON (with torch for CUDA; default python3), BATCHLLM_WHEELS (a folder of wheels for
# what that Python lacks, see scripts/gpu_wheels.sh; nothing is fetched)
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-${OUT:-gpu-results}}
python=${PYTHON:-python3}
mkdir -p "$results"
began=$SECONDS
failed=0
say() { echo "== $((SECONDS - began)) s: $*"; }
try() { # a name, and a command whose output is kept under it
    local name=$1 rc; shift
    say "$name"
    "$@" >"$results/$name.log" 2>&1; rc=$?
    tail -n 15 "$results/$name.log"
    [ $rc = 0 ] || { echo "-- $name: exit $rc"; failed=1; }
}

packages=$results/site
if [ -n "${BATCHLLM_WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$packages" \
        "$BATCHLLM_WHEELS"/*.whl >"$results/packages.log" 2>&1 || say "see packages.log"
fi
export PYTHONPATH="$PWD:$packages" PATH="$packages/bin:$PATH"
architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') || {
    echo "torch finds no GPU"; exit 2; }
say "GPU: $("$python" -c 'import torch; print(torch.cuda.get_device_name(), torch.__version__)')"
nvidia-smi >"$results/nvidia-smi.log" 2>&1

# FlashInfer compiles each of its kernels where it is first used, which takes minutes: so its tests
# run from the beginning on, several at once, beside all that is not timed.
declare -A flashinfer
for which in 64 '128 or planned' 'rotation or rms or gate or argmax' 'draws or unusable'; do
    name=flashinfer-${which%% *}
    timeout 300 "$python" -m pytest -q -m gpu tests/gpu/test_flashinfer_on_gpu.py -k "$which" \
        -p no:cacheprovider >"$results/$name.log" 2>&1 &
    flashinfer[$name]=$!
done

export BATCHLLM_CUDA_ARCHITECTURES=$architecture
try build "$python" - <<'PYTHON'
import sys, sysconfig
from pathlib import Path
sys.path.insert(0, "cuda")
import cuda_build
library = Path("batchllm/native") / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
cuda_build.build_library(cuda_build.find_nvcc(), library)
print(library)
PYTHON
suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
try simulator g++ -std=c++17 -O3 -ffp-contract=off -fPIC -shared \
    batchllm/native/src/simulator/simulate.cpp -o "batchllm/native/_simulator$suffix"
try tests timeout 200 "$python" -m pytest -q -m gpu tests/gpu -p no:cacheprovider --durations=10 \
    --ignore tests/gpu/test_flashinfer_on_gpu.py
for name in "${!flashinfer[@]}"; do
    wait "${flashinfer[$name]}" || { echo "-- $name: exit $?"; failed=1; }
    say "$name"; tail -n 5 "$results/$name.log"
done
try attention timeout 150 "$python" scripts/bench_attention.py \
    --out "$results/attention.json" --markdown "$results/attention.md"
left=$((570 - (SECONDS - began)))
try engine timeout "$left" "$python" scripts/bench_gpu.py --seconds $((left - 90)) \
    --out "$results/engine.json" --markdown "$results/engine.md"
rm -rf "$packages"
say "done"
cat "$results"/*.md 2>/dev/null
exit $failed
