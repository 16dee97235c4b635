#!/usr/bin/env bash
# On a CUDA machine: three models of published sizes with random weights on one card (Qwen2.5-14B, Phi-4 14B, GLM-4 9B;
# bfloat16, 37B parameters): the memory plan, choices by hand and by the engine, the whole pipeline by a plain script and
# by el4ner. Rows go to bench/results/.
#
#   bench/gpu_engine.sh                     # everything
#   SENTENCES=30 BLOCKS=5 bench/gpu_engine.sh
#   DATA=/path/to/wnut17 bench/gpu_engine.sh   # sentences of a folder with train.jsonl and test.jsonl
#   SIZES=tiny bench/gpu_engine.sh          # a dry run: tiny models of the same architectures
#   DEVICE=cpu bench/gpu_engine.sh          # a dry run without a GPU: tiny models; rows go to a temporary file, or ROWS
#
# Needed: an environment with el4ner and the embedded models (BIN, .venv/bin by default; `make setup` makes one) whose
# torch sees the card. The weights are made on the card from configurations written here; nothing is fetched.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/gpu_common.sh"
DATA="${DATA:-}"

prepare engine
DTYPE=bfloat16
if [ "$DEVICE" != cuda ]; then
  DTYPE=float32
  SIZES="${SIZES:-tiny}"
fi
case "${SIZES:-published}" in
  published)
    MODELS="qwen2.5-14b phi-4-14b glm-4-9b"
    SENTENCES="${SENTENCES:-30}" BLOCKS="${BLOCKS:-3}" LOOP=12 NEW_TOKENS=64 SPANS=6 ;;
  tiny)
    MODELS="tiny-qwen2 tiny-phi3 tiny-glm4"
    SENTENCES="${SENTENCES:-1}" BLOCKS="${BLOCKS:-1}" LOOP=1 NEW_TOKENS=8 SPANS=1
    OUT="${ROWS:-$(mktemp -t el4ner-engine-XXXXXX)}" ;; # numbers of tiny models are no results
  *)
    echo "error: SIZES=$SIZES; choose published or tiny" >&2
    exit 2 ;;
esac
# In bfloat16 the pipeline rounds otherwise than one prompt at a time: its parity is checked in float32 with a small
# model, and then three large ones are timed with --no-check; their rows say how many entities differ.
PARTS="--set stack.min_sentences=100000 --set verify.enabled=true --set extract.max_new_tokens=$NEW_TOKENS"

echo "== plan: predicted before anything is loaded"
CONFIGS="$(mktemp -d)"
trap 'rm -rf "$CONFIGS"' EXIT
MEMBERS=""
# shellcheck disable=SC2086  # a list of names
"$BIN/python" -P -c 'import sys
from el4ner.bench.random_models import shape_config
for name in sys.argv[2:]:
    shape_config("random:" + name).save_pretrained(f"{sys.argv[1]}/{name}")' "$CONFIGS" $MODELS
for name in $MODELS; do MEMBERS="$MEMBERS --members $name=$CONFIGS/$name"; done
# shellcheck disable=SC2086  # a list of options
"$BIN/el4ner" plan $MEMBERS --device "$DEVICE" --dtype "$DTYPE" --json | tee /dev/stderr \
  | "$BIN/python" -c 'import json, sys
print(json.dumps({"what": "plan", **json.load(sys.stdin)}))' >> "$OUT"

echo "== choices: a loop, batches of full prompts, the engine; answers checked first"
SOURCES=""
for name in $MODELS; do SOURCES="$SOURCES --source random:$name"; done
# shellcheck disable=SC2086  # lists of options
"$BIN/el4ner-bench" engine $SOURCES --device "$DEVICE" --dtype "$DTYPE" --shape --loop-requests "$LOOP" \
  --blocks "$BLOCKS" --json "$OUT"
# shellcheck disable=SC2086
"$BIN/el4ner-bench" engine $DATA $SOURCES --device "$DEVICE" --dtype "$DTYPE" --sentences "$SENTENCES" \
  --spans "$SPANS" --loop-requests "$LOOP" --rows 32 --blocks "$BLOCKS" --json "$OUT"

echo "== the whole pipeline, checked in float32"
# shellcheck disable=SC2086
"$BIN/el4ner-bench" pipeline $DATA --members a=random:tiny --device "$DEVICE" --dtype float32 --sentences 1 --blocks 1 \
  $PARTS --set extract.max_new_tokens=8

echo "== the whole pipeline, three models on one card; random weights answer alike or not at all, so entities may differ"
MEMBERS=""
for name in $MODELS; do MEMBERS="$MEMBERS --members $name=random:$name"; done
# shellcheck disable=SC2086
"$BIN/el4ner-bench" pipeline $DATA $MEMBERS --device "$DEVICE" --dtype "$DTYPE" --sentences "$SENTENCES" \
  --blocks "$BLOCKS" $PARTS --no-check --json "$OUT"

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
