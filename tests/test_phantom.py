"The phantom: determinism, anatomy, splits, cache, reports that say what they mean, findings that can be seen but not too easily."
import json
import multiprocessing as mp
import os
import re
from dataclasses import asdict, fields, replace

import numpy as np
import pytest

from gk_mvlp.config import from_params
from gk_mvlp.data import phantom
from gk_mvlp.data.anatomy import REGIONS
from gk_mvlp.data.knowledge import ENTITY_NAMES, extract_entities
from gk_mvlp.data.phantom import (CONTRAST, OPACITY_CHILDREN, Finding, PhantomConfig, cache_name, hidden_state, load_phantom, make_study,
                                  region_boxes, render)
from gk_mvlp.data.registry import load_dataset
from gk_mvlp.data.study import check_splits, picture_hash, study_to_dict, validate
from gk_mvlp.paths import GKError

CONFIG = PhantomConfig(n=400, size=64, seed=3)


@pytest.fixture(scope='module')
def studies(): return [make_study(CONFIG, i) for i in range(CONFIG.n)]

def same(a, b): return picture_hash(np.asarray(a.image)) == picture_hash(np.asarray(b.image)) and study_to_dict(a) == study_to_dict(b)

# ---- determinism ----
def test_a_study_depends_only_on_seed_and_index(studies):
    backwards = [make_study(CONFIG, i) for i in (31, 7, 0)]
    assert all(same(a, studies[i]) for a, i in zip(backwards, (31, 7, 0)))

def test_other_index_or_seed_is_another_picture(studies):
    assert len({picture_hash(s.image) for s in studies}) == len(studies)
    assert picture_hash(make_study(replace(CONFIG, seed=4), 0).image) != picture_hash(studies[0].image)

def test_more_studies_do_not_change_the_first_ones(studies):
    bigger = make_study(replace(CONFIG, n=500), 17)
    assert (picture_hash(bigger.image) == picture_hash(studies[17].image) and bigger.report == studies[17].report
            and bigger.subject_id == studies[17].subject_id)

def test_truth_and_text_do_not_depend_on_the_size(studies):
    large = make_study(replace(CONFIG, size=96), 5)
    assert large.image.shape == (96, 96) and large.report == studies[5].report and large.labels == studies[5].labels
    assert max(abs(a - b) for r in REGIONS for a, b in zip(large.regions[r], studies[5].regions[r])) < .04

def test_workers_make_the_same_bytes(tmp_path, studies):
    config = replace(CONFIG, n=20)
    a, b = load_phantom(config, tmp_path/'a', progress=False), load_phantom(config, tmp_path/'b', progress=False, workers=2)
    assert all(same(x, y) for x, y in zip(a, b, strict=True))
    assert [picture_hash(np.asarray(x.image)) for x in a] == [picture_hash(s.image) for s in studies[:20]]

def test_bands_and_windows_do_not_change_a_byte(monkeypatch):
    "A picture drawn in bands of rows, each term in its own window, equals the one drawn whole and in wider windows."
    config = PhantomConfig(n=40, size=72, seed=12, normal=0., clutter=.9)
    drawn = [make_study(config, i) for i in range(14)]
    bands, window = phantom.Canvas.bands, phantom.Canvas.window
    def wider(*a, **k):
        return tuple(slice(None if s.start is None else max(0, s.start - 4), None if s.stop is None else s.stop + 4)
                     for s in window(*a, **k))
    for change in ({'bands': lambda self: bands(self, 72 * 5)}, {'bands': lambda self: bands(self, 10 ** 6)}, {'window': wider}):
        with monkeypatch.context() as m:
            for name, f in change.items(): m.setattr(phantom.Canvas, name, f)
            assert all(same(make_study(config, i), s) for i, s in enumerate(drawn)), list(change)

def test_index_outside_is_an_error():
    for i in (-1, CONFIG.n):
        with pytest.raises(GKError, match='outside'): make_study(CONFIG, i)

