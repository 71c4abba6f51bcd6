#!/usr/bin/env bash
# Build the plans of a model on this machine's GPU, measure them, and write one JSON file to send back.
#
#   deploy/verify_gpu.sh MODEL.onnx DATA.npz [OUT.json]
#
# MODEL.onnx   of `python -m export.onnx --target tensorrt`
# DATA.npz     of `python -m train.data`, made where torch is
# PYTHON       interpreter to use (default: .venv/bin/python where there is one, otherwise python3)
# SECONDS_PER  seconds of each measurement (default: 5)
#
# A step that fails is recorded with its error, and the others are run all the same. Exit status: 0 where every
# required step succeeded, 1 otherwise, 2 for wrong arguments. Nothing is installed, and no clock or power mode changed.
set -euo pipefail

if [[ $# -lt 2 || $# -gt 3 || ! -f $1 || ! -f $2 ]]; then
    echo "error: expected MODEL.onnx and DATA.npz, both files that exist; see the head of $0" >&2
    exit 2
fi
model=$(realpath "$1")
data=$(realpath "$2")
out=$(realpath -m "${3:-verify_gpu.json}")
seconds=${SECONDS_PER:-5}
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [[ -z $python ]]; then
    python=python3
    if [[ -x .venv/bin/python ]]; then python=$PWD/.venv/bin/python; fi
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/steps"

# step NAME required|optional COMMAND...: keeps standard output, the last line of standard error and the exit status.
step() {
    local name=$1 kind=$2 status=0
    shift 2
    echo "== $name: $*" >&2
    "$@" >"$work/steps/$name.out" 2>"$work/steps/$name.err" || status=$?
    printf '%s %s\n' "$kind" "$status" >"$work/steps/$name.status"
    if [[ $status -ne 0 ]]; then tail -n 1 "$work/steps/$name.err" >&2; fi
}

# machine NAME COMMAND...: what the machine says of itself, where it has such a command.
machine() {
    local name=$1
    shift
    if command -v "$1" >/dev/null 2>&1; then "$@" >"$work/$name.machine" 2>&1 || true; fi
}

machine kernel uname -a
machine nvidia_smi nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm,pcie.link.gen.current --format=csv
machine power_mode nvpmodel -q
machine cuda_runtime "$python" -c "from runtime.engines.tensorrt.cuda_choice import find_cuda
cuda = find_cuda('verify_gpu')
print(cuda.source, cuda.runtime.cudaRuntimeGetVersion()[1], cuda.runtime.cudaDriverGetVersion()[1])"
machine packages "$python" -m pip list --format=freeze
if [[ -r /etc/nv_tegra_release ]]; then cp /etc/nv_tegra_release "$work/jetson_linux.machine"; fi

plan=$work/engine.plan
build=("$python" -m export.engine "$model" --builder tensorrt --batch "1,8,32")
step build_mixed required "${build[@]}" -o "$plan"
step build_class required "${build[@]}" -o "$work/class.plan" --no-saliency
step build_int8 optional "${build[@]}" -o "$work/int8.plan" --precision int8
step build_fp16 optional "${build[@]}" -o "$work/fp16.plan" --precision fp16
if [[ -r /etc/nv_tegra_release ]]; then
    step build_dla optional "${build[@]}" -o "$work/dla.plan" --dla-core 0 --no-saliency
fi

step accuracy_plan required "$python" -m bench.accuracy "$plan" --data "$data" --json
step accuracy_cpu required "$python" -m bench.accuracy "$model" --data "$data" --json
step agreement required "$python" -m bench.agreement "$plan" "$model" --data "$data" --json

latency=("$python" -m bench.latency --seconds "$seconds" --json)
step latency_map required "${latency[@]}" "$plan" --batch 1,8,32 --explain --streams 4
step latency_class required "${latency[@]}" "$work/class.plan" --batch 1,8,32 --streams 4
step latency_spin optional "${latency[@]}" "$plan" --explain --spin --no-cold-start
step layers required "${latency[@]}" "$plan" --profile --no-cold-start
step energy_map optional "${latency[@]}" "$plan" --explain --energy --no-cold-start
step energy_class optional "${latency[@]}" "$work/class.plan" --energy --no-cold-start
for name in int8 fp16 dla; do
    if [[ -f $work/$name.plan ]]; then
        step "latency_$name" optional "${latency[@]}" "$work/$name.plan" --no-cold-start
        step "agreement_$name" optional "$python" -m bench.agreement "$work/$name.plan" "$model" --data "$data" --json
    fi
done
step latency_cpu optional "${latency[@]}" "$model" --explain --no-cold-start
step latency_ort_cuda optional "${latency[@]}" "$model" --engine ort --device cuda --explain --no-cold-start
step latency_ort_tensorrt optional "${latency[@]}" "$model" --engine ort --device tensorrt --explain --no-cold-start

"$python" - "$work" "$model" "$out" <<'PYTHON'
import hashlib
import json
import sys
from pathlib import Path

work, model, out = (Path(argument) for argument in sys.argv[1:])


def result(text):
    try:
        return json.loads(text)
    except ValueError:
        return text.strip()


steps = {}
for path in sorted((work / "steps").glob("*.status")):
    kind, status = path.read_text().split()
    error = path.with_suffix(".err").read_text(errors="replace").strip().splitlines()
    steps[path.stem] = {
        "required": kind == "required",
        "status": int(status),
        "result": result(path.with_suffix(".out").read_text(errors="replace")),
        "error": error[-1] if error and int(status) else None,
    }
report = {
    "verify_gpu": 1,
    "model": model.name,
    "model_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
    "machine": {path.stem: path.read_text(errors="replace").strip() for path in sorted(work.glob("*.machine"))},
    "sidecars": {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.plan.json"))},
    "steps": steps,
}
temporary = out.with_name(f".{out.name}.tmp")
temporary.write_text(json.dumps(report, indent=1) + "\n")
temporary.replace(out)
failed = [name for name, step in steps.items() if step["required"] and step["status"]]
print(f"{out}: {len(steps)} steps, required ones that failed: {', '.join(failed) or 'none'}")
sys.exit(1 if failed else 0)
PYTHON
