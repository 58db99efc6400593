#!/usr/bin/env bash
# Everything that needs a GPU, in two commands of at most eight minutes each:
#
#   tools/gpu.sh 1    build (unless an extension for this Python is there), smoke test, records, own rows of the benchmark
#   tools/gpu.sh 2    tests, compute-sanitizer, the benchmark with its peers; then, if everything has passed, the table
#                     of validated architectures is written
#
# For a bare machine with torch (with CUDA) and a CUDA toolkit.  Part 1 needs nothing else; part 2 needs pytest and
# Captum, which come as wheels in WHEELS or are there.  Every step has a limit and a log of its own, and a step that
# fails stops only those that need it.  The last lines are a summary; no more than eight files are written.
#
#   PYTHON   the Python that has torch (python3)         OUT      where logs and JSON go (build/gpu)
#   WHEELS   a folder of wheels to install first (.whl)  SECONDS_ALL  wall-clock budget of a part (470)
#   PREBUILT a folder with a compiled extension to take (build/prebuilt, which `make prebuilt` fills)
#   DRY_RUN=1  say the steps and their limits, and run nothing
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
OUT="${OUT:-build/gpu}"
WHEELS="${WHEELS:-.whl}"
PREBUILT="${PREBUILT:-build/prebuilt}"
BUDGET="${SECONDS_ALL:-470}"
PART="${1:-1}"
case "$PART" in
  1) STEPS=" build smoke records own " ;;
  2) STEPS=" tests sanitizer peers " ;;
  *) echo "usage: tools/gpu.sh 1|2" >&2; exit 2 ;;
esac
wanted() { [[ "$STEPS" == *" $1 "* ]]; }
export PYTHONUNBUFFERED=1 GRADKERN_REQUIRE_EXT=1 GRADKERN_CUDA=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
mkdir -p "$OUT"
SUMMARY="$OUT/summary$PART.txt"
: > "$SUMMARY"
failed=0
left() { echo $((BUDGET - SECONDS)); }
note() { printf '%-20s %-12s %5s s  %s\n' "$1" "$2" "$3" "${4:0:150}" >> "$SUMMARY"; }
# step NAME SECONDS COMMAND…: runs, keeps the whole log, shows its end.
step() {
  local name="$1" limit="$2" begun="$SECONDS" code
  shift 2
  if [[ -n "${DRY_RUN:-}" ]]; then echo "step $name $limit $*"; return 0; fi
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
has() { [[ -z "${DRY_RUN:-}" ]] && "$PYTHON" -c "import $1" > /dev/null 2>&1; }
finish() {
  # Eight files at most: what belongs together becomes one.
  for tool in memcheck racecheck; do
    [[ -f "$OUT/$tool.log" ]] && cat "$OUT/$tool.log" >> "$OUT/sanitizer.log" && rm "$OUT/$tool.log"
  done
  [[ -f "$OUT/records.log" ]] && cut -c1-110 "$OUT/records.log" >> "$SUMMARY" && rm "$OUT/records.log"
  (( failed )) || "$PYTHON" -m tools.validated --fingerprint > "$OUT/passed$PART"
  if [[ "$PART" == 2 && -f "$OUT/passed1" && -f "$OUT/passed2" ]]; then "$PYTHON" -m tools.validated "$OUT" >> "$SUMMARY"; fi
  echo "== summary ($SECONDS s, $( ((failed)) && echo 'something FAILED' || echo 'all passed'))"
  cat "$SUMMARY"
  [[ -f "$OUT/gpu.txt" ]] && sed -n '/^$/,$p' "$OUT/gpu.txt"
  exit "$failed"
}

rm -f "$OUT/passed$PART"
if [[ -n "${DRY_RUN:-}" ]]; then
  look() { :; }
  finish() { exit 0; }
else
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
fi
look > "$OUT/machine$PART.log" 2>&1
tail -n 1 "$OUT/machine$PART.log"

if [[ "$PART" == 2 && -z "${DRY_RUN:-}" ]] && compgen -G "$WHEELS/*.whl" > /dev/null; then
  site="$(mktemp -d)"
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" "$WHEELS"/*.whl || failed=1
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
for module in $([[ "$PART" == 2 && -z "${DRY_RUN:-}" ]] && echo captum pytest hypothesis); do
  has "$module" || { note "$module" MISSING 0 "no such package, and no wheel of it in $WHEELS: what needs it will fail"; failed=1; }
done

# The GPU that is there, and no other: a quarter of the compile time.
if [[ -z "${TORCH_CUDA_ARCH_LIST:-}${DRY_RUN:-}" ]]; then
  arch="$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2> /dev/null)"
  [[ -n "$arch" ]] && export TORCH_CUDA_ARCH_LIST="$arch"
fi
# An extension that was built elsewhere for this Python, this torch and these very sources saves minutes.
fits() { "$PYTHON" -m tools.validated --fits > /dev/null 2>&1; }
if wanted build; then
  if [[ -z "${DRY_RUN:-}" ]] && compgen -G "$PREBUILT/_C*.so" > /dev/null; then cp "$PREBUILT"/_C*.so gradkern/; fi
  if [[ -z "${DRY_RUN:-}" ]] && fits; then
    note build PREBUILT 0 "the extension in $PREBUILT is of these sources"
  elif ! TAIL=3 step build 240 "$PYTHON" setup.py -q build_ext --inplace; then
    grep -n -i -m 12 'error' "$OUT/build.log" | cut -c1-240
    finish
  fi
fi
# Ten seconds that tell whether anything else is worth its time.
wanted smoke && { TAIL=4 step smoke 60 "$PYTHON" -m tests.gpu.smoke || finish; }
# Which record of a chain takes the time.
wanted records && TAIL=1 step records 60 "$PYTHON" -m benchmarks.gpu_records --out "$OUT"
wanted own && TAIL=4 step own 110 "$PYTHON" -m benchmarks.gpu --only gradkern "gradkern, folded" --seconds 90 --out "$OUT"
if wanted tests; then
  # Processes side by side where pytest can: a kernel that breaks the GPU for its process then breaks no other test.
  plugins=()
  has xdist && plugins+=(-n 6 --max-worker-restart 40)
  has pytest_timeout && plugins+=(--timeout 60 --timeout-method thread)
  TAIL=30 step tests 150 "$PYTHON" -m pytest -q -p no:cacheprovider "${plugins[@]}" --maxfail=60 --tb=short --show-capture=no tests/gpu
  [[ -n "${DRY_RUN:-}" ]] || grep -E '^(E  |FAILED|ERROR)' "$OUT/tests.log" | sort | uniq -c | sort -rn | head -n 12 | cut -c1-200
fi
if wanted sanitizer; then
  if [[ -n "${DRY_RUN:-}" ]] || command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck; do
      step "$tool" 50 compute-sanitizer --tool "$tool" --error-exitcode 9 "$PYTHON" -m tests.gpu.small
      [[ -n "${DRY_RUN:-}" ]] || grep -m 4 -A3 '^========= \(Invalid\|Error\|Warning\|Program hit\)' "$OUT/$tool.log" | cut -c1-160
    done
  else
    note compute-sanitizer "NOT RUN" 0 "not on this machine"
  fi
fi
wanted peers && TAIL=4 step peers 215 "$PYTHON" -m benchmarks.gpu --seconds 190 --out "$OUT"
finish
