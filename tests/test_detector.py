"""The region detector: shapes, losses, learning, disk, and its measure."""
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gk_mvlp.data.anatomy import NUM_REGIONS
from gk_mvlp.data.images import to_float
from gk_mvlp.models.detector import (DetectionSet, DetectorConfig, MedianBoxes, RegionDetector, detection_loss, move_boxes, paired_iou,
                                     region_metrics,
                                     stretch, train_detector, vary_build, vary_exposure)
from gk_mvlp.paths import GKError
from gk_mvlp.training.trainer import TrainConfig

torch.set_num_threads(1)


def blobs(n, size=64, seed=0):
    "A bright rectangle whose place varies widely; every region is a fixed part of it. Returns images, boxes, valid."
    rng = np.random.default_rng(seed)
    parts = rng.uniform(0, .5, (NUM_REGIONS, 2)) if n == 0 else np.random.default_rng(99).uniform(0, .5, (NUM_REGIONS, 2))
    parts = np.concatenate([parts, parts + .45], 1)
    images, boxes = np.zeros((n, size, size), np.uint8), np.zeros((n, NUM_REGIONS, 4))
    for i in range(n):
        x, y = rng.uniform(.05, .4, 2)
        w, h = rng.uniform(.4, .55, 2)
        images[i, int(y * size):int((y + h) * size), int(x * size):int((x + w) * size)] = 200
        boxes[i] = parts * [w, h, w, h] + [x, y, x, y]
    return (np.clip(images + rng.integers(0, 30, images.shape), 0, 255).astype(np.uint8), boxes.astype(np.float32),
            np.ones((n, NUM_REGIONS), bool))


def batch(n=2, size=64):
    images, boxes, valid = blobs(n, size)
    return {'images': to_float(torch.from_numpy(images)), 'boxes': torch.from_numpy(boxes), 'valid': torch.from_numpy(valid)}


HEADS = [DetectorConfig(), DetectorConfig(image_size=96, feature_dim=32), DetectorConfig(head='faster_rcnn', feature_dim=32)]


@pytest.mark.parametrize('config', HEADS, ids=lambda c: f'{c.head}-{c.image_size}')
def test_shapes_ranges_and_determinism(config):
    model, b = RegionDetector(config), batch(3, config.image_size)
    model.train()
    d = model.detect(b['images'])
    assert model.training, 'the mode is given back'
    assert (d['boxes'].shape == (3, 29, 4) and d['scores'].shape == d['valid'].shape == (3, 29)
            and d['features'].shape == (3, 29, config.feature_dim))
    assert d['valid'].dtype == torch.bool and not any(v.requires_grad for v in d.values())
    assert 0 <= d['boxes'].min() and d['boxes'].max() <= 1 and 0 <= d['scores'].min() and d['scores'].max() <= 1
    again = model.detect(b['images'])
    assert all(d[k].equal(again[k]) for k in d)
    one = model.detect(b['images'][1:2])
    assert all(torch.allclose(one[k][0].float(), d[k][1].float(), atol=1e-4) for k in d), 'a picture does not depend on its batch'
    small = model.detect(b['images'], batch_size=2)
    assert torch.allclose(small['boxes'], d['boxes'], atol=1e-5)


def test_resnet50_faster_rcnn_trains_one_step():
    config = DetectorConfig(image_size=128, backbone='resnet50')
    assert config.head == 'faster_rcnn' and config.feature_dim == 2048
    model, b = RegionDetector(config), batch(2, 128)
    model.head.roi_heads.fg_bg_sampler.batch_size_per_image = 16          # fewer proposals: a unit test's time
    model.head.rpn._post_nms_top_n = {'training': 20, 'testing': 20}
    losses = detection_loss(model.train(), b)
    assert set(losses) == {'loss', 'loss_objectness', 'loss_rpn_box_reg', 'loss_classifier', 'loss_box_reg'}
    losses['loss'].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.detect(b['images'])['features'].shape == (2, 29, 2048)
    assert sum('backbone' in n for n, _ in model.named_parameters()) == len(list(model.backbone.parameters())), (
        'the head must not hold a second backbone')


