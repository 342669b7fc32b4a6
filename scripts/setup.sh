#!/usr/bin/env bash
# Makes .venv with what the demo needs, or, given "dev", with everything the tests need. Sourced by demo.sh and test.sh.
# Safe to run again: what is there is kept, and what an interruption left half made is made anew.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
found=$("$python" -c 'import sys; print(sys.version_info >= (3, 11), "is", sys.version.split()[0])' 2> /dev/null) ||
    found="does not run"
if [[ $found != True* ]]; then
    echo "vapr needs Python 3.11 or newer, but $python ${found#False }; name another: PYTHON=python3.11 bash scripts/..." >&2
    exit 2
fi

# What was installed by these very files, here: an environment does not survive being moved.
made_from="$(cat pyproject.toml scripts/setup.sh | cksum) $PWD"

is_made() { # is_made FOLDER PART...: whether one of the parts is installed there
    local folder=$1 part
    shift
    [ ! -e "$folder/interrupted" ] && "$folder/bin/python" -c "" 2> /dev/null || return 1
    for part in "$@"; do
        grep -qxF "$part $made_from" "$folder/installed" 2> /dev/null && return
    done
    return 1
}

install() { # install FOLDER ARGUMENT...: pip install there; the mark stays if pip does not live to return
    local folder=$1 status=0
    shift
    touch "$folder/interrupted"
    .venv/bin/python -m pip --python "$folder/bin/python" install --quiet --disable-pip-version-check "$@" || status=$?
    [ "$status" -ge 128 ] || rm "$folder/interrupted"
    return "$status"
}

has_gpu() { command -v nvidia-smi > /dev/null; }

make_environment() { # make_environment PART REQUIREMENT: .venv with vapr and what the part needs
    if [ -e .venv/interrupted ] || ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
        rm -rf .venv
        "$python" -m venv .venv
    fi
    # First and by this exact version: on a machine without a GPU anything looser may pull gigabytes of CUDA.
    has_gpu || install .venv torch==2.13.0
    install .venv -e "$2"
    echo "$1 $made_from" >> .venv/installed
}

make_overlay() { # make_overlay FOLDER REQUIREMENT: an environment that sees .venv behind what it has itself
    rm -rf "$1"
    .venv/bin/python -m venv --without-pip "$1"
    local behind here
    behind=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    here=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "import site; site.addsitedir('$behind')" > "$here/behind.pth"
    install "$1" "$2" || return
    echo "overlay $made_from" > "$1/installed"
}

fetch_tokenizer() { # 32,000 real SentencePiece pieces for tests, out of a package that nothing here needs installed
    local cache=~/.cache/vapr-tests file=tokenizer.model.v1 folder
    [ ! -f "$cache/$file" ] || return 0
    folder=$(mktemp -d)
    .venv/bin/python -m pip download --quiet --no-deps --dest "$folder" mistral-common==1.13.1 &&
        .venv/bin/python -m zipfile -e "$folder"/*.whl "$folder" &&
        mkdir -p "$cache" &&
        mv "$folder/mistral_common/data/$file" "$cache" ||
        echo "no real tokenizer can be had here: its tests are skipped"
    rm -rf "$folder"
}

if [ "${1:-demo}" = dev ]; then
    if ! is_made .venv dev; then
        echo "setting up .venv for the tests (a few minutes the first time)"
        make_environment dev '.[dev]'
    fi
    fetch_tokenizer
elif ! is_made .venv demo dev; then
    echo "setting up .venv for the demo (about a minute the first time)"
    make_environment demo '.[data,audit]'
fi
