"Two processes with batch B each take the same step as one process with batch 2B."
import os
import socket
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import gk_mvlp.models.gk_mvlp
from gk_mvlp.data.knowledge import ENTITIES
from gk_mvlp.models.encoders import train_tokenizer
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.models.losses import itc_loss
from gk_mvlp.paths import GKError
from gk_mvlp.training.trainer import TrainConfig, Trainer

WORLD, B = 2, 4


def problem():
    "A small two-tower problem of 2B pairs with one report twice, in different halves."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(WORLD * B, 12, generator=g), torch.randn(WORLD * B, 10, generator=g)
    key = torch.arange(WORLD * B); key[5] = key[1]
    return x, y, key


def towers():
    torch.manual_seed(1)
    return torch.nn.ModuleDict({'image': torch.nn.Linear(12, 6), 'text': torch.nn.Linear(10, 6)}), torch.nn.Parameter(torch.tensor(2.))


def loss_of(nets, scale, x, y, key):
    return itc_loss(F.normalize(nets['image'](x), dim=-1), F.normalize(nets['text'](y), dim=-1), scale.exp(), key)


def worker(path):
    "One of the two: its half of the batch, gradients averaged as data-parallel training averages them."
    dist.init_process_group('gloo', init_method=f'file://{path}/rendezvous', rank=int(os.environ['RANK']), world_size=WORLD)
    (x, y, key), (nets, scale), mine = problem(), towers(), slice(dist.get_rank() * B, (dist.get_rank() + 1) * B)
    loss, similarity = loss_of(nets, scale, x[mine], y[mine], key[mine])
    loss.backward()
    grads = [p.grad for p in [*nets.parameters(), scale]]
    for g in grads: dist.all_reduce(g); g /= WORLD
    total = loss.detach().clone(); dist.all_reduce(total)
    torch.save({'loss': total / WORLD, 'grads': grads, 'similarity': similarity}, f'{path}/{dist.get_rank()}.pt')
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason='this PyTorch has no gloo')
def test_itc_over_two_processes_equals_one_of_twice_the_batch(tmp_path):
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    procs = [subprocess.Popen([sys.executable, __file__, str(tmp_path)], env={**env, 'RANK': str(r)}, stderr=subprocess.PIPE)
             for r in range(WORLD)]
    for p in procs:
        err = p.communicate(timeout=120)[1]
        assert p.returncode == 0, err.decode()[-2000:]
    (x, y, key), (nets, scale) = problem(), towers()
    loss, similarity = loss_of(nets, scale, x, y, key)
    loss.backward()
    for r in range(WORLD):
        out = torch.load(tmp_path/f'{r}.pt', weights_only=True)
        assert torch.isclose(out['loss'], loss.detach(), atol=1e-6)
        for a, b in zip(out['grads'], [p.grad for p in [*nets.parameters(), scale]], strict=True): assert torch.allclose(a, b, atol=1e-6)
        own = slice(r * B, (r + 1) * B)
        assert torch.allclose(out['similarity'], similarity[own, own], atol=1e-6), 'hard negatives are drawn among the own pairs'


HALF = 4


