#!/usr/bin/env bash
# The chat format against the published package cohere_melody: prompts and parsed answers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

if ! command -v python3 >/dev/null; then
    printf 'skipped: python3 is not here\n'
    exit 0
fi
venv=target/conformance-venv
source=target/conformance-source
if [[ ! -x $venv/bin/pip ]]; then python3 -m venv "$venv"; fi
"$venv/bin/pip" install --quiet --disable-pip-version-check 'cohere_melody==0.15.3' maturin
if ! compgen -G "$source/*.tar.gz" >/dev/null; then
    mkdir -p "$source"
    # The source package has the pairs; it is unpacked, never built.
    PATH="$PWD/$venv/bin:$PATH" "$venv/bin/pip" download --quiet --disable-pip-version-check --no-deps \
        --no-binary cohere_melody --no-build-isolation --dest "$source" 'cohere_melody==0.15.3'
fi
tar -xzf "$source"/*.tar.gz -C "$source"

cargo build --quiet -p router --example conformance
"$venv/bin/python" tests/conformance/melody.py "${CARGO_TARGET_DIR:-target}/debug/examples/conformance" \
    crates/cli/assets/demo/tokenizer.json "$source"/cohere_melody-0.15.3 "$@"
