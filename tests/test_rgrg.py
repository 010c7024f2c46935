"RGRG's published detector in ours: a state dict of its shape, built with torchvision alone, and what is refused."
import pytest
import torch
from torch import nn
from torchvision.models import resnet50
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead

from gk_mvlp.data.images import to_float
from gk_mvlp.models.detector import RegionDetector, convert_rgrg
from gk_mvlp.paths import GKError


@pytest.fixture(scope='module')
def rgrg():
    "Modules of RGRG's shapes: grey ResNet-50, 160 anchors, RoI maps of 8 x 8, 29 regions and background, features of 1,024."
    torch.manual_seed(0)
    net = resnet50(weights=None)
    net.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    m = nn.Module()
    m.backbone = nn.Sequential(*list(net.children())[:-2])
    m.rpn, m.roi_heads = nn.Module(), nn.Module()
    m.rpn.head = RPNHead(2048, 160)
    m.roi_heads.box_head, m.roi_heads.box_predictor, m.roi_heads.dim_reduction = (TwoMLPHead(2048 * 64, 1024), FastRCNNPredictor(1024, 30),
                                                                                  nn.Linear(2048, 1024))
    for b in m.backbone.modules():
        if isinstance(b, nn.BatchNorm2d): b.running_mean.normal_(0, .1); b.running_var.uniform_(.5, 1.5)
    return m.eval()


def test_weights_arrive_and_the_other_normalisation_is_made_up_for(rgrg, tmp_path):
    torch.save({'model': {f'object_detector.{k}': v for k, v in rgrg.state_dict().items()} | {'language_model.x': torch.zeros(1)}},
               tmp_path/'full.pt')
    ours = RegionDetector.from_rgrg(tmp_path/'full.pt', image_size=128)
    assert ours.head.rpn.anchor_generator.num_anchors_per_location() == [160]
    for a, b in ((rgrg.rpn.head.cls_logits, ours.head.rpn.head.cls_logits),
                 (rgrg.roi_heads.box_predictor.bbox_pred, ours.head.roi_heads.box_predictor.bbox_pred)):
        assert torch.equal(a.weight, b.weight)
    assert (torch.equal(rgrg.roi_heads.box_head.fc6.weight, ours.head.roi_heads.box_head.fc6.weight)
            and torch.equal(rgrg.rpn.head.conv[0][0].weight, ours.head.rpn.head.conv[0][0].weight))
    x = torch.randint(0, 256, (1, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        theirs = rgrg.backbone[1](rgrg.backbone[0]((x[:, None].float() / 255 - .471) / .302))
        got = ours.backbone[1](ours.backbone[0](to_float(x)))
    assert torch.allclose(got[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], atol=1e-4), (
        'apart from the frame, where zero padding means another grey')
    found = ours.detect(to_float(x))
    assert (found['boxes'].shape == (1, 29, 4) and found['features'].shape == (1, 29, 2048)
            and not any(p.requires_grad for p in ours.parameters()))


def test_older_torchvision_names(rgrg, tmp_path):
    torch.save({k.replace('rpn.head.conv.0.0', 'rpn.head.conv'): v for k, v in rgrg.state_dict().items()}, tmp_path/'old.pt')
    ours = convert_rgrg(tmp_path/'old.pt', 64)
    assert torch.equal(rgrg.rpn.head.conv[0][0].weight, ours.head.rpn.head.conv[0][0].weight)


class NotWeights:
    def __reduce__(self): return print, ('opened',)


def test_what_is_refused(rgrg, tmp_path, capsys):
    path, good = tmp_path/'x.pt', rgrg.state_dict()
    def refuse(state, match):
        torch.save(state, path)
        with pytest.raises(GKError, match=match): convert_rgrg(path, 64)
    refuse({k: v for k, v in good.items() if k != 'rpn.head.cls_logits.bias'}, 'missing .head.rpn.head.cls_logits.bias')
    refuse(good | {'backbone.9.weight': torch.zeros(1)}, 'not known .backbone.9.weight')
    refuse(good | {'roi_heads.box_predictor.cls_score.weight': torch.zeros(37, 1024)},
           'another shape .head.roi_heads.box_predictor.cls_score.weight')
    refuse({'model': NotWeights()}, 'plain weights')
    assert 'opened' not in capsys.readouterr().out, 'no code of a file is run'
    with pytest.raises(GKError, match='no such file'): convert_rgrg(tmp_path/'none.pt')
