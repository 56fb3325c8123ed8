# Sourced by the other scripts: `environment PIP_ARGUMENTS...` makes .venv if it is missing and installs into it, once
# and again when the requirements have changed. Afterwards $PYTHON runs there.
# PYTHON_VERSION=3.12 chooses the interpreter that a new .venv is made from.

environment() {
  local mark wanted base="python${PYTHON_VERSION:-3}"
  PYTHON=.venv/bin/python
  if [ ! -x "$PYTHON" ]; then
    "$base" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
      echo "error: $("$base" --version 2>&1) found, 3.11 to 3.13 needed; choose one with PYTHON_VERSION=3.12" >&2
      return 2
    }
    echo "making .venv with $("$base" --version)"
    "$base" -m venv .venv
  fi
  mark=.venv/installed$(printf '%s' "$*" | tr -c 'a-z' '_')
  wanted=$(cat requirements.txt pyproject.toml)
  if [ "$(cat "$mark" 2>/dev/null)" != "$wanted" ]; then
    echo "installing the requirements into .venv (once, about a minute)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
    printf '%s\n' "$wanted" >"$mark"
  fi
  # Bytecode comes with the first import: of all modules it would take half a minute, and few are ever imported.
  export PYTHONDONTWRITEBYTECODE=
}
