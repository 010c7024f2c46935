"The decoded cache: equal to decoding, keyed by content and transform, safe with several writers, and never a wrong square."
import multiprocessing as mp
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from gk_mvlp.data import picture_cache
from gk_mvlp.data.images import load_square
from gk_mvlp.data.picture_cache import PictureCache
from gk_mvlp.paths import GKError


def write(path, k, size=(70, 50)): Image.fromarray(np.random.default_rng(k).integers(0, 256, size, np.uint8)).save(path)

@pytest.fixture
def files(tmp_path):
    out = [tmp_path/f'{k}.png' for k in range(9)]
    for k, p in enumerate(out): write(p, k, (70 + k, 50))
    return out

def filled(folder, files, size=32, **kw):
    c = PictureCache(folder, size, shard=4); c.add(files, workers=1, progress=False, **kw)
    return c

def test_squares_and_frames_equal_decoding(tmp_path, files):
    c = filled(tmp_path/'c', files)
    x, frames = c.batch(files)
    for i, p in enumerate(files):
        y, frame = load_square(p, 32)
        assert (x[i] == y).all() and frames[i] == frame
    assert len(list(c.folder.glob('*.npy'))) == 3 and len(c) == 9

def test_nothing_is_decoded_twice(tmp_path, files, monkeypatch):
    filled(tmp_path/'c', files)
    monkeypatch.setattr(picture_cache, 'load_square', lambda *a: pytest.fail('decoded again'))
    c = filled(tmp_path/'c', files)
    os.link(files[0], tmp_path/'copy.png'); c.add([tmp_path/'copy.png'], workers=1)
    assert (c[tmp_path/'copy.png'][0] == c[files[0]][0]).all()

def test_a_change_is_seen_and_made_anew(tmp_path, files):
    c = filled(tmp_path/'c', files); old = c[files[3]][0]
    write(files[3], 77)
    assert files[3] not in c
    with pytest.raises(GKError, match='not in the cache'): c[files[3]]
    c.add(files, workers=1)
    assert (c[files[3]][0] == load_square(files[3], 32)[0]).all() and not np.array_equal(old, c[files[3]][0])

def test_size_and_decoder_are_part_of_the_key(tmp_path, files, monkeypatch):
    filled(tmp_path/'c', files)
    assert files[0] not in PictureCache(tmp_path/'c', 48)
    monkeypatch.setattr(picture_cache, '_decoder_source', lambda: 'another decoder')
    assert files[0] not in PictureCache(tmp_path/'c', 32)

def test_broken_and_missing_pictures(tmp_path, files):
    files[2].write_bytes(files[2].read_bytes()[:200]); files[5].unlink()
    with pytest.raises(GKError, match='2 broken or missing'): filled(tmp_path/'c', files)
    with pytest.warns(UserWarning, match='left out 2 broken'): c = filled(tmp_path/'c', files, bad='skip')
    assert [p in c for p in files if p.exists()] == [True, True, False, True, True, True, True, True]
    c = PictureCache(tmp_path/'d', 32)
    with pytest.raises(GKError): c.add([tmp_path/'no.png'], workers=1)
    with pytest.raises(GKError, match='skip'): c.add(files, bad='ignore')

@pytest.mark.parametrize('spoil', [lambda f: next(f.glob('*.npy')).unlink(), lambda f: [p for p in f.glob('*.json') if not p.name.startswith('paths')][0].write_text('[{'), lambda f: [p.unlink() for p in f.glob('paths-*.json')],
                                   lambda f: [p.write_text('') for p in f.glob('paths-*.json')]])
def test_a_damaged_cache_is_mended(tmp_path, files, spoil):
    c = filled(tmp_path/'c', files)
    spoil(c.folder)
    c = filled(tmp_path/'c', files)
    assert all((c[p][0] == load_square(p, 32)[0]).all() for p in files)

def test_flipped_bytes_are_refused(tmp_path, files):
    c = filled(tmp_path/'c', files)
    for p in c.folder.glob('*.npy'):
        raw = bytearray(p.read_bytes()); raw[-500] ^= 4; p.write_bytes(raw)
    bad = 0
    for f in files:
        try: assert (PictureCache(tmp_path/'c', 32)[f][0] == load_square(f, 32)[0]).all()
        except GKError as err: bad += 'checksum' in str(err)
    assert bad == 3, 'one square of each shard'

def test_a_killed_filling_leaves_whole_shards(tmp_path, files, monkeypatch):
    real, n = picture_cache._make_shard, []
    def dies(*a, **k):
        if len(n) == 2: raise KeyboardInterrupt
        n.append(1); return real(*a, **k)
    monkeypatch.setattr(picture_cache, '_make_shard', dies)
    with pytest.raises(KeyboardInterrupt): filled(tmp_path/'c', files)
    monkeypatch.setattr(picture_cache, '_make_shard', real)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob('c/*/*.npy')}
    c = filled(tmp_path/'c', files)
    assert len(times) == 2 and all(p.stat().st_mtime_ns == t for p, t in times.items()) and all((c[p][0] == load_square(p, 32)[0]).all() for p in files)

def _fill(args):
    c = filled(*args)
    return [int(c[p][0].sum()) for p in args[1]]

def test_writers_at_once_and_workers(tmp_path, files):
    with mp.get_context('spawn').Pool(3) as pool: sums = pool.map(_fill, [(tmp_path/'c', files)] * 3)
    assert sums[0] == sums[1] == sums[2] == [int(load_square(p, 32)[0].sum()) for p in files]
    assert len(list((tmp_path/'c').glob('*/*.npy'))) == 3 and not list((tmp_path/'c').glob('*/.*'))
    c = PictureCache(tmp_path/'d', 32, shard=4); c.add(files, workers=2)
    assert (c.batch(files)[0] == PictureCache(tmp_path/'c', 32).batch(files)[0]).all()

def test_it_travels_to_workers(tmp_path, files):
    c = filled(tmp_path/'c', files); c.batch(files)
    d = pickle.loads(pickle.dumps(c))
    assert not d._maps and (d.batch(files)[0] == c.batch(files)[0]).all()
