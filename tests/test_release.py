"Weights to take away: the card tells what the files say, the folder loads, and ONNX gives the same numbers."
import json

import numpy as np
import pandas as pd
import pytest
import torch

from gk_mvlp.apps import release
from gk_mvlp.apps.predict import Predictor
from gk_mvlp.apps.release import PictureClassifier, export_onnx, model_card, study_results
from gk_mvlp.cli import main
from gk_mvlp.data.images import to_float
from gk_mvlp.data.knowledge import ENTITY_NAMES
from gk_mvlp.models.detector import DetectorConfig, RegionDetector, save_detector
from gk_mvlp.models.encoders import train_tokenizer
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.paths import GKError
from gk_mvlp.tasks.classification import Classifier


def make(seed=0, **kw):
    torch.manual_seed(seed)
    return GKMVLP(ModelConfig(**{'dim': 32, 'image_depth': 2, 'text_depth': 1, 'encoder_depth': 1, 'decoder_depth': 1, 'vocab_size': 400,
                                 'max_length': 24} | kw), train_tokenizer(prompt_book()[0], 400)).eval()


def pictures(n, size=64): return torch.from_numpy(np.random.default_rng(n).integers(0, 256, (n, size, size), np.uint8))


@pytest.mark.parametrize('kw, classes', [({}, 0), ({'ecls_form': 'sigmoid'}, 3), ({'dim': 48, 'image_size': 96, 'patch_size': 16}, 1)])
def test_onnx_parity(tmp_path, kw, classes):
    "onnxruntime agrees with the model itself, not with the wrapper that was exported, for batches of 1 and 5."
    ort = pytest.importorskip('onnxruntime')
    model = make(**kw)
    head = Classifier(model, 'image', classes).eval() if classes else None
    if head:
        torch.nn.init.normal_(head.head.weight); torch.nn.init.normal_(head.norm.mean)
        if model.config.ecls_form == 'sigmoid': torch.nn.init.normal_(model.entity_bias)
    session = ort.InferenceSession(export_onnx(PictureClassifier(model, head), tmp_path/'m.onnx'))
    assert json.loads(session.get_modelmeta().custom_metadata_map['entities']) == list(ENTITY_NAMES)
    assert 'not for clinical use' in session.get_modelmeta().custom_metadata_map['notice']
    for n in (1, 5):
        x = pictures(n, model.config.image_size)
        got = session.run(None, {'pictures': x.numpy()})
        with torch.no_grad():
            images = to_float(x)
            want = ([model.features({'images': images}), model.entity_scores(model.image_encoder(images)[:, 0])]
                    + ([head({'images': images})] if head else []))
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert a.shape == tuple(b.shape) and np.allclose(a, b.numpy(), rtol=1e-3, atol=2e-4), np.abs(a - b.numpy()).max()
    assert not list(tmp_path.glob('*.data')), 'one file holds everything'


def test_onnx_refuses_what_it_cannot_hold():
    model = make()
    with pytest.raises(GKError, match='does not fit'): PictureClassifier(model, Classifier(model, 'gk', 2))
    with pytest.raises(GKError, match='does not fit'): PictureClassifier(model, Classifier(make(1), 'image', 2))
    with pytest.raises(GKError, match='no entity scores'): PictureClassifier(make(objective='itc'))


@pytest.fixture
def study(tmp_path, monkeypatch):
    "A finished study's folders: (model folder, tables folder)."
    monkeypatch.setenv('GK_MVLP_OUT', str(tmp_path))
    run = tmp_path/'runs/mini/pretrain/gk-s0'
    make().save_pretrained(run/'model')
    save_detector(RegionDetector(DetectorConfig()), tmp_path/'runs/mini/detector/model')
    (tmp_path/'runs/mini/detector/metrics.json').write_text('{}')
    (run/'config.json').write_text(json.dumps({'settings': {'train': {'batch_size': 32, 'lr': 7e-4, 'seed': 0}},
                                               'data_fingerprint': 'abc123'}))
    (run/'metrics.json').write_text(json.dumps({'n_train': 561, 'n_val': 77, 'epochs': 13, 'itc_start': 3.47, 'itc_end': 3.46,
                                                'itc_verdict': 'stuck', 'lm_start': 6.9, 'lm_end': 2.1, 'lm_verdict': 'ok'}))
    tables = tmp_path/'paper_results/mini/tables'
    tables.mkdir(parents=True)
    return run/'model', tables


