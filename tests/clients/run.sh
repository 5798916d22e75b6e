#!/usr/bin/env bash
# The published OpenAI client for Python against a real cluster on the demo model.
# Usage: tests/clients/run.sh [COHORT]   (the binary; built in debug when it is not given)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

venv=target/clients-venv
if [[ ! -x $venv/bin/python ]]; then
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check 'openai>=3,<4'
fi
cohort=${1:-}
if [[ -z $cohort ]]; then
    cargo build --quiet
    cohort=${CARGO_TARGET_DIR:-target}/debug/cohort
fi

port=$("$venv/bin/python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
"$cohort" up --device cpu --tensor-parallel 2 --grpc-listen 127.0.0.1:0 --http-listen "127.0.0.1:$port" </dev/null &
up=$!
trap 'kill -INT "$up" 2>/dev/null; wait "$up" || true' EXIT
"$venv/bin/python" tests/clients/openai_client.py "http://127.0.0.1:$port"
