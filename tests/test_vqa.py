"Answers: the known yardsticks of VQA-RAD, a stated normalisation, and nothing dropped."
import numpy as np
import pandas as pd
import pytest

from gk_mvlp.data.study import QA, Study
from gk_mvlp.data.vqa_rad import read_questions
from gk_mvlp.evaluation.statistics import patient_weights
from gk_mvlp.evaluation.vqa import VQA_METRICS, accuracy_by_type, majority_answers, normalize_answer, question_frame, vqa_metrics
from gk_mvlp.paths import GKError


@pytest.mark.parametrize('organ, by_question, per_cent',
                         [(None, False, (35.7, 49.6, 14.5)), (None, True, (38.4, 53.3, 15.6)), ('CHEST', False, (39.1, 53.4, 10.3)),
                          ('CHEST', True, (41.4, 55.2, 13.8))])
def test_baselines_reach_the_yardsticks_of_vqa_rad(real_data, organ, by_question, per_cent):
    "Official split; figures measured before this code was written."
    qs = [q for q in read_questions(real_data/'vqa_rad') if organ in (None, q[2])]
    train, test = (question_frame([Study(f'{k}{i}', image, qa=[q], split=k) for i, (s, image, _, q) in enumerate(qs) if s == k])
                   for k in ('train', 'test'))
    assert len(test) == (451 if organ is None else 174)
    v = vqa_metrics(test.assign(prediction=majority_answers(train, test, by_question)))
    assert tuple(round(float(100 * v[m][0]), 1) for m in VQA_METRICS) == per_cent


@pytest.mark.parametrize('a, b, same', [('Yes', 'yes.', True), ('The left lung', 'left  lung', True), ('two', '2', True),
                                        ('1.5 cm', '1.5cm', False), ('x-ray', 'xray', False), ('right', 'left', False),
                                        ('5%', '5 %', False),
                                        ('AP', 'ap', True), ('', '...', True), ('an', '', True), ('lung/heart', 'lung heart', False),
                                        ('右肺', '左肺', False), ('右肺', '', False), ('右肺。', ' 右肺', True), ('２ ｃｍ', '2 cm', True),
                                        ('É', 'e\u0301', True), ('é', 'e', False), ('left_lung', 'left lung', True)])
def test_normalisation(a, b, same): assert (normalize_answer(a) == normalize_answer(b)) == same


def frame(*rows):
    return pd.DataFrame(rows, columns=['qid', 'subject_id', 'question', 'question_type', 'answer_type', 'answer', 'prediction'])


F = frame(('a', 'p', 'q?', 'presence', 'closed', 'yes', 'Yes.'), ('b', 'p', 'r?', 'side, size', 'closed', 'left', 'right'),
          ('c', 'q', 's?', 'place', 'open', 'The hilum', 'hilum'))


def test_accuracy_by_hand():
    v = vqa_metrics(F); assert (v['accuracy'][0], v['closed_accuracy'][0], v['open_accuracy'][0]) == pytest.approx((2 / 3, .5, 1))
    t = accuracy_by_type(F)
    assert t.loc['side', 'n'] == t.loc['size', 'n'] == 1 and t['accuracy'].to_dict() == {'presence': 1, 'side': 0, 'size': 0, 'place': 1}
    assert np.isnan(vqa_metrics(F[:2])['open_accuracy'][0]), 'no open question: no number'


def test_a_resample_is_the_accuracy_of_the_repeated_questions():
    w = patient_weights(F['subject_id'], 20); v = vqa_metrics(F, w)
    for b in range(20):
        i = np.repeat(np.arange(3), w[b].astype(int)); again = vqa_metrics(F.iloc[i].assign(qid=range(len(i))))
        assert all(v[m][b] == pytest.approx(again[m][0], nan_ok=True) for m in VQA_METRICS)


def test_baselines_never_see_test_answers():
    train = F.assign(answer=['no', 'left', 'aorta'])
    for by in (False, True): assert majority_answers(train, F, by) == majority_answers(train, F.assign(answer='?'), by)
    new = F.assign(question='never asked', question_type='new')
    assert majority_answers(train, new, True)[2] == 'aorta', 'unseen type: the answer type decides'
    closed_only = majority_answers(train[:2], F); assert closed_only[2] in ('no', 'left')


@pytest.mark.parametrize('change, says', [(lambda f: f.iloc[[0, 0]], 'repeats'),
                                          (lambda f: f.assign(prediction=None), 'without a prediction'),
                                          (lambda f: f.assign(prediction=np.nan), '3 question'), (lambda f: f[:0], 'no questions'),
                                          (lambda f: f.drop(columns='prediction'), "'prediction'")])
def test_bad_tables_are_refused(change, says):
    with pytest.raises(GKError, match=says): vqa_metrics(change(F))


def test_an_empty_answer_is_wrong_and_counted():
    assert vqa_metrics(F.assign(prediction=''))['accuracy'][0] == 0


def test_answers_in_chinese_are_compared_and_not_emptied():
    f = F.assign(answer=['有', '左肺', '肝脏'])
    assert vqa_metrics(f.assign(prediction=['有。', '右肺', '']))['accuracy'][0] == pytest.approx(1 / 3)


@pytest.mark.parametrize('empty', ['', '...', 'the', '？', None])
def test_a_true_answer_of_which_nothing_is_left_is_refused(empty):
    for prediction in ('', 'yes'):
        with pytest.raises(GKError, match="'b': nothing is left"):
            vqa_metrics(F.assign(answer=['yes', empty, 'hilum'], prediction=prediction))
    with pytest.raises(GKError, match="'a-q0'"): question_frame([Study('a', 'p', split='test', qa=[QA('q?', empty)])])


def test_questions_of_studies():
    s = [Study('a', 'p', split='test', qa=[QA('q?', 'yes', 'closed', 'presence', 'x'), QA('r?', 'no', 'closed')])]
    assert question_frame(s)['qid'].tolist() == ['x', 'a-q1']
    with pytest.raises(GKError, match='no questions'): question_frame(s, ['train'])
    with pytest.raises(GKError, match='repeats'):
        question_frame([Study('b', 'p', split='test', qa=[QA('q', 'a', qid='x'), QA('r', 'a', qid='x')])])
    with pytest.raises(GKError, match='answer type'): question_frame([Study('b', 'p', split='test', qa=[QA('q', 'a', 'CLOSED ')])])
    with pytest.raises(GKError, match='no training'): majority_answers(F[:0], F)
