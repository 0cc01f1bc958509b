#!/usr/bin/env bash
# Everything that only a GPU can answer, in one call of under nine minutes, on a bare machine: CUDA, torch 2.11 or newer,
# Triton, no network. Builds here, tests, measures, trains; a part that fails or hangs does not stop the rest.
#
#   bash benchmarks/gpu.sh [PART ...] [--out DIR] [--peer DIR] [--wheels DIR] [--commit HASH] [--limit SECONDS] [--dry-run]
#   bash benchmarks/gpu.sh --fetch-wheels DIR [3.12]
#
#   PART            build tests ema step monitor train graphs parallel attention data checkpoint profile; default: all
#                   these, in this order. By name only: demos (textures and digits, trained to their end), masks (the
#                   mask modes at equal work), runs (whole runs: kept series, nvJPEG, checkpoints)
#   --out DIR       leaves summary.txt, rows.csv, log.txt, train.jsonl, profile.txt, trace.json.gz there (default out/gpu);
#                   demos adds textures.jsonl and digits.jsonl, runs a file for each run
#   --peer DIR      a checkout of facebookresearch/ijepa, to be measured beside us; none of its code is in this tree
#   --wheels DIR    wheels to use where packages are missing; --fetch-wheels fills such a folder, where there is a network
#   --commit HASH   what to write into the rows, where the checkout has no .git
#   --limit N       seconds for everything (530)
#   --dry-run       the same script on a CPU with the smallest shapes: does it run?
#
# Fold the rows into the project afterwards with: python -m benchmarks.rows DIR/rows.csv && python -m benchmarks.table
set -uo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON=${PYTHON:-$([ -x "$ROOT/.venv/bin/python" ] && echo "$ROOT/.venv/bin/python" || echo python3)}
# What a machine with torch, numpy, pillow, matplotlib, scikit-learn, pybind11, pytest and hypothesis still lacks.
WHEELS="webdataset braceexpand tyro docstring_parser typeguard simplejpeg safetensors"
ALL="build tests ema step monitor train graphs parallel attention data checkpoint profile"
MORE="demos masks runs"

die() { echo "error: $*" >&2; exit 2; }

fetch_wheels() {
    local platforms=() n
    for n in 28 27 17; do platforms+=(--platform "manylinux_2_${n}_x86_64"); done
    "$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "${2:-3.12}" --implementation cp \
        "${platforms[@]}" --platform manylinux2014_x86_64 -c "$ROOT/constraints.txt" -d "$1" $WHEELS
}

parts=() out="$ROOT/out/gpu" peer="" wheels="" dry="" limit=530
while [ $# -gt 0 ]; do
    case $1 in
        --out | --peer | --wheels | --commit | --limit | --fetch-wheels)
            [ $# -ge 2 ] || die "$1 needs a value"
            case $1 in
                --out) out=$2 ;;
                --peer) [ -d "$2" ] || die "--peer $2 is not a folder"; peer=$(cd "$2" && pwd) ;;
                --wheels) [ -d "$2" ] || die "--wheels $2 is not a folder"; wheels=$(cd "$2" && pwd) ;;
                --commit) export JEPA_FAST_COMMIT=$2 ;;
                --limit) limit=$2 ;;
                --fetch-wheels) fetch_wheels "$2" "${3:-}"; exit $? ;;
            esac
            shift 2 ;;
        --dry-run) dry=1; shift ;;
        -h | --help) sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        -*) die "unknown option $1; --help lists all" ;;
        *) case " $ALL $MORE " in *" $1 "*) parts+=("$1") ;; *) die "there is no part $1; choose from $ALL $MORE" ;; esac; shift ;;
    esac
