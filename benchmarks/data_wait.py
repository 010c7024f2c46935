"Share of a pre-training step at mini size that is spent waiting for data, with one worker and without."
import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import mini_gk, write

from gk_mvlp.models.gk_mvlp import GKMVLP
from gk_mvlp.training.trainer import Trainer


def main(studies: int, epochs: int) -> None:
    torch.manual_seed(0)
    config, train, tokenizer, part = mini_gk(studies)
    out = {}
    for workers in (1, 0):
        waited = {}
        class Timed(Trainer):
            def _train_step(self, batches, sizes):
                def measured():
                    while True:
                        start = time.perf_counter()
                        try: b = next(batches)
                        except StopIteration: return
                        waited[self.epoch] = waited.get(self.epoch, 0.) + time.perf_counter() - start
                        yield b
                return super()._train_step(measured(), sizes)
        with tempfile.TemporaryDirectory() as run:
            history = Timed(GKMVLP(config, tokenizer), lambda m, b: m(b), part,
                            replace(train, epochs=epochs, num_workers=workers, keep_best=False), Path(run), quiet=True).fit()
        # the first epoch starts everything
        out[f'wait_percent_{workers}_workers'] = 100 * sum(list(waited.values())[1:]) / history['seconds'].iloc[1:].sum()
        out[f'images_per_s_{workers}_workers'] = float(history['images_per_s'].iloc[1:].median())
    write('data_wait', out | {'studies': len(part), 'batch': train.batch_size, 'epochs': epochs})


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--studies', type=int, default=600); p.add_argument('--epochs', type=int, default=4)
    a = p.parse_args(); main(a.studies, a.epochs)
