#!/usr/bin/env bash
# Local git hooks: before a commit, notebooks are cleaned and exported and the result is added.
set -euo pipefail
cd "$(dirname "$0")/.."
hook=$(git rev-parse --git-path hooks/pre-commit)
mkdir -p "$(dirname "$hook")"
cat > "$hook" <<'HOOK'
#!/usr/bin/env bash
# Keeps notebooks clean and gk_mvlp/ in step with them. Skip once with: git commit --no-verify
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
if git diff --cached --name-only | grep -qE '^(nbs|gk_mvlp)/'; then
    changed=$(git diff --cached --name-only --diff-filter=d)
    .venv/bin/nbdev_export && .venv/bin/nbdev_clean
    git add -- $(printf '%s\n' "$changed" | grep -E '^nbs/.*\.ipynb$' || true) gk_mvlp
    big=$(printf '%s\n' "$changed" | grep -E '\.ipynb$' | while read -r f; do [ "$(wc -c < "$f")" -le 204800 ] || echo "$f"; done || true)
    if [ -n "$big" ]; then echo "error: over 200 KB: $big. Make its figures smaller." >&2; exit 1; fi
fi
HOOK
chmod +x "$hook"
.venv/bin/nbdev_install_hooks >/dev/null 2>&1 || echo "note: nbdev's merge driver was not installed" >&2
echo "installed $hook"
