"Intervals and tests: agreement with independent formulas, coverage, and refusal of what has no honest interval."
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score
from statsmodels.stats.multitest import multipletests

from gk_mvlp.evaluation.metrics import UndefinedMetric, auroc, ece
from gk_mvlp.evaluation.statistics import (PatientSampler, aggregate_seeds, bootstrap_ci, bootstrap_p, class_thresholds, delong, holm,
                                           macro_weighted, paired_bootstrap, patient_weights,
                                           percentile_interval, permutation_test, seed_interval, seed_mean, seed_draws, table_draws,
                                           weighted_auprc, weighted_auroc, weighted_f1, weighted_mean, with_whole)
from gk_mvlp.paths import GKError


def binormal(rng, n=200, d=1.2, share=.4):
    "Labels and scores with true AUROC Phi(d / sqrt 2)."
    y = (rng.random(n) < share).astype(int); return y, d * y + rng.normal(size=n)


def paired(rng, n=150, da=1., db=1.):
    y = rng.integers(0, 2, n); z = rng.normal(size=n); return y, da * y + z + .5 * rng.normal(size=n), db * y + z + .5 * rng.normal(size=n)


def test_a_draw_takes_whole_patients():
    g = np.array(list('aabcccd')); s = PatientSampler(g); rng = np.random.default_rng(0)
    seen = np.zeros(7)
    for _ in range(300):
        c = np.bincount(s.draw(rng), minlength=7); seen += c
        assert c[0] == c[1] and c[3] == c[4] == c[5] and c[0] + c[2] + c[3] + c[6] == 4
    assert np.allclose(seen / 300, 1, atol=.2), 'every patient is drawn once on average'


def test_same_seed_same_interval_whatever_the_order_of_patient_names():
    y, s = binormal(np.random.default_rng(0)); g = np.arange(200)
    a = bootstrap_ci(auroc, (y, s), g, 200, seed=1)
    assert a == bootstrap_ci(auroc, (y, s), g, 200, seed=1) and a != bootstrap_ci(auroc, (y, s), g, 200, seed=2)
    state = np.random.get_state()[1].copy(); bootstrap_ci(auroc, (y, s), g, 50)
    assert (np.random.get_state()[1] == state).all(), 'no global random state'


