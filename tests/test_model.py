"The model: what must not change its outputs, what must, and what it costs."
import copy

import pytest
import torch

from gk_mvlp.data.knowledge import ENTITIES, ENTITY_INDEX
from gk_mvlp.models.encoders import TextEncoder, load_tokenizer, train_tokenizer
from gk_mvlp.models.gk_module import encode_unique
from gk_mvlp.models.gk_mvlp import GKMVLP, GROUNDED, OBJECTIVES, ModelConfig, prompt_book
from gk_mvlp.paths import GKError

TEXTS = prompt_book()[0]
B, R, E = 6, 29, len(ENTITIES)


@pytest.fixture(scope='module')
def tok():
    return train_tokenizer(TEXTS, vocab_size=500)


def make(tok, **kw):
    torch.manual_seed(0)
    return GKMVLP(ModelConfig(**{'dim': 32, 'image_depth': 1, 'text_depth': 1, 'encoder_depth': 1, 'decoder_depth': 1, 'embed_dim': 16,
                                 'detector_dim': 8, 'heads': 2, **kw}), tok)


@pytest.fixture
def batch(tok):
    g = torch.Generator().manual_seed(5)
    enc = tok(TEXTS[:B], padding=True, return_tensors='pt')
    xy = torch.rand(B, R, 2, generator=g) * .5
    return {'images': torch.randn(B, 1, 64, 64, generator=g), 'input_ids': enc['input_ids'], 'attention_mask': enc['attention_mask'],
            'report_key': torch.arange(B), 'study_key': torch.arange(B), 'region_boxes': torch.cat([xy, xy + .3], -1),
            'region_valid': torch.rand(B, R, generator=g) < .8, 'region_features': torch.randn(B, R, 8, generator=g),
            'entities': torch.randint(-1, 2, (B, E), generator=g).float(), 'relations': torch.randint(-1, 2, (B, R, E), generator=g),
            'oracle_prompts': torch.tensor([[0, 5], [3, -1], [-1, -1], [40, 2], [7, 8], [1, -1]])}


@pytest.mark.parametrize('objective', [o for o in OBJECTIVES if o != 'scratch'])
def test_each_objective_trains_exactly_its_losses(tok, batch, objective):
    model = make(tok, objective=objective)
    out = model(batch)
    out['loss'].backward()
    assert set(out) - {'loss', 'temperature'} == set(OBJECTIVES[objective])
    assert torch.isclose(out['loss'], sum(out[k] for k in OBJECTIVES[objective]))
    assert hasattr(model, 'gk_fusion') == (objective in GROUNDED)
    idle = {n.split('.')[0] for n, p in model.named_parameters() if p.grad is None}
    if objective == 'gk': assert idle <= {'entity_bias'}
    if objective == 'itc_itm_lm': assert not idle


def test_a_few_steps_lower_every_loss(tok, batch):
    "Every loss can be learnt on one batch: nothing is detached that should not be."
    model = make(tok, train_prompts='predicted', dropout=0.)
    opt = torch.optim.AdamW(model.parameters(), 2e-3)
    seen = []
    for _ in range(150):
        out = model(batch)
        opt.zero_grad(); out['loss'].backward(); opt.step()
        seen.append({k: v.item() for k, v in out.items()})
    for k in ('itc', 'lm', 'ecls', 'itm'):
        end = sum(x[k] for x in seen[-30:]) / 30
        assert end < seen[0][k] * .7, (k, seen[0][k], end)


@pytest.mark.parametrize('mode', ['none', 'predicted', 'all', 'mixed', 'oracle'])
def test_prompt_modes(tok, batch, mode):
    model = make(tok).eval()
    with torch.no_grad():
        v = model.image_encoder(batch['images'])
        z = model.ground(v, batch, mode, need_maps=True)
    P = z['prompt_numbers'].shape[1]
    assert z['z_fused'].shape == (B, R, 32) and z['prompt_attention'].shape == (B, 2, R, 1 + P)
    assert P == {'none': 0, 'predicted': 4, 'all': E, 'mixed': E, 'oracle': 2}[mode]
    assert torch.allclose(z['prompt_attention'].sum(-1), torch.ones(B, 2, R), atol=1e-5)
    off = z['prompt_numbers'] < 0
    assert (z['prompt_attention'][..., 1:].permute(0, 3, 1, 2)[off] == 0).all()


