"Downstream tasks: geometry, what is frozen stays frozen, unknown answers, decoding that does not depend on the batch, refusals."
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from gk_mvlp.config import load_preset, preset_names
from gk_mvlp.data.registry import load_dataset
from gk_mvlp.data.study import QA, FindingBox, Study
from gk_mvlp.evaluation.vqa import question_frame, vqa_metrics
from gk_mvlp.models.detector import DetectorConfig, RegionDetector
from gk_mvlp.models.encoders import ImageEncoder, train_tokenizer
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.paths import GKError, project_root
from gk_mvlp.study import task_runs as R
from gk_mvlp.study import task_tables as TT
from gk_mvlp.study.experiments import finetune_config
from gk_mvlp.study.launch import check_preset, task_jobs
from gk_mvlp.study.run import notebook_parameters, stage_sources
from gk_mvlp.tasks import classification as C
from gk_mvlp.tasks import localization as L
from gk_mvlp.tasks import report_generation as G
from gk_mvlp.tasks import vqa as V
from gk_mvlp.tasks.classification import label_matrix
from gk_mvlp.training.batches import StudySet
from gk_mvlp.training.trainer import TrainConfig

SMALL = dict(dim=32, image_depth=1, text_depth=1, encoder_depth=1, decoder_depth=1, embed_dim=16, vocab_size=400, max_length=32,
             region_source='vit')


@pytest.fixture(scope='module')
def phantoms(): return load_dataset('phantom', n=80, size=64)


@pytest.fixture(scope='module')
def tokenizer(phantoms): return train_tokenizer([s.report for s in phantoms] + prompt_book()[0], 400)


def new_model(tokenizer, objective='gk'):
    torch.manual_seed(0); return GKMVLP(ModelConfig(objective=objective, **SMALL), tokenizer).eval()


def encoder(patch=8): return ImageEncoder(image_size=64, patch_size=patch, dim=32, width=32, depth=1, heads=2)


# ---- localization

