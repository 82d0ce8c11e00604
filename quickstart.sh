#!/usr/bin/env bash
# From raw text to a base model, offline, on a CPU: tokenizer -> pretraining -> evaluation -> samples, then a table.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
python bench/quickstart.py "$@"