@pytest.mark.parametrize('bad', [dict(n=0), dict(size=8), dict(seed=-1), dict(normal=1.2), dict(ap=-.1), dict(contrast=-1),
                                 dict(noise=float('nan')), dict(severity=(.8, .2)),
                                 dict(severity=(0, 2)), dict(splits=(.5, .5)), dict(splits=(.5, .2, .2)), dict(splits=(1.2, -.1, -.1))])
def test_wrong_settings_are_refused_by_name(bad):
    with pytest.raises(GKError, match=next(iter(bad))): PhantomConfig(**bad)

# ---- what a study holds ----
def test_studies_are_valid_and_complete(studies):
    for s in studies[:200]:
        validate(s)
        assert s.image.dtype == np.uint8 and s.image.shape == (64, 64) and s.image.std() > 25
        assert (set(s.regions) == set(REGIONS) and set(s.labels) == set(ENTITY_NAMES) and s.view in ('AP', 'PA') and s.sex in ('F', 'M')
                and 18 <= s.age <= 95)
        shown = {f.entity for f in s.findings}
        assert {e for e, y in s.labels.items() if y} == shown | ({'lung opacity'} if shown & set(OPACITY_CHILDREN) else set())

def test_anatomy(studies):
    normal = [s for s in studies if not any(s.labels.values())]
    high = np.mean([s.regions['right hemidiaphragm'][1] < s.regions['left hemidiaphragm'][1] for s in normal])
    assert high > .85
    for s in normal:
        mid = lambda r, s=s: (s.regions[r][0] + s.regions[r][2]) / 2
        assert mid('cardiac silhouette') > mid('spine') > mid('right lung') and mid('left lung') > mid('spine') > mid('svc')
        assert (s.regions['cardiac silhouette'][2] - s.regions['cardiac silhouette'][0]
                < .6 * (s.regions['left lung'][2] - s.regions['right lung'][0]))
        def grey(r, s=s):
            x0, y0, x1, y1 = (np.array(s.regions[r]) * 64).astype(int)
            return np.median(s.image[y0:y1 + 1, x0:x1 + 1])
        assert max(grey('right upper lung zone'), grey('left upper lung zone')) < grey('upper mediastinum') - 30, s.study_id

def test_zones_lie_in_their_lung_and_angles_at_its_foot(studies):
    for s in studies[:100]:
        for side in ('right', 'left'):
            lung = s.regions[f'{side} lung']
            for zone in ('upper lung zone', 'mid lung zone', 'lower lung zone', 'apical zone'):
                b = s.regions[f'{side} {zone}']
                assert b[0] >= lung[0] - 1e-3 and b[1] >= lung[1] - 1e-3 and b[2] <= lung[2] + 1e-3 and b[3] <= lung[3] + 1e-3
            assert (s.regions[f'{side} upper lung zone'][3] <= s.regions[f'{side} mid lung zone'][3]
                    <= s.regions[f'{side} lower lung zone'][3])
            assert abs(s.regions[f'{side} costophrenic angle'][3] - lung[3]) < .06

def test_findings_of_shape_change_the_shape():
    config = PhantomConfig(n=600, size=32, seed=9)
    width = {0: [], 1: []}
    for i in range(config.n):
        body, _, labels = hidden_state(config, i)
        width[labels['cardiomegaly']].append(body.heart)
    assert np.mean(width[1]) > np.mean(width[0]) + .05 and np.quantile(width[1], .1) < np.quantile(width[0], .9), (
        'larger, but the two overlap')

def test_prevalence_is_a_long_tail(studies):
    config = PhantomConfig(n=3000, size=32)
    y = np.array([list(hidden_state(config, i)[2].values()) for i in range(config.n)])
    p = y.mean(0)
    assert .37 < (y.sum(1) == 0).mean() < .43 and .01 < p.min() < .03 and .12 < p.max() < .25
    edema, effusion = (y[:, ENTITY_NAMES.index(e)] for e in ('pulmonary edema', 'pleural effusion'))
    assert effusion[edema == 1].mean() > 2 * effusion.mean(), 'failing hearts bring fluid'

