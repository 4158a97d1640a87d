#!/usr/bin/env bash
# The check on a machine with an NVIDIA GPU, ten minutes: is it right, does it race, how fast beside PyTorch, how much memory, where does the
# time go. Runs in the root of the checkout, with the bundle that tools/cuda/bundle made in .gpu; needs the driver (CUDA 13) and
# PyTorch for CUDA 13 with numpy, safetensors and huggingface_hub; no compiler, no network, 8 GB in the temporary folder. Every part has its
# time limit: one that hangs leaves time for the rest. The answers are in OUT/summary.md, the messages in OUT/logs.tar.gz.
#
#   OUT=results bash tests/cuda/on_gpu.sh
#
# A rehearsal without a card, on the fake GPU and with PyTorch on the CPU, small networks: TINY=1 LIMIT=12 GPU_LIBRARIES=FAKE bash
# tests/cuda/on_gpu.sh (FAKE: made by tests/cuda/build_fakegpu). Numbers come out wrong then: the unit tests and the replays fail.
set -uo pipefail
cd "$(dirname "$0")/../.."
bundle=$PWD/.gpu here=$PWD/tests/cuda results=${OUT:-gpu-results}
[ -e "$bundle/coffey.xz" ] || { echo "on_gpu.sh: no .gpu/coffey.xz: tools/cuda/bundle makes it, on a machine with the toolkit" >&2; exit 2; }
work=$(mktemp -d)
out=$work/logs
trap 'tar -C "$work" -czf "$results/logs.tar.gz" logs; rm -rf "$work"' EXIT
mkdir -p "$out" "$results"
exec > >(tee "$results/log") 2>&1
python=${PYTHON:-python3}
# What is known so far is in the summary: the script may be stopped.
part() {
  "$python" "$here/summary.py" "$out" >"$results/summary.md"
  printf '\n=== %s (%s s)\n' "$1" "$SECONDS"
}

