"The whole study once, as a reader would call it: outputs, provenance, a no-op second call, a killed and continued job, broken inputs."
import hashlib
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from gk_mvlp.config import load_preset
from gk_mvlp.evaluation.metrics import auroc
from gk_mvlp.paths import GKError
from gk_mvlp.study import collect
from gk_mvlp.study.figures import mean_calibration_error
from gk_mvlp.study.launch import _lock, classification_jobs, task_jobs
from gk_mvlp.study.report_parts import NOTE

BIN, ROOT = Path(sys.executable).parent, Path(__file__).resolve().parents[1]


def paper(out, *args, **env):
    env = os.environ | {'GK_MVLP_OUT': str(out), 'PATH': f'{BIN}{os.pathsep}{os.environ["PATH"]}'} | env
    return subprocess.run([str(BIN/'gk-mvlp'), 'paper', '--preset', 'smoke', '--cores', '2', *args], capture_output=True, text=True,
                          env=env)


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "A finished smoke study: (folder, output of the command)."
    out = tmp_path_factory.mktemp('study')
    r = paper(out)
    assert r.returncode == 0, r.stdout + r.stderr
    return out, r.stdout


def test_everything_is_there(study):
    out, said = study
    p = load_preset('smoke')
    results = out/'paper_results/smoke'
    for name in ('classification', 'classification_classes', 'comparisons', 'detector', 'zero_shot', 'localization', 'report_generation',
                 'vqa', 'ablation', 'grounding', 'robustness'):
        for kind in ('csv', 'md', 'tex'): assert (results/f'tables/{name}.{kind}').stat().st_size > 0
    for name in ('losses', 'roc', 'reliability', 'low_data', 'regions', 'grounding', 'forest', 'ablations', 'robustness', 'reports'):
        assert (results/f'figures/{name}.pdf').stat().st_size > 0
        picture = np.asarray(Image.open(results/f'figures/{name}.png').convert('L'))
        assert picture.std() > 5, f'{name} is not blank'
    runs = ([out/'runs/smoke/classification'/j for j in classification_jobs(p)]
            + [out/'runs/smoke/detector', out/'runs/smoke/pretrain/gk-s0', out/'runs/smoke/pretrain/itc_itm_lm-s0'])
    runs += [out/'runs/smoke'/j for j in task_jobs(p)]
    for r in runs:
        assert {'run.ipynb', 'config.json', 'metrics.json', 'env.json'} <= {f.name for f in r.iterdir()}, r
        nb = nbformat.read(r/'run.ipynb', as_version=4)
        assert nb.metadata.papermill.exception is None and nb.metadata.papermill.end_time
        if 'pretrain' in str(r) or 'classification' in str(r) or r.name == 'detector':
            assert 'image/png' in json.dumps([c.get('outputs', []) for c in nb.cells]), f'{r}: its figures are in the notebook'
    assert ('REPORT.md, tables/, figures/ and manifest.json' in said and 'Classification (AUROC' in said and '| verdict' in said
            and 'AUPRC' not in said)


def test_the_table_is_recomputed_from_predictions(study):
    "The mean of a cell equals the metric of the saved predictions, computed another way."
    out, _ = study
    table = pd.read_csv(out/'paper_results/smoke/tables/classification.csv')
    assert {'task', 'dataset', 'method', 'ratio', 'metric', 'mean', 'low', 'high', 'seeds', 'n'} <= set(table.columns)
    assert ({'constant', 'pixels', 'scratch', 'itc_itm_lm', 'gk', 'gk-roi_pool', 'gk-null_prompts', 'gk-shuffled_prompts'}
            <= set(table['method']))
    assert {'auroc', 'auprc', 'f1', 'accuracy', 'brier', 'ece'} == set(table['metric'])
    table = table[table['metric'] == 'auroc']
    for r in table.itertuples():
        f = pd.read_parquet(out/'runs/smoke'/r.runs.split()[0]/'predictions.parquet')
        f = f[(f['split'] == 'test') & (f['method'] == r.method) & (f['protocol'] == r.protocol)].dropna(subset=['y'])
        each = [auroc(g['y'].to_numpy(), g['score'].to_numpy()) for _, g in f.groupby('label') if g['y'].nunique() == 2]
        assert (np.isclose(np.mean(each), r.mean, atol=1e-5) and r.low <= r.mean + 1e-9 and r.mean <= r.high + 1e-9
                and r.n == f['study_id'].nunique())
    assert np.allclose(table.loc[table['method'] == 'constant', ['mean', 'low', 'high']], .5)


