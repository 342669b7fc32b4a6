#!/usr/bin/env bash
# Downloads into .whl/ what a GPU machine without a network lacks: the wheels that scripts/gpu_check.sh installs there.
#
#   bash scripts/fill_wheels.sh [PYTHON_VERSION]     # the other machine's Python, 3.12 by default
#
# Meant for a machine that has torch, triton, transformers, peft, accelerate, rich and tensorboard already. Together the
# wheels are about 50 MiB, 41 of which are bitsandbytes (nf4 bases and 8-bit AdamW): leave it out where that is too much.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
needs=("pydantic>=2.9" "inflect>=7.4" "rapidfuzz>=3.10") # of vapr itself; they come with what they depend on
peers=(
    "trl>=1.16,<1.17" datasets dill multiprocess # the peer of training steps
    liger-kernel # a peer of the LM head and of the norms
    bitsandbytes # 4-bit bases and 8-bit AdamW
)
rm -rf .whl
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
done
pip=(python3 -m pip download --quiet --disable-pip-version-check --only-binary=:all:
    --python-version "${1:-3.12}" --implementation cp "${platforms[@]}" --dest .whl)
"${pip[@]}" "${needs[@]}"
"${pip[@]}" --no-deps "${peers[@]}"
du -sh .whl
