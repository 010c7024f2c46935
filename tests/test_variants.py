"Ablations, sweeps and probing: each option does what its name says, and each metric agrees with an independent one."
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from gk_mvlp.config import load_preset
from gk_mvlp.data.images import to_float
from gk_mvlp.data.knowledge import ENTITIES
from gk_mvlp.data.phantom import PhantomConfig, make_study
from gk_mvlp.data.study import Study, study_to_dict
from gk_mvlp.evaluation.relations import relation_frame, relation_metrics, relation_pairs
from gk_mvlp.evaluation.statistics import patient_weights
from gk_mvlp.evaluation.subgroups import (frequency_masks, gap_and_worst, group_frame, group_values, patient_masks, sensitivity_weighted,
                                          size_masks)
from gk_mvlp.models.detector import DetectorConfig, RegionDetector
from gk_mvlp.models.encoders import train_tokenizer
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.paths import GKError
from gk_mvlp.study import study_tables as T
from gk_mvlp.study.experiments import pretraining_studies
from gk_mvlp.study.launch import check_preset, pretrain_jobs, probing_jobs
from gk_mvlp.study.probing import ProbeConfig, disturb, kinds_of, swap_places
from gk_mvlp.tasks.classification import features_by_kind
from gk_mvlp.study.study_figures import judged_sentences
from gk_mvlp.study.variants import variants
from gk_mvlp.tasks.zero_shot import attention_maps
from gk_mvlp.training.batches import StudySet, true_regions

R = 29


@pytest.fixture(scope='module')
def tok(): return train_tokenizer(prompt_book()[0], vocab_size=500)


@pytest.fixture(scope='module')
def phantoms(): return [make_study(PhantomConfig(n=120, size=64, seed=3), i) for i in range(120)]


def make(tok, **kw):
    torch.manual_seed(0)
    return GKMVLP(ModelConfig(**{'dim': 32, 'image_depth': 1, 'text_depth': 1, 'encoder_depth': 1, 'decoder_depth': 1, 'embed_dim': 16,
                                 'detector_dim': 8, 'heads': 2, **kw}), tok).eval()


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(5)
    xy = torch.rand(4, R, 2, generator=g) * .5
    return {'images': torch.randn(4, 1, 64, 64, generator=g), 'region_boxes': torch.cat([xy, xy + .3], -1),
            'region_valid': torch.rand(4, R, generator=g) < .8,
            'region_features': torch.randn(4, R, 8, generator=g), 'oracle_prompts': torch.tensor([[0, 5], [3, -1], [-1, -1], [4, 2]])}


# ---- options of the model

def depends(model, batch, **changed) -> bool:
    with torch.no_grad(): return not torch.allclose(model.features(batch, 'gk'), model.features(batch | changed, 'gk'), atol=1e-5)


@pytest.mark.parametrize('options, boxes, features',
                         [({}, True, True), ({'region_source': 'vit'}, True, False), ({'region_source': 'none'}, False, False)])
def test_region_source_says_what_regions_are_made_of(tok, batch, options, boxes, features):
    m = make(tok, **options)
    assert (depends(m, batch, region_boxes=batch['region_boxes'] * .7) == boxes
            and depends(m, batch, region_features=batch['region_features'].flip(-1)) == features)
    assert depends(m, batch, region_valid=torch.ones(4, R, dtype=torch.bool)) == boxes, (
        'queries that know no place do not know which regions were found')