def test_task_tables_hold_baselines_and_the_columns_of_every_table(study):
    out, _ = study
    need = {'zero_shot': {'constant', 'gk', 'centre', 'train_prior'}, 'localization': {'constant', 'gk'},
            'report_generation': {'constant_normal', 'most_frequent', 'nearest_neighbour', 'gk', 'gk-null_prompts'},
            'vqa': {'majority', 'question_only', 'gk'}}
    for task, methods in need.items():
        t = pd.read_csv(out/f'paper_results/smoke/tables/{task}.csv')
        assert ({'task', 'dataset', 'method', 'ratio', 'metric', 'mean', 'low', 'high', 'seeds', 'n'} <= set(t.columns)
                and methods <= set(t['method'])), task
        ok = t.dropna(subset=['low', 'high']); assert len(ok) and (ok['low'] <= ok['high']).all()


def test_test_patients_are_new(study):
    "No patient of the validation or test predictions is in the training subset."
    out, _ = study
    for j in classification_jobs(load_preset('smoke')):
        r = out/'runs/smoke/classification'/j
        f = pd.read_parquet(r/'predictions.parquet')
        train = {s.split('-')[0] for s in json.loads((r/'subset.json').read_text())['study_ids']}
        groups = {k: set(g['study_id']) for k, g in f.groupby('split')}
        assert (not groups['val'] & groups['test']
                and not set(json.loads((r/'subset.json').read_text())['study_ids']) & (groups['val'] | groups['test']))
        patients = {k: set(g['subject_id']) for k, g in f.groupby('split')}
        assert not patients['val'] & patients['test'] and train


def test_subsets_are_nested(study):
    out, _ = study
    ids = {r: set(json.loads((out/f'runs/smoke/classification/phantom-gk-r{r}-s0/subset.json').read_text())['study_ids'])
           for r in (10, 100)}
    other = set(json.loads((out/'runs/smoke/classification/phantom-scratch-r10-s0/subset.json').read_text())['study_ids'])
    assert ids[10] < ids[100] and ids[10] == other, 'every method gets the same labels'


def test_the_manifest_ties_files_to_runs(study):
    out, _ = study
    results, m = out/'paper_results/smoke', json.loads((out/'paper_results/smoke/manifest.json').read_text())
    files = {str(p.relative_to(results)) for p in results.rglob('*') if p.is_file() and p.name != 'manifest.json'}
    assert files == {a['path'] for a in m['artefacts']}
    for a in m['artefacts']:
        assert hashlib.sha256((results/a['path']).read_bytes()).hexdigest() == a['sha256']
        assert a['runs'] and set(a['runs']) <= set(m['runs'])
    for r in m['runs'].values(): assert r['notebook'] and r['code'] and r['seconds'] > 0 and 'commit' in r
    assert all(r['data_fingerprint'] for n, r in m['runs'].items() if n.startswith(('pretrain', 'classification', 'detector')))


def test_the_report_reads_gates_before_comparisons(study):
    "And its verdicts follow from the tables' corrected p."
    results = study[0]/'paper_results/smoke'
    text = (results/'REPORT.md').read_text()
    assert text.index('## Did the models learn?') < text.index('| ITM') < text.index('## In short') < text.index('## The detector')
    t = pd.read_csv(results/'tables/comparisons.csv')
    own = t[t['reference'] == 'scratch']
    said = next(line for line in text.splitlines() if line.startswith('| Pre-training on reports helps'))
    good, bad = ((own['p_holm'] < .05) & (own['difference'] > 0)).sum(), ((own['p_holm'] < .05) & (own['difference'] < 0)).sum()
    want = 'mixed' if good and bad else 'contradicted' if bad else 'supported in' if good else 'not supported'
    assert f'| {want}' in said, said


def test_the_report_shows_every_figure_once(study):
    results = study[0]/'paper_results/smoke'
    text = (results/'REPORT.md').read_text()
    assert (sorted(re.findall(r'\]\(figures/(\w+)\.png\)', text)) == sorted(f.stem for f in (results/'figures').glob('*.png'))
            and text.count(NOTE) == 1)
    assert 'Further figures' not in text and text.index('figures/losses.png') < text.index('## In short')


def test_the_legend_of_reliability_is_the_calibration_error_of_the_table(study):
    out, _ = study
    t = pd.read_csv(out/'paper_results/smoke/tables/classification.csv').query("metric == 'ece' and protocol == 'linear_probe' and "
                                                                               "ratio == 100").set_index('method')['mean']
    for m in ('pixels', 'gk'):
        f = pd.read_parquet(out/f'runs/smoke/classification/phantom-{m}-r100-s0/predictions.parquet')
        f = f[(f['split'] == 'test') & (f['method'] == m) & (f['protocol'] == 'linear_probe')]
        assert np.isclose(mean_calibration_error([f]), t[m], atol=1e-5), m


