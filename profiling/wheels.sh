#!/usr/bin/env bash
# A folder of wheels for a GPU machine without a network that has torch, Triton and NumPy already.
#   profiling/wheels.sh [FOLDER] [PYTHON_VERSION] [PACKAGE ...]        default: wheels 3.12; e.g. also av scipy
# There: pip install --no-index --no-deps FOLDER/*.whl      (docs/profiling.md: what each part needs, and the sizes)
set -euo pipefail
folder=${1:-wheels} version=${2:-3.12}
extra=("${@:3}")
download() {
    "${PYTHON:-python3}" -m pip download --quiet --only-binary :all: --python-version "$version" --implementation cp \
        --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
        --dest "$folder" --constraint "$(dirname "$0")/../constraints/ci-cpu.txt" "$@"
}
mkdir -p "$folder"
# With their dependencies, none of which is torch; NumPy is left to torch's machine.
download pydantic diffusers pytest
download --no-deps pyyaml safetensors pytest-timeout tqdm nvtx "${extra[@]}"
rm -f "$folder"/numpy-*.whl
du --apparent-size --block-size=1M --summarize "$folder" | awk -v f="$folder" '{ print f ": " $1 " MiB" }'
