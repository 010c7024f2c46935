"What studies of real data need: caches that know what they hold, presets that name their labels, jobs that see what changed."
import json
import multiprocessing
import os
import re
import tracemalloc
import types
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gk_mvlp.config import finetune_section, load_preset
from gk_mvlp.data import registry
from gk_mvlp.data.registry import load_dataset, picture_hashes
from gk_mvlp.data.study import FindingBox, Study
from gk_mvlp.models.detector import DetectorConfig, RegionDetector
from gk_mvlp.models.encoders import train_tokenizer
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.paths import GKError
from gk_mvlp.study import experiments, task_runs
from gk_mvlp.study.probing import ProbeConfig, Probing, probe_maps, probe_predictions, run_probing
from gk_mvlp.training import batches
from gk_mvlp.training.batches import StudySet, describe_regions, detect_regions
from gk_mvlp.training.trainer import TrainConfig

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def phantoms(): return load_dataset('phantom', n=40, size=64)


@pytest.fixture(scope='module')
def detector():
    torch.manual_seed(0)
    return RegionDetector(DetectorConfig(feature_dim=8, score_threshold=.1)).eval()


@pytest.fixture(scope='module')
def images(phantoms): return batches.load_pictures(phantoms, 64)[0]


# ---- regions

def test_regions_are_those_of_the_detector_up_to_float16(detector, images, tmp_path):
    d = detector.detect(batches.to_float(torch.from_numpy(images)))
    plain = detect_regions(detector, images)
    for found in (plain, detect_regions(detector, images, tmp_path, batch_size=7), detect_regions(detector, images, tmp_path)):
        assert (found['region_features'].dtype == torch.float16
                and torch.allclose(found['region_features'].float(), d['features'], rtol=1e-3, atol=1e-4)
                and d['features'].abs().max() > .01)
        assert all(torch.allclose(found[f'region_{k}'].float(), d[k].float(), atol=1e-5) for k in ('boxes', 'scores', 'valid'))
    assert {p.suffix for p in tmp_path.iterdir()} == {'.npz', '.npy'}, 'no half-written file stays'
    want = StudySet([Study(str(i), 'p', x) for i, x in enumerate(images)], image_size=64, detector=detector)[[5, 2]]
    assert want['region_features'].dtype == torch.float32


class Finder:
    "2048 features of a region, as ResNet-50 gives them, at no cost."
    config = DetectorConfig(backbone='resnet50')
    def state_dict(self): return {}
    def detect(self, x):
        n = len(x)
        return {'boxes': torch.rand(n, 29, 4), 'scores': torch.rand(n, 29), 'valid': torch.ones(n, 29, dtype=torch.bool),
                'features': x.mean((1, 2, 3)).view(n, 1, 1).expand(n, 29, 2048)}


def test_large_features_stay_on_disk(tmp_path, monkeypatch):
    pictures, whole = np.arange(400, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2), 400 * 29 * 2048 * 2
    monkeypatch.setattr(batches, 'MAX_IN_MEMORY', whole - 1)
    tracemalloc.start()
    try:
        found = detect_regions(Finder(), pictures, tmp_path)['region_features']
        again = detect_regions(Finder(), pictures, tmp_path)['region_features']
        _, peak = tracemalloc.get_traced_memory()
    finally: tracemalloc.stop()
    assert peak < whole / 3, f'{peak / 1e6:.0f} MB of arrays for features of {whole / 1e6:.0f} MB'
    assert (found.shape == (400, 29, 2048)
            and torch.allclose(found[:, 3, 7].float(), batches.to_float(torch.from_numpy(pictures)).mean((1, 2, 3)), rtol=1e-3, atol=1e-3)
            and torch.equal(found, again))


def test_another_threshold_is_another_detector(images, tmp_path):
    torch.manual_seed(0); a = RegionDetector(DetectorConfig(feature_dim=8, score_threshold=.1)).eval()
    b = RegionDetector(replace(a.config, score_threshold=.95)).eval(); b.load_state_dict(a.state_dict())
    assert detect_regions(a, images, tmp_path)['region_valid'].any() and not detect_regions(b, images, tmp_path)['region_valid'].any()
    for name, m in (('a', a), ('b', b)): m.save(tmp_path/name)
    assert experiments.model_hash(str(tmp_path/'a')) != experiments.model_hash(str(tmp_path/'b')) and experiments.model_hash('') == ''
    a.save(tmp_path/'c'); assert experiments.model_hash(str(tmp_path/'a')) == experiments.model_hash(str(tmp_path/'c'))


