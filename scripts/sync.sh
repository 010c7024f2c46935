#!/usr/bin/env bash
# Is the library what the notebooks export, and are the notebooks clean? Leaves the tree exported and clean.
set -euo pipefail
cd "$(dirname "$0")/.."
before=$(git status --porcelain; git diff | git hash-object --stdin)
.venv/bin/nbdev_export
.venv/bin/nbdev_clean
after=$(git status --porcelain; git diff | git hash-object --stdin)
if [ "$before" != "$after" ]; then
    git status --short >&2
    echo "error: the library or the notebooks were out of step; they are exported and clean now. Look at 'git diff' and commit it." >&2
    exit 1
fi
echo "in step: the library is what the notebooks export, and the notebooks are clean"
