#!/usr/bin/env bash
# On a CUDA machine: build, check, then time the kernels at 10,000 and 1,000,000 sentences. Rows go to bench/results/.
#
#   bench/gpu_kernels.sh              # everything
#   REPEATS=20 bench/gpu_kernels.sh   # more timed calls per side
#   DEVICE=cpu bench/gpu_kernels.sh   # a dry run without a GPU: small sizes, rows go to a temporary file
#
# Needed: an environment with el4ner (BIN, .venv/bin by default; `make setup` makes one) whose torch sees the card.
# Every row holds card, driver, versions, commit, achieved TFLOP/s and its share of the measured matmul ceiling.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/gpu_common.sh"
REPEATS="${REPEATS:-11}"
prepare kernels

echo "== build: the native module, and every triton kernel ahead of time (spills fail)"
"$BIN/python" -c 'import el4ner._native' || echo "warning: no native module; CPU rows are numba's" >&2
"$BIN/pytest" -q tests/test_triton.py tests/test_ops.py

echo "== check: every backend against its reference, on this device"
"$BIN/el4ner-bench" kernels --device "$DEVICE" --sizes small --repeats 1

echo "== time: 10,000 sentences and the other operations' goals, then 1,000,000"
if [ "$DEVICE" = cuda ]; then
  "$BIN/el4ner-bench" kernels --device cuda --backend triton --backend torch --sizes full --repeats "$REPEATS" --json "$OUT"
  for op in span_topk choice_logprobs; do
    "$BIN/el4ner-bench" kernels --device cuda --op "$op" --backend triton --sizes million --repeats 5 --json "$OUT"
  done
else
  "$BIN/el4ner-bench" kernels --device cpu --sizes small --repeats 1 --json "$OUT"
fi

echo "== rows"
"$BIN/python" - "$OUT" <<'PYTHON'
import json
import sys

for line in open(sys.argv[1], encoding="utf-8"):
    row = json.loads(line)
    if row["roofline"]:
        print(row["op"], row["size"], row["backend"], f"{row['timing']['median_s'] * 1e3:.2f} ms", row["roofline"])
PYTHON
echo "written: $OUT"
