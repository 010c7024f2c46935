"MIMIC-CXR-JPG with Chest ImaGenome: sections, boxes, facts, the index, and releases that do not fit together."
import gzip
import json
import os

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gk_mvlp.data import file_index
from gk_mvlp.data.anatomy import REGIONS
from gk_mvlp.data.chexpert import CHEXPERT_FINDINGS
from gk_mvlp.data.file_index import audit_index, index_files
from gk_mvlp.data.mimic_cxr import (IMAGENOME_TO_ENTITY, SCENE_COLUMNS, clip_boxes, facts_to_entities, load_imagenome_gold, load_mimic_cxr,
                                    parse_scene_graph, split_sections)
from gk_mvlp.data.registry import load_dataset
from gk_mvlp.data.study import validate
from gk_mvlp.paths import GKError

W, H = 400, 500
REPORT = ' FINAL REPORT\n INDICATION: Cough.\n\n FINDINGS:\n The heart is enlarged.\n\n IMPRESSION: Cardiomegaly number {k}.\n'

def scene(dicom, subject, study, boxes, facts=()):
    return {'image_id': dicom, 'viewpoint': 'PA', 'patient_id': subject, 'study_id': study, 'gender': 'M', 'age_decile': '60-70',
            'relationships': [],
            'objects': [{'bbox_name': n, 'original_x1': b[0], 'original_y1': b[1], 'original_x2': b[2], 'original_y2': b[3]}
                        for n, b in boxes.items()],
            'attributes': [{'bbox_name': n, 'attributes': [a]} for n, a in facts]}

def write(root, n=12):
    "n patients with a frontal and a lateral picture each."
    jpg, cig = root/'mimic_cxr_jpg', root/'chest_imagenome/silver_dataset'
    (cig/'scene_graph').mkdir(parents=True); (cig/'splits').mkdir()
    meta, split, lab = (['dicom_id,subject_id,study_id,ViewPosition,Rows,Columns'], ['dicom_id,study_id,subject_id,split'],
                        ['subject_id,study_id,' + ','.join(CHEXPERT_FINDINGS)])
    for k in range(n):
        p, s = 10000000 + k * 777777, 50000000 + k
        folder = f'p{str(p)[:2]}/p{p}/s{s}'
        for view in ('PA', 'LATERAL'):
            d = f'{view.lower()}-{k:03d}'; f = jpg/'files'/folder/f'{d}.jpg'; f.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.random.default_rng([k, view == 'PA']).integers(0, 256, (H, W), np.uint8)).resize((W, H)).save(f, quality=30)
            meta.append(f'{d},{p},{s},{view},{H},{W}'); split.append(f'{d},{s},{p},{("train", "validate", "test")[k % 3]}')
        r = root/'mimic_cxr/files'/f'{folder}.txt'; r.parent.mkdir(parents=True, exist_ok=True); r.write_text(REPORT.format(k=k))
        lab.append(f'{p},{s},' + ','.join('1.0' if f == 'Cardiomegaly' else '-1.0' if f == 'Edema' else '' for f in CHEXPERT_FINDINGS))
        (cig/'scene_graph'/f'pa-{k:03d}_SceneGraph.json').write_text(json.dumps(scene(f'pa-{k:03d}', p, s,
            {'left lung': [200 + k, 50, 390, 450], 'right lung': [10, 50, 190, 450]},
            [('cardiac silhouette', ['anatomicalfinding|yes|enlarged cardiac silhouette'])])))
    for name, rows in (('metadata', meta), ('split', split), ('chexpert', lab)):
        (jpg/f'mimic-cxr-2.0.0-{name}.csv').write_text('\n'.join(rows) + '\n')
    (cig/'splits/images_to_avoid.csv').write_text('subject_id,study_id,dicom_id,path,ViewPosition\n1,2,pa-005,x,PA\n')
    return root

