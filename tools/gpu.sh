#!/usr/bin/env bash
# Everything that needs a GPU, within nine minutes: builds, a smoke test, records, benchmark, tests, compute-sanitizer.
# For a bare machine with torch (with CUDA), a CUDA toolkit and pytest; Captum comes as a wheel in WHEELS or is there.
# Every step has a limit and a log of its own, and a step that fails stops only those that need it.  The last lines are
# a summary; no more than eight files are written.
#
#   PYTHON   the Python that has torch (python3)         OUT      where logs and JSON go (build/gpu)
#   WHEELS   a folder of wheels to install first (.whl)  SECONDS_ALL  wall-clock budget (530)
#   STEPS    which of "build smoke records benchmark tests sanitizer" to run (all), so that two calls may share them
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu}"
WHEELS="${WHEELS:-.whl}"
BUDGET="${SECONDS_ALL:-530}"
STEPS=" ${STEPS:-build smoke records benchmark tests sanitizer} "
wanted() { [[ "$STEPS" == *" $1 "* ]]; }
export PYTHONUNBUFFERED=1 GRADKERN_REQUIRE_EXT=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
mkdir -p "$OUT"
SUMMARY="$OUT/summary.txt"
: > "$SUMMARY"
failed=0
left() { echo $((BUDGET - SECONDS)); }
note() { printf '%-20s %-12s %5s s  %s\n' "$1" "$2" "$3" "${4:0:150}" >> "$SUMMARY"; }
# step NAME SECONDS COMMAND…: runs, keeps the whole log, shows its end.
step() {
  local name="$1" limit="$2" begun="$SECONDS" code
  shift 2
  (( limit > $(left) )) && limit="$(left)"
  if (( limit < 5 )); then
    note "$name" "NOT RUN" 0 "no time left"
    failed=1
    return 1
  fi
  # A process that waits for a kernel that hangs does not see the first signal.
  timeout -k 10 "$limit" "$@" > "$OUT/$name.log" 2>&1
  code=$?
  echo "== $name: exit $code, $((SECONDS - begun)) s"
  tail -n "${TAIL:-6}" "$OUT/$name.log" | cut -c1-200
  local said="passed"
  (( code == 0 )) || { failed=1; said="exit $code"; }
  (( code == 124 || code == 137 )) && said="TIMED OUT"
  note "$name" "$said" "$((SECONDS - begun))" "$(grep -v '^ *$' "$OUT/$name.log" | tail -n 1)"
  return $code
}
has() { "$PYTHON" -c "import $1" > /dev/null 2>&1; }
finish() {
  # Eight files at most: what belongs together becomes one.
  for tool in memcheck racecheck; do
    [[ -f "$OUT/$tool.log" ]] && cat "$OUT/$tool.log" >> "$OUT/sanitizer.log" && rm "$OUT/$tool.log"
  done
  [[ -f "$OUT/records.log" ]] && cut -c1-110 "$OUT/records.log" >> "$SUMMARY" && rm "$OUT/records.log"
  echo "== summary ($SECONDS s, $( ((failed)) && echo 'something FAILED' || echo 'all passed'))"
  cat "$SUMMARY"
  [[ -f "$OUT/gpu.txt" ]] && sed -n '/^$/,$p' "$OUT/gpu.txt"
  exit "$failed"
}

# A look that never stops the rest: what machine this is.
look() {
  nvidia-smi
  "$PYTHON" - << 'EOF'
import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)
if torch.cuda.is_available():
    p = torch.cuda.get_device_properties(0)
    print(f"{p.name}: {p.multi_processor_count} multiprocessors, compute capability {p.major}.{p.minor}")
EOF
}
look > "$OUT/build.log" 2>&1
tail -n 1 "$OUT/build.log"

if compgen -G "$WHEELS/*.whl" > /dev/null; then
  site="$(mktemp -d)"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$WHEELS"/*.whl || failed=1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
for module in captum pytest hypothesis; do
  has "$module" || { note "$module" MISSING 0 "no such package, and no wheel of it in $WHEELS: what needs it will fail"; failed=1; }
done

# The GPU that is there, and no other: a quarter of the compile time.
if [[ -z "${TORCH_CUDA_ARCH_LIST:-}" ]]; then
  arch="$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null)"
  [[ -n "$arch" ]] && export TORCH_CUDA_ARCH_LIST="$arch"
fi
mv "$OUT/build.log" "$OUT/machine.part"
if wanted build; then
  TAIL=3 step build 240 "$PYTHON" setup.py -q build_ext --inplace
  built=$?
  cat "$OUT/build.log" >> "$OUT/machine.part"
  if (( built != 0 )); then
    grep -n -i -m 12 'error' "$OUT/build.log" | cut -c1-240
    finish
  fi
fi
mv "$OUT/machine.part" "$OUT/build.log"

# Ten seconds that tell whether anything else is worth its time.
wanted smoke && { TAIL=4 step smoke 60 "$PYTHON" -m tests.gpu.smoke || finish; }
# Which record of a chain takes the time.
wanted records && TAIL=1 step records 60 "$PYTHON" -m benchmarks.gpu_records --out "$OUT"
if wanted benchmark; then
  rest=$(( $(wanted tests && echo 150 || echo 0) + $(wanted sanitizer && echo 60 || echo 0) + 35 ))
  TAIL=4 step benchmark "$(( $(left) - rest + 30 ))" "$PYTHON" -m benchmarks.gpu --seconds "$(( $(left) - rest ))" --out "$OUT"
fi


if wanted tests; then
  # Processes side by side where pytest can: a kernel that breaks the GPU for its process then breaks no other test.
  plugins=()
  has xdist && plugins+=(-n 6 --max-worker-restart 40)
  has pytest_timeout && plugins+=(--timeout 60 --timeout-method thread)
  TAIL=30 step tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider "${plugins[@]}" --maxfail=60 --tb=short --show-capture=no tests/gpu
  grep -E '^(E  |FAILED|ERROR)' "$OUT/tests.log" | sort | uniq -c | sort -rn | head -n 12 | cut -c1-200
fi
if wanted sanitizer; then
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      step "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m tests.gpu.small
      grep -m 4 -A3 '^========= \(Invalid\|Error\|Warning\|Program hit\)' "$OUT/$tool.log" | cut -c1-160
    done
  else
    note compute-sanitizer "NOT RUN" 0 "not on this machine"
  fi
fi
finish