# ---- splits ----
def test_no_patient_and_no_picture_in_two_splits(studies):
    subjects, splits = [s.subject_id for s in studies], [s.split for s in studies]
    check_splits(subjects, splits, [picture_hash(s.image) for s in studies], 'phantom')
    share = {k: splits.count(k) / len(splits) for k in ('train', 'val', 'test')}
    assert abs(share['train'] - .7) < .06 and abs(share['val'] - .1) < .04 and abs(share['test'] - .2) < .05

def test_two_studies_of_a_patient_share_the_anatomy(studies):
    pairs = [(a, b) for a, b in zip(studies, studies[1:]) if a.subject_id == b.subject_id]
    assert len(pairs) > 40
    assert all(a.sex == b.sex and a.age + 1 == b.age and a.attributes['habitus'] == b.attributes['habitus'] and a.split == b.split
               for a, b in pairs)
    assert any(a.labels != b.labels for a, b in pairs) and any(a.view != b.view for a, b in pairs)
    assert not [s for s in (make_study(replace(CONFIG, two_studies=0), i) for i in range(30)) if s.attributes['visit'] != '0']

# ---- reports ----
def test_reports_are_many(studies):
    normal, other = [[s.report for s in studies if any(s.labels.values()) == k] for k in (False, True)]
    assert 1 - len(set(normal)) / len(normal) < .20 and 1 - len(set(other)) / len(other) < .02
    assert len({w for s in studies for w in s.report.lower().split()}) > 300

def test_an_extractor_recovers_what_the_report_means(studies):
    hit = miss = extra = 0
    for s in studies[:300]:
        said, read = set(s.entities.items()), set(extract_entities(s.report).items())
        hit += len(said & read); miss += len(said - read); extra += len(read - said)
    assert 2 * hit / (2 * hit + miss + extra) >= .95

def test_report_follows_the_hidden_state(studies):
    wrong = doubtful = 0
    for s in studies:
        drawn = {k.split(':')[1]: v for k, v in s.attributes.items() if k.startswith('said:')}
        missed = {e for e in drawn if drawn[e] == 'no'}
        for e, v in s.entities.items():
            if v == 1: assert s.labels[e], f'{s.study_id}: asserts {e}, which is not there'
            if v == -1 and s.labels[e]:
                assert e in missed or (e == 'lung opacity' and missed & set(OPACITY_CHILDREN)), (
                    f'{s.study_id}: denies {e} without having missed it')
                wrong += 1
            doubtful += v == 0
    assert wrong > 0 and doubtful > 10, 'noise and doubt are there'

def test_without_noise_the_report_tells_all():
    config = replace(CONFIG, label_noise=0., hedging=0., boilerplate=0.)
    for i in range(120):
        s = make_study(config, i)
        assert 0 not in s.entities.values()
        assert {e for e, v in s.entities.items() if v == 1} | {'lung opacity'} == {e for e, y in s.labels.items() if y} | {'lung opacity'}

def test_relations_name_the_side_that_was_drawn(studies):
    seen = 0
    for s in studies:
        assert all(s.entities[e] == v or (v == -1 and s.entities[e] == 1) for (_, e), v in s.relations.items())
        for e in ('pleural effusion', 'pneumothorax', 'nodule', 'mass', 'consolidation'):
            place = s.attributes.get(f'place:{e}', '')
            sides = {r.split()[0] for (r, n), v in s.relations.items() if n == e and v == 1}
            if sides: seen += 1; assert sides == {p.split()[0] for p in place.split('; ')}
            if len(sides) == 1:
                other = ({'right', 'left'} - sides).pop()
                assert f'{other} {e}' not in s.report.lower() or f'no {other} {e}' in s.report.lower()
        for e, v in s.entities.items():
            if v == 1: assert any(n == e and y == 1 for (_, n), y in s.relations.items()) or (e == 'lung opacity'), (s.study_id, e)
    assert seen > 40

