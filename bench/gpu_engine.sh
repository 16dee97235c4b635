#!/usr/bin/env bash
# On a CUDA machine: three models of published sizes with random weights on one card (Qwen2.5-14B, Phi-4 14B, GLM-4 9B;
# bfloat16, 37B parameters): the memory plan, choices by hand and by the engine, the whole pipeline by a plain script and
# by el4ner. Rows go to bench/results/.
#
#   bench/gpu_engine.sh                     # everything
#   SENTENCES=30 BLOCKS=5 bench/gpu_engine.sh
#   DATA=/path/to/wnut17 bench/gpu_engine.sh   # sentences of a folder with train.jsonl and test.jsonl
#   DEVICE=cpu bench/gpu_engine.sh          # a dry run without a GPU: tiny models, rows go to a temporary file
#
# Needed: an environment with el4ner and the embedded models (BIN, .venv/bin by default; `make setup` makes one) whose
# torch sees the card. The weights are made on the card from configurations written here; nothing is fetched.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/gpu_common.sh"
BLOCKS="${BLOCKS:-3}"
DATA="${DATA:-}"

prepare engine
if [ "$DEVICE" = cuda ]; then
  DTYPE=bfloat16
  SENTENCES="${SENTENCES:-30}"
  MODELS="qwen2.5-14b phi-4-14b glm-4-9b"
  LOOP=12
else
  DTYPE=float32
  SENTENCES="${SENTENCES:-1}"
  MODELS="tiny"
  BLOCKS=1
  LOOP=1
fi
# In bfloat16 the pipeline rounds otherwise than one prompt at a time: its parity is checked in float32 with a small
# model, and then three large ones are timed with --no-check; their rows say how many entities differ.
PARTS="--set stack.min_sentences=100000 --set verify.enabled=true"

echo "== plan: predicted before anything is loaded"
CONFIGS="$(mktemp -d)"
trap 'rm -rf "$CONFIGS"' EXIT
MEMBERS=""
for name in $MODELS; do
  mkdir -p "$CONFIGS/$name"
  "$BIN/python" -P -c 'import sys
from el4ner.bench.random_models import shape_config
shape_config("random:" + sys.argv[1]).save_pretrained(sys.argv[2])' "$name" "$CONFIGS/$name"
  MEMBERS="$MEMBERS --members $name=$CONFIGS/$name"
done
# shellcheck disable=SC2086  # a list of options
"$BIN/el4ner" plan $MEMBERS --device "$DEVICE" --dtype "$DTYPE"
# shellcheck disable=SC2086
"$BIN/el4ner" plan $MEMBERS --device "$DEVICE" --dtype "$DTYPE" --json | "$BIN/python" -c 'import json, sys
print(json.dumps({"what": "plan", **json.load(sys.stdin)}))' >> "$OUT"

echo "== choices: a loop, batches of full prompts, the engine; answers checked first"
for name in $MODELS; do
  "$BIN/el4ner-bench" engine --source "random:$name" --device "$DEVICE" --dtype "$DTYPE" --shape --loop-requests "$LOOP" \
    --blocks "$BLOCKS" --json "$OUT"
  # shellcheck disable=SC2086
  "$BIN/el4ner-bench" engine $DATA --source "random:$name" --device "$DEVICE" --dtype "$DTYPE" --sentences "$SENTENCES" \
    --loop-requests "$LOOP" --rows 32 --blocks "$BLOCKS" --json "$OUT"
done

echo "== the whole pipeline, checked in float32"
# shellcheck disable=SC2086
"$BIN/el4ner-bench" pipeline $DATA --members a=random:tiny --device "$DEVICE" --dtype float32 --sentences 1 --blocks 1 \
  $PARTS --set extract.max_new_tokens=8

if [ "$DEVICE" = cuda ]; then
  echo "== the whole pipeline, three models on one card; random weights answer alike or not at all, so entities may differ"
  MEMBERS=""
  for name in $MODELS; do MEMBERS="$MEMBERS --members $name=random:$name"; done
  # shellcheck disable=SC2086
  "$BIN/el4ner-bench" pipeline $DATA $MEMBERS --device cuda --dtype "$DTYPE" --sentences "$SENTENCES" --blocks "$BLOCKS" \
    $PARTS --no-check --json "$OUT"
fi

echo "== rows"
"$BIN/python" - "$OUT" <<'PYTHON'
import json
import sys

for line in open(sys.argv[1], encoding="utf-8"):
    row = json.loads(line)
    if row["what"] == "plan":
        print("plan", row["mode"], row["predicted_mib"], "MiB predicted,", row["available_mib"], "free")
    elif row["timing"]:
        per_s = row.get("questions_per_s") or row.get("sentences_per_s")
        print(row["what"], row.get("model", ""), row["side"], f"{row['timing']['median_s']:.3f} s", per_s, "a second",
              row.get("speedup") or "", row.get("roofline") or "", row.get("peak_memory_mib") or "")
PYTHON
echo "written: $OUT"
