#!/usr/bin/env bash
# Snakemake runs this once in a new conda environment, from its working directory. The package is
# installed in editable mode, so that an environment never holds an older tlora than the checkout;
# what a job depends on is tracked by the rules' `input: code=`.
set -euo pipefail
root="${TLORA_ROOT:-$PWD}"
if ! grep -qsx 'name = "tlora"' "$root/pyproject.toml"; then
    echo "tlora: no checkout in $root: start snakemake there, or set TLORA_ROOT to it" >&2
    exit 1
fi
python -m pip install --no-deps --no-build-isolation --editable "$root"
python -c 'import tlora'