def test_questions_have_true_answers(studies):
    for s in studies:
        assert 3 <= len(s.qa) <= 5 and len({q.qid for q in s.qa}) == len(s.qa) == len({q.question for q in s.qa})
        for q in s.qa:
            assert q.answer and q.answer_type in ('open', 'closed')
            if q.question_type == 'presence':
                e = max((e for e in ENTITY_NAMES if e in q.question), key=len); assert q.answer == ('yes' if s.labels[e] else 'no')
            if q.question_type == 'view': assert q.answer == s.view
            if q.question_type == 'size': assert (q.answer == 'yes') == bool(s.labels['cardiomegaly'])
            if q.question_type == 'location': assert q.answer in REGIONS and q.answer in s.attributes.values()
    kinds = {q.question_type for s in studies for q in s.qa}
    assert kinds == {'presence', 'view', 'size', 'abnormality', 'side', 'location', 'severity', 'device'}

# ---- findings can be seen ----
SHAPES = ('cardiomegaly', 'hyperinflation', 'mediastinal widening')

def drawn(entity, severity, index, contrast=1.):
    "(picture with the finding, the same picture without it, mask of its boxes)."
    config = PhantomConfig(n=50, size=128, seed=11)
    rng = np.random.default_rng(index); kind = 'central venous catheter' if entity == 'support device' else ''
    f = Finding(entity, severity, phantom._places(entity, kind, rng), kind, 1, rng.random(6))
    body = phantom._draw_body(phantom._rng(config, 1, index), phantom._rng(config, 2, index), False, 0, [])
    plain = render(body, [], 128, np.random.default_rng(index), contrast=contrast)
    r = render(body, [f], 128, np.random.default_rng(index), contrast=contrast)
    mask = np.zeros((128, 128), bool)
    for b in phantom._finding_boxes(f, r.changes[0], r.canvas, region_boxes(r.canvas)):
        x0, y0, x1, y1 = (np.array(b.box) * 128).round().astype(int); mask[y0:y1, x0:x1] = True
    return r.image.astype(float), plain.image.astype(float), mask

@pytest.mark.parametrize('entity', [e for e in CONTRAST if e not in SHAPES])
def test_a_finding_changes_its_box_and_more_when_severe(entity):
    inside, outside, mild = [], [], []
    for i in range(8):
        a, b, m = drawn(entity, .9, i)
        inside.append(np.abs(a - b)[m].mean()); outside.append(np.abs(a - b)[~m].mean())
        a, b, m = drawn(entity, .1, i); mild.append(np.abs(a - b)[m].mean())
    assert np.mean(inside) > 4, 'visible at high severity'
    assert np.mean(inside) > 1.8 * np.mean(outside), 'the box holds it'
    assert np.mean(mild) < .8 * np.mean(inside), 'severity is contrast'

@pytest.mark.parametrize('entity', [e for e in CONTRAST if e not in SHAPES])
def test_without_contrast_there_is_nothing_to_see(entity):
    a, b, _ = drawn(entity, .9, 2, contrast=0.)
    assert np.abs(a - b).max() <= 1

def test_no_finding_is_given_away_by_coarse_pixels():
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    config = PhantomConfig(n=500, size=32, seed=5)
    made = [make_study(config, i) for i in range(config.n)]
    X = np.stack([s.image for s in made]).reshape(config.n, -1) / 255.; Y = np.array([[s.labels[e] for e in ENTITY_NAMES] for s in made])
    train = np.array([s.split == 'train' for s in made])
    Z = PCA(40, random_state=0).fit(X[train]).transform(X); Z /= Z[train].std(0)
    auroc = {e: roc_auc_score(Y[~train, j], LogisticRegression(C=.02, max_iter=500).fit(Z[train], Y[train, j]).decision_function(Z[~train]))
             for j, e in enumerate(ENTITY_NAMES) if Y[~train, j].sum() >= 8}
    assert len(auroc) >= 8 and max(auroc.values()) < .985, auroc
    assert np.mean(list(auroc.values())) > .6, auroc