@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv('GK_MVLP_OUT', str(tmp_path/'out'))
    return write(tmp_path/'data')

def graph(root, k): return root/f'chest_imagenome/silver_dataset/scene_graph/pa-{k:03d}_SceneGraph.json'

# --- sections ---
@pytest.mark.parametrize('text,want', [
    ('FINDINGS AND IMPRESSION: Clear.', {'findings': 'Clear.'}), ('  FINDINGS/IMPRESSION:\n Clear\n lungs.', {'findings': 'Clear lungs.'}),
    ('IMPRESSION:\n\n 1. A.\n 2. B.\n', {'impression': '1. A. 2. B.'}),
    ('FINDINGS: a\r\nCONCLUSION: b\r\n', {'findings': 'a', 'impression': 'b'}), ('FINDINGS: a\nIMPRESSION:\n', {'findings': 'a'}),
    ('FINDINGS: a\nFINDINGS: b', {'findings': 'a b'}), ('', {}),
    ('HISTORY: x: y\n\nWET READ: z', {'history': 'x: y', 'wet read': 'z', 'last paragraph': 'z'}),
    ('FINAL REPORT\nCHEST\n\nFirst.\n\nLast: one.\n', {'last paragraph': 'Last: one.'}),
    ('FINDINGS: The AP: view.\n IMPRESSION: b', {'findings': 'The AP: view.', 'impression': 'b'})])
def test_sections(text, want): assert split_sections(text) == want

@given(st.text(max_size=300))
def test_any_text_has_sections(text):
    for name, body in split_sections(text).items(): assert name and body and '\n' not in body

# --- boxes ---
@given(st.lists(st.tuples(st.sampled_from(REGIONS), st.lists(st.floats(-2000, 5000), min_size=4, max_size=4)), max_size=8,
                unique_by=lambda x: x[0]), st.integers(50, 3000), st.integers(50, 3000))
def test_clipped_boxes_are_valid_and_inside(found, w, h):
    boxes, dropped = clip_boxes([r for r, _ in found], [b for _, b in found], w, h)
    assert len(boxes) + dropped == len(found)
    for r, b in found:
        keep = min(b[2], w) - max(b[0], 0) >= 1 and min(b[3], h) - max(b[1], 0) >= 1
        assert (r in boxes) == keep
        if keep:
            assert 0 <= boxes[r][0] < boxes[r][2] <= 1 and 0 <= boxes[r][1] < boxes[r][3] <= 1
            assert np.allclose(np.array(boxes[r]) * [w, h, w, h], np.clip(b, 0, [w, h, w, h]))

# --- facts ---
@given(st.lists(st.tuples(st.sampled_from([*REGIONS, 'neck']), st.booleans(), st.sampled_from([*IMAGENOME_TO_ENTITY, 'scoliosis']))))
def test_facts_by_brute_force(facts):
    entities, relations = facts_to_entities(facts)
    for e in {e for es in IMAGENOME_TO_ENTITY.values() for e in es}:
        mine = [(r, there, len(IMAGENOME_TO_ENTITY[lab])) for r, there, lab in facts if e in IMAGENOME_TO_ENTITY.get(lab, ())]
        want = 1 if any(t and n == 1 for _, t, n in mine) else 0 if any(t for _, t, _ in mine) else -1 if mine else None
        assert entities.get(e) == want
        for region in REGIONS:
            here = [(t, n) for r, t, n in mine if r == region]
            want = 1 if any(t and n == 1 for t, n in here) else -1 if any(not t for t, _ in here) else None
            assert relations.get((region, e)) == want

