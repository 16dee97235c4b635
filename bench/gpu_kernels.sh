#!/usr/bin/env bash
# On a CUDA machine: build, check, then time the kernels at 10,000 and 1,000,000 sentences. Rows go to bench/results/.
#
#   bench/gpu_kernels.sh              # everything
#   REPEATS=20 bench/gpu_kernels.sh   # more timed calls per side
#   DEVICE=cpu bench/gpu_kernels.sh   # a dry run without a GPU: small sizes; rows go to a temporary file, or ROWS
#   TESTS=tests/test_ops.py bench/gpu_kernels.sh   # only these tests before
#
# Needed: an environment with el4ner (BIN, .venv/bin by default; `make setup` makes one) whose torch sees the card.
# el4ner[bench-cuda] brings rivals made for CUDA; without it their rows say that they are missing.
# Every row holds card, driver, versions, commit, achieved TFLOP/s and its share of the measured matmul ceiling.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/gpu_common.sh"
TESTS="${TESTS:-tests/test_triton.py tests/test_ops.py}"
prepare kernels
if [ "$DEVICE" = cuda ]; then
  CHECKED="" TIMED="--backend triton --backend torch" LARGE="--backend triton" FULL=full MILLION=million
  REPEATS="${REPEATS:-11}" FEW=5
else
  CHECKED="--backend ref --backend native --backend numba" TIMED="--backend numba --backend torch"
  LARGE="--backend numba" FULL=small MILLION=small
  REPEATS="${REPEATS:-1}" FEW=1
fi

echo "== build: the native module, and every triton kernel ahead of time (spills fail)"
"$BIN/python" -P -c 'import el4ner._native' || echo "warning: no native module; CPU rows are numba's" >&2
# shellcheck disable=SC2086  # lists of options, here and below
"$BIN/pytest" -q $TESTS

echo "== check: every backend against its reference, on this device"
# shellcheck disable=SC2086
"$BIN/el4ner-bench" kernels --device "$DEVICE" $CHECKED --sizes small --repeats 1

echo "== time: 10,000 sentences and the other operations' goals, then 1,000,000"
# shellcheck disable=SC2086
"$BIN/el4ner-bench" kernels --device "$DEVICE" $TIMED --sizes "$FULL" --repeats "$REPEATS" --json "$OUT"
for op in span_topk choice_logprobs; do
  # shellcheck disable=SC2086
  "$BIN/el4ner-bench" kernels --device "$DEVICE" --op "$op" $LARGE --sizes "$MILLION" --repeats "$FEW" --json "$OUT"
done

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
