"RSNA as DICOM: headers, detailed classes, both split conventions, lists on disk."
import json
import warnings
from collections import Counter

import numpy as np
import pydicom
import pytest
from sklearn.model_selection import train_test_split

from gk_mvlp.data.images import load_image
from gk_mvlp.data.registry import apply_split_lists, load_dataset, save_split_lists
from gk_mvlp.data.rsna import MAPPING, PROTOCOLS, load_rsna, read_rsna_header, rsna_split
from gk_mvlp.data.study import Study, check_splits
from gk_mvlp.paths import GKError

pytestmark = pytest.mark.filterwarnings('ignore:Invalid value for VR AS')          # ages as the challenge writes them
HEAD = 'patientId,x,y,width,height,Target\n'
DETAIL = {True: 'Lung Opacity', False: 'Normal'}

def dicom(path, pid, size=1024, kind='MONOCHROME2', bits=8, fill=0, **tags):
    "A small-valued 8 or 12-bit DICOM file; `fill` makes pictures differ."
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = pydicom.Dataset(); ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PatientID = pydicom.uid.SecondaryCaptureImageStorage, '1.2.3', 'CR', pid
    ds.Rows = ds.Columns = size
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 8 if bits == 8 else 16, bits, bits - 1, 0, kind
    x = np.zeros((size, size), np.uint8 if bits == 8 else np.uint16); x[0, :8] = [(fill >> k & 1) * 200 for k in range(8)]
    ds.PixelData = x.tobytes()
    for k, v in tags.items(): setattr(ds, k, v)
    ds.save_as(path, enforce_file_format=True)

@pytest.fixture
def root(tmp_path):
    "Twelve labelled pictures of six NIH patients, and four test pictures of the second stage."
    d = tmp_path/'rsna_pneumonia'; rows, classes = [], []
    for i in range(12):
        dicom(d/f'stage_2_train_images/t{i:02d}.dcm', f't{i:02d}', fill=i + 1, PatientSex='FM'[i % 2], PatientAge=str(30 + i),
              ViewPosition=('PA', 'AP')[i % 2])
        rows += [f't{i:02d},10,20,300,400,1', f't{i:02d},600,20,300,400,1'] if i % 3 == 0 else [f't{i:02d},,,,,0']
        classes += [f't{i:02d},{DETAIL[i % 3 == 0]}'] * (2 if i % 3 == 0 else 1)
    (d/'stage_2_train_labels.csv').write_text(HEAD + '\n'.join(rows))
    (d/'stage_2_detailed_class_info.csv').write_text('patientId,class\n' + '\n'.join(classes))
    for i in range(4): dicom(d/f'stage_2_test_images/x{i}.dcm', f'x{i}', fill=100 + i)
    (d/'stage_2_test_labels.csv').write_text(HEAD + '\n'.join(f'x{i},,,,,0' for i in range(4)))
    return tmp_path

def test_headers_boxes_and_detailed_classes(root):
    s = load_rsna(root, layout='dicom')
    assert len(s) == 12 and [x.sex for x in s[:2]] == ['F', 'M'] and s[3].age == 33 and s[1].view == 'AP'
    assert (len(s[0].findings) == 2 and np.allclose(s[0].findings[0].box, np.array([10, 20, 310, 420]) / 1024)
            and s[0].attributes['detailed_class'] == 'Lung Opacity' and s[1].entities == {'pneumonia': -1})
    assert s[0].sex != '' and load_rsna(root, layout='dicom', headers=False)[0].sex == ''

@pytest.mark.parametrize('change,says', [
    (lambda p: dicom(p, 't05'), "says patient 't05'"), (lambda p: dicom(p, 't04', size=512), '512x512'),
    (lambda p: p.write_bytes(b''), 'no DICOM header'), (lambda p: p.write_bytes(p.read_bytes()[:200]), 't04.dcm'),
    (lambda p: p.write_bytes(b'<html>'), 'no DICOM header')])
def test_wrong_files_raise_or_are_counted(root, change, says):
    change(root/'rsna_pneumonia/stage_2_train_images/t04.dcm')
    with pytest.raises(GKError, match=says): load_rsna(root, layout='dicom')
    with pytest.warns(UserWarning, match='left out 1 of 12'):
        assert 't04' not in {x.study_id for x in load_rsna(root, layout='dicom', bad='skip')}

@pytest.mark.parametrize('old,new,says', [('t01,Normal', 't01,Healthy', "class 'Healthy'"),
                                          ('t00,Lung Opacity\nt00,Lung Opacity', 't00,Lung Opacity\nt00,Normal', 'both'),
                                          ('t01,Normal', 't01,Lung Opacity', 'Target 0'), ('t03,Lung Opacity', 't03,Normal', 'Target 1')])
