#!/usr/bin/env bash
# Makes .venv and runs the tests in it.
#   bash run_tests.sh [pytest arguments], e.g.  -m slow   or   tests/test_data.py
set -euo pipefail
cd "$(dirname "$0")"
bash make_venv.sh requirements/dev.txt
# Two at a time; of one file, one after the other, on what they share.
exec .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile "$@"
