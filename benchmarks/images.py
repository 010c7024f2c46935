"""Full-size JPEGs to squares of 224 pixels: ours, with and without the cache, beside the field's usual way.

The pictures are the phantom's, exported as MIMIC-CXR-JPG at 3053 x 2544 pixels, JPEG quality 95. The time of entropy decoding, which
nobody can skip, grows with the bytes, so the phantom's noise is set (.5) for files of about 1.5 MB, the mean of MIMIC-CXR-JPG; `_noisy`
are the same figures at the phantom's default noise (1), where files are half as large again. Yardstick: cv2.imread grey, cv2.resize with
INTER_AREA to the longest side, pad with zeros. One thread each; both read files that the system has in memory. The ways take turns,
round by round, and per way the fastest round counts: on a machine that does other work too, `load_average` says how much, the ratios
hold better than the rates. `pip install opencv-python-headless` for the comparison.
"""
import os
import tempfile
import time
from pathlib import Path

import numpy as np

SIZE, PICTURES, ROUNDS = 224, 4, 7
MEAN, MOST = .5, 10                               # tolerance between reduced and whole decoding, grey levels (as in tests/test_images.py)


def usual(path: Path) -> np.ndarray:
    "uint8 [SIZE, SIZE] as the field's code makes it."
    import cv2
    x = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    h, w = x.shape
    s = SIZE / max(h, w)
    y = cv2.resize(x, (round(w * s), round(h * s)), interpolation=cv2.INTER_AREA)
    top, left = (SIZE - y.shape[0]) // 2, (SIZE - y.shape[1]) // 2
    return np.pad(y, ((top, SIZE - y.shape[0] - top), (left, SIZE - y.shape[1] - left)))


def seconds(way, repeats: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(repeats): way()
    return (time.perf_counter() - start) / repeats


def compare(folder: Path, noise: float) -> dict:
    "Images/s of the three ways, their ratios and differences, for pictures made with `noise`."
    from gk_mvlp.data.images import load_image, load_square, resize_pad
    from gk_mvlp.data.phantom import PhantomConfig
    from gk_mvlp.data.phantom_export import export_phantom
    from gk_mvlp.data.picture_cache import PictureCache
    export_phantom(PhantomConfig(n=40, size=2544, seed=3, noise=noise), folder, ['mimic_cxr'], range(PICTURES), progress=False)
    files = sorted(folder.rglob('*.jpg'))
    cache = PictureCache(folder/'cache', SIZE)
    cache.add(files, workers=1)
    many = files * 250                            # one batch of a thousand: the cache is too fast for a clock otherwise
    ways = {'usual': (lambda: [usual(p) for p in files], len(files)), 'ours': (lambda: [load_square(p, SIZE) for p in files], len(files)),
            'cached': (lambda: cache.batch(many), len(many))}
    best = dict.fromkeys(ways, float('inf'))
    for r in range(ROUNDS):
        for name, (way, n) in ways.items(): best[name] = min(best[name], seconds(way) / n)
        print(f'round {r + 1}: ' + ', '.join(f'{k} {1 / s:.0f}/s' for k, s in best.items()), flush=True)
    whole, fast, other = (np.stack([f(p) for p in files]).astype(int)
                          for f in (lambda p: resize_pad(load_image(p), SIZE)[0], lambda p: load_square(p, SIZE)[0], usual))
    assert np.abs(fast - whole).mean() < MEAN and np.abs(fast - whole).max() <= MOST and (cache.batch(files)[0] == fast).all()
    return {'ours_images_per_s': 1 / best['ours'], 'cached_images_per_s': 1 / best['cached'], 'usual_images_per_s': 1 / best['usual'],
            'ratio_without_cache': best['usual'] / best['ours'],
            'ratio_with_cache': best['usual'] / best['cached'], 'file_mb': float(np.mean([p.stat().st_size for p in files]) / 1e6),
            'greatest_difference_to_whole_decoding': int(np.abs(fast - whole).max()),
            'mean_difference_to_whole_decoding': float(np.abs(fast - whole).mean()),
            'mean_difference_to_usual': float(np.abs(fast - other).mean())}


def main() -> None:
    import cv2
    cv2.setNumThreads(1)
    from common import write
    with tempfile.TemporaryDirectory() as d:
        result = compare(Path(d)/'a', .5) | {f'{k}_noisy': v for k, v in compare(Path(d)/'b', 1.).items()}
    write('images', result | {'pictures': PICTURES, 'rounds': ROUNDS, 'size': SIZE, 'opencv': cv2.__version__,
                              'load_average': os.getloadavg()[0]})


if __name__ == '__main__': main()