def test_detailed_classes_must_fit_the_labels(root, old, new, says):
    p = root/'rsna_pneumonia/stage_2_detailed_class_info.csv'; p.write_text(p.read_text().replace(old, new))
    with pytest.raises(GKError, match=says): load_rsna(root, layout='dicom')

def test_protocol_by_picture_is_the_fields_rule():
    ids = [f'{i:04x}' for i in np.random.default_rng(0).permutation(1000)]
    train, rest = train_test_split(sorted(ids), test_size=.3, random_state=7)
    test, val = train_test_split(rest, test_size=.5, random_state=7)
    assert rsna_split(ids, seed=7) == dict.fromkeys(train, 'train') | dict.fromkeys(val, 'val') | dict.fromkeys(test, 'test')

@pytest.mark.parametrize('protocol', PROTOCOLS)
def test_protocol_by_patient_keeps_patients_together(protocol):
    ids = [f'{i:04d}' for i in range(3000)]; people = [f'p{i // 4}' for i in range(3000)]
    split = rsna_split(ids, people, protocol, 3)
    check_splits(people, [split[i] for i in ids])
    share = Counter(split.values())['train'] / 3000
    assert abs(share - (.7 if protocol == PROTOCOLS[0] else 25184 / 26684)) < .01

def test_second_protocol_tests_on_stage_two(root):
    s = load_rsna(root, layout='dicom', protocol=PROTOCOLS[1])
    assert ({x.study_id for x in s if x.split == 'test'} == {f'x{i}' for i in range(4)}
            and {x.split for x in s} == {'train', 'val', 'test'} and len(s) == 16)
    (root/'rsna_pneumonia/stage_2_test_labels.csv').unlink()
    with pytest.raises(GKError, match='stage_2_test_labels.csv'): load_rsna(root, layout='dicom', protocol=PROTOCOLS[1])
    assert len(load_rsna(root, layout='dicom', protocol=PROTOCOLS[0])) == 12
    (root/'rsna_pneumonia/stage_2_test_labels.csv').write_text(HEAD + 't00,,,,,0')
    with pytest.raises(GKError, match='also in'): load_rsna(root, layout='dicom', protocol=PROTOCOLS[1])

def test_shared_patients_are_counted_and_only_allowed_by_picture(root):
    match = 'patientId,nih_image_index,mse,detailed_class,Target,n_boxes,nih_chestxray14_path\n'
    match += ''.join(f't{i:02d},{i // 6 + 1:08d}_{i % 6:03d}.png,.5,{DETAIL[i % 3 == 0]},{int(i % 3 == 0)},{2 if i % 3 == 0 else 0},images/{i}.png\n' for i in range(12))
    (root/'rsna_pneumonia/rsna_to_nih_matches.csv').write_text(match)
    with pytest.warns(UserWarning, match='2 of 2 patients'):
        s = load_dataset('rsna', root, layout='dicom', protocol='70/15/15', split_by='picture')
    assert len({x.subject_id for x in s}) == 2
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s = load_dataset('rsna', root, layout='dicom', protocol='70/15/15')
    check_splits([x.subject_id for x in s], [x.split for x in s])

def test_pictures_without_a_patient_are_counted_and_the_remedy_works(root):
    with pytest.warns(UserWarning, match=f'no NIH patient is known for 12 of 12 pictures.*{MAPPING}.*rsna_pneumonia'):
        s = load_dataset('rsna', root, layout='dicom')
    assert len({x.subject_id for x in s}) == 12
    rows = [{'subset_img_id': f't{i:02d}', 'img_id': f'{i // 3 + 1:08d}_{i % 3:03d}.png', 'orig_labels': ['Mass']} for i in range(12)]
    path = root/'rsna_pneumonia'/MAPPING; path.write_text(json.dumps(rows[:9]))
    with pytest.warns(UserWarning, match='known for 3 of 12'): load_rsna(root, layout='dicom')
    path.write_text(json.dumps(rows))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        s = load_dataset('rsna', root, layout='dicom', protocol='70/15/15')
    assert {x.subject_id for x in s} == {f'nih-{k:08d}' for k in range(1, 5)} and s[4].attributes['nih_image'] == '00000002_001.png'
    check_splits([x.subject_id for x in s], [x.split for x in s])

