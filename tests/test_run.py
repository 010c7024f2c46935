"The strict runner: parameters, failures, stale runs; and the command line's errors."
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

from gk_mvlp.config import Preset, load_preset, preset_names
from gk_mvlp.paths import GKError
from gk_mvlp.study import run as R
from gk_mvlp.study.launch import check_preset


def notebook(path, body, params='epochs: int = 1\nlr: float = 0.1\nname: str = "a"\nflag: bool = False\noptions: dict = {}\nout: str = ""'):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(params, metadata={'tags': ['parameters']}),
                                         nbformat.v4.new_code_cell(body)])
    nbformat.write(nb, path)
    return path


@pytest.mark.parametrize('params, says', [
    ({'epoch': 1}, "unknown parameter 'epoch'. Did you mean 'epochs'"), ({'epochs': '3'}, 'not int'), ({'epochs': True}, 'not int'),
    ({'epochs': 1.5}, 'not int'),
    ({'flag': 'true'}, 'not bool'), ({'flag': 1}, 'not bool'), ({'lr': 'fast'}, 'not float'), ({'options': '[1,2]'}, 'not dict'),
    ({'name': 3}, 'not str')])
def test_wrong_parameters_are_refused_before_a_kernel_starts(tmp_path, params, says):
    with pytest.raises(GKError) as e: R.run_notebook(notebook(tmp_path/'n.ipynb', ''), tmp_path/'run', params)
    assert says in str(e.value) and '\n' not in str(e.value) and not (tmp_path/'run').exists()


@pytest.mark.parametrize('cell, says', [('a = 1', 'annotation'), ('a: "Path" = 1', 'annotation')])
def test_parameters_need_annotations(tmp_path, cell, says):
    with pytest.raises(GKError, match=says): R.notebook_parameters(notebook(tmp_path/'n.ipynb', '', cell))


def test_a_good_run_leaves_everything(tmp_path):
    body = ('from gk_mvlp.study.run import begin_run, end_run\nrun = begin_run(out, "paper", {"epochs": epochs}, "abc")\nend_run(run, '
            '{"auroc": 0.5, "undefined": float("nan")})')
    R.run_notebook(notebook(tmp_path/'n.ipynb', body), tmp_path/'run', {'epochs': 3, 'lr': 1})
    files = {p.name for p in (tmp_path/'run').iterdir()}
    assert {'run.ipynb', 'config.json', 'metrics.json', 'env.json'} <= files
    assert json.loads((tmp_path/'run/metrics.json').read_text()) == {'auroc': .5}
    assert json.loads((tmp_path/'run/config.json').read_text())['settings'] == {'epochs': 3}
    env = json.loads((tmp_path/'run/env.json').read_text())
    assert env['torch'] and env['seconds'] > 0 and 'commit' in env


@pytest.mark.parametrize('without', ['git', 'clone'])
def test_an_unpacked_archive_has_no_commit(tmp_path, monkeypatch, without):
    if without == 'git': monkeypatch.setenv('PATH', str(tmp_path))
    else:
        monkeypatch.setenv('GIT_CEILING_DIRECTORIES', str(tmp_path.parent))
        monkeypatch.setattr(R, 'project_root', lambda: tmp_path)
    env = R.environment(1.)
    assert env['commit'] is None and env['dirty'] is None and env['torch']


def test_a_failed_run_is_kept_and_says_one_line(tmp_path):
    from gk_mvlp.study.run import main
    nb = notebook(tmp_path/'n.ipynb', 'from gk_mvlp.paths import GKError\nraise GKError("picture x.png: truncated", "Copy it again.")')
    r = subprocess.run([sys.executable, '-m', 'gk_mvlp.study.run', str(nb), str(tmp_path/'run'), '--params', '{}'], capture_output=True,
                       text=True)
    lines = [l for l in r.stderr.splitlines() if l.strip()]
    assert r.returncode == 1 and len(lines) == 1 and 'picture x.png: truncated. Copy it again.' in lines[0]
    assert (tmp_path/'run/run.ipynb').is_file() and not (tmp_path/'run/metrics.json').exists()


