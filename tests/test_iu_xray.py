"IU X-Ray: both layouts, archives that climb, views that are not guessed, and the real collection by number."
import gzip
import io
import json
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from gk_mvlp.data.iu_xray import load_iu_xray, read_projections, read_report, read_reports
from gk_mvlp.data.registry import data_fingerprint, load_dataset
from gk_mvlp.data.study import check_splits, study_from_dict, study_to_dict, validate
from gk_mvlp.paths import GKError


def xml(n, findings='Clear lungs.', impression='Normal.', mesh='normal', images=()):
    return (f'<?xml version="1.0"?><eCitation><uId id="CXR{n}"/><AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText '
            f'Label="IMPRESSION">{impression}</AbstractText>'
            f'<AbstractText Label="INDICATION">Cough</AbstractText><MeSH><major>{mesh}</major></MeSH>'
            + ''.join(f'<parentImage id="{i}"/>' for i in images) + '</eCitation>').encode()

def picture(path, k=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(k).integers(0, 256, (30, 24), np.uint8)).save(path)

@pytest.fixture
def folder(tmp_path):
    "Five examinations: lateral first, Kaggle's names, lateral only, no picture, no text."
    d = tmp_path/'iu_xray'; (d/'ecgen-radiology').mkdir(parents=True)
    images = {1: ['CXR1_1_IM-1-3001', 'CXR1_1_IM-1-4001'], 2: ['CXR2_IM-2-1001'], 3: ['CXR3_IM-3-1001'], 4: [], 5: ['CXR5_IM-5-1001']}
    for n, i in images.items():
        (d/f'ecgen-radiology/{n}.xml').write_bytes(xml(n, images=i, **({'findings': '', 'impression': '', 'mesh': 'No Indexing'}
                                                                       if n == 5 else {'mesh': 'Cardiomegaly/mild'} if n == 2 else {})))
    (d/'indiana_projections.csv').write_text('uid,filename,projection\n1,1_IM-1-3001.dcm.png,Lateral\n1,1_IM-1-4001.dcm.png,Frontal\n2,2_IM-2-1001.dcm.png,Frontal\n3,3_IM-3-1001.dcm.png,Lateral\n5,5_IM-5-1001.dcm.png,Frontal\n')
    for k, n in enumerate(('NLMCXR_png/CXR1_1_IM-1-3001.png', 'images/1_IM-1-4001.dcm.png', 'images/2_IM-2-1001.dcm.png',
                           'images/3_IM-3-1001.dcm.png', 'images/CXR5_IM-5-1001.png')):
        picture(d/n, k)
    return d

def test_openi_frontal_pictures_names_and_labels(folder):
    s = load_iu_xray(folder.parent, layout='openi', reports_only=False)
    assert [x.study_id for x in s] == ['CXR1', 'CXR2', 'CXR5'], 'no frontal picture, no study'
    assert [x.image.name for x in s] == ['1_IM-1-4001.dcm.png', '2_IM-2-1001.dcm.png', 'CXR5_IM-5-1001.png']
    assert [p.name for p in s[0].other_views] == ['CXR1_1_IM-1-3001.png'] and s[1].other_views == ()
    assert ([x.labels for x in s] == [{'normal': 1}, {'normal': 0}, {}] and s[0].report == 'Clear lungs. Normal.'
            and s[0].attributes['indication'] == 'Cough')
    assert [x.study_id for x in load_iu_xray(folder.parent, layout='openi')] == ['CXR1', 'CXR2']
    assert load_iu_xray(folder.parent, layout='openi', sections=('IMPRESSION',))[0].report == 'Normal.'
    assert len(load_iu_xray(folder.parent, layout='openi', pictures=False, reports_only=False)) == 5
    for x in s: validate(x); assert study_from_dict(json.loads(json.dumps(study_to_dict(x)))) == x

def test_archive_and_folder_hold_the_same(folder):
    want = read_reports(folder)
    with tarfile.open(folder/'NLMCXR_reports.tgz', 'w:gz') as tar: tar.add(folder/'ecgen-radiology', 'ecgen-radiology')
    assert read_reports(folder) == want and len(want) == 5

