"check-data: every kind of fault is named, counted and decides the exit status."

import numpy as np
import pytest
from PIL import Image

from gk_mvlp.cli import main
from gk_mvlp.data.check import check_data, format_checks
from gk_mvlp.paths import GKError


def picture(path, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (24, 20), np.uint8)).save(path)

@pytest.fixture
def table(tmp_path):
    "Twelve pictures of six patients in three splits."
    for i in range(12): picture(tmp_path/f'{i}.png', i)
    (tmp_path/'studies.csv').write_text('image,subject_id,split,report\n'
                                        + ''.join(f'{i}.png,p{i // 2},{("train", "val", "test")[i // 4]},Clear lungs {i}.\n'
                                                  for i in range(12)))
    return tmp_path

def found(root, **kw): return {c.check: c for c in check_data('table', root, kw or None, progress=False)}

def change(root, old, new): p = root/'studies.csv'; t = p.read_text(); assert old in t; p.write_text(t.replace(old, new))

def test_whole_data_is_fit_for_use(table, capsys):
    f = found(table)
    assert ({c.level for c in f.values()} <= {'ok', 'note'} and f['studies'].n == 12 and f['patients'].n == 6
            and f['with a report'].n == 12 and f['pictures'].n == 12)
    assert main(['check-data', 'table', str(table)]) == 0 and 'fit for use' in capsys.readouterr().out

FAULTS = {
    'missing': (lambda r: (r/'3.png').unlink(), 'left out', 'error', 1),
    'corrupt': (lambda r: (r/'3.png').write_bytes((r/'3.png').read_bytes()[:60]), 'corrupt pictures', 'error', 1),
    'empty file': (lambda r: (r/'3.png').write_bytes(b''), 'corrupt pictures', 'error', 1),
    'patient leak': (lambda r: change(r, '4.png,p2', '4.png,p0'), 'patients in two splits', 'error', 1),
    'picture leak': (lambda r: (r/'11.png').write_bytes((r/'0.png').read_bytes()), 'pictures in two splits', 'error', 1),
    'double': (lambda r: (r/'1.png').write_bytes((r/'0.png').read_bytes()), 'pictures that occur twice', 'warning', 1),
    'same picture in another format': (lambda r: Image.open(r/'0.png').convert('RGB').save(r/'11.png'), 'pictures in two splits', 'error',
                                       1),
    'no split for one': (lambda r: change(r, '5.png,p2,val', '5.png,p2,'), 'studies without a split', 'error', 1),
    'bad table': (lambda r: change(r, 'image', 'file'), 'loading', 'error', 1),
    'repeated reports': (lambda r: change(r, 'lungs 1.', 'lungs 0.'), 'reports that repeat another', 'note', 1),
    'not utf-8': (lambda r: (r/'studies.csv').write_bytes((r/'studies.csv').read_bytes() + 'ü'.encode('latin1')), 'loading', 'error', 1)}

@pytest.mark.parametrize('name', FAULTS)
def test_every_fault_is_a_line(table, name, capsys):
    spoil, check, level, n = FAULTS[name]
    spoil(table)
    c = found(table)[check]
    assert (c.level, c.n) == (level, n), c
    assert main(['check-data', 'table', str(table)]) == int(level == 'error')
    assert check in capsys.readouterr().out

def test_several_faults_at_once(table):
    for k in ('missing', 'patient leak', 'picture leak'): FAULTS[k][0](table)
    assert ([c.check for c in check_data('table', table, progress=False) if c.level == 'error']
            == ['left out', 'patients in two splits', 'pictures in two splits'])

def test_options_and_their_errors(table, capsys):
    (table/'studies.csv').rename(table/'mine.csv')
    assert main(['check-data', 'table', str(table), '--set', 'table=mine.csv', '--no-pictures']) == 0
    assert main(['check-data', 'table', str(table), '--set', 'tabel=mine.csv']) == 1 and "no option 'tabel'" in capsys.readouterr().err
    assert main(['check-data', 'table', str(table), '--set', 'x']) == 1 and main(['check-data', 'nope', str(table)]) == 1
    with pytest.raises(GKError, match='data set'): check_data('nope', table)

def test_phantom_needs_no_root(tmp_path, monkeypatch):
    monkeypatch.setenv('GK_MVLP_OUT', str(tmp_path))
    f = {c.check: c for c in check_data('phantom', options={'n': 8, 'size': 32}, progress=False)}
    assert f['with region boxes'].n == 8 and f['pictures'].n == 8 and not [c for c in f.values() if c.level == 'error']

def test_real_data(real_data):
    for name, options in (('covid_chestxray', {}), ('nih', {}), ('rsna', {}), ('vqa_rad', {}), ('iu_xray', {'pictures': False}),
                          ('slake', {'pictures': False})):
        checks = check_data(name, real_data, options, progress=False)
        assert not [c for c in checks if c.level == 'error'], format_checks(checks)
    f = {c.check: c for c in check_data('vqa_rad', real_data, progress=False, decode=False)}
    assert (f['patients in two splits'].level, f['patients in two splits'].n) == ('warning', 73) and f['as published'].level == 'warning'
    f = {c.check: c for c in check_data('vqa_rad', real_data, {'organ': None}, progress=False, decode=False)}
    assert f['left out'].level == 'error' and f['left out'].n > 100, 'pictures of other organs are not in the pack'
