"""More than 200 bad inputs. Each stops with a clear error (policy 'raise'), and with 'skip' either does the same or is left out and counted: never another exception, never a study that differs from its whole version."""
import json
import os
import re
import struct
import tarfile
import warnings
import zlib

import miniatures
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from gk_mvlp.data.study import validate
from gk_mvlp.paths import GKError

CASES = list(miniatures.CASES)

@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "{case: {study_id: study with paths relative to the root}} of the undamaged miniatures."
    out = {}
    for case in CASES:
        root = miniatures.build(case, tmp_path_factory.mktemp(case))
        out[case] = {s.study_id: plain(s, root) for s in miniatures.load(case, root)}
        assert len(out[case]) == miniatures.N
    return out

def plain(s, root):
    "A study as comparable data, independent of where it lies and of a drawn split."
    d = dict(vars(s)); d.pop('split')
    d['image'], d['other_views'] = str(s.image.relative_to(root)), tuple(str(p.relative_to(root)) for p in s.other_views)
    return d

def outcome(case, root, bad):
    "(error or None, studies, warnings); any exception but GKError passes through and fails the test."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try: return None, miniatures.load(case, root, bad), [str(w.message) for w in caught]
        except GKError as err: return err, [], [str(w.message) for w in caught]

def check(case, root, whole, must_fail=True):
    "Load with both policies and hold the result against the undamaged data."
    err, got, _ = outcome(case, root, 'raise')
    if must_fail: assert err is not None, 'policy raise must stop'
    if err is not None: assert err.remedy and '\n' not in str(err)
    else: assert {s.study_id: plain(s, root) for s in got} == whole[case]
    err, got, said = outcome(case, root, 'skip')
    if err is not None: assert err.remedy and '\n' not in str(err); return
    for s in got:
        validate(s)
        want = dict(whole[case][s.study_id]); now = plain(s, root)
        if now['other_views'] != want['other_views']:
            assert set(now['other_views']) < set(want['other_views']); now['other_views'] = want['other_views']
        assert now == want, f'{s.study_id} came back changed'
    lost = miniatures.N - len(got) + sum(len(whole[case][s.study_id]['other_views']) - len(s.other_views) for s in got)
    if must_fail: assert lost > 0
    if lost:
        assert (any(re.search(rf'left out {lost} ', w) for w in said)
                or sum(int(m) for w in said for m in re.findall(r'left out (\d+) ', w)) == lost), (lost, said)

# --- 1. pictures ---
def bomb(p):
    def chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    p.write_bytes(b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', 60000, 60000, 8, 0, 0, 0, 0))
                  + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))

def replaced(p, link): p.unlink(); p.symlink_to(link)
def cut(share): return lambda p: p.write_bytes(p.read_bytes()[:int(p.stat().st_size * share)])
def as_folder(p): p.unlink(); p.mkdir()

SPOIL = {'zero bytes': lambda p: p.write_bytes(b''), 'cut at a tenth': cut(.1), 'cut at half': cut(.5), 'cut near the end': cut(.93),
         'a web page': lambda p: p.write_bytes(b'<html>404 Not Found</html>'),
         'noise': lambda p: p.write_bytes(np.random.default_rng(1).bytes(3000)),
         'decompression bomb': bomb, 'one pixel': lambda p: Image.new('L', (1, 1)).save(p, 'PNG'), 'gone': lambda p: p.unlink(),
         'dangling link': lambda p: replaced(p, 'nowhere'), 'link to itself': lambda p: replaced(p, p.name), 'a folder': as_folder}

# a folder without a list cannot know what is gone
PICTURE_CASES = [(c, s) for c in CASES for s in SPOIL if not (c == 'folder' and s in ('gone', 'a folder'))]

@pytest.mark.parametrize('case,spoil', PICTURE_CASES)
def test_bad_pictures(tmp_path, whole, case, spoil):
    root = miniatures.build(case, tmp_path)
    SPOIL[spoil](miniatures.pictures(case, root)[2])
    check(case, root, whole)

@pytest.mark.parametrize('case', [c for c in CASES if c not in ('rsna', 'mimic_cxr')])
def test_a_wrong_extension_is_no_fault(tmp_path, whole, case):
    "What a file is, is decided by its bytes: a PNG called .jpg loads as what it shows."
    root = miniatures.build(case, tmp_path)
    p = miniatures.pictures(case, root)[0]
    Image.open(p).convert('L').save(p, 'BMP')
    check(case, root, whole, must_fail=False)