# --- the loader ---
def test_frontal_pictures_with_everything(root):
    s = load_mimic_cxr(root, workers=1)
    assert len(s) == 11 and all(x.view == 'PA' and x.image.is_file() for x in s) and 'pa-005' not in {x.study_id for x in s}
    for x in s: validate(x)
    a = s[0]
    assert (a.report == 'The heart is enlarged. Cardiomegaly number 0.' and a.subject_id == 'mimic-10000000'
            and a.relations == {('cardiac silhouette', 'cardiomegaly'): 1} and a.sex == 'M' and a.age == 65)
    assert (a.regions['left lung'] == (.5, .1, .975, .9) and a.labels['cardiomegaly'] == 1 and a.labels['pneumonia'] == 0
            and 'edema' not in a.labels)
    assert len(load_mimic_cxr(root, avoid=False, workers=1)) == 12
    assert {x.split for x in load_dataset('mimic_cxr', root, workers=1)} == {'train', 'val', 'test'}

def test_without_graphs_the_report_is_read(root):
    s = load_mimic_cxr(root, scene_graphs=False, sections=('findings',), uncertain='ones')
    assert (s[0].entities == {'cardiomegaly': 1} and not s[0].regions and s[0].attributes['entities_from'] == 'report'
            and s[0].labels['edema'] == 1 and 'edema' not in s[1].labels), 'policies are for training'

def test_packed_tables_and_the_other_folder(root):
    for p in (root/'mimic_cxr_jpg').glob('*.csv'): p.with_suffix('.csv.gz').write_bytes(gzip.compress(p.read_bytes())); p.unlink()
    inner = root/'chest_imagenome/silver_dataset/scene_graph'; tmp = inner.rename(inner.parent/'x'); inner.mkdir()
    tmp.rename(inner/'scene_graph')
    assert len(load_mimic_cxr(root, workers=1)) == 11

def test_imagenome_split(root):
    d = root/'chest_imagenome/silver_dataset/splits'
    for k, name in enumerate(('train', 'valid', 'test')):
        (d/f'{name}.csv').write_text(',subject_id,study_id,dicom_id,path,ViewPosition\n'
                                     + ''.join(f'{i},1,2,pa-{i:03d},x,PA\n' for i in range(4 * k, 4 * k + 4)))
    s = load_mimic_cxr(root, split_from='imagenome', workers=1)
    assert [x.split for x in s] == ['train'] * 4 + ['val'] * 3 + ['test'] * 4
    (d/'test.csv').write_text((d/'test.csv').read_text().replace('pa-008', 'pa-000'))
    with pytest.raises(GKError, match='also in train'): load_mimic_cxr(root, split_from='imagenome', workers=1)

def edit(path, **kw): path.write_text(json.dumps(json.loads(path.read_text()) | kw))

@pytest.mark.parametrize('change,says', [
    (lambda p: p.write_bytes(b''), 'not valid JSON'), (lambda p: p.write_bytes(p.read_bytes()[:80]), 'not valid JSON'),
    (lambda p: p.write_text('[]'), 'layout'), (lambda p: edit(p, image_id='pa-000'), 'is about picture'),
    (lambda p: p.write_text(p.read_text().replace('210, ', 'NaN, ').replace('203, ', 'NaN, ')), 'NaN'),
    (lambda p: edit(p, objects=[{'bbox_name': 'svc', 'original_x1': '1', 'original_y1': 2, 'original_x2': 3, 'original_y2': 4}]),
     'not four numbers'),
    (lambda p: edit(p, objects=[{'bbox_name': 'svc', 'original_x1': 1, 'original_y1': 2, 'original_x2': 3, 'original_y2': 4}] * 2),
     'two boxes'), (lambda p: edit(p, objects=[{'bbox_name': 'svc'}]), 'original_x1'),
    (lambda p: edit(p, attributes=[{'bbox_name': 'svc', 'attributes': [['x|y']]}]), 'yes or no'),
    (lambda p: edit(p, attributes=None), 'layout'), (lambda p: p.write_bytes('ü'.encode('latin1')), 'JSON')])
