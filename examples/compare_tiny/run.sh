#!/usr/bin/env bash
# usage: bash examples/compare_tiny/run.sh
#
# The six comparisons of examples/compare_tiny, one after the other; from the checkout. Interrupt it as you like: the
# same command goes on. OUT, SEEDS, FEW and SWEPT can be set: OUT=runs/other SEEDS=4 bash examples/compare_tiny/run.sh
set -euo pipefail

if [ $# -gt 0 ]; then
    sed -n '2,5s/^# \{0,1\}//p' "$0"
    case $1 in -h | --help) exit 0 ;; esac
    echo "error: it takes no arguments, and was given: $*" >&2
    exit 2
fi

here=examples/compare_tiny
data=.cache/compare_tiny
out=${OUT:-runs/compare_tiny}
seeds=${SEEDS:-16} # of the comparisons that are tested
few=${FEW:-4}      # of those that are described
swept=${SWEPT:-8}  # of the sweep, and of the other losses
moe=($data/moe_{0..3}/hf)
dense=($data/dense_{0..3}/hf)
gap=sync.router_noise=0.2

python $here/prepare.py $data

run() { megatron-gspo compare $here/compare.toml --cold-start "${moe[@]}" "$@"; }
compare() { run --losses grpo,gspo "$@"; }

compare --replay off,r2    --seeds $seeds --out $out/no-gap
compare --replay off,r2,r3 --seeds $seeds --out $out/gap $gap
compare --replay off,r2    --seeds $few --out $out/fast optimizer.lr=2e-3
compare --replay off       --seeds $few --out $out/dense --dense-twin "${dense[@]}"
compare --replay off,r2    --seeds $swept --out $out/sweep --sweep optimizer.lr=1e-3:2.2e-3:3
run --losses ppo,dapo,cispo,sapo,gmpo --replay off --seeds $swept --out $out/losses