# --- 2. tables ---
TABLES = [('covid_chestxray', 'covid_chestxray/metadata.csv'), ('nih', 'nih_chestxray14/Data_Entry_2017_v2020.csv'),
          ('nih', 'nih_chestxray14/BBox_List_2017.csv'), ('rsna', 'rsna_pneumonia/stage_2_train_labels.csv'),
          ('rsna', 'rsna_pneumonia/stage_2_detailed_class_info.csv'), ('chexpert', 'chexpert/train.csv'),
          ('chexpert', 'chexpert/valid.csv'), ('iu_openi', 'iu_xray/indiana_projections.csv'),
          ('mimic_cxr', 'mimic_cxr_jpg/mimic-cxr-2.0.0-metadata.csv'),
          ('mimic_cxr', 'mimic_cxr_jpg/mimic-cxr-2.0.0-split.csv'), ('mimic_cxr', 'mimic_cxr_jpg/mimic-cxr-2.0.0-chexpert.csv'),
          ('table', 'studies.csv')]

def lines(f): return lambda t: '\n'.join(f(t.splitlines())) + '\n'
def first_column_renamed(rows): return [','.join(['renamed', *rows[0].split(',')[1:]]), *rows[1:]]
def columns_swapped(rows): h = rows[0].split(','); h[0], h[1] = h[1], h[0]; return [','.join(h), *rows[1:]]

