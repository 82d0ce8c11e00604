#!/usr/bin/env bash
# From raw text to a chat model in 4 bits, offline, on a CPU: tokenizer -> pretraining -> SFT -> DPO -> 4 bits, then a table.
set -euo pipefail
cd "$(dirname "$0")"
. ./setup.sh
python bench/quickstart.py "$@"
