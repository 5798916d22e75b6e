#!/usr/bin/env bash
# Installs transformers into a virtual environment and measures its decode speed on the demo model.
#   tests/peers/run.sh [--venv DIR] [arguments of transformers_decode.py]
# The environment (5.6 GB, kept between runs) lies in target/peers-venv unless --venv names another folder.
set -euo pipefail

torch=2.15.0
transformers=5.23.0

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$here/../../target/peers-venv
if [[ ${1:-} == --venv ]]; then
    venv=${2:?--venv wants a folder}
    shift 2
fi

# The mark is written last, so that an install that was cut off is done again.
mark=$venv/torch-$torch-transformers-$transformers
if [[ ! -e $mark ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir \
        "torch==$torch" "transformers==$transformers" >&2
    touch "$mark"
fi

# Everything is on disk; a look-up on a model hub would only wait for a network.
export HF_HUB_OFFLINE=1
exec "$venv/bin/python" "$here/transformers_decode.py" "$@"
