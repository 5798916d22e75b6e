#!/usr/bin/env bash
# Published clients against a real cluster on the demo model.
# Usage: tests/clients/run.sh [COHORT]   (the binary; built in debug when it is not given)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# Installs a package of the system where that is possible; says what is left out where it is not.
available() {
    local program=$1 packages=$2
    if command -v "$program" >/dev/null; then return; fi
    if [[ $EUID == 0 ]] && command -v apt-get >/dev/null; then
        # shellcheck disable=SC2086 # several packages
        apt-get install -y -qq $packages >/dev/null 2>&1 || { apt-get update -qq && apt-get install -y -qq $packages >/dev/null; }
    fi
    if command -v "$program" >/dev/null; then return; fi
    printf 'skipped: %s is not here and cannot be installed\n' "$program"
    return 1
}

venv=target/clients-venv
stubs=target/clients-stubs
node=target/clients-node
python() {
    if [[ ! -x $venv/bin/pip ]] && ! python3 -m venv "$venv" >/dev/null; then
        available no-such-program 'python3-venv' || true
        python3 -m venv "$venv"
    fi
    "$venv/bin/pip" install --quiet --disable-pip-version-check 'openai>=3,<4' 'cohere>=7,<8' \
        'grpcio>=1.80,<2' 'grpcio-tools>=1.80,<2' 'grpcio-health-checking>=1.80,<2' 'grpcio-reflection>=1.80,<2'
    mkdir -p "$stubs"
    "$venv/bin/python" -m grpc_tools.protoc -Iproto --python_out="$stubs" --grpc_python_out="$stubs" \
        proto/cohort/v1/cohort.proto proto/vllm/inference.proto proto/vllm/control.proto
}
javascript() {
    mkdir -p "$node"
    cp tests/clients/openai_client.mjs "$node/"
    npm install --silent --no-audit --no-fund --no-save --prefix "$node" 'openai@^7'
}

with_python=no with_node=no
if available python3 'python3 python3-venv'; then python; with_python=yes; fi
if available npm 'nodejs npm'; then javascript; with_node=yes; fi
if [[ $with_python$with_node == nono ]]; then exit 0; fi

cohort=${1:-}
if [[ -z $cohort ]]; then
    cargo build --quiet
    cohort=${CARGO_TARGET_DIR:-target}/debug/cohort
fi

said=$(mktemp)
"$cohort" up --device cpu --tensor-parallel 2 --grpc-listen 127.0.0.1:0 --http-listen 127.0.0.1:0 </dev/null >"$said" &
up=$!
trap 'kill -INT "$up" 2>/dev/null; wait "$up" || true; rm -f "$said"' EXIT
# `up` says where it serves once it does.
for _ in $(seq 600); do
    if grep -q 'HTTP at ' "$said" || ! kill -0 "$up"; then break; fi
    sleep 0.1
done
http=$(sed -n 's/.*HTTP at \([0-9.:]*\).*/\1/p' "$said" | head -1)
grpc=$(sed -n 's/.*gRPC at \([0-9.:]*\).*/\1/p' "$said" | head -1)
if [[ -z $http ]]; then
    printf 'the cluster did not come up\n'
    exit 1
fi

if [[ $with_python == yes ]]; then
    "$venv/bin/python" tests/clients/openai_client.py "http://$http"
    "$venv/bin/python" tests/clients/cohere_client.py "http://$http"
    "$venv/bin/python" tests/clients/grpc_client.py "$stubs" "$grpc"
fi
if [[ $with_node == yes ]]; then
    SERVER="http://$http" node --test "$node/openai_client.mjs"
fi
