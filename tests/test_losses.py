"Each loss against a formula written out with loops, its gradient, and its edge cases."
import math

import pytest
import torch
import torch.nn.functional as F

from gk_mvlp.models import losses as L


def plain_itc(image, text, scale, key):
    total = 0.
    B = len(image)
    for a, b in ((image, text), (text, image)):
        for i in range(B):
            logits = [scale * (a[i] * b[j]).sum() for j in range(B)]
            z = torch.logsumexp(torch.stack(logits), 0)
            same = [j for j in range(B) if key[i] == key[j]]
            total = total + sum(z - logits[j] for j in same) / len(same) / B
    return total / 2


@pytest.mark.parametrize('key', [[0, 1, 2, 3, 4], [0, 1, 1, 2, 0], [7] * 5])
def test_itc_equals_the_loop(key):
    g = torch.Generator().manual_seed(1)
    x, y = (F.normalize(torch.randn(5, 8, generator=g), dim=-1).requires_grad_() for _ in range(2))
    ours, ref = L.itc_loss(x, y, torch.tensor(10.), torch.tensor(key))[0], plain_itc(x, y, 10., key)
    assert torch.allclose(ours, ref, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, [x, y]), torch.autograd.grad(ref, [x, y])):
        assert torch.allclose(a, b, atol=1e-5)


def plain_ecls(scores, y):
    total, n = 0., 0
    for s, t in zip(scores, y):
        pos = [math.exp(v) for v, k in zip(s.tolist(), t.tolist()) if k == 1]
        neg = [math.exp(v) for v, k in zip(s.tolist(), t.tolist()) if k == -1]
        if pos: total, n = total - math.log(sum(pos) / (sum(pos) + sum(neg))), n + 1
    return total / n if n else 0.


def test_ecls_equals_the_loop_and_ignores_the_unmentioned():
    g = torch.Generator().manual_seed(2)
    s = torch.randn(40, 6, generator=g)
    y = torch.randint(-1, 3, (40, 6), generator=g).float()
    y[y == 2] = float('nan')
    assert math.isclose(L.ecls_loss(s, y).item(), plain_ecls(s, y), rel_tol=1e-5)
    changed = torch.where(torch.isnan(y) | (y == 0), torch.tensor(50.), s)
    assert math.isclose(L.ecls_loss(changed, y).item(), L.ecls_loss(s, y).item(), rel_tol=1e-6)


def test_ecls_gradcheck():
    y = torch.tensor([[1., -1, float('nan')], [1, 1, -1]])
    s = torch.randn(2, 3, requires_grad=True)
    f = lambda x: L.ecls_loss(x, y)
    (g,) = torch.autograd.grad(f(s), s)
    eps = 1e-3
    for i in range(2):
        for j in range(3):
            d = torch.zeros(2, 3); d[i, j] = eps
            assert abs((f(s + d) - f(s - d)).item() / (2 * eps) - g[i, j].item()) < 1e-3


@pytest.mark.parametrize('form', ['softmax', 'sigmoid'])
def test_ecls_with_nothing_to_learn_is_zero_and_differentiable(form):
    s = torch.randn(3, 4, requires_grad=True)
    loss = L.ecls_loss(s, torch.full((3, 4), float('nan')), form)
    loss.backward()
    assert loss.item() == 0 and torch.equal(s.grad, torch.zeros(3, 4))


def test_lm_equals_the_loop():
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 6, 11, generator=g)
    ids = torch.randint(0, 11, (3, 6), generator=g)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 2 + [0] * 4])
    eps, total, n = .1, 0., 0
    for b in range(3):
        for t in range(5):
            if not mask[b, t + 1]: continue
            logp = logits[b, t].log_softmax(-1)
            total, n = total - ((1 - eps) * logp[ids[b, t + 1]] + eps * logp.mean()).item(), n + 1
    assert math.isclose(L.lm_loss(logits, ids, mask, eps).item(), total / n, rel_tol=1e-5)


def test_hard_negatives_never_pick_the_same_report_or_study():
    "Peers' bug: BLIP's pre-training samples negatives with no mask for equal texts."
    g = torch.Generator().manual_seed(4)
    for _ in range(200):
        B = 8
        report = torch.randint(0, 4, (B,), generator=g)
        study = torch.randint(0, 6, (B,), generator=g)
        t, i, ok = L.hard_negatives(torch.randn(B, B, generator=g) * 20, report, study, g)
        for r in range(B):
            admissible = [c for c in range(B) if report[c] != report[r] and study[c] != study[r]]
            assert bool(ok[r]) == bool(admissible)
            if admissible: assert t[r].item() in admissible and i[r].item() in admissible


