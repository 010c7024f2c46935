#!/usr/bin/env bash
# Is the library what the notebooks export, and are the notebooks clean? Leaves the tree exported and clean.
set -euo pipefail
cd "$(dirname "$0")/.."
# checksums and not git: an unpacked archive can be checked, too
state() { find nbs gk_mvlp -type f \( -name '*.ipynb' -o -name '*.py' \) -print0 | sort -z | xargs -0 cksum; }
before=$(state)
.venv/bin/nbdev_export
.venv/bin/nbdev_clean
after=$(state)
if [ "$before" != "$after" ]; then
    diff <(echo "$before") <(echo "$after") | awk '/^[<>]/ {print "  " $4}' | sort -u >&2 || true
    echo "error: the library or the notebooks were out of step; these files are exported and clean now. Look at them and commit them." >&2
    exit 1
fi
echo "in step: the library is what the notebooks export, and the notebooks are clean"
