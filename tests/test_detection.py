"Detection metrics: equal to pycocotools, FROC by brute force, and refusal of tables that would hide a failure."
import contextlib
import io

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gk_mvlp.data.study import FindingBox, Study
from gk_mvlp.evaluation.detection import (COCO_IOU, FROC_RATES, RSNA_IOU, class_ap, detection_frame, detection_metrics, filtered, froc,
                                          match, mean_ap, random_detections,
                                          read_detections)
from gk_mvlp.evaluation.metrics import UndefinedMetric, box_iou
from gk_mvlp.evaluation.statistics import patient_weights
from gk_mvlp.paths import GKError


def coco_precision(frame, thresholds):
    "pycocotools' precision [T, 101, classes] on the same table, read from its rows alone."
    ids = {s: i + 1 for i, s in enumerate(frame.loc[frame['kind'] == 'image', 'study_id'])}
    names = {c: i + 1 for i, c in enumerate(sorted(set(frame.loc[frame['kind'] == 'truth', 'entity'])))}
    xywh = lambda r: [r.x0, r.y0, r.x1 - r.x0, r.y1 - r.y0]
    gt = COCO()
    gt.dataset = {'images': [{'id': i} for i in ids.values()], 'categories': [{'id': c} for c in names.values()],
                  'annotations': [{'id': k + 1, 'image_id': ids[r.study_id], 'category_id': names[r.entity], 'bbox': xywh(r), 'area': 1.,
                                   'iscrowd': 0} for k, r in enumerate(frame[frame['kind'] == 'truth'].itertuples())]}
    found = [{'image_id': ids[r.study_id], 'category_id': names[r.entity], 'bbox': xywh(r), 'score': r.score}
             for r in frame[(frame['kind'] == 'found') & frame['entity'].isin(names)].itertuples()]
    with contextlib.redirect_stdout(io.StringIO()):
        gt.createIndex()
        dt = gt.loadRes(found) if found else COCO()
        if not found:
            dt.dataset = {'images': gt.dataset['images'], 'categories': gt.dataset['categories'], 'annotations': []}; dt.createIndex()
        e = COCOeval(gt, dt, 'bbox')
        e.params.iouThrs, e.params.areaRng, e.params.areaRngLbl, e.params.maxDets = np.asarray(thresholds), [[-1, 1e10]], ['all'], [100]
        e.evaluate(); e.accumulate()
    return e.eval['precision'][..., 0, 0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(0, 3), st.sampled_from([None, 6, 20]), st.floats(0, 1), st.floats(0, 4))
def test_average_precision_equals_pycocotools(seed, n, extra, grid, skill, noise):
    "Random boxes, on a grid with many equal scores and overlaps; images without boxes, without detections and without both."
    f = random_detections(np.random.default_rng(seed), n, ('a', 'b', 'c')[:extra + 1] if extra < 3 else ('a',), skill, noise, grid)
    f = pd.concat([f, f[f['kind'] == 'image'].head(1).assign(study_id='z-nothing')])
    if not (f['kind'] == 'truth').any():
        with pytest.raises(UndefinedMetric): read_detections(f)
        return
    d = read_detections(f)
    for t in (RSNA_IOU, COCO_IOU): assert np.allclose(class_ap(d, t)[0], coco_precision(f, t).mean(1), atol=1e-12)


def test_more_than_a_hundred_boxes_on_an_image_are_cut_as_in_coco():
    f = random_detections(np.random.default_rng(0), 6, ('a',), 1., 150.)
    assert (f['kind'] == 'found').sum() > 300
    d = read_detections(f)
    assert max(np.bincount(match(d, [.5])[0].image)) == 100 and np.allclose(class_ap(d)[0], coco_precision(f, RSNA_IOU).mean(1))


def test_a_resample_is_the_metric_of_the_repeated_images():
    f = random_detections(np.random.default_rng(4), 40, grid=12); d = read_detections(f); w = patient_weights(d.patients, 8)
    ap, sens = mean_ap(d, RSNA_IOU, w), froc(d, weights=w)
    for b in range(8):
        parts = [f[f['study_id'] == s].assign(study_id=f'{s}-{k}') for s, n in zip(d.images, w[b], strict=True) for k in range(int(n))]
        again = read_detections(pd.concat(parts))
        assert ap[b] == pytest.approx(mean_ap(again)[0]) and np.allclose(sens[b], froc(again)[0])


def froc_by_hand(frame, rates, iou):
    "Every threshold on the score tried, one class, matching box by box."
    images = frame.loc[frame['kind'] == 'image', 'study_id']; points = [(0., 0.)]
    box = lambda f: f[['x0', 'y0', 'x1', 'y1']].to_numpy(float)
    for t in sorted(set(frame.loc[frame['kind'] == 'found', 'score'])):
        tp = fp = 0
        for s in images:
            g = frame[(frame['study_id'] == s) & (frame['kind'] == 'truth')]
            p = frame[(frame['study_id'] == s) & (frame['kind'] == 'found') & (frame['score'] >= t)].sort_values('score', ascending=False,
                kind='stable')
            o, free = box_iou(box(p), box(g)), set(range(len(g)))
            for k in range(len(p)):
                best = max(free, key=lambda j: o[k, j], default=None)
                if best is not None and o[k, best] >= iou: tp += 1; free.remove(best)
                else: fp += 1
        points.append((fp / len(images), tp / (frame['kind'] == 'truth').sum()))
    return [max(s for r, s in points if r <= rate) for rate in rates]


