#!/usr/bin/env bash
# Downloads into .whl/ what a GPU machine without a network lacks: the wheels that scripts/gpu_check.sh installs there.
#
#   bash scripts/fill_wheels.sh [PYTHON_VERSION]     # the other machine's Python, 3.12 by default
#
# Meant for a machine that has torch, triton, transformers, peft and accelerate already. pydantic is needed by vapr
# itself, the rest by the peers of the benchmarks. Together they are about 12 MiB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
wheels=(
    pydantic pydantic-core annotated-types typing-inspection typing-extensions # run configs
    trl datasets dill multiprocess # the peer of training steps
    liger-kernel # a peer of the LM head and of the norms
    rapidfuzz # the audit of pairs
)
rm -rf .whl
platforms=()
for platform in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${platform}_x86_64")
done
# pydantic works with one version of pydantic-core only, which its metadata names.
pip=(python3 -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all:
    --python-version "${1:-3.12}" --implementation cp "${platforms[@]}" --dest .whl)
"${pip[@]}" pydantic
core=$(unzip -p .whl/pydantic-*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([0-9.]*\).*/\1/p')
for wheel in "${wheels[@]:1}"; do
    [ "$wheel" != pydantic-core ] || wheel="pydantic-core==$core"
    [ "$wheel" != trl ] || wheel="trl>=1.16,<1.17"
    "${pip[@]}" "$wheel"
done
du -sh .whl
