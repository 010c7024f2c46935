"Gates and verdicts against plain rules; a report of a study without some of its tables."
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from gk_mvlp.config import Preset
from gk_mvlp.paths import GKError
from gk_mvlp.study.claims import CLAIMS, evidence, loss_gates, read_tables, report_text, study_claims, table_gates, verdict

P = Preset('a test', {}, {}, {}, {}, {}, methods=('scratch', 'gk'), seeds=(0, 1))


def pretraining(folder, itc, itm, n_val=100, batch=32):
    for s in P.seeds:
        f = folder/f'pretrain/gk-s{s}'; f.mkdir(parents=True)
        (f/'metrics.json').write_text(json.dumps({'itc_end': itc + s * .2, 'itm_end': itm, 'n_val': n_val}))
        (f/'config.json').write_text(json.dumps({'settings': {'train': {'batch_size': batch}}}))
    return folder


@pytest.mark.parametrize('itc, itm, n_val, want',
                         [(2.9, .5, 100, (True, True)), (3.1, .5, 100, (False, True)), (2.9, .61, 100, (True, False)),
                          # 16 validation studies: ln B = 2.77 and the mean of two seeds is .1 higher
                          (2.38, .5, 16, (True, True)), (2.45, .5, 16, (False, True))])
def test_loss_gates(tmp_path, itc, itm, n_val, want):
    gates = loss_gates(P, pretraining(tmp_path, itc, itm, n_val))
    assert [g.name for g in gates] == ['ITC', 'ITM'] and tuple(g.holds for g in gates) == want and gates[0].value == pytest.approx(itc + .1)


def test_an_unfinished_seed_is_no_gate(tmp_path):
    pretraining(tmp_path, 2., .5)
    (tmp_path/'pretrain/gk-s1/metrics.json').unlink()
    with pytest.raises(GKError, match='gk'): loss_gates(P, tmp_path)


def classes(rows):
    return pd.DataFrame([{'dataset': 'phantom', 'method': m, 'label': c, 'metric': 'auroc', 'ratio': 100., 'mean': v, 'low': v - .05,
                          'high': v + .05} for c, vs in rows.items() for m, v in vs.items()])


def test_findings_that_all_solve_or_none_sees():
    t = classes({'easy': {'scratch': .99, 'gk': .995}, 'hard': {'scratch': .5, 'gk': .54}, 'fair': {'scratch': .5, 'gk': .8},
                 'constant only': {'constant': .5, 'gk': .7}})
    solved, chance = table_gates(P, {'classification_classes': t})
    assert solved.value == 1 and 'easy' in solved.needed and solved.holds is False
    assert chance.value == 1 and '(hard)' in chance.needed and chance.holds is False
    assert all(g.holds for g in table_gates(P, {'classification_classes': t[t['label'] == 'fair']}))


@pytest.mark.parametrize('low, holds', [(.21, True), (.19, False)])
def test_reports_must_beat_the_better_constant(low, holds):
    reports = pd.DataFrame([{'dataset': 'phantom', 'method': m, 'metric': 'clinical_f1', 'mean': v}
                            for m, v in (('constant_normal', 0.), ('most_frequent', .2), ('nearest_neighbour', .9))])
    written = pd.DataFrame([{'dataset': 'phantom', 'method': 'gk', 'metric': 'clinical_f1', 'protocol': 'pretrained', 'mean': .3,
                             'low': low}])
    (gate,) = table_gates(P, {'report_generation': reports, 'ablation': written})
    assert gate.holds is holds and 'above 0.200' in gate.needed


def comparison(reference, difference, p, **more):
    return {'task': 'classification', 'dataset': 'phantom', 'protocol': 'linear_probe', 'ratio': 100., 'method': 'gk',
            'reference': reference, 'difference': difference, 'low': difference - .01, 'high': difference + .01, 'p_holm': p,
            'n': 50} | more


def test_a_comparison_with_a_yardstick_names_what_gk_was_asked():
    "The table's row of a yardstick has the yardstick as its protocol; the evidence is about gk's attention."
    row = {'task': 'grounding', 'dataset': 'phantom', 'ratio': np.nan, 'metric': 'pointing', 'n': 50, 'p_holm': .5}
    base = [{'method': 'gk', 'protocol': 'attention'}]
    others = [{'method': m, 'protocol': p, 'reference': 'gk', 'difference': -.1, 'difference_low': -.2, 'difference_high': .1}
              for m, p in (('uniform', 'uniform'), ('gk-null_prompts', 'attention'), ('gk', 'similarity'))]
    t = evidence({'grounding': pd.DataFrame([row | r for r in base + others])})
    assert (t[['method', 'protocol', 'reference']].values.tolist()
            == [['gk', 'attention', 'uniform'], ['gk', 'attention', 'gk-null_prompts'], ['gk', 'similarity', 'gk']])
    assert t['difference'].tolist() == [.1, .1, -.1] and t.loc[0, ['low', 'high']].tolist() == [-.1, .2]


