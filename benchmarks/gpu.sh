#!/usr/bin/env bash
# Build, test, time and check on a GPU inside ten minutes; --dry does the same stages on a CPU at tiny size.
#   OUT     folder of the results (benchmarks/results)      PYTHON  interpreter (python3)
# Every stage has its own limit; a stage that fails is told, the next one runs, and the exit code says so at the end.
# Nothing is fetched: what is not installed is told and left out.
set -u
cd "$(dirname "$0")/.."
dry=0
case "${1:-}" in
  "") ;;
  --dry) dry=1 ;;
  *) echo "usage: benchmarks/gpu.sh [--dry], got: $*" >&2; exit 2 ;;
esac
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
total=590
failed=() left_out=()
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
unset MLLMCL_BACKEND TRITON_INTERPRET

missing() { echo "== $1 is left out: $2"; left_out+=("$1"); }

stage() { # name, limit in seconds, command...; never beyond what is left of the total
  local name=$1 limit=$2 left=$((total - SECONDS)) code began=$SECONDS
  shift 2
  [ "$limit" -gt "$left" ] && limit=$left
  if [ "$limit" -lt 20 ]; then missing "$name" "$left s of $total are left"; return; fi
  echo "== $name, at most $limit s"
  timeout -k 5 "$limit" "$@"
  code=$?
  [ $code = 0 ] && { echo "== $name passed after $((SECONDS - began)) s"; return; }
  [ $code = 124 ] && code="out of time"
  echo "== $name failed: $code"
  failed+=("$name")
}

have() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if ! have torch; then echo "$python has no torch: nothing can run" >&2; exit 1; fi
device=$("$python" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-') if torch.cuda.is_available() else '')")
if [ $dry = 0 ] && [ -z "$device" ]; then echo "torch sees no CUDA device; benchmarks/gpu.sh --dry runs on a CPU" >&2; exit 1; fi

if ! have setuptools; then missing build "setuptools is not installed, so that the library is what was built before"
elif [ $dry = 1 ]; then stage build 240 "$python" setup.py -q build_ext --inplace
elif command -v nvcc > /dev/null; then stage build 240 env MLLMCL_CUDA=1 "$python" setup.py -q build_ext --inplace
else
  missing "the CUDA library" "nvcc is not on PATH"
  stage build 240 "$python" setup.py -q build_ext --inplace
fi
stage info 60 "$python" -m mllmcl_kernels.info

pytest=("$python" -m pytest -q -p no:cacheprovider)
if ! have pytest; then missing "tests, benchmarks, sanitizers" "pytest is not installed"
else
  tests=(tests/ops/test_registry.py) select=()
  if [ $dry = 1 ]; then select=(-k "float32 and lora_mix and cpp")
  elif have hypothesis; then tests=(tests/ops --ignore tests/ops/test_triton_interpreted.py)
  else
    missing "tests/ops/test_lora_mix.py" "hypothesis is not installed"
    tests+=(tests/ops/test_masks.py)
  fi
  stage tests 180 "${pytest[@]}" --noconftest "${tests[@]}" "${select[@]}"

  have triton || missing "the Triton kernels" "triton is not installed"
  have peft || missing "the peer PEFT" "peft is not installed"
  only=(--benchmark-only)
  have pytest_benchmark || { only=(); missing "pytest-benchmark's own table" "pytest-benchmark is not installed"; }
  if [ $dry = 1 ]; then size=(--tiny) name=dry; else size=() name=$device; fi
  stage benchmarks 240 "${pytest[@]}" benchmarks "${only[@]}" "${size[@]}" --seconds 200 --results "$out/$name.json"

  if [ $dry = 1 ]; then missing sanitizers "there is no device code in a dry run"
  elif ! command -v compute-sanitizer > /dev/null; then missing sanitizers "compute-sanitizer is not on PATH"
  else
    for tool in memcheck racecheck; do
      stage "$tool" 90 compute-sanitizer --tool $tool --error-exitcode 9 "${pytest[@]}" -x --noconftest \
        tests/ops/test_registry.py -k "values and float16 and (one_token or ragged or every_kind or with_history)"
    done
  fi
fi

[ ${#left_out[@]} -gt 0 ] && printf '== left out: %s\n' "${left_out[@]}"
[ ${#failed[@]} -gt 0 ] && { printf '== failed: %s\n' "${failed[@]}"; exit 1; }
echo "== every stage that ran passed, after $SECONDS s"
