"CheXpert: policies, paths, splits and refusals."

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gk_mvlp.data.chexpert import CHEXPERT_FINDINGS, CHEXPERT_TO_ENTITY, chexpert_labels, load_chexpert, split_path
from gk_mvlp.data.knowledge import ENTITY_INDEX
from gk_mvlp.data.registry import load_dataset
from gk_mvlp.paths import GKError

HEAD = 'Path,Sex,Age,Frontal/Lateral,AP/PA,' + ','.join(CHEXPERT_FINDINGS) + '\n'

def row(part, patient, view='view1_frontal', cells='', age='50', sex='Female', prefix='CheXpert-v1.0'):
    return f'{prefix}/{part}/patient{patient:05d}/study1/{view}.jpg,{sex},{age},{view.split("_")[1].title()},{"AP" if "frontal" in view else ""},' + (cells or ','.join([''] * 14)) + '\n'

@pytest.fixture
def root(tmp_path):
    d = tmp_path/'chexpert'
    rows = {'train': [row('train', i) for i in range(1, 11)] + [row('train', 1, 'view2_lateral')],
            'valid': [row('valid', 64541), row('valid', 64542)]}
    for part, lines in rows.items():
        (d/part).mkdir(parents=True)
        (d/f'{part}.csv').write_text(HEAD + ''.join(lines))
        for k, line in enumerate(lines):
            p = d/line.split(',')[0].split('/', 1)[1]; p.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng([k, part == 'valid']).integers(0, 256, (20, 16), np.uint8)).save(p)
    return tmp_path

@given(st.lists(st.sampled_from(['1.0', '0.0', '-1.0', '', '1', '0', '-1']), min_size=14, max_size=14),
       st.sampled_from(['ones', 'zeros', 'ignore']), st.sampled_from(['zeros', 'ignore']))
def test_policies_only_touch_what_they_name(cells, uncertain, blank):
    labels, entities = chexpert_labels(dict(zip(CHEXPERT_FINDINGS, cells, strict=True)), 'x', uncertain, blank)
    for name, c in zip(CHEXPERT_FINDINGS, cells, strict=True):
        v, key = (None if c == '' else float(c)), name.lower()
        want = {1: 1, 0: 0, -1: {'ones': 1, 'zeros': 0, 'ignore': None}[uncertain], None: {'zeros': 0, 'ignore': None}[blank]}[v]
        assert labels.get(key) == want
        if key in CHEXPERT_TO_ENTITY: assert entities.get(CHEXPERT_TO_ENTITY[key]) == {1: 1, 0: -1, -1: 0, None: None}[v]
    assert set(entities) <= set(ENTITY_INDEX)

@pytest.mark.parametrize('cell', ['nan', '2', '0.5', 'x', 'None'])
def test_other_cells_are_errors(cell):
    with pytest.raises(GKError, match='Edema'): chexpert_labels(dict.fromkeys(CHEXPERT_FINDINGS, '') | {'Edema': cell}, 'x')

def test_splits_and_laterals(root):
    s = load_chexpert(root)
    assert (len(s) == 12 and [x.split for x in s] == ['train'] * 10 + ['test'] * 2
            and [p.name for p in s[0].other_views] == ['view2_lateral.jpg'] and not s[1].other_views)
    assert {x.split for x in load_chexpert(root, valid_is='val')} == {'train', 'val'}
    (root/'chexpert/test_labels.csv').write_text('Path,' + ','.join(CHEXPERT_FINDINGS[::-1])
                                                 + '\ntest/patient64741/study1/view1_frontal.jpg,' + ','.join(['1.0'] + ['0.0'] * 13)
                                                 + '\n')
    p = root/'chexpert/test/patient64741/study1/view1_frontal.jpg'; p.parent.mkdir(parents=True); Image.new('L', (20, 20), 77).save(p)
    s = load_chexpert(root)
    assert [x.split for x in s[10:]] == ['val', 'val', 'test'] and s[-1].labels['support devices'] == 1 and sum(s[-1].labels.values()) == 1
    assert {x.split for x in load_dataset('chexpert', root)} == {'train', 'val', 'test'}

def test_policies_are_for_training_only(root):
    for part in ('train', 'valid'):
        p = root/f'chexpert/{part}.csv'; p.write_text(p.read_text().replace(',' * 14 + '\n', ',-1.0' + ',' * 13 + '\n'))
    s = load_chexpert(root, uncertain='ones', blank='ignore')
    assert s[0].labels == {'no finding': 1} and 'no finding' not in s[-1].labels and s[-1].labels['edema'] == 0

@pytest.mark.parametrize('path', ['train/patient1/study1/view1_front.jpg', 'train/../patient1/study1/view1_frontal.jpg',
                                  '/train/patient1/study1/view1_frontal.jpg', 'a/b/train/patient1/study1/view1_frontal.jpg',
                                  'dev/patient1/study1/view1_frontal.jpg', ''])
def test_bad_paths(path):
    with pytest.raises(GKError, match='line 5'): split_path(path, 'line 5')

@pytest.mark.parametrize('file,old,new,says', [('train.csv', 'Edema', 'edema', "'Edema' is missing"),
                                               ('train.csv', '/train/patient00002', '/valid/patient00002', 'table of train'),
                                               ('train.csv', 'Frontal,AP', 'Lateral,AP', 'said to be'),
                                               ('train.csv', ',50,', ',old,', 'Age'),
                                               ('train.csv', 'patient00002', 'patient00003', 'repeats'),
                                               ('train.csv', 'patient00009', 'patient90009', 'missing')])
def test_broken_tables(root, file, old, new, says):
    p = root/f'chexpert/{file}'; p.write_text(p.read_text().replace(old, new))
    with pytest.raises(GKError, match=says): load_chexpert(root)

def test_wrong_policies_and_a_missing_table(root):
    for kw in ({'uncertain': 'mixed'}, {'blank': 'ones'}, {'valid_is': 'dev'}):
        with pytest.raises(GKError, match=next(iter(kw))): load_chexpert(root, **kw)
    (root/'chexpert/valid.csv').unlink()
    with pytest.raises(GKError, match='valid.csv'): load_chexpert(root)