def test_a_report_says_how_many_seeds_the_tasks_have():
    p = Preset('a test.', {}, {}, {}, {}, {}, seeds=(0, 1, 2, 3, 4), task_seeds=(0, 1, 2), tasks={'zero_shot': ['phantom']})
    assert '5 seed(s). For' in report_text(p, [], {}, 'test'), 'zero-shot trains nothing and has all seeds'
    text = report_text(replace(p, tasks={'vqa': ['phantom']}), [], {}, 'test')
    assert '5 seed(s); 3 in tasks' in text and '4 degree(s) of freedom (2 in localization' in text


def test_each_claim_takes_its_own_rows():
    tables = {'comparisons': pd.DataFrame([comparison('scratch', .1, .01), comparison('gk-null_prompts', -.1, .01),
                                           comparison('itc_itm_lm', .1, .2), comparison('itc_itm_lm', .1, .01, protocol='finetune')]),
              'subgroups': pd.DataFrame([{'task': 'subgroups', 'dataset': 'phantom', 'attribute': 'sex', 'group': 'gap', 'method': 'gk',
                                          'metric': 'auroc', 'reference': 'itc_itm_lm', 'difference': d, 'difference_low': d,
                                          'difference_high': d, 'p_holm': p, 'n': 9} for d, p in ((.1, .01), (.1, .9))])}
    said = {c.title: v for c, _, v in study_claims(tables)}
    assert said['Pre-training on reports helps'] == 'supported in all 1 tests'
    assert said['The knowledge in the prompts is what helps'] == 'contradicted: none of 1 tests for it, 1 against'
    assert said['The grounded-knowledge module helps'] == 'supported in part: 1 of 2 tests (0 also over all controls, 1 without a control)'
    assert said['Grounding does not widen gaps between groups'] == 'contradicted: none of 2 tests for it, 1 against'
    assert [said[t] for t in ('Entity classification helps', 'The gain grows with data and size')] == ['not testable here'] * 2
    assert len(said) == len(CLAIMS)


def test_a_gain_is_credited_only_over_every_control():
    gain = comparison('itc_itm_lm', .1, .01)
    def said(*controls):
        return {c.title: v for c, _, v in study_claims({'comparisons': pd.DataFrame([gain,
            *controls])})}['The grounded-knowledge module helps']
    assert (said(comparison('gk-roi_pool', .05, .01), comparison('gk-image_only', .05, .02))
            == 'supported in all 1 tests (1 also over all controls)')
    assert (said(comparison('gk-roi_pool', .05, .2), comparison('gk-image_only', .05, .02))
            == 'supported in all 1 tests (0 also over all controls)')
    assert (said(comparison('gk-roi_pool', .05, .01, protocol='finetune'))
            == 'supported in all 1 tests (0 also over all controls, 1 without a control)'), "another protocol's control is none"


def test_growth_is_not_a_gain():
    "A gain at every level says nothing about redundancy; only its growth does."
    row = {'task': 'robustness', 'dataset': 'phantom', 'metric': 'auroc', 'method': 'gk', 'reference': 'itc_itm_lm',
           'factor': 'boilerplate', 'level': 0., 'difference': .1, 'difference_low': .05, 'difference_high': .2, 'p_holm': .01, 'n': 9}
    said = lambda *rows: {c.title: v for c, _, v in study_claims({'robustness': pd.DataFrame(rows)})}['The gain grows with the redundancy '
                                                                                                      'of reports']
    assert said(row) == 'not testable here'
    assert said(row, row | {'method': 'gk - itc_itm_lm', 'reference': 'the same at 0', 'factor': 'boilerplate, highest against lowest',
                            'difference': -.1}) == 'contradicted: none of 1 tests for it, 1 against'


def test_a_gap_without_a_change_is_not_called_supported():
    rows = pd.DataFrame([{'task': 'subgroups', 'dataset': 'phantom', 'attribute': 'sex', 'group': 'gap', 'method': 'gk', 'metric': 'auroc',
                          'reference': 'itc_itm_lm', 'difference': .01, 'difference_low': 0., 'difference_high': .02, 'p_holm': 1.,
                          'n': 9}])
    assert [v for c, _, v in study_claims({'subgroups': rows}) if c.sign < 0] == ['no change found: in none of 1 tests']


def test_evidence_turns_ablations_round_and_keeps_controls():
    row = {'task': 'ablation', 'dataset': 'phantom', 'metric': 'auroc', 'difference_low': -.3, 'difference_high': .1, 'p_holm': np.nan,
           'n': 9}
    t = evidence({'ablation': pd.DataFrame([row | {'method': 'gk-local_only', 'reference': 'gk', 'difference': -.1},
                                            row | {'method': 'itc_itm_lm', 'reference': 'scratch', 'difference': -.1}])})
    assert (t[['method', 'reference', 'difference', 'low', 'high']].to_numpy().tolist()
            == [['gk', 'gk-local_only', .1, -.1, .3], ['itc_itm_lm', 'scratch', -.1, -.3, .1]])


def test_a_study_without_tables_has_a_report(tmp_path):
    text = report_text(P, [], read_tables(tmp_path), 'empty')
    assert 'No gate was measured' in text and text.count('not testable here') == len(CLAIMS) and 'Not measured.' in text
    assert verdict(pd.DataFrame(columns=['difference', 'p_holm'])) == 'not testable here'