def test_broken_graphs_raise_or_are_counted(root, change, says):
    change(graph(root, 3))
    with pytest.raises(GKError, match=says) as err: load_mimic_cxr(root, workers=1)
    assert 'pa-003_SceneGraph.json' in str(err.value)
    with pytest.warns(UserWarning, match='left out 1 of 12 broken files'): s = load_mimic_cxr(root, workers=1, bad='skip')
    assert len(s) == 10 and 'pa-003' not in {x.study_id for x in s}

@pytest.mark.parametrize('kw', [{'patient_id': 19999999}, {'study_id': 59999999}])
def test_a_graph_of_another_patient_stops_the_load(root, kw):
    edit(graph(root, 2), **kw)
    for bad in ('raise', 'skip'):
        with pytest.raises(GKError, match='do not belong together'): load_mimic_cxr(root, workers=1, bad=bad)

@pytest.mark.parametrize('table,old,new,says', [('metadata', 'pa-001,10777777', 'pa-001,1077', 'eight digits'),
                                                ('metadata', 'PA,500', 'PA,0', 'Rows'),
                                                ('metadata', 'Columns', 'Cols', "'Columns' is missing"),
                                                ('metadata', 'pa-001', 'pa-002', 'repeats'),
                                                ('metadata', 'pa-001', '../x', 'dicom_id'), ('split', 'validate', 'dev', "split 'dev'"),
                                                ('chexpert', '1.0', '2.0', 'Cardiomegaly'),
                                                ('chexpert', '50000003', '50000002', 'repeats')])
def test_broken_tables(root, table, old, new, says):
    p = root/f'mimic_cxr_jpg/mimic-cxr-2.0.0-{table}.csv'; p.write_text(p.read_text().replace(old, new))
    with pytest.raises(GKError, match=says): load_mimic_cxr(root, workers=1)

def test_a_latin1_report(root):
    p = sorted((root/'mimic_cxr/files').rglob('*.txt'))[0]; p.write_bytes('FINDINGS: Röntgen'.encode('latin1'))
    with pytest.raises(GKError, match=p.name): load_mimic_cxr(root, workers=1)
    with pytest.warns(UserWarning, match='left out 1 of 12 broken files'): assert len(load_mimic_cxr(root, workers=1, bad='skip')) == 10

# --- the index ---
def names(root): return sorted(p.name for p in (root/'chest_imagenome/silver_dataset/scene_graph').iterdir())

def test_nothing_is_read_twice_and_changes_are_seen(root, monkeypatch):
    a = load_mimic_cxr(root, workers=1)
    monkeypatch.setattr(file_index, '_make_part', lambda *x, **k: pytest.fail('read again'))
    assert load_mimic_cxr(root, workers=1) == a
    monkeypatch.undo()
    p = graph(root, 0); p.write_text(p.read_text().replace('200', '240'))
    monkeypatch.setenv('GK_MVLP_OUT', str(root.parent/'out'))
    assert load_mimic_cxr(root, workers=1)[0].regions['left lung'][0] == .6