@pytest.mark.parametrize('patch, strides', [(4, (4, 8, 16)), (8, (4, 8, 16)), (16, (4, 8, 16, 32))])
def test_pyramid_strides(patch, strides):
    p = L.PyramidBackbone(encoder(patch), 16, False); maps = p(torch.zeros(2, 1, 64, 64))
    assert p.pyramid.strides == strides and [m.shape for m in maps.values()] == [(2, 16, 64 // s, 64 // s) for s in strides]
    assert all(m.is_contiguous() for m in (p._map(torch.zeros(2, 1, 64, 64)), *maps.values())), 'channels last is slow in bf16 on a CPU'


@pytest.mark.parametrize('head', ['fcos', 'faster_rcnn'])
def test_images_without_boxes_train_too(phantoms, head):
    names = ['atelectasis', 'cardiomegaly']; data = L.BoxSet(phantoms[:6], names); torch.manual_seed(0)
    net = L.FindingDetector(encoder(), 2, 64, L.LocalizationConfig(head=head, channels=32))
    b = data[list(range(6))]; b['labels'] = b['labels'] * 0
    losses = net(b); assert torch.isfinite(losses['loss']); losses['loss'].backward()
    b = data[list(range(6))]; assert torch.isfinite(net(b)['loss'])
    found = net.detect(data)
    assert len(found) == 6 and all((f[0] >= 0).all() and (f[0] <= 1).all() and len(f[1]) <= 30 and set(f[2]) <= set(names) for f in found)


def test_a_frozen_encoder_does_not_move(phantoms, tmp_path):
    part = {k: [s for s in phantoms if s.split == k] for k in ('train', 'val')}; names = L.box_names(part['train'])
    e = encoder(); before = {k: v.clone() for k, v in e.state_dict().items()}
    net, _ = L.fit_localization(e, L.BoxSet(part['train'], names), L.BoxSet(part['val'], names),
                                L.LocalizationConfig(frozen=True, channels=32),
                                TrainConfig(epochs=1, batch_size=16, lr=1e-3, lr_scale={'net.backbone.model': .5}), tmp_path, quiet=True)
    assert all(torch.equal(v, before[k]) for k, v in net.model.state_dict().items())
    net.train(); assert not net.model.training and net.net.backbone.pyramid.training


def test_the_region_detectors_trunk_is_a_backbone_too():
    p = L.PyramidBackbone(RegionDetector(DetectorConfig(image_size=64)), 16, True)
    assert next(iter(p(torch.zeros(1, 1, 64, 64)).values())).shape[-1] == 16 and not any(q.requires_grad for q in p.model.parameters())


def test_boxes_return_to_the_picture_they_came_from(monkeypatch):
    "A wide picture is padded to a square; a box found where the target lies must come back as the study's own fractions."
    s = Study('a', 'p', np.full((40, 80), 99, np.uint8), findings=[FindingBox('mass', (.25, .2, .5, .6))], split='test')
    data = L.BoxSet([s], ['mass']); net = L.FindingDetector(encoder(), 1, 64, L.LocalizationConfig(channels=32))
    target = data.boxes[0, 0] * 64
    assert target.tolist() == pytest.approx([16, 16 + .2 * 32, 32, 16 + .6 * 32])
    monkeypatch.setattr(net.net, 'forward', lambda images,
                        targets=None: [{'boxes': target[None], 'scores': torch.ones(1), 'labels': torch.ones(1, dtype=torch.long)}])
    (box, score, name), = net.detect(data); assert box[0] == pytest.approx((.25, .2, .5, .6), abs=1e-6) and name == ['mass']


def test_localization_refuses(phantoms, tmp_path):
    with pytest.raises(GKError, match='no training study has a finding box'): L.box_names([Study('a', 'p', split='train')])
    with pytest.raises(GKError, match='head'): L.LocalizationConfig(head='yolo')
    bare = [replace(s, findings=[]) for s in phantoms[:4]]
    with pytest.raises(GKError, match='no validation study'):
        L.fit_localization(encoder(), L.BoxSet(phantoms[:4], ['mass']), L.BoxSet(bare, ['mass']), L.LocalizationConfig(),
                           TrainConfig(epochs=1, batch_size=2, lr=1e-3), tmp_path)


def test_constant_boxes_are_medians_of_training_boxes():
    train = [Study(str(i), str(i), findings=[FindingBox('a', (0, 0, .1 * (i + 1), .5))]) for i in range(3)] + [Study('x', 'x')]
    (box, score, name), second = L.constant_boxes(train, ['a', 'b'], 2)
    assert box.tolist() == [pytest.approx([0, 0, .2, .5])] and score == [.75] and name == ['a'] and second[2] == ['a']
    both = train + [Study('y', 'y', findings=[FindingBox('a', (.6, 0, .9, .5)), FindingBox('a', (.1, 0, .3, .5))])]
    box, score, name = L.constant_boxes(both, ['a'], 1)[0]
    assert len(box) == 2 and box[1].tolist() == [.6, 0, .9, .5] and score.tolist() == [.8, .2], 'a box for each side'
    assert L.constant_boxes([Study('x', 'x')], ['a'], 1)[0][0].shape == (0, 4)


# ---- reports

def test_reports_do_not_depend_on_the_batch(phantoms, tokenizer):
    data = StudySet(phantoms[:7], tokenizer, 64, 32); net = G.ReportGenerator(new_model(tokenizer), 'gk')
    for beams in (1, 3):
        c = G.GenerationConfig(beams=beams, max_new_tokens=10); all_ = net.write(data, c)
        assert all_ == net.write(data, c, batch_size=1) == net.write(data, c, batch_size=3) and len(all_) == 7, 'batch size 1 included'


def test_memory_kinds(phantoms, tokenizer):
    b = StudySet(phantoms[:3], tokenizer, 64, 32)[[0, 1, 2]]; m = new_model(tokenizer)
    image, gk, null, wrong = (G.visual_memory(m, b, k)[0] for k in G.MEMORIES)
    assert (image.shape[1] == 65 and gk.shape[1] == 65 + 29 and not torch.allclose(gk, null) and not torch.allclose(gk, wrong)
            and torch.allclose(gk[:, :65], image))
    with pytest.raises(GKError, match='GK module'): G.visual_memory(new_model(tokenizer, 'itc_itm_lm'), b, 'gk')
    with pytest.raises(GKError, match='memory'): G.visual_memory(m, b, 'words')


def test_the_own_report_is_never_a_prompt(phantoms, tokenizer):
    "Even a model pre-trained with oracle prompts writes from what it predicts: another report in the batch changes nothing."
    torch.manual_seed(0); m = GKMVLP(ModelConfig(train_prompts='oracle', prompts='oracle', **SMALL), tokenizer).eval()
    b = StudySet(phantoms[:4], tokenizer, 64, 32)[[0, 1, 2, 3]]; other = b | {'oracle_prompts': torch.zeros_like(b['oracle_prompts'])}
    assert torch.equal(G.visual_memory(m, b, 'gk')[0], G.visual_memory(m, other, 'gk')[0])


def test_report_baselines():
    train = [Study(str(i), str(i), report=r) for i, r in enumerate(['b', 'A  a', 'a a', 'c'])]
    assert G.most_frequent_report(train) == 'A  a'
    x = np.random.default_rng(0).normal(size=(4, 6)); assert G.nearest_reports(x, train, x + 1e-3) == ['b', 'A  a', 'a a', 'c']
    with pytest.raises(GKError): G.most_frequent_report([])
    with pytest.raises(GKError, match='agree'): G.nearest_reports(x[:3], train, x)


def test_the_loss_of_a_split_is_the_mean_over_its_studies(phantoms, tokenizer):
    data = StudySet(phantoms[:10], tokenizer, 64, 32, augment_strength=1.)
    net = G.ReportGenerator(new_model(tokenizer, 'itc_itm_lm'), 'image').eval()
    assert G.mean_loss(net, data, 10) == pytest.approx(G.mean_loss(net, data, 10)) and data.strength == 1.


# ---- questions

def qa_study(i, split, *qa):
    return Study(f'{split}{i}', f'{split}{i}', np.full((32, 32), 99, np.uint8), qa=[QA(*q) for q in qa], split=split)


def test_answers_come_from_training_alone(tokenizer):
    train = [qa_study(0, 'train', ('q?', 'The left lung', 'open', 'place'), ('r?', 'yes', 'closed', 'presence'))]
    test = [qa_study(1, 'test', ('q?', 'left lung.', 'open', 'place')), qa_study(2, 'test', ('q?', 'spleen', 'open', 'place'))]
    space = V.answer_space(question_frame(train)); assert space == {'left lung': 'The left lung', 'yes': 'yes'}
    data = V.QASet(test, tokenizer, list(space), 32, 16); assert data[[0, 1]]['answer'].tolist() == [0, -1]
    model = GKMVLP(ModelConfig(image_size=32, objective='itc_itm_lm', **SMALL), tokenizer)
    net = V.VQAModel(model, 'image', 'classification', list(space))
    assert net(data[[1]])['loss'] == 0, 'an unknown answer teaches nothing'
    said = V.answer_questions(net, data)
    assert set(said) <= set(space) and vqa_metrics(data.frame.assign(prediction=said))['accuracy'][0] <= .5, 'and cannot be given'


def test_each_question_gets_its_own_picture(phantoms, tokenizer):
    studies = [replace(s, qa=s.qa[:n]) for s, n in zip(phantoms, (2, 0, 3, 1), strict=False)]
    data = V.QASet(studies, tokenizer, ['yes', 'no'], 64, 24); b = data[[2, 0]]
    own = {s.study_id: i for i, s in enumerate(s for s in studies if s.qa)}
    assert len(data) == 3 and len(data.frame) == 6, 'a study without questions is left out'
    assert b['asked'].tolist() == [0, 1, 1] and torch.equal(b['images'], data.pictures[[2, 0]]['images'])
    rows = [i for k in (2, 0) for i in data.frame.index[data.frame['study_id'].map(own) == k]]
    words = tokenizer.batch_decode(b['question_ids'], skip_special_tokens=True)
    assert words == tokenizer.batch_decode(tokenizer(data.frame['question'][rows].tolist(), truncation=True, max_length=24)['input_ids'],
                                           skip_special_tokens=True)


@pytest.mark.parametrize('form', V.FORMS)
def test_loss_of_a_batch_is_the_mean_over_its_questions(phantoms, tokenizer, form):
    data = V.QASet(phantoms[:4], tokenizer, ['yes', 'no', 'left', 'right'], 64, 24); torch.manual_seed(0)
    net = V.VQAModel(new_model(tokenizer), 'gk', form, data.answers).eval()
    with torch.no_grad():
        one = [(net(b)['loss'], int((b['answer'] >= 0).sum()) if form == 'classification' else int(b['answer_mask'][:, 1:].sum()))
               for b in (data[[i]] for i in range(4))]
        whole = float(net(data[range(4)])['loss'])
    assert whole == pytest.approx(float(sum(l * n for l, n in one) / sum(n for _, n in one)), rel=1e-4)


@pytest.mark.parametrize('form', V.FORMS)
def test_answers_do_not_depend_on_the_batch(phantoms, tokenizer, form):
    data = V.QASet(phantoms[:5], tokenizer, ['yes', 'no', 'left'], 64, 24); torch.manual_seed(0)
    net = V.VQAModel(new_model(tokenizer), 'gk', form, data.answers)
    assert (V.answer_questions(net, data) == V.answer_questions(net, data, batch_size=1)
            and len(V.answer_questions(net, data)) == len(data.frame))


def test_vqa_refuses(tokenizer):
    with pytest.raises(GKError, match='form'): V.VQAModel(new_model(tokenizer), 'image', 'guessing', ['a', 'b'])
    with pytest.raises(GKError, match='to choose from'): V.VQAModel(new_model(tokenizer), 'image', 'classification', ['a'])


# ---- runs and tables

SETTINGS = {'model': {'image_size': 64, 'patch_size': 8, **SMALL}, 'localization': {'channels': 32},
            'generation': {'beams': 1, 'max_new_tokens': 8}}


@pytest.mark.parametrize('task', R.TASKS)
def test_a_task_from_checkpoint_to_table(phantoms, tokenizer, tmp_path, task):
    "A model and the baselines, end to end; the table is computed from the saved files and equals the run's own metrics."
    new_model(tokenizer).save_pretrained(tmp_path/'model'); runs = []
    for method in ('gk', R.BASELINE):
        r = R.TaskRun(task, phantoms, 'phantom', method, 100., 0, SETTINGS, checkpoint=str(tmp_path/'model'))
        run = tmp_path/'runs'/task/method; run.mkdir(parents=True); runs.append(run)
        R.run_task(r, TrainConfig(epochs=1, batch_size=16, lr=1e-3, lr_scale={'model': .3}), run)
        metrics = R.run_metrics(task, run)
        (run/'metrics.json').write_text('{}')
        (run/'config.json').write_text(pd.Series({'stage': task, 'settings': {'dataset': 'phantom', 'method': method, 'ratio': 100.,
            'seed': 0}}).to_json())
        cells = TT.load_task_cells([run], tmp_path/'runs', n_boot=30); t = TT.task_table(cells)
        for k, v in metrics.items():
            m, p, name = k.split('/')
            if name == 'share': continue
            row = t[(t['method'] == m) & (t['protocol'] == p) & (t['metric'] == name)]
            assert len(row) == 1 and (row['mean'].iloc[0] == pytest.approx(v, nan_ok=True) or name == 'meteor'), k
    t = TT.task_table(TT.load_task_cells(runs, tmp_path/'runs', n_boot=30))
    assert {'task', 'dataset', 'method', 'ratio', 'metric', 'mean', 'low', 'high', 'seeds', 'n'} <= set(t) and {'gk'} < set(t['method'])
    assert TT.task_report(t, TT.task_comparisons([]), task, 'x').startswith('# ') and '\\begin' in TT.task_latex(t, task)
    (runs[0]/'metrics.json').unlink()
    with pytest.raises(GKError, match='not finished'): TT.load_task_cells(runs, tmp_path/'runs', 30)


def test_seeds_with_other_test_data_are_refused(tmp_path):
    for s in (0, 1):
        run = tmp_path/f'vqa/s{s}'; run.mkdir(parents=True); (run/'metrics.json').write_text('{}')
        (run/'config.json').write_text(pd.Series({'stage': 'vqa', 'settings': {'dataset': 'd', 'method': 'gk', 'ratio': 100.,
            'seed': s}}).to_json())
        pd.DataFrame({'qid': ['a', f'b{s}'], 'study_id': ['a', 'b'], 'subject_id': ['a', 'b'], 'split': 'test', 'question': 'q',
                      'question_type': 't', 'answer_type': 'closed', 'answer': 'yes', 'prediction': 'yes', 'method': 'gk',
                      'protocol': 'generation'}).to_parquet(run/'predictions.parquet')
    with pytest.raises(GKError, match='differ from those of another seed'):
        TT.load_task_cells([tmp_path/'vqa/s0', tmp_path/'vqa/s1'], tmp_path, 20)


def test_ratios_are_nested_and_only_training_is_cut(phantoms):
    parts = {r: R.TaskRun('report_generation', phantoms, 'phantom', R.BASELINE, r, 0, SETTINGS).part for r in (10., 100.)}
    ids = {r: {k: [s.study_id for s in v] for k, v in p.items()} for r, p in parts.items()}
    assert (set(ids[10.]['train']) < set(ids[100.]['train']) and ids[10.]['val'] == ids[100.]['val']
            and ids[10.]['test'] == ids[100.]['test'])


def test_a_task_run_refuses(phantoms):
    with pytest.raises(GKError, match='task'): R.TaskRun('poetry', phantoms, 'phantom', 'gk', 100., 0, SETTINGS)
    with pytest.raises(GKError, match="split 'train'"):
        R.TaskRun('vqa', [replace(s, qa=[]) for s in phantoms], 'phantom', 'gk', 100., 0, SETTINGS)


# ---- presets and jobs

def test_jobs_of_a_preset():
    p = replace(load_preset('smoke'), tasks={'zero_shot': ['phantom'], 'vqa': ['phantom']}, methods=('pixels', 'scratch', 'gk'),
                task_methods=(), task_ratios=(10., 100.), seeds=(0, 1))
    jobs = task_jobs(p)
    assert ([j for j in jobs if j.startswith('zero_shot')]
            == ['zero_shot/phantom-baselines-r100-s0', 'zero_shot/phantom-gk-r100-s0',
                'zero_shot/phantom-gk-r100-s1']), 'nothing is trained: no ratio, no scratch'
    assert (len(jobs) == len(set(jobs)) == 3 + (2 + 1) + 2 * 4 and not any('pixels' in j for j in jobs)
            and 'vqa/phantom-baselines-r10-s1' in jobs)
    assert task_jobs(replace(p, tasks={})) == []
    fewer = task_jobs(replace(p, task_seeds=(1,)))
    assert [j for j in fewer if j.startswith('zero_shot')] == [j for j in jobs if j.startswith('zero_shot')], (
        'task_seeds is for tasks that train')
    assert ({j for j in fewer if j.startswith('vqa') and '-baselines-' not in j}
            == {j for j in jobs if j.startswith('vqa') and j.endswith('-s1') and '-baselines-' not in j})
    assert ([j for j in fewer if '-baselines-' in j and j.startswith('vqa')]
            == ['vqa/phantom-baselines-r10-s1', 'vqa/phantom-baselines-r100-s1'])


@pytest.mark.parametrize('change, says', [({'tasks': {'poetry': ['phantom']}}, 'unknown task'),
                                          ({'tasks': {'vqa': ['nowhere']}}, 'unknown data set'),
                                          ({'localization': {'head': 'yolo'}}, 'head'), ({'generation': {'beam': 3}}, "'beam'"),
                                          ({'task_methods': ('gkk',)}, 'unknown method'), ({'task_seeds': (7,)}, 'task_seeds has 7'),
                                          ({'task_finetune': {'zero_shot': {'lr': 1.}}}, 'trains nothing'),
                                          ({'task_finetune': {'vqa': {'lrr': 1.}}}, "task_finetune.vqa.*'lrr'")])
def test_a_wrong_preset_stops_before_the_first_job(change, says):
    with pytest.raises(GKError, match=says): check_preset(replace(load_preset('smoke'), **change))


def test_a_task_may_differ_in_its_training():
    "What `task_finetune` says holds for its task alone; the rest is `finetune`'s."
    settings = {'finetune': {'epochs': 2, 'batch_size': 8, 'lr': .1, 'augment': .5}, 'task_finetune': {'vqa': {'lr': .3, 'augment': .1}}}
    (config, strength), (other, usual) = (finetune_config(settings, t, 4) for t in ('vqa', 'localization'))
    assert (config.lr, strength, other.lr, usual) == (.3, .1, .1, .5) and config == replace(other, lr=.3) and other.seed == 4


@pytest.mark.parametrize('task', ('classification', *(t for t in R.TASKS if t != 'zero_shot')))
def test_notebooks_read_the_settings_of_their_own_task(task):
    source = next((project_root()/'nbs'/'experiments').glob(f'*_{task}.ipynb')).read_text()
    assert f"finetune_config(settings, '{task}', seed)" in source and source.count('finetune_config(') == 1


@pytest.mark.parametrize('name', preset_names())
def test_presets_are_whole(name): check_preset(load_preset(name))


@pytest.mark.parametrize('number, task', [(73, 'zero_shot'), (74, 'localization'), (75, 'report_generation'), (76, 'vqa')])
def test_experiment_notebooks_take_the_same_parameters(root, number, task):
    p = notebook_parameters(root/f'nbs/experiments/{number}_{task}.ipynb')
    assert ({'preset', 'data', 'dataset', 'method', 'ratio', 'seed', 'detector', 'checkpoint', 'overrides', 'out'} == set(p)
            and task in R.RUNNERS and stage_sources(task))


@pytest.mark.parametrize('notebook', ['71_pretrain', '76_vqa'])
def test_an_experiment_without_a_detector_says_what_to_run(root, tmp_path, notebook):
    command = [sys.executable, '-m', 'gk_mvlp.study.run', f'nbs/experiments/{notebook}.ipynb', str(tmp_path/'run'), '--params',
               '{"preset": "smoke"}']
    r = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert r.returncode == 1 and 'Run nbs/experiments/70_detector.ipynb' in r.stderr and len(r.stderr.strip().splitlines()) == 1, r.stderr
    assert not (tmp_path/'run'/'config.json').exists()


# ---- fine-tuning starts from the probe

def classified(phantoms, n):
    y, names = label_matrix(phantoms[:n], ('pleural effusion', 'nodule', 'cardiomegaly'))
    return StudySet(phantoms[:n], None, 64, regions='', targets=y), y


def test_the_head_starts_with_the_logits_of_the_probe(tokenizer, phantoms):
    model = new_model(tokenizer, 'itc_itm_lm').eval()
    data, y = classified(phantoms, 60)
    y = y.copy(); y[::5, 1] = np.nan; y[:, 2] = 0.                # unknown labels; a class with one value only
    x = C.model_features(model, data, 'image')
    probe, _, _ = C.fit_probe(x, y, x, y)
    net = C.Classifier(model, 'image', 3).eval()
    net.start(probe, x)
    with torch.no_grad():
        logits = torch.cat([net({k: v[i:i + 20] for k, v in data[list(range(60))].items()}) for i in range(0, 60, 20)]).numpy()
    for c in (0, 1): assert np.allclose(1 / (1 + np.exp(-logits[:, c])), probe[c].predict_proba(x)[:, 1], atol=1e-4)
    assert probe[2] is None and (logits[:, 2] == 0).all()


def test_fine_tuning_that_makes_it_worse_keeps_the_start(tokenizer, phantoms, tmp_path):
    data, y = classified(phantoms, 60)
    config = TrainConfig(epochs=1, batch_size=30, lr=10., head_lr=1.)              # a rate that ruins the encoder
    model = new_model(tokenizer, 'itc_itm_lm').eval()
    x = C.model_features(model, data, 'image')
    probe = C.fit_probe(x, y, x, y)
    val, test, history = C.finetune(model, 'image', data, data, data, config, tmp_path, (probe[0], x))
    assert history['epoch'].tolist() == [0, 1] and history['val_auroc'][1] < history['val_auroc'][0]
    assert np.allclose(val, probe[1], atol=1e-4) and np.allclose(test, val)
