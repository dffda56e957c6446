#!/usr/bin/env bash
# Build, test, time and check on a GPU inside ten minutes; --dry does the same stages on a CPU at tiny size.
#   OUT     folder of the results (benchmarks/results)      PYTHON  interpreter (python3)
#   TOTAL   seconds for everything (580; 1800 for --dry, which nobody waits for with a GPU)
# Every stage has its own limit; a stage that fails is told, the next one runs, and the exit code says so at the end.
# Results are written after every case, so that what was measured is there however the run ends.
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
total=${TOTAL:-580}
[ $dry = 1 ] && total=${TOTAL:-1800}
failed=() left_out=()
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
unset MLLMCL_BACKEND TRITON_INTERPRET MLLMCL_DEBUG

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
read -r device arch <<< "$("$python" -c "import torch
if torch.cuda.is_available():
    print(torch.cuda.get_device_name().replace(' ', '-'), '{}.{}'.format(*torch.cuda.get_device_capability()))")"
if [ $dry = 0 ] && [ -z "$device" ]; then echo "torch sees no CUDA device; benchmarks/gpu.sh --dry runs on a CPU" >&2; exit 1; fi

if ! have setuptools; then missing build "setuptools is not installed, so that the library is what was built before"
elif [ $dry = 1 ]; then stage build 600 "$python" setup.py -q build_ext --inplace
elif command -v nvcc > /dev/null; then
  stage build 150 env MLLMCL_CUDA=1 TORCH_CUDA_ARCH_LIST="$arch" "$python" setup.py -q build_ext --inplace
else
  missing "the CUDA library" "nvcc is not on PATH"
  stage build 150 "$python" setup.py -q build_ext --inplace
fi
stage info 60 "$python" -m mllmcl_kernels.info

pytest=("$python" -m pytest -q -p no:cacheprovider)
if ! have pytest; then missing "tests, benchmarks, sanitizers" "pytest is not installed"
else
  # compiling Triton kernels is work for every core
  many=()
  if [ $dry = 0 ] && have xdist; then many=(-n 12); fi
  select=() tests=(tests/ops/test_registry.py tests/ops/test_gpu.py)
  [ $dry = 1 ] && select=(-k "float32 and lora_mix and cpp")
  limit=170
  [ $dry = 1 ] && limit=600
  stage tests $limit "${pytest[@]}" --noconftest "${many[@]}" "${tests[@]}" "${select[@]}"

  have triton || missing "the Triton kernels" "triton is not installed"
  have peft || missing "the peer PEFT" "peft is not installed"
  only=(--benchmark-only)
  have pytest_benchmark || { only=(); missing "pytest-benchmark's own table" "pytest-benchmark is not installed"; }
  if [ $dry = 1 ]; then
    size=(--tiny --table cuda --ignore benchmarks/test_method_steps.py) name=dry
    missing "the methods' steps" "they take minutes on a CPU, and the tests of every method take them too"
  else size=() name=$device; fi
  # what is left but for the sanitizers
  left=$((total - SECONDS - 100))
  export MLLMCL_TUNING_FOLDER=$out/tuning
  stage benchmarks $((left + 30)) "${pytest[@]}" benchmarks "${only[@]}" "${size[@]}" --seconds "$left" --results "$out/$name.json"

  if [ $dry = 1 ]; then missing sanitizers "there is no device code in a dry run"
  elif ! command -v compute-sanitizer > /dev/null; then missing sanitizers "compute-sanitizer is not on PATH"
  else
    # without the caching allocator an access beyond a tensor is one beyond an allocation
    for tool in memcheck racecheck; do
      stage "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $tool --error-exitcode 9 \
        "${pytest[@]}" -x --noconftest tests/ops/test_registry.py \
        -k "values and float16 and not bfloat16 and (one_token or ragged or every_kind or with_history)"
    done
  fi
fi

[ ${#left_out[@]} -gt 0 ] && printf '== left out: %s\n' "${left_out[@]}"
[ ${#failed[@]} -gt 0 ] && { printf '== failed: %s\n' "${failed[@]}"; exit 1; }
echo "== every stage that ran passed, after $SECONDS s"
