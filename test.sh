#!/usr/bin/env bash
# All tests; arguments go to pytest: bash test.sh tests/test_model.py -k packed
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
python -m pytest -q -rs "$@"
