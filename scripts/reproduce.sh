#!/usr/bin/env bash
# VaPR with one model, from instruction data to a page: edit, audit, train, eval before and after.
# The same command goes on where it was stopped; what is done is not done again.
#
#   bash scripts/reproduce.sh MODEL --data SFT.json [--images DIR] [--bench NAME=PATH]... [option]...
#
# MODEL is llava_1_5_7b, llava_1_5_13b, qwen2_vl_2b, qwen2_vl_7b, qwen2_5_vl_3b, qwen2_5_vl_7b, or a local folder of such a
# model, of any size.
#
#   --data FILE          questions with true answers about images (docs/edit.md), such as llava_v1_5_mix665k.json
#   --images DIR         folder that the paths of the images start at
#   --bench NAME=PATH    a benchmark and where its questions are (docs/benchmarks.md); repeatable
#   --out DIR            where everything goes; pairs are shared by the models   [reproduction]
#   --editor EDITOR      rules, a language model that vLLM runs, or a server      [rules]
#   --pairs N            pairs that are made and trained on                       [30000, as the paper]
#   --full               full fine-tuning instead of LoRA
#   --gpu-memory GIB     the card, if it is not the one that is here
#   --recipe FILE        a run config in place of the one in scripts/recipes
#   --set KEY=VALUE      another value in it; repeatable
#   --limit N            ask only N questions of each benchmark
#   --max-new-tokens N   longest answer to a question                             [512]
#   --dry-run            print the commands and run none
#
# Exit code: 0 with a page, 2 for a mistake in the call, else that of the stage that failed.
set -uo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

mistake() {
    echo "Error: reproduce.sh: $*" >&2
    exit 2
}

# Read the arguments.

model="" data="" images="" out=reproduction editor=rules pairs=30000 tuning=lora gib="" recipe="" dry=""
benches=() settings=() asking=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"
            exit 0
            ;;
        --full) tuning=full ;;
        --dry-run) dry=yes ;;
        --data | --images | --bench | --out | --editor | --pairs | --gpu-memory | --recipe | --set | --limit | --max-new-tokens)
            [ $# -ge 2 ] || mistake "$1 needs a value; see --help"
            case $1 in # here, because the stage that takes it may begin hours from now
                --pairs | --limit | --max-new-tokens)
                    [[ $2 =~ ^0*[1-9][0-9]*$ ]] || mistake "$1 $2: give a whole number of at least 1"
                    ;;
            esac
            case $1 in
                --data) data=$2 ;;
                --images) images=$2 ;;
                --bench) benches+=(--bench "$2") ;;
                --out) out=$2 ;;
                --editor) editor=$2 ;;
                --pairs) pairs=$2 ;;
                --gpu-memory) gib=$2 ;;
                --recipe) recipe=$2 ;;
                --set) settings+=(--set "$2") ;;
                *) asking+=("$1" "$2") ;;
            esac
            shift
            ;;
        -*) mistake "unknown option $1; see --help" ;;
        *)
            [ -z "$model" ] || mistake "two models, $model and $1; give one at a time, with the same --out"
            model=$1
            ;;
    esac
    shift
done
[ -n "$model" ] || mistake "which model? See --help"
[ -n "$data" ] || mistake "--data is missing: a file of questions with true answers about images, as docs/edit.md describes"

# Choose the recipe.

card_of() { # card_of GIB: the largest card of the recipes that so much memory stands for; cards hold a little less than sold
    awk -v gib="$1" 'BEGIN { for (n = split("141 80 24", card); c = card[++i];) if (gib >= 0.9 * c) { print c; exit } }'
}

model_of() { # model_of FOLDER: the paper's model of this family that is as large, or the next larger one
    python3 - "$1" <<'PY'
import json, sys

SIZES = {
    "llava": {4096: "llava_1_5_7b", 5120: "llava_1_5_13b"},
    "qwen2_vl": {1536: "qwen2_vl_2b", 3584: "qwen2_vl_7b"},
    "qwen2_5_vl": {2048: "qwen2_5_vl_3b", 3584: "qwen2_5_vl_7b"},
}
try:
    with open(f"{sys.argv[1]}/config.json") as file:
        config = json.load(file)
    hidden = config.get("text_config", config).get("hidden_size") or config["hidden_size"]
    print(next(name for size, name in SIZES[config["model_type"]].items() if hidden <= size))
except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
    sys.exit(1)
PY
}

if [ -z "$gib" ]; then
    gib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2> /dev/null | sort -n | head -n 1 |
        awk '{ print $1 / 1024 }')
elif ! [[ $gib =~ ^[0-9]+(\.[0-9]+)?$ ]]; then
    mistake "--gpu-memory $gib: give a number of GiB, such as 24"
