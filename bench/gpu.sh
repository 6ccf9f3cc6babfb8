#!/usr/bin/env bash
# Build, test and measure on a machine with one CUDA GPU, in under 10 minutes and without a network.
#   bench/gpu.sh                       results go to bench/results/gpu; OUT=DIR for another folder
# Needs Python with torch, triton, scikit-build-core, pybind11, pytest and this package's dependencies, and a CUDA toolkit.
# PYTHON names the interpreter. Liger and Cut Cross-Entropy are compared where they are installed. LIMIT: seconds in all.
# A step that fails or runs out of time is reported and the next one runs; the exit status is then 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results/gpu}
limit=${LIMIT:-570}
mkdir -p "$out"
out=$(cd "$out" && pwd)
tables=$out/tables.md
log=$out/log.txt
: >"$tables"
: >"$log"
failed=()

# step NAME SECONDS COMMAND...: never past the time in all. Its output goes to the log, and to the screen where it fails.
step() {
  local name=$1 seconds=$2 left=$((limit - SECONDS)) start=$SECONDS status from
  shift 2
  if [ "$left" -lt 5 ]; then
    failed+=("$name: no time left")
    echo "== $name: NOT RUN, no time left"
    return
  fi
  from=$(($(wc -l <"$log") + 1))
  echo "== $name: $*" >>"$log"
  timeout --kill-after=5 "$((seconds < left ? seconds : left))" "$@" >>"$log" 2>&1
  status=$?
  if [ "$status" = 0 ]; then
    echo "== $name: passed in $((SECONDS - start)) s"
    return
  fi
  [ "$status" = 124 ] || [ "$status" = 137 ] && status="$status (out of time)"
  failed+=("$name: exit status $status")
  echo "== $name: FAILED after $((SECONDS - start)) s, exit status $status; the end of its output:"
  tail -n +"$from" "$log" | tail -n 15
}

# sweep NAME SECONDS FILE OPTIONS...: bench/FILE on the GPU; tables are appended even if it is cut off.
sweep() {
  local name=$1 seconds=$2 file=$3
  shift 3
  step "$name" "$seconds" bash -c 'exec "$@" >>"$0"' "$tables" "$python" "bench/$file" --device cuda --out "$out/$name.json" "$@"
}

# -P: the tests import what was installed, not the source tree, which has no compiled modules. The overridden addopts name
# options of pytest-benchmark and pytest-xdist, which need not be there.
tests=("$python" -P -m pytest -q -p no:cacheprovider -o "addopts=--import-mode=importlib" -m "not slow or pairwise")

step build 180 "$python" -m pip install --quiet --no-build-isolation --no-deps .
step env 30 bash -c '"$1" -P -m lldfast env | tee "$2"' - "$python" "$out/env.txt"
cat "$out/env.txt" 2>/dev/null
step gpu 30 "$python" -P -c '
import torch
from lldfast.backends import backends
found = backends()
missing = {name: found[name]["reason"] for name in ("cpp", "triton", "cuda") if not found[name]["available"]}
assert torch.cuda.is_available(), "torch sees no GPU"
assert not missing, missing
'
step test_logprob 60 "${tests[@]}" tests/test_logprob.py
step test_linear_logprob 60 "${tests[@]}" tests/test_linear_logprob.py -k cuda
step test_sketch 60 "${tests[@]}" tests/test_sketch.py -k cuda
step test_kernels 90 "${tests[@]}" tests/kernels --ignore tests/kernels/test_distill.py
step test_distill 60 "${tests[@]}" tests/test_distill_ops.py -k cuda
# Most of it is the compilation of some 200 variants of one kernel, so parts run beside each other.
step test_distill_kernels 120 env KERNELS_ON_GPU=1 bash -c '
jobs=() failed=0
for part in "every_loss and -pr]" "every_loss and -qr]" "every_loss and -rp]" "every_loss and -rq]" \
  "shapes or exponents or detached" "not (every_loss or shapes or exponents or detached)"; do
  "$@" -k "$part" &
  jobs+=($!)
done
for job in "${jobs[@]}"; do wait "$job" || failed=1; done
exit "$failed"' - "${tests[@]}" tests/kernels/test_distill.py

sweep nanogpt_forward 80 bench_linear_logprob.py --tokens 65536 --width 768 --vocab 50304 --dtypes bf16
sweep gemma_forward 100 bench_linear_logprob.py --tokens 32768 --width 2048 --vocab 256000 --dtypes bf16
sweep nanogpt_train 80 bench_linear_logprob.py --mode train --tokens 16384 --width 768 --vocab 50304
sweep given_forward 80 bench_logprob.py --tokens 65536 --vocab 50304 50257 --dtypes bf16
sweep given_train 60 bench_logprob.py --mode train --tokens 16384 --vocab 50304 50257 --dtypes bf16
sweep distill 60 bench_distill.py --tokens 8192 --width 2048 --vocab 50304 --settings kl amid
sweep sketch 60 bench_sketch.py

cat "$tables"
echo "results in $out after $SECONDS s"
if [ "${#failed[@]}" -gt 0 ]; then
  printf 'FAILED %s\n' "${failed[@]}" | tee -a "$log"
  exit 1
fi
