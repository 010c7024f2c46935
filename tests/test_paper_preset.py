"""The `paper` preset on phantoms in the credentialed formats: its graph, and every notebook once at paper size; nothing of the data
stays in what was executed."""
import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from gk_mvlp.config import load_preset
from gk_mvlp.data.mimic_cxr import load_mimic_cxr
from gk_mvlp.data.phantom import PhantomConfig
from gk_mvlp.data.phantom_export import export_phantom
from gk_mvlp.paths import GKError
from gk_mvlp.study.experiments import load_studies
from gk_mvlp.study.launch import check_preset, study_jobs
from gk_mvlp.study.run import run_notebook

HOME, CANARY = Path(__file__).parents[1], 'Canarybird'
# no hub here: the same sizes, new weights
SMALL = {'detector': {'train': {'epochs': 1, 'batch_size': 4, 'num_workers': 0, 'precision': 'no'}},
         'model': {'image_checkpoint': '', 'text_encoder': ''},
         'pretrain': {'epochs': 1, 'batch_size': 4, 'num_workers': 0},
         'finetune': {'epochs': 1, 'batch_size': 4, 'num_workers': 0, 'min_steps': 0}, 'generation': {'beams': 2}}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "A data root with a canary in every report."
    root = tmp_path_factory.mktemp('credentialed')
    export_phantom(PhantomConfig(n=24, size=1024), root, progress=False)
    for f in (root/'mimic_cxr').rglob('*.txt'): f.write_text(f.read_text().replace('FINDINGS:', f'FINDINGS: {CANARY} is seen.', 1))
    return root


def test_the_whole_graph_is_planned(root):
    env = os.environ | {'GK_MVLP_OUT': str(root/'out')}
    r = subprocess.run([sys.executable, '-m', 'gk_mvlp.cli', 'paper', '--preset', 'paper', '--data', str(root), '--dry-run'],
                       capture_output=True, text=True, env=env)
    jobs = study_jobs(load_preset('paper'))
    assert r.returncode == 0, r.stderr
    assert (f'{len(jobs)} jobs, 0 of them finished' in r.stdout and f'total               {len(jobs) + 2}' in r.stdout
            and not list((root/'out/runs/paper').glob('*/*')))


def test_every_data_set_of_the_preset_loads(root, monkeypatch):
    "With the preset's options, from the folders that it asks for: a mistake there would be found after days of pre-training."
    monkeypatch.setenv('GK_MVLP_OUT', str(root/'out'))
    p = load_preset('paper')
    assert {f.name for f in root.iterdir()} >= set(p.needs)
    for d in dict.fromkeys((p.detector_dataset, p.pretrain_dataset, *p.classification, *(d for sets in p.tasks.values() for d in sets))):
        studies, _ = load_studies({'data': p.data, 'dataset_options': p.dataset_options}, d, str(root))
        assert {'train', 'test'} <= {s.split for s in studies}, d


def test_credentialed_data_need_the_mark(tmp_path, root):
    text = (HOME/'presets/paper.yaml').read_text()
    (tmp_path/'open.yaml').write_text(text.replace('credentialed: true', 'credentialed: false'))
    with pytest.raises(GKError, match='credentialed: true'): check_preset(load_preset(str(tmp_path/'open.yaml')))
    check_preset(load_preset('paper'))


def clean(run: Path, secrets: set[str]) -> None:
    "No secret and no picture in the executed notebook, apart from drawn curves in cells tagged for it."
    nb = nbformat.read(run/'run.ipynb', as_version=4)
    for c in nb.cells:
        said = json.dumps(c.get('outputs', []))
        found = [s for s in secrets if s in said]
        assert not found, f'{run}: {found[0]}'
        if 'image/png' in said: assert 'aggregate' in c.metadata.tags and any(k in c.source for k in ('plot_history', 'show_roc'))
    assert not (run/'kernel.log').exists()


@pytest.mark.slow
def test_every_notebook_once_at_paper_size(root, tmp_path, monkeypatch):
    monkeypatch.setenv('GK_MVLP_OUT', str(tmp_path))
    nb = {f.name.split('_', 1)[1].removesuffix('.ipynb'): f for f in sorted((HOME/'nbs/experiments').glob('7*.ipynb'))}
    secrets = {CANARY} | {x for s in load_mimic_cxr(root, workers=1)
                          for x in (s.study_id, s.subject_id, s.subject_id.removeprefix('mimic-'))}
    given = {'preset': 'paper', 'data': str(root), 'overrides': SMALL}
    run = lambda name, folder, **more: clean(run_notebook(nb[name], tmp_path/folder, given | more).parent, secrets)
    run('detector', 'detector')
    run('pretrain', 'pretrain', objective='gk', detector=str(tmp_path/'detector'))
    model = dict(detector=str(tmp_path/'detector'), checkpoint=str(tmp_path/'pretrain/model'), method='gk')
    run('classification', 'classification', dataset='rsna', **model)
    for task, sets in load_preset('paper').tasks.items(): run(task, task, dataset=sets[0], **model)
    run('probing', 'probing', dataset='rsna', **model)
    assert json.loads((tmp_path/'pretrain/config.json').read_text())['settings']['model']['dim'] == 768
