#!/usr/bin/env bash
# A run on one machine: a rank for each GPU, started again by themselves after a crash.
#   runs/node.sh CONFIG [section.key=value]...
# RANKS: ranks to start, where not one for each GPU. RESTARTS: how often after a crash.
set -euo pipefail
# the checkout's own environment, where no other is active
command -v summerlm > /dev/null || PATH=$(cd "$(dirname "$0")/../.venv/bin" && pwd):$PATH
ranks=${RANKS:-$(python -c 'import torch; print(torch.cuda.device_count() or 1)')}
exec summerlm train "$@" --nproc "$ranks" --max-restarts "${RESTARTS:-3}"
