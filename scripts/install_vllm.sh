#!/bin/sh
# The environment that tests the vLLM adapter: .venv-vllm, exactly the versions of constraints-vllm.txt, then the
# project itself. Run again at will: a stamp holds the checksum of what it was made from.
set -eu
cd "$(dirname "$0")/.."
venv=${VLLM_VENV:-.venv-vllm}
stamp="$venv/.installed"
made_from=$(cat constraints-vllm.txt pyproject.toml scripts/install_vllm.sh | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$made_from" ]; then exit 0; fi
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
# No resolution: the list is complete, and the engine's declared requirements would bring CUDA libraries.
"$venv/bin/python" -m pip install --quiet --no-deps --requirement constraints-vllm.txt
"$venv/bin/python" -m pip install --quiet --no-deps --editable .
# Fail here, and not in the first test, when something is missing.
"$venv/bin/python" -c 'import vllm, rollout_wal'
printf '%s' "$made_from" > "$stamp"
