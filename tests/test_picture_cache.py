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
from gk_mvlp.data.study import FindingBox, Study
from gk_mvlp.paths import GKError
from gk_mvlp.tasks.localization import BoxSet
from gk_mvlp.training import batches
from gk_mvlp.training.batches import StudySet, load_pictures


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

@pytest.mark.parametrize('spoil', [lambda f: next(f.glob('*.npy')).unlink(),
                                   lambda f: [p for p in f.glob('*.json') if not p.name.startswith('paths')][0].write_text('[{'),
                                   lambda f: [p.unlink() for p in f.glob('paths-*.json')],
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
    assert (len(times) == 2 and all(p.stat().st_mtime_ns == t for p, t in times.items())
            and all((c[p][0] == load_square(p, 32)[0]).all() for p in files))

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

# ---- in use: load_pictures, StudySet, BoxSet ----
def studies_of(files):
    return [Study(p.stem, p.stem, image=p, report='No effusion.', findings=[FindingBox('nodule', (.2, .2, .5, .6))]) for p in files]

def test_pictures_are_the_same_with_and_without_a_cache(tmp_path, files):
    studies = [*studies_of(files), Study('array', 'array', image=np.full((40, 30), 9, np.uint8), report='Clear.')]
    studies[1].image = str(studies[1].image)
    plain, frames = load_pictures(studies, 32)
    for _ in range(2):
        x, f = load_pictures(studies, 32, cache_dir=tmp_path/'c')
        assert (x == plain).all() and f == frames
    assert len(PictureCache(tmp_path/'c'/'pictures', 32)) == len(files), 'files only'
    a, b = StudySet(studies, image_size=32), StudySet(studies, image_size=32, cache_dir=tmp_path/'c')
    assert (a.images == b.images).all() and all((a.fields[k] == b.fields[k]).all() for k in a.fields)
    a, b = BoxSet(studies[:-1], ['nodule'], 32), BoxSet(studies[:-1], ['nodule'], 32, cache_dir=tmp_path/'c')
    assert (a.images == b.images).all() and (a.boxes == b.boxes).all()

def test_another_run_decodes_nothing_but_what_changed(tmp_path, files, monkeypatch):
    studies, decoded, real = studies_of(files), [], picture_cache.load_square
    load_pictures(studies, 32, cache_dir=tmp_path/'c')
    monkeypatch.setattr(picture_cache, 'load_square', lambda p, size: decoded.append(p) or real(p, size))
    monkeypatch.setattr(batches, 'load_square', lambda *a: pytest.fail('decoded past the cache'))
    write(files[4], 55)
    x, _ = load_pictures(studies, 32, cache_dir=tmp_path/'c')
    assert decoded == [files[4]] and (x[4] == real(files[4], 32)[0]).all()

def test_without_a_folder_or_without_files_nothing_is_written(tmp_path, files, monkeypatch):
    monkeypatch.setattr(batches, 'PictureCache', lambda *a: pytest.fail('a cache was made'))
    load_pictures(studies_of(files), 32)
    load_pictures([Study('a', 'a', image=np.zeros((20, 20), np.uint8))], 32, cache_dir=tmp_path/'c')
    assert not (tmp_path/'c').exists()

def test_a_folder_that_cannot_be_written_costs_the_cache_only(tmp_path, files):
    (tmp_path/'c').write_text('a file')
    with pytest.warns(UserWarning, match='not cached'): x, _ = load_pictures(studies_of(files), 32, cache_dir=tmp_path/'c')
    assert (x == load_pictures(studies_of(files), 32)[0]).all()

def test_broken_pictures_are_named(tmp_path, files):
    files[2].write_bytes(files[2].read_bytes()[:150])
    for where in (None, tmp_path/'c'):
        with pytest.raises(GKError, match=files[2].name): load_pictures(studies_of(files), 32, cache_dir=where)
    with pytest.raises(GKError, match='no picture'): load_pictures([Study('a', 'a')], 32, cache_dir=tmp_path/'c')

def test_too_many_pictures_for_memory_are_mapped(tmp_path, files, monkeypatch):
    studies = studies_of(files)
    want = StudySet(studies, image_size=32)[[2, 7, 0]]['images']
    monkeypatch.setattr(batches, 'MAX_IN_MEMORY', 1000)
    x, _ = load_pictures(studies, 32, cache_dir=tmp_path/'c')
    assert isinstance(x, np.memmap) and (x == load_pictures(studies, 32)[0]).all()
    assert (StudySet(studies, image_size=32, cache_dir=tmp_path/'c')[[2, 7, 0]]['images'] == want).all()
    assert {p.name for p in (tmp_path/'c').iterdir()} == {'pictures'}, 'the mapped file has no name'

def test_a_cut_shard_is_refused_by_name(tmp_path, files):
    c = filled(tmp_path/'c', files)
    for p in c.folder.glob('*.npy'): p.write_bytes(p.read_bytes()[:300])
    with pytest.raises(GKError, match='cannot be read'): PictureCache(tmp_path/'c', 32).batch(files)
