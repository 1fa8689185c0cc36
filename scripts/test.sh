#!/usr/bin/env bash
# Sets everything up and runs the checks: linter, types, tests (quick ones, then slow ones).
# Usage: scripts/test.sh [--quick]      --quick leaves out what needs the real model
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
bin="${BATCHLLM_VENV:-.venv}/bin"

echo "== ruff" && "$bin/ruff" check . && "$bin/ruff" format --check .
echo "== mypy" && "$bin/mypy"
echo "== quick tests" && "$bin/python" -m pytest -q
if [ "${1:-}" != --quick ]; then
    echo "== slow tests" && "$bin/python" -m pytest -q -m "slow and not gpu"
fi
