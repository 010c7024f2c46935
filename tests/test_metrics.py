"Metrics: known values, agreement with independent implementations, and refusal of every input that would make a wrong number."
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata
from sklearn.metrics import average_precision_score, brier_score_loss, confusion_matrix, f1_score, roc_auc_score, roc_curve

from gk_mvlp.evaluation.metrics import (UndefinedMetric, align_predictions, auprc, auroc, best_threshold, box_iou, brier, calibration_bins,
                                        check_binary, ece, macro, midranks,
                                        multilabel_scores, threshold_metrics)
from gk_mvlp.paths import GKError

both_classes = st.lists(st.tuples(st.integers(0, 1), st.integers(-5, 5)), min_size=2,
                        max_size=60).filter(lambda x: len({y for y, _ in x}) == 2)


@settings(max_examples=150, deadline=None)
@given(both_classes)
def test_auroc_and_auprc_agree_with_sklearn_ties_included(rows):
    y, s = np.array(rows).T
    assert auroc(y, s) == pytest.approx(roc_auc_score(y, s)) and auprc(y, s) == pytest.approx(average_precision_score(y, s))
    assert np.array_equal(midranks(s), rankdata(s))


@settings(max_examples=50, deadline=None)
@given(both_classes)
def test_auroc_sees_only_the_order_and_mirrors(rows):
    y, s = np.array(rows).T
    assert (auroc(y, np.exp(s / 2) * 7 + 1) == pytest.approx(auroc(y, s))
            and auroc(y, -s) == pytest.approx(1 - auroc(y, s)) == pytest.approx(auroc(1 - y, s)))


BAD = [([0, 1], [.1, np.nan], 'NaN or infinite'), ([0, 1], [.1, np.inf], 'NaN or infinite'), ([0, 1], [.1, -np.inf], 'NaN or infinite'),
       ([], [], 'no predictions'), ([0, 1, 1], [.1, .2], 'shape'),
       ([[0, 1]], [[.1, .2]], 'one-dimensional'), ([0, 2], [.1, .2], 'neither 0 nor 1'), ([0, np.nan], [.1, .2], 'neither 0 nor 1'),
       (['a', 'b'], [.1, .2], 'not numbers'), ([0, 1], ['x', 'y'], 'not numbers')]


@pytest.mark.parametrize('y,s,why', BAD)
@pytest.mark.parametrize('metric', [auroc, auprc, brier, ece, lambda y, s: threshold_metrics(y, s, .5), best_threshold])
def test_bad_input_is_never_a_number(metric, y, s, why):
    with pytest.raises(GKError, match=why): metric(y, s)


@pytest.mark.parametrize('y', [[0, 0, 0], [1, 1, 1]])
def test_one_class_is_undefined(y):
    for f in (auroc, auprc, best_threshold):
        with pytest.raises(UndefinedMetric): f(y, [.1, .2, .3])


def test_undefined_classes_are_listed_and_not_averaged():
    rng = np.random.default_rng(0); y = rng.integers(0, 2, (50, 4)).astype(float); s = rng.random((50, 4))
    y[:, 1] = 0; y[:, 2] = np.nan; y[::5, 3] = np.nan
    t = multilabel_scores(y, s, list('abcd')); m = macro(t)
    assert m['undefined'] == ['b', 'c'] and m['n_defined'] == 2 and m['n_classes'] == 4 and t['n'].tolist() == [50, 50, 0, 40]
    k = ~np.isnan(y[:, 3])
    assert m['mean'] == pytest.approx((roc_auc_score(y[:, 0], s[:, 0]) + roc_auc_score(y[k, 3], s[k, 3])) / 2)
    assert macro(t, 'auprc')['mean'] == pytest.approx(t['auprc'][[0, 3]].mean())
    with pytest.raises(UndefinedMetric): macro(t[t['name'].isin(['b', 'c'])])
    with pytest.raises(GKError, match='no such column'): macro(t, 'f1')


def test_multilabel_refuses_what_does_not_fit():
    y, s = np.array([[0., 1], [1, 0]]), np.array([[.1, .2], [.3, .4]])
    for args, why in (((y, s[:1], ['a', 'b']), 'shape'), ((y, s, ['a']), 'class names'), ((y, s, ['a', 'a']), 'class names'),
                      ((y[:0], s[:0], ['a', 'b']), 'no predictions'), ((y[:, 0], s[:, 0], ['a']), r'\[N, C\]'),
                      ((y + 1, s, ['a', 'b']), "class 'a'")):
        with pytest.raises(GKError, match=why): multilabel_scores(*args)
    s[1, 1] = np.nan
    with pytest.raises(GKError, match="row 1, class 'b'"): multilabel_scores(y, s, ['a', 'b'])
    y[1, 1] = np.nan                                   # even where the label is unknown: a model that emits NaN is broken
    with pytest.raises(GKError, match='NaN or infinite'): multilabel_scores(y, s, ['a', 'b'])


TRUTH = pd.DataFrame({'study_id': ['b', 'a', 'c'], 'y': [1, 0, 1]})


def test_alignment_is_by_id_and_in_the_order_of_the_truth():
    out = align_predictions(TRUTH, pd.DataFrame({'study_id': ['c', 'b', 'a'], 's': [.3, .2, .1], 'y': [9, 9, 9]}))
    assert out['study_id'].tolist() == ['b', 'a', 'c'] and out['s'].tolist() == [.2, .1, .3] and out['y_true'].tolist() == [1, 0, 1]
    assert (align_predictions(TRUTH.assign(study_id=[2, 1, 3]), pd.DataFrame({'study_id': ['1', '2', '3'], 's': [1, 2, 3]}))['s'].tolist()
            == [2, 1, 3]), 'numbers and their text are one id'


