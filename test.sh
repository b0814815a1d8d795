#!/usr/bin/env bash
# Sets up an environment (or takes PYTHON=...) and runs the tests: no network beyond the package
# index, no GPU. Flags go to pytest.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup_env.sh pytest pytest-xdist datasets huggingface_hub transformers pypdfium2
# Two processes of one thread each, where pytest-xdist is installed; PYTHON's environment may lack it.
PARALLEL=""
if "$PYTHON" -c 'import xdist' 2>/dev/null; then PARALLEL="-n 2 --dist worksteal"; fi
# shellcheck disable=SC2086
exec "$PYTHON" -m pytest -q $PARALLEL "$@"