def test_a_thousand_resamples_of_three_hundred_take_under_two_seconds():
    y, s = binormal(np.random.default_rng(0), 300); t = time.process_time(); bootstrap_ci(auroc, (y, s), np.arange(300) // 2)
    assert time.process_time() - t < 2


def test_the_interval_of_a_mean_is_the_textbook_one():
    x = np.random.default_rng(0).normal(3, 2, 400); c = bootstrap_ci(np.mean, (x,), np.arange(400), 3000)
    half = 1.96 * x.std(ddof=1) / 20
    assert c.low == pytest.approx(x.mean() - half, abs=.03) and c.high == pytest.approx(x.mean() + half, abs=.03)


def test_repeating_every_study_adds_no_certainty():
    y, s = binormal(np.random.default_rng(0), 120); g = np.arange(120); w = lambda c: c.high - c.low
    one = w(bootstrap_ci(auroc, (y, s), g)); five = w(bootstrap_ci(auroc, (np.repeat(y, 5), np.repeat(s, 5)), np.repeat(g, 5)))
    naive = w(bootstrap_ci(auroc, (np.repeat(y, 5), np.repeat(s, 5)), np.arange(600)))
    assert five == pytest.approx(one, rel=.1) and naive < .6 * one


def test_undefined_resamples_are_counted_and_too_many_are_refused():
    s = np.random.default_rng(0).random(60)
    few = np.zeros(60, int); few[:4] = 1
    c = bootstrap_ci(auroc, (few, s), np.arange(60), 1000); assert 0 < c.n_undefined < 60, 'about exp(-4) of the resamples have no positive'
    one = np.zeros(60, int); one[0] = 1
    with pytest.raises(GKError, match='undefined in 3[0-9]{2} of 1000'): bootstrap_ci(auroc, (one, s), np.arange(60), 1000)
    with pytest.raises(UndefinedMetric): bootstrap_ci(auroc, (np.zeros(60, int), s), np.arange(60))


def test_bad_input_is_refused():
    y, s, g = np.array([0, 1, 0, 1]), np.arange(4.), np.arange(4)
    for args, why in (((auroc, (y, s), g[:3]), 'lengths'), ((auroc, (y, s[:3]), g), 'lengths'),
                      ((auroc, (y, s), [0, 0, 0, 0]), 'only one patient'), ((auroc, (y, s), [0, None, 1, 2]), 'missing'),
                      ((auroc, (y, s), g, 5), 'resamples'),
                      ((auroc, (y, np.array([0, 1, np.nan, 2])), g), 'NaN')):
        with pytest.raises(GKError, match=why): bootstrap_ci(*args)
    with pytest.raises(GKError, match='level'): bootstrap_ci(auroc, (y, s), g, level=95)
    with pytest.raises(GKError, match='lengths'): paired_bootstrap(auroc, y, s, s[:3], g)
    with pytest.raises(GKError, match='lengths'): permutation_test(auroc, y, s, s[:3], g)
    with pytest.raises(ZeroDivisionError): bootstrap_ci(lambda y, s: 1 / 0, (y, s), g)     # a bug in a metric is not "undefined"


def coverage(interval, reps, truth):
    hit = [(c := interval(r)).low <= truth <= c.high for r in range(reps)]; return np.mean(hit)


def auroc_interval(rep, n_boot):
    y, s = binormal(np.random.default_rng(rep), 150)
    return bootstrap_ci(auroc, (y, s), np.arange(150), n_boot, seed=rep)


def test_coverage_quick():
    c = coverage(lambda r: auroc_interval(r, 200), 100, norm.cdf(1.2 / 2 ** .5)); assert .87 <= c <= .995, c


@pytest.mark.slow
def test_coverage_of_auroc_and_of_patient_clusters():
    c = coverage(lambda r: auroc_interval(r, 500), 500, norm.cdf(1.2 / 2 ** .5)); assert .92 <= c <= .97, c

    def cluster(by_patient):
        def f(rep):
            r = np.random.default_rng(rep); p = np.repeat(r.beta(.8, .2, 100), 4); x = (r.random(400) < p).astype(float)
            return bootstrap_ci(np.mean, (x,), np.repeat(np.arange(100), 4) if by_patient else np.arange(400), 400, seed=rep)
        return coverage(f, 500, .8)
    assert .91 <= cluster(True) <= .975 and cluster(False) < .85


def test_paired_bootstrap_mirrors_and_pairs():
    y, a, b = paired(np.random.default_rng(0), db=1.8); g = np.arange(150)
    ab, ba = paired_bootstrap(auroc, y, a, b, g), paired_bootstrap(auroc, y, b, a, g)
    assert (ab.difference == pytest.approx(auroc(y, b) - auroc(y, a)) == -ba.difference and ab.low == pytest.approx(-ba.high)
            and ab.p == pytest.approx(ba.p) and ab.p < .05 and ab.low > 0)
    same = paired_bootstrap(auroc, y, a, a, g); assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert paired_bootstrap(auroc, y, a, b, g, n_boot=100).p >= 2 / 101, 'p is never 0'


def test_false_alarms_are_as_rare_as_promised():
    "Equal models: p < .05 in about 5 % of 80 repetitions, for each test."
    p = []
    for rep in range(80):
        y, a, b = paired(np.random.default_rng(rep), 100); g = np.arange(100)
        p.append((paired_bootstrap(auroc, y, a, b, g, 150, rep).p, permutation_test(auroc, y, a, b, g, 150, rep, ranks=True),
                  delong(y, a, b).p))
    rate = (np.array(p) < .05).mean(0); assert (rate < .13).all() and (np.array(p) < .5).mean(0).min() > .3, rate
    assert np.corrcoef(np.array(p).T).min() > .9, 'three tests of one question agree'


def test_permutation_swaps_whole_patients():
    y, a, b = paired(np.random.default_rng(1), 40); g = np.arange(40); rep = lambda x: np.repeat(x, 6)
    once, together, apart = (permutation_test(auroc, y, a, b, g, 500, ranks=True),
                             permutation_test(auroc, rep(y), rep(a), rep(b), rep(g), 500, ranks=True),
                             permutation_test(auroc, rep(y), rep(a), rep(b), np.arange(240), 500, ranks=True))
    assert together == pytest.approx(once, abs=.08) and apart < once - .1


def test_permutation_needs_one_scale():
    y, a, _ = paired(np.random.default_rng(0), 80); g = np.arange(80)
    assert permutation_test(auroc, y, a, np.exp(a) * 100, g, 100, ranks=True) == 1
    right = lambda y, s: float(np.mean((s > .5) == y))
    assert permutation_test(right, y, a, np.where(y == 1, 1., 0.), g, 200) < .02


def delong_by_pairs(y, a, b):
    "The definition, pair by pair, without ranks."
    y = y.astype(bool); n1, n0 = y.sum(), (~y).sum()
    psi = [(s[y][:, None] > s[~y]) + .5 * (s[y][:, None] == s[~y]) for s in (a, b)]
    auc = [p.mean() for p in psi]; cov = np.zeros((2, 2))
    for i in range(2):
        for j in range(2):
            cov[i, j] = (((psi[i].mean(1) - auc[i]) * (psi[j].mean(1) - auc[j])).sum() / (n1 - 1) / n1
                         + ((psi[i].mean(0) - auc[i]) * (psi[j].mean(0) - auc[j])).sum() / (n0 - 1) / n0)
    return auc, cov


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 9), st.integers(0, 9)), min_size=6,
                max_size=40).filter(lambda x: 2 <= sum(r[0] for r in x) <= len(x) - 2))
