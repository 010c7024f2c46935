#!/usr/bin/env bash
# All checks, cheapest first. CI and contributors run the same.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" PYTHONWARNINGS=ignore MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
cores=${CORES:-2}
echo "== imports"
python -c "import nbdev.export, nbdev.clean, nbdev.test, papermill, snakemake, gk_mvlp"
python -m pip check
echo "== library in step with notebooks"
bash scripts/sync.sh
echo "== notebooks"
OMP_NUM_THREADS=1 nbdev_test --n_workers "$cores" --timing
echo "== pytest (it runs the smoke study once, too)"
pytest -q -m "not slow" -n "$cores" --dist loadfile --durations=10 tests