def table(**kw):
    return {'task': 'classification', 'dataset': 'phantom', 'method': 'gk', 'ratio': 10., 'metric': 'auroc', 'mean': .71234, 'low': .65,
            'high': .77, 'seeds': 3, 'n': 160, **kw}


def test_card_says_what_the_files_say(study):
    model, tables = study
    card = model_card(Predictor.from_pretrained(model))
    for text in ('561 training and 77 validation', 'synthetic X-rays', '13 epochs', 'stuck', 'the study has no tables', 'Not measured',
                 'Apache-2.0', 'Research only, not for clinical use.'):
        assert text in card, text
    pd.DataFrame([table(), table(method='scratch', mean=.6)]).to_csv(tables/'classification.csv', index=False)
    pd.DataFrame([table(task='subgroups', attribute='sex', group='F', factor=None, mean=.5551),
                  table(task='subgroups', attribute='sex', group='F', factor='women', mean=.4441)]).to_csv(tables/'subgroups.csv',
                      index=False)
    pd.DataFrame({'difference': [1.]}).to_csv(tables/'comparisons.csv', index=False)
    card = model_card(Predictor.from_pretrained(model))
    assert '0.712 (0.650 to 0.770)' in card and '0.600' not in card and 'no tables' not in card and 'Not measured' not in card
    results, groups = card.split('## Results')[1].split('## Subgroups')
    assert '0.555' not in results and '0.555' in groups.split('## Limits')[0] and '0.444' not in card


@pytest.mark.parametrize('commit, dirty, said', [(None, None, 'Commit not known (no git clone), PyTorch 2.9'),
                                                 ('a' * 40, False, f'Commit `{"a" * 12}`, PyTorch'),
                                                 ('a' * 40, True, f'Commit `{"a" * 12}` with uncommitted changes, PyTorch')])
def test_card_says_where_the_code_was(study, commit, dirty, said):
    env = {'commit': commit, 'dirty': dirty, 'torch': '2.9', 'gpu': None, 'cpus': 2, 'seconds': 9.}
    (study[0].parent/'env.json').write_text(json.dumps(env))
    assert said in model_card(Predictor.from_pretrained(study[0]))


def test_card_reads_the_tables_that_studies_write(root):
    "The committed study: every row has a value, and the groups of patients are told from the rest."
    t = study_results(root/'paper_results/mini/tables')
    assert (not t['value (95 % interval)'].str.contains('nan').any()
            and {'classification', 'detector', 'vqa', 'grounding', 'subgroups'} <= set(t['task']))
    groups = t[t['task'] == 'subgroups']
    assert ({'sex', 'age', 'view'} <= set(groups['attribute']) and {'F', 'M', 'gap', 'worst'} <= set(groups['group'])
            and set(groups['metric']) == {'auroc'} and not groups.duplicated(['attribute', 'group']).any())


def test_tables_without_the_columns_are_left_out(tmp_path):
    pd.DataFrame({'difference': [1.]}).to_csv(tmp_path/'a.csv', index=False)
    assert study_results(tmp_path).empty and study_results(tmp_path/'none').empty


def test_export_and_load_elsewhere(study, tmp_path, capsys):
    "The exported folder needs nothing of the study: same result, and the warning travels along."
    model, _ = study
    there = Predictor.from_pretrained(model)
    assert main(['export', str(tmp_path/'weights'), '--onnx']) == 0
    for f in sorted((tmp_path/'runs').rglob('*'), reverse=True): f.unlink() if f.is_file() else f.rmdir()
    here = Predictor.from_pretrained(tmp_path/'weights')
    x = pictures(1)[0].numpy()
    assert here(x).entities.equals(there(x).entities) and here.about['stuck'] == ['itc'] and here.about['name'] == 'mini/gk-s0'
    assert (tmp_path/'weights/model.onnx').stat().st_size > 10_000 and 'mini/gk-s0' in (tmp_path/'weights/README.md').read_text()
    card = (tmp_path/'weights/README.md').read_text()
    assert main(['export', str(tmp_path/'weights'), '--model', str(tmp_path/'weights')]) == 0, 'a folder that it wrote may be written again'
    assert (tmp_path/'weights/README.md').read_text() == card and '13 epochs' in card
    (tmp_path/'full').mkdir(); (tmp_path/'full/thesis.txt').write_text('mine')
    assert main(['export', str(tmp_path/'full'), '--model', str(tmp_path/'weights')]) == 1 and 'is not empty' in capsys.readouterr().err
    here.folder = None
    assert release.model_card(here).count('Not known') == 2
