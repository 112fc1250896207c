#!/usr/bin/env bash
# From a fresh machine to a trained model that answers: sets up .venv, then hands over to quickstart.py.
#   bash launch/quickstart.sh                    the embedded text, no download but the packages
#   bash launch/quickstart.sh --corpus=FOLDER    your own text
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up run
# No cd: a relative --corpus means the folder in which it was typed.
exec "$python" "$root/launch/quickstart.py" "$@"