@pytest.mark.parametrize('config', HEADS, ids=lambda c: f'{c.head}-{c.image_size}')
def test_invalid_regions_are_not_targets(config):
    "Whatever stands in an invalid row, the loss and its gradient stay the same."
    model, b = RegionDetector(config).train(), batch(2, config.image_size)
    b['valid'][:, [3, 7]] = False; b['valid'][1, 20] = False
    def run(boxes):
        torch.manual_seed(0); model.zero_grad()
        out = detection_loss(model, {**b, 'boxes': boxes})['loss']; out.backward()
        return out.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    junk = b['boxes'].clone()
    junk[~b['valid']] = torch.rand(int((~b['valid']).sum()), 4).sort(-1).values
    (l1, g1), (l2, g2) = run(b['boxes']), run(junk)
    assert l1 == l2 and g1.equal(g2)
    seen = b['boxes'].clone(); seen[0, 0] = torch.tensor([.1, .1, .2, .3])
    assert run(seen)[0] != l1
    b['valid'][:] = False
    assert np.isfinite(run(b['boxes'])[0]), 'a batch without any box'


@pytest.fixture(scope='module')
def learnt(tmp_path_factory):
    train, val = blobs(48), blobs(16, seed=1)
    run = tmp_path_factory.mktemp('detector')
    model = train_detector(*train, run, TrainConfig(epochs=14, batch_size=8, lr=3e-3, eval_every=2), DetectorConfig(feature_dim=32), val,
                           strength=0., quiet=True)
    return model, train, val, run


def test_learns_beyond_the_median(learnt):
    model, train, val, _ = learnt
    d = model.detect(to_float(torch.from_numpy(val[0])))
    iou = region_metrics(d['boxes'], d['valid'], val[1], val[2]).iou.mean()
    median = region_metrics(*MedianBoxes(*train[1:]).detect(len(val[0])), val[1], val[2]).iou.mean()
    assert iou > median + .15, (iou, median)
    assert not model.training and not any(p.requires_grad for p in model.parameters()), 'frozen'


def test_score_is_the_expected_iou(learnt):
    model, _, val, _ = learnt
    d = model.detect(to_float(torch.from_numpy(val[0])))
    assert abs(d['scores'].mean() - paired_iou(d['boxes'], torch.from_numpy(val[1])).mean()) < .1


def test_regions_never_seen_are_not_reported(tmp_path):
    images, boxes, valid = blobs(32)
    valid[:, 5] = False
    model = train_detector(images, boxes, valid, tmp_path, TrainConfig(epochs=6, batch_size=8, lr=3e-3), DetectorConfig(feature_dim=32),
                           strength=0., quiet=True)
    d = model.detect(to_float(torch.from_numpy(images)))
    assert not d['valid'][:, 5].any() and d['features'][:, 5].abs().max() == 0
    assert d['valid'][:, [0, 8, 24]].float().mean() > .9


def test_faster_rcnn_learns():
    torch.manual_seed(0)
    model, b = RegionDetector(DetectorConfig(head='faster_rcnn', feature_dim=32)).train(), batch(3)
    model.head.rpn._post_nms_top_n = {'training': 100, 'testing': 100}
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    iou = lambda: paired_iou(model.detect(b['images'])['boxes'], b['boxes']).mean().item()
    first = iou()
    for _ in range(40): opt.zero_grad(); detection_loss(model, b)['loss'].backward(); opt.step()
    assert (last := iou()) > first + .2, (first, last)


def test_save_and_load(learnt, tmp_path):
    model, _, val, _ = learnt
    model.save(tmp_path/'d')
    assert sorted(p.name for p in (tmp_path/'d').iterdir()) == ['config.json', 'model.safetensors']
    back, x = RegionDetector.load(tmp_path/'d'), to_float(torch.from_numpy(val[0]))
    a, b = model.detect(x), back.detect(x)
    assert back.config == model.config and all(a[k].equal(b[k]) for k in a)