def test_mixed_never_uses_the_oracle(tok, batch):
    "The oracle's prompts come from the report that ITM and LM see: they would leak it."
    model = make(tok)
    scores = torch.randn(400, E)
    numbers = model.choose_prompts('mixed', scores, torch.full((400, 2), 77))
    assert (numbers < E).all()
    counts = (numbers >= 0).sum(1)
    assert {0, 4, E} == set(counts.tolist())


def test_oracle_without_a_report_is_refused(tok, batch):
    model = make(tok)
    with pytest.raises(GKError, match='oracle'): model.choose_prompts('oracle', torch.zeros(2, E))


def test_training_outputs_do_not_depend_on_oracle_prompts(tok, batch):
    "Leak test: changing the oracle's prompts changes nothing in the main method, in training and at inference."
    model = make(tok, dropout=0.)
    other = batch | {'oracle_prompts': batch['oracle_prompts'].flip(0)}
    for train in (True, False):
        model.train(train)
        losses = []
        for b in (batch, other):
            torch.manual_seed(3)
            losses.append({k: v.item() for k, v in model(b).items()})
        assert losses[0] == losses[1]


def test_padding_changes_no_loss(tok, batch):
    model = make(tok, dropout=0.).eval()
    pad = batch | {k: torch.nn.functional.pad(batch[k], (0, 7), value=tok.pad_token_id if k == 'input_ids' else 0)
                   for k in ('input_ids', 'attention_mask')}
    out = []
    for b in (batch, pad):
        torch.manual_seed(1)
        with torch.no_grad(): out.append(model(b))
    for k in out[0]: assert torch.allclose(out[0][k], out[1][k], atol=2e-5), k


def test_order_of_samples_changes_no_itc_lm_ecls(tok, batch):
    model = make(tok, dropout=0.).eval()
    perm = torch.tensor([3, 1, 5, 0, 2, 4])
    with torch.no_grad(): a, b = model(batch), model({k: v[perm] for k, v in batch.items()})
    for k in ('itc', 'lm', 'ecls'): assert torch.allclose(a[k], b[k], atol=1e-5), k


def test_an_invalid_region_is_never_looked_at(tok, batch):
    model = make(tok, dropout=0.).eval()
    hidden = ~batch['region_valid'][..., None]
    other = batch | {'region_boxes': batch['region_boxes'].masked_fill(hidden, 0.),
                     'region_features': batch['region_features'].masked_fill(hidden, 1e3)}
    out = []
    for b in (batch, other):
        torch.manual_seed(1)
        with torch.no_grad(): out.append(model(b))
    for k in out[0]: assert torch.allclose(out[0][k], out[1][k], atol=1e-5), k


def test_no_valid_region_at_all_is_finite(tok, batch):
    model = make(tok).eval()
    b = batch | {'region_valid': torch.zeros(B, R, dtype=torch.bool)}
    with torch.no_grad():
        assert all(torch.isfinite(v) for v in model(b).values())
        assert torch.isfinite(model.features(b, 'gk')).all() and torch.isfinite(model.features(b, 'roi')).all()


def test_image_features_need_nothing_but_pictures(tok, batch):
    model = make(tok).eval()
    with torch.no_grad(): assert torch.equal(model.features({'images': batch['images']}), model.features(batch))


def test_batch_of_one(tok, batch):
    out = make(tok)({k: v[:1] for k, v in batch.items()})
    out['loss'].backward()
    assert all(torch.isfinite(v) for v in out.values()) and out['itc'].item() == pytest.approx(0, abs=1e-6)


def test_unique_prompts_are_encoded_once(tok, batch):
    "U, not B x P, forward passes: the knowledge encoder sees each different prompt once."
    seen = []
    ids = torch.randint(0, E, (64, 16))
    encode_unique(ids, lambda u: seen.append(len(u)) or torch.zeros(len(u), 4))
    assert seen == [len(ids.unique())] and seen[0] <= E


def test_vit_regions_need_no_detector(tok, batch):
    model = make(tok, region_source='vit')
    b = {k: v for k, v in batch.items() if k != 'region_features'}
    model(b)['loss'].backward()


def test_relations_supervise_attention(tok, batch):
    model = make(tok, attention_weight=1., train_prompts='all', dropout=0.)
    out = model(batch)
    hit = model.stated(torch.arange(E).expand(B, E), batch['relations'])
    assert torch.equal(hit, batch['relations'] == 1) and out['attention'].item() > 0


