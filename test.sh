#!/usr/bin/env bash
# Sets up an environment (or takes PYTHON=...) and runs the tests: no network beyond the package index, no GPU.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_env.sh pytest datasets huggingface_hub transformers pypdfium2
exec "$PYTHON" -m pytest -q "$@"
