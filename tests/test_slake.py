"SLAKE and the text-only side of VQA-RAD: quirks, refusals, and the real collections by number."
import json
from collections import Counter

import pytest
from PIL import Image

from gk_mvlp.data.registry import load_dataset
from gk_mvlp.data.slake import load_slake
from gk_mvlp.data.study import validate
from gk_mvlp.data.vqa_rad import load_vqa_rad
from gk_mvlp.paths import GKError

RECORD = {'img_id': 1, 'img_name': 'xmlab1/source.jpg', 'question': 'Is the lung healthy?', 'answer': 'No', 'q_lang': 'en',
          'location': 'Lung', 'modality': 'X-Ray', 'answer_type': 'CLOSED', 'base_type': 'vqa',
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
    write(tmp_path, train=[RECORD, RECORD | {'qid': 6, 'base_type': 'kvqa'}, RECORD | {'qid': 7, 'q_lang': 'zh'},
                           RECORD | {'qid': 8, 'modality': 'CT', 'img_name': 'xmlab2/source.jpg', 'img_id': 2}])
    s = {x.study_id: x for x in load_slake(tmp_path)}
    assert (len(s) == 3 and [q.qid for q in s['xmlab1/source.jpg'].qa] == ['5', '6']
            and s['xmlab1/source.jpg'].attributes == {'modality': 'X-Ray', 'location': 'Lung', 'base_type:6': 'kvqa'})
    assert len(load_slake(tmp_path, modality=None)) == 4 and [q.qid for q in load_slake(tmp_path, language='zh')[0].qa] == ['7']

def test_an_empty_answer_follows_the_policy(tmp_path):
    write(tmp_path, train=[RECORD, RECORD | {'qid': 6, 'answer': ' '}])
    with pytest.raises(GKError, match='record 1: answer is empty'): load_slake(tmp_path)
    with pytest.warns(UserWarning, match='left out 1 questions with an empty answer'):
        assert sum(len(s.qa) for s in load_slake(tmp_path, bad='skip')) == 3

def test_a_picture_in_two_splits_is_refused(tmp_path):
    write(tmp_path, validate=[RECORD | {'qid': 9}], train=[RECORD])
    with pytest.raises(GKError, match='also in split train'): load_slake(tmp_path)

@pytest.mark.parametrize('kw,says', [({'language': 'de'}, 'language'), ({'language': None}, 'leak'), ({'modality': 'US'}, 'X-Ray/Lung'),
                                     ({'location': 'Neck'}, 'Neck'), ({'bad': 'ignore'}, 'skip')])
def test_wrong_options(tmp_path, kw, says):
    with pytest.raises(GKError, match=says): load_slake(write(tmp_path), **kw)

def detection(root, name, content):
    (root/'slake'/'imgs'/name/'detection.json').write_text(content if isinstance(content, str) else json.dumps(content))

def test_boxes_become_regions_findings_and_text(tmp_path):
    write(tmp_path)
    detection(tmp_path, 'xmlab_train',
              [{'Left Lung': [8, 2, 6, 8]}, {'Left Lung': [8, 2, 2, 2]}, {'HEART': [4, 4, 20, 8]},
               {'Infiltration': [0, 0, 4, 4], 'Effusion': [1, 8, 4, 4]}, {'Spinal  Cord': [7, 0, 2, 16]}])
    a, b, _ = (validate(s) for s in load_slake(tmp_path))
    assert a.regions == {'left lung': (.5, .125, .875, .625), 'cardiac silhouette': (.25, .25, 1., .75)}, (
        'the larger of two boxes, cut to the picture')
    assert ([(f.entity, f.box) for f in a.findings]
            == [('lung opacity', (0., 0., .25, .25)), ('pleural effusion', (.0625, .5, .3125, .75))]
            and a.attributes['box:spinal cord'] == '0.4375 0.0000 0.5625 1.0000')
    assert not b.regions and not b.findings, 'no file, no boxes'
    assert not load_slake(tmp_path, pictures=False)[0].regions

@pytest.mark.parametrize('content,says', [('[{"Heart": [1, 2, 3]}]', 'four finite numbers'), ('[{"Heart": [1, 2, 0, 3]}]', 'inverted'),
                                          ('[{"Heart": [99, 2, 5, 3]}]', 'outside the picture'), ('{"Heart": [1, 2, 3, 4]}', 'not a list'),
                                          ('[["Heart", 1, 2, 3, 4]]', 'entry 0'), ('[{"Heart": [NaN, 2, 3, 4]}]', 'not valid JSON'),
                                          ('[{"Heart": [1, 2', 'not valid JSON'), ('', 'detection.json')])
def test_broken_boxes_follow_the_policy(tmp_path, content, says):
    write(tmp_path); detection(tmp_path, 'xmlab_validate', content)
    with pytest.raises(GKError, match=says): load_slake(tmp_path)
    with pytest.warns(UserWarning, match='left out 1 pictures with broken boxes'): assert len(load_slake(tmp_path, bad='skip')) == 2

def test_real_slake(real_data):
    if not (real_data/'slake').is_dir(): pytest.skip('no slake/ in the data root')
    s = load_dataset('slake', real_data, pictures=False)
    n = Counter(x.split for x in s for _ in x.qa)
    assert n == {'train': 1423, 'val': 338, 'test': 361} and Counter(x.split for x in s) == {'train': 122, 'val': 27, 'test': 30}
    with pytest.raises(GKError, match='train.json: record .* answer is empty'): load_slake(real_data, modality=None, pictures=False)
    with pytest.warns(UserWarning, match='left out 1 questions'): full = load_slake(real_data, modality=None, pictures=False, bad='skip')
    assert len(full) == 642 and sum(len(x.qa) for x in full) == 7032

def test_real_vqa_rad_questions_that_repeat(real_data):
    with pytest.warns(UserWarning, match='203 of 203 test pictures .* 14 of 451 test questions'):
        s = load_vqa_rad(real_data, organ=None, pictures=False)
    assert sum(len(x.qa) for x in s) == 3515
    with pytest.warns(UserWarning, match='1 of 451 test questions'):
        assert sum(len(x.qa) for x in load_vqa_rad(real_data, organ=None, pictures=False, layout='official')) == 2248