def test_rows_record_size_and_hash(root):
    import hashlib
    load_mimic_cxr(root, workers=1, index=root/'index')
    rows = [r for p in (root/'index/scene_graphs').glob('*.parquet') for r in pq.read_table(p).to_pylist()]
    for r in rows:
        raw = (root/'chest_imagenome/silver_dataset/scene_graph'/r['file']).read_bytes()
        assert (r['bytes'], r['sha256']) == (len(raw), hashlib.sha256(raw).hexdigest())
    p = graph(root, 4); old = p.stat(); raw = p.read_bytes(); p.write_bytes(raw.replace(b'204', b'205'))
    os.utime(p, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert audit_index(p.parent, root/'index/scene_graphs') == [p.name], 'a change that keeps size and time is found by the audit'

def many(folder, n):
    folder.mkdir()
    for i in range(n): (folder/f'g{i}_SceneGraph.json').write_text(json.dumps(scene(f'g{i}', 1, 2, {'svc': [0, 0, 5, i + 1]})))
    return [f'g{i}_SceneGraph.json' for i in range(n)]

def test_a_killed_index_goes_on_and_workers_do_not_matter(tmp_path, monkeypatch):
    n = many(tmp_path/'f', 2100); made = []
    real = file_index._make_part
    def dies(task, **kw):
        if len(made) == 5: raise KeyboardInterrupt
        made.append(task[0]); return real(task, **kw)
    monkeypatch.setattr(file_index, '_make_part', dies)
    args = (tmp_path/'f', n, parse_scene_graph, SCENE_COLUMNS)
    with pytest.raises(KeyboardInterrupt): index_files(*args, tmp_path/'i', workers=1, progress=False)
    assert len(list((tmp_path/'i').iterdir())) == 5, 'whole parts stay, no half one'
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path/'i').iterdir()}
    monkeypatch.setattr(file_index, '_make_part', real)
    a = index_files(*args, tmp_path/'i', workers=1, progress=False)
    assert all((tmp_path/'i'/k).stat().st_mtime_ns == v for k, v in times.items()) and len(a) == 2100
    b = index_files(*args, tmp_path/'j', workers=2, progress=False)
    assert a.equals(b)
    kept = {p.name for p in (tmp_path/'i').iterdir()}
    many_more = many(tmp_path/'g', 1)[0]; (tmp_path/'g'/many_more).rename(tmp_path/'f'/'new_SceneGraph.json')
    edit(tmp_path/'f/new_SceneGraph.json', image_id='new')
    index_files(tmp_path/'f', [*n, 'new_SceneGraph.json'], parse_scene_graph, SCENE_COLUMNS, tmp_path/'i', workers=1, progress=False)
    now = {p.name for p in (tmp_path/'i').iterdir()}
    assert len(now - kept) == 1 and len(kept - now) == 1, 'one new file, one new part'

@pytest.mark.parametrize('how', [lambda p: p.write_bytes(b''), lambda p: p.write_bytes(p.read_bytes()[:-30]), lambda p: p.unlink()])
def test_a_broken_part_is_made_again(root, how):
    a = load_mimic_cxr(root, workers=1, index=root/'index')
    how(next((root/'index/scene_graphs').glob('*.parquet')))
    assert load_mimic_cxr(root, workers=1, index=root/'index') == a

def test_dangling_link_and_empty_folder(root):
    graph(root, 1).unlink(); graph(root, 1).symlink_to('nowhere')
    with pytest.raises(GKError, match='pa-001'): load_mimic_cxr(root, workers=1)
    for p in graph(root, 1).parent.iterdir(): p.unlink()
    with pytest.raises(GKError, match='no file'): load_mimic_cxr(root, workers=1)

@pytest.mark.parametrize('kw,says', [({'split_from': 'mine'}, 'split_from'), ({'uncertain': 'x'}, 'uncertain'),
                                     ({'sections': ('wet read',)}, 'no study with a report')])
def test_wrong_options(root, kw, says):
    with pytest.raises(GKError, match=says): load_mimic_cxr(root, workers=1, **kw)

# --- the gold set ---
BOX_HEAD = ('image_id,x1,y1,x2,y2,width,height,bbox_name,annot_id,original_x1,original_x2,original_y1,original_y2,original_width,original_height,annotator,coord224,coord_original')
FACT_HEAD = 'row_id\tpatient_id\tstudy_id\timage_id\tbbox\trelation\tlabel_name\tcontext\tsentence\tcategoryID\tcoord_original'

