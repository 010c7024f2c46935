"Maps against boxes by brute force; zero-shot scores and maps on planted models; refusals."
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from gk_mvlp.data.registry import load_dataset
from gk_mvlp.evaluation import grounding as G
from gk_mvlp.evaluation.metrics import UndefinedMetric
from gk_mvlp.evaluation.statistics import patient_weights
from gk_mvlp.models.encoders import train_tokenizer
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.paths import GKError
from gk_mvlp.tasks import zero_shot as Z
from gk_mvlp.training.batches import StudySet


def frame(maps, boxes, labels=None):
    return pd.DataFrame({'study_id': [f's{i}' for i in range(len(maps))], 'subject_id': [f'p{i}' for i in range(len(maps))],
                         'split': 'test', 'label': labels or ['a'] * len(maps),
                         'map': [np.ravel(m).tolist() for m in maps], 'boxes': [np.ravel(b).tolist() for b in boxes]})


def test_map_values_by_brute_force():
    rng = np.random.default_rng(0); maps = rng.random((6, 5, 5)); boxes = []
    for _ in range(6): a = rng.random((rng.integers(1, 4), 2)) * .6; boxes.append(np.c_[a, a + .2 + rng.random(a.shape) * .2])
    v = G.map_values(frame(maps, boxes), .25, size=40)
    for i in range(6):
        m = F.interpolate(torch.from_numpy(maps[i])[None, None], size=(40, 40), mode='bilinear')[0, 0].numpy(); a = np.zeros((40, 40), bool)
        for y in range(40):
            for x in range(40): a[y, x] = any(b[0] <= (x + .5) / 40 <= b[2] and b[1] <= (y + .5) / 40 <= b[3] for b in boxes[i])
        assert v['pointing'][i] == a[np.unravel_index(m.argmax(), m.shape)]
        assert v['cnr'][i] == pytest.approx((m[a].mean() - m[~a].mean()) / np.sqrt(m[a].var() + m[~a].var()))
        found = np.zeros(1600, bool); found[np.argsort(m.ravel())[-400:]] = True; found = found.reshape(40, 40)
        assert (v['iou'][i] == pytest.approx((found & a).sum() / (found | a).sum(), abs=.01)
                and v['dice'][i] == pytest.approx(2 * v['iou'][i] / (1 + v['iou'][i])))


def test_a_constant_map_is_chance_and_an_inverted_map_is_below_it():
    box = [np.array([[.25, .25, .75, .75]])]
    v = G.map_values(frame([np.ones((8, 8))], box), .25)
    assert v['pointing'][0] == pytest.approx(.25) and v['cnr'][0] == 0, 'the share of the area, not the first corner'
    hot = G.box_masks(box, 8)[0].astype(float)
    assert G.map_values(frame([hot], box), .25)['cnr'][0] > 1 > -1 > G.map_values(frame([1 - hot], box), .25)['cnr'][0]


def test_a_box_smaller_than_a_pixel_has_one():
    assert G.box_masks([np.array([[.51, .2, .515, .9]])], 8)[0].any() and G.box_masks([np.array([[.5, .5, .501, .501]])], 8)[0].sum() == 1


def test_the_share_is_chosen_on_validation():
    "The area that the boxes of validation have."
    box = [np.array([[.0, .0, .32 ** .5, .32 ** .5]])] * 5
    maps = [F.avg_pool2d(torch.from_numpy(G.box_masks(b_, 32)[:1]).double(), 4)[0].numpy() for b_ in [[b] for b in box]]
    assert G.choose_share(frame(maps, box)) == .3


def test_a_resample_is_the_metric_of_the_repeated_findings():
    rng = np.random.default_rng(1); f = frame(rng.random((10, 4, 4)), [np.array([[.1, .2, .6, .7]])] * 10)
    w = patient_weights(f['subject_id'], 5); boot = G.map_metrics(f, .2, w)
    for b in range(5):
        i = np.repeat(np.arange(10), w[b].astype(int)); again = G.map_metrics(f.iloc[i].assign(study_id=range(len(i))), .2)
        assert all(boot[m][b] == pytest.approx(again[m][0]) for m in G.MAP_METRICS)


@pytest.mark.parametrize('change, says', [(lambda f: f[:0], 'no finding'), (lambda f: f.iloc[[0, 0]], 'two maps'),
                                          (lambda f: f.assign(map=[[np.nan] * 16] * len(f)), 'NaN')])
def test_bad_maps_are_refused(change, says):
    with pytest.raises(GKError, match=says): G.map_values(change(frame(np.ones((2, 4, 4)), [np.array([[.1, .1, .5, .5]])] * 2)), .2)