@pytest.mark.parametrize('text,says', [('{}', 'not the mapping'), ('[{"img_id": "00000001_000.png"}]', 'not the mapping'),
                                       ('[{"subset_img_id": "t01", "img_id": "a.png"}]', 'official picture name'),
                                       ('[1]', 'not the mapping'), ('[', 'not valid JSON'),
    ('[{"subset_img_id": "t01", "img_id": "00000001_000.png"}, {"subset_img_id": "t01", "img_id": "00000002_000.png"}]', 'both'),
    ('[{"subset_img_id": "t01", "img_id": null}]', 'None')])
def test_broken_mappings(root, text, says):
    (root/'rsna_pneumonia'/MAPPING).write_text(text)
    with pytest.raises(GKError, match=says): load_rsna(root, layout='dicom')

@pytest.mark.parametrize('kw,says', [({'protocol': '80/20'}, 'protocol'), ({'split_by': 'day'}, 'split_by'), ({'layout': 'png'}, 'layout'),
                                     ({'bad': 'ignore'}, 'skip')])
def test_wrong_options(root, kw, says):
    with pytest.raises(GKError, match=says): load_rsna(root, **{'layout': 'dicom'} | kw)

def test_split_lists_are_written_and_then_obeyed(root, tmp_path):
    lists = tmp_path/'lists'
    a = load_dataset('rsna', root, layout='dicom', protocol='70/15/15', split_lists=lists)
    assert {p.name for p in lists.iterdir()} == {'train.txt', 'val.txt', 'test.txt', 'splits.json'}
    assert json.loads((lists/'splits.json').read_text())['about']['options'] == {'layout': 'dicom', 'protocol': '70/15/15'}
    assert sorted((lists/'test.txt').read_text().split()) == sorted(x.study_id for x in a if x.split == 'test')
    b = load_dataset('rsna', root, layout='dicom', split_seed=99, split_lists=lists)
    assert [(x.study_id, x.split) for x in a] == [(x.study_id, x.split) for x in b]

def test_split_lists_that_do_not_fit(root, tmp_path):
    s = [Study(f's{i}', f'p{i}', split=('train', 'test')[i % 2]) for i in range(6)]
    def lists(): save_split_lists(tmp_path/'l', s); return tmp_path/'l'
    with pytest.raises(GKError, match="no list holds study 'new'"): apply_split_lists(lists(), [*s, Study('new', 'p')])
    with pytest.raises(GKError, match='2 listed studies'): apply_split_lists(lists(), s[:4])
    with pytest.warns(UserWarning, match='2 listed studies'): apply_split_lists(lists(), s[:4], 'skip')
    (lists()/'train.txt').write_text('s0\n')
    with pytest.raises(GKError, match='train.txt: changed'): apply_split_lists(tmp_path/'l', s)
    (lists()/'splits.json').write_text('[]')
    with pytest.raises(GKError, match='summary'): apply_split_lists(tmp_path/'l', s)
    (lists()/'test.txt').unlink()
    with pytest.raises(GKError, match='test.txt'): apply_split_lists(tmp_path/'l', s)

@pytest.mark.parametrize('bits', [8, 12])
def test_monochrome1_and_16_bit_pixels(tmp_path, bits):
    "The same stored values as MONOCHROME1 and 2 are negatives of each other."
    for kind in ('MONOCHROME1', 'MONOCHROME2'): dicom(tmp_path/f'{kind}.dcm', 'a', kind=kind, bits=bits, fill=0b1010)
    one, two = load_image(tmp_path/'MONOCHROME1.dcm').astype(int), load_image(tmp_path/'MONOCHROME2.dcm').astype(int)
    assert (one + two == 255).all() and two[0, 1] == (200 if bits == 8 else 255) and one[5, 5] == 255

def test_ages_as_the_challenge_and_as_dicom_write_them(tmp_path):
    for raw, want in (('58', 58), ('058Y', 58), ('148', None), ('', None), ('003M', None)):
        dicom(tmp_path/'a.dcm', 'a', PatientAge=raw)
        assert read_rsna_header(tmp_path/'a.dcm', 'a')['age'] == want

def test_real_labels_split_as_in_papers(real_data):
    from gk_mvlp.data.rsna import read_rsna_labels
    truth = read_rsna_labels(real_data/'rsna_pneumonia/stage_2_train_labels.csv')
    assert len(truth) == 26684 and sum(len(b) for _, b in truth.values()) == 9555
    n = [Counter(rsna_split(list(truth), protocol=p).values()) for p in PROTOCOLS]
    assert n == [{'train': 18678, 'val': 4003, 'test': 4003}, {'train': 25184, 'val': 1500}]