def test_a_bug_names_the_notebook(tmp_path):
    with pytest.raises(GKError, match=r'ZeroDivisionError.*run\.ipynb'):
        R.run_notebook(notebook(tmp_path/'n.ipynb', '1/0'), tmp_path/'run', {})


def test_a_run_without_metrics_is_no_run(tmp_path):
    with pytest.raises(GKError, match='metrics.json'): R.run_notebook(notebook(tmp_path/'n.ipynb', 'x = 1'), tmp_path/'run', {})


def test_stale_half_finished_runs_are_cleared(tmp_path, capsys):
    "A checkpoint made with other settings, data or code must not be continued."
    folder = R.begin_run(str(tmp_path/'r'), 'paper', {'lr': 1}, 'data-a')
    (folder/'last.ckpt').write_text('x')
    R.begin_run(str(folder), 'paper', {'lr': 1}, 'data-a')
    assert (folder/'last.ckpt').exists(), 'the same run continues'
    R.begin_run(str(folder), 'paper', {'lr': 1}, 'data-b')
    assert not (folder/'last.ckpt').exists() and 'data_fingerprint' in capsys.readouterr().out


def test_committed_notebooks_are_well_formed(root):
    for path in sorted((root/'nbs').rglob('*.ipynb')):
        nb = nbformat.read(path, as_version=4)
        assert 'papermill' not in nb.metadata, path
        assert path.stat().st_size <= 200 * 1024, f'{path}: over 200 KB'
        if path.parent.name in ('experiments', 'paper'):
            assert R.notebook_parameters(path), path
            assert not any(c.get('outputs') for c in nb.cells if c.cell_type == 'code'), f'{path}: outputs belong into runs/'
            assert sum(len(c.source.splitlines()) for c in nb.cells if c.cell_type == 'code') <= 60, f'{path}: its code belongs in a module'
        for i, source in enumerate(c.source for c in nb.cells if c.cell_type == 'code'):
            assert len(source.splitlines()) <= 46, f'{path}: code cell {i} has over 46 lines'
            inside = {n for s in re.finditer(r'(\'\'\'|\"\"\").*?\1', source, re.S)
                      for n in range(source.count('\n', 0, s.start()), source.count('\n', 0, s.end()) + 1)}
            wide = [x for n, x in enumerate(source.splitlines()) if len(x) > 140 and n not in inside]
            assert not wide, f'{path}: code cell {i} has a line of over 140 characters: {wide[0].strip()[:60]} ...'
    numbers = [p.name.split('_')[0] for p in (root/'nbs').rglob('*.ipynb')]
    assert len(numbers) == len(set(numbers)), 'numbers are the reading order and unique'


@pytest.mark.parametrize('name', ['smoke', 'mini', 'public'])
def test_presets_are_valid(name):
    assert name in preset_names()
    check_preset(load_preset(name))


def cli(*args, **env):
    return subprocess.run([sys.executable, '-c', 'import sys; from gk_mvlp.cli import main; sys.exit(main())', *args], capture_output=True,
                          text=True, env=os.environ | env)


@pytest.mark.parametrize('args, says', [
    (('--preset', 'smok'), "preset 'smok': no such preset"), (('--preset', 'public', '--data', '/no/such/folder'), 'does not exist'),
    (('--preset', 'public', '--data', ''), 'no data root given')])
def test_the_command_complains_in_one_line(args, says, tmp_path):
    r = cli('paper', *args, GK_MVLP_OUT=str(tmp_path), GK_MVLP_DATA='')
    assert r.returncode == 1 and says in r.stderr and len(r.stderr.strip().splitlines()) == 1 and 'Traceback' not in r.stderr


