#!/usr/bin/env bash
# Build, test, check and time on a GPU inside ten minutes; --dry does the same stages on a CPU at tiny size.
# Every stage has its own limit; a stage that fails is told, the next one runs, and the exit code says so at the end.
set -u
cd "$(dirname "$0")/.."
dry=0; [ "${1:-}" = "--dry" ] && dry=1
python=${PYTHON:-python3}
out=${OUT:-benchmarks/results}
mkdir -p "$out"
failed=()

stage() { # name, seconds, command...
  local name=$1 limit=$2; shift 2
  echo "== $name"
  timeout "$limit" "$@" || { echo "== $name failed ($?)"; failed+=("$name"); }
}

missing() { echo "== $1 is left out: $2"; }

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ $dry = 1 ]; then
  stage build 300 "$python" setup.py -q build_ext --inplace
else
  stage build 300 env MLLMCL_CUDA=1 "$python" setup.py -q build_ext --inplace
fi
stage info 60 "$python" -m mllmcl_kernels.info
have() { "$python" -c "import $1" 2>/dev/null; }
if have hypothesis; then tests="tests/ops"; else
  missing "tests/ops/test_lora_mix.py" "hypothesis is not installed"
  tests="tests/ops/test_registry.py tests/ops/test_masks.py"
fi
limit=240; select=()
[ $dry = 1 ] && { tests="tests/ops/test_registry.py"; select=(-k "float32 and lora_mix"); }
stage tests $limit "$python" -m pytest -q -p no:cacheprovider --noconftest $tests "${select[@]}" --ignore tests/ops/test_triton_interpreted.py
if command -v compute-sanitizer > /dev/null && [ $dry = 0 ]; then
  for tool in memcheck racecheck; do
    stage "$tool" 90 compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest -q -x -p no:cacheprovider --noconftest \
      tests/ops/test_registry.py -k "values and float16 and (one_token or ragged or every_kind or with_history)"
  done
else
  missing sanitizers "compute-sanitizer is not on PATH, or this is a dry run"
fi
if have pytest_benchmark; then
  name=$("$python" -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-') if torch.cuda.is_available() else 'dry')")
  size=(); [ $dry = 1 ] && size=(--tiny)
  target="$out/$name.json"; [ $dry = 1 ] && target=$(mktemp -d)/dry.json
  stage benchmarks 300 "$python" -m pytest benchmarks --benchmark-only -q -p no:cacheprovider "${size[@]}" --results "$target"
else
  missing benchmarks "pytest-benchmark is not installed"
fi
if [ ${#failed[@]} -gt 0 ]; then echo "failed: ${failed[*]}"; exit 1; fi
echo "all stages passed"
