"A frozen knowledge encoder's store of embeddings: equal to encoding anew, and never out of date."
import copy
import pickle

import pytest
import torch

from gk_mvlp.data.knowledge import ENTITIES
from gk_mvlp.models.encoders import FrozenEncoder, TextEncoder, train_tokenizer
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.paths import GKError
from gk_mvlp.training.trainer import TrainConfig, parameter_groups
from test_model import batch, make, tok  # noqa: F401

E = len(ENTITIES)


@pytest.fixture
def frozen():
    torch.manual_seed(1)
    return FrozenEncoder(TextEncoder(50, dim=16, depth=2, heads=2, dropout=.3))


@pytest.fixture
def texts():
    g = torch.Generator().manual_seed(2)
    ids, mask = torch.randint(5, 50, (6, 9), generator=g), torch.arange(9)[None] < torch.tensor([9, 4, 6, 1, 5, 9])[:, None]
    ids[5], mask[5] = ids[0], mask[0]                      # the same text twice
    return ids.masked_fill(~mask, 0), mask.long()


def anew(f, ids, mask):
    "Without any store: one text at a time, unpadded."
    with torch.no_grad(): return torch.cat([f.encoder(i[None, :int(m.sum())], m[None, :int(m.sum())])[:, 0] for i, m in zip(ids, mask)])


def count(f):
    seen = []
    f.encoder.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    return seen


def test_equals_encoding_anew_and_encodes_each_text_once(frozen, texts):
    ids, mask = texts
    want, seen = anew(frozen, ids, mask), count(frozen)
    for rows in ([1], [0, 5, 1], [3, 2, 4, 0, 1, 5]): assert torch.allclose(frozen(ids[rows], mask[rows]), want[rows], atol=1e-6)
    assert sum(seen) == 5, 'six texts, two of them equal'
    assert not frozen(ids, mask).requires_grad


def test_store_ignores_dropout_autocast_and_inference_mode(frozen, texts):
    want = anew(frozen, *texts)
    frozen.train()
    with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16): a = frozen(*texts)
    assert torch.allclose(a, want, atol=1e-6) and a.dtype == torch.float32, 'kept in float32, whoever asked first'
    w = torch.nn.Linear(16, 1)
    w(frozen(*texts)).sum().backward()                     # a tensor of inference mode could not be used here
    assert w.weight.grad.abs().sum() > 0