done
[ ${#parts[@]} -gt 0 ] || read -ra parts <<<"$ALL"
mkdir -p "$out" && out=$(cd "$out" && pwd) || die "--out $out cannot be made"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$ROOT" || exit 2
export PYTHONPATH="$ROOT:$ROOT/kernels:$scratch/site" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MPLBACKEND=Agg
export JEPA_FAST_CACHE="${JEPA_FAST_CACHE:-$scratch/cache}"
if [ -n "$wheels" ]; then
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$scratch/site" "$wheels"/*.whl \
        || die "the wheels in $wheels do not install here; --fetch-wheels DIR VERSION fetches those of another Python"
fi
missing=$("$PYTHON" -c 'import importlib.util as u, sys
for n in "torch numpy webdataset tyro PIL simplejpeg safetensors matplotlib sklearn pytest hypothesis".split() + sys.argv[1:]:
    if u.find_spec(n) is None: print(n, end=" ")' $([ -n "$dry" ] || echo pybind11 triton))
[ -z "$missing" ] || die "$PYTHON lacks: $missing; with a network: make test, or --fetch-wheels DIR there and --wheels DIR here"

device=cuda tiny="" gate=""
[ -z "$dry" ] || { device=cpu; tiny=--tiny; }

# ---- the parts ---------------------------------------------------------------------------------------------

bench() { # NAME [OPTION ...]
    local name=$1; shift
    "$PYTHON" -m "benchmarks.bench_$name" --device "$device" --out "$scratch/rows" $tiny $gate "$@"
}
part_build() {
    export NPY_NUM_BUILD_JOBS=8
    if [ -z "$dry" ]; then "$PYTHON" setup.py -q build_ext --inplace; fi
    "$PYTHON" -c 'import jepa_fast_C, fused_ema_C' && "$PYTHON" -m jepa_fast.doctor # a self-test of each kernel
}
part_tests() {
    if [ -n "$dry" ]; then
        "$PYTHON" -m pytest -q --collect-only -m gpu tests
    else
        "$PYTHON" -m pytest -q -m gpu tests
    fi
}
part_ema() { bench ema; }
part_step() { # beside the peer, whose activations are larger, H takes 32 images; without it what fills the device
    [ -z "$dry" ] || { bench step ${peer:+--peer "$peer"}; return; }
    local code=0 huge=(--batch 128)
    [ -z "$peer" ] || huge=(--batch 32 --peer "$peer")
    share() { # SECONDS OPTION ...: one size, with a bound of its own
        local bound=$1; shift
        BENCH_DEADLINE=$(($(date +%s) + bound - 10)) timeout --foreground -s KILL "$bound" "$PYTHON" \
            -m benchmarks.bench_step --device "$device" --out "$scratch/rows" $gate --seconds 8 "$@" || code=1
    }
    share 50 --shapes vit_b16 ${peer:+--peer "$peer"}
    share 55 --shapes vit_h14 "${huge[@]}"
    share 33 --shapes vit_l16
    return $code
}
part_monitor() { bench monitor --seconds 7; }
part_graphs() { "$PYTHON" -m benchmarks.cuda_graphs --device "$device" --out "$scratch/rows" $tiny $gate --seconds 4; }
part_parallel() { bench parallel --seconds 6 $([ -n "$dry" ] || echo --shapes vit_b16); } # FSDP, world size 1
part_attention() { bench attention; }
part_data() { bench data; }
part_checkpoint() { bench checkpoint; }
part_train() { # a real run on generated 224-pixel textures: data, masks, compiled model, monitor, checkpoint, report
    local options=(in1k-vitb16 --data.embedded textures224 --train.batch_size 256 --train.steps 60 --monitor.every 30
        --monitor.probe_train 512 --monitor.probe_test 256)
    [ -z "$dry" ] || options=(demo --train.steps 20 --monitor.every 20)
    "$PYTHON" -m jepa_fast.train "${options[@]}" --run.dir "$scratch/run"
    local code=$?
    cat "$scratch/run/events.jsonl"
    return $code
}
part_demos() { # the curves of the CPU's runs, on this device
    local code=0 name
    for name in textures digits; do
        "$PYTHON" -m jepa_fast.train "$name" --run.dir "$scratch/$name" ${dry:+--train.steps 20} || code=1
    done
    return $code
}
part_masks() { # twelve runs; what is finished when time is up is in the rows
    local options=(--seeds 3)
    [ -z "$dry" ] || options=(--seeds 1 --steps 4 --monitor.probe_train 64 --monitor.probe_test 64)
    "$PYTHON" -m benchmarks.mask_modes "${options[@]}" --runs "$scratch/masks" --out "$scratch/rows"
}
part_runs() { # what only whole runs show, in their metrics: series kept on the device, nvJPEG, checkpoints under way
    local code=0 steps=200 every=50 log=10 places="host device" decoders="cpu nvjpeg"
    local big=(in1k-vitb16 --data.embedded textures224 --train.batch_size 128 --monitor.probe_train 256 --monitor.probe_test 128)
    if [ -n "$dry" ]; then
        steps=4 every=2 log=1 places=host decoders=cpu
        big=(images --data.embedded textures224 --data.image_size 64 --model.width 64 --model.depth 1 --model.heads 2
            --train.batch_size 8 --train.precision fp32 --masks.min_keep 1 --monitor.probe_train 64 --monitor.probe_test 64)
    fi
    one() { # NAME OPTION ...
        "$PYTHON" -m jepa_fast.train "${@:2}" --train.steps $steps --run.dir "$scratch/$1" || code=1
    }
    local choice
    for choice in $places; do one "kept-$choice" demo --data.keep_on "$choice"; done
    for choice in $decoders; do one "decoded-$choice" "${big[@]}" --data.decoder "$choice"; done
    one checkpoints "${big[@]}" --checkpoint.every $every --log.every $log
    return $code
}
part_profile() {
    "$PYTHON" -m benchmarks.kernel_table --device "$device" $tiny --out "$scratch/rows" --trace "$out/trace.json.gz" \
        >"$out/profile.txt"
    local code=$?
    head -40 "$out/profile.txt"
    return $code
}

# Seconds a part may take; those of one call are its limit together.
declare -A most=([build]=60 [tests]=52 [ema]=42 [step]=140 [monitor]=58 [train]=38 [graphs]=30 [parallel]=30 [attention]=20
    [data]=22 [checkpoint]=18 [profile]=20)
most[demos]=500 most[masks]=520 most[runs]=500 # each a call of its own
if [ -n "$dry" ]; then for part in $ALL $MORE; do most[$part]=120; done; fi # a busy CPU is no fault of the script

# ---- one after the other -----------------------------------------------------------------------------------

export -f bench
for part in $ALL $MORE; do export -f "part_$part"; done
export ROOT PYTHON out peer dry scratch device tiny gate
: >"$out/log.txt"
{
    "$PYTHON" -c 'import platform, torch; print("Python", platform.python_version(), "torch", torch.__version__)'
    [ -n "$dry" ] || nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.draw,power.limit,temperature.gpu --format=csv
} 2>&1 | tee -a "$out/log.txt"

collect() { # all rows and records so far: what is cut off later still leaves them
    local run
    for run in run textures digits kept-host kept-device decoded-cpu decoded-nvjpeg checkpoints; do
        [ ! -f "$scratch/$run/metrics.jsonl" ] || cp "$scratch/$run/metrics.jsonl" "$out/${run/#run/train}.jsonl"
    done
    [ -d "$scratch/rows" ] || return 0
    { cat "$scratch"/rows/*.csv | head -n 1; tail -q -n +2 "$scratch"/rows/*.csv; } >"$out/rows.csv"
}

outcomes=() failed=0
for part in "${parts[@]}"; do
    left=$((limit - SECONDS))
    bound=$((most[$part] < left ? most[$part] : left))
    began=$SECONDS
    if [ $bound -lt 5 ]; then
        outcome="not started: no time left"
    else
        echo "== $part" | tee -a "$out/log.txt"
        # Killed with all that it started, and read from a file: nobody waits for a process that outlives its part.
        BENCH_DEADLINE=$(($(date +%s) + bound - 6)) timeout -s KILL "$bound" bash -c "part_$part" >"$scratch/said" 2>&1
        code=$?
        cat "$scratch/said" >>"$out/log.txt"
        tail -n 25 "$scratch/said"
        case $code in
            0) outcome=done ;;
            124 | 137) outcome="stopped after $bound s" ;;
            *) outcome="failed with exit code $code" ;;
        esac
    fi
    [ "$outcome" = done ] || failed=1
    # Tests that were green in this call need not run again before each benchmark.
    if [ "$part" = tests ] && [ "$outcome" = done ]; then gate=--ungated; fi
    outcomes+=("$(printf '%-12s %4d s  %s' "$part" $((SECONDS - began)) "$outcome")")
    collect
done

{
    echo
    [ ! -d "$scratch/rows" ] || "$PYTHON" -m benchmarks.table --text --results "$scratch/rows"
    echo
    printf '%s\n' "${outcomes[@]}"
    echo "$SECONDS s in all; results in $out"
} 2>&1 | tee "$out/summary.txt"
exit $failed
