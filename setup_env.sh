# Sourced by speedrun.sh and test.sh: leaves $PYTHON pointing at an environment that has the packages named in the arguments.
# PYTHON=/path/to/python          an environment that stands: it is used as it is, nothing is installed
# TORCH_INDEX_URL=https://...     where pip takes torch from, e.g. a CUDA build
if [ -n "${PYTHON:-}" ]; then
    echo "using PYTHON=$PYTHON as it stands"
else
    PYTHON=.venv/bin/python
    wanted="torch==2.13.0 numpy pillow tqdm tiktoken safetensors matplotlib rustbpe rapidfuzz $*"
    if ! grep -qxF "$wanted" .venv/installed 2>/dev/null; then
        python3 -c 'import sys; assert sys.version_info >= (3, 11), f"Python {sys.version.split()[0]} is too old: 3.11 or later is needed"'
        [ -x "$PYTHON" ] || python3 -m venv .venv
        "$PYTHON" -m pip install --quiet --disable-pip-version-check ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
        # shellcheck disable=SC2086
        "$PYTHON" -m pip install --quiet --disable-pip-version-check $wanted
        echo "$wanted" >> .venv/installed
    fi
fi