@pytest.mark.parametrize('text, says', [
    ('about: x\nmethodz: [gk]\n', 'methodz'), ('about: [1\n', 'YAML'), ('- 1\n', 'mapping'), ('about: 3\n', "'about' is 3")])
def test_broken_presets(tmp_path, text, says):
    path = tmp_path/'p.yaml'; path.write_text(text)
    r = cli('paper', '--preset', str(path), GK_MVLP_OUT=str(tmp_path))
    assert r.returncode == 1 and says in r.stderr and len(r.stderr.strip().splitlines()) == 1, r.stderr


def test_a_preset_section_with_a_typo_is_found_before_any_job(root, tmp_path):
    text = (root/'presets/smoke.yaml').read_text().replace('image_depth', 'image_dpeth')
    (tmp_path/'p.yaml').write_text(text)
    r = cli('paper', '--preset', str(tmp_path/'p.yaml'), GK_MVLP_OUT=str(tmp_path))
    assert r.returncode == 1 and "'image_dpeth'" in r.stderr and "Did you mean 'image_depth'" in r.stderr


def test_latin1_preset_names_the_byte(tmp_path):
    (tmp_path/'p.yaml').write_bytes('about: Röntgen\n'.encode('latin1'))
    r = cli('paper', '--preset', str(tmp_path/'p.yaml'), GK_MVLP_OUT=str(tmp_path))
    assert r.returncode == 1 and 'not UTF-8' in r.stderr


CREDENTIALED = ('about: a test\ndata: {n: 40, size: 64}\ndetector: {image_size: 64, train: {epochs: 1, batch_size: 8}}\nmodel: '
                '{}\npretrain: {}\nfinetune: {}\ncredentialed: true\n')
LEAKS = ['print("CANARY p10000032")', 'import sys; print("CANARY", file=sys.stderr)', 'import warnings; warnings.warn("CANARY")',
         '"CANARY"', 'from IPython.display import display, HTML; display(HTML("<p>CANARY</p>"))',
         'import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()']


@pytest.mark.parametrize('fails', [False, True])
def test_nothing_of_credentialed_data_stays_in_a_notebook(tmp_path, fails):
    "Printed, warned, shown, drawn or raised: only cells tagged 'aggregate' keep output, and no message of an error survives."
    (tmp_path/'secret.yaml').write_text(CREDENTIALED)
    last = ('raise ValueError("CANARY p10000032")' if fails
            else 'from gk_mvlp.study.run import begin_run, end_run\nend_run(begin_run(out, "paper", {}), {"auroc": .8})\n"kept: .8"')
    cells = [nbformat.v4.new_code_cell('preset: str = ""\nout: str = ""', metadata={'tags': ['parameters']}),
             *map(nbformat.v4.new_code_cell, LEAKS), nbformat.v4.new_code_cell(last, metadata={'tags': ['aggregate']})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/'n.ipynb')
    params = {'preset': str(tmp_path/'secret.yaml')}
    if fails:
        with pytest.raises(GKError): R.run_notebook(tmp_path/'n.ipynb', tmp_path/'run', params)
    else: R.run_notebook(tmp_path/'n.ipynb', tmp_path/'run', params)
    nb = nbformat.read(tmp_path/'run/run.ipynb', as_version=4)
    outputs = json.dumps([c.get('outputs', []) for c in nb.cells])
    assert ('CANARY' not in outputs and 'p10000032' not in outputs and 'image/png' not in outputs
            and not (tmp_path/'run/kernel.log').exists())
    assert ('ValueError' in outputs) if fails else ('kept: .8' in outputs)
    (tmp_path/'open.yaml').write_text(CREDENTIALED.replace('true', 'false'))
    if not fails:
        R.run_notebook(tmp_path/'n.ipynb', tmp_path/'open', {'preset': str(tmp_path/'open.yaml')})
        assert 'CANARY' in (tmp_path/'open/run.ipynb').read_text() and 'image/png' in (tmp_path/'open/run.ipynb').read_text()