def test_share_and_priors_are_checked():
    with pytest.raises(GKError, match='share'): G.map_values(frame(np.ones((1, 4, 4)), [np.array([[.1, .1, .5, .5]])]), 0.)
    with pytest.raises(GKError, match='prior'): G.prior_maps('middle', ['a'], 4, 1)
    m = G.prior_maps('train_prior', ['a', 'b'], 4, 3, [{'a': np.array([[0, 0, .5, 1]])}])
    assert m.shape == (3, 2, 4, 4) and (m[0, 0, :, :2] == 1).all() and (m[0, 0, :, 2:] == 0).all() and (m[0, 1] == 1).all()


@pytest.fixture(scope='module')
def world():
    studies = load_dataset('phantom', n=24, size=64)
    torch.manual_seed(0)
    model = GKMVLP(ModelConfig(dim=32, image_depth=1, text_depth=1, encoder_depth=1, decoder_depth=1, embed_dim=16, vocab_size=400,
                               max_length=40, region_source='vit'), train_tokenizer(prompt_book()[0], 400))
    return studies, StudySet(studies, None, 64), model.eval()


def test_zero_shot_scores_by_the_definition(world):
    studies, data, model = world; names = ['pleural effusion', 'cardiomegaly']
    one = Z.itc_scores(model, data, names, ['statement'])
    v = F.normalize(model.image_proj(model.image_encoder(data[[3]]['images'])[:, 0]), dim=-1)[0].detach()
    for c, n in enumerate(names):
        t = Z.text_embeddings(model, [f'There is {n}.', f'There is no {n}.']); scale = model.logit_scale.exp().detach()
        assert one[3, c] == pytest.approx(float(torch.softmax(scale * (t @ v), 0)[0]), abs=1e-5), 'the softmax over the pair'
    both = Z.itc_scores(model, data, names, ['statement', 'seen']); assert not np.allclose(both, one) and ((both > 0) & (both < 1)).all()


class On(torch.nn.Module):
    "Puts every picture on one point."
    def __init__(self, point): super().__init__(); self.point = point
    def forward(self, v): return self.point.expand(*v.shape[:-1], -1)


def test_a_picture_that_lies_on_the_sentence_scores_highest(world, monkeypatch):
    "A picture on the stating sentence is above .5, on the denying one below, by the cosine between the two."
    _, data, model = world; t = Z.text_embeddings(model, ['There is mass.', 'There is no mass.'])
    gap = float(model.logit_scale.exp().detach() * (1 - t[0] @ t[1]))
    for k, sign in ((0, 1), (1, -1)):
        monkeypatch.setitem(model._modules, 'image_proj', On(t[k]))
        assert (np.allclose(Z.itc_scores(model, data, ['mass'], ['statement']), torch.sigmoid(torch.tensor(sign * gap)), atol=1e-4)
                and gap > 0)


def test_maps_have_the_grid_and_follow_the_patches(world):
    studies, data, model = world; names = ['mass', 'nodule']
    s = Z.similarity_maps(model, data, names); a = Z.attention_maps(model, data, names)
    assert s.shape == a.shape == (24, 2, 8, 8) and (a >= 0).all() and np.isfinite(s).all()
    e = Z.prompt_embeddings(model, names, tuple(Z.PROMPT_SETS)); v = model.image_encoder(data[[5]]['images'])[0, 1:]
    p = F.normalize(model.image_proj(v), dim=-1) @ (e[0] - e[1]).T
    assert np.allclose(s[5].reshape(2, 64), p.T.detach().numpy(), atol=1e-5)


def test_zero_shot_refuses(world):
    _, data, model = world
    with pytest.raises(GKError, match='prompt set'): Z.itc_scores(model, data, ['mass'], ['poem'])
    with pytest.raises(GKError, match='no entity'): Z.ecls_scores(model, data, ['any_finding'])
    assert len({Z.class_prompts('any_finding', k) for k in Z.PROMPT_SETS}) == len(Z.PROMPT_SETS), 'an ensemble needs different wordings'
    assert Z.class_prompts('Infiltration', 'statement')[0] == 'There is lung opacity.'
    plain = GKMVLP(ModelConfig(objective='itc', dim=32, image_depth=1, text_depth=1, encoder_depth=1, decoder_depth=1, vocab_size=400,
                               max_length=40), model.tokenizer)
    with pytest.raises(GKError, match='entity scores'): Z.ecls_scores(plain, data, ['mass'])
    with pytest.raises(GKError, match='no attention from prompts'): Z.attention_maps(plain, data, ['mass'])


def test_no_study_has_a_box():
    with pytest.raises(UndefinedMetric): G.map_values(G.map_frame([], [], np.zeros((0, 1, 4, 4)), ['a']), .2)
