#!/usr/bin/env bash
# Sets everything up and runs the checks: linter, types, tests.
# Usage: scripts/test.sh [--quick]      --quick leaves out what needs the real model or a cluster
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE  # or every process compiles what it imports
bash scripts/setup.sh dev
bin="${BATCHLLM_VENV:-.venv}/bin"

echo "== ruff" && "$bin/ruff" check . && "$bin/ruff" format --check .
types=$(mktemp)
trap 'rm -f "$types"' EXIT
"$bin/mypy" >"$types" 2>&1 &  # it takes a core for half a minute, and is asked after the tests
mypy=$!
# Several processes of one thread each are done sooner than one of several threads. Files are taken
# in order: the long ones are among the integration tests, which come first.
workers=$(nproc)
export OMP_NUM_THREADS=1
several=(-n "$((workers < 4 ? workers : 4))" --dist loadfile --no-loadscope-reorder)
slowest=(--durations 12 --durations-min 5)
if [ "${1:-}" = --quick ]; then
    echo "== quick tests" && "$bin/python" -m pytest -q "${several[@]}"
else
    echo "== tests"
    "$bin/python" -m pytest -q "${several[@]}" "${slowest[@]}" -m "not gpu and not spark and not dask and not ray" \
        --ignore-glob="*/test_spark*" --ignore-glob="*/test_dask*" --ignore-glob="*/test_ray*"
    echo "== clusters"
    "$bin/python" -m pytest -q "${slowest[@]}" -m "spark or dask or ray" tests/integration/test_{spark,dask,ray}*.py
fi
echo "== mypy" && { wait "$mypy" || { cat "$types"; exit 1; }; } && cat "$types"