def test_metrics_of_a_pretraining(study):
    "What an untrained model should have, and how many weights were trained."
    run = study[0]/'runs/smoke/pretrain/gk-s0'
    m = json.loads((run/'metrics.json').read_text())
    assert {f'{k}_expected' for k in ('itc', 'itm', 'lm', 'ecls')} <= set(m) and abs(m['itm_expected'] - .6365) < 1e-3
    kept = sum(v.numel() for v in load_file(run/'model/model.safetensors').values())
    assert .5 * kept < m['parameters'] <= kept


def verified(out):
    return subprocess.run([str(BIN/'gk-mvlp'), 'verify', '--preset', 'smoke'], capture_output=True, text=True,
                          env=os.environ | {'GK_MVLP_OUT': str(out), 'PYTHONWARNINGS': 'ignore'})


def test_verify(study, tmp_path):
    "The tables follow from the predictions; a changed prediction, cell, or report does not pass."
    out = tmp_path/'copy'
    for part in ('runs', 'paper_results'): shutil.copytree(study[0]/part, out/part, symlinks=True)
    r = verified(out)
    assert r.returncode == 0 and 'follow from the saved predictions' in r.stdout, r.stderr
    f = out/'runs/smoke/classification/phantom-gk-r100-s0/predictions.parquet'
    t = pd.read_parquet(f); kept = f.read_bytes()
    test = t.index[(t['split'] == 'test') & (t['method'] == 'gk')]
    t.loc[test, 'score'] = t.loc[test, 'score'].to_numpy()[::-1]; t.to_parquet(f)
    report = out/'paper_results/smoke/REPORT.md'; report.write_text(report.read_text().replace('| not supported', '| supported'))
    r = verified(out)
    assert r.returncode == 1 and 'Traceback' not in r.stderr
    for part in ('classification/phantom-gk-r100-s0/predictions.parquet: is not the file', 'classification.csv, row',
                 'REPORT.md: is not the file', 'REPORT.md: does not follow'):
        assert part in r.stderr, part
    f.write_bytes(kept)
    shutil.rmtree(out/'runs')
    r = verified(out)
    assert r.returncode == 1 and 'make paper PRESET=smoke' in r.stderr and r.stderr.count('\n') == 1


def test_a_table_with_a_hole_is_refused(study, tmp_path):
    out, _ = study
    runs = shutil.copytree(out/'runs/smoke', tmp_path/'smoke', ignore=shutil.ignore_patterns('model', '*.ckpt', 'tensorboard'))
    (runs/'classification/phantom-gk-r10-s0/metrics.json').unlink()
    with pytest.raises(GKError, match='not finished'): collect.finished_runs(runs/'classification')
    with pytest.raises(GKError, match='not a finished run'): collect.build_manifest(runs, out/'paper_results/smoke')


def test_a_second_call_does_nothing(study):
    out, _ = study
    before = {p: p.stat().st_mtime_ns for p in out.rglob('*') if p.is_file() and not p.name.startswith('.')}
    start = time.time()
    r = paper(out)
    assert r.returncode == 0, r.stderr
    after = {p: p.stat().st_mtime_ns for p in out.rglob('*') if p.is_file() and not p.name.startswith('.')}
    assert before == after and 'start ' not in r.stdout and time.time() - start < 60


CHANGED = """
from gk_mvlp.study import run
own = run.code_hash
run.code_hash = lambda stage: 'another' if stage in {stages!r} else own(stage)"""


RULES = {'detector', 'pretrain', 'classification', 'task', 'probing', 'tables', 'task_tables', 'study', 'figures', 'report', 'manifest'}


def rules_again(out, folder, patch):
    "Rules that a second call of a finished study would run if `patch` had been in the library."
    (folder/'sitecustomize.py').write_text(patch)
    r = paper(out, '--dry-run', PYTHONPATH=f'{folder}{os.pathsep}{ROOT}')
    assert r.returncode == 0, r.stderr
    lines = [line.split() for line in r.stdout.splitlines()]
    return {x[0] for x in lines if x and x[0] in RULES and x[-1].isdigit()}


@pytest.mark.parametrize('stages, again', [((), set()), (('paper',), {'tables', 'task_tables', 'study', 'figures', 'report', 'manifest'}),
                                           (('probing',), {'probing', 'study', 'figures', 'report', 'manifest'})])
