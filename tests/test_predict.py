"Prediction: formats, geometry, grounding against a plain loop, refusals, and the command."
import contextlib
import io
import json
import os
import subprocess
import sys

import numpy as np
import pydicom
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from gk_mvlp.apps.predict import Predictor, _past, check_grey, describe, find_model, mark_entities, overlay, parse_question
from gk_mvlp.cli import main
from gk_mvlp.data.anatomy import REGIONS
from gk_mvlp.data.knowledge import ENTITIES, ENTITY_NAMES, extract_entities
from gk_mvlp.data.phantom import PhantomConfig, make_study
from gk_mvlp.models.detector import DetectorConfig, RegionDetector, save_detector
from gk_mvlp.models.encoders import train_tokenizer
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.paths import GKError

PHANTOM = PhantomConfig(n=40, size=96)


@pytest.fixture(scope='module')
def predictor():
    torch.manual_seed(1)
    config = ModelConfig(dim=32, image_depth=1, text_depth=1, encoder_depth=1, decoder_depth=1, vocab_size=500, max_length=24)
    tokenizer = train_tokenizer(prompt_book()[0] + [make_study(PHANTOM, i).report for i in range(5)], 500)
    return Predictor(GKMVLP(config, tokenizer), RegionDetector(DetectorConfig(score_threshold=0.)))


@pytest.fixture(scope='module')
def folder(predictor, tmp_path_factory):
    f = tmp_path_factory.mktemp('model')
    predictor.model.save_pretrained(f)
    save_detector(predictor.detector, f/'detector')
    return f


@pytest.fixture(scope='module')
def picture():
    return make_study(PHANTOM, 3).image


def write(path, x):
    if path.suffix != '.dcm':
        Image.fromarray(x).save(path, **({'quality': 98} if path.suffix == '.jpg' else {}))
        return path
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset(); ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = pydicom.uid.SecondaryCaptureImageStorage, '1.2.3', 'CR'
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation = *x.shape, 1, 0, 'MONOCHROME1'
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelData = 8, 8, 7, (255 - x).tobytes()
    ds.save_as(path, enforce_file_format=True)
    return path


def test_formats_agree(predictor, picture, tmp_path):
    "PNG and (inverted) DICOM hold the same pixels and give the same result; JPEG nearly."
    png, dcm, jpg = (predictor(write(tmp_path/f'x.{s}', picture)) for s in ('png', 'dcm', 'jpg'))
    for k in ('regions', 'entities', 'attention'): assert getattr(png, k).equals(getattr(dcm, k))
    assert png.report == dcm.report
    assert np.allclose(png.entities['score'].sort_index(), jpg.entities['score'].sort_index(), atol=.2)


def test_boxes_are_in_the_picture(predictor):
    "Black bars at both sides make a square: the model sees the same pixels, and the boxes are the same places of the picture."
    square = make_study(PhantomConfig(n=40, size=64), 3).image.copy()
    square[:, :16] = square[:, 48:] = 0
    a, b = predictor(np.ascontiguousarray(square[:, 16:48])).regions, predictor(square).regions
    found = a['found']
    assert found.any() and np.allclose(a['score'], b['score'], atol=1e-6)
    x = (b.loc[found, ['x1', 'x2']] * 64 - 16) / 32
    assert (np.allclose(a.loc[found, ['x1', 'x2']], x.clip(0, 1), atol=1e-6)
            and np.allclose(a.loc[found, ['y1', 'y2']], b.loc[found, ['y1', 'y2']], atol=1e-6))


@pytest.mark.parametrize('mode', ['none', 'predicted', 'all'])
def test_grounding_is_the_strongest_region(predictor, picture, mode):
    p = predictor(picture, mode)
    n = {'none': 0, 'predicted': predictor.model.config.top_k, 'all': len(ENTITIES)}[mode]
    assert list(p.attention.columns)[0] == '(null)' and p.attention.shape[1] == 1 + n and p.entities['prompted'].sum() == n
    assert np.isclose(p.entities['share'].sum(), 1) and p.entities['score'].is_monotonic_decreasing
    for name, e in p.entities.iterrows():
        if not e['prompted']:
            assert e['region'] is None or e['region'] != e['region']
            continue
        best = max(p.attention.index, key=lambda r: p.attention.loc[r, name])
        assert e['region'] == best and np.isclose(e['lift'], p.attention.loc[best, name] * (1 + n))


def test_attention_is_of_the_named_prompt(predictor, picture):
    "In mode all, a column belongs to its entity: replacing that entity's prompt text changes that column most."
    before = predictor(picture, 'all').attention
    m, k = predictor.model, ENTITY_NAMES.index('fracture')
    ids = m.prompt_ids.clone()
    m.prompt_ids[k] = ids[ENTITY_NAMES.index('pneumothorax')]; m.prompt_mask[k] = m.prompt_mask[ENTITY_NAMES.index('pneumothorax')]
    try: after = predictor(picture, 'all').attention
    finally: m.prompt_ids.copy_(ids)
    assert (after - before).abs().sum().idxmax() == 'fracture' and np.allclose(after['fracture'], after['pneumothorax'], atol=1e-6)


