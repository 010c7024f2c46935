"Loaders and registry: the real collections by number, and every kind of broken input by message."
import json
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gk_mvlp.data import registry
from gk_mvlp.data.covid_chestxray import finding_labels, load_covid_chestxray
from gk_mvlp.data.knowledge import ENTITY_INDEX
from gk_mvlp.data.nih import NIH_FINDINGS, NIH_TO_ENTITY, load_nih
from gk_mvlp.data.registry import (FRACTIONS, assign_splits, data_fingerprint, dataset_names, dataset_options, load_dataset,
                                   picture_hashes, register, split_together)
from gk_mvlp.data.rsna import load_rsna
from gk_mvlp.data.study import FindingBox, Study, check_splits, validate
from gk_mvlp.data.tables import box_xywh, picture_path
from gk_mvlp.data.vqa_rad import load_vqa_rad
from gk_mvlp.paths import GKError


def picture(path, seed=0, size=(32, 32)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, size, np.uint8)).save(path)

COVID_HEAD = 'patientid,sex,age,finding,view,modality,filename,clinical_notes,source_filename,source_width,source_height'
NIH_HEAD = ('Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View '
            'Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]')
BOX_HEAD = 'Image Index,Finding Label,Bbox [x,y,w,h],,,'
RSNA_HEAD = 'patientId,x,y,width,height,Target'
MATCH_HEAD = 'patientId,nih_image_index,mse,detailed_class,Target,n_boxes,nih_chestxray14_path'
QUESTION = {'qid': 1, 'image_name': 'p0.jpg', 'image_organ': 'CHEST', 'answer': 'yes', 'answer_type': 'CLOSED', 'question_type': 'PRES',
            'question': 'Effusion?', 'phrase_type': 'freeform'}
COCO = {'categories': [{'id': 1, 'name': 'Right Lung'}, {'id': 2, 'name': 'Left Lung'}],
        'images': [{'id': 5, 'file_name': 'a.png', 'width': 500, 'height': 400}],
        'annotations': [{'id': 1, 'image_id': 5, 'category_id': 1, 'bbox': [50, 40, 150, 300]},
                        {'id': 2, 'image_id': 5, 'category_id': 2, 'bbox': [300, 40, 150, 300]}]}
META, LUNGS = 'covid_chestxray/metadata.csv', 'covid_chestxray/annotations/imageannotation_ai_lung_bounding_boxes.json'
ENTRY, BOXES = 'nih_chestxray14/Data_Entry_2017_v2020.csv', 'nih_chestxray14/BBox_List_2017.csv'
LABELS, MATCHES = 'rsna_pneumonia/stage_2_train_labels.csv', 'rsna_pneumonia/rsna_to_nih_matches.csv'
TRAIN, TEST = 'vqa_rad/trainset.json', 'vqa_rad/testset.json'
LOADERS = {'covid_chestxray': load_covid_chestxray, 'nih': load_nih, 'rsna': load_rsna, 'vqa_rad': load_vqa_rad}

@pytest.fixture
def root(tmp_path):
    "All four collections in miniature and whole."
    for i, n in enumerate('ab'): picture(tmp_path/f'covid_chestxray/images/{n}.jpg', i)
    (tmp_path/'covid_chestxray/annotations').mkdir()
    (tmp_path/META).write_text(f'{COVID_HEAD}\n7,F,61,"COVID-19, ARDS",PA,X-ray,a.jpg,"No pneumothorax. Left '
                               'effusion.",a.png,500,400\n8,M,,No Finding,AP,X-ray,b.jpg,,b.png,500,400\n')
    (tmp_path/LUNGS).write_text(json.dumps(COCO))
    for i in range(3): picture(tmp_path/f'nih_chestxray14/images_64px/0000000{i}_000.png', i, (64, 64))
    (tmp_path/ENTRY).write_text(f'{NIH_HEAD}\n' + ''.join(f'0000000{i}_000.png,{f},0,{i},5{i},M,PA,10,10,.1,.1\n'
                                                          for i, f in enumerate(('Mass|Edema', 'No Finding', 'Infiltration'))))
    (tmp_path/BOXES).write_text(f'{BOX_HEAD}\n00000002_000.png,Infiltrate,256,512,128,256\n')
    (tmp_path/'rsna_pneumonia').mkdir()
    (tmp_path/LABELS).write_text(f'{RSNA_HEAD}\naaa,256.0,512.0,128.0,256.0,1\naaa,0,0,64,64,1\nbbb,,,,,0\n')
    (tmp_path/MATCHES).write_text(f'{MATCH_HEAD}\naaa,00000002_000.png,.9,Lung '
                                  'Opacity,1,2,images_64px/00000002_000.png\nbbb,00000001_000.png,.8,Normal,0,0,images_64px/00000001_000.png\n')
    for i in range(2): picture(tmp_path/f'vqa_rad/images/p{i}.jpg', i)
    (tmp_path/TRAIN).write_text(json.dumps([QUESTION, QUESTION | {'qid': '2', 'image_name': 'p1.jpg'}]))
    (tmp_path/TEST).write_text(json.dumps([QUESTION | {'qid': 3}]))
    return tmp_path

