# Sourced by speedrun.sh and test.sh: leaves $PYTHON pointing at an environment that has the
# packages named in the arguments, beside those that everything needs. By itself (bash setup_env.sh)
# it makes .venv with those.
#
# PYTHON=/path/to/python          an existing environment: used as it is, nothing is installed
# TORCH_INDEX_URL=https://...     where pip takes torch from, e.g. the index of a CUDA build
set -e  # a failed installation must not be noted as done
if [ -n "${PYTHON:-}" ]; then
    echo "using the existing environment of PYTHON=$PYTHON"
else
    PYTHON=.venv/bin/python
    wanted="torch==2.13.0 numpy pillow tqdm tiktoken safetensors matplotlib rustbpe rapidfuzz $*"
    # .venv/installed lists what earlier calls have installed, a line for each list of packages.
    if ! grep -qxF "$wanted" .venv/installed 2>/dev/null; then
        python3 -c 'import sys; assert sys.version_info >= (3, 11), f"Python {sys.version.split()[0]} is too old: 3.11 or later is needed"'
        # Debian without python3-venv, and Ctrl-C, leave an environment without pip: that is mended.
        "$PYTHON" -m pip --version >/dev/null 2>&1 || python3 -m venv .venv
        pip_install=("$PYTHON" -m pip install --quiet --disable-pip-version-check)
        # torch first and by itself: an index of CUDA builds has none of the other packages.
        "${pip_install[@]}" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch==2.13.0
        # shellcheck disable=SC2086
        "${pip_install[@]}" $wanted
        echo "$wanted" >> .venv/installed
    fi
fi
