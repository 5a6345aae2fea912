#!/usr/bin/env bash
# All marks of a GPU in one call of at most ten minutes: see the head of gpu.py.
#
#     bash benchmarks/gpu.sh [--toy] [--original PATH] [--nanogpt PATH] [FILE.json [PART...]]
#
# PYTHON chooses the interpreter. Nothing is installed and nothing downloaded.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-}"
if [ -z "$python" ]; then
    python="$here/../.venv/bin/python"
    [ -x "$python" ] || python=python3
fi
# the package of this checkout, installed or not
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$here/gpu.py" "$@"