def test_missing_regions_are_left_out(predictor, picture):
    strict = Predictor(predictor.model, RegionDetector(DetectorConfig(score_threshold=.999)))
    p = strict(picture)
    assert not p.regions['found'].any() and p.attention.empty and not p.entities['region'].map(lambda r: isinstance(r, str)).any()
    assert json.loads(json.dumps(p.to_dict(), allow_nan=False))['regions'] == {} and 'Regions found: 0 of 29' in describe(p)
    assert overlay(p).size[0] == 768


def test_yes_is_the_softmax_of_two_similarities(predictor, picture):
    m = predictor.model
    with torch.no_grad():
        v = F.normalize(m.image_proj(m.image_encoder(predictor.batch(picture)['images'])[:, 0]), dim=-1)
        s = []
        for text in ('There is mass.', 'There is no mass.'):
            enc = m.tokenizer(text, return_tensors='pt')
            s.append(float(F.cosine_similarity(v, m.text_proj(m.report_encoder(enc['input_ids'], enc['attention_mask'])[:, 0]))))
    odds = np.exp(m.logit_scale.exp().clamp(1, 100).item() * (s[0] - s[1]))
    a = predictor.ask(predictor(picture), 'Is there a mass?')
    assert np.isclose(a.yes, odds / (1 + odds), atol=1e-5) and a.text == ('yes' if a.yes > .5 else 'no')


def test_questions():
    assert parse_question('Where is the pleural fluid?') == ('where', 'pleural effusion')
    assert parse_question('Does the patient have COPD?') == ('is', 'hyperinflation')
    assert parse_question('Which abnormalities can you see?') == ('which', '')
    for q in ('', 'How old is the patient?', 'x' * 5000):
        with pytest.raises(GKError, match='not understood'): parse_question(q)


@pytest.mark.parametrize('i', range(40))
def test_marks_agree_with_the_report_reader(i):
    "The pieces are the report, and nothing is marked that the reader of whole reports does not find."
    report = make_study(PHANTOM, i).report
    pieces, said = mark_entities(report), extract_entities(report)
    assert ''.join(t for t, _ in pieces) == report
    values = {v for _, v in pieces if v}
    assert ('present' in values) == (1 in said.values()), report


def test_colour_is_refused_and_grey_is_not(predictor, picture, tmp_path):
    photo = np.stack([picture, np.roll(picture, 30, 0), 255 - picture], -1)
    for name in ('photo.png', 'photo.jpg'):
        with pytest.raises(GKError, match='in colour'): predictor(write(tmp_path/name, photo))
    with pytest.raises(GKError, match='in colour'): predictor(photo)
    check_grey(write(tmp_path/'grey.png', np.repeat(picture[..., None], 3, -1)))
    tint = (picture[..., None] * np.array([.92, .96, 1.])).astype(np.uint8)
    check_grey(write(tmp_path/'tint.jpg', tint))


def test_no_real_radiograph_is_taken_for_a_photo(real_data):
    files = [p for d in ('covid_chestxray/images', 'nih_chestxray14/images', 'nih_chestxray14/images_64px', 'dicom')
             for p in sorted((real_data/d).glob('*')) if p.suffix.lower() in ('.png', '.jpg', '.jpeg', '.dcm')]
    assert len(files) > 500
    refused = []
    for f in files:
        try: check_grey(f)
        except GKError as err: refused.append(str(err))
    assert not refused, refused[:5]


def test_real_dicom(predictor, real_data):
    "The same picture stored both ways round gives the same result."
    a, b = (predictor(f) for f in sorted((real_data/'dicom').glob('*.dcm')))
    assert a.image.shape == b.image.shape == (1024, 1024) and a.report is not None and set(a.regions.index) == set(REGIONS)


def test_labels_of_regions_that_begin_at_one_place_lie_below_each_other():
    taken = []
    for box in [(10, 10, 90, 20), (10, 10, 80, 20), (12, 14, 70, 24), (200, 12, 260, 22)]: taken.append(_past(box, taken))
    assert taken == [(10, 10, 90, 20), (10, 20, 80, 30), (12, 30, 70, 40), (200, 12, 260, 22)]


