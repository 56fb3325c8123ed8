#!/usr/bin/env bash
# Make .venv if it is missing and build the documentation site into build/docs, with warnings as errors:
#   bash launch/docs.sh
# Open build/docs/index.html afterwards. Further arguments go to `mkdocs build`.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment -e ".[docs]"
export NO_MKDOCS_2_WARNING=1 # an advertisement
"$PYTHON" -m mkdocs build --quiet --strict --config-file - --site-dir "$PWD/build/docs" "$@" <docs/mkdocs.yml
echo "built build/docs/index.html"
