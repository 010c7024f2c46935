"""The trainer and its checkpoints: resuming, stopping, refusing."""
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from gk_mvlp.paths import GKError
from gk_mvlp.training.checkpoint import load_checkpoint, rng_state, save_checkpoint, seed_everything, set_rng_state
from gk_mvlp.training.trainer import TrainConfig, Trainer, epoch_steps, parameter_groups, step_generator

torch.set_num_threads(1)


class Curve(Dataset):
    "Batches of y = sin(3x) with noise drawn from (epoch, first index), as an augmentation would be."
    def __init__(self, n=50): self.x, self.epoch = torch.linspace(-1, 1, n)[:, None], 0
    def __len__(self): return len(self.x)
    def set_epoch(self, epoch): self.epoch = epoch
    def __getitems__(self, indices):
        noise = torch.randn(len(indices), 1, generator=step_generator(0, self.epoch, indices[0]))
        return {'x': self.x[indices], 'y': torch.sin(3 * self.x[indices]) + .05 * noise}


def net(dropout=.2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.BatchNorm1d(16), nn.Dropout(dropout), nn.Linear(16, 1))


def mse(model, batch):
    # all three global generators take part, so that a resume which forgets one of them is found out
    jitter = 1e-3 * (random.random() + np.random.random())
    loss = nn.functional.mse_loss(model(batch['x'] + jitter), batch['y'])
    return {'loss': loss, 'root': loss.detach().sqrt()}


def validate(model):
    x = torch.linspace(-1, 1, 40)[:, None]
    np.random.random(3); torch.rand(2)                       # an evaluation may draw; training must not notice
    return {'val_mse': nn.functional.mse_loss(model(x), torch.sin(3 * x)).item()}


def killer(at):
    "A loss that fails in its `at`-th call."
    calls = [0]
    def loss(model, batch):
        calls[0] += 1
        if calls[0] == at: raise InterruptedError('killed')
        return mse(model, batch)
    return loss


# 50 samples: 4 steps an epoch, the last of one small batch
CFG = TrainConfig(epochs=4, batch_size=8, accumulation=2, lr=1e-2, checkpoint_every=3, seed=5)


def train(path, config=CFG, loss=mse, model=None, evaluate=validate, monitor='val_mse', mode='min', data=None):
    model = net() if model is None else model
    t = Trainer(model, loss, Curve() if data is None else data, config, path, evaluate, monitor, mode, quiet=True)
    return model, t.fit(), t


def same(a, b): return all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def stable(history): return history.drop(columns=['seconds', 'images_per_s'])


@pytest.fixture(scope='module')
def peace(tmp_path_factory): return train(tmp_path_factory.mktemp('peace'))


def test_loss_falls_and_is_logged(peace, tmp_path):
    _, history, t = train(tmp_path, replace(CFG, epochs=60, lr=5e-2), model=nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)))
    assert history['loss'].iloc[-1] < .2 * history['loss'].iloc[0]
    assert history['val_mse'].min() < .05                 # sin(3x) has variance .52
    assert list(history['epoch']) == list(range(1, 61)) and history["step"].iloc[-1] == 240
    assert {'loss', 'root', 'val_mse', 'grad_norm', 'lr', 'images_per_s', 'seconds'} <= set(history.columns)
    assert any((tmp_path/'tensorboard').iterdir())
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path/'history.csv'), history)


@pytest.mark.parametrize('at', [1, 2, 6, 8, 13, 15, 26, 28])     # passes; 7 an epoch, in the middle of an accumulation too
def test_resume_is_bit_identical(peace, tmp_path, at):
    with pytest.raises(InterruptedError): train(tmp_path, loss=killer(at))
    torch.manual_seed(99); random.seed(99); np.random.seed(99)   # another process has other generators
    start = net()
    with torch.no_grad(): start[0].weight.add_(1)                # and other initial weights
    model, history, t = train(tmp_path, model=start)
    assert same(model, peace[0])
    pd.testing.assert_frame_equal(stable(history), stable(peace[1]), check_exact=True)
    csv = pd.read_csv(tmp_path/'history.csv')
    assert list(csv['epoch']) == [1, 2, 3, 4]
    assert load_checkpoint(t.last_path)['optimizer']['state'][0]['exp_avg'].equal(load_checkpoint(peace[2].last_path)['optimizer']['state'][0]['exp_avg'])


def test_killed_many_times(peace, tmp_path):
    for _ in range(60):
        try: model, history, _ = train(tmp_path, replace(CFG, checkpoint_every=1), loss=killer(4))    # one whole step at a time
        except InterruptedError: continue
        break
    else: raise AssertionError('no progress')
    assert same(model, peace[0]) and len(history) == 4


