#!/usr/bin/env bash
# The stages of tests/gpu/stages.py, one after the other, on a machine with one GPU that is there for minutes.
#
#   tests/gpu/lease.sh imports kernels noise        results in $OUT (default: results), a JSON file and a log a stage
#   tests/gpu/lease.sh --rehearse imports layers    the same on a CPU, in small
#   tests/gpu/lease.sh --pack                       before: wheels that such a machine lacks, into .lease/wheels
#
# The machine has Python 3.12 with torch, transformers, triton, pytest, safetensors, sentencepiece, pybind11 and a
# compiler, and no network. No stage is begun that might not end within $LIMIT seconds of the start (default: 520).
set -euo pipefail
cd "$(dirname "$0")/../.."

PYTHON=${PYTHON:-python3.12} OUT=${OUT:-results} LIMIT=${LIMIT:-520}
declare -A SECONDS_OF=([imports]=90 [kernels]=120 [noise]=120 [step]=150 [resume]=60 [layers]=240 [bench]=200)

pack() { # what stages import and the machine lacks; some 5 MB
    rm -rf .lease/wheels
    "$PYTHON" -m pip download --quiet --only-binary :all: --no-deps --python-version 3.12 --platform manylinux_2_28_x86_64 \
        --platform manylinux2014_x86_64 --platform any -d .lease/wheels -r tests/gpu/wheels.txt
    du -sh .lease/wheels
}

environment() { # a virtual environment over the machine's own packages
    [ -d .lease/wheels ] || return 0
    [ -x .lease/env/bin/python ] || "$PYTHON" -m venv --system-site-packages .lease/env
    PYTHON=.lease/env/bin/python
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links .lease/wheels -r tests/gpu/wheels.txt
    "$PYTHON" setup.py --quiet build_ext --inplace
}

[ "${1:-}" != --pack ] || { pack; exit; }
REHEARSE=()
[ "${1:-}" != --rehearse ] || { REHEARSE=(--rehearse); shift; }
[ $# -gt 0 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
for stage; do [ "${SECONDS_OF[$stage]:-}" ] || { echo "no stage $stage: ${!SECONDS_OF[*]}" >&2; exit 2; }; done

mkdir -p "$OUT"
[ ${#REHEARSE[@]} -gt 0 ] || environment
failed=0
for stage; do
    if [ $((SECONDS + SECONDS_OF[$stage])) -gt "$LIMIT" ]; then
        echo "$stage: not begun at $SECONDS s: it may take ${SECONDS_OF[$stage]}, and the limit is $LIMIT"
        failed=1
        continue
    fi
    if timeout "${SECONDS_OF[$stage]}" "$PYTHON" -m tests.gpu.stages "$stage" --out "$OUT/$stage.json" "${REHEARSE[@]}" >"$OUT/$stage.log" 2>&1; then
        echo "$stage: done at $SECONDS s"
    else
        echo "$stage: FAILED at $SECONDS s, the end of its log:"
        tail -n 15 "$OUT/$stage.log"
        failed=1
    fi
done
exit $failed
