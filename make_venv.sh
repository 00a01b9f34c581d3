#!/usr/bin/env bash
# Makes .venv beside this file and installs a requirements file into it, if
# that has not been done since the requirements last changed.
#   bash make_venv.sh [requirements.txt]        PYTHON=python3.11 to choose one
set -euo pipefail
cd "$(dirname "$0")"
requirements=${1:-requirements.txt}
stamp=.venv/installed-$(basename "$requirements")

if [[ ! -x .venv/bin/python ]]; then
  python=${PYTHON:-}
  # A command may exist but not run, such as the shims of pyenv.
  for name in python3.11 python3.12 python3.13 python3; do
    if [[ -z $python ]] && "$name" --version &> /dev/null; then
      python=$name
    fi
  done
  if [[ -z $python ]]; then
    echo "Python 3.11, 3.12 or 3.13 is needed; PYTHON can name it." >&2
    exit 2
  fi
  echo "Making .venv with $("$python" --version) ..." >&2
  "$python" -m venv .venv
fi
if ! cat requirements.txt requirements/*.txt | cmp --quiet - "$stamp"; then
  echo "Installing $requirements (some minutes the first time) ..." >&2
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    -r "$requirements"
  cat requirements.txt requirements/*.txt > "$stamp"
fi
