#!/bin/bash
# docker/lock.sh: pins everything that the images install, by version and hash, from pyproject.toml and constraints.txt.
#
# Run it after a change of either; tests/docker fails until then. Needs `uv` (pip install uv). The CPU build of torch
# is not on the package index: TORCH_CPU names the page, or a directory, that has its wheel.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH_CPU=${TORCH_CPU:-https://download.pytorch.org/whl/cpu/torch/}
uv=${UV:-uv}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

compile() {  # compile OUTPUT PYTHON ARGUMENTS...: one lock, for Linux on x86-64; no address of an index in it
  local output=$1 python=$2
  shift 2
  "$uv" --config-file docker/uv.toml pip compile "$@" --python-version "$python" \
    --python-platform x86_64-manylinux_2_28 --generate-hashes --no-annotate --no-header --quiet \
    --output-file "$work/lock"
  { echo "# Made by docker/lock.sh. Do not edit."; cat "$work/lock"; } > "docker/$output"
}

extras=(--extra deepspeed --extra math)

compile requirements-gpu.lock 3.12 pyproject.toml "${extras[@]}" --extra qlora --constraints constraints.txt

# Compiled against the torch of the lock above, once that is installed; einops is what it needs besides.
printf 'flash-attn\neinops\n' > "$work/flash.in"
compile requirements-flash.lock 3.12 "$work/flash.in" --no-deps --constraints docker/requirements-gpu.lock

torch=$(sed -n 's/^torch==//p' constraints.txt)
grep -v '^torch==' constraints.txt > "$work/constraints.txt"
echo "torch==$torch+cpu" > "$work/torch.txt"
compile requirements-cpu.lock 3.11 pyproject.toml "${extras[@]}" --constraints "$work/constraints.txt" \
  --overrides "$work/torch.txt" --find-links "$TORCH_CPU"

# What packages without wheels are built with: of the locks above, so that nothing is there twice.
grep -E '^(setuptools|packaging|psutil|ninja)==' docker/requirements-gpu.lock | sed 's/ .*//' > "$work/same.txt"
printf 'setuptools\nwheel\nninja\npackaging\npsutil\npy-cpuinfo\n' > "$work/build.in"
compile requirements-build.lock 3.11 "$work/build.in" --constraints "$work/same.txt"

wc -l docker/requirements-*.lock
