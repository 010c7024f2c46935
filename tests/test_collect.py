"Tables from predictions that hardly allow one."
import numpy as np

from gk_mvlp.study import collect
from gk_mvlp.study.experiments import load_studies


def cell(method, positive, n=40, seed=0):
    "One class; each patient has two studies, `positive` patients have the finding."
    patients = np.repeat(np.arange(n // 2).astype(str), 2); y = (patients.astype(int) < positive).astype(float)[:, None]
    scores = np.clip(.5 * y + np.random.default_rng(seed).random((n, 1)) / 2, 0, 1)
    return collect.Cell('d', method, 'linear_probe', 100., y, scores[None], patients, (0,), (f'{method}-run',), {'n_train': 9, 'n_val': 9},
                        np.array([[.5]]), ('a',))


def test_too_few_positives_leave_a_number_without_interval():
    few = [cell('gk', 1), cell('scratch', 1, seed=1)]
    table, comparisons = collect.classification_table(few, 200), collect.comparison_table(few)
    auc = table[table['metric'] == 'auroc']
    assert auc['mean'].notna().all() and auc[['low', 'high']].isna().all(axis=None) and not len(comparisons)
    text = collect.markdown_report(table, comparisons, '')
    assert 'Too few test patients' in text and 'nan' not in text and 'No comparison.' in text


def test_enough_positives_have_intervals():
    many = [cell('gk', 8), cell('scratch', 8, seed=1)]
    table, comparisons = collect.classification_table(many, 200), collect.comparison_table(many)
    assert table.loc[table['metric'] == 'auroc', 'low'].notna().all() and len(comparisons) == 1
    assert 'Median width' in collect.markdown_report(table, comparisons, '')
    inside = table[table['metric'] != 'ece']
    assert (((inside['low'] <= inside['mean']) & (inside['mean'] <= inside['high'])).all() and len(inside) == 10
            and table.loc[table['metric'] == 'ece', ['low', 'high']].isna().all(axis=None))


def test_options_of_a_data_set_reach_its_loader(real_data):
    got = {}
    for test in (.15, .4):
        studies, _ = load_studies({'dataset_options': {'rsna': {'fractions': {'train': .8 - test, 'val': .2, 'test': test}}}}, 'rsna',
                                  str(real_data))
        got[test] = len({s.subject_id for s in studies if s.split == 'test'}) / len({s.subject_id for s in studies})
    assert abs(got[.15] - .15) < .02 and abs(got[.4] - .4) < .02