def test_what_runs_again_when_code_has_changed(study, tmp_path, stages, again):
    "The stages whose code has another text, and what rests on them; a library file that was only written anew is no change."
    os.utime(ROOT/'gk_mvlp/models/losses.py')
    assert rules_again(study[0], tmp_path, CHANGED.format(stages=stages)) == again


def test_results_that_came_with_the_repository_are_no_finished_study(study, tmp_path):
    "Neither in a clone, whose files have any times, nor in an archive, whose files have one."
    shutil.copytree(study[0]/'paper_results', tmp_path/'paper_results')
    for newer in (1, -1):
        for f in (tmp_path/'paper_results').rglob('*'): os.utime(f, (time.time() + newer * 1e5,) * 2)
        assert rules_again(tmp_path, tmp_path, '') == RULES


@pytest.mark.parametrize('job, again', [
    ('classification/phantom-gk-r100-s0', {'classification', 'tables', 'study', 'figures', 'report', 'manifest'}),
    ('figures', {'figures', 'report', 'manifest'})])
def test_a_deleted_run_is_made_again(study, tmp_path, job, again):
    gone = study[0]/'runs/smoke'/job/'metrics.json'
    gone.rename(tmp_path/'kept')
    try: assert rules_again(study[0], tmp_path, '') == again
    finally: (tmp_path/'kept').rename(gone)


OTHER = """
import dataclasses
from gk_mvlp import config
own = config.load_preset
config.load_preset = lambda name: dataclasses.replace(own(name), **{change!r})"""


@pytest.mark.parametrize('task, again', [
    ('vqa', {'task', 'task_tables', 'study', 'figures', 'report', 'manifest'}),
    ('classification', {'classification', 'tables', 'study', 'figures', 'report', 'manifest'})])
def test_what_runs_again_when_a_task_trains_otherwise(study, tmp_path, task, again):
    assert rules_again(study[0], tmp_path, OTHER.format(change={'task_finetune': {task: {'lr': .01}}})) == again


def test_snakemake_has_the_timers_that_the_snakefile_turns_off(root):
    "A private name of Snakemake: should it change, a study of hundreds of jobs would lose up to a core to them, in silence."
    from snakemake.scheduling.job_scheduler import JobScheduler
    assert 'Timer(' in inspect.getsource(JobScheduler._schedule_reevalutation)
    assert 'JobScheduler._schedule_reevalutation = ' in (root/'Snakefile').read_text(encoding='utf-8')


def test_one_study_at_a_time(study):
    import fcntl
    out, _ = study
    with open(out/'runs/smoke/.study.lock', 'w') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        r = paper(out)
    assert r.returncode == 1 and 'already running' in r.stderr


CALLER = """
import os, sys
from pathlib import Path
from gk_mvlp.study import launch
sys.exit(launch.call_snakemake([sys.executable, '-c', sys.argv[2]], dict(os.environ), launch._lock(Path(sys.argv[1]))))"""
STAND_IN = """
import os, signal, subprocess, sys, time
def told(*_): print('told', flush=True); time.sleep(1); job.kill(); sys.exit()
signal.signal(signal.SIGTERM, told); signal.signal(signal.SIGINT, signal.SIG_IGN if IGNORES else lambda *_: sys.exit())
job = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
print(os.getpid(), job.pid, flush=True)
time.sleep(600)"""


def called(tmp_path, ignores=False):
    "A command that waits for a stand-in of Snakemake with one job: (the command, pid of the stand-in, pid of its job)."
    p = subprocess.Popen([sys.executable, '-c', CALLER, str(tmp_path), STAND_IN.replace('IGNORES', str(ignores))], stdout=subprocess.PIPE,
                         text=True, env=os.environ | {'PYTHONPATH': str(ROOT)})
    return p, *map(int, p.stdout.readline().split())


def gone(pid):
    until = time.monotonic() + 30
    while (there := psutil.pid_exists(pid) and psutil.Process(pid).status() != 'zombie') and time.monotonic() < until: time.sleep(.05)
    return not there


@pytest.mark.parametrize('ignores', [False, True])
def test_a_stopped_study_leaves_no_job(tmp_path, ignores):
    "Not even where interrupts are ignored, as in the background of a shell."
    p, snakemake, job = called(tmp_path, ignores)
    p.terminate()
    assert p.wait(60) == 128 + signal.SIGTERM and gone(snakemake) and gone(job)
    _lock(tmp_path).close()