def test_hard_negatives_prefer_the_similar():
    s = torch.zeros(3, 3); s[0, 2] = 8.
    draws = [L.hard_negatives(s, torch.arange(3), torch.arange(3), torch.Generator().manual_seed(k))[0][0].item() for k in range(100)]
    assert draws.count(2) > 95


def test_hard_negatives_survive_extreme_similarities():
    "Peers' bug: multinomial stops on rows that underflow to zero."
    s = torch.full((4, 4), -1e30); s.fill_diagonal_(1e30)
    t, i, ok = L.hard_negatives(s, torch.arange(4), torch.arange(4))
    assert ok.all() and all(t[k] != k and i[k] != k for k in range(4))


def test_batch_of_one_and_all_duplicates_are_finite():
    x = F.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
    for rows, key in ((1, [0]), (4, [5, 5, 5, 5])):
        loss = L.itc_loss(x[:rows], x[:rows].detach(), torch.tensor(20.), torch.tensor(key))[0]
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(x.grad).all()
    assert L.itm_loss(torch.randn(0, 2), torch.zeros(0, dtype=torch.long)) == 0


def test_itc_is_computed_in_float32_under_autocast():
    "A bfloat16 softmax at scale 100 would lose the second digit of the loss."
    x, y = F.normalize(torch.randn(8, 16), dim=-1), F.normalize(torch.randn(8, 16), dim=-1)
    want = L.itc_loss(x, y, torch.tensor(100.), torch.arange(8))[0]
    with torch.autocast('cpu', torch.bfloat16):
        assert (x @ y.T).dtype == torch.bfloat16, 'autocast is on'
        got = L.itc_loss(x, y, torch.tensor(100.), torch.arange(8))[0]
    assert got.dtype == torch.float32 and torch.isclose(got, want, rtol=1e-6)


@pytest.mark.parametrize('start,end,verdict', [(math.log(16), 1., 'ok'), (math.log(16), math.log(16) * .99, 'stuck'),
                                               (9., 1., 'odd start')])
def test_health_verdicts(start, end, verdict):
    assert L.health_report({'itc': start}, {'itc': end}, 16, 100)['itc']['verdict'] == verdict


def plain_local(p, w, m, key):
    "GLoRIA's local similarity with loops."
    B = len(p)
    s = torch.zeros(B, B, dtype=p.dtype)
    for i in range(B):
        for j in range(B):
            terms = []
            for t in range(w.shape[1]):
                if not m[j, t]: continue
                a = torch.softmax(4 * (p[i] @ w[j, t]), 0)
                c = (a[:, None] * p[i]).sum(0)
                terms.append(torch.exp(5 * (c / c.norm() @ w[j, t])))
            s[i, j] = torch.log(torch.stack(terms).mean()) / 5
    total = 0.
    for k in (10 * s, 10 * s.T):
        for i in range(B):
            same = [j for j in range(B) if key[i] == key[j]]
            total = total + sum(torch.logsumexp(k[i], 0) - k[i, j] for j in same) / len(same) / B
    return total / 2


@pytest.mark.parametrize('key', [[0, 1, 2], [0, 1, 0]])
def test_local_equals_the_loop_with_its_gradient(key):
    g = torch.Generator().manual_seed(3)
    p = F.normalize(torch.randn(3, 5, 6, generator=g), dim=-1).requires_grad_()
    w = F.normalize(torch.randn(3, 4, 6, generator=g), dim=-1).requires_grad_()
    m = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    ours, ref = L.local_loss(p, w, m, torch.tensor(key)), plain_local(p, w, m, key)
    assert torch.allclose(ours, ref, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, [p, w]), torch.autograd.grad(ref, [p, w])):
        assert torch.allclose(a, b, atol=1e-5)


def test_hardness_zero_draws_any_other_report_and_one_the_nearest():
    s = torch.tensor([[0., 30., 0., 0.]] * 4)
    g = torch.Generator().manual_seed(0)
    picks = {h: torch.stack([L.hard_negatives(s, torch.arange(4), torch.arange(4), g, h)[0] for _ in range(300)]) for h in (0., 1.)}
    assert (picks[1.][:, [0, 2, 3]] == 1).all()
    counts = torch.bincount(picks[0.][:, 0], minlength=4)
    assert counts[0] == 0 and counts[1:].min() > 60