def test_damaged_folder(learnt, tmp_path):
    with pytest.raises(GKError, match='no such file'): RegionDetector.load(tmp_path/'none')
    learnt[0].save(tmp_path)
    weights, config = (tmp_path/'model.safetensors').read_bytes(), (tmp_path/'config.json').read_text()
    (tmp_path/'model.safetensors').write_bytes(weights[:len(weights) // 2])
    with pytest.raises(GKError, match='model.safetensors: damaged'): RegionDetector.load(tmp_path)
    (tmp_path/'model.safetensors').write_bytes(weights)
    (tmp_path/'config.json').write_text(config.replace('"feature_dim": 32', '"feature_dim": 64'))
    with pytest.raises(GKError, match='of another config'): RegionDetector.load(tmp_path)
    for bad in ('{', '{"size": 3}'):
        (tmp_path/'config.json').write_text(bad)
        with pytest.raises(GKError, match='config.json'): RegionDetector.load(tmp_path)


def test_same_seed_same_detector_and_resume(tmp_path):
    data, cfg = blobs(16), TrainConfig(epochs=2, batch_size=8, lr=1e-3, seed=3)
    make = lambda name, c=cfg: train_detector(*data, tmp_path/name, c, DetectorConfig(feature_dim=16), strength=1., quiet=True)
    torch.manual_seed(1); a = make('a')
    torch.manual_seed(2); b = make('b')
    assert all(x.equal(y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    c = make('a')
    assert all(x.equal(y) for x, y in zip(a.state_dict().values(), c.state_dict().values(), strict=True))
    d = make('d', replace(cfg, seed=4))
    assert not all(x.equal(y) for x, y in zip(a.state_dict().values(), d.state_dict().values(), strict=True))


# --- data ---------------------------------------------------------------------------------------------------

def test_detection_set_augments_by_epoch_and_keeps_absent_regions():
    images, boxes, valid = blobs(6)
    valid[2, 4] = False
    data = DetectionSet(images, boxes, valid, strength=1., seed=0)
    a, b = data.__getitems__([2, 0, 5]), data.__getitems__([2, 0, 5])
    assert a['images'].equal(b['images']) and a['boxes'].equal(b['boxes'])
    data.set_epoch(1)
    assert not data.__getitems__([2, 0, 5])['images'].equal(a['images'])
    assert not a['valid'][0, 4] and a['boxes'][0, 4].abs().max() == 0
    plain = DetectionSet(images, boxes, valid).__getitems__([2])
    assert (plain['images'].equal(to_float(torch.from_numpy(images[[2]])))
            and torch.allclose(plain['boxes'][0, 0], torch.from_numpy(boxes[2, 0])))
    with pytest.raises(GKError, match='6 pictures, 5 boxes'): DetectionSet(images, boxes[:5], valid)


def test_boxes_follow_the_picture_into_another_build():
    boxes = torch.zeros(5, 29, 4); boxes[:, 0] = torch.tensor([.15, .2, .42, .8]); boxes[:, 8] = torch.tensor([.58, .25, .85, .75])
    boxes[4, 8] = 0
    x = torch.full((5, 1, 256, 256), -1.)
    for r in (0, 8):
        x0, y0, x1, y1 = (boxes[0, r] * 256).round().int().tolist(); x[:, :, y0:y1, x0:x1] = 1.
    y, moved = vary_build(x, boxes, torch.Generator().manual_seed(3), 1.)
    for i in range(4):
        for r in (0, 8):
            assert not torch.allclose(moved[i, r], boxes[i, r], atol=.01)
            half = slice(0, 256), slice(0, int(128 * (moved[i, 0, 2] + moved[i, 8, 0]))) if r == 0 else slice(int(128 * (moved[i, 0, 2]
                + moved[i, 8, 0])), 256)
            ys, xs = (y[i, 0][half] > 0).nonzero().unbind(1)
            seen = torch.stack([xs.min() + half[1].start, ys.min(), xs.max() + 1 + half[1].start, ys.max() + 1]) / 256
            torch.testing.assert_close(seen, moved[i, r], atol=.015, rtol=0)        # a pixel on the edge is stretched with the wall
    assert torch.equal(moved[:, 1:8], boxes[:, 1:8]) and len(moved[:4, 0].unique(dim=0)) == 4
    torch.testing.assert_close(y[4], x[4], atol=1e-4, rtol=0); torch.testing.assert_close(moved[4], boxes[4])        # one lung: as it was
    again = vary_build(x, boxes, torch.Generator().manual_seed(3), 1.)
    assert torch.equal(again[0], y) and torch.equal(again[1], moved)
    still, same = vary_build(x, boxes, torch.Generator().manual_seed(0), 0.)
    torch.testing.assert_close(still, x, atol=1e-3, rtol=0); torch.testing.assert_close(same, boxes)


def test_stretch_moves_boxes_with_the_picture():
    "A bright rectangle is found again where its box says it is; right stays right."
    x = torch.full((16, 1, 128, 128), -2.); x[:, :, 40:80, 30:60] = 2.
    box = torch.tensor([30, 40, 60, 80]).float().div(128).expand(16, 1, 4)
    y, moved = stretch(x, box, torch.Generator().manual_seed(0), 1.)
    for i in range(16):
        rows, cols = (y[i, 0] > 0).any(1).nonzero().flatten(), (y[i, 0] > 0).any(0).nonzero().flatten()
        seen = torch.tensor([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1]) / 128
        assert (seen - moved[i, 0]).abs().max() < .012, (seen, moved[i, 0])
    assert (moved[:, 0, 2] - moved[:, 0, 0]).std() > .01
    still, same = stretch(x, box, torch.Generator().manual_seed(0), 0.)
    assert torch.allclose(still, x, atol=1e-4) and torch.allclose(same, box, atol=1e-6)


def test_exposure_keeps_range_and_polarity():
    ramp = to_float(torch.arange(256, dtype=torch.uint8).repeat(256, 1)[None]).expand(32, -1, -1, -1)
    out = vary_exposure(ramp, torch.Generator().manual_seed(0), 1.)
    assert -2 <= out.min() and out.max() <= 2 and not out.allclose(ramp, atol=.1)
    assert (out[..., -40:].mean((1, 2, 3)) > out[..., :40].mean((1, 2, 3))).all(), 'bright stays bright'


# --- measure -------------------------------------------------------------------------------------------------

def test_region_metrics_by_hand():
    true = np.array([[[0, 0, .4, .4], [.5, .5, 1, 1]], [[0, 0, .4, .4], [0, 0, 0, 0]], [[.2, .2, .6, .6], [.5, .5, 1, 1]]])
    there = np.array([[1, 1], [1, 0], [1, 1]], bool)
    pred = np.array([[[0, 0, .4, .4], [.5, .5, 1, .75]], [[.2, 0, .6, .4], [.1, .1, .2, .2]], [[.2, .2, .6, .6], [0, 0, .1, .1]]])
    said = np.array([[1, 1], [1, 1], [0, 1]], bool)
    m = region_metrics(pred, said, true, there, ['a', 'b'])
    # a: 1, overlap .08 of .24, not reported; b: one half (not above it), not there, no overlap
    np.testing.assert_allclose(m.iou, [(1 + 1/3 + 0) / 3, (.5 + 0) / 2])
    np.testing.assert_allclose(m.detection_rate, [1/3, 0])
    assert list(m.n) == [3, 2] and list(m.false_alarms) == [0, 1]
    none = region_metrics(pred, said, true, np.zeros_like(there), ['a', 'b'])
    assert none.iou.isna().all() and list(none.n) == [0, 0] and list(none.false_alarms) == [2, 3]
    with pytest.raises(GKError, match='region_metrics'): region_metrics(pred[:2], said, true, there, ['a', 'b'])


def test_iou_and_moves():
    a, b = torch.tensor([[0., 0, 2, 2], [0, 0, 1, 1], [0, 0, 0, 0]]), torch.tensor([[1., 1, 3, 3], [2, 2, 3, 3], [0, 0, 0, 0]])
    assert paired_iou(a, b).tolist() == pytest.approx([1/7, 0, 0])
    moved = move_boxes(torch.tensor([[.2, .2, .4, .6]]), torch.tensor([[.5, 0, 0, np.log(.5)]]))
    assert moved[0].tolist() == pytest.approx([.3, .3, .5, .5], abs=1e-6)


def test_median_boxes_ignore_absent_regions():
    boxes, valid = np.zeros((3, 29, 4)), np.ones((3, 29), bool)
    boxes[:, 0] = [[.1, .1, .5, .5], [.2, .2, .6, .6], [.9, .9, 1, 1]]
    valid[2, 0] = False; valid[:, 1] = False
    m = MedianBoxes(boxes, valid)
    assert m.boxes[0] == pytest.approx([.15, .15, .55, .55]) and not m.valid[1] and m.detect(5)[0].shape == (5, 29, 4)


def test_bad_input(tmp_path):
    for bad in ({'backbone': 'vgg'}, {'head': 'yolo'}, {'image_size': 50}, {'feature_dim': 30}, {'score_threshold': 1.},
                {'backbone': 'resnet50', 'feature_dim': 64}):
        with pytest.raises(GKError, match='DetectorConfig'): DetectorConfig(**bad)
    model = RegionDetector(DetectorConfig())
    for bad in (torch.zeros(2, 3, 64, 64), torch.zeros(2, 1, 32, 32), torch.zeros(2, 1, 64, 64, dtype=torch.uint8), torch.zeros(1, 64, 64)):
        with pytest.raises(GKError, match='the detector got'): model.detect(bad)
    with pytest.raises(GKError, match='no picture'): model.detect(torch.zeros(0, 1, 64, 64))
    images, boxes, valid = blobs(4)
    with pytest.raises(GKError, match='no training picture has a region box'):
        train_detector(images, boxes, np.zeros_like(valid), tmp_path, TrainConfig(epochs=1, batch_size=2, lr=1e-3))