def gold(root, boxes=None, facts=None):
    d = root/'chest_imagenome/gold_dataset'; d.mkdir(exist_ok=True)
    boxes = (boxes if boxes is not None
             else [(5, 'Left Lung', 200, 50, 390, 450), (5, 'svc', 190, -20, 210, 100), (5, 'spine', 500, 0, 600, 100),
                   (5, 'svc', 0, 0, 9, 9), (7, 'right lung', 10, 50, 190, 450), (99, 'trachea', 1, 1, 9, 9)])
    facts = facts if facts is not None else [(5, 'left lung', 'Lung Opacity', 'yes', 'anatomicalfinding'),
                                             (5, 'left lung', 'pneumothorax', 'no', 'anatomicalfinding'),
                                             (5, 'left lung', 'abnormal', 'yes', 'nlp'),
                                             (5, 'left lung', 'lung opacity', 'yes', 'anatomicalfinding'),
                                             (5, 'unknown', 'pneumonia', 'yes', 'disease')]
    (d/'gold_bbox_coordinate_annotations_1000images.csv').write_text(BOX_HEAD + '\n' + ''.join(f'pa-{k:03d}.dcm,0,0,1,1,1,1,{n},{n}|1,{a},{c},{b},{e},1,1,W,"[0, 0, 1, 1]","[{a}, {b}, {c}, {e}]"\n' for k, n, a, b, c, e in boxes))
    (d/'gold_object_attribute_with_coordinates.txt').write_text(FACT_HEAD + '\n' + ''.join(f'1|2\t1\t2\tpa-{k:03d}.dcm\t{b}\t1\t{n}\t{c}\t"Left, small."\t{g}\t"[1, 2, 3, 4]"\n' for k, b, n, c, g in facts))
    return root

def test_gold_boxes_and_facts(root):
    a, b = (validate(s) for s in load_imagenome_gold(gold(root), index=root/'i', workers=1))
    assert (a.study_id, b.study_id) == ('pa-005', 'pa-007') and a.split == b.split == 'test', (
        'pa-005 is on the list to avoid, and here all the same')
    assert a.regions == {'left lung': (.5, .1, .975, .9), 'svc': (.475, 0., .525, .2)} and a.attributes['boxes_dropped'] == '1'
    assert (a.entities == {'lung opacity': 1, 'pneumonia': 1, 'pneumothorax': -1}
            and a.relations == {('left lung', 'lung opacity'): 1, ('left lung', 'pneumothorax'): -1}
            and a.attributes['entities_from'] == 'gold')
    assert (not b.entities and 'entities_from' not in b.attributes and b.regions == {'right lung': (.025, .1, .475, .9)}
            and 'number 7' in b.report)
    assert [s.study_id for s in load_imagenome_gold(root, index=root/'i', workers=1, facts_only=True)] == ['pa-005']

def test_gold_through_the_registry(root):
    s = load_dataset('imagenome_gold', gold(root), index=root/'i', workers=1)
    assert {x.split for x in s} == {'test'} and len(s) == 2

@pytest.mark.parametrize('boxes,facts,says', [([(5, 'svc', '', 0, 9, 9)], None, 'line 2: the box has an empty corner'),
                                              ([(5, 'svc', 'x', 0, 9, 9)], None, 'not a number'),
                                              ([(5, 'svc', 'nan', 0, 9, 9)], None, 'not a number'),
                                              ([(98, 'svc', 0, 0, 9, 9)], None, 'belong together'),
                                              (None, [(5, 'svc', 'picc', 'maybe', 'device')], "context 'maybe'"), ([], None, 'no rows')])
def test_broken_gold_tables(root, boxes, facts, says):
    with pytest.raises(GKError, match=says): load_imagenome_gold(gold(root, boxes, facts), index=root/'i', workers=1)

def test_gold_without_its_files_or_pictures(root):
    with pytest.raises(GKError, match='gold_bbox'): load_imagenome_gold(root)
    next((gold(root)/'mimic_cxr_jpg').rglob('pa-007.jpg')).unlink()
    with pytest.raises(GKError, match='pa-007'): load_imagenome_gold(root, index=root/'i', workers=1)
    with pytest.warns(UserWarning): assert len(load_imagenome_gold(root, index=root/'i', workers=1, bad='skip')) == 1