@pytest.mark.parametrize('ruin', [lambda p: p.write_bytes(p.read_bytes()[:200]), lambda p: p.write_bytes(b''), lambda p: p.unlink()])
@pytest.mark.parametrize('suffix', ['.npy', '.npz'])
def test_a_broken_cache_is_made_again(detector, images, tmp_path, ruin, suffix):
    want = detect_regions(detector, images, tmp_path)
    ruin(next(tmp_path.glob(f'*{suffix}')))
    again = detect_regions(detector, images, tmp_path)
    assert all(torch.equal(want[k], again[k]) for k in want) and set(want) == set(again)


def test_a_full_disk_is_said(detector, images, tmp_path):
    (tmp_path/'c').write_text('a file')
    with pytest.raises(GKError, match='cannot be written'): detect_regions(detector, images, tmp_path/'c')


def test_boxes_without_features_write_none(detector, images, tmp_path):
    few = detect_regions(detector, images, tmp_path, features=False)
    assert 'region_features' not in few and [p.suffix for p in tmp_path.iterdir()] == ['.npz']
    assert torch.equal(detect_regions(detector, images, tmp_path)['region_boxes'], few['region_boxes']), 'who needs them later gets them'
    assert 'region_features' not in detect_regions(detector, images, tmp_path, features=False)


def test_true_boxes_are_described_batch_by_batch(detector, phantoms, tmp_path, monkeypatch):
    sizes, real = [], type(detector).describe
    monkeypatch.setattr(type(detector), 'describe', lambda self, x, boxes: sizes.append(len(x)) or real(self, x, boxes))
    data = StudySet(phantoms, None, 64, detector=detector, true_boxes=True)
    assert max(sizes) <= 32 < sum(sizes) == len(phantoms)
    whole = real(detector, batches.to_float(data.images), data.fields['region_boxes']) * data.fields['region_valid'][..., None]
    assert torch.allclose(data.fields['region_features'].float(), whole, rtol=1e-3, atol=1e-4)
    monkeypatch.setattr(batches, 'MAX_IN_MEMORY', 1000)
    mapped = describe_regions(detector, data.images, data.fields['region_boxes'], data.fields['region_valid'], tmp_path)
    assert torch.equal(mapped, data.fields['region_features']) and not list(tmp_path.iterdir())


def test_beyond_float16_is_its_largest_number():
    assert batches._half(torch.tensor([1e6, -1e6, .5])).tolist() == [65504, -65504, .5]


@pytest.mark.parametrize('objective, source, fields',
                         [('itc', 'detector', set()), ('itc_itm_lm', 'detector', set()), ('itc_itm_lm_ecls', 'detector', set()),
                          ('gk', 'detector', {'boxes', 'valid', 'scores', 'features'}),
                          ('gk_without_ecls', 'detector', {'boxes', 'valid', 'scores', 'features'}),
                          ('gk', 'vit', {'boxes', 'valid', 'scores'}), ('gk', 'none', {'boxes', 'valid', 'scores'})])
def test_pretraining_detects_what_its_objective_reads(phantoms, detector, tmp_path, monkeypatch, objective, source, fields):
    monkeypatch.setattr(experiments, 'cache_dir', lambda: tmp_path)
    c = ModelConfig(objective=objective, region_source=source, image_size=64, dim=32, image_depth=1, text_depth=1, encoder_depth=1,
                    decoder_depth=1, embed_dim=32, heads=2, max_length=24)
    tok = train_tokenizer([s.report for s in phantoms] + prompt_book()[0], 300)
    data = experiments.study_set(phantoms, 'train', tok, detector, c, 1., 0)
    assert {k.removeprefix('region_') for k in data.fields if k.startswith('region_')} == fields
    model = GKMVLP(replace(c, detector_dim=8), tok).train()
    assert torch.isfinite(model(data[list(range(6))])['loss']), 'what is left out is not read'


@pytest.mark.parametrize('method, need', [('pixels', set()), ('scratch', set()), ('itc', set()),
                                          ('itc_itm_lm', {'boxes', 'valid', 'scores'}), ('gk', {'boxes', 'valid', 'scores', 'features'})])
def test_classification_detects_what_its_rows_read(phantoms, detector, tmp_path, monkeypatch, method, need):
    monkeypatch.setattr(experiments, 'cache_dir', lambda: tmp_path)
    t = experiments.ClassificationTask(phantoms, 'phantom', method, 100., 0, {'model': {'image_size': 64}}, detector, 0.)
    assert {k.removeprefix('region_') for k in t.sets['train'].fields if k.startswith('region_')} == need


