#!/bin/sh
# The environment that tests the verl adapter and the host on Ray: .venv-verl, exactly the versions of
# constraints-verl.txt, then the project itself. Run again at will: a stamp holds the checksum of what it was made from.
set -eu
cd "$(dirname "$0")/.."
venv=${VERL_VENV:-.venv-verl}
stamp="$venv/.installed"
made_from=$(cat constraints-verl.txt pyproject.toml scripts/install_verl.sh | cksum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$made_from" ]; then exit 0; fi
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --upgrade pip
# No resolution: the list is complete, and verl's declared requirements would bring trackers that nothing here uses.
"$venv/bin/python" -m pip install --quiet --no-deps --requirement constraints-verl.txt
"$venv/bin/python" -m pip install --quiet --no-deps --editable .
# Fail here, and not in the first test, when something is missing.
"$venv/bin/python" -c 'import ray, transfer_queue, verl.trainer.ppo.v1, rollout_wal'
printf '%s' "$made_from" > "$stamp"