def test_bf16_is_close_to_fp32(tok, batch):
    model = make(tok, dropout=0., train_prompts='all').eval()
    with torch.no_grad():
        torch.manual_seed(1); a = model(batch)
        with torch.autocast('cpu', torch.bfloat16): torch.manual_seed(1); b = model(batch)
    for k in ('itc', 'lm', 'ecls'): assert abs(a[k] - b[k]) < .05 * max(1., a[k].item()), (k, a[k], b[k])


def test_round_trip_and_a_damaged_folder(tok, tmp_path):
    model = make(tok).eval()
    folder = model.save_pretrained(tmp_path/'m')
    again = GKMVLP.from_pretrained(folder)
    for (n, p), (m, q) in zip(model.state_dict().items(), again.state_dict().items()): assert n == m and torch.equal(p, q)
    raw = (folder/'model.safetensors').read_bytes()
    (folder/'model.safetensors').write_bytes(raw[:len(raw) // 2])
    with pytest.raises(GKError, match='model.safetensors'): GKMVLP.from_pretrained(folder)
    with pytest.raises(GKError, match='config.json'): GKMVLP.from_pretrained(tmp_path/'nothing')


@pytest.mark.parametrize('bad', [{'objective': 'gkk'}, {'prompts': 'some'}, {'image_size': 60, 'patch_size': 16}, {'ecls_form': 'max'}])
def test_config_refuses_nonsense(bad):
    with pytest.raises(GKError): ModelConfig(**bad)


def test_generation_is_batched_and_ends(tok, batch):
    model = make(tok).eval()
    with torch.no_grad():
        v = model.image_encoder(batch['images'])
        m, mask = model.memory(v, model.ground(v, batch, 'all'), batch)
        both = model.report_decoder.generate(m, mask, max_new_tokens=8)
        one = model.report_decoder.generate(m[2:3], mask[2:3], max_new_tokens=8)
    n = one.shape[1]
    assert torch.equal(both[2:3, :n], one)


def test_vocabulary_is_reproducible():
    a, b = train_tokenizer(TEXTS, 400), train_tokenizer(list(reversed(TEXTS)), 400)
    assert a.get_vocab() == b.get_vocab()


def test_hub_names_say_what_to_do_offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(GKError, match='hub'): load_tokenizer('no-such-org/no-such-model')
    with pytest.raises(GKError, match='Hugging Face'): TextEncoder(100, 32, 'no-such-org/no-such-model')


def test_slow_towers_follow_by_momentum_and_are_no_part_of_a_saved_model(tok, batch, tmp_path):
    model = make(tok, objective='itc', queue=8, momentum=.9, dropout=0.)
    with torch.no_grad(): model.image_proj.weight.add_(1.)
    slow, fast = model.slow_towers.image_proj.weight.clone(), model.image_proj.weight.clone()
    first = model(batch)
    assert torch.allclose(model.slow_towers.image_proj.weight, .9 * slow + .1 * fast, atol=1e-6)
    assert (model.slow_towers.keys >= 0).sum() == B and model.slow_towers.at == B
    model(batch | {'report_key': torch.arange(B) + 100})
    assert model.slow_towers.keys.tolist() == [102, 103, 104, 105, 4, 5, 100, 101], 'the oldest pairs are replaced'
    assert not [n for n, p in model.slow_towers.named_parameters() if p.requires_grad]
    kept = model.slow_towers.images.clone()
    model.eval()
    with torch.no_grad(): model(batch)
    assert torch.equal(kept, model.slow_towers.images), 'validation queues nothing'
    again = GKMVLP.from_pretrained(model.save_pretrained(tmp_path))
    assert again.config.queue == 0 and not hasattr(again, 'slow_towers') and hasattr(model, 'slow_towers')
    assert 'slow_towers' not in (tmp_path/'README.md').read_text(), 'the card counts what is in the folder'
    assert torch.isfinite(first['loss'])


def test_more_negatives_raise_itc_of_a_model_that_knows_nothing(tok, batch):
    model = make(tok, objective='itc', queue=60, dropout=0.)
    model.logit_scale.data.zero_()                                # logits near 0: the loss is ln of the number of columns
    losses = [float(model(batch | {'report_key': torch.arange(B) + B * i})['itc'].detach()) for i in range(4)]
    for i, v in enumerate(losses): assert abs(v - torch.tensor(float(B * (i + 1))).log()) < .5


@pytest.mark.parametrize('wrong', [{'queue': -1}, {'momentum': 1.}])
def test_an_impossible_queue_is_an_error(wrong):
    with pytest.raises(GKError, match='queue'): ModelConfig(**wrong)