def test_a_box_moved_out_of_the_picture_is_not_valid():
    s = [Study(f'{i}', 'p', np.full((64, 64), 90, np.uint8), regions={'right lung': (.2, .2, .6, .8), 'left lung': (.985, .2, .999, .8)})
         for i in range(60)]
    data = StudySet(s, None, 64, augment_strength=1.)
    b = data[list(range(60))]
    there = (b['region_boxes'][..., 2:] > b['region_boxes'][..., :2]).all(-1)
    assert torch.equal(b['region_valid'], there) and 0 < (~there & data.fields['region_valid']).sum() < 60, (
        'some leave the picture, some do not')
    assert data.fields['region_valid'].sum() == 120, 'the next epoch starts from what was found'


# ---- hashes of pictures

@pytest.fixture
def files(tmp_path):
    (tmp_path/'p').mkdir(); out = [tmp_path/f'p/{i}.png' for i in range(140)]
    for i, p in enumerate(out): Image.fromarray(np.full((20, 30), i, np.uint8)).save(p)
    return out


def studies_of(files): return [Study(p.stem, p.stem, image=p) for p in files]


def test_hashes_are_kept_and_no_known_file_is_opened(files, tmp_path, monkeypatch):
    s = [*studies_of(files), Study('array', 'a', np.full((20, 30), 3, np.uint8)), Study('none', 'n')]
    plain = picture_hashes(s); assert plain[-2] == plain[3] and plain[-1] == ''
    assert picture_hashes(s, cache_dir=tmp_path/'c') == plain
    opened, real = [], registry.load_image
    monkeypatch.setattr(registry, 'load_image', lambda p: opened.append(p) or real(p))
    assert picture_hashes(s, cache_dir=tmp_path/'c') == plain and not [p for p in opened if isinstance(p, Path)]
    Image.fromarray(np.full((20, 31), 200, np.uint8)).save(files[4]); os.utime(files[5], ns=(5, 5))
    changed = picture_hashes(s, cache_dir=tmp_path/'c')
    assert ([i for i, (a, b) in enumerate(zip(plain, changed, strict=True)) if a != b] == [4]
            and {p for p in opened if isinstance(p, Path)} == {files[4], files[5]})
    opened.clear(); assert picture_hashes(s, cache_dir=tmp_path/'c') == changed and not [p for p in opened if isinstance(p, Path)]


def test_processes_find_the_same_hashes_and_errors(files, tmp_path, monkeypatch):
    plain = picture_hashes(studies_of(files))
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 2); monkeypatch.setattr(registry, 'PART', 50)
    pools, real = [], registry.ProcessPoolExecutor
    monkeypatch.setattr(registry, 'ProcessPoolExecutor', lambda n: pools.append(n) or real(n))
    assert picture_hashes(studies_of(files), cache_dir=tmp_path/'c') == plain and pools == [2]
    for p in (files[120], files[90]): p.write_bytes(p.read_bytes()[:40])
    with pytest.raises(GKError) as alone: registry.load_image(files[90])
    for where in (None, tmp_path/'c', tmp_path/'new', tmp_path/'new'):
        with pytest.raises(GKError) as err: picture_hashes(studies_of(files), cache_dir=where)
        assert (str(err.value), err.value.what, err.value.remedy) == (str(alone.value), alone.value.what, alone.value.remedy), (
            'the first in order, in the same words')
        got = picture_hashes(studies_of(files), 'skip', cache_dir=where)
        assert [i for i, h in enumerate(got) if h != plain[i]] == [90, 120] and got[90] == got[120] == ''
    kept = registry.HashCache(tmp_path/'new'); assert kept[files[60]] == plain[60] and not kept[files[90]]


def test_a_stopped_job_keeps_what_it_has(files, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, 'PART', 50)
    real = registry.load_image
    def stop(p):
        if p == files[70]: raise KeyboardInterrupt
        return real(p)
    monkeypatch.setattr(registry, 'load_image', stop)
    with pytest.raises(KeyboardInterrupt): picture_hashes(studies_of(files), cache_dir=tmp_path/'c')
    kept = registry.HashCache(tmp_path/'c'); assert [bool(kept[p]) for p in files] == [True] * 70 + [False] * 70


def _job(files, folder, start, count):
    real = registry.load_image
    def counted(p):
        with count.get_lock(): count.value += 1
        return real(p)
    registry.load_image = counted
    start.wait(); picture_hashes(studies_of(files), cache_dir=folder)


def test_two_jobs_at_once_share_the_work(files, tmp_path):
    c = multiprocessing.get_context('fork'); start, count = c.Barrier(2), c.Value('i', 0)
    jobs = [c.Process(target=_job, args=(files, tmp_path/'c', start, count)) for _ in range(2)]
    for j in jobs: j.start()
    for j in jobs: j.join(60); assert j.exitcode == 0
    assert count.value == len(files) and [registry.HashCache(tmp_path/'c')[p] for p in files] == picture_hashes(studies_of(files))