# ---- difficulty ----
def test_difficulty_is_reachable_from_a_preset(tmp_path):
    hard = {'severity': [.1, .4], 'contrast': .8, 'noise': 1.5, 'clutter': 2., 'label_noise': .2, 'hedging': .3, 'boilerplate': .9,
            'systematic': .5, 'normal': .2, 'ap': .6, 'two_studies': .1, 'women': .4, 'train_women': .1, 'splits': [.6, .2, .2], 'n': 9, 'size': 32,
            'seed': 4}
    assert set(hard) == {f.name for f in fields(PhantomConfig)}, 'a new field belongs here'
    config = from_params(PhantomConfig, hard, 'preset, section data')
    assert asdict(config) == {k: tuple(v) if isinstance(v, list) else v for k, v in hard.items()}
    assert all(.1 <= float(v) <= .4 for s in load_dataset('phantom', **hard, cache_dir=tmp_path)
               for k, v in s.attributes.items() if k.startswith('severity:'))

def picture(**kw): return np.stack([make_study(replace(CONFIG, **kw), i).image for i in range(24)]).astype(float)

@pytest.mark.parametrize('name', ['noise', 'clutter'])
def test_more_noise_or_clutter_is_more_difference_between_two_draws_of_a_body(name):
    "The same seed with a factor of 0, 1 and 3: pictures move further from the clean one."
    clean = picture(**{name: 0.})
    near, far = (np.abs(picture(**{name: f}) - clean).mean() for f in (1., 3.))
    assert 0 < near < .7 * far

def test_report_settings_do_what_they_say():
    def count(**kw):
        made = [make_study(replace(CONFIG, normal=0., size=32, **kw), i) for i in range(80)]
        said = [v for s in made for k, v in s.attributes.items() if k.startswith('said:')]
        return said.count('no') / len(said), said.count('doubt') / len(said), np.mean([len(s.report.split()) for s in made])
    base, missed, doubted, wordy = (count(label_noise=0., hedging=0., boilerplate=0.), count(label_noise=.4, hedging=0., boilerplate=0.),
                                    count(label_noise=0., hedging=.5, boilerplate=0.), count(label_noise=0., hedging=0., boilerplate=1.))
    assert (base[0] == base[1] == 0 and missed[0] > .25 and missed[1] == 0 and doubted[1] > .25 and doubted[0] == 0
            and wordy[2] > base[2] + 10)

def test_a_systematic_report_goes_from_lungs_to_bones():
    made = lambda share: [make_study(replace(CONFIG, n=60, size=32, normal=0., systematic=share), i) for i in range(60)]
    findings = lambda s: s.report.split(' IMPRESSION')[0].removeprefix('FINDINGS: ')
    parts = (r'Pulmonary v|pulmonary v|ungs are clear|lung fields', r'Heart size is|heart is (not|normal)|Cardiomediastinal|The cardi',
             r'ribs are|Osseous|Bony|bones are', r'The (trachea|hila|soft tissues|hemidiaphragms|aorta)')
    def in_order(studies):
        "Of two neighbouring parts that a report speaks of: the share in which the earlier one comes first."
        at = [[m and m.start() for m in (re.search(p, findings(s)) for p in parts)] for s in studies]
        found = [a < b for x in at for a, b in zip(x, x[1:]) if a is not None and b is not None]
        assert len(found) > 20
        return np.mean(found)
    plain, half, systematic = made(0.), made(.5), made(1.)
    assert in_order(plain) < .8 and in_order(systematic) == 1
    sentences = lambda s: sorted(findings(s).removesuffix('.').split('. '))
    for other in (half, systematic):
        for a, b in zip(plain, other, strict=True):
            assert np.array_equal(a.image, b.image) and a.labels == b.labels and sentences(a) == sentences(b), 'sentences only move'
    assert .25 < np.mean([findings(a) != findings(b) for a, b in zip(plain, half, strict=True)]) < .75