part "machine"
[ -n "${TINY:-}" ] || nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { echo "no NVIDIA driver"; exit 2; }
ldd --version | sed -n 1p
"$python" -m pip install -q --no-index --no-deps --no-compile --disable-pip-version-check --root-user-action=ignore --target "$work/python" "$bundle"/wheels/*.whl
export PYTHONPATH=$work/python${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 DIFFUSERS_VERBOSITY=error
"$python" -c 'import diffusers, safetensors, torch; print("PyTorch", torch.__version__, "CUDA", torch.version.cuda, "diffusers", diffusers.__version__)' ||
  { echo "$python lacks a package"; exit 2; }
for binary in coffey unit-tests; do
  "$python" -c 'import lzma, shutil, sys; shutil.copyfileobj(lzma.open(sys.argv[1]), open(sys.argv[2], "wb"))' "$bundle/$binary.xz" "$work/$binary"
  chmod +x "$work/$binary"
done
coffey=$work/coffey
# CUDA's libraries are those of PyTorch. PyTorch finds them by itself.
nvidia=$("$python" -c 'import importlib.util as u; s = u.find_spec("nvidia"); print(list(s.submodule_search_locations)[0] if s else "")')
libraries=${GPU_LIBRARIES:-$nvidia/cu13/lib:$nvidia/cudnn/lib}:${LD_LIBRARY_PATH:-}
# Both stop after so many seconds, their first argument. By the signal, as coffey would write a checkpoint of some gigabytes at another.
coffey() { LD_PRELOAD=${preload:-} LD_LIBRARY_PATH=$libraries timeout --foreground -s "${signal:-KILL}" "$1" "$coffey" "${@:2}"; }
tests() { LD_LIBRARY_PATH=$libraries COFFEY_TEST_DEVICE=cuda:0 COFFEY_PYTHON=$python timeout "$1" "$work/unit-tests" "${@:2}"; }

quiet=(-s report.endpoint_captions=0 -s report.grid=false -s validation.every=100000 -s checkpoint.every=100000)
FP16=(-s train.mixed_precision=fp16 -s train.teacher_dtype=f16) BF16=(-s train.mixed_precision=bf16 -s train.teacher_dtype=bf16)
quickstart() { # NAME, settings
  local name=$1
  shift
  coffey 60 train -c configs/quickstart.toml -s train.device=cuda:0 -s 'encode.devices=["cuda:0"]' -s "train.output=$work/$name" "${quiet[@]}" "$@" \
    >"$out/$name.log" 2>&1 || { echo "$name: exit code $?"; tail -3 "$out/$name.log"; }
}

part "1. is each operation right? On the card, against the CPU's and against PyTorch's"
tests 90 ops:: >"$out/unit-tests.log" 2>&1
grep -E '^test result|FAILED|panicked|error' "$out/unit-tests.log" | tail -15
tests 120 --ignored --exact ops::pytorch::operations_equal_pytorch --nocapture >"$out/operations.log" 2>&1
sed -n '/^less exact/,/^note/p; /as exact as PyTorch/p; /^test result/p; /Error/p' "$out/operations.log" | head -30

part "2. is a step right? Eight audited steps, replayed by PyTorch"
audit() {
  local name=$1
  shift
  quickstart "audit-$name" -s train.max_steps=8 -s "audit.dir=$work/$name.audit" -s audit.steps=8 -s optimizer.learning_rate=1e-6 "$@"
  echo "$name"
  timeout 60 "$python" tests/reference/replay_audit.py "$work/$name.audit" >"$out/replay-$name.log" 2>&1
  echo "{\"what\": \"replay, $name\", \"right\": $([ $? = 0 ] && echo true || echo false)}" >>"$out/replays.jsonl"
  tail -8 "$out/replay-$name.log"
}
audit f32
audit fp16 "${FP16[@]}"
audit bf16 "${BF16[@]}"
audit adamw8bit -s optimizer.kind=adamw8bit

part "3. is it the same twice, to the bit?"
for precision in no fp16 bf16; do
  for run in a b; do quickstart "twice-$precision-$run" -s train.max_steps=30 -s train.mixed_precision=$precision; done
  "$python" - "$work/twice-$precision-a" "$work/twice-$precision-b" "$precision" <<'PY' | tee -a "$out/twice.jsonl"
import json, sys
def run(folder):
    try:
        return [(r["loss"], r["grad_norm"]) for r in map(json.loads, open(f"{folder}/metrics.jsonl"))]
    except OSError:
        return []
a, b = map(run, sys.argv[1:3])
first = next((i + 1 for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
print(json.dumps(dict(what=f"twice, mixed_precision {sys.argv[3]}", steps=[len(a), len(b)], same=a == b and len(a) == 30, different_from=first)))
PY
done

part "4. PyTorch and diffusers at Stable Diffusion 1.5's size"
timeout 130 "$python" "$here/pytorch_step.py" ${TINY:+--tiny --batch 2 --steps 3} 2>"$out/pytorch.log" | tee "$out/pytorch.jsonl"
tail -3 "$out/pytorch.log"

part "5. coffey at the same size: precompute"
if [ -n "${TINY:-}" ]; then
  teacher=assets/quickstart/teacher side=64 guidance=64
else
  teacher=$work/sd15 side=512 guidance=256
  "$python" "$here/sd15.py" "$teacher" --random
fi
sd15=(-s 'encode.devices=["cuda:0"]' -s "model.teacher=$teacher")
precompute() { # NAME, settings
  local name=$1 signal=TERM
  shift
  coffey "${LIMIT:-40}" precompute -c configs/precompute-quickstart.toml "${sd15[@]}" -s image.resolution=$side -s encode.batch_size=12 -s "latents.output=$work/latents-$name" "$@" \
    >"$out/precompute-$name.log" 2>&1
  echo "$name: exit code $?"
  grep -E ' samples|encoding on|rror' "$out/precompute-$name.log" | tail -3
}
precompute bf16 -s encode.vae_dtype=bf16 -s encode.dtype=bf16 -s data.max_samples=240
precompute f32 -s data.max_samples=240
# The steps below train on the first one's latents, as PyTorch's steps do, if it made them. The configuration for latents has no tables for images.
awk '/^\[/ { table = $1 } table != "[s3]" && table != "[image]"' configs/quickstart.toml >"$work/from-latents.toml"

part "6. coffey at the same size: training"
step() { # NAME, settings: until LIMIT seconds have passed
  local name=$1 watcher from=latents config=$work/from-latents.toml
  local source=(-s "data.shards=\"$work/latents-bf16/\"" -s data.kind=latents -s data.text_from=embeds)
  shift
  if [[ $name == *-images || -z $(ls "$work"/latents-bf16/*.tar 2>/dev/null) ]]; then
    from=images config=configs/quickstart.toml source=(-s image.resolution=$side -s encode.vae_dtype=bf16 -s encode.dtype=bf16)
  fi
  (while sleep 0.3; do nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits; done >"$work/$name.memory" 2>/dev/null) &
  watcher=$!
  coffey "${LIMIT:-25}" train -c "$config" -s train.device=cuda:0 "${sd15[@]}" "${source[@]}" -s train.batch_size=12 -s model.time_cond_proj_dim=$guidance \
    -s train.max_steps=100000 -s "train.output=$work/$name" -s optimizer.learning_rate=1e-6 -s train.gradient_checkpointing=true "${quiet[@]}" "$@" >"$out/$name.log" 2>&1
  { kill "$watcher" && wait "$watcher"; } 2>/dev/null
  "$python" - "$work/$name" "$name" "$work/$name.memory" "$from" <<'PY' | tee -a "$out/coffey.jsonl"
import json, statistics, sys
folder, name, memory, source = sys.argv[1:]
try:
    records = [json.loads(line) for line in open(f"{folder}/metrics.jsonl")]
except OSError:
    records = []
peak = max((int(line) for line in open(memory) if line.strip().isdigit()), default=0)
seconds = [b["seconds"] - a["seconds"] for a, b in zip(records, records[1:])][2:]
if seconds:
    print(json.dumps(dict(what=name, source=source, steps=len(records), seconds=statistics.median(seconds), best=min(seconds), peak_gib=peak / 1024, loss=records[-1]["loss"])))
else:
    print(json.dumps(dict(what=name, source=source, failed="no steps", steps=len(records), peak_gib=peak / 1024)))
PY
  grep -iE '^error|panicked' "$out/$name.log" | head -3
  cp "$work/$name/metrics.jsonl" "$out/$name.jsonl" 2>/dev/null
  rm -rf "${work:?}/$name"
}
step fp16 "${FP16[@]}"
step bf16 "${BF16[@]}"
step bf16-kept "${BF16[@]}" -s train.gradient_checkpointing=false
step fp16-8bit "${FP16[@]}" -s optimizer.kind=adamw8bit
step fp16-images "${FP16[@]}"

part "7. where the time goes: each call waited for"
LIMIT=${LIMIT:-40} preload=$bundle/libgputrace.so GPUTRACE_OUT=$out/trace.txt step traced "${FP16[@]}"
if [ -e "$out/trace.txt" ]; then
  awk '/^--- a step/ { steps++; text = "" } /^--- to the end/ { exit } { text = text $0 "\n" } END { printf "%s", text }' "$out/trace.txt" | head -45
else
  echo "no trace"
fi

part "summary"
cat "$results/summary.md"
part "done: $((600 - SECONDS)) s left of ten minutes"
