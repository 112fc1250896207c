#!/usr/bin/env bash
# All that CI runs: sets up .venv with the test tools, lints, then tests. Arguments go to pytest, the last one wins:
#   bash launch/test.sh tests/data -n 0 -x
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up dev
cd "$root"
"$python" -m ruff check --quiet
# worksteal: each process starts with one unbroken half, so that a file's fixtures and compiled functions are made
# once, and takes over from the other when it runs dry, so that no core waits for one long file.
exec "$python" -m pytest -n 2 --dist=worksteal "$@"
