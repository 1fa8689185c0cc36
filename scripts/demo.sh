#!/usr/bin/env bash
# Sets everything up and answers the example table with the default model.
# Usage: scripts/demo.sh [more options of `batchllm run`]
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE  # or every process compiles what it imports
bash scripts/setup.sh run

batchllm="${BATCHLLM_VENV:-.venv}/bin/batchllm"
output=${BATCHLLM_DEMO_OUTPUT:-example-answers.parquet}
prompt=(--template $'{{ text }}\n\n{{ question }}')

echo "== what the rows share (batchllm plan)"
"$batchllm" plan datasets/example.parquet "${prompt[@]}"
echo
echo "== answering them (batchllm run)"
"$batchllm" run datasets/example.parquet "$output" "${prompt[@]}" --max-tokens 48 "$@"
echo
echo "== the first answers in $output"
"${BATCHLLM_VENV:-.venv}/bin/python" - "$output" <<'PY'
import sys

import pyarrow.parquet as pq

for row in pq.read_table(sys.argv[1]).slice(0, 5).to_pylist():
    print(f"{row['section']}: {row['question']}\n    {' '.join((row['answer'] or '').split())[:150]}")
PY