@pytest.mark.parametrize('local, fused', [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_without_local_layers_no_prompt_is_read_and_nothing_idles(tok, batch, local, fused):
    m = make(tok, local_layers=local, fused_layers=fused)
    with torch.no_grad(): a, b, c = (m.features(batch, k) for k in ('gk_null', 'gk_all', 'gk_shuffled'))
    assert torch.allclose(a, b, atol=1e-5) == torch.allclose(b, c, atol=1e-5) == (local == 0)
    assert (m.config.prompted, m.config.mapped) == (local == 1, local == fused == 1)
    z = m.ground(m.image_encoder(batch['images']), batch, 'all', need_maps=True)
    assert ('prompt_attention' in z) == (local == 1) and ('patch_attention' in z) == (fused == 1)
    enc = tok(prompt_book()[0][:4], padding=True, return_tensors='pt')
    m.train()(batch | dict(enc) | {'report_key': torch.arange(4), 'study_key': torch.arange(4),
                                   'entities': torch.randint(-1, 2, (4, len(ENTITIES))).float()})['loss'].backward()
    assert {n for n, p in m.named_parameters() if p.grad is None} <= {'entity_bias'}, (
        'a part without a gradient would stop distributed training')


def test_supervised_attention_needs_attention():
    with pytest.raises(GKError, match='no attention to supervise'): ModelConfig(attention_weight=1., local_layers=0)
    with pytest.raises(GKError, match='boxes'): ModelConfig(boxes='drawn')


def test_feature_kinds_are_prompt_modes(tok, batch):
    m = make(tok, prompts='all')
    with torch.no_grad(): f = {k: m.features(batch, k) for k in ('gk', 'gk_all', 'gk_predicted', 'gk_oracle', 'gk_null')}
    assert (torch.equal(f['gk'], f['gk_all']) and not torch.allclose(f['gk_predicted'], f['gk_all'])
            and not torch.allclose(f['gk_oracle'], f['gk_null']))
    assert torch.allclose(f['gk_oracle'][2], f['gk_null'][2], atol=1e-5), 'a study that states nothing has no oracle prompt'
    with pytest.raises(GKError, match='own entities'): m.features({k: v for k, v in batch.items() if k != 'oracle_prompts'}, 'gk_oracle')


def test_shuffled_prompts_are_those_of_the_study_before(tok, batch):
    m = make(tok)
    with torch.no_grad():
        v = m.image_encoder(batch['images'])
        own, other = (m.ground(v, batch, 'predicted', shuffle=s) for s in (False, True))
        assert torch.equal(other['prompt_numbers'], own['prompt_numbers'].roll(1, 0))
        one = {k: x[:1] for k, x in batch.items()}
        assert torch.allclose(m.features(one, 'gk_shuffled'), m.features(one, 'gk_null'), atol=1e-6), (
            'a study alone has no other to take prompts from')
    with pytest.raises(GKError, match='same prompts'): make(tok, prompts='all').features(batch, 'gk_shuffled')


def test_controls_of_attention_maps(tok, phantoms):
    data, names = StudySet(phantoms[:5], None, 64), ['pneumothorax', 'nodule', 'mass']
    m = make(tok, region_source='vit')
    null = attention_maps(m, data, names, 'null')
    assert np.array_equal(null[:, 0], null[:, 1]), 'the null prompt knows no finding'
    assert not np.allclose(attention_maps(m, data, names), attention_maps(m, data, names, 'shuffled')) and np.ptp(null[:, 0]) > 0
    with pytest.raises(GKError, match='no attention'): attention_maps(make(tok, region_source='vit', fused_layers=0), data, names)
    with pytest.raises(GKError, match='control'): attention_maps(m, data, names, 'zero')


def test_true_boxes_are_described_like_found_ones(phantoms):
    torch.manual_seed(0)
    detector = RegionDetector(DetectorConfig(feature_dim=8)).eval()
    data = StudySet(phantoms[:6], None, 64, detector=detector, true_boxes=True)
    boxes, valid = true_regions(phantoms[:6], [type('F', (), {'to_frame': staticmethod(lambda b: b)})] * 6)
    assert np.allclose(data.fields['region_boxes'], boxes, atol=1e-5) and np.array_equal(data.fields['region_valid'], valid)
    images = to_float(data.images)
    found = detector.detect(images)
    assert torch.allclose(detector.describe(images, found['boxes']) * found['valid'][..., None], found['features'], atol=1e-5)
    assert torch.allclose(data.fields['region_features'].float(),
                          detector.describe(images, torch.from_numpy(boxes)) * torch.from_numpy(valid)[..., None], rtol=1e-3, atol=1e-4)


# ---- data

def test_a_shifted_group_changes_training_patients_only():
    base = PhantomConfig(n=160, size=32, seed=1)
    a, b = ([make_study(c, i) for i in range(base.n)] for c in (base, replace(base, train_women=.05)))
    for s, t in zip(a, b):
        assert s.split == t.split and s.labels == t.labels
        if s.split != 'train': assert np.array_equal(s.image, t.image) and study_to_dict(s) == study_to_dict(t)
    share = lambda x: np.mean([s.sex == 'F' for s in x if s.split == 'train'])
    assert share(b) < .15 < .3 < share(a) and all(t.sex == 'M' for s, t in zip(a, b) if s.sex == 'M')
    with pytest.raises(GKError, match='women'): PhantomConfig(train_women=1.5)


def test_less_pre_training_data_is_nested_and_leaves_the_other_splits(phantoms):
    by = {r: pretraining_studies(phantoms, r, 0) for r in (10., 50., 100.)}
    ids = {r: {s.study_id for s in v if s.split == 'train'} for r, v in by.items()}
    assert ids[10.] < ids[50.] < ids[100.] and len({tuple(s.study_id for s in v if s.split != 'train') for v in by.values()}) == 1
    assert len({s.study_id for s in by[100.]}) == len(phantoms)


# ---- a worse detector

def test_swapping_is_a_cycle_through_the_chosen():
    g = torch.Generator().manual_seed(0)
    chosen = torch.rand(300, R, generator=g) < .3
    to = swap_places(chosen, g)
    for c, t in zip(chosen.numpy(), to.numpy()):
        assert sorted(t) == list(range(R)) and (t[~c] == np.flatnonzero(~c)).all()
        if c.sum() > 1:
            i, seen = np.flatnonzero(c)[0], []
            while i not in seen: seen.append(i); i = t[i]
            assert sorted(seen) == np.flatnonzero(c).tolist()


def test_disturbances(batch):
    g = lambda: torch.Generator().manual_seed(1)
    a = disturb(batch, 'swap', .5, g())
    for i in range(4):                                       # a region keeps box, features and validity together
        rows = {tuple(np.r_[b.numpy(), f.numpy(), v.item()].round(4))
                for b, f, v in zip(batch['region_boxes'][i], batch['region_features'][i], batch['region_valid'][i])}
        assert rows == {tuple(np.r_[b.numpy(), f.numpy(), v.item()].round(4))
                        for b, f, v in zip(a['region_boxes'][i], a['region_features'][i], a['region_valid'][i])}
    d = disturb(batch, 'drop', .4, g())
    assert (not (d['region_valid'] & ~batch['region_valid']).any() and d['region_valid'].sum() < batch['region_valid'].sum()
            and torch.equal(d['region_boxes'], batch['region_boxes']))
    seen = []
    j = disturb(batch, 'jitter', .3, g(), lambda boxes: seen.append(boxes) or torch.ones(4, R, 8))
    ok = batch['region_valid']
    assert torch.equal(seen[0], j['region_boxes']) and torch.equal(j['region_features'], ok[..., None].expand(-1, -1, 8).float()), (
        'the features are those of the moved boxes')
    assert ((j['region_boxes'][ok][:, 2:] - j['region_boxes'][ok][:, :2] > .019).all() and j['region_boxes'].min() >= 0
            and j['region_boxes'].max() <= 1.0001)
    assert torch.equal(disturb(batch, 'jitter', .3, g(), lambda b: b)['region_boxes'], j['region_boxes']), 'the same seed, the same noise'
    with pytest.raises(GKError, match='describe'): disturb(batch, 'jitter', .1, g())
    with pytest.raises(GKError, match='blur'): disturb(batch, 'blur', .1, g())
    with pytest.raises(GKError, match='levels above 0'): ProbeConfig(drop=(1.5,))


def test_features_of_many_kinds_are_those_of_one(tok, phantoms):
    m = make(tok, region_source='vit'); data = StudySet(phantoms[:9], m.tokenizer, 64, 32)
    kinds = kinds_of(m, True, True)
    x = features_by_kind(m, data, list(kinds))
    b = data[list(range(9))]
    with torch.no_grad():
        for k in kinds: assert np.allclose(x[k], m.features(b, k), atol=1e-4), k
    assert (next(iter(kinds.items())) == ('gk', '') and 'gk_oracle' not in kinds_of(m, True, False)
            and list(kinds_of(make(tok, objective='itc'), False, True)) == ['image', 'roi'])


# ---- grounding by pairs

def test_relation_metrics_by_brute_force(phantoms):
    train, test = phantoms[:60], phantoms[60:]
    pairs = relation_pairs(train)
    rng = np.random.default_rng(0)
    truth = np.stack([s.relation_matrix() == 1 for s in test])
    scores = (truth * .3 + rng.random(truth.shape)).round(2)
    f = relation_frame(test, pairs, {'attention': scores}, train)
    got = relation_metrics(f, 'attention', least=2)
    within = [roc_auc_score(g['y'], g['attention']) for _, g in f.groupby(['region', 'entity']) if g['y'].sum() >= 2]
    assert np.isclose(got['grounding_auroc'][0], np.mean(within)) and got['pairs'][0] == len(within)
    assert np.isclose(got['grounding_auroc_pooled'][0], roc_auc_score(f['y'], f['attention']))
    hits = []
    for _, g in f.groupby(['study_id', 'entity']):
        if g['y'].any(): top = g['attention'] >= g['attention'].max() - 1e-12; hits.append((top & g['y']).sum() / top.sum())
    assert np.isclose(got['grounding_pointing'][0], np.mean(hits))
    prior = relation_metrics(f, 'train_prior', least=2)
    assert prior['grounding_auroc'][0] == .5 and np.isclose(prior['grounding_auroc_pooled'][0], roc_auc_score(f['y'], f['train_prior']))
    w = np.random.default_rng(1).integers(0, 3, (2, len(test))).astype(float)
    for row, pooled in zip(w, relation_metrics(f, 'attention', w, least=2)['grounding_auroc_pooled']):
        k = np.repeat(row.astype(int), len(pairs))
        assert np.isclose(pooled, roc_auc_score(np.repeat(f['y'], k), np.repeat(f['attention'], k)))
    with pytest.raises(GKError, match='not finite'): relation_frame(test, pairs, {'attention': scores * np.nan}, train)
    with pytest.raises(GKError, match='whole studies'): relation_metrics(f.iloc[1:], 'attention')


# ---- subgroups

def test_groups_are_the_metric_of_their_members():
    rng = np.random.default_rng(0)
    y = (rng.random((200, 4)) < [.3, .2, .4, .01]).astype(float); s = (y * .4 + rng.random(y.shape)).round(2)
    sex = np.array(['F', 'M', ''])[rng.integers(0, 3, 200)]
    masks, ok = patient_masks(y, sex)
    assert set(masks) == {'F', 'M'} and ok.tolist() == [True, True, True, False], (
        'an unknown sex is no group; a class too rare in one group is left out of both')
    v = group_values(masks, ok, s, np.ones((1, 200)), np.full(4, .7))
    for g in 'FM':
        assert np.isclose(v['auroc'][g][0], np.mean([roc_auc_score(y[sex == g, c], s[sex == g, c]) for c in range(3)]))
        assert np.isclose(v['sensitivity'][g][0], np.mean([(s[(sex == g) & (y[:, c] == 1), c] >= .7).mean() for c in range(3)]))
    x = gap_and_worst(v['auroc'])
    assert (np.isclose(x['gap'][0], abs(v['auroc']['F'][0] - v['auroc']['M'][0]))
            and x['worst'][0] == min(v['auroc']['F'][0], v['auroc']['M'][0]))
    assert patient_masks(y, ['F'] * 200)[0] == {} and patient_masks(y, [''] * 200)[0] == {}


def test_sizes_share_their_negatives_and_frequencies_their_studies():
    rng = np.random.default_rng(0)
    y = (rng.random((300, 4)) < [.3, .2, .1, .05]).astype(float); area = np.where(y == 1, rng.random(y.shape), np.nan)
    masks, ok = size_masks(y, area, np.full(4, .5))
    for c in np.flatnonzero(ok):
        assert (all((masks[k][:, c] == 0).sum() == (y[:, c] == 0).sum() for k in masks)
                and (masks['small'][:, c] == 1).sum() + (masks['large'][:, c] == 1).sum() == (y[:, c] == 1).sum())
        assert np.nanmax(area[masks['small'][:, c] == 1, c]) <= .5 < np.nanmin(area[masks['large'][:, c] == 1, c])
    masks, _ = frequency_masks(y, np.array([.3, .2, .1, .05]))
    assert (np.isnan(masks['rare'][:, :2]).all() and np.array_equal(masks['rare'][:, 2:], y[:, 2:])
            and np.array_equal(masks['common'][:, :2], y[:, :2]))
    with pytest.raises(GKError, match='threshold'): sensitivity_weighted(y, y, np.ones((1, 300)), np.full(4, np.nan))


def test_ages_fall_into_bands():
    f = group_frame([Study(str(i), 'p', age=a) for i, a in enumerate((39., 40., 59.9, 60., 75., None))])
    assert f['age'].tolist() == ['under 40', '40 to 59', '40 to 59', '60 to 74', '75 and over', '']


# ---- presets

SMALL = {'ablations': {'local_only': {'model': {'fused_layers': 0}}},
         'sweeps': {'studies': {'table': 'scaling', 'base': 100, 'levels': {25: {'pretrain_ratio': 25.}}}}, 'probing': {'jitter': [.1]}}


def test_variants_become_jobs():
    p = replace(load_preset('smoke'), **SMALL, seeds=(0, 1))
    check_preset(p)
    assert ({'gk-local_only-s1', 'itc_itm_lm-studies_25-s0', 'gk-s0'} <= set(pretrain_jobs(p))
            and not any('pixels' in j or 'scratch' in j for j in pretrain_jobs(p)))
    assert set(probing_jobs(p)) == {f'phantom-{j}' for j in pretrain_jobs(p)}
    only = replace(p, probing={'methods': ['gk']})
    assert 'phantom-itc_itm_lm-s0' not in probing_jobs(only) and 'phantom-gk-local_only-s0' in probing_jobs(only)
    assert probing_jobs(replace(p, probing={}, ablations={}, sweeps={})) == []


@pytest.mark.parametrize('change, says', [
    ({'ablations': {'x': {'model': {'fused_layer': 0}}}}, 'fused_layer'), ({'ablations': {'x': {'epochs': 3}}}, 'epochs'),
    ({'ablations': {'X y': {}}}, 'name'), ({'ablations': {'x': {'objective': 'scratch'}}}, 'scratch'),
    ({'ablations': {'x': {'data': {'boilerplate': 2.}}}}, 'boilerplate'), ({'ablations': {'x': {'pretrain_ratio': 0.}}}, 'pretrain_ratio'),
    ({'probing': {}}, 'nothing asks'), ({'probing': {'jiter': [.1]}}, 'jiter'),
    ({'probing': {'methods': ['pixels']}}, 'pixels'), ({'methods': ('scratch', 'itc_itm_lm')}, 'is no'),
    ({'sweeps': {'n': {'table': 'scaling', 'base': 1., 'levels': {2: {}}, 'seeds': [7]}}}, 'seed 7')])
def test_wrong_variants_stop_before_the_first_job(change, says):
    with pytest.raises(GKError, match=says): check_preset(replace(load_preset('smoke'), **(SMALL | change)))


# ---- tables

def cell(method, strength, seeds=(0, 1, 2), **kw):
    rng = np.random.default_rng(0)
    y = (rng.random((150, 3)) < .35).astype(float); noise = rng.normal(size=(len(seeds), 150, 3))
    p = 1 / (1 + np.exp(-(strength * y + noise + .05 * np.random.default_rng(len(method)).normal(size=noise.shape))))
    return T.ProbeCell('phantom', method, 'linear_probe', 100., y, p, np.array([f'p{i // 2}' for i in range(150)], dtype=object), seeds,
                       tuple(f'probing/{method}-s{s}' for s in seeds), {}, np.full((len(seeds), 3), .5), ('a', 'b', 'c'), **kw)


def test_ablations_are_paired_with_the_method_and_corrected():
    p = replace(load_preset('smoke'), ablations={'worse': {}, 'same': {}}, ratios=(100.,), seeds=(0, 1, 2))
    values = T.probe_values([cell('gk', 2.), cell('gk-worse', 1.), cell('gk-same', 2.), cell('gk-oracle_prompts', 3.)], 400)
    t = T.ablation_table(values, p).set_index('method')
    assert ({'task', 'dataset', 'ratio', 'metric', 'mean', 'low', 'high', 'seeds', 'n'} <= set(t.columns) and t.index[0] == 'gk'
            and np.isnan(t.loc['gk', 'difference']))
    for m, strength in (('gk', 2.), ('gk-worse', 1.)):
        c = cell(m, strength)
        assert np.isclose(t.loc[m, 'mean'], np.mean([roc_auc_score(c.y, s, average='macro') for s in c.scores]))
    assert (t.loc['gk-worse', 'verdict'] == 'lower' and t.loc['gk-same', 'verdict'] == ''
            and np.isclose(t.loc['gk-worse', 'difference'], t.loc['gk-worse', 'mean'] - t.loc['gk', 'mean']))
    assert (t['p_holm'].dropna() >= t['p'].dropna()).all() and 'upper bound' in t.loc['gk-oracle_prompts', 'note']
    assert ('p = ' in T.study_report(t.reset_index(), 'ablation', '')
            and 'gk-worse' in T.study_latex(t.reset_index(), 'ablation').replace('\\', ''))


def test_sweeps_carry_their_base_and_pair_with_fewer_seeds():
    sweep = {'noise': {'table': 'robustness', 'base': .5, 'levels': {0: {}}, 'seeds': [0, 1]}}
    p = replace(load_preset('smoke'), sweeps=sweep, ratios=(100.,), seeds=(0, 1, 2))
    two = (0, 1)
    cells = [cell('gk', 2.), cell('itc_itm_lm', 1.5), cell('gk-noise_0', 2.5, two), cell('itc_itm_lm-noise_0', 1.5, two),
             cell('gk-image_only', 1.7), cell('gk', 1.8, factor='drop', level=.5)]
    t = T.robustness_table(T.probe_values(cells, 400), p)
    swept = t[t['factor'] == 'noise'].set_index(['method', 'level'])
    assert (len(swept) == 4 and swept.loc[('gk', 0.), 'reference'] == 'itc_itm_lm'
            and swept.loc[('gk', 0.), 'difference'] > swept.loc[('gk', .5), 'difference'] > 0 and swept.loc[('gk', 0.), 'seeds'] == 2)
    drop = t[t['factor'] == 'drop'].set_index('level')
    assert (drop.loc[0., 'mean'] > drop.loc[.5, 'mean'] and drop.loc[.5, 'reference'] == 'gk-image_only'
            and np.isclose(drop.loc[0., 'mean'], swept.loc[('gk', .5), 'mean']))
    with pytest.raises(GKError, match='share no seed'): T.difference(*(v.at(k) for v, k in zip(T.probe_values(cells[:2], 50), ([0], [1]))))


def test_growth_is_the_gain_at_the_highest_level_minus_the_gain_at_the_lowest():
    sweep = {'boilerplate': {'table': 'robustness', 'base': .5, 'levels': {0: {}, .8: {}}, 'seeds': [0, 1, 2]}}
    p = replace(load_preset('smoke'), sweeps=sweep, ratios=(100.,), seeds=(0, 1, 2))
    cells = [cell('gk', 2.), cell('itc_itm_lm', 1.9), cell('gk-boilerplate_0', 2.1), cell('itc_itm_lm-boilerplate_0', 2.),
             cell('gk-boilerplate_0.8', 2.), cell('itc_itm_lm-boilerplate_0.8', .5)]
    t = T.robustness_table(T.probe_values(cells, 400), p)
    row = t[t['factor'] == 'boilerplate, highest against lowest'].iloc[0]
    gains = {v: np.mean([roc_auc_score(a.y, x, average='macro') - roc_auc_score(b.y, y, average='macro')
                         for x, y in zip(a.scores, b.scores)]) for v, a, b in ((0, cells[2], cells[3]), (.8, cells[4], cells[5]))}
    assert (row['difference'] == pytest.approx(gains[.8] - gains[0]) and row['mean'] == pytest.approx(gains[.8]) and row['p_holm'] < .05
            and row['seeds'] == 3)
    against = T.robustness_table(T.probe_values([*cells[:4], cell('gk-boilerplate_0.8', .5), cell('itc_itm_lm-boilerplate_0.8', 2.)], 400),
                                 p)
    loss = against[against['factor'] == 'boilerplate, highest against lowest'].iloc[0]
    assert loss['low'] < loss['mean'] < loss['high'] < 0, 'a difference is no share: its interval is not cut at 0'
    without = T.robustness_table(T.probe_values(cells[:4], 100), p)
    assert (not without['factor'].str.contains('highest').any()
            or without[without['factor'].str.contains('highest')]['difference'].notna().all())


def test_the_clean_row_is_tested_once_and_swaps_not_at_all():
    p = replace(load_preset('smoke'), ratios=(100.,), seeds=(0, 1, 2))
    noisy = [cell('gk', 1.8, factor=f, level=v) for f in ('drop', 'jitter', 'swap') for v in (.1, .5)]
    t = T.robustness_table(T.probe_values([cell('gk', 2.), cell('gk-image_only', 1.7), *noisy], 100), p)
    tested = t[t['p'].notna()][['factor', 'level']].apply(tuple, axis=1).tolist()
    assert (sorted(tested) == [('drop', 0.), ('drop', .1), ('drop', .5), ('jitter', .1), ('jitter', .5)]
            and t['difference'].notna().sum() == 9)


def test_prompt_recall_counts_stated_entities_among_the_chosen(tmp_path):
    "Three studies, five entities, two prompts each."
    stated = np.array([[1, 1, 0, 0, 0], [0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    score = np.array([[.9, .1, .8, 0, 0], [0, 0, .1, .8, .9], [.5, .4, .3, .2, .1]])
    ids, labels = ['a', 'b', 'c'], list('vwxyz')
    pd.DataFrame([{'study_id': i, 'subject_id': i, 'split': 'test', 'label': l, 'y': float(stated[r, c]), 'score': score[r, c],
                   'protocol': 'ecls'} for r, i in enumerate(ids) for c, l in enumerate(labels)]).to_parquet(tmp_path/'predictions.parquet')
    pd.DataFrame({'label': labels, 'prevalence': [.1, .5, .1, .1, .4]}).to_parquet(tmp_path/'prevalence.parquet')
    found = {name: (values['prompt_recall'], n) for name, _, values, n, _ in T._prompts(tmp_path, 'gk', 2, 50)}
    assert found['gk'][0][0] == 3 / 4 and found['most_frequent'][0][0] == 2 / 4 and found['gk'][1] == 3 and len(found['gk'][0]) == 51


def test_subgroup_gaps_of_gk_are_tested_against_the_reference():
    p = replace(load_preset('smoke'), ratios=(100.,), seeds=(0, 1, 2))
    a, b = cell('gk', 2.), cell('itc_itm_lm', 2.)
    half = np.arange(150) % 4 < 2
    unfair = replace(b, scores=np.where(half[:, None], b.scores, .5 + .01 * b.scores * 0))
    ids = [f's{i:03d}' for i in range(150)]
    groups = pd.DataFrame({'study_id': ids, 'split': 'test', 'sex': np.where(half, 'F', 'M'), 'age': '', 'view': '', 'habitus': ''})
    areas = pd.DataFrame({'study_id': ids, 'split': 'test', 'label': 'a', 'area': .1})
    t = T.subgroup_table([a, unfair], {'phantom': (groups, areas, np.array([.1, .2, .3]), ids)}, p, n_boot=300)
    sex = t[(t['attribute'] == 'sex') & (t['metric'] == 'auroc')].set_index(['method', 'group'])
    assert (sex.loc[('itc_itm_lm', 'M'), 'mean'] == .5
            and np.isclose(sex.loc[('gk', 'F'), 'mean'], np.mean([roc_auc_score(a.y[half], s[half]) for s in a.scores]))
            and sex.loc[('gk', 'F'), 'n'] == half.sum())
    assert (sex.loc[('gk', 'gap'), 'reference'] == 'itc_itm_lm' and sex.loc[('gk', 'gap'), 'verdict'] == 'lower'
            and np.isnan(sex.loc[('itc_itm_lm', 'M'), 'p']))
    assert set(t['attribute']) == {'sex', 'frequency of the finding'}, 'attributes that nobody knows are absent'


def test_subgroups_of_other_studies_are_refused():
    c = replace(cell('gk', 2.), ids=tuple(f's{i:03d}' for i in range(150))); ids = [f't{i:03d}' for i in range(150)]
    with pytest.raises(GKError, match='test studies are not those'): T.truth_masks(c, None, None, None, ids)


def test_groups_too_small_to_score_leave_no_table():
    c = cell('gk', 2.); ids = [f's{i:03d}' for i in range(150)]
    files = (pd.DataFrame({'study_id': ids, 'split': 'test', 'sex': '', 'age': '', 'view': '', 'habitus': ''}),
             pd.DataFrame({'study_id': ids, 'split': 'test', 'label': 'a', 'area': .1}), np.full(3, .1), ids)
    assert not len(T.subgroup_table([c], {'phantom': files}, load_preset('smoke'), n_boot=30, least=200))


def test_other_test_data_is_refused():
    a = T.probe_values([cell('gk', 2.)], 50)[0]
    with pytest.raises(GKError, match='other test data'): T.difference(a, replace(a, n=3))


def test_sentences_are_judged_by_what_they_state():
    parts, missed = judged_sentences('Left pleural effusion and a right pneumothorax. No mass. Normal trachea.',
                                     'Left pleural effusion. Small nodule.')
    assert [v for _, v in parts] == ['wrong', 'none', 'none'] and missed == ['nodule']
    parts, _ = judged_sentences('1. The tip lies 4.1 cm above the carina. 2. Dr. C was notified at 13:25.', '')
    assert [t for t, _ in parts] == ['1. The tip lies 4.1 cm above the carina.', '2. Dr. C was notified at 13:25.']


# ---- the whole of it

TINY = """about: Variants on a tiny phantom; its numbers mean nothing.
data: {n: 160, size: 64, seed: 0}
detector: {image_size: 64, train: {epochs: 6, batch_size: 8, lr: 0.002, augment: 0.5}}
model: {image_size: 64, patch_size: 8, image_stem: test_resnet, dim: 32, image_depth: 1, text_depth: 1, encoder_depth: 1, decoder_depth: 1, embed_dim: 32, vocab_size: 800, max_length: 48, hardness: 0.0}
pretrain: {epochs: 2, batch_size: 16, lr: 0.001, augment: 0.5}
finetune: {epochs: 1, batch_size: 16, lr: 0.001, augment: 0.5}
methods: [itc_itm_lm, gk]
ratios: [100]
ablations: {local_only: {model: {fused_layers: 0}}, without_ecls: {objective: gk_without_ecls}}
sweeps:
  studies: {table: scaling, base: 100, methods: [gk], levels: {25: {pretrain_ratio: 25}}}
  women: {table: subgroups, base: 0.47, methods: [gk], levels: {0.1: {data: {train_women: 0.1}}}}
probing: {jitter: [0.2], drop: [0.5], swap: [0.5]}
seeds: [0]
"""


@pytest.mark.slow
def test_a_study_with_variants(tmp_path):
    (tmp_path/'tiny.yaml').write_text(TINY)
    env = os.environ | {'GK_MVLP_OUT': str(tmp_path)}
    r = subprocess.run([sys.executable, '-m', 'gk_mvlp.cli', 'paper', '--preset', str(tmp_path/'tiny.yaml'), '--cores', '2'],
                       capture_output=True, text=True, env=env)
    assert r.returncode == 0, r.stdout + r.stderr
    results = tmp_path/'paper_results/tiny'
    for name in ('ablation', 'grounding', 'robustness', 'subgroups', 'scaling'):
        t = pd.read_csv(results/f'tables/{name}.csv')
        assert ({'task', 'dataset', 'method', 'protocol', 'ratio', 'metric', 'mean', 'low', 'high', 'seeds', 'n'} <= set(t.columns)
                and len(t) and (t['task'] == name).all())
    manifest = json.loads((results/'manifest.json').read_text())
    assert (any(k.startswith('probing/') for k in manifest['runs']) and (results/'figures/ablations.pdf').is_file()
            and (results/'figures/robustness.png').is_file())
