# Read by the scripts for a CUDA machine: the environment, the card, where rows go. Sourced, not run.
#   BIN: the environment's commands (.venv/bin). DEVICE: cuda, or cpu for a dry run. Sets OUT.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
BIN="${BIN:-.venv/bin}"
DEVICE="${DEVICE:-cuda}"

# prepare NAME: check environment and card; rows go to bench/results/NAME-CARD.jsonl, in a dry run to ROWS or a temporary file.
prepare() {
  if [ ! -x "$BIN/el4ner-bench" ]; then
    echo "error: no $BIN/el4ner-bench; run \`make setup\`, or say BIN=/path/to/environment/bin" >&2
    exit 2
  fi
  if [ "$DEVICE" != cuda ]; then
    OUT="${ROWS:-$(mktemp -t "el4ner-$1-XXXXXX")}"
    return
  fi
  "$BIN/python" - <<'PYTHON'
import sys
import torch
if not torch.cuda.is_available():
    sys.exit(f"error: torch {torch.__version__} sees no CUDA device; DEVICE=cpu makes a dry run")
print(torch.cuda.get_device_name(), "capability", torch.cuda.get_device_capability(), "torch", torch.__version__)
PYTHON
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,temperature.gpu --format=csv || true
  OUT="bench/results/$1-$("$BIN/python" -c 'import re, torch
print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower())').jsonl"
}
