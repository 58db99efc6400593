#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within nine minutes: builds, tests, compute-sanitizer, benchmark.
# For a bare machine with torch (with CUDA), a CUDA toolkit and pytest; Captum comes as a wheel in WHEELS or is there.
#
#   PYTHON   the Python that has torch (python3)        OUT      where logs, JSON and pictures go (build/gpu)
#   WHEELS   a folder of wheels to install first (.whl)  SECONDS_ALL  wall-clock budget (530)
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu}"
WHEELS="${WHEELS:-.whl}"
BUDGET="${SECONDS_ALL:-530}"
export PYTHONUNBUFFERED=1 GRADKERN_REQUIRE_EXT=1 MAX_JOBS="${MAX_JOBS:-16}"
mkdir -p "$OUT"
failed=0
left() { echo $((BUDGET - SECONDS)); }
# step NAME SECONDS COMMAND…: runs, keeps the whole log, shows its end.
step() {
  local name="$1" limit="$2" begun="$SECONDS"
  shift 2
  (( limit > $(left) )) && limit="$(left)"
  if (( limit < 5 )); then
    echo "== $name: NOT RUN, no time left"
    failed=1
    return 1
  fi
  timeout "$limit" "$@" > "$OUT/$name.log" 2>&1
  local code=$?
  echo "== $name: exit $code, $((SECONDS - begun)) s"
  tail -n "${TAIL:-6}" "$OUT/$name.log"
  (( code == 0 )) || failed=1
  return $code
}

if compgen -G "$WHEELS/*.whl" > /dev/null; then
  site="$(mktemp -d)"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$WHEELS"/*.whl || failed=1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
nvidia-smi > "$OUT/nvidia-smi.log" 2>&1 || true
TAIL=20 step build 200 "$PYTHON" setup.py -q build_ext --inplace || exit 1
TAIL=25 step tests 150 "$PYTHON" -m pytest -q -x --maxfail=8 --tb=short --show-capture=no tests/gpu
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    step "sanitizer-$tool" 45 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m tests.gpu.small
  done
else
  echo "== compute-sanitizer: not on this machine, NOT RUN"
fi
TAIL=70 step benchmark "$(left)" "$PYTHON" -m benchmarks.gpu --seconds "$(( $(left) - 25 ))" --out "$OUT"
echo "== all: $SECONDS s, $( ((failed)) && echo 'something FAILED' || echo passed)"
exit "$failed"