fi
name=$(basename "$model")
if [ -z "$recipe" ]; then
    if [ -d "$model" ]; then
        like=$(model_of "$model") || mistake "$model: no config.json of a LLaVA-1.5, Qwen2-VL or Qwen2.5-VL in it up to the" \
            "sizes of the recipes; give --recipe FILE, a run config of your own"
    else
        like=$model
    fi
    if [ -n "$gib" ]; then
        card=$(card_of "$gib")
        [ -n "$card" ] || mistake "a GPU of $gib GiB is smaller than those of the recipes (24 GB and more); write a run config" \
            "for it with the help of vapr plan and give it as --recipe FILE"
        because="for a card of $card GB"
    else
        card=80 because="no GPU here: the recipe for 80 GB, in float32; enough for a small model and a look at the machinery"
        settings=(--set policy.dtype=float32 "${settings[@]}")
    fi
    recipe=$here/recipes/${like}_${tuning}_${card}gb.yaml
    if [ ! -f "$recipe" ]; then
        known=$(cd "$here/recipes" && ls | sed 's/_\(lora\|full\)_.*//' | sort -u | paste -sd ' ')
        [[ " $known " == *" $like "* ]] || mistake "$model is no folder and none of $known"
        mistake "full fine-tuning of $like does not fit $card GB; leave out --full, or see docs/recipes.md for several cards"
    fi
else
    [ -f "$recipe" ] || mistake "--recipe $recipe: no such file"
    because="given"
fi
if [ -d "$model" ]; then
    base=$model
    settings=(--set "policy.model=$model" "${settings[@]}")
else
    base=$(sed -n 's/^  model: *\([^ #]*\).*/\1/p' "$recipe")
fi

# Run the stages.

work=$out/$name
run=$work/aligned
rows=()
[ -z "$images" ] || rows=(--image-root "$images")

stage() { # stage NAME WHAT RESULT ALLOWED COMMAND...: say what it does, run it, say how long it took and where the result is
    local stage=$1 what=$2 result=$3 allowed=$4 began=$SECONDS status=0
    shift 4
    echo
    echo "== $stage: $what"
    printf '  '
    printf ' %q' "$@"
    [ "$stage" != audit ] || printf ' > %q' "$out/audit.json"
    echo
    [ -z "$dry" ] || return 0
    if [ "$stage" = audit ]; then
        "$@" > "$out/audit.part"
    else
        "$@"
    fi
    status=$?
    if [ "$stage" = audit ] && [ "$status" -le "$allowed" ]; then
        mv "$out/audit.part" "$out/audit.json" # whole or not at all, because what is there is not made again
    fi
    printf '%s\t%s\t%s\n' "$stage" "$((SECONDS - began))" "$status" >> "$work/stages.tsv"
    if [ "$status" -gt "$allowed" ]; then
        echo "== $stage ended with exit code $status after $((SECONDS - began)) s; the same command goes on from here" >&2
        exit "$status"
    fi
    echo "== $stage: $((SECONDS - began)) s, $result"
}

echo "recipe: $recipe ($because)"
if [ -z "$dry" ]; then
    if ! command -v vapr > /dev/null; then
        (source "$here/setup.sh" demo) || exit
        PATH=$(dirname "$here")/.venv/bin:$PATH
    fi
fi
python=$(dirname "$(readlink -f "$(command -v vapr)")")/python # the one that vapr is installed for
[ -x "$python" ] || python=python3
if [ -z "$dry" ]; then
    # What would stop a later stage is better known before the first, which may take hours.
    "$python" "$here/reproduction.py" check "$recipe" "${settings[@]}" "${benches[@]}" || exit
    mkdir -p "$work" || exit
fi

stage edit "makes hard negatives of the true answers in $data" "$out/pairs" 0 \
    vapr edit "$data" --out "$out/pairs" --editor "$editor" --target "$pairs" "${rows[@]}"
if [ -z "$dry" ] && [ -f "$out/audit.json" ] && [ -z "$(find "$out/pairs/pairs" -newer "$out/audit.json" -name '*.parquet')" ]; then
    echo
    echo "== audit: done before, $out/audit.html"
else
    # Exit code 1 is a gate that fails: it stands in the page, and whoever wants to know what it does to a model goes on.
    stage audit "measures what gives the rejected answers away without the image" "$out/audit.html" 1 \
        vapr audit "$out/pairs" --out "$out/audit.html" --json
fi
go_on=()
[ ! -e "$run" ] || go_on=(--resume)
stage train "aligns $base with DPO" "$run (report.html shows its curves)" 0 \
    vapr train "$recipe" "${go_on[@]}" --set "run_dir=$run" --set "data.train=$out/pairs" "${settings[@]}"
if [ "${#benches[@]}" -gt 0 ]; then
    stage eval "lets the model answer benchmarks, before and after" "$work/eval/comparison.html" 0 \
        vapr eval "$base" "$run" "${benches[@]}" --out "$work/eval" "${asking[@]}"
else
    echo
    echo "== eval: left out, because no --bench is given; the page will say what was not measured"
fi
stage page "puts what came out beside what the paper reports" "$work/reproduction.html" 0 \
    "$python" "$here/reproduction.py" page "$out" "$name"