def test_hashes_that_cannot_be_kept_cost_the_cache_only(files, tmp_path):
    (tmp_path/'c').write_text('a file')
    with pytest.warns(UserWarning, match='not kept'):
        assert picture_hashes(studies_of(files[:5]), cache_dir=tmp_path/'c') == picture_hashes(studies_of(files[:5]))


def test_a_data_set_is_the_same_with_and_without_the_cache(files, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, '_REGISTRY', dict(registry._REGISTRY))
    views = [replace(s, other_views=(files[100 + i],)) for i, s in enumerate(studies_of(files[:20]))]
    registry.register('mine', lambda root, bad='raise': [replace(s) for s in views])
    plain = registry.data_fingerprint(load_dataset('mine'))
    for _ in range(2): assert registry.data_fingerprint(load_dataset('mine', cache_dir=tmp_path/'c')) == plain
    monkeypatch.setattr(registry, 'load_image', lambda p: pytest.fail('decoded again'))
    assert registry.data_fingerprint(load_dataset('mine', cache_dir=tmp_path/'c')) == plain
    monkeypatch.undo(); files[103].write_bytes(files[103].read_bytes()[:30])
    registry.register('mine', lambda root, bad='raise': [replace(s) for s in views], replace=True)
    try:
        with pytest.raises(GKError, match='103.png'): load_dataset('mine', cache_dir=tmp_path/'c')
        with pytest.warns(UserWarning, match='1 broken further view'): s = load_dataset('mine', bad='skip', cache_dir=tmp_path/'c')
        assert len(s) == 20 and s[3].other_views == () and s[4].other_views == (files[104],)
    finally: registry._REGISTRY.pop('mine')


# ---- labels

NIH = ['effusion', 'mass', 'any_finding']


@pytest.fixture(scope='module')
def nih(phantoms):
    "Phantoms with labels as NIH writes them, and a box of an effusion."
    out = []
    for i, s in enumerate(phantoms):
        y = {n: int((i + k) % 3 == 0) for k, n in enumerate(NIH)}
        out.append(replace(s, labels=y, findings=[FindingBox('pleural effusion', (.2, .2, .5, .6))] if y['effusion'] else [], report=''))
    return out


@pytest.fixture(scope='module')
def checkpoint(phantoms, tmp_path_factory):
    torch.manual_seed(0)
    c = ModelConfig(region_source='vit', image_size=64, dim=32, image_depth=1, text_depth=1, encoder_depth=1, decoder_depth=1, embed_dim=32,
                    heads=2, max_length=24)
    return str(GKMVLP(c, train_tokenizer([s.report for s in phantoms] + prompt_book()[0],
                                         300)).save_pretrained(tmp_path_factory.mktemp('m')/'model'))


SETTINGS = {'model': {'image_size': 64, 'patch_size': 8, 'region_source': 'vit'}}


def test_labels_of_a_preset(nih):
    assert (experiments.asked_labels(SETTINGS, 'nih', nih) is None
            and experiments.asked_labels({'classes': {'nih': ['mass']}}, 'nih', nih) == ['mass'])
    for wrong in (['mas'], []):
        with pytest.raises(GKError, match='classes of nih'): experiments.asked_labels({'classes': {'nih': wrong}}, 'nih', nih)
    t = lambda s: experiments.ClassificationTask(nih, 'nih', 'pixels', 100., 0, SETTINGS | s, None, 0.).names
    assert t({}) == sorted(NIH) and t({'classes': {'nih': ['mass', 'effusion']}}) == ['mass', 'effusion']


def test_presets_name_what_they_classify():
    assert load_preset('public').classes == {'nih': ['any_finding'], 'rsna': ['pneumonia']}
    from gk_mvlp.data.nih import NIH_FINDINGS
    assert tuple(load_preset('paper').classes['nih']) == NIH_FINDINGS
    assert all(not load_preset(p).classes for p in ('smoke', 'mini', 'full'))


def test_ecls_scores_every_label_that_is_an_entity(nih, checkpoint, tmp_path):
    for asked, scored in ((None, {'effusion', 'mass'}), (['mass'], {'mass'}), (['any_finding'], set())):
        settings = SETTINGS | ({'classes': {'nih': asked}} if asked else {})
        r = task_runs.TaskRun('zero_shot', nih, 'nih', 'gk', 100., 0, settings, checkpoint=checkpoint)
        f = task_runs.run_zero_shot(r, TrainConfig(epochs=1, batch_size=8, lr=1e-3), tmp_path)
        assert set(f[f['protocol'] == 'ecls']['label']) == scored and set(f[f['protocol'] == 'ensemble']['label']) == set(asked or NIH)
        truth = {(s.study_id, n): v for s in nih for n, v in s.labels.items()}
        assert all(truth[k] == y for k, y in zip(zip(f['study_id'], f['label'], strict=True), f['y'], strict=True))