def test_duplicate_reports_stay_rare_in_a_large_set():
    config = PhantomConfig(n=2500, size=32, seed=1)
    texts = {True: [], False: []}
    for i in range(config.n):
        body, findings, labels = hidden_state(config, i)
        texts[any(labels.values())].append(phantom.write_report(config, body, findings, labels,
                                                                phantom._rng(config, phantom._TEXT, i))[0].split('IMPRESSION')[0])
    # of the findings alone, the longest part: the whole report repeats less
    share = {k: 1 - len(set(v)) / len(v) for k, v in texts.items()}
    assert share[False] < .20 and share[True] < .02, share

# ---- the cache ----
SMALL = PhantomConfig(n=6, size=32, seed=2)

def test_cache_round_trip(tmp_path, monkeypatch):
    first = load_phantom(SMALL, tmp_path, progress=False)
    monkeypatch.setattr(phantom, 'make_study', lambda *a: pytest.fail('made again in spite of the cache'))
    again = load_phantom(SMALL, tmp_path, progress=False)
    assert all(same(a, b) for a, b in zip(first, again, strict=True)) and os.listdir(tmp_path) == [cache_name(SMALL)]
    assert isinstance(again[0].image, np.memmap) and not again[0].image.flags.writeable

def damage_bytes(p): d = bytearray(p.read_bytes()); d[-5] ^= 1; p.write_bytes(d)
def truncate(p): p.write_bytes(p.read_bytes()[:-40])

@pytest.mark.parametrize('name', ['images.npy', 'studies.jsonl', 'meta.json'])
@pytest.mark.parametrize('how', [truncate, damage_bytes, lambda p: p.unlink(), lambda p: p.write_bytes(b'')])
def test_broken_cache_is_made_again(tmp_path, name, how):
    good = [make_study(SMALL, i) for i in range(SMALL.n)]
    load_phantom(SMALL, tmp_path, progress=False)
    how(tmp_path/cache_name(SMALL)/name)
    again = load_phantom(SMALL, tmp_path, progress=False)
    assert all(same(a, b) for a, b in zip(good, again, strict=True)) and os.listdir(tmp_path) == [cache_name(SMALL)]
    meta = json.loads((tmp_path/cache_name(SMALL)/'meta.json').read_text())
    assert meta['config']['seed'] == 2

def test_a_failed_making_leaves_nothing(tmp_path, monkeypatch):
    real = phantom.make_study
    def fails(config, i):
        if i == 3: raise KeyboardInterrupt
        return real(config, i)
    monkeypatch.setattr(phantom, 'make_study', fails)
    with pytest.raises(KeyboardInterrupt): load_phantom(SMALL, tmp_path, progress=False)
    assert os.listdir(tmp_path) == []

def _load(folder): return [picture_hash(np.asarray(s.image)) for s in load_phantom(SMALL, folder, progress=False)]

def test_two_writers_at_once(tmp_path):
    with mp.get_context('spawn').Pool(3) as pool: a, b, c = pool.map(_load, [tmp_path] * 3)
    assert a == b == c == [picture_hash(make_study(SMALL, i).image) for i in range(SMALL.n)]
    assert os.listdir(tmp_path) == [cache_name(SMALL)]

def test_cache_name_follows_settings_and_source(monkeypatch):
    assert len({cache_name(SMALL), cache_name(replace(SMALL, seed=3)), cache_name(replace(SMALL, noise=1.5))}) == 3
    before = cache_name(SMALL)
    monkeypatch.setattr(phantom, '_source_hash', lambda: 'other source')
    assert cache_name(SMALL) != before