def test_killed_in_evaluation_and_best_file(peace, tmp_path):
    "Killed after best-<epoch>.ckpt is written and before last.ckpt: the pair must stay consistent."
    from gk_mvlp.training import trainer as module
    real, seen = module.save_checkpoint, [0]
    def dies(path, state):
        if Path(path).name == 'last.ckpt' and (seen.__setitem__(0, seen[0] + 1) or seen[0] == 5): raise InterruptedError
        real(path, state)
    module.save_checkpoint = dies
    try:
        with pytest.raises(InterruptedError): train(tmp_path)
    finally: module.save_checkpoint = real
    model, history, t = train(tmp_path)
    assert same(model, peace[0]) and [p.name for p in tmp_path.glob('best-*')] == [t.best_path.name]


SCRIPT = """
import sys, time; sys.path.insert(0, {tests!r})
import test_trainer as T
slow = lambda model, batch: (time.sleep(.05), T.mse(model, batch))[1]
T.train({run!r}, loss=slow)
"""


def test_kill_minus_9(peace, tmp_path):
    script = SCRIPT.format(tests=str(Path(__file__).parent), run=str(tmp_path))
    p = subprocess.Popen([sys.executable, '-c', script], env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])})
    until = time.time() + 90
    while not (tmp_path/'history.csv').exists() and time.time() < until and p.poll() is None: time.sleep(.02)
    assert p.poll() is None, 'it ended before it could be killed'
    time.sleep(.17)
    p.send_signal(signal.SIGKILL); p.wait()
    before = load_checkpoint(tmp_path/'last.ckpt')
    assert not before['done'] and before['epoch'] >= 1
    model, history, _ = train(tmp_path)
    assert same(model, peace[0])
    pd.testing.assert_frame_equal(stable(history), stable(peace[1]), check_exact=True)


def test_finished_run_returns_at_once(peace):
    def never(*_): raise AssertionError('trained or evaluated again')
    model, history, _ = train(peace[2].run_dir, loss=never, evaluate=never)
    assert same(model, peace[0]) and stable(history).equals(stable(peace[1]))


def test_best_weights_are_loaded(tmp_path):
    scores = iter([.1, .9, .3, .2])
    kept = []
    def scored(model):
        kept.append({k: v.clone() for k, v in model.state_dict().items()})
        return {'auc': next(scores)}
    model, history, t = train(tmp_path, evaluate=scored, monitor='auc', mode='max')
    assert t.best_epoch == 2 and all(v.equal(kept[1][k]) for k, v in model.state_dict().items())
    assert not all(v.equal(kept[3][k]) for k, v in model.state_dict().items())


def test_early_stopping(tmp_path):
    scores = iter([.5, .6, .55, float('nan'), .58, .99])
    model, history, t = train(tmp_path, replace(CFG, epochs=10, patience=3), evaluate=lambda m: {'auc': next(scores)}, monitor='auc',
                              mode='max')
    assert len(history) == 5 and t.best == .6 and t.done
    assert len(train(tmp_path, replace(CFG, epochs=10, patience=3), evaluate=lambda m: 1/0, monitor='auc', mode='max')[1]) == 5


