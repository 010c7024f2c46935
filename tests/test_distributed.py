"Two processes with batch B each take the same step as one process with batch 2B."
import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from gk_mvlp.models.losses import itc_loss

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
    procs = [subprocess.Popen([sys.executable, __file__, str(tmp_path)], env={**env, 'RANK': str(r)}, stderr=subprocess.PIPE) for r in range(WORLD)]
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


if __name__ == '__main__': worker(sys.argv[1])
