#!/usr/bin/env bash
# Makes .venv beside this file and installs a requirements file into it, if
# that has not been done since the requirements last changed.
#   bash make_venv.sh [requirements.txt]        PYTHON=python3.11 to choose one
set -euo pipefail
cd "$(dirname "$0")"
requirements=${1:-requirements.txt}
stamp=".venv/installed-$(basename "$requirements")"

if [[ ! -x .venv/bin/python ]]; then
  python=${PYTHON:-}
  # A name may be there and not run, as those of pyenv.
  for name in python3.11 python3.12 python3.13 python3; do
    if [[ -z $python ]] && "$name" --version &> /dev/null; then
      python=$name
    fi
  done
  echo "Making .venv with $("$python" --version) ..." >&2
  "$python" -m venv .venv
fi
if ! cat requirements*.txt | cmp --quiet - "$stamp"; then
  echo "Installing $requirements (some minutes the first time) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r "$requirements"
  cat requirements*.txt > "$stamp"
fi
