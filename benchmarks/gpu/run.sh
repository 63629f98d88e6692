#!/usr/bin/env bash
# Every figure that takes a GPU, in one call of at most ten minutes. README.md beside this says how.
#   [GOHSP_ASSETS=scratch/gpu] [OUT=runs/gpu] benchmarks/gpu/run.sh [--dry-run] [--continue FOLDER] [PART ...]
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
export GOHSP_ASSETS=${GOHSP_ASSETS:-scratch/gpu}
export PYTHONPATH="src:benchmarks${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # asking whether there is a GPU must not keep parts from being forked
if [[ " $* " != *" --dry-run "* ]] && compgen -G "$GOHSP_ASSETS/wheels/*.whl" >/dev/null; then
  packages=$(mktemp -d)
  trap 'rm -rf "$packages"' EXIT
  offline=(--quiet --disable-pip-version-check --no-index --no-deps --no-compile)
  "$python" -m pip install "${offline[@]}" --target "$packages" "$GOHSP_ASSETS"/wheels/*.whl
  PYTHONPATH="$PYTHONPATH:$packages"
fi
"$python" -m gpu --seconds $((580 - SECONDS)) "$@"