@pytest.mark.parametrize('ids,why', [(['b', 'a'], 'have no prediction'), (['b', 'a', 'c', 'd'], 'not in the truth'),
                                     (['b', 'a', 'c', 'a'], 'repeated'), ([], 'empty'), (['b', 'a', None], 'without study_id')])
def test_alignment_drops_nothing(ids, why):
    with pytest.raises(GKError, match=why): align_predictions(TRUTH, pd.DataFrame({'study_id': ids, 's': np.zeros(len(ids))}))
    if ids and ids[-1] != 'd' and len(ids) != 2:
        with pytest.raises(GKError, match=why): align_predictions(pd.DataFrame({'study_id': ids, 'y': 0}), TRUTH)
    with pytest.raises(GKError, match='no column'): align_predictions(TRUTH, pd.DataFrame({'id': ['a']}))


def test_dropping_failures_inflates():
    rng = np.random.default_rng(0); y = rng.integers(0, 2, 500); s = y + rng.normal(0, 1, 500); failed = rng.random(500) < .15
    s[failed] = -y[failed] + rng.normal(0, 1, failed.sum())
    assert auroc(y[~failed], s[~failed]) > auroc(y, s) + .05


@settings(max_examples=100, deadline=None)
@given(both_classes)
def test_the_best_threshold_is_the_best_of_all(rows):
    y, s = np.array(rows).T
    every = [threshold_metrics(y, s, t) for t in np.unique(s)]
    assert threshold_metrics(y, s, best_threshold(y, s))['f1'] == pytest.approx(max(m['f1'] for m in every))
    f, t, _ = roc_curve(y, s, drop_intermediate=False)
    m = threshold_metrics(y, s, best_threshold(y, s, 'youden'))
    assert m['sensitivity'] + m['specificity'] - 1 == pytest.approx(max((t - f)[1:]))


def test_threshold_metrics_agree_with_sklearn_and_mark_the_undefined():
    rng = np.random.default_rng(1); y, s = rng.integers(0, 2, 80), rng.random(80); m = threshold_metrics(y, s, .4)
    tn, fp, fn, tp = confusion_matrix(y, s >= .4).ravel()
    assert ((m['tn'], m['fp'], m['fn'], m['tp']) == (tn, fp, fn, tp) and m['f1'] == pytest.approx(f1_score(y, s >= .4))
            and m['specificity'] == tn / (tn + fp))
    assert (np.isnan(threshold_metrics([0, 1], [.1, .2], .9)['precision'])
            and np.isnan(threshold_metrics([0, 0], [.1, .2], .15)['sensitivity']))
    assert threshold_metrics([0, 1], [.5, .5], .5)['tp'] == 1, 'a score at the threshold is positive'
    for bad in (np.nan, np.inf):
        with pytest.raises(GKError): threshold_metrics([0, 1], [.1, .2], bad)
    with pytest.raises(GKError, match='criterion'): best_threshold([0, 1], [.1, .2], 'accuracy')


def test_calibration_by_hand_and_against_sklearn():
    y, p = np.array([0, 0, 1, 1]), np.array([.1, .1, .6, .9])
    assert ece(y, p, 2, 'width') == pytest.approx(.5 * .1 + .5 * .25) and ece(y, p, 2, 'mass') == pytest.approx(.5 * .1 + .5 * .25)
    assert ece(y, p, 10, 'width') == pytest.approx(.5 * .1 + .25 * .4 + .25 * .1)
    assert brier(y, p) == pytest.approx(brier_score_loss(y, p)) and ece([0, 1], [0., 1.]) == 0 and ece([1, 0], [0., 1.]) == 1
    assert calibration_bins(y, np.full(4, .5))['n'].tolist() == [4], 'equal probabilities stay in one bin'
    n = calibration_bins(np.arange(1000) % 2, np.linspace(0, .1, 1000))['n']; assert len(n) == 10 and n.max() - n.min() <= 1, 'equal mass'
    assert len(calibration_bins(np.arange(1000) % 2, np.linspace(0, .0999, 1000), scheme='width')) == 1, (
        'equal width puts rare findings into one bin')


@pytest.mark.parametrize('p', [[-.1, .5], [.5, 1.1]])
def test_scores_that_are_no_probabilities_have_no_calibration(p):
    for f in (ece, brier):
        with pytest.raises(GKError, match='not probabilities'): f([0, 1], p)
    with pytest.raises(GKError, match='scheme'): ece([0, 1], [.1, .2], scheme='x')
    with pytest.raises(GKError, match='n_bins'): ece([0, 1], [.1, .2], 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 9)] * 2, *[st.integers(1, 9)] * 2), min_size=1, max_size=6))
def test_iou_agrees_with_counting_pixels(boxes):
    b = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes]); got = box_iou(b, b)
    masks = np.zeros((len(b), 20, 20), bool)
    for m, (x0, y0, x1, y1) in zip(masks, b): m[y0:y1, x0:x1] = True
    want = [[(m & n).sum() / (m | n).sum() for n in masks] for m in masks]
    assert np.allclose(got, want) and np.allclose(got, got.T) and np.allclose(np.diag(got), 1)


@pytest.mark.parametrize('bad', [[[0, 0, 0, 1]], [[1, 0, 0, 1]], [[0, 0, np.nan, 1]], [[0, 0, 1]], [0, 0, 1, 1]])
def test_iou_refuses_boxes_that_are_none(bad):
    for args in ((bad, [[0, 0, 1, 1]]), ([[0, 0, 1, 1]], bad)):
        with pytest.raises(GKError, match='boxes'): box_iou(*args)


def test_check_binary_gives_bool_and_float():
    y, s = check_binary(np.array([True, False]), np.array([1, 2], np.float16)); assert y.dtype == bool and s.dtype == np.float64
