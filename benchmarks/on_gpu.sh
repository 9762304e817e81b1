#!/usr/bin/env bash
# A step on a GPU beside the literal one, and the tests that need a card: under five minutes. Without a card it runs small.
#   bash benchmarks/on_gpu.sh [on_gpu.json]
set -euo pipefail
out=$(realpath -m "${1:-on_gpu.json}")
cd "$(dirname "$0")/.."
"${PYTHON:-python3}" benchmarks/on_gpu.py --json "$out"
"${PYTHON:-python3}" -m pytest -q -n 0 -rs tests/test_gpu.py
