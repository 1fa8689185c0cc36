#!/usr/bin/env bash
# Builds the text workloads (datasets/README.md) into .bench/data; what is there already is kept.
# Needs pip, apt-get and dpkg, but no root: Debian packages are unpacked, not installed.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${BATCHLLM_VENV:-.venv}/bin/python"
out=.bench/data
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

missing() { [ ! -f "$out/$1.parquet" ]; }

if missing tools || missing fewshot; then
    "$python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$scratch" \
        bfcl-eval==2026.3.23 lm-eval==0.4.13
    "$python" datasets/tools.py "$scratch"/bfcl_eval-*.whl "$out/tools.parquet" --set live_multiple
    "$python" datasets/fewshot.py "$scratch"/lm_eval-*.whl "$out/fewshot.parquet"
fi
if missing documents; then
    (cd "$scratch" && apt-get -qq download bible-kjv bible-kjv-text jargon-text miscfiles)
    for package in "$scratch"/*.deb; do dpkg -x "$package" "$scratch/root"; done
    found() { find "$scratch/root" -type f -name "$1" | head -1; }
    "$(found bible)" -p "$(dirname "$(found bible.data)")" -l9999 'Gen1:1-Rev22:21' \
        </dev/null >"$scratch/kjv.txt"
    "$python" datasets/documents.py "$out/documents.parquet" --bible "$scratch/kjv.txt" \
        --jargon "$(found jargon.txt.gz)" --constitution "$(found us-constitution.gz)"
fi
if missing movies; then "$python" datasets/table.py "$out/movies.parquet" --kind movies; fi