def test_delong_agrees_with_its_definition(rows):
    y, a, b = np.array(rows).T; auc, cov = delong_by_pairs(y, a, b); var = cov[0, 0] + cov[1, 1] - 2 * cov[0, 1]
    if var < 1e-12 and abs(auc[0] - auc[1]) > 1e-9:
        with pytest.raises(UndefinedMetric): delong(y, a, b)
        return
    d = delong(y, a, b)
    assert np.allclose((d.auc_a, d.auc_b), auc) and np.allclose(d.covariance, cov) and d.variance == pytest.approx(max(var, 0), abs=1e-12)
    if var > 1e-12: assert d.p == pytest.approx(2 * norm.sf(abs(auc[1] - auc[0]) / var ** .5), abs=1e-9)
    else: assert d.p == 1


def test_delong_edges():
    y, s = np.array([0, 0, 1, 1]), np.arange(4.)
    assert delong(y, s, s).p == 1
    with pytest.raises(UndefinedMetric, match='no variance'): delong(y, s, -s)
    with pytest.raises(UndefinedMetric, match='two of each'): delong(np.array([0, 0, 0, 1]), s, s)
    with pytest.raises(GKError, match='NaN'): delong(y, s, np.array([0, 1, np.nan, 2]))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_agrees_with_statsmodels(p):
    assert np.allclose(holm(p), multipletests(p, method='holm')[1])


@pytest.mark.parametrize('bad', [[], [.1, np.nan], [-.1], [1.1]])
def test_holm_refuses(bad):
    with pytest.raises(GKError): holm(bad)


def seeds_of(rng, y, n, spread, noise=1.): return [y * k + noise * rng.normal(size=len(y)) for k in rng.normal(1.2, spread, n)]


def test_seed_interval_holds_both_variances():
    rng = np.random.default_rng(0); y = rng.integers(0, 2, 200); g = np.arange(200); w = lambda c: c.high - c.low
    same = [1.2 * y + rng.normal(size=200)] * 3
    assert w(aggregate_seeds(auroc, y, same, g)) == pytest.approx(w(bootstrap_ci(auroc, (y, same[0]), g)), rel=.1), (
        'equal seeds: patients only')
    one = aggregate_seeds(auroc, y, same[:1], g)
    assert one.n_seeds == 1 and w(one) == pytest.approx(w(bootstrap_ci(auroc, (y, same[0]), g)), rel=.1)
    wild = aggregate_seeds(auroc, y, seeds_of(rng, y, 5, 1.), g)
    assert wild.n_seeds == 5 and wild.value == pytest.approx(np.mean(wild.per_seed)) and w(wild) > 1.3 * w(one)


def test_seeds_alone_give_students_interval():
    "Only seeds vary (a mean that is the same for all patients): the interval must be Student's, wider than the seeds' range."
    v = np.array([.70, .80, .75]); y = np.zeros(50); scores = [np.full(50, x) for x in v]
    c, t = aggregate_seeds(lambda y, s: s.mean(), y, scores, np.arange(50), n_boot=2000), seed_interval(v)
    assert (c.value, c.low, c.high) == pytest.approx((t.value, t.low, t.high), abs=2e-3) and c.low < .70 and c.high > .80