@pytest.mark.parametrize('name,kind', [('../../evil.xml', tarfile.REGTYPE), ('/evil.xml', tarfile.REGTYPE),
                                       ('a/../../evil.xml', tarfile.REGTYPE), ('a.xml', tarfile.SYMTYPE), ('a.xml', tarfile.LNKTYPE)])
def test_archive_members_that_climb(folder, name, kind):
    with tarfile.open(folder/'NLMCXR_reports.tgz', 'w:gz') as tar:
        m = tarfile.TarInfo(name); m.type = kind; m.linkname = '/etc/hostname'; raw = xml(9)
        m.size = len(raw) if kind == tarfile.REGTYPE else 0
        tar.addfile(m, io.BytesIO(raw))
    with pytest.raises(GKError, match='evil|a.xml'): read_reports(folder)
    assert not list(folder.parent.parent.glob('evil*'))

def test_views_by_looks_where_the_table_is_not(folder):
    (folder/'indiana_projections.csv').unlink()
    with pytest.raises(GKError, match='indiana_projections'): read_projections(folder)
    (folder/'nlmcxr_tsne_pa.csv.gz').write_bytes(gzip.compress(b'imageid,tsne-view\nCXR1_1_IM-1-3001,L\nCXR1_1_IM-1-4001,PA\nCXR2_IM-2-1001,L\n'))
    s = load_iu_xray(folder.parent, layout='openi', reports_only=False)
    assert [x.study_id for x in s] == ['CXR1'] and s[0].image.name == '1_IM-1-4001.dcm.png'

def test_entity_bombs_are_refused_unparsed():
    bomb = b'<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><eCitation>&b;</eCitation>'
    with pytest.raises(GKError, match='entities'): read_report(bomb, 'bomb.xml')

def test_a_missing_lateral_is_counted(folder):
    (folder/'NLMCXR_png/CXR1_1_IM-1-3001.png').unlink()
    with pytest.raises(GKError, match='1 further views'): load_iu_xray(folder.parent, layout='openi')
    with pytest.warns(UserWarning, match='left out 1 further views'): s = load_iu_xray(folder.parent, layout='openi', bad='skip')
    assert len(s) == 2 and s[0].other_views == ()

def test_fingerprint_sees_the_lateral(folder):
    s = load_iu_xray(folder.parent, layout='openi'); before = data_fingerprint(s)
    picture(folder/'NLMCXR_png/CXR1_1_IM-1-3001.png', 77)
    assert data_fingerprint(s, pictures='bytes') != before
    s[0].other_views = (); assert data_fingerprint(s) != before

def test_real_openi(real_data):
    if not (real_data/'iu_xray').is_dir(): pytest.skip('no iu_xray/ in the data root')
    r = read_reports(real_data/'iu_xray')
    assert len(r) == 3955 and Counter(len(x['images']) for x in r) == {2: 3208, 1: 446, 3: 181, 0: 104, 4: 15, 5: 1}
    assert (sum(not x['sections']['FINDINGS'] for x in r) == 530
            and sum(not x['sections']['FINDINGS'] and not x['sections']['IMPRESSION'] for x in r) == 28)
    s = load_iu_xray(real_data, layout='openi', pictures=False)
    assert (sum(x['mesh'] == ['normal'] for x in r) == 1391 and sum(x.labels.get('normal', 0) for x in s) == 1363 and len(s) == 3927
            and len({x.subject_id for x in s}) == 3927)
    views = read_projections(real_data/'iu_xray')
    assert Counter(views.values()) == {'Frontal': 3818, 'Lateral': 3648}
    from gk_mvlp.data.iu_xray import _view
    known = [_view(i, views) for x in r for i in x['images']]
    assert Counter(known) == {'Frontal': 3818, 'Lateral': 3648, '': 4}, 'every row of the table is a picture of the XML'

def test_real_r2gen(real_data):
    if not (real_data/'iu_xray').is_dir(): pytest.skip('no iu_xray/ in the data root')
    s = load_iu_xray(real_data, pictures=False)
    assert Counter(x.split for x in s) == {'train': 2069, 'val': 296, 'test': 590} and len({x.subject_id for x in s}) == 2955
    check_splits([x.subject_id for x in s], [x.split for x in s])
    assert sum(x.entities.get('pneumothorax') == -1 for x in s) > 1500, 'most reports deny it'
    with pytest.raises(GKError, match='pictures are missing'): load_iu_xray(real_data)
