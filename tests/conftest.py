"Shared fixtures: where the real data is, and quiet, deterministic torch."
import os
import shutil
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='session')
def root() -> Path:
    return ROOT


@pytest.fixture(scope='session')
def real_data() -> Path:
    "The real public data root, or a skip that says how to give it."
    path = Path(os.environ.get('GK_MVLP_DATA') or ROOT.parent/'shared'/'data')
    if not (path/'covid_chestxray').is_dir():
        pytest.skip(f'no real data: set GK_MVLP_DATA to a data root (looked in {path})')
    return path


@pytest.fixture(scope='session')
def chromium() -> str:
    "The browser for tests of pages, or a skip that says what is missing."
    pytest.importorskip('playwright.sync_api', reason="no playwright: pip install 'gk_mvlp[dev]'")
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if not found: pytest.skip('no Chromium: install the package chromium')
    return found


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