@pytest.mark.parametrize('n_seeds', [2, 3, 5])
@pytest.mark.parametrize('patients', [.05, 1.])
def test_a_true_null_is_rejected_no_more_often_than_stated(n_seeds, patients):
    """No difference between two methods: per-seed differences are noise, of patients (shared by the seeds) and of seeds. Resampling seeds rejected up to 44 % of these."""
    rng, p = np.random.default_rng(n_seeds), []
    for _ in range(400):
        common = patients * rng.normal(size=301)
        # on all data, then on resamples around it
        values = rng.normal(size=(n_seeds, 1)) + np.r_[common[0], common[0] + patients * rng.normal(size=300)]
        p.append(bootstrap_p(seed_mean(values, seed_draws(n_seeds, 300))[1]))
    assert np.mean(np.array(p) < .05) < .08


def test_an_interval_of_a_share_ends_at_its_bounds():
    boot = np.linspace(-.5, 1.5, 1001)
    assert percentile_interval(boot, share=True) == (0., 1.) and percentile_interval(boot) == pytest.approx((-.45, 1.45))


def test_p_values_are_fine_enough_for_a_table():
    "The largest family of a preset has about eighty tests."
    for n in (1, 3):
        values = np.ones((n, 1 + table_draws(n)))
        if n > 1: assert bootstrap_p(seed_mean(values)[1]) * 80 < .05
        assert bootstrap_p(seed_mean(values)[1]) * 40 < .05


def test_aggregate_seeds_refuses():
    y, s, g = np.array([0, 1, 0, 1]), np.arange(4.), np.arange(4)
    with pytest.raises(GKError, match='at least one seed'): aggregate_seeds(auroc, y, [], g)
    with pytest.raises(GKError, match='lengths'): aggregate_seeds(auroc, y, [s, s[:2]], g)
    with pytest.raises(GKError, match='NaN'): aggregate_seeds(auroc, y, [s, s * np.nan], g)


def test_student_interval():
    i = seed_interval([1., 2, 3]); assert i.value == 2 and i.sd == 1 and i.high - i.value == pytest.approx(4.3027 / 3 ** .5, rel=1e-4)
    for bad in ([1.], [1., np.nan]):
        with pytest.raises(GKError): seed_interval(bad)


@pytest.mark.slow
def test_coverage_over_seeds_and_patients():
    "New patients and new seeds each time; truth = mean AUROC of the population of seeds. Patients alone cover far less."
    truth = np.mean(norm.cdf(np.random.default_rng(99).normal(1.2, .6, 20000) / 2 ** .5)); hit = []
    for rep in range(200):
        rng = np.random.default_rng(rep); y = rng.integers(0, 2, 150); sc = seeds_of(rng, y, 5, .6); g = np.arange(150)
        c, one = aggregate_seeds(auroc, y, sc, g, 200, rep), bootstrap_ci(auroc, (y, sc[0]), g, 200, rep)
        hit.append((c.low <= truth <= c.high, one.low <= truth <= one.high))
    both, patients = np.mean(hit, 0); assert both > .85 and both > patients + .15, (both, patients)


# ---- weights and indices are one resampling

@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(0, 5)), min_size=8,
                max_size=40).filter(lambda x: len({r[0] for r in x}) == 2 and len({r[2] for r in x}) > 1))
def test_weighted_metrics_are_the_metrics_of_the_repeated_studies(rows):
    "Against scikit-learn on the studies repeated as often as drawn; NaN exactly where a class is missing."
    y, s, g = (np.array(c) for c in zip(*rows)); w = patient_weights(g, 30)
    auc, ap, f1 = weighted_auroc(y, s, w), weighted_auprc(y, s, w), weighted_f1(y, s >= 2, w)
    for b in range(30):
        i = np.repeat(np.arange(len(y)), w[b].astype(int))
        assert set(w[b][g == g[0]]) == {w[b][0]}, 'a patient comes whole'
        if len(set(y[i])) < 2: assert np.isnan(auc[b]) and np.isnan(ap[b])
        else: assert auc[b] == pytest.approx(roc_auc_score(y[i], s[i])) and ap[b] == pytest.approx(average_precision_score(y[i], s[i]))
        if (y[i] == 1).any() or (s[i] >= 2).any(): assert f1[b] == pytest.approx(f1_score(y[i], s[i] >= 2))
        else: assert np.isnan(f1[b])