@pytest.mark.parametrize('change', ['load_state_dict', 'assign', 'in place', 'new data', 'double', 'bfloat16', 'replaced'])
def test_other_weights_other_embeddings(frozen, texts, change):
    old = frozen(*texts)
    torch.manual_seed(9)
    other = TextEncoder(50, dim=16, depth=2, heads=2)
    if change == 'load_state_dict': frozen.encoder.load_state_dict(other.state_dict())
    if change == 'assign': frozen.encoder.load_state_dict(other.state_dict(), assign=True)
    if change == 'in place':
        with torch.no_grad(): frozen.encoder.bert.encoder.layer[0].output.dense.weight.mul_(2)
    if change == 'new data':
        for _ in range(3): frozen.encoder.bert.encoder.layer[1].output.dense.weight.data = torch.randn(16, 64)
    if change == 'double': frozen.double()
    if change == 'bfloat16': frozen.to(torch.bfloat16)
    if change == 'replaced': frozen.encoder = other.eval()
    new = frozen(*texts)
    assert torch.allclose(new, anew(frozen, *texts), atol=1e-6 if new.dtype != torch.bfloat16 else .05) and new.dtype == next(frozen.parameters()).dtype
    assert (new.double() - old.double()).abs().max() > (1e-9 if change == 'double' else 1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_store_moves_with_the_device(frozen, texts):
    want = frozen(*texts)
    assert torch.allclose(frozen.cuda()(*(t.cuda() for t in texts)).cpu(), want, atol=1e-3) and frozen.cpu()(*texts).device.type == 'cpu'


def test_store_is_neither_saved_nor_copied(frozen, texts):
    before = set(frozen.state_dict())
    old = frozen(*texts)
    assert set(frozen.state_dict()) == before == {f'encoder.{k}' for k in frozen.encoder.state_dict()}
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert not twin._kept and torch.equal(twin(*texts), old)


def anew_model(model):
    "The same model whose frozen encoder is called for every prompt in every step."
    model.frozen_text.forward = lambda ids, mask: model.frozen_text.encoder(ids, mask)[:, 0]
    return model


@pytest.mark.parametrize('mode', ['none', 'predicted', 'all', 'mixed', 'oracle'])
def test_model_with_and_without_store_agree(tok, batch, mode):  # noqa: F811
    model = make(tok, freeze_knowledge=True, train_prompts=mode, dropout=0.)
    plain = anew_model(copy.deepcopy(model))
    for _ in range(2):                                     # an empty store, then a full one
        runs = []
        for m in (model, plain):
            torch.manual_seed(4); m.zero_grad()
            out = m(batch); out['loss'].backward()
            runs.append((out, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
        (a, ga), (b, gb) = runs
        assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a) and ga.keys() == gb.keys()
        assert all(torch.allclose(ga[n], gb[n], atol=1e-5) for n in ga) and not any(n.startswith('frozen_text') for n in ga)


def test_frozen_encoder_is_one_is_not_trained_and_is_saved(tok, batch, tmp_path):  # noqa: F811
    model = make(tok, freeze_knowledge=True)
    assert model.entity_encoder is None and model.knowledge_encoder is None
    groups = parameter_groups(model, TrainConfig(epochs=1, batch_size=2, lr=1e-3))
    trained = {id(p) for g in groups for p in g['params']}
    assert not any(id(p) in trained for p in model.frozen_text.parameters()) and any(id(p) in trained for p in model.report_encoder.parameters())
    before = copy.deepcopy(model.frozen_text.state_dict())
    opt = torch.optim.AdamW(groups)
    model(batch)['loss'].backward(); opt.step()
    assert all(torch.equal(before[k], v) for k, v in model.frozen_text.state_dict().items())
    again = GKMVLP.from_pretrained(model.save_pretrained(tmp_path))
    with torch.no_grad(): assert torch.equal(again.features(batch, 'gk'), model.eval().features(batch, 'gk'))
    with pytest.raises(GKError, match='share_text'): ModelConfig(freeze_knowledge=True, share_text=False)


def test_ecls_without_gk_and_shuffled_prompts_with_a_frozen_encoder(tok, batch):  # noqa: F811
    out = make(tok, objective='itc_itm_lm_ecls', freeze_knowledge=True)(batch)
    assert torch.isfinite(out['ecls'])
    assert not hasattr(make(tok, objective='itc_itm_lm', freeze_knowledge=True), 'frozen_text'), 'nothing to freeze'
    model = make(tok, freeze_knowledge=True).eval()
    plain = anew_model(copy.deepcopy(model))
    with torch.no_grad():
        a = model.features(batch, 'gk_shuffled')
        assert torch.allclose(a, plain.features(batch, 'gk_shuffled'), atol=1e-5) and not torch.allclose(a, model.features(batch, 'gk'))


@pytest.mark.parametrize('frozen_knowledge', [False, True])
def test_texts_encoded_in_a_step(tok, batch, frozen_knowledge):  # noqa: F811
    "Trained: each different prompt once a step, padded to the longest of them. Frozen: none from the second step on."
    model = make(tok, freeze_knowledge=frozen_knowledge, train_prompts='predicted', top_k=2)
    encoder = model.frozen_text.encoder if frozen_knowledge else model.report_encoder
    shapes = []
    encoder.register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    out = model.ground(model.image_encoder(batch['images']), batch, 'predicted')
    used = out['prompt_numbers'].unique()
    longest = int(model.prompt_mask[used].sum(1).max())
    assert shapes[0][0] == E and shapes[1:] == [(len(used), longest)]
    shapes.clear(); model.ground(model.image_encoder(batch['images']), batch, 'all')
    if frozen_knowledge:
        assert sum(s[0] for s in shapes) == E - len(used), 'only the new ones'
        shapes.clear(); model.ground(model.image_encoder(batch['images']), batch, 'all'); assert shapes == []
    else: assert [s[0] for s in shapes] == [E, E]


def test_four_or_thirty_two_prompts_cost_the_same_encoding(tok):  # noqa: F811
    "The encoder's work depends on different prompts, not on prompts of samples."
    model = make(tok)
    seen = []
    model.report_encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))
    book = len(prompt_book()[0])
    for P in (4, 32):
        numbers = torch.randint(0, book, (1, P)).expand(16, P)      # 16 samples of the same P prompts
        v = torch.randn(16, 65, 32)
        seen.clear(); model.ground(v, {'region_boxes': torch.rand(16, 29, 4), 'region_valid': torch.ones(16, 29, dtype=torch.bool), 'region_features': torch.randn(16, 29, 8), 'oracle_prompts': numbers}, 'oracle')
        assert seen == [E, len(numbers.unique())]
