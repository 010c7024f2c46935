"""A frozen knowledge encoder is a table of first tokens: equal to encoding anew, made once, constant, saved, and without the encoder's
weights."""
import copy

import pytest
import torch

from gk_mvlp.data.knowledge import ENTITIES
from gk_mvlp.models.encoders import TextEncoder, first_tokens
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.paths import GKError
from gk_mvlp.training.trainer import TrainConfig, parameter_groups
from test_model import batch, make, tok  # noqa: F401

E = len(ENTITIES)


@pytest.fixture
def encoder():
    torch.manual_seed(1)
    return TextEncoder(50, dim=16, depth=2, heads=2, dropout=.3)


@pytest.fixture
def texts():
    g = torch.Generator().manual_seed(2)
    ids, mask = torch.randint(5, 50, (6, 9), generator=g), torch.arange(9)[None] < torch.tensor([9, 4, 6, 1, 5, 9])[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def anew(encoder, ids, mask):
    "One text at a time, unpadded."
    encoder = copy.deepcopy(encoder).eval()
    with torch.no_grad(): return torch.cat([encoder(i[None, :int(m.sum())], m[None, :int(m.sum())])[:, 0] for i, m in zip(ids, mask)])


@pytest.mark.parametrize('batch_size', [1, 2, 4, 6, 32])
def test_first_tokens_equal_encoding_one_at_a_time(encoder, texts, batch_size):
    assert torch.allclose(first_tokens(encoder, *texts, batch_size), anew(encoder, *texts), atol=1e-6), 'each in its own row'


@pytest.mark.parametrize('training', [True, False])
def test_first_tokens_ignore_dropout_and_autocast_and_leave_the_encoder_as_it_was(encoder, texts, training):
    encoder.train(training)
    with torch.autocast('cpu', torch.bfloat16): a = first_tokens(encoder, *texts)
    assert torch.allclose(a, anew(encoder, *texts), atol=1e-6) and a.dtype == torch.float32 and not a.requires_grad
    assert encoder.training is training and all(m.training is training for m in encoder.modules())


def trained_twin(model):
    "The same model without tables, its entity and knowledge encoder a copy of the report encoder as it was, never trained."
    twin = copy.deepcopy(model)
    twin.entity_table = twin.prompt_table = None
    twin.entity_encoder = twin.knowledge_encoder = copy.deepcopy(model.report_encoder).requires_grad_(False)
    return twin


@pytest.mark.parametrize('mode', ['none', 'predicted', 'all', 'mixed', 'oracle'])
def test_model_with_a_table_agrees_with_one_that_encodes_in_every_step(tok, batch, mode):  # noqa: F811
    model = make(tok, freeze_knowledge=True, train_prompts=mode, dropout=0.)
    runs = []
    for m in (model, trained_twin(model)):
        torch.manual_seed(4); m.zero_grad()
        out = m(batch); out['loss'].backward()
        runs.append((out, {n: p.grad for n, p in m.named_parameters() if p.grad is not None}))
    (a, ga), (b, gb) = runs
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a) and ga.keys() == gb.keys()
    assert all(torch.allclose(ga[n], gb[n], atol=1e-5) for n in ga)


def test_table_stays_while_the_report_encoder_is_trained_and_is_saved(tok, batch, tmp_path):  # noqa: F811
    model = make(tok, freeze_knowledge=True)
    assert model.entity_encoder is None and model.knowledge_encoder is None
    assert {k for k, v in model.state_dict().items() if k.endswith('_table')} == {'entity_table', 'prompt_table'}
    plain = sum(p.numel() for p in make(tok).parameters())
    assert sum(p.numel() for p in model.parameters()) == plain, 'no second encoder'
    want = anew(model.report_encoder, model.prompt_ids, model.prompt_mask)
    assert torch.allclose(model.prompt_table, want, atol=1e-5)
    opt = torch.optim.AdamW(parameter_groups(model, TrainConfig(epochs=1, batch_size=2, lr=1e-2)))
    for _ in range(2): opt.zero_grad(); model(batch)['loss'].backward(); opt.step()
    assert torch.allclose(model.prompt_table, want, atol=1e-5)
    assert not torch.allclose(anew(model.report_encoder, model.prompt_ids, model.prompt_mask), want, atol=1e-3), (
        'the report encoder has moved on')
    again = GKMVLP.from_pretrained(model.save_pretrained(tmp_path))
    assert torch.equal(again.prompt_table, model.prompt_table) and torch.equal(again.entity_table, model.entity_table)
    with torch.no_grad(): assert torch.equal(again.features(batch, 'gk'), model.eval().features(batch, 'gk'))
    with pytest.raises(GKError, match='share_text'): ModelConfig(freeze_knowledge=True, share_text=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_table_moves_with_the_device(tok):  # noqa: F811
    model = make(tok, freeze_knowledge=True)
    want = model.fixed_texts('prompt', torch.tensor([3, 1]))
    assert torch.equal(model.cuda().fixed_texts('prompt', torch.tensor([3, 1], device='cuda')).cpu(), want)


def test_ecls_without_gk_and_shuffled_prompts_with_a_frozen_encoder(tok, batch):  # noqa: F811
    model = make(tok, objective='itc_itm_lm_ecls', freeze_knowledge=True)
    assert torch.isfinite(model(batch)['ecls']) and not hasattr(model, 'prompt_table')
    assert not hasattr(make(tok, objective='itc_itm_lm', freeze_knowledge=True), 'entity_table'), 'nothing to freeze'
    model = make(tok, freeze_knowledge=True).eval()
    with torch.no_grad():
        a = model.features(batch, 'gk_shuffled')
        assert (torch.allclose(a, trained_twin(model).eval().features(batch, 'gk_shuffled'), atol=1e-5)
                and not torch.allclose(a, model.features(batch, 'gk')))


@pytest.mark.parametrize('frozen_knowledge', [False, True])
def test_texts_encoded_in_a_step(tok, batch, frozen_knowledge):  # noqa: F811
    "Trained: each different prompt once a step, padded to the longest of them. Frozen: none."
    model = make(tok, freeze_knowledge=frozen_knowledge, train_prompts='predicted', top_k=2)
    shapes = []
    model.report_encoder.register_forward_pre_hook(lambda m, args: shapes.append(tuple(args[0].shape)))
    out = model.ground(model.image_encoder(batch['images']), batch, 'predicted')
    used = out['prompt_numbers'].unique()
    longest = int(model.prompt_mask[used].sum(1).max())
    assert shapes == ([] if frozen_knowledge else [shapes[0], (len(used), longest)]) and (frozen_knowledge or shapes[0][0] == E)
    shapes.clear(); model.ground(model.image_encoder(batch['images']), batch, 'all')
    assert [s[0] for s in shapes] == ([] if frozen_knowledge else [E, E])


def test_four_or_thirty_two_prompts_cost_the_same_encoding(tok):  # noqa: F811
    "The encoder's work depends on different prompts, not on prompts of samples."
    model = make(tok)
    seen = []
    model.report_encoder.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[0]))
    book = len(prompt_book()[0])
    for P in (4, 32):
        numbers = torch.randint(0, book, (1, P)).expand(16, P)      # 16 samples of the same P prompts
        v = torch.randn(16, 65, 32)
        seen.clear()
        model.ground(v, {'region_boxes': torch.rand(16, 29, 4), 'region_valid': torch.ones(16, 29, dtype=torch.bool),
                         'region_features': torch.randn(16, 29, 8), 'oracle_prompts': numbers}, 'oracle')
        assert seen == [E, len(numbers.unique())]
