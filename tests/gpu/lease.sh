#!/usr/bin/env bash
# The stages of tests/gpu/stages.py, one after the other, on a machine with one GPU that is there for minutes.
#
#   tests/gpu/lease.sh imports kernels noise        results in $OUT (default: results), a JSON file a stage and one log
#   tests/gpu/lease.sh --rehearse imports layers    the same on a CPU, in small
#   tests/gpu/lease.sh --pack                       before: wheels that such a machine lacks, into .lease/wheels
#
# The machine has Python 3.12 ($PYTHON, by default the first python3 of the path that has torch) with torch,
# transformers, triton, pytest, safetensors, sentencepiece, pybind11 and a compiler, and no network. No stage is begun
# that might not end within $LIMIT seconds of the start (default: 520). What ends without a result leaves, in the log,
# where it was.
set -euo pipefail
cd "$(dirname "$0")/../.."

OUT=${OUT:-results} LIMIT=${LIMIT:-520} SITE=${SITE:-$PWD/.lease/site} LOG=stages.log
declare -A SECONDS_OF=([imports]=90 [kernels]=120 [noise]=120 [step]=150 [resume]=60 [layers]=240 [bench]=200)

python_with_torch() {
    for found in python3 python3.12 python; do
        if "$found" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
            echo "$found"
            return
        fi
    done
    echo "no python3, python3.12 or python here has torch: name one, PYTHON=/path/to/python" >&2
    exit 2
}

pack() { # what stages import and the machine lacks; some 5 MB
    rm -rf .lease/wheels
    "${PYTHON:-python3}" -m pip download --quiet --only-binary :all: --no-deps --python-version 3.12 \
        --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 --platform any \
        -d .lease/wheels -r tests/gpu/wheels.txt
    du -sh .lease/wheels
}

environment() { # beside the machine's own packages, in a directory of their own: its Python may itself be a virtual
    # environment's, and one made from that would see the packages of the system's Python instead
    [ -d .lease/wheels ] || return 0
    "$PYTHON" -m pip install --quiet --no-index --no-deps --upgrade --target "$SITE" --find-links .lease/wheels \
        -r tests/gpu/wheels.txt &&
        "$PYTHON" setup.py --quiet build_ext --inplace
}

run() { # a stage; at its limit, Python says in which line each thread is
    PYTHONFAULTHANDLER=1 timeout --signal=ABRT --kill-after=10 "${SECONDS_OF[$1]}" \
        "$PYTHON" -m tests.gpu.stages "$1" --out "$OUT/$1.json" "${REHEARSE[@]}"
}

[ "${1:-}" != --pack ] || { pack; exit; }
REHEARSE=()
[ "${1:-}" != --rehearse ] || { REHEARSE=(--rehearse); shift; }
[ $# -gt 0 ] || { sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; }
for stage; do [ "${SECONDS_OF[$stage]:-}" ] || { echo "no stage $stage: ${!SECONDS_OF[*]}" >&2; exit 2; }; done

PYTHON=${PYTHON:-$(python_with_torch)}
mkdir -p "$OUT"
: >"$OUT/$LOG"
if [ ${#REHEARSE[@]} -eq 0 ]; then
    export PYTHONPATH="$SITE:$PWD${PYTHONPATH:+:$PYTHONPATH}"
    if ! environment >>"$OUT/$LOG" 2>&1; then
        echo "the environment: FAILED at $SECONDS s, the end of its log:"
        tail -n 15 "$OUT/$LOG"
        exit 1
    fi
fi
failed=0
for stage; do
    if [ $((SECONDS + SECONDS_OF[$stage])) -gt "$LIMIT" ]; then
        echo "$stage: not begun at $SECONDS s: it may take ${SECONDS_OF[$stage]}, and the limit is $LIMIT"
        failed=1
        continue
    fi
    echo "=== $stage" >>"$OUT/$LOG"
    if run "$stage" >>"$OUT/$LOG" 2>&1; then
        echo "$stage: done at $SECONDS s"
    else
        echo "$stage: FAILED at $SECONDS s, the end of its log:"
        tail -n 15 "$OUT/$LOG"
        failed=1
    fi
done
exit $failed