def test_macro_weighted_agrees_with_scikit_learn_class_by_class():
    rng = np.random.default_rng(0); y = (rng.random((300, 4)) < [.4, .2, .1, 0]).astype(float)
    p = np.clip(np.where(y == 1, .6, .3) + .2 * rng.normal(size=y.shape), 0, 1)
    y[rng.random(y.shape) < .1] = np.nan; t = np.array([.4, .5, np.nan, .5]); w = patient_weights(np.arange(300) // 2, 5)

    def mean(f, classes): return [np.mean([f(c, ~np.isnan(y[:, c]), k) for c in classes]) for k in w]
    for m, f, classes in (('auroc', lambda c, k, w: roc_auc_score(y[k, c], p[k, c], sample_weight=w[k]), (0, 1, 2)),
                          ('auprc', lambda c, k, w: average_precision_score(y[k, c], p[k, c], sample_weight=w[k]), (0, 1, 2)),
                          ('brier', lambda c, k, w: brier_score_loss(y[k, c], p[k, c], sample_weight=w[k]), (0, 1, 2)),
                          ('f1', lambda c, k, w: f1_score(y[k, c], p[k, c] >= t[c], sample_weight=w[k]), (0, 1)),
                          ('accuracy', lambda c, k, w: np.average((p[k, c] >= t[c]) == (y[k, c] == 1), weights=w[k]), (0, 1))):
        got, n = macro_weighted(m, y, p, w, t)
        assert n == len(classes) and np.allclose(got, mean(f, classes)), m
    got, _ = macro_weighted('ece', y, p, np.ones((1, 300)))
    assert got[0] == pytest.approx(np.mean([ece(y[k, c], p[k, c]) for c in range(3) for k in [~np.isnan(y[:, c])]])), (
        'unweighted: the metric of 50_metrics')


def test_macro_weighted_refuses():
    y, s, w = np.array([[0.], [1], [0], [1]]), np.array([[.1], [.9], [.2], [2.]]), np.ones((1, 4))
    with pytest.raises(GKError, match='thresholds'): macro_weighted('f1', y, s, w)
    with pytest.raises(GKError, match='probabilities'): macro_weighted('brier', y, s, w)
    with pytest.raises(GKError, match='NaN'): macro_weighted('auroc', y, s * np.nan, w)
    with pytest.raises(GKError, match='metric'): macro_weighted('auc', y, s, w)
    with pytest.raises(UndefinedMetric): macro_weighted('auroc', np.zeros((4, 1)), s, w)
    with pytest.raises(UndefinedMetric): macro_weighted('f1', y, s, w, np.array([np.nan]))
    assert np.isnan(class_thresholds(np.zeros((4, 1)), s)).all(), 'one value in validation: no threshold, and none is invented'


def test_fast_and_slow_paths_give_the_same_interval():
    rng = np.random.default_rng(3); y = rng.integers(0, 2, 90); g = rng.integers(0, 40, 90); scores = seeds_of(rng, y, 4, .5)
    slow = aggregate_seeds(auroc, y, scores, g, 200, seed=5)
    mean, boot = seed_mean(np.stack([weighted_auroc(y, s, with_whole(patient_weights(g, 200, 5))) for s in scores]), seed_draws(4, 200, 5))
    assert (mean, *percentile_interval(boot)) == pytest.approx((slow.value, slow.low, slow.high), abs=1e-12)


def test_a_bootstrap_p_is_never_zero_and_never_above_one():
    assert (bootstrap_p(np.ones(99)) == pytest.approx(2 / 100) and bootstrap_p(np.zeros(99)) == 1
            and bootstrap_p(np.r_[np.ones(50), -np.ones(50)]) == 1)


@pytest.mark.slow
def test_coverage_of_weighted_auroc_auprc_f1_and_accuracy():
    "The 95 % interval of the tables holds the truth in 92 to 98 % of 500 trials, two studies a patient. Truths from two million studies."
    def draw(rng, n):
        p = np.repeat(rng.random(n) < .4, 2)
        return p.astype(float), 1.2 * p + np.repeat(rng.normal(size=n), 2) * .7 + rng.normal(size=2 * n) * .7
    y, s = draw(np.random.default_rng(10**6), 10**6); one = np.ones((1, len(y)))
    def values(y, s, w):
        return np.stack([weighted_auroc(y, s, w), weighted_auprc(y, s, w), weighted_f1(y, s > .6, w), weighted_mean((s > .6) == y, w)])
    truth, hits = values(y, s, one)[:, 0], []
    for rep in range(500):
        y, s = draw(np.random.default_rng(rep), 150)
        hits.append([lo <= t <= hi for t, (lo, hi) in zip(truth, (percentile_interval(v) for v in values(y, s,
            patient_weights(np.arange(300) // 2, 500, rep))), strict=True)])
    assert ((c := np.mean(hits, 0)) >= .92).all() and (c <= .98).all(), c
