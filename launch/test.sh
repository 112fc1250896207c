#!/usr/bin/env bash
# All that CI runs: sets up .venv with the test tools, checks format, lint and types, then tests.
#   bash launch/test.sh                       everything that is not slow
#   bash launch/test.sh --quick               under two minutes: format, lint and the fast rooms' tests
#   bash launch/test.sh tests/data -n 0 -x    arguments go to pytest; the last one wins
# The TPU compiler (640 MB) is installed only where a test that needs it is among those asked for.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

kind=ahead
quick=()
arguments=()
for argument in "$@"; do
  case "$argument" in
    --quick)
      kind=dev
      quick=(tests/test_house.py tests/test_docs.py tests/test_command.py tests/test_config.py tests/test_configs.py
        tests/data tests/tasks tests/parallel/test_mesh.py --ignore=tests/data/recipe)
      ;;
    tests/planning* | tests/test_xla_flags.py* | tests | tests/) kind=ahead && arguments+=("$argument") ;;
    tests/*) kind=dev && arguments+=("$argument") ;;
    *) arguments+=("$argument") ;;
  esac
done

set_up "$kind"
cd "$root"
"$python" -m ruff check --quiet
"$python" -m ruff format --check --quiet
# worksteal: each process starts with one unbroken half, so that a file's fixtures and compiled
# functions are made once, and takes over from the other when it runs dry, so that no core waits for
# one long file.
exec "$python" -m pytest -n 2 --dist=worksteal --durations=10 --durations-min=1 \
  ${quick[@]+"${quick[@]}"} ${arguments[@]+"${arguments[@]}"}
