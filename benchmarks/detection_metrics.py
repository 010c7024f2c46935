"""Mean average precision of a test set of RSNA's size (5,337 images): ours beside pycocotools, which must give the same number.

Ours starts from the table of detections, pycocotools from ready lists of dicts; it computes one area range and one limit of detections,
which is the least it can do. Both thresholds' sets (`map_40_75` and COCO's) are computed. `resamples_per_s` is what the intervals need:
the same metric for patients drawn anew, which pycocotools could give only by running again.
"""
import contextlib
import io

import numpy as np
from common import in_turn, write
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gk_mvlp.evaluation.detection import COCO_IOU, RSNA_IOU, Detections, mean_ap, random_detections, read_detections
from gk_mvlp.evaluation.statistics import patient_weights

IMAGES, RESAMPLES, ROUNDS = 5337, 100, 5


def lists(d: Detections) -> tuple[dict, list[dict]]:
    "The same boxes as COCO's ground truth and results."
    xywh = lambda b: [*b[:2], *(b[2:] - b[:2])]
    truth = {'images': [{'id': i + 1} for i in range(len(d.images))], 'categories': [{'id': c + 1} for c in range(len(d.classes))],
             'annotations': [{'id': k + 1, 'image_id': int(i) + 1, 'category_id': int(c) + 1, 'bbox': xywh(b), 'area': 1., 'iscrowd': 0}
                             for k, (i, c, b) in enumerate(zip(d.truth_image, d.truth_class, d.truth_box, strict=True))]}
    return truth, [{'image_id': int(i) + 1, 'category_id': int(c) + 1, 'bbox': xywh(b), 'score': float(s)}
                   for i, c, b, s in zip(d.found_image, d.found_class, d.found_box, d.found_score, strict=True)]


def coco(truth: dict, found: list[dict]) -> list[float]:
    "[map_40_75, coco_map] of pycocotools."
    out = []
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(); gt.dataset = truth; gt.createIndex()
        dt = gt.loadRes(found)
        for t in (RSNA_IOU, COCO_IOU):
            e = COCOeval(gt, dt, 'bbox')
            e.params.iouThrs, e.params.areaRng, e.params.areaRngLbl, e.params.maxDets = t, [[-1, 1e10]], ['all'], [100]
            e.evaluate(); e.accumulate()
            p = e.eval['precision']; out.append(float(p[p > -1].mean()))
    return out


def ours(frame) -> list[float]: d = read_detections(frame); return [float(mean_ap(d, t)[0]) for t in (RSNA_IOU, COCO_IOU)]


def main() -> None:
    result = {}
    for tail, classes, noise in (('', ('pneumonia',), 1.5), ('_14_classes', tuple(f'finding {i:02d}' for i in range(14)), 10.)):
        frame = random_detections(np.random.default_rng(0), IMAGES, classes, noise=noise)
        d = read_detections(frame); native = lists(d)
        a, b = ours(frame), coco(*native)
        assert np.allclose(a, b, atol=1e-12), f'not the same: {a}, pycocotools {b}'
        w = patient_weights(d.patients, RESAMPLES)
        t = in_turn({'ours': lambda: ours(frame), 'pycocotools': lambda: coco(*native), 'resamples': lambda: mean_ap(d, RSNA_IOU, w)},
                    ROUNDS)
        result |= {f'ratio_to_pycocotools{tail}': t['pycocotools'] / t['ours'], f'ours_s{tail}': t['ours'],
                   f'pycocotools_s{tail}': t['pycocotools'], f'map_40_75{tail}': a[0],
                   f'largest_difference{tail}': float(np.abs(np.subtract(a, b)).max()),
                   f'boxes{tail}': int((frame['kind'] != 'image').sum()), f'resamples_per_s{tail}': RESAMPLES / t['resamples']}
    write('detection_metrics', {**result, 'images': IMAGES})


if __name__ == '__main__': main()
