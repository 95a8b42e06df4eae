#!/usr/bin/env bash
# The whole check before a commit. `--all` adds the slow proofs; other options go to pytest.
set -euo pipefail
cd "$(dirname "$0")"

ruff format --check .
ruff check .
mypy vitcomp_jax
lint-imports
python -m pytest -n 2 --dist worksteal "$@"
