#!/usr/bin/env bash
# The check on a machine with an NVIDIA GPU, ten minutes: is it right, does it race, how fast beside PyTorch, how much memory, where does the
# time go. Runs in the root of the checkout, with the bundle that tools/cuda/bundle made in .gpu; needs the driver (CUDA 13) and
# PyTorch for CUDA 13 with numpy and safetensors; no compiler, no network. Every part has its time limit: one that hangs leaves time for the rest.
#
#   OUT=results bash tests/cuda/on_gpu.sh
#
# A rehearsal without a card, on the fake GPU: TINY=1 LIMIT=12 GPU_LIBRARIES=FAKE bash tests/cuda/on_gpu.sh (FAKE: made by
# tests/cuda/build_fakegpu). Numbers come out wrong then: the unit tests and the replays fail.
set -uo pipefail
cd "$(dirname "$0")/../.."
bundle=$PWD/.gpu here=$PWD/tests/cuda out=${OUT:-gpu-results}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
exec > >(tee "$out/log") 2>&1
python=${PYTHON:-python3}
part() { printf '\n=== %s (%s s)\n' "$1" "$SECONDS"; }

part "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
ldd --version | sed -n 1p
"$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/python" "$bundle"/wheels/*.whl
export PYTHONPATH=$work/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
for binary in coffey unit-tests; do
  "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$bundle/$binary.xz" "$work/$binary"
  chmod +x "$work/$binary"
done
coffey=$work/coffey
# CUDA's libraries are those of PyTorch.
nvidia=$("$python" -c 'import importlib.util as u; s = u.find_spec("nvidia"); print(list(s.submodule_search_locations)[0] if s else "")')
export LD_LIBRARY_PATH=${GPU_LIBRARIES:-$nvidia/cu13/lib:$nvidia/cudnn/lib}:${LD_LIBRARY_PATH:-}

quiet=(-s report.endpoint_captions=0 -s report.grid=false -s validation.every=100000 -s checkpoint.every=100000)
quickstart() { # NAME, settings
  local name=$1
  shift
  timeout 60 "$coffey" train -c configs/quickstart.toml -s train.device=cuda:0 -s 'encode.devices=["cuda:0"]' -s "train.output=$work/$name" "${quiet[@]}" "$@" \
    >"$out/$name.log" 2>&1 || { echo "$name: exit code $?"; tail -3 "$out/$name.log"; }
}

part "1. is each operation right? The unit tests of ops, on the card"
COFFEY_TEST_DEVICE=cuda:0 timeout 120 "$work/unit-tests" ops:: >"$out/unit-tests.log" 2>&1
grep -E '^test result|FAILED|panicked|error' "$out/unit-tests.log" | tail -15

part "2. is a step right? Eight audited steps, replayed by PyTorch"
audit() {
  local name=$1
  shift
  quickstart "audit-$name" -s train.max_steps=8 -s "audit.dir=$work/$name.audit" -s audit.steps=8 -s optimizer.learning_rate=1e-6 "$@"
  echo "$name"
  timeout 60 "$python" tests/reference/replay_audit.py "$work/$name.audit" 2>&1 | tail -8
}
audit f32
audit fp16 -s train.mixed_precision=fp16 -s train.teacher_dtype=f16
audit bf16 -s train.mixed_precision=bf16 -s train.teacher_dtype=bf16
audit adamw8bit -s optimizer.kind=adamw8bit

part "3. is it the same twice, to the bit?"
for precision in no fp16; do
  for run in a b; do quickstart "twice-$precision-$run" -s train.max_steps=30 -s train.mixed_precision=$precision; done
  "$python" - "$work/twice-$precision-a" "$work/twice-$precision-b" "$precision" <<'PY'
import json, sys
a, b = ([(r["loss"], r["grad_norm"]) for r in map(json.loads, open(f"{folder}/metrics.jsonl"))] for folder in sys.argv[1:3])
different = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
print(sys.argv[3], f"{len(a)} steps:", "the same" if different is None and len(a) == len(b) else f"DIFFERENT from step {different + 1 if different is not None else 'count'}")
PY
done

part "4. PyTorch and diffusers at Stable Diffusion 1.5's size"
timeout 130 "$python" "$here/pytorch_step.py" ${TINY:+--tiny --batch 2 --steps 3} 2>&1 | grep '^{' | tee "$out/pytorch.jsonl"

part "5. coffey at Stable Diffusion 1.5's size"
if [ -n "${TINY:-}" ]; then random=(); else random=(--random); fi
"$python" "$here/sd15.py" "$work/sd15" "${random[@]}"
sd15=(-s train.device=cuda:0 -s 'encode.devices=["cuda:0"]' -s "model.teacher=$work/sd15" -s image.resolution=512)
step() { # NAME, settings: until LIMIT seconds have passed; killed, or it would write a checkpoint of some gigabytes
  local name=$1 watcher
  shift
  (while sleep 0.3; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; done >"$work/$name.memory" 2>/dev/null) &
  watcher=$!
  timeout -s KILL "${LIMIT:-45}" "$coffey" train -c configs/quickstart.toml "${sd15[@]}" -s train.batch_size=12 -s model.time_cond_proj_dim=256 \
    -s train.max_steps=100000 -s "train.output=$work/$name" -s optimizer.learning_rate=1e-6 -s train.gradient_checkpointing=true "${quiet[@]}" "$@" >"$out/$name.log" 2>&1
  kill "$watcher"
  wait "$watcher" 2>/dev/null
  "$python" - "$work/$name" "$name" "$work/$name.memory" <<'PY'
import json, statistics, sys
folder, name, memory = sys.argv[1:]
try:
    records = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
except OSError:
    records = []
peak = max((int(line) for line in open(memory) if line.strip().isdigit()), default=0)
seconds = [b["seconds"] - a["seconds"] for a, b in zip(records, records[1:])][2:]
if seconds:
    print(json.dumps(dict(what=name, steps=len(records), seconds=statistics.median(seconds), best=min(seconds), peak_mib=peak, loss=records[-1]["loss"])))
else:
    print(json.dumps(dict(what=name, failed="no steps", steps=len(records), peak_mib=peak)))
PY
  grep -iE '^error|panicked' "$out/$name.log" | head -3
  cp "$work/$name/metrics.jsonl" "$out/$name.jsonl" 2>/dev/null
  rm -rf "${work:?}/$name"
}
FP16=(-s train.mixed_precision=fp16 -s train.teacher_dtype=f16) BF16=(-s train.mixed_precision=bf16 -s train.teacher_dtype=bf16)
step fp16 "${FP16[@]}"
step bf16 "${BF16[@]}"
step fp16-8bit "${FP16[@]}" -s optimizer.kind=adamw8bit
step bf16-kept "${BF16[@]}" -s train.gradient_checkpointing=false

part "6. where the time goes: each call waited for"
LIMIT=50 LD_PRELOAD=$bundle/libgputrace.so GPUTRACE_OUT=$out/trace.txt step traced "${FP16[@]}"
awk '/^--- a step/ { steps++; text = "" } /^--- to the end/ { exit } { text = text $0 "\n" } END { printf "%s", text }' "$out/trace.txt" | head -45

part "7. precompute: images a second"
timeout 40 "$coffey" precompute -c configs/precompute-quickstart.toml -s 'encode.devices=["cuda:0"]' -s "model.teacher=$work/sd15" -s image.resolution=512 \
  -s encode.batch_size=12 -s data.max_samples=480 -s "latents.output=$work/latents" 2>&1 | tail -2

part "done: $((600 - SECONDS)) s left of ten minutes"