@pytest.mark.skipif(sys.platform != 'linux', reason='elsewhere a process does not learn that its parent was killed')
def test_a_study_whose_command_was_killed_starts_no_other_job(tmp_path):
    "Snakemake is told to end, and holds the study's lock until it has."
    p, snakemake, job = called(tmp_path)
    p.kill(); p.wait()
    with pytest.raises(GKError, match='already running'): _lock(tmp_path)
    assert p.stdout.readline().strip() == 'told' and gone(snakemake) and gone(job)
    _lock(tmp_path).close()


def test_a_killed_job_continues_to_the_same_weights(study, tmp_path):
    "kill -9 in the middle of pre-training, then the same command: bit-identical to the run that was left alone."
    out, _ = study
    run = tmp_path/'runs/smoke/pretrain/gk-s0'
    params = json.dumps({'preset': 'smoke', 'objective': 'gk', 'seed': 0, 'detector': str(out/'runs/smoke/detector')})
    command = [sys.executable, '-m', 'gk_mvlp.study.run', 'nbs/experiments/71_pretrain.ipynb', str(run), '--params', params]
    env = os.environ | {'GK_MVLP_OUT': str(tmp_path), 'OMP_NUM_THREADS': '1'}
    p = subprocess.Popen(command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while not (run/'last.ckpt').exists() and time.time() < deadline and p.poll() is None: time.sleep(.05)
    os.killpg(p.pid, signal.SIGKILL); p.wait()
    assert (run/'last.ckpt').exists() and not (run/'metrics.json').exists(), 'killed between a checkpoint and the end'
    subprocess.run(['pkill', '-9', '-f', str(run)], check=False)
    again = subprocess.run(command, env=env, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    epochs = pd.read_csv(run/'history.csv')['epoch'].tolist()
    assert epochs == list(range(1, len(epochs) + 1))
    # not the bytes: the order of the header is not fixed
    a, b = (load_file(r/'model/model.safetensors') for r in (run, out/'runs/smoke/pretrain/gk-s0'))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def copy_of_real_data(real_data, tmp_path):
    "The tables and pictures of covid_chestxray, to be damaged."
    root = tmp_path/'data'
    shutil.copytree(real_data/'covid_chestxray', root/'covid_chestxray')
    for p in root.rglob('*'): p.chmod(p.stat().st_mode | 0o200)
    return root


@pytest.mark.parametrize('damage, says', [('picture', '.jpg'), ('encoding', 'metadata.csv: not UTF-8'), ('column', 'clinical_notes'),
                                          ('folder', 'covid_chestxray')])
def test_damaged_data_is_one_line(real_data, tmp_path, damage, says):
    root = copy_of_real_data(real_data, tmp_path)
    table = root/'covid_chestxray/metadata.csv'
    if damage == 'picture':
        p = sorted((root/'covid_chestxray/images').glob('*.jpg'))[3]; p.write_bytes(p.read_bytes()[:900])
    elif damage == 'encoding': table.write_bytes(table.read_bytes().replace(b'fever', 'fièvre'.encode('latin1'), 1))
    elif damage == 'column': table.write_text(table.read_text(encoding='utf-8').replace('clinical_notes', 'notes', 1), encoding='utf-8')
    else: shutil.rmtree(root/'covid_chestxray')
    params = json.dumps({'preset': 'public', 'data': str(root), 'objective': 'gk', 'seed': 0})
    r = subprocess.run([sys.executable, '-m', 'gk_mvlp.study.run', 'nbs/experiments/71_pretrain.ipynb', str(tmp_path/'run'), '--params',
                        params], capture_output=True, text=True)
    lines = r.stderr.strip().splitlines()
    assert r.returncode == 1 and len(lines) == 1 and says in lines[0] and 'Traceback' not in r.stdout + r.stderr, r.stderr


def test_readme_says_what_the_results_say(root):
    r = subprocess.run([sys.executable, str(root/'scripts/update_readme.py'), '--check'], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


def test_committed_results_match_their_manifests(root):
    "Every committed table and figure has the hash that its manifest states."
    found = 0
    for m in sorted((root/'paper_results').glob('*/manifest.json')):
        for a in json.loads(m.read_text())['artefacts']:
            p = m.parent/a['path']
            if not p.is_file():
                assert m.parent.name in ('public', 'smoke') and a['path'].startswith('figures/'), f'{p} is missing'
                continue
            found += 1
            assert hashlib.sha256(p.read_bytes()).hexdigest() == a['sha256'], p
    assert found or not list((root/'paper_results').glob('*/manifest.json'))