def load(name, root, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return LOADERS[name](root, **kw)

def test_the_miniature_collections_are_whole(root):
    a, b = load('covid_chestxray', root)
    assert (a.entities == {'pneumothorax': -1, 'pleural effusion': 1} and b.entities == {}
            and set(a.regions) == {'right lung', 'left lung'} and not b.regions)
    x, y, z = load('nih', root)
    assert (x.entities == {'mass': 1, 'pulmonary edema': 1} and sum(y.labels.values()) == 0
            and z.findings == [FindingBox('lung opacity', (.25, .5, .375, .75))])
    p, q = load('rsna', root)
    assert len(p.findings) == 2 and p.subject_id == z.subject_id and q.labels == {'pneumonia': 0} and q.age == 51
    assert [len(s.qa) for s in load('vqa_rad', root)] == [1, 1, 1]
    for n in LOADERS:
        for s in load(n, root): validate(s)

# --- 1. broken tables and annotations: (collection, file, what to change it to, what the message must say) ---
def sub(old, new): return lambda t: t.replace(old, new)
def annotation(**kw):
    return lambda t: json.dumps(json.loads(t) | {'annotations': [json.loads(t)['annotations'][0] | kw, json.loads(t)['annotations'][1]]})
def question(**kw): return lambda t: json.dumps([{k: v for k, v in (json.loads(t)[0] | kw).items() if v is not ...}, *json.loads(t)[1:]])

BROKEN = {
    'covid latin-1 report': ('covid_chestxray', META, lambda t: t.replace('Left effusion', 'Röntgen').encode('latin1'), 'not UTF-8'),
    'covid utf-16 table': ('covid_chestxray', META, lambda t: t.encode('utf-16'), 'not UTF-8'),
    'covid empty table': ('covid_chestxray', META, lambda t: '', 'empty'),
    'covid header only': ('covid_chestxray', META, lambda t: COVID_HEAD + '\n', 'no rows'),
    'covid missing column': ('covid_chestxray', META, sub('clinical_notes', 'notes'), "'clinical_notes' is missing; found"),
    'covid column twice': ('covid_chestxray', META, sub('modality', 'view'), 'twice'),
    'covid duplicate row': ('covid_chestxray', META, lambda t: t + t.splitlines()[1] + '\n', 'repeats line 2'),
    'covid short row': ('covid_chestxray', META, sub(',b.png,500,400', ''), 'line 3: 8 fields'),
    'covid unquoted comma': ('covid_chestxray', META, sub('"COVID-19, ARDS"', 'COVID-19, ARDS'), 'line 2: 12 fields'),
    'covid open quote': ('covid_chestxray', META, sub('effusion."', 'effusion.'), 'CSV'),
    'covid age is a word': ('covid_chestxray', META, sub(',61,', ',sixty,'), "age is 'sixty'"),
    'covid age is nan': ('covid_chestxray', META, sub(',61,', ',nan,'), "age is 'nan'"),
    'covid no patient': ('covid_chestxray', META, sub('\n7,', '\n,'), 'patientid is empty'),
    'covid path out of the folder': ('covid_chestxray', META, sub('a.jpg', '../../a.jpg'), 'picture name'),
    'covid absolute path': ('covid_chestxray', META, sub('a.jpg', '/etc/passwd'), 'picture name'),
    'covid picture missing': ('covid_chestxray', META, sub('a.jpg', 'c.jpg'), '1 of 2 pictures are missing'),
    'covid zero bytes': ('covid_chestxray', META, sub('a.jpg', 'a\0.jpg'), 'zero bytes'),
    'covid source size differs': ('covid_chestxray', META, sub('a.png,500,400', 'a.png,501,400'), 'another version'),
    'lung json cut': ('covid_chestxray', LUNGS, lambda t: t[:-5], 'not valid JSON'),
    'lung json NaN': ('covid_chestxray', LUNGS, sub('[50,', '[NaN,'), 'NaN'),
    'lung json layout': ('covid_chestxray', LUNGS, lambda t: '{"images": []}', 'COCO'),
    'lung json is a list': ('covid_chestxray', LUNGS, lambda t: '[]', 'COCO'),
    'lung box inverted': ('covid_chestxray', LUNGS, annotation(bbox=[50, 40, -150, 300]), 'annotation 1'),
    'lung box half null': ('covid_chestxray', LUNGS, annotation(bbox=[50, None, 150, 300]), 'annotation 1'),
    'lung box outside': ('covid_chestxray', LUNGS, annotation(bbox=[600, 40, 150, 300]), 'outside'),
    'lung box of three': ('covid_chestxray', LUNGS, annotation(bbox=[50, 40, 150]), 'four'),
    'lung box of text': ('covid_chestxray', LUNGS, annotation(bbox=['50', '40', '150', '3']), 'four finite'),
    'lung sides swapped': ('covid_chestxray', LUNGS,
                           sub('Right Lung"}, {"id": 2, "name": "Left Lung', 'Left Lung"}, {"id": 2, "name": "Right Lung'), 'mirrored'),
    'lung twice': ('covid_chestxray', LUNGS, annotation(category_id=2), 'second left lung'),
    'lung unknown category': ('covid_chestxray', LUNGS, sub('Left Lung', 'Heart'), "category 'heart'"),
    'lung unknown image': ('covid_chestxray', LUNGS, annotation(image_id=99), 'COCO'),
    'nih header lost': ('nih', ENTRY, lambda t: t.split('\n', 1)[1], 'header starts with'),
    'nih unknown finding': ('nih', ENTRY, sub('Mass|', 'Masses|'), "unknown finding 'Masses'"),
    'nih contradiction': ('nih', ENTRY, sub('Mass|Edema', 'Mass|No Finding'), 'Finding Labels'),
    'nih no label': ('nih', ENTRY, sub('Mass|Edema', ''), 'Finding Labels'),
    'nih two patients': ('nih', ENTRY, sub(',0,2,52', ',0,3,52'), 'same patient'),
    'nih patient is text': ('nih', ENTRY, sub(',0,2,52', ',0,two,52'), 'same patient'),
    'nih picture name': ('nih', ENTRY, sub('00000002_000.png,I', 'two.png,I'), 'official picture name'),
    'nih duplicate': ('nih', ENTRY, lambda t: t + t.splitlines()[-1] + '\n', 'repeats'),
    'nih short row': ('nih', ENTRY, sub(',M,PA,10,10,.1,.1\n00000001', ',M,PA,10\n00000001'), '8 fields under 11'),
    'nih picture without row': ('nih', ENTRY, lambda t: '\n'.join(t.splitlines()[:-1]) + '\n', 'no row in the label table'),
    'nih age': ('nih', ENTRY, sub(',51,', ',old,'), 'Patient Age'),
    'nih box nan': ('nih', BOXES, sub('256,512', 'nan,512'), "x is 'nan'"),
    'nih box empty': ('nih', BOXES, sub('256,512', ',512'), 'four finite'),
    'nih box inverted': ('nih', BOXES, sub('128,256', '-128,256'), 'inverted'),
    'nih box outside': ('nih', BOXES, sub('256,512', '2560,512'), 'outside'),
    'nih box label': ('nih', BOXES, sub('Infiltrate', 'Opacity'), "unknown finding 'Opacity'"),
    'nih box header': ('nih', BOXES, sub('Image Index', 'image'), 'header starts'),
    'rsna missing column': ('rsna', LABELS, sub('width', 'w'), "'width' is missing"),
    'rsna target without box': ('rsna', LABELS, sub('bbb,,,,,0', 'bbb,,,,,1'), 'Target'),
    'rsna box without target': ('rsna', LABELS, sub('64,64,1', '64,64,0'), 'Target'),
    'rsna target 2': ('rsna', LABELS, sub('256.0,1', '256.0,2'), 'Target'),
    'rsna both': ('rsna', LABELS, lambda t: t + 'aaa,,,,,0\n', 'both positive and negative'),
    'rsna nan': ('rsna', LABELS, sub('128.0', 'NaN'), "width is 'NaN'"),
    'rsna half a box': ('rsna', LABELS, sub('128.0', ''), 'four finite'),
    'rsna inverted': ('rsna', LABELS, sub('128.0', '-1'), 'inverted'),
    'rsna unknown match': ('rsna', MATCHES, sub('bbb', 'ccc'), 'not in the label table'),
    'rsna match disagrees': ('rsna', MATCHES, sub('Opacity,1,2', 'Opacity,1,3'), 'one release'),
    'rsna match twice': ('rsna', MATCHES, lambda t: t + t.splitlines()[1] + '\n', 'repeats'),
    'rsna match path': ('rsna', MATCHES, sub('images_64px/00000002', '../00000002'), 'picture name'),
    'rsna match picture missing': ('rsna', MATCHES, sub('images_64px/00000002', 'images/00000002'), 'missing'),
    'vqa not json': ('vqa_rad', TRAIN, lambda t: 'qid,answer\n', 'not valid JSON'),
    'vqa a dict': ('vqa_rad', TRAIN, lambda t: '{}', 'list of records'),
    'vqa empty list': ('vqa_rad', TRAIN, lambda t: '[]', 'list of records'),
    'vqa a string record': ('vqa_rad', TRAIN, lambda t: '["x"]', 'record 0: str'),
    'vqa missing key': ('vqa_rad', TRAIN, question(answer=...), "key 'answer' is missing"),
    'vqa null answer': ('vqa_rad', TRAIN, question(answer=None), 'answer is None'),
    'vqa NULL question': ('vqa_rad', TRAIN, question(question='NULL'), 'question is'),
    'vqa blank answer': ('vqa_rad', TRAIN, question(answer=' '), 'answer is'),
    'vqa answer type': ('vqa_rad', TRAIN, question(answer_type='MAYBE'), 'answer_type'),
    'vqa list answer': ('vqa_rad', TRAIN, question(answer=['yes']), 'answer is'),
    'vqa qid repeats as text': ('vqa_rad', TRAIN, question(qid=2), 'qid 2 repeats'),
    'vqa qid repeats in test': ('vqa_rad', TEST, question(qid='1'), 'qid 1 repeats'),
    'vqa picture missing': ('vqa_rad', TRAIN, question(image_name='p7.jpg'), '1 of 3 pictures are missing'),
    'vqa path': ('vqa_rad', TRAIN, question(image_name='C:\\p0.jpg'), 'picture name'),
    'vqa latin-1': ('vqa_rad', TRAIN, lambda t: t.replace('Effusion', 'Erguß').encode('latin1'), 'not UTF-8'),
}

@pytest.mark.parametrize('case', BROKEN)
def test_broken_input_is_named(root, case):
    name, file, change, says = BROKEN[case]
    text = (root/file).read_text()
    new = change(text)
    assert new != text and new != text.encode()
    (root/file).write_bytes(new if isinstance(new, bytes) else new.encode())
    with pytest.raises(GKError) as err: load(name, root)
    assert says in str(err.value), str(err.value)
    assert err.value.remedy and '\n' not in str(err.value)

@pytest.mark.parametrize('name,file', [('covid_chestxray', META), ('covid_chestxray', LUNGS), ('nih', ENTRY), ('nih', BOXES),
                                       ('rsna', LABELS), ('rsna', MATCHES), ('vqa_rad', TRAIN), ('vqa_rad', TEST)])
def test_missing_file_is_named(root, name, file):
    (root/file).unlink()
    with pytest.raises(GKError, match=Path(file).name): load(name, root)

@pytest.mark.parametrize('name,file', [('covid_chestxray', META), ('nih', ENTRY), ('nih', BOXES), ('rsna', LABELS), ('rsna', MATCHES),
                                       ('vqa_rad', TRAIN)])
def test_bom_and_windows_line_ends_change_nothing(root, name, file):
    want = [repr(s) for s in load(name, root)]
    (root/file).write_bytes(b'\xef\xbb\xbf' + (root/file).read_bytes().replace(b'\n', b'\r\n'))
    assert [repr(s) for s in load(name, root)] == want

# --- 2. quirks that must load ---
def test_missing_pictures_can_be_skipped_with_one_warning(root):
    for name, file in (('covid_chestxray', 'covid_chestxray/images/a.jpg'), ('nih', 'nih_chestxray14/images_64px/00000000_000.png'),
                       ('vqa_rad', 'vqa_rad/images/p1.jpg')):
        n = len(load(name, root)); (root/file).unlink()
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            kept = LOADERS[name](root, bad='skip')
        counted = [x for x in w if f'left out 1 of {n}' in str(x.message)]
        assert len(kept) == n - 1 and len(counted) == 1
    for n in LOADERS:
        with pytest.raises(GKError, match='skip'): load(n, root, bad='ignore')

def test_no_picture_at_all_is_an_error_even_when_skipping(root):
    for p in (root/'covid_chestxray/images').iterdir(): p.unlink()
    with pytest.raises(GKError, match='none of 2'): load('covid_chestxray', root, bad='skip')

def test_covid_quirks(root):
    text = (root/META).read_text()
    (root/META).write_text(text.replace('Left effusion.', 'T 38\ufffdC,\n "" left  effusion.')
                           + '9,M,40,COVID-19,L,X-ray,lateral.jpg,,l.png,1,1\n9,M,40,COVID-19,Axial,CT,ct.jpg,,c.png,1,1\n',
                           encoding='utf-8')
    (root/LUNGS).write_text(json.dumps(COCO | {'annotations': [COCO['annotations'][0] | {'bbox': [None] * 4}, COCO['annotations'][1]]}))
    a, _ = load('covid_chestxray', root)
    assert (a.report == 'No pneumothorax. T 38 C, " left effusion.' and set(a.regions) == {'left lung'}
            and a.attributes['finding'] == 'COVID-19, ARDS')
    assert len(load('covid_chestxray', root, reports_only=True)) == 1

def test_covid_source_without_the_added_columns(root):
    "The original repository has no source_* columns: file names join directly."
    (root/META).write_text('patientid,sex,age,finding,view,filename,clinical_notes\n7,F,61,Pneumonia/Viral/COVID-19,PA,a.jpg,\n')
    (root/LUNGS).write_text(json.dumps(COCO).replace('a.png', 'a.jpg'))
    (s,) = load('covid_chestxray', root)
    assert np.allclose(s.regions['right lung'], (.1, .1, .4, .85)) and s.labels['covid-19'] == 1

@pytest.mark.parametrize('finding,want', [('Klebsiella', 'bacterial pneumonia'), ('Influenza', 'viral pneumonia'),
                                          ('Pneumocystis', 'fungal pneumonia'),
                                          ('Pneumonia/Bacterial/Streptococcus', 'bacterial pneumonia')])
def test_germs_decide_the_kind(finding, want):
    y = finding_labels(finding)
    assert y['pneumonia'] == 1 and [k for k in y if k.endswith(' pneumonia') and y[k]] == [want]

def test_finding_labels_unknown_is_not_negative():
    assert finding_labels('') == finding_labels('todo') == finding_labels('Unknown') == {}
    assert set(finding_labels('Pneumonia')) == {'covid-19', 'ards', 'no finding', 'pneumonia'}
    assert finding_labels('Lipoid')['pneumonia'] == 1 and finding_labels('ARDS')['pneumonia'] == 0

def test_nih_old_ages_official_lists_and_folders(root):
    text = (root/ENTRY).read_text().replace(',50,', ',058Y,').replace(',51,', ',412,')
    (root/ENTRY).unlink(); (root/'nih_chestxray14/Data_Entry_2017.csv').write_text(text.replace('.1,.1\n', '.1,.1,\n'))
    (root/'nih_chestxray14/train_val_list.txt').write_text('00000000_000.png\n00000001_000.png\n')
    (root/'nih_chestxray14/test_list.txt').write_text('00000002_000.png')
    s = load('nih', root)
    assert [x.age for x in s] == [58, None, 52] and [x.split for x in s] == ['train', 'train', 'test']
    (root/'nih_chestxray14/images_64px').rename(root/'nih_chestxray14/images_007'); (root/'nih_chestxray14/images_007').rename(root/'x')
    (root/'nih_chestxray14/images_007').mkdir(); (root/'x').rename(root/'nih_chestxray14/images_007/images')
    assert len(load('nih', root, variant='original')) == 3
    with pytest.raises(GKError, match='64px'): load('nih', root)
    with pytest.raises(GKError, match='variant'): load('nih', root, variant='32px')

def test_nih_names_are_ours():
    assert set(NIH_TO_ENTITY.values()) <= set(ENTITY_INDEX) and len(set(NIH_TO_ENTITY.values())) == 14

def test_vqa_options(root):
    assert len(load('vqa_rad', root, split='train')) == 2 and len(load('vqa_rad', root, split='test')) == 1
    for kw in ({'organ': 'KNEE'}, {'layout': 'coco'}, {'split_by': 'question'}, {'split': 'val'}):
        with pytest.raises(GKError, match=str(next(iter(kw.values())))): load('vqa_rad', root, **kw)
    with pytest.warns(UserWarning, match='1 of 1 test pictures'): load_vqa_rad(root)

@pytest.mark.parametrize('name', ['', '/a.png', '../a.png', 'x/../../a.png', 'x\\..\\..\\a.png', 'C:\\a.png'])
def test_picture_names_stay_inside(name, tmp_path):
    with pytest.raises(GKError): picture_path(tmp_path, name, 'here')

def test_box_is_cut_to_the_picture():
    assert box_xywh([-10, -10, 20, 20], (100, 100), 'x') == (0, 0, .1, .1)
    for size in ((0, 10), (10, -1)):
        with pytest.raises(GKError): box_xywh([0, 0, 5, 5], size, 'x')

# --- 3. the registry ---
def loader_of(studies): return lambda root, flavour='plain': [Study(**s) for s in studies]

@pytest.fixture
def clean_registry(monkeypatch): monkeypatch.setattr(registry, '_REGISTRY', dict(registry._REGISTRY))

def some(n=40, **kw):
    return [{'study_id': f's{i}', 'subject_id': f'p{i // 2}', 'image': np.full((9, 9), i, np.uint8)} | kw for i in range(n)]

def test_names_options_and_unknowns(clean_registry):
    assert {'phantom', 'covid_chestxray', 'nih', 'rsna', 'vqa_rad'} <= set(dataset_names())
    register('mine', loader_of(some()))
    assert dataset_options('mine') == ['flavour']
    for call, says in ((lambda: load_dataset('nope'), 'covid_chestxray'), (lambda: load_dataset('mine', flavor='x'), "no option 'flavor'"),
                       (lambda: load_dataset('mine', split='dev'), 'test, train, val'),
                       (lambda: register('mine', loader_of([])), 'already'), (lambda: register('bad name', loader_of([])), 'name'),
                       (lambda: register('x', 3), 'function'), (lambda: register('x', loader_of([]), split_by='day'), 'split_by')):
        with pytest.raises(GKError, match=says): call()

@pytest.mark.parametrize('studies,says', [
    ([], 'did not return'), (some(4) + some(1), 'repeats'), (some(4, entities={'elbow': 1}), 'elbow'),
    (some(4, regions={'left lung': (.5, .1, .2, .9)}), 'inverted'),
    (some(4, regions={'left lung': (0, 0, float('nan'), 1)}), 'missing or infinite'),
    (some(4, subject_id=''), 'subject_id'), ([s | {'split': 'train' if i % 2 else 'test'} for i, s in enumerate(some(4))], 'patient'),
    ([s | {'split': 'train' if i < 2 else ''} for i, s in enumerate(some(4))], 'no split'),
    ([s | {'image': np.zeros((9, 9), np.uint8)} for s in some()], 'picture'), (some(4, image=np.zeros((1, 1), np.uint8)), 'too small'),
    (some(4, image=np.zeros((9, 9), np.float32)), 'float32')])
def test_bad_studies_are_refused(clean_registry, studies, says):
    register('mine', loader_of(studies))
    with pytest.raises(GKError, match=says): load_dataset('mine')

def test_a_loader_that_returns_something_else(clean_registry):
    for value in (None, {}, [1], iter([])):
        register('mine', lambda root, value=value: value, replace=True)
        with pytest.raises(GKError, match='list'): load_dataset('mine')

def test_splits_by_patient_and_seed(clean_registry):
    register('mine', loader_of(some(200)))
    a, b, c = load_dataset('mine'), load_dataset('mine'), load_dataset('mine', split_seed=1)
    assert [s.split for s in a] == [s.split for s in b] != [s.split for s in c]
    assert Counter(s.split for s in a) == {'train': 140, 'val': 20, 'test': 40}
    check_splits([s.subject_id for s in a], [s.split for s in a])
    assert {s.study_id for s in load_dataset('mine', split='val')} == {s.study_id for s in a if s.split == 'val'}
    assert Counter(s.split for s in load_dataset('mine', fractions={'train': .5, 'test': .5})) == {'train': 100, 'test': 100}
    with pytest.raises(GKError, match='sum'): load_dataset('mine', fractions={'train': .5, 'test': .4})

def test_val_comes_from_train_only():
    studies = [Study(f's{i}', f'p{i // 2}', split='train' if i < 160 else 'test') for i in range(200)]
    assign_splits(studies)
    assert Counter(s.split for s in studies) == {'train': 140, 'val': 20, 'test': 40} and all(s.split == 'test' for s in studies[160:])
    check_splits([s.subject_id for s in studies], [s.split for s in studies])

def test_broken_pictures_at_load(root):
    (root/'covid_chestxray/images/a.jpg').write_bytes((root/'covid_chestxray/images/a.jpg').read_bytes()[:300])
    with pytest.raises(GKError, match='a.jpg'): load_dataset('covid_chestxray', root)
    with pytest.warns(UserWarning, match='left out 1 of 2 studies with a broken picture'):
        assert len(load_dataset('covid_chestxray', root, bad='skip')) == 1
    assert len(load_dataset('covid_chestxray', root, check_pictures=False)) == 2

def test_same_pixels_under_another_format_and_name(tmp_path, clean_registry):
    g = np.random.default_rng(0).integers(0, 256, (20, 20), np.uint8)
    Image.fromarray(g).save(tmp_path/'a.png'); Image.fromarray(g).convert('RGB').save(tmp_path/'b.bmp')
    s = [Study('a', 'p', tmp_path/'a.png', split='train'), Study('b', 'q', tmp_path/'b.bmp', split='test')]
    assert len(set(picture_hashes(s))) == 1
    register('mine', lambda root: s)
    with pytest.raises(GKError, match='picture'): load_dataset('mine')

def test_data_root_is_checked(tmp_path, monkeypatch):
    monkeypatch.delenv('GK_MVLP_DATA', raising=False)
    for n in LOADERS:
        with pytest.raises(GKError, match='data root'): load_dataset(n)
        with pytest.raises(GKError, match='lacks'): load_dataset(n, tmp_path)

def test_fingerprint_sees_everything_but_order_and_place(tmp_path):
    picture(tmp_path/'x/a.png'); picture(tmp_path/'y/a.png')
    base = dict(study_id='s', subject_id='p', image=tmp_path/'x/a.png', report='clear', entities={'mass': 1, 'nodule': -1},
                labels={'mass': 1}, split='train', relations={('left lung', 'mass'): 1})
    f = data_fingerprint([Study(**base), Study('t', 'q')])
    assert len(f) == 64 and f == data_fingerprint([Study('t', 'q'), Study(**base)]) == data_fingerprint([Study(**base
        | {'image': tmp_path/'y/a.png', 'entities': {'nodule': -1, 'mass': 1}}), Study('t', 'q')])
    for change in ({'report': 'Clear'}, {'labels': {'mass': 0}}, {'split': 'test'}, {'entities': {'mass': 1}}, {'relations': {}},
                   {'regions': {'left lung': (0, 0, 1, 1)}}, {'image': None}, {'study_id': 'u'}):
        assert data_fingerprint([Study(**base | change), Study('t', 'q')]) != f, change
    b = data_fingerprint([Study(**base)], pictures='bytes')
    raw = bytearray((tmp_path/'x/a.png').read_bytes()); raw[-20] ^= 1; (tmp_path/'x/a.png').write_bytes(raw)
    assert data_fingerprint([Study(**base)], pictures='bytes') != b
    with pytest.raises(GKError): data_fingerprint([], pictures='names')

def test_phantom_by_name(tmp_path):
    pytest.importorskip('gk_mvlp.data.phantom')
    studies = load_dataset('phantom', n=12, size=64, seed=1)
    assert len(studies) == 12 and {s.split for s in studies} <= set(FRACTIONS)
    with pytest.raises(GKError, match='no option'): load_dataset('phantom', number=12)

# --- 4. the real collections, by number ---
def test_real_covid(real_data):
    s = load_dataset('covid_chestxray', real_data)
    assert (len(s) == 275 and sum(bool(x.report) for x in s) == 183 and sum(len(x.regions) == 2 for x in s) == 55
            and sum(bool(x.regions) for x in s) == 55)
    assert Counter(x.view for x in s) == {'PA': 174, 'AP Supine': 69, 'AP': 32} and len({x.subject_id for x in s}) == 152
    assert (sum(x.labels['covid-19'] for x in s) == 198 and sum(x.labels['no finding'] for x in s) == 12
            and sum(x.labels['ards'] for x in s) == 13 and sum(x.labels['pneumonia'] for x in s) == 259)
    assert (Counter(x.sex for x in s) == {'M': 163, 'F': 99, '': 13} and all('license' in x.attributes for x in s)
            and not any('\ufffd' in x.report for x in s))
    for x in s:
        if x.regions: assert x.regions['right lung'][0] < x.regions['left lung'][0]
    assert sum('lung_mask' in x.attributes for x in s) == 123

def test_real_nih(real_data):
    s = load_dataset('nih', real_data)
    assert len(s) == 1000 and len({x.subject_id for x in s}) == 264 and sum(len(x.findings) for x in s) == 9
    n = Counter(f for x in s for f in NIH_FINDINGS if x.labels[f])
    assert (sum(x.labels['any_finding'] for x in s) == 501 and n['effusion'] == 170 and n['infiltration'] == 162 and n['hernia'] == 9
            and set(n) == set(NIH_FINDINGS))
    assert Counter(x.view for x in s) == {'PA': 637, 'AP': 363}
    o = load_dataset('nih', real_data, variant='original')
    assert len(o) == 25 and len({x.subject_id for x in o}) == 9

def test_real_rsna_and_its_overlap_with_nih(real_data):
    s = load_dataset('rsna', real_data)
    assert (len(s) == 247 and sum(x.labels['pneumonia'] for x in s) == 65 and sum(len(x.findings) for x in s) == 114
            and len({x.subject_id for x in s}) == 92)
    assert Counter(x.attributes['detailed_class'] for x in s) == {'No Lung Opacity / Not Normal': 128, 'Lung Opacity': 65, 'Normal': 54}
    nih = load_dataset('nih', real_data, check_pictures=False)
    assert len({x.image for x in s} & {x.image for x in nih}) == 240
    both = nih + s
    with pytest.raises(GKError, match='patient'): check_splits([x.subject_id for x in both], [x.split for x in both])
    split_together(nih, s)
    check_splits([x.subject_id for x in both], [x.split for x in both], picture_hashes(both, progress=False))

def test_real_vqa_rad(real_data):
    with pytest.warns(UserWarning, match='73 of 73 test pictures'): s = load_vqa_rad(real_data)
    assert ([sum(len(x.qa) for x in s if x.split == p) for p in ('train', 'test')] == [1088, 174]
            and [sum(x.split == p for x in s) for p in ('train', 'test')] == [107, 73])
    test = [q for x in s if x.split == 'test' for q in x.qa]
    assert Counter(q.answer_type for q in test) == {'closed': 116, 'open': 58}
    official = load('vqa_rad', real_data, layout='official')
    assert sum(len(x.qa) for x in official) == 794 and sum(len(x.qa) for x in official if x.split == 'test') == 174
    apart = load_dataset('vqa_rad', real_data, split_by='image')
    assert len(apart) == 107 and sum(len(x.qa) for x in apart) == 1262 and {x.split for x in apart} == set(FRACTIONS)
    with pytest.raises(GKError, match='missing'): load('vqa_rad', real_data, organ=None)
    assert len({x.image for x in load('vqa_rad', real_data, organ=None, bad='skip')}) == 115
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        by_name = load_dataset('vqa_rad', real_data)
    assert {x.split for x in by_name} == set(FRACTIONS) and sum(len(x.qa) for x in by_name if x.split == 'test') == 174