def test_overlay_lights_up_the_strongest_region(predictor, picture):
    p = predictor(np.zeros((96, 96), np.uint8), 'all')
    name = p.entities.index[0]
    x = np.asarray(overlay(p, name, side=300)).astype(int)
    warm = x[..., 0] - x[..., 2]
    box = (p.regions.loc[p.entities.loc[name, 'region'], ['x1', 'y1', 'x2', 'y2']].to_numpy(float) * 300).round().astype(int)
    inside = warm[box[1]:box[3], box[0]:box[2]]
    assert inside.mean() > 40 and overlay(p, name, side=300).size == (300, 300)
    with pytest.raises(GKError, match='no prompt'): overlay(predictor(picture, 'none'), name)


def test_command(folder, picture, tmp_path, capsys):
    png = write(tmp_path/'x.png', picture)
    assert main(['predict', str(png), '--model', str(folder), '--question', 'Is there a pneumothorax?', '--json', '--overlay',
                 str(tmp_path/'o.png'), '--report-out', str(tmp_path/'r.txt'), '--prompts', 'all']) == 0
    d = json.loads(capsys.readouterr().out)
    assert (set(d) == {'image', 'model', 'notice', 'prompts', 'regions', 'region_scores', 'entities', 'report', 'answer'}
            and d['answer']['text'] in ('yes', 'no'))
    assert (len(d['entities']) == len(ENTITIES) and all(e['region'] in REGIONS for e in d['entities'])
            and 'not for clinical use' in d['notice'])
    assert (tmp_path/'r.txt').read_text().strip() == d['report'] and Image.open(tmp_path/'o.png').size[0] == 768
    assert main(['predict', str(png), '--model', str(folder)]) == 0
    said = capsys.readouterr().out
    assert 'Report: ' in said and 'not for clinical use' in said and all(n in said for n in ENTITY_NAMES)


@pytest.mark.parametrize('name', ['text.png', 'one.png', 'empty.jpg', 'missing.png', 'photo.jpg'])
def test_bad_pictures_end_with_one_line(folder, tmp_path, name, capsys):
    f = tmp_path/name
    if name == 'text.png': f.write_text('The heart is enlarged.')
    if name == 'empty.jpg': f.touch()
    if name == 'one.png': write(f, np.zeros((1, 1), np.uint8))
    if name == 'photo.jpg': write(f, np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8).repeat(4, 0).repeat(4, 1))
    assert main(['predict', str(f), '--model', str(folder)]) == 1
    err = capsys.readouterr().err.strip()
    assert err.startswith('error: ') and name in err and '\n' not in err


def test_wrong_models(predictor, folder, tmp_path, picture):
    with pytest.raises(GKError, match='no saved model'): Predictor.from_pretrained(tmp_path)
    predictor.model.save_pretrained(tmp_path/'alone')
    with pytest.raises(GKError, match='no region detector'): Predictor.from_pretrained(tmp_path/'alone')
    with pytest.raises(GKError, match='no GK module'):
        Predictor(GKMVLP(ModelConfig(objective='itc', dim=32, image_depth=1), predictor.model.tokenizer), predictor.detector)
    with pytest.raises(GKError, match='96 pixels and the model 64'):
        Predictor(predictor.model, RegionDetector(DetectorConfig(image_size=96)))
    with pytest.raises(GKError, match='prompt mode'): predictor(picture, 'oracle')


def test_the_largest_finished_study_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv('GK_MVLP_OUT', str(tmp_path))
    assert find_model() is None
    def finish(preset, run='gk-s0', whole=True):
        for d in (f'{preset}/detector', f'{preset}/pretrain/{run}/model'): (tmp_path/'runs'/d).mkdir(parents=True, exist_ok=True)
        for f in ('detector/metrics.json', f'pretrain/{run}/model/config.json', *([f'pretrain/{run}/metrics.json'] if whole else [])):
            (tmp_path/'runs'/preset/f).write_text('{}')
    finish('smoke'); assert find_model().parts[-4] == 'smoke'
    finish('mini', whole=False); assert find_model().parts[-4] == 'smoke', 'an unfinished run is not taken'
    finish('mini', 'gk-s2'); assert find_model().parts[-4:-1] == ('mini', 'pretrain', 'gk-s2')


def test_without_a_model_smoke_is_trained(tmp_path, picture):
    "In an empty checkout the command works at once, says what it does on standard error, and the next call finds the model."
    env = os.environ | {'GK_MVLP_OUT': str(tmp_path)}
    def call():
        code = f'import sys; from gk_mvlp.cli import main; sys.exit(main(["predict", {str(write(tmp_path/"x.png", picture))!r}, "--json"]))'
        return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env, timeout=600)
    first = call()
    assert first.returncode == 0 and 'training the smoke study' in first.stderr, first.stderr
    with contextlib.redirect_stdout(io.StringIO()): d = json.loads(first.stdout)
    assert d['model']['preset'] == 'smoke'
    second = call()
    assert second.returncode == 0 and second.stderr == '' and json.loads(second.stdout) == d
