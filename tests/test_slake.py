"SLAKE and the text-only side of VQA-RAD: quirks, refusals, and the real collections by number."
import json
from collections import Counter

import pytest
from PIL import Image

from gk_mvlp.data.registry import load_dataset
from gk_mvlp.data.slake import load_slake
from gk_mvlp.data.vqa_rad import load_vqa_rad
from gk_mvlp.paths import GKError

RECORD = {'img_id': 1, 'img_name': 'xmlab1/source.jpg', 'question': 'Is the lung healthy?', 'answer': 'No', 'q_lang': 'en', 'location': 'Lung', 'modality': 'X-Ray', 'answer_type': 'CLOSED', 'base_type': 'vqa',
          'content_type': 'Abnormality', 'triple': ['vhead', '_', '_'], 'qid': 5}

def write(root, **files):
    d = root/'slake'; d.mkdir(exist_ok=True)
    for name in ('train', 'validate', 'test'):
        rows = files.get(name, [RECORD | {'qid': f'{name}1', 'img_id': name, 'img_name': f'xmlab_{name}/source.jpg'}])
        (d/f'{name}.json').write_text(json.dumps(rows, ensure_ascii=False), encoding='utf-8')
        for r in rows:
            p = d/'imgs'/r['img_name']; p.parent.mkdir(parents=True, exist_ok=True); Image.new('L', (16, 16), 9).save(p)
    return root

def test_filters_and_knowledge_questions(tmp_path):
    write(tmp_path, train=[RECORD, RECORD | {'qid': 6, 'base_type': 'kvqa'}, RECORD | {'qid': 7, 'q_lang': 'zh'}, RECORD | {'qid': 8, 'modality': 'CT', 'img_name': 'xmlab2/source.jpg', 'img_id': 2}])
    s = {x.study_id: x for x in load_slake(tmp_path)}
    assert len(s) == 3 and [q.qid for q in s['xmlab1/source.jpg'].qa] == ['5', '6'] and s['xmlab1/source.jpg'].attributes == {'modality': 'X-Ray', 'location': 'Lung', 'base_type:6': 'kvqa'}
    assert len(load_slake(tmp_path, modality=None)) == 4 and [q.qid for q in load_slake(tmp_path, language='zh')[0].qa] == ['7']

def test_an_empty_answer_follows_the_policy(tmp_path):
    write(tmp_path, train=[RECORD, RECORD | {'qid': 6, 'answer': ' '}])
    with pytest.raises(GKError, match='record 1: answer is empty'): load_slake(tmp_path)
    with pytest.warns(UserWarning, match='left out 1 questions with an empty answer'): assert sum(len(s.qa) for s in load_slake(tmp_path, bad='skip')) == 3

def test_a_picture_in_two_splits_is_refused(tmp_path):
    write(tmp_path, validate=[RECORD | {'qid': 9}], train=[RECORD])
    with pytest.raises(GKError, match='also in split train'): load_slake(tmp_path)

@pytest.mark.parametrize('kw,says', [({'language': 'de'}, 'language'), ({'language': None}, 'leak'), ({'modality': 'US'}, 'X-Ray/Lung'), ({'location': 'Neck'}, 'Neck'), ({'bad': 'ignore'}, 'skip')])
def test_wrong_options(tmp_path, kw, says):
    with pytest.raises(GKError, match=says): load_slake(write(tmp_path), **kw)

def test_real_slake(real_data):
    if not (real_data/'slake').is_dir(): pytest.skip('no slake/ in the data root')
    s = load_dataset('slake', real_data, pictures=False)
    n = Counter(x.split for x in s for _ in x.qa)
    assert n == {'train': 1423, 'val': 338, 'test': 361} and Counter(x.split for x in s) == {'train': 122, 'val': 27, 'test': 30}
    with pytest.raises(GKError, match='train.json: record .* answer is empty'): load_slake(real_data, modality=None, pictures=False)
    with pytest.warns(UserWarning, match='left out 1 questions'): full = load_slake(real_data, modality=None, pictures=False, bad='skip')
    assert len(full) == 642 and sum(len(x.qa) for x in full) == 7032

def test_real_vqa_rad_questions_that_repeat(real_data):
    with pytest.warns(UserWarning, match='203 of 203 test pictures .* 14 of 451 test questions'): s = load_vqa_rad(real_data, organ=None, pictures=False)
    assert sum(len(x.qa) for x in s) == 3515
    with pytest.warns(UserWarning, match='1 of 451 test questions'): assert sum(len(x.qa) for x in load_vqa_rad(real_data, organ=None, pictures=False, layout='official')) == 2248