def test_boxes_are_found_under_the_label_of_the_data_set(nih, checkpoint, tmp_path):
    import pandas as pd
    for method in ('gk', task_runs.BASELINE):
        r = task_runs.TaskRun('zero_shot', nih, 'nih', method, 100., 0, SETTINGS, checkpoint=checkpoint)
        (tmp_path/'maps.parquet').unlink(missing_ok=True)
        task_runs.run_zero_shot(r, TrainConfig(epochs=1, batch_size=8, lr=1e-3), tmp_path)
        assert set(pd.read_parquet(tmp_path/'maps.parquet')['label']) == {'pleural effusion'}
    r = task_runs.TaskRun('zero_shot', nih, 'nih', 'gk', 100., 0, SETTINGS | {'classes': {'nih': ['effusion', 'any_finding']}},
                          checkpoint=checkpoint)
    p = Probing(r, ProbeConfig(detailed=(), reports=False), [100.])
    p.config = replace(p.config, detailed=('gk',))                            # for the priors of maps
    assert set(probe_maps(p)['label']) == {'pleural effusion'}
    f = probe_predictions(p)
    assert (set(f[f['protocol'] == 'ecls']['label']) == {'effusion'}
            and set(f[f['protocol'] == 'zero_shot']['label']) == {'effusion', 'any_finding'})
    run_probing(p, tmp_path)
    assert set(pd.read_parquet(tmp_path/'areas.parquet')['label']) == {'effusion'}, 'areas go with the labels of the scores'


# ---- the graph

def snakemake_settings() -> dict[str, str]:
    "{rule: its expression of settings}."
    text = (ROOT/'Snakefile').read_text()
    return {m[1]: m[2] for m in re.finditer(r'^rule (\w+):(?:(?!^rule )[\s\S])*?\bsettings=([\s\S]+?)\n    \w+:', text, re.M)}


def test_every_rule_sees_its_data_sets_options_and_labels():
    p = replace(load_preset('smoke'), detector_dataset='d', pretrain_dataset='d')
    found = snakemake_settings()
    assert set(found) == {'detector', 'pretrain', 'classification', 'task', 'probing'}
    def value(text, preset):
        v = eval(text, {'json': json, 'P': preset, 'SETTINGS': asdict(preset), 'finetune_section': finetune_section})
        return v(types.SimpleNamespace(dataset='d', task='vqa')) if callable(v) else v
    for rule, text in found.items():
        other = lambda **k: value(text, replace(p, **k))
        assert other(dataset_options={'d': {'variant': 'original'}}) != value(text, p), f'{rule} does not see dataset_options'
        assert other(dataset_options={'e': {'variant': 'original'}}) == value(text, p), (
            f'{rule} is run again for options of another data set')
        if rule not in ('detector', 'pretrain'): assert other(classes={'d': ['mass']}) != value(text, p), f'{rule} does not see classes'
        trains = {'classification': 'classification', 'task': 'vqa'}.get(rule)
        for task in ('classification', 'vqa', 'localization'):
            seen = other(task_finetune={task: {'lr': .01}}) != value(text, p)
            assert seen == (task == trains), f'{rule}, {task}: how a task trains concerns its own runs alone'


@pytest.mark.parametrize('objective, writes', [('itc', False), ('itc_itm_lm', True)])
def test_only_a_decoder_that_was_taught_writes_reports(phantoms, tmp_path, objective, writes):
    torch.manual_seed(0)
    c = ModelConfig(objective=objective, image_size=64, dim=32, image_depth=1, text_depth=1, encoder_depth=1, decoder_depth=1, embed_dim=32,
                    heads=2, max_length=24)
    model = GKMVLP(c, train_tokenizer([s.report for s in phantoms], 300)).save_pretrained(tmp_path/'model')
    r = task_runs.TaskRun('zero_shot', phantoms, 'phantom', objective, 100., 0, SETTINGS, checkpoint=str(model))
    run_probing(Probing(r, ProbeConfig(detailed=(), jitter=(), drop=(), swap=()), [100.]), tmp_path)
    assert (tmp_path/'predictions.parquet').is_file() and (tmp_path/'reports.parquet').is_file() == writes