TEXT = {'empty': lambda t: '', 'header only': lines(lambda r: r[:1]), 'no header': lines(lambda r: r[1:]),
        'zero bytes inside': lambda t: t.replace(',', ',\0', 1), 'latin-1': lambda t: (t + 'Röntgen').encode('latin1'),
        'utf-16': lambda t: t.encode('utf-16'),
        'first column renamed': lines(first_column_renamed), 'first two columns swapped': lines(columns_swapped),
        'a field too many': lines(lambda r: [*r[:-1], r[-1] + ',x,y,z']),
        'cut inside the last row': lambda t: t[:-len(t.splitlines()[-1]) // 2 - 1],
        'open quote': lambda t: t.replace(t.splitlines()[1], '"' + t.splitlines()[1], 1), 'semicolons': lambda t: t.replace(',', ';')}

def spoil_text(path, change):
    old = path.read_text(encoding='utf-8'); new = change(old)
    assert new != old
    path.write_bytes(new if isinstance(new, bytes) else new.encode('utf-8'))

@pytest.mark.parametrize('how', TEXT)
@pytest.mark.parametrize('case,file', TABLES, ids=lambda v: v.split('/')[-1])
def test_bad_tables(tmp_path, whole, case, file, how):
    root = miniatures.build(case, tmp_path)
    spoil_text(root/file, TEXT[how])
    check(case, root, whole)

# a row per box may repeat
REPEATS = [t for t in TABLES if t[1].split('/')[-1] not in ('BBox_List_2017.csv', 'stage_2_detailed_class_info.csv')]

@pytest.mark.parametrize('case,file', REPEATS, ids=lambda v: v.split('/')[-1])
def test_duplicate_ids(tmp_path, whole, case, file):
    root = miniatures.build(case, tmp_path)
    if case == 'rsna': spoil_text(root/file, lambda t: t + t.splitlines()[1] .replace(',,,,,0', ',1,1,5,5,1') + '\n')
    else: spoil_text(root/file, lambda t: t + t.splitlines()[1] + '\n')
    check(case, root, whole)

@pytest.mark.parametrize('how', [lambda t: '\ufeff' + t, lambda t: t.replace('\n', '\r\n'),
                                 lambda t: '\ufeff' + t.replace('\n', '\r\n') + '\r\n\r\n'], ids=['bom', 'crlf', 'both and blank lines'])
@pytest.mark.parametrize('case,file', TABLES, ids=lambda v: v.split('/')[-1])
def test_harmless_bytes_change_nothing(tmp_path, whole, case, file, how):
    root = miniatures.build(case, tmp_path)
    spoil_text(root/file, how) if how('a\n') == '\ufeffa\n' else (root/file).write_bytes(how((root/file).read_text(encoding='utf-8')).encode('utf-8'))
    check(case, root, whole, must_fail=False)

# --- 3. JSON, XML and lists ---
DOCUMENTS = [('covid_chestxray', 'covid_chestxray/annotations/imageannotation_ai_lung_bounding_boxes.json'),
             ('iu_r2gen', 'iu_xray/annotation.json'), ('vqa_rad', 'vqa_rad/trainset.json'), ('vqa_rad', 'vqa_rad/testset.json'),
             ('slake', 'slake/train.json'),
             ('object_cxr', 'object_cxr/train.json'), ('mimic_cxr', 'chest_imagenome/silver_dataset/scene_graph/d3-0_SceneGraph.json')]
JSON = {'empty': lambda t: '', 'cut': lambda t: t[:len(t) // 2],
        'NaN inside': lambda t: re.sub(r': \d+', ': NaN', t, count=1) if re.search(r': \d+', t) else t.replace('"train"', 'NaN', 1),
        'null': lambda t: 'null', 'a number': lambda t: '7', 'a list of lists': lambda t: '[[[]]]',
        'nested past the limit': lambda t: '[' * 100_000, 'latin-1': lambda t: ('"ü' + t).encode('latin1'),
        'a key renamed': lambda t: re.sub(r'"(image_id|id|qid|img_id)":', '"renamed":', t, count=1), 'two documents': lambda t: t + t}

@pytest.mark.parametrize('how', JSON)
@pytest.mark.parametrize('case,file', DOCUMENTS, ids=lambda v: v.split('/')[-1])
def test_bad_json(tmp_path, whole, case, file, how):
    root = miniatures.build(case, tmp_path)
    spoil_text(root/file, JSON[how])
    check(case, root, whole)

@pytest.mark.parametrize('how', ['', '<eCitation>', '<html/>', '<!DOCTYPE x [<!ENTITY a "b">]><eCitation>&a;</eCitation>', '\0',
                                 'eCitation'], ids=range(6))
def test_bad_xml(tmp_path, whole, how):
    root = miniatures.build('iu_openi', tmp_path)
    (root/'iu_xray/ecgen-radiology/3.xml').write_text(how)
    check('iu_openi', root, whole)

@pytest.mark.parametrize('how', [lambda t: t.replace('positive', 'maybe', 1), lambda t: t.replace('x1.png', 'x0.png', 1),
                                 lambda t: t.replace('x1.png', '../x1.png', 1), lambda t: t.replace(' x1.png positive rsna', '', 1),
                                 lambda t: ('ü' + t).encode('latin1'), lambda t: ''], ids=range(6))
def test_bad_lists(tmp_path, whole, how):
    root = miniatures.build('covidx', tmp_path)
    spoil_text(root/'covidx/train.txt', how)
    check('covidx', root, whole)

# --- 4. boxes ---
BOX = {'nan': 'NaN', 'infinite': '1e999', 'negative': '-5', 'text': 'wide', 'huge': '1e30'}

@pytest.mark.parametrize('how', BOX)
@pytest.mark.parametrize('case,file,old', [('nih', 'nih_chestxray14/BBox_List_2017.csv', ',512,128,'),
                                           ('rsna', 'rsna_pneumonia/stage_2_train_labels.csv', '200.0,300.0,403.0')], ids=['nih', 'rsna'])
def test_bad_boxes_in_tables(tmp_path, whole, case, file, old, how):
    root = miniatures.build(case, tmp_path)
    value = BOX[how]
    if how == 'huge': new = old.replace('512', value).replace('200.0', value)  # far outside, as a corner; a width would be cut
    else: new = old.replace('128', value).replace('300.0', value)
    spoil_text(root/file, lambda t: t.replace(old, new))
    check(case, root, whole)

@pytest.mark.parametrize('box', [[2, 3, -10, 12], [2, 3, 10], [2, 3, 10, None], ['2', 3, 10, 12], [200, 3, 10, 12], [2, 3, 0, 12], None,
                                 [True, 3, 10, 12, 9], {}], ids=str)
@pytest.mark.parametrize('case', ['object_cxr', 'covid_chestxray'])
def test_bad_boxes_in_coco(tmp_path, whole, case, box):
    root = miniatures.build(case, tmp_path)
    p = root/dict(DOCUMENTS)[case]; d = json.loads(p.read_text())
    d['annotations'][3]['bbox'] = ([v * 11 if case == 'covid_chestxray' and isinstance(v, int) and v == 200 else v for v in box]
                                   if isinstance(box, list) else box)
    p.write_text(json.dumps(d))
    check(case, root, whole)

@pytest.mark.parametrize('change', [{'original_x1': 'a'}, {'original_x1': None}, {'original_y2': True}], ids=str)
def test_bad_boxes_in_scene_graphs(tmp_path, whole, change):
    root = miniatures.build('mimic_cxr', tmp_path)
    p = root/dict(DOCUMENTS)['mimic_cxr']; d = json.loads(p.read_text()); d['objects'][0] |= change; p.write_text(json.dumps(d))
    check('mimic_cxr', root, whole)

# --- 5. names that lead out, archives that climb, links that loop ---
@pytest.mark.parametrize('name', ['../../../etc/passwd', '/etc/passwd', 'a/../../b.png', '..\\..\\b.png', 'C:\\b.png', ''])
@pytest.mark.parametrize('case,file,old', [('covid_chestxray', 'covid_chestxray/metadata.csv', 'c3.jpg'),
                                           ('table', 'studies.csv', 'pictures/t3.png'), ('object_cxr', 'object_cxr/train.json', 'o3.jpg'),
                                           ('vqa_rad', 'vqa_rad/trainset.json', 'v3.jpg'),
                                           ('slake', 'slake/train.json', 'xmlab3/source.jpg'),
                                           ('iu_r2gen', 'iu_xray/annotation.json', 'CXR3_IM-1/0.png')], ids=lambda v: v.split('/')[-1])
def test_names_that_lead_out(tmp_path, whole, case, file, old, name):
    root = miniatures.build(case, tmp_path)
    spoil_text(root/file, lambda t: t.replace(old, json.dumps(name)[1:-1] if file.endswith('.json') else name))
    check(case, root, whole)

@pytest.mark.parametrize('name,kind', [('../../evil.xml', tarfile.REGTYPE), ('/evil.xml', tarfile.REGTYPE),
                                       ('x/../../evil.xml', tarfile.REGTYPE), ('l.xml', tarfile.SYMTYPE), ('l.xml', tarfile.LNKTYPE)],
                         ids=lambda v: str(v)[-12:])
def test_archives_that_climb(tmp_path, whole, name, kind):
    root = miniatures.build('iu_openi', tmp_path/'data')
    m = tarfile.TarInfo(name); m.type = kind; m.linkname = '/etc/hostname'
    miniatures.pack_reports(root, [(m, b'<eCitation/>' if kind == tarfile.REGTYPE else b'')])
    before = sorted(p for p in tmp_path.parent.iterdir())
    check('iu_openi', root, whole)
    assert sorted(p for p in tmp_path.parent.iterdir()) == before and not (tmp_path/'evil.xml').exists()

@pytest.mark.parametrize('share', [.2, .7, .98])
def test_cut_archives(tmp_path, whole, share):
    root = miniatures.build('iu_openi', tmp_path)
    miniatures.pack_reports(root, []); cut(share)(root/'iu_xray/NLMCXR_reports.tgz')
    check('iu_openi', root, whole)

@pytest.mark.parametrize('link', ['train/normal/loop', 'train/loop', 'train/normal/a'])
def test_links_that_loop(tmp_path, whole, link):
    root = miniatures.build('folder', tmp_path)
    os.symlink(root/'train' if not link.endswith('/a') else root, root/link)
    check('folder', root, whole)

# --- 6. reports ---
@pytest.mark.parametrize('raw', ['Röntgen'.encode('latin1'), b'\xff\xfe\x00', b'a\0b', '\ud800'.encode('utf-8', 'surrogatepass')],
                         ids=range(4))
def test_bad_reports(tmp_path, whole, raw):
    root = miniatures.build('mimic_cxr', tmp_path)
    (root/'mimic_cxr/files/p10/p10000003/s50000003.txt').write_bytes(b'FINDINGS: ' + raw)
    check('mimic_cxr', root, whole)

@pytest.mark.parametrize('raw', [b'', b'   \n \n', b'FINDINGS:\n\nIMPRESSION:\n', b'WET READ: nothing to say'], ids=range(4))
def test_empty_reports_are_left_out_by_option(tmp_path, whole, raw):
    root = miniatures.build('mimic_cxr', tmp_path)
    (root/'mimic_cxr/files/p10/p10000003/s50000003.txt').write_bytes(raw)
    err, got, _ = outcome('mimic_cxr', root, 'raise')
    assert err is None and {s.study_id for s in got} == set(whole['mimic_cxr']) - {'d3-0'} and all(s.report for s in got)

# --- 7. random damage: any byte of any text file ---
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
          derandomize=True)
@given(st.sampled_from([*TABLES, *DOCUMENTS, ('iu_openi', 'iu_xray/ecgen-radiology/3.xml'), ('covidx', 'covidx/train.txt')]),
       st.integers(0, 10 ** 6), st.sampled_from(['flip', 'delete', 'insert', 'double']), st.integers(1, 255))
def test_random_damage_never_crashes(tmp_path_factory, target, at, how, byte):
    case, file = target
    root = miniatures.build(case, tmp_path_factory.mktemp('r'))
    raw = bytearray((root/file).read_bytes()); at %= len(raw)
    if how == 'flip': raw[at] ^= byte
    elif how == 'delete': del raw[at:at + byte]
    elif how == 'insert': raw[at:at] = bytes([byte])
    else: raw[at:at] = raw[max(0, at - byte):at]
    (root/file).write_bytes(bytes(raw))
    for bad in ('raise', 'skip'):
        err, got, _ = outcome(case, root, bad)
        assert err is None or '\n' not in str(err)
        for s in got: validate(s)

def test_there_are_enough():
    n = len(PICTURE_CASES) + len(TEXT) * len(TABLES) + len(REPEATS) + len(JSON) * len(DOCUMENTS) + 2 * len(BOX) + 18 + 36
    assert n >= 200, n
