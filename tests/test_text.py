"Report metrics: equal to pycocoevalcap on real reports, nothing dropped, and the peers' doctored references measured."
import json

import numpy as np
import pandas as pd
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from sklearn.metrics import f1_score, precision_recall_fscore_support

from gk_mvlp.data.knowledge import ENTITY_NAMES
from gk_mvlp.data.study import Study
from gk_mvlp.evaluation import text as T
from gk_mvlp.evaluation.metrics import UndefinedMetric
from gk_mvlp.evaluation.statistics import patient_weights
from gk_mvlp.paths import GKError

java = pytest.mark.skipif(not T.has_java(), reason='no Java: METEOR and the Penn Treebank tokenizer need it')


@pytest.fixture
def iu(real_data):
    "Real reports of IU X-Ray in R2Gen's layout: train and test texts."
    d = json.loads((real_data/'iu_xray'/'annotation.json').read_text(encoding='utf-8'))
    return {k: [r['report'] for r in v] for k, v in d.items()}




def pairs(reports, n):
    "Each report with another one as candidate."
    ref = reports[:n]; return ref[1:] + ref[:1], ref


def test_bleu_rouge_cider_equal_pycocoevalcap_on_real_reports(iu):
    cand, ref = pairs(iu['test'], 300)
    gts, res = ({i: [' '.join(T.words(t))] for i, t in enumerate(x)} for x in (ref, cand))
    v = T.nlg_values(T.count_texts(cand, ref, meteor=False))
    assert np.allclose([v[f'bleu_{n}'][0] for n in range(1, 5)], Bleu(4).compute_score(gts, res, verbose=0)[0], atol=1e-9)
    assert (v['rouge_l'][0] == pytest.approx(Rouge().compute_score(gts, res)[0])
            and v['cider'][0] == pytest.approx(Cider().compute_score(gts, res)[0]))
    assert np.isnan(v['meteor'][0]), 'not asked for: absent'


@java
def test_meteor_equals_its_own_program(iu):
    from pycocoevalcap.meteor.meteor import Meteor
    cand, ref = pairs(iu['test'], 120); cand[3] = ''; cand[5] = ref[5]
    c = T.count_texts(cand, ref)
    total, each = Meteor().compute_score({i: [' '.join(T.words(t))] for i, t in enumerate(ref)},
                                         {i: [' '.join(T.words(t))] for i, t in enumerate(cand)})
    assert T.nlg_values(c)['meteor'][0] == pytest.approx(total, abs=1e-9) and np.allclose(T.meteor_score(c.meteor), each, atol=1e-9)
    assert T.meteor_score(c.meteor)[3] == 0 and T.meteor_score(c.meteor)[5] > .99


@java
def test_words_are_nearly_those_of_the_treebank_tokenizer(iu):
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer
    cand, ref = pairs(iu['test'], 590)
    ptb = [{k: v for k, v in PTBTokenizer().tokenize({i: [{'caption': t}] for i, t in enumerate(x)}).items()} for x in (ref, cand)]
    same = np.mean([ptb[0][i][0].split() == T.words(t) for i, t in enumerate(ref)]); assert same > .97
    theirs, ours = Bleu(4).compute_score(*ptb, verbose=0)[0], T.nlg_values(T.count_texts(cand, ref, meteor=False))
    assert np.allclose([ours[f'bleu_{n}'][0] for n in range(1, 5)], theirs, atol=.002)


def test_shuffled_reports_reach_the_known_floor(iu):
    "Measured independently with the Treebank tokenizer on all 2,955 reports: BLEU-4 .066, ROUGE-L .226."
    reports = iu['train'] + iu['val'] + iu['test']
    i = np.random.default_rng(1).permutation(len(reports))[:900]; j = np.random.default_rng(2).permutation(i)
    v = T.nlg_values(T.count_texts([reports[k] for k in j], [reports[k] for k in i], meteor=False))
    assert v['bleu_4'][0] == pytest.approx(.066, abs=.008) and v['rouge_l'][0] == pytest.approx(.226, abs=.01)


def test_r2gen_bug_doctored_references_inflate(iu):
    """B2.10: references that are cut at 60 words and lose their rare words give more BLEU to the same candidates. On real reports, both
    changes apart."""
    ref = iu['test']; raw = {r for r in ref if len(T.words(r)) > 60}; assert len(raw) > 10, 'real references are longer than 60 words'
    cand = T.peer_references(ref[1:] + ref[:1], iu['train'])
    bleu = lambda r: T.nlg_values(T.count_texts(cand, r, meteor=False))['bleu_4'][0]
    assert bleu(T.peer_references(ref, iu['train'])) > bleu(ref)
    unknown = T.peer_references(ref, iu['train'], longest=10**6); assert any(' unk ' in u for u in unknown) and bleu(unknown) > bleu(ref)
    short = [' '.join(T.words(r)[:30]) for r in ref]; full = T.nlg_values(T.count_texts(short, ref, meteor=False))['bleu_4'][0]
    assert (T.nlg_values(T.count_texts(short, T.peer_references(ref, iu['train'], least=0, longest=30), meteor=False))['bleu_4'][0] > full
            + .05), 'a model that stops early is not punished'