def neighbours(similarity, report_key, study_key, generator=None, hardness=1.):
    "Negatives that one process with batch 2B and two with B choose alike: the next pair of the same half (the halves take turns)."
    n = len(report_key)
    i = (torch.arange(n) + n // HALF) % n
    return i, i, torch.ones(n, dtype=torch.bool)


class Pairs(torch.utils.data.Dataset):
    "Random pictures with reports of very different lengths, and entities that some of them lack."
    def __init__(self, tok):
        g, n = torch.Generator().manual_seed(5), 2 * WORLD * HALF
        texts = [' '.join(t.split()[:3 + 2 * (i % 5)]) + f' {i}' for i, t in enumerate(prompt_book()[0][:n])]
        enc, xy = tok(texts, padding=True, return_tensors='pt'), torch.rand(n, 29, 2, generator=g) * .5
        entities = torch.randint(-1, 2, (n, len(ENTITIES)), generator=g).float()
        entities[::3] = -1.                                       # normal studies: more of them in one half than in the other
        self.fields = {'images': torch.randn(n, 1, 32, 32, generator=g), **{k: enc[k] for k in ('input_ids', 'attention_mask')},
                       'report_key': torch.arange(n), 'study_key': torch.arange(n),
                       'region_boxes': torch.cat([xy, xy + .3], -1), 'region_valid': torch.rand(n, 29, generator=g) < .8,
                       'region_features': torch.randn(n, 29, 8, generator=g), 'entities': entities}
    def __len__(self): return len(self.fields['images'])
    def __getitems__(self, i): return {k: v[i] for k, v in self.fields.items()}


QUEUE = 16


class Cut(Exception): "A power cut."


def train(path, queue=0, shard=False, cut=0):
    """Three epochs of the whole model on Pairs through the trainer: the weights after it, the history, the trainer. With `cut` a first
    attempt ends at that step, and the second resumes.

    Without a queue, which cannot be sharded, the decoder shares its words with the report encoder."""
    gk_mvlp.models.gk_mvlp.hard_negatives = neighbours
    tok = train_tokenizer(prompt_book()[0], vocab_size=400)
    torch.manual_seed(0)
    calls = 0
    model = GKMVLP(ModelConfig(dim=32, image_size=32, image_depth=1, text_depth=1, encoder_depth=1, decoder_depth=1, embed_dim=16,
                               detector_dim=8, heads=2, dropout=0., train_prompts='predicted', queue=queue, tie_embeddings=not queue), tok)
    config = TrainConfig(epochs=3, batch_size=WORLD * HALF, lr=1e-3, keep_best=False, shard=shard, checkpoint_every=1)
    def loss(m, b):
        nonlocal calls
        calls += 1
        if calls == cut: raise Cut
        return m(b)
    some = Pairs(tok).__getitems__(list(range(HALF)))
    trainer = Trainer(model, loss, Pairs(tok), config, path, evaluate=lambda m: {'val_features': float(m.features(some, 'gk').mean())},
                      quiet=True)
    if cut:
        with pytest.raises(Cut): trainer.fit()
    history = trainer.fit()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    if not queue: return weights, history, trainer
    order = weights['slow_towers.keys'].argsort()                 # processes queue one after the other
    for k in ('keys', 'images', 'texts'): weights[f'slow_towers.{k}'] = weights[f'slow_towers.{k}'][order]
    return weights, history, trainer


def train_worker(path):
    torch.save(train(f'{path}/run', QUEUE)[0], f'{path}/weights{os.environ["RANK"]}.pt')
    dist.destroy_process_group()


def shard_worker(path):
    "Sharded: once in peace, once cut at the fourth step of six; what each ends with, and this process's share of the parameters."
    weights, history, trainer = train(f'{path}/run', shard=True)
    own = sum(p.to_local().numel() for p in trainer.wrapped.parameters())
    again, resumed, _ = train(f'{path}/cut', shard=True, cut=4)
    torch.save({'weights': weights, 'again': again, 'own': own, 'features': history['val_features'].tolist(),
                'same_history': bool(dist.get_rank()) or resumed['loss'].tolist() == history['loss'].tolist()},
               f'{path}/out{os.environ["RANK"]}.pt')
    dist.destroy_process_group()


def in_two_processes(path, job):
    "Run a worker of this file in two processes, as torchrun would."
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'WORLD_SIZE': str(WORLD), 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(port),
           'ACCELERATE_USE_CPU': 'true', 'CUDA_VISIBLE_DEVICES': ''}
    procs = [subprocess.Popen([sys.executable, __file__, str(path), job], env={**env, 'RANK': str(r), 'LOCAL_RANK': str(r)},
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for r in range(WORLD)]
    for p in procs:
        said = p.communicate(timeout=240)[0]
        assert p.returncode == 0, said.decode()[-3000:]


def alone(path, queue=0):
    "`train` in this process, which learns something, and leaves the model's negatives as they were."
    original = gk_mvlp.models.gk_mvlp.hard_negatives
    try: weights, history, trainer = train(path/'alone', queue)
    finally: gk_mvlp.models.gk_mvlp.hard_negatives = original
    assert history['loss'].iloc[-1] < history['loss'].iloc[0]
    return weights, history, trainer


@pytest.mark.skipif(not dist.is_gloo_available(), reason='this PyTorch has no gloo')
def test_training_the_whole_model_in_two_processes_equals_one_with_twice_the_batch(tmp_path):
    in_two_processes(tmp_path, 'train')
    weights, history, _ = alone(tmp_path, QUEUE)
    for r in range(WORLD):
        other = torch.load(tmp_path/f'weights{r}.pt', weights_only=True)
        assert set(other) == set(weights)
        for k in weights:
            assert torch.allclose(other[k].float(), weights[k].float(), atol=2e-4), (k,
                float((other[k].float() - weights[k].float()).abs().max()))


@pytest.mark.skipif(not dist.is_gloo_available(), reason='this PyTorch has no gloo')
def test_sharded_training_equals_one_process_and_resumes_to_the_bit(tmp_path):
    in_two_processes(tmp_path, 'shard')
    weights, history, trainer = alone(tmp_path)
    for r in range(WORLD):
        out = torch.load(tmp_path/f'out{r}.pt', weights_only=True)
        for k in weights:
            assert torch.allclose(out['weights'][k].float(), weights[k].float(), atol=1e-5), (k,
                float((out['weights'][k].float() - weights[k].float()).abs().max()))
        assert all(torch.equal(out['again'][k], v) for k, v in out['weights'].items()) and out['same_history'], 'resumed'
        assert out['features'] == pytest.approx(history['val_features'].tolist(), abs=1e-5), 'evaluations see whole, current weights'
        assert out['own'] < .55 * sum(p.numel() for p in trainer.model.parameters()), 'each process holds its half'


def test_what_cannot_be_sharded_is_refused():
    for k in ({'ema': .9}, {'compile': True}, {'precision': 'fp16'}):
        with pytest.raises(GKError, match='shard'): TrainConfig(epochs=1, batch_size=1, lr=1e-3, shard=True, **k)


if __name__ == '__main__': {'train': train_worker, 'shard': shard_worker}.get(sys.argv[2] if sys.argv[2:] else '', worker)(sys.argv[1])
