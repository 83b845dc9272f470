#!/bin/sh
# Create .venv-sglang: the real SGLang engine on a machine without a GPU, with this package editable in it.
# Runs again only when a list of packages, this script or pyproject.toml has changed.
set -eu
cd "$(dirname "$0")/.."
venv=.venv-sglang
stamp=$venv/.installed
wanted=$(cat constraints-sglang.txt pyproject.toml scripts/install_sglang.sh | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; then exit 0; fi
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
rm -f "$stamp"
"$venv/bin/python" -m pip install --quiet --no-deps --requirement constraints-sglang.txt
"$venv/bin/python" -m pip install --quiet --no-deps --editable .
# SGLang starts processes of its own: the repair of torchvision has to be in each of them, whatever their PYTHONPATH.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
printf '%s\nimport torchvision_without_cuda\n' "$PWD/tests_sglang/shim" > "$site/torchvision_without_cuda.pth"
printf '%s\n' "$wanted" > "$stamp"
