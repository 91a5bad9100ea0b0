#!/usr/bin/env bash
# What only a card can say, in three commands of at most ten minutes each, for a machine without a network that has torch,
# triton, transformers and pytest, and where this package is not installed.
#
#   bash benchmarks/gpu.sh prepare    where pip works, in the checkout: 3.1 MB of wheels to .whl/, for Python 3.12
#   bash benchmarks/gpu.sh check      on the card, .whl/ carried along: is everything right there? Equality, then the tests
#   bash benchmarks/gpu.sh speed      ceilings, kernels, memory, and each kind of run beside the plain baseline
#   bash benchmarks/gpu.sh report     the whole table (report.md): benchmarks/report.py --quick
#
# Each writes <command>.log and <command>.jsonl to $OUT (gpu/) as it goes. A step that fails or takes too long loses neither
# what it has said nor the steps after it; the last lines say how each ended. Here, without a card: add --small.
set -u
cd "$(dirname "$0")/.." || exit 1
command=${1:-} small=${2:-} PYTHON=${PYTHON:-python3} OUT=${OUT:-$PWD/gpu} LIMIT=${LIMIT:-570}
site=${SITE:-$HOME/.cache/undo-gpu/site} needed=(pydantic pydantic-core omegaconf annotated-types typing-inspection typing-extensions)

prepare() {
    local name pins=() platforms=()
    for name in "${needed[@]}"; do
        pins+=("$name==$(grep -A1 "^name = \"$name\"" uv.lock | sed -n 's/version = "\(.*\)"/\1/p')")
    done
    for name in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
        platforms+=(--platform "${name}_x86_64")
    done
    rm -rf .whl && "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
        --implementation cp "${platforms[@]}" --dest .whl "${pins[@]}" && du -sh .whl
}

begin() {
    mkdir -p "$OUT" && rm -f "$OUT/$command".{log,jsonl} && began=$SECONDS
    if ! "$PYTHON" -c 'import pydantic, omegaconf' 2>/dev/null; then
        "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$site" \
            .whl/*.whl || exit 1
        export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
    fi
    export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
    export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$HOME/.cache/undo-gpu/inductor}
    unset PYTHONDONTWRITEBYTECODE # every side of a benchmark would compile torch anew
    nvidia-smi --query-gpu=name,memory.total,clocks.sm --format=csv 2>/dev/null || echo "no card"
}

ends=() failures=0
step() { # seconds at most, name, command
    local most=$1 name=$2 left=$((LIMIT - SECONDS + began)) since=$SECONDS status
    shift 2
    if ((left < 10)); then
        ends+=("$name: not run, no time left") && failures=$((failures + 1)) && return
    fi
    printf '\n=== %s: %s\n' "$name" "$*" | tee -a "$OUT/$command.log"
    timeout --kill-after=10 $((most < left ? most : left)) "$@" 2>&1 | tee -a "$OUT/$command.log"
    status=${PIPESTATUS[0]}
    ends+=("$name: status $status, $((SECONDS - since)) s")
    ((status == 0)) || failures=$((failures + 1))
}

finish() {
    printf '\n=== how each step ended\n' | tee -a "$OUT/$command.log"
    printf '%s\n' "${ends[@]}" | tee -a "$OUT/$command.log"
    exit $((failures > 0))
}

bench() { # seconds at most, name, script and arguments: its lines go to $OUT
    local most=$1 name=$2 script=$3
    shift 3
    step "$most" "$name" "$PYTHON" "benchmarks/$script" "$@" --out "$OUT/$command.jsonl"
}

case $command in
prepare) prepare ;;
check)
    begin
    if [ "$small" = --small ]; then
        bench 300 equality equality.py --small
        bench 120 parts card.py recompiles syncs --small
        step 300 tests "$PYTHON" -m pytest -q -n 0 -p no:cacheprovider tests/test_corrupt.py
    else
        bench 270 equality equality.py --compile
        bench 80 parts card.py recompiles syncs
        step 60 fits "$PYTHON" benchmarks/fits.py --measure
        mapfile -t marked < <(grep -rl 'mark\.device' tests --include='test_*.py')
        UNDO_TESTS_ON=cuda step 300 tests "$PYTHON" -m pytest -q -n 6 -p no:cacheprovider "${marked[@]}"
    fi
    finish ;;
speed)
    begin
    if [ "$small" = --small ]; then
        bench 120 parts card.py ceilings tiles memory --small
        tiny=(--vocabulary 500 --length 32 --rows 2 --steps 1 --repeats 1 --threads 1 --sides published,ours)
        bench 300 steps train.py --small "${tiny[@]}" --case distill-0.1B --case attack-2B
    else
        bench 60 parts card.py ceilings tiles
        twice=(--repeats 2 --sides published,ours)
        paper=(--length 2048 --rows 32 --micro-rows 4 --our-micro-rows 16)
        bench 110 distill-0.1B train.py --compile "${twice[@]}" "${paper[@]}" --case distill-0.1B
        bench 90 pretrain-0.1B train.py --compile "${twice[@]}" "${paper[@]}" --case pretrain-0.1B
        short=(--case language-0.1B --length 2048 --rows 8 --steps 10 --documents 100 --repeats 1 --sides published,ours)
        bench 100 relearn relearn.py "${short[@]}"
        bench 100 attack-2B train.py "${twice[@]}" --length 1024 --rows 8 --micro-rows 1 --our-micro-rows 4 --case attack-2B
        wide=(--length 256 --rows 240 --micro-rows 60 --our-micro-rows 120)
        bench 90 distill-0.3B train.py --compile "${twice[@]}" "${wide[@]}" --case distill-0.3B
        bench 80 pretrain-0.3B train.py --compile "${twice[@]}" "${wide[@]}" --case pretrain-0.3B
        bench 80 memory card.py memory --budget 60
    fi
    finish ;;
report)
    begin
    bench 560 report report.py --quick --unchecked ${small:+"$small"}
    finish ;;
*)
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2 ;;
esac