def test_references_stay_raw():
    "What the radiologist wrote goes into the table: case, rare words and length."
    s = Study('a', 'p', report='FINDINGS: A Schmorl node of 1.5 cm. ' + 'The heart is normal. ' * 40, split='test')
    f = T.report_frame([s], ['x'])
    assert f['reference'][0] == s.report and len(T.words(f['reference'][0])) > 100 and 'schmorl' in T.words(f['reference'][0])


def test_a_resample_is_the_metric_of_the_repeated_reports(iu):
    cand, ref = pairs(iu['test'], 60); w = patient_weights(np.arange(60) // 2, 6); c = T.count_texts(cand, ref); v = T.nlg_values(c, w)
    for b in range(6):
        i = np.repeat(np.arange(60), w[b].astype(int)); again = T.nlg_values(T.count_texts([cand[k] for k in i], [ref[k] for k in i]))
        for m in T.NLG_METRICS:
            # CIDEr keeps the document frequencies of the test set
            if m != 'cider': assert v[m][b] == pytest.approx(again[m][0], nan_ok=True), m


def test_without_java_only_meteor_is_absent(monkeypatch, iu):
    cand, ref = pairs(iu['train'], 80); full = T.report_metrics(pd.DataFrame({'study_id': range(80), 'reference': ref, 'candidate': cand}))
    monkeypatch.setenv('PATH', '')
    assert not T.has_java()
    v = T.report_metrics(pd.DataFrame({'study_id': range(80), 'reference': ref, 'candidate': cand}))
    assert np.isnan(v['meteor'][0]) and all(v[m][0] == full[m][0] for m in full if m != 'meteor')
    with pytest.raises(GKError, match='Java'): T.count_texts(cand, ref, meteor=True)


def test_clinical_scores_agree_with_scikit_learn():
    rng = np.random.default_rng(0); ref, cand = rng.random((2, 80, len(ENTITY_NAMES))) < .15; ref[:, 3] = False
    v = T.clinical_values(cand, ref)
    p, r, f, _ = precision_recall_fscore_support(ref, cand, average='micro', zero_division=0)
    assert (v['clinical_precision'][0], v['clinical_recall'][0], v['clinical_f1'][0]) == pytest.approx((p, r, f))
    keep = ref.any(0)
    assert not keep.all() and v['clinical_macro_f1'][0] == pytest.approx(f1_score(ref[:, keep], cand[:, keep], average='macro',
        zero_division=0))
    none = T.clinical_values(np.zeros_like(ref), ref)
    assert none['clinical_f1'][0] == none['clinical_precision'][0] == none['clinical_macro_f1'][0] == 0
    w = patient_weights(np.arange(80), 5); boot = T.clinical_values(cand, ref, w)
    for b in range(5):
        i = np.repeat(np.arange(80), w[b].astype(int)); again = T.clinical_values(cand[i], ref[i])
        assert all(boot[m][b] == pytest.approx(again[m][0]) for m in boot)


def test_the_reader_of_reports_is_good_enough_for_real_reports(real_data):
    "Against the MeSH terms of 3,800 IU reports, for the entities that have a term; micro-averaged."
    f = pd.read_csv(real_data/'iu_xray'/'indiana_reports.csv').fillna('')
    terms = {'pleural effusion': 'Pleural Effusion', 'cardiomegaly': 'Cardiomegaly', 'pneumothorax': 'Pneumothorax',
             'pulmonary edema': 'Pulmonary Edema', 'hiatal hernia': 'Hernia, Hiatal', 'atelectasis': 'Pulmonary Atelectasis',
             'granuloma': 'Granuloma', 'fracture': 'Fractures, Bone'}
    truth = np.array([[any(t in part for part in m.split(';')) for t in terms.values()] for m in f['MeSH']])
    read = T.stated_entities((f['findings'] + ' ' + f['impression']).tolist())[:, [ENTITY_NAMES.index(n) for n in terms]]
    p, r, _, _ = precision_recall_fscore_support(truth, read, average='micro'); assert p > .8 and r > .8, (p, r)


@pytest.mark.parametrize('cand, ref, says', [([], [], 'no reports'), (['a'], ['a', 'b'], '1 candidates for 2'), ([None], ['a'], 'no text'),
                                             ([float('nan')], ['a'], 'no text'), (['a'], [' . '], 'no word')])
def test_bad_texts_are_refused(cand, ref, says):
    with pytest.raises(GKError, match=says): T.count_texts(cand, ref)


def test_bad_tables_are_refused():
    f = pd.DataFrame({'study_id': ['a', 'a'], 'reference': ['x', 'y'], 'candidate': ['x', 'y']})
    with pytest.raises(GKError, match='repeats'): T.report_metrics(f)
    with pytest.raises(GKError, match='candidate'): T.report_metrics(f.drop(columns='candidate'))
    with pytest.raises(UndefinedMetric, match='no reference states'): T.report_metrics(f.assign(study_id=['a', 'b']), meteor=False)
    with pytest.raises(GKError, match='1 reports for 0'): T.report_frame([], ['a'])


def test_an_empty_report_scores_zero_and_is_not_dropped():
    v = T.nlg_values(T.count_texts(['', 'small effusion on the left'], ['the lungs are clear', 'small effusion on the left'], meteor=False))
    assert v['rouge_l'][0] == pytest.approx(.5) and v['bleu_1'][0] < .7