def test_accumulation_equals_the_large_batch(tmp_path):
    "44 samples: the last step has a batch of 8 and one of 4, which must not weigh the same."
    quiet = lambda m, b: {'loss': nn.functional.mse_loss(m(b['x']), b['y'])}
    class Clean(Curve):
        def __getitems__(self, i): return {'x': self.x[i], 'y': torch.sin(3 * self.x[i])}
    def plain(): torch.manual_seed(0); return nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    run = lambda name, **k: train(tmp_path/name, replace(CFG, **k), quiet, plain(), None, None, data=Clean(44))
    big, hb, _ = run('big', batch_size=16, accumulation=1)
    small, hs, _ = run('small', batch_size=8, accumulation=2)
    for a, b in zip(big.parameters(), small.parameters(), strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(hb['loss'], hs['loss'], rtol=1e-4)
    np.testing.assert_allclose(hb['grad_norm'], hs['grad_norm'], rtol=1e-3)


def test_nan_stops_and_keeps_the_checkpoint(tmp_path):
    calls = [0]
    def bad(model, batch):
        out, calls[0] = mse(model, batch), calls[0] + 1
        out['itc'] = out['loss'] * (float('nan') if calls[0] == 16 else 1)
        return {**out, 'loss': out['loss'] + out['itc']}
    with pytest.raises(GKError, match=r'itc is nan at epoch 3, step 1 of 4'): train(tmp_path, loss=bad)
    ck = load_checkpoint(tmp_path/'last.ckpt')
    assert (ck['epoch'], ck['step']) == (2, 0) and all(v.isfinite().all() for v in ck['model'].values())
    calls[0] = 100
    assert len(train(tmp_path, loss=bad)[1]) == 4, 'it goes on from the good checkpoint'


def test_infinite_gradient_stops(tmp_path):
    def bad(model, batch): return {'loss': (model(batch['x']) * 0).abs().sum().sqrt()}      # finite loss, gradient 0 * inf
    with pytest.raises(GKError, match='grad_norm is nan at epoch 1, step 1'): train(tmp_path, loss=bad)


@pytest.mark.parametrize('change, word', [({'lr': 2e-2}, 'lr'), ({'epochs': 9}, 'epochs'), ({'seed': 6}, 'seed'),
                                          ({'batch_size': 4}, 'batch_size'),
                                          ({'lr_scale': {'0': .5}}, 'lr_scale')])
def test_other_settings_are_refused(peace, change, word):
    with pytest.raises(GKError, match=rf'made with other settings \({word}') as e: train(peace[2].run_dir, replace(CFG, **change))
    assert 'run folder' in e.value.remedy


def test_other_model_or_data_is_refused(peace):
    wide = nn.Sequential(nn.Linear(1, 17), nn.Tanh(), nn.BatchNorm1d(17), nn.Dropout(.2), nn.Linear(17, 1))
    with pytest.raises(GKError, match=r"parameters '0.bias': \[16\] there, \[17\] now"): train(peace[2].run_dir, model=wide)
    with pytest.raises(GKError, match='samples: 50 there, 51 now'): train(peace[2].run_dir, data=Curve(51))
    frozen = net(); frozen[0].requires_grad_(False)
    with pytest.raises(GKError, match='trainable'): train(peace[2].run_dir, model=frozen)


def test_checkpoint_interval_and_workers_may_change(peace):
    assert len(train(peace[2].run_dir, replace(CFG, checkpoint_every=17, num_workers=1))[1]) == 4


def test_workers_give_the_same_result(peace, tmp_path):
    assert same(train(tmp_path, replace(CFG, num_workers=1))[0], peace[0])


def test_evaluation_does_not_disturb_training(peace, tmp_path):
    model, history, _ = train(tmp_path, replace(CFG, keep_best=False), evaluate=None, monitor=None)
    assert history['loss'].tolist() == peace[1]['loss'].tolist()


def test_caller_generators_are_untouched(tmp_path):
    seed_everything(3); before = rng_state()
    train(tmp_path)
    seed_everything(3); net(); want = rng_state()
    assert before['torch'].numel() == want['torch'].numel()
    for k in ('python', 'numpy'): assert rng_state()[k].nan_to_num().equal(before[k].nan_to_num())


def test_default_collate_and_subset(tmp_path):
    x = torch.linspace(-1, 1, 30)[:, None]
    loss = lambda m, b: {'loss': nn.functional.mse_loss(m(b[0]), b[1])}
    data = Subset(TensorDataset(x, torch.sin(3 * x)), range(20))
    _, history, _ = train(tmp_path, replace(CFG, epochs=2), loss, evaluate=None, monitor=None, data=data)
    assert len(history) == 2 and np.isfinite(history['loss']).all()


def test_order_of_data():
    steps = epoch_steps(50, CFG, 3)
    assert sorted(i for s in steps for b in s for i in b) == list(range(50))
    assert [[len(b) for b in s] for s in steps] == [[8, 8], [8, 8], [8, 8], [2]]
    assert len(epoch_steps(50, replace(CFG, drop_last=True), 3)) == 3
    assert epoch_steps(50, replace(CFG, seed=6), 3) != steps
    draws = {step_generator(*k).initial_seed() for k in [(0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 0)]}
    assert len(draws) == 4


def test_weight_decay_and_rate_groups():
    m = net()
    for p in m[4].parameters(): p.requires_grad_(False)
    groups = parameter_groups(m, TrainConfig(epochs=1, batch_size=1, lr=1., lr_scale={'0': .5, '0.weight': .1}))
    by_param = {id(p): (g['lr'], g['weight_decay']) for g in groups for p in g['params']}
    assert by_param[id(m[0].weight)] == (.1, .05) and by_param[id(m[0].bias)] == (.5, 0.) and by_param[id(m[2].weight)] == (1., 0.)
    assert id(m[4].weight) not in by_param
    with pytest.raises(GKError, match="no parameter begins with 'vit'"):
        parameter_groups(m, TrainConfig(epochs=1, batch_size=1, lr=1., lr_scale={'vit': .5}))
    with pytest.raises(GKError, match='no trainable parameter'): parameter_groups(m.requires_grad_(False), CFG)


def test_bf16_trains(tmp_path):
    def loss(m, b):
        y = m(b['x'])
        assert y.dtype == torch.bfloat16
        return {'loss': nn.functional.mse_loss(y.float(), b['y'])}
    def checked(m):
        assert m(torch.zeros(1, 1)).dtype == torch.float32, 'evaluation is in float32'
        return validate(m)
    model, history, _ = train(tmp_path, replace(CFG, precision='bf16', epochs=6, lr=3e-2), loss, evaluate=checked)
    assert history['loss'].iloc[-1] < history['loss'].iloc[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU can do fp16')
def test_average_of_weights(tmp_path):
    "The kept weights are the moving average, computed another way; evaluation sees it; a killed run continues it bit by bit."
    config, seen, model = replace(CFG, ema=.8, keep_best=False, epochs=2), [], net()
    def watched(m, batch):
        seen.append(model.state_dict()['0.weight'].clone())
        return mse(m, batch)
    kept, _, t = train(tmp_path/'a', config, watched, model, evaluate=None, monitor=None)
    raw = load_checkpoint(t.last_path)['model']['0.weight']
    # weights after each step; 7 backward passes an epoch, 2 a step but for the last
    first, *after = [seen[i] for i in (2, 4, 6, 7, 9, 11, 13)] + [raw]
    for w in after: first = .8 * first + .2 * w
    assert torch.allclose(kept.state_dict()['0.weight'], first, atol=1e-6) and not torch.allclose(first, raw, atol=1e-4)
    whole = train(tmp_path/'b', replace(CFG, ema=.8))[0]
    with pytest.raises(InterruptedError): train(tmp_path/'c', replace(CFG, ema=.8), killer(13))
    assert same(train(tmp_path/'c', replace(CFG, ema=.8))[0], whole)


@pytest.mark.slow
def test_compiled_training_gives_nearly_the_same(tmp_path):
    plain, fast = (train(tmp_path/str(c), replace(CFG, compile=c, epochs=2), model=net(0.))[0] for c in (False, True))
    for a, b in zip(plain.state_dict().values(), fast.state_dict().values(), strict=True): assert torch.allclose(a, b, atol=1e-4)


def test_fp16_on_cpu_is_refused(tmp_path):
    with pytest.raises(GKError, match='needs a GPU'): train(tmp_path, replace(CFG, precision='fp16'))


@pytest.mark.parametrize('bad', [{'epochs': 0}, {'batch_size': -1}, {'lr': 0.}, {'lr': float('nan')}, {'precision': 'fp8'},
                                 {'warmup_ratio': 1.5}, {'accumulation': 0}])
def test_bad_settings(bad):
    with pytest.raises(GKError, match=next(iter(bad))): replace(CFG, **bad)


def test_bad_calls(tmp_path):
    with pytest.raises(GKError, match="without the monitored 'auc'"): train(tmp_path/'a', monitor='auc')
    with pytest.raises(GKError, match="without 'loss'"): train(tmp_path/'b', loss=lambda m, b: {'mse': m(b['x']).sum()})
    with pytest.raises(GKError, match='without an evaluate'): train(tmp_path/'c', evaluate=None)
    with pytest.raises(GKError, match='mode'): train(tmp_path/'d', mode='up')
    with pytest.raises(GKError, match='empty'): train(tmp_path/'e', data=Curve(0))
    with pytest.raises(GKError, match='drop_last leaves no step'): train(tmp_path/'f', replace(CFG, drop_last=True), data=Curve(9))


def test_log_lines_outside_a_terminal(tmp_path, capfd):
    Trainer(net(), mse, Curve(), CFG, tmp_path, validate, 'val_mse', 'min').fit()
    out, err = capfd.readouterr()
    assert 'epoch 4/4' in out and len(out.splitlines()) <= 4 and 'it/s' not in err + out


# --- checkpoints -------------------------------------------------------------------------------------------

def test_rng_state_with_cached_normal():
    random.gauss(0, 1); np.random.seed(1); np.random.normal()        # both now hold a second normal deviate
    kept = rng_state()
    want = random.gauss(0, 1), np.random.normal(), random.random(), np.random.random(), torch.rand(1).item()
    seed_everything(0)
    set_rng_state(kept)
    assert (random.gauss(0, 1), np.random.normal(), random.random(), np.random.random(), torch.rand(1).item()) == want


def test_seed_out_of_range():
    for bad in (-1, 2**32):
        with pytest.raises(GKError, match='seed'): seed_everything(bad)


@pytest.mark.parametrize('content', [b'', b'nonsense', b'PK\x03\x04' + b'\0' * 100])
def test_damaged_checkpoint(tmp_path, content):
    (tmp_path/'last.ckpt').write_bytes(content)
    with pytest.raises(GKError, match='last.ckpt: not a readable checkpoint.*delete it'): load_checkpoint(tmp_path/'last.ckpt')
    with pytest.raises(GKError, match='delete it'): train(tmp_path)


def test_truncated_and_foreign_checkpoints(peace, tmp_path):
    whole = peace[2].last_path.read_bytes()
    for n in (100, len(whole) // 2, len(whole) - 10):
        (tmp_path/'last.ckpt').write_bytes(whole[:n])
        with pytest.raises(GKError, match='not a readable'): train(tmp_path)
    save_checkpoint(tmp_path/'last.ckpt', {'w': torch.zeros(1)})
    with pytest.raises(GKError, match='not a checkpoint of this trainer'): train(tmp_path)
    with pytest.raises(GKError, match='no such checkpoint'): load_checkpoint(tmp_path/'other.ckpt')


class Evil:
    def __reduce__(self): return (os.system, ('touch evil',))


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'identity': Evil()}, tmp_path/'last.ckpt')
    with pytest.raises(GKError, match='not a readable'): load_checkpoint(tmp_path/'last.ckpt')
    assert not (tmp_path/'evil').exists()


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    "The failure is made where a full disk makes it: in the write."
    path = tmp_path/'last.ckpt'
    save_checkpoint(path, {'epoch': 1})
    def full(state, f): f.write(b'half'); raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', full)
    with pytest.raises(GKError, match='No space left on device.*Free disk space'): save_checkpoint(path, {'epoch': 2})
    monkeypatch.undo()
    assert load_checkpoint(path)['epoch'] == 1 and [p.name for p in tmp_path.iterdir()] == ['last.ckpt']


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs a POSIX file-size limit')
def test_real_write_failure_keeps_the_old_file(tmp_path):
    "A process whose files may not grow beyond 64 KiB: torch's own writer fails in the middle."
    path = tmp_path/'last.ckpt'
    code = f"""
import resource, signal, torch
from gk_mvlp.paths import GKError
from gk_mvlp.training.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_checkpoint({str(path)!r}, {{'epoch': 1}})
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try: save_checkpoint({str(path)!r}, {{'epoch': 2, 'w': torch.zeros(100000)}})
except GKError as e: print('GKError', e)
"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                         env={**os.environ, 'PYTHONPATH': str(Path(__file__).parents[1])})
    assert 'GKError' in out.stdout and 'could not be written' in out.stdout, out.stderr
    assert load_checkpoint(path)['epoch'] == 1 and [p.name for p in tmp_path.iterdir()] == ['last.ckpt']


class Elsewhere(torch.nn.Module):
    "A model on another device than the data; it refuses batches that were left behind."
    def __init__(self):
        super().__init__()
        self.logit_scale = torch.nn.Parameter(torch.zeros((), device='meta'))
    def forward(self, batch):
        assert {v.device.type for v in batch.values()} == {'meta'}, 'the batch was not moved to the model'
        return {'loss': torch.ones(()), 'itc': torch.ones(())}


def test_batches_move_to_the_model():
    "As on a GPU: the data sets stay in main memory, whatever is asked of a model."
    from gk_mvlp.study.experiments import validation_losses
    from gk_mvlp.tasks.report_generation import mean_loss
    from gk_mvlp.training import batches

    class Data:
        strength = .5
        def __len__(self): return 10
        def __getitem__(self, i): return {'images': torch.zeros(len(i), 1, 8, 8)}
    assert validation_losses(Elsewhere(), Data(), 4) == {'val_loss': 1., 'val_itc': 1.}
    assert mean_loss(Elsewhere(), Data(), 4) == 1.
    seen = []
    out = batches.run_batches(Data(), lambda b: (seen.append(b['images'].device.type), {'n': torch.ones(b['images'].shape[0])})[1], 4,
                              'meta')
    assert seen == ['meta'] * 3 and len(out['n']) == 10 and Data.strength == .5
