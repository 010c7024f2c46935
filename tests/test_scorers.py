"CheXbert and RadGraph, which are not here: what is said without them, and the way of their answers through the metrics."
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

from gk_mvlp.evaluation import scorers
from gk_mvlp.evaluation.text import report_metrics
from gk_mvlp.paths import GKError
from gk_mvlp.study.task_tables import task_wide
from gk_mvlp.tasks.report_generation import GenerationConfig


@pytest.fixture(autouse=True)
def fresh():
    scorers.load_scorer.cache_clear()
    yield
    scorers.load_scorer.cache_clear()


def frame(n=40, seed=0):
    r = np.random.default_rng(seed)
    say = lambda: ' '.join(f'w{k}' for k in np.flatnonzero(r.random(14) < .3)) + ' effusion'
    return pd.DataFrame({'study_id': [f's{i}' for i in range(n)], 'reference': [say() for _ in range(n)],
                         'candidate': [say() for _ in range(n)]})


def plant(monkeypatch, name, cls, make): monkeypatch.setitem(sys.modules, name, SimpleNamespace(**{cls: make}))


def test_chexbert_metrics_are_those_of_scikit_learn(monkeypatch):
    asked = []
    def get_label(text, mode):
        asked.append(text); assert mode == 'rrg'
        return [int(f'w{k}' in text.split()) for k in range(14)]
    plant(monkeypatch, 'f1chexbert', 'F1CheXbert', lambda: SimpleNamespace(get_label=get_label))
    f = scorers.add_scores(pd.concat([frame(), frame().assign(study_id=lambda d: d['study_id'] + 'b')]), ['chexbert'])
    assert len(asked) == len(set(asked)), 'each text once'
    y, p = (np.array([[int(f'w{k}' in t.split()) for k in range(14)] for t in f[c]]) for c in ('reference', 'candidate'))
    v = report_metrics(f, meteor=False)
    assert (v['chexbert_f1'][0] == pytest.approx(f1_score(y, p, average='micro'))
            and v['chexbert_macro_f1'][0] == pytest.approx(f1_score(y, p, average='macro')))


def test_radgraph_is_the_mean_of_its_rewards_in_every_resample(monkeypatch):
    plant(monkeypatch, 'radgraph', 'F1RadGraph', lambda reward_level: lambda hyps,
          refs: (0, list(np.linspace(0, 1, len(hyps))), [], []) if reward_level == 'partial' else None)
    f = scorers.add_scores(frame(), ['radgraph'])
    w = np.random.default_rng(0).integers(0, 3, (5, 40)).astype(float)
    assert np.allclose(report_metrics(f, w, meteor=False)['radgraph_f1'], w @ np.linspace(0, 1, 40) / w.sum(1))


@pytest.mark.parametrize('answer', [[1] * 13, [1] * 13 + [2], [1] * 13 + ['']])
def test_other_answers_than_expected_are_refused(monkeypatch, answer):
    plant(monkeypatch, 'f1chexbert', 'F1CheXbert', lambda: SimpleNamespace(get_label=lambda t, mode: answer))
    with pytest.raises(GKError, match='f1chexbert 0.0.2'): scorers.add_scores(frame(), ['chexbert'])


def test_fewer_scores_than_reports_are_refused(monkeypatch):
    plant(monkeypatch, 'radgraph', 'F1RadGraph', lambda reward_level: lambda hyps, refs: (0, [.5], [], []))
    with pytest.raises(GKError, match='1 scores for 40'): scorers.add_scores(frame(), ['radgraph'])


def test_missing_package_and_missing_weights_say_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, 'f1chexbert', None)
    with pytest.raises(GKError, match='pip install f1chexbert'): scorers.load_scorer('chexbert')
    def offline(reward_level): raise OSError('no connection')
    plant(monkeypatch, 'radgraph', 'F1RadGraph', offline)
    with pytest.raises(GKError, match='no connection.*fetches them once'): scorers.load_scorer('radgraph')
    with pytest.raises(GKError, match='meteo'): GenerationConfig(scorers=('meteo',))


def test_not_asked_for_is_absent():
    assert not {'chexbert_f1', 'radgraph_f1'} & set(report_metrics(frame(), meteor=False))
    t = pd.DataFrame([{'task': 'report_generation', 'dataset': 'd', 'method': 'gk', 'protocol': 'finetune', 'ratio': 100., 'metric': m,
                       'mean': .5, 'low': .4, 'high': .6, 'note': ''} for m in ('bleu_4', 'radgraph_f1')])
    assert list(task_wide(t, 'report_generation', 'd')) == ['bleu_4', 'radgraph_f1']
