#!/usr/bin/env bash
# Make .venv if it is missing and run the linter and the tests. Further arguments go to pytest:  bash launch/test.sh -m slow
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment -e ".[test]"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"  # two processes, each of which compiles on one core