@pytest.mark.parametrize('seed', range(4))
def test_froc_by_brute_force(seed):
    f = random_detections(np.random.default_rng(seed), 25, ('a',), .7, 2.)
    f['score'] = f['score'].round(1)                                       # ties come together
    assert np.allclose(froc(read_detections(f))[0], froc_by_hand(f, FROC_RATES, .4))


def rows(*items):
    return pd.DataFrame([(k, s, s, 'test', e, c, *(b or [np.nan] * 4)) for k, s, e, c, b in items],
                        columns=['kind', 'study_id', 'subject_id', 'split', 'entity', 'score', 'x0', 'y0', 'x1', 'y1'])


BOX, FAR = (0, 0, .5, .5), (.6, .6, .9, .9)
BASE = [('image', 'i', '', np.nan, None), ('image', 'j', '', np.nan, None), ('truth', 'i', 'a', np.nan, BOX), ('found', 'i', 'a', .9, BOX)]


def test_mgca_bug_missed_images_count():
    "B2.1: images without a detection, and detections on images without a box, must lower the number."
    both = rows(*BASE)
    assert mean_ap(read_detections(both))[0] == pytest.approx(1)
    missed = rows(*BASE, ('truth', 'j', 'a', np.nan, BOX))
    alarm = rows(*BASE, ('found', 'j', 'a', .95, BOX))
    for f in (missed, alarm):
        assert mean_ap(read_detections(f))[0] < .6
        assert mean_ap(read_detections(filtered(f)))[0] == pytest.approx(1), 'the filtered metric sees neither'
    weak = rows(*BASE[:3], ('found', 'i', 'a', .4, BOX))
    assert mean_ap(read_detections(weak))[0] == pytest.approx(1), 'no confidence filter'
    m = detection_metrics(weak)
    assert m['map_40_75'][0] == pytest.approx(1) and np.isnan(m['filtered_map_40_75'][0]), 'nothing passes the filter: no number'


def test_mgca_bug_filtered_metric_inflates():
    "Same detections: where more is missed the full metric falls and the filtered one stays above it."
    for skill in (.5, .3, .15):
        f = random_detections(np.random.default_rng(2), 300, ('pneumonia',), skill, .3); m = detection_metrics(f)
        assert m['filtered_map_40_75'][0] > m['map_40_75'][0]
    assert m['filtered_map_40_75'][0] > 2 * m['map_40_75'][0]


def test_mgca_bug_boxes_do_not_shrink_when_read_again():
    "B2.2: reading targets must not change them."
    f = rows(*BASE); before = f.copy(); d = read_detections(f)
    for _ in range(3): detection_metrics(f); match(d, [.5])
    pd.testing.assert_frame_equal(f, before)
    s = Study('i', 'p', findings=[FindingBox('a', BOX)])
    assert (detection_frame([s], [(np.zeros((0, 4)), [], [])]).equals(detection_frame([s], [(np.zeros((0, 4)), [], [])]))
            and s.findings[0].box == BOX)


def test_the_table_of_studies():
    studies = [Study('i', 'p', findings=[FindingBox('a', BOX), FindingBox('b', FAR)], split='test'), Study('j', 'q', split='test')]
    f = detection_frame(studies, [(np.array([BOX]), [.7], ['a']), (np.zeros((0, 4)), [], [])], ['a'])
    assert f['kind'].tolist() == ['image', 'truth', 'found', 'image'] and read_detections(f).classes == ('a',)
    with pytest.raises(GKError, match='1 of 2'): detection_frame(studies, [(np.array([BOX]), [.7], ['a'])])


@pytest.mark.parametrize('change, says', [
    (lambda f: f[f['kind'] != 'image'], 'no images'), (lambda f: f.iloc[[0, *range(len(f))]], 'repeats'),
    (lambda f: f.assign(score=np.nan), 'NaN'), (lambda f: f.drop(columns='score'), "'score'"),
    (lambda f: f[f['study_id'] != 'i'], 'no test image has a true box'), (lambda f: f.drop(index=0), 'not in the table'),
    (lambda f: f.assign(x1=np.where(f['kind'] == 'found', -1., f['x1'])), 'inverted'),
    (lambda f: f.assign(kind='gold'), 'kind'), (lambda f: f.assign(y0=np.where(f['kind'] == 'truth', np.nan, f['y0'])), 'not finite')])
def test_bad_tables_are_refused(change, says):
    with pytest.raises(GKError, match=says): read_detections(change(rows(*BASE)))


def test_no_detection_at_all_is_zero_not_missing():
    f = rows(*BASE[:3]); m = detection_metrics(f)
    assert m['map_40_75'][0] == 0 and m['coco_map'][0] == 0 and m['froc'][0] == 0
    with pytest.raises(GKError, match='thresholds'): mean_ap(read_detections(f), [0.])
    with pytest.raises(GKError, match='weights'): mean_ap(read_detections(f), weights=np.ones((1, 5)))


def test_a_class_that_no_image_has_is_left_out_of_the_mean():
    f = rows(*BASE, ('found', 'j', 'ghost', .99, BOX))
    assert read_detections(f).classes == ('a',) and mean_ap(read_detections(f))[0] == pytest.approx(1)
