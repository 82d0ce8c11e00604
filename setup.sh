# Sourced by quickstart.sh and test.sh: afterwards `python` has what requirements.txt names.
# An active environment is used as it is if nothing is missing in it; else .venv is made, with the pinned versions.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -f .venv/ready ]; then
        for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
            "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && break
        done || { echo "error: no Python from 3.10 to 3.13 found" >&2; exit 2; }
        echo "setting up .venv with $("$candidate" --version)"
        "$candidate" -m venv .venv
    fi
    if [ -f .venv/bin/activate ]; then . .venv/bin/activate; else . .venv/Scripts/activate; fi
    cmp -s requirements.txt .venv/ready || { python -m pip install --quiet -r requirements.txt && cp requirements.txt .venv/ready; }
else
    python -c 'import torch, numpy, sentencepiece, tiktoken, pytest' 2>/dev/null || python -m pip install --quiet -r requirements.txt
fi
