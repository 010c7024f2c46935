"Pictures: what is refused, what is kept, and where boxes go."
import io
import os
import struct
import zlib

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageFile

from gk_mvlp.data.images import BLACK, Frame, augment, load_image, load_square, resize_pad, to_float
from gk_mvlp.data.phantom import PhantomConfig, make_study
from gk_mvlp.paths import GKError


def noise(h=64, w=48, seed=0): return np.random.default_rng(seed).integers(0, 256, (h, w), np.uint8)

def smooth(h=120, w=90):
    y, x = np.mgrid[0:h, 0:w]
    return (127 + 60 * np.sin(x / 14) + 60 * np.cos(y / 17)).astype(np.uint8)

def encoded(x, fmt, **kw):
    f = io.BytesIO(); (x if isinstance(x, Image.Image) else Image.fromarray(x)).save(f, fmt, **kw); return f.getvalue()

def png_chunk(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def png_header_only(w, h):
    return (b'\x89PNG\r\n\x1a\n' + png_chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 0, 0, 0, 0))
            + png_chunk(b'IDAT', zlib.compress(b'\0')) + png_chunk(b'IEND', b''))

def dicom_bytes(pixels, kind='MONOCHROME2', drop=(), **tags):
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset(); ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = pydicom.uid.SecondaryCaptureImageStorage, '1.2.3', 'CR'
    ds.Rows, ds.Columns = pixels.shape
    signed, eight = pixels.dtype == np.int16, pixels.dtype == np.uint8
    ds.SamplesPerPixel, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, int(signed), kind
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = (8, 8, 7) if eight else (16, 16, 15)
    ds.PixelData = pixels.tobytes()
    for k, v in tags.items(): setattr(ds, k, v)
    for k in drop: delattr(ds, k)
    f = io.BytesIO(); ds.save_as(f, enforce_file_format=True); return f.getvalue()

def flipped(raw, at): return raw[:at] + bytes([raw[at] ^ 0xff]) + raw[at + 1:]

def lying_frames(n): return dicom_bytes(np.zeros((16, 16), np.uint8), NumberOfFrames=n)

JPEG, PNG, DCM = encoded(noise(), 'JPEG'), encoded(noise(), 'PNG'), dicom_bytes(noise().astype(np.uint16))
BAD_FILES = {
    'empty.jpg': b'', 'empty.dcm': b'', 'text.jpg': b'<html>404 not found</html>', 'report.png': 'Keine Stauung. Röntgen'.encode('latin1'),
    'zeros.png': bytes(1000),
    'header_only.jpg': JPEG[:20], 'half.jpg': JPEG[:len(JPEG) // 2], 'nearly_whole.jpg': JPEG[:-200], 'half.png': PNG[:len(PNG) // 2],
    'no_end.png': PNG[:-12], 'signature.png': PNG[:8],
    'flipped_pixels.png': flipped(PNG, len(PNG) // 2), 'flipped_header.png': flipped(PNG, 20),
    'one.png': encoded(np.zeros((1, 1), np.uint8), 'PNG'), 'line.png': encoded(np.zeros((1, 500), np.uint8), 'PNG'),
    'bomb.png': png_header_only(60_000, 60_000), 'large.png': png_header_only(11_000, 10_000), 'gif.jpg': encoded(noise(), 'GIF'),
    'webp.png': encoded(noise(), 'WEBP'), 'pdf.jpg': b'%PDF-1.7\n' + bytes(100),
    'progressive_half.jpg': (lambda b: b[:len(b) // 3])(encoded(noise(), 'JPEG', progressive=True)),
    'half.dcm': DCM[:len(DCM) // 2], 'cut_pixels.dcm': DCM[:-100], 'preamble.dcm': bytes(128) + b'DICM',
    'no_pixels.dcm': dicom_bytes(noise(), drop=('PixelData',)), 'colour.dcm': dicom_bytes(noise(), kind='PALETTE COLOR'),
    'frames.dcm': lying_frames(3), 'tiny.dcm': dicom_bytes(np.zeros((2, 2), np.uint8)),
    'huge.dcm': dicom_bytes(noise(), Rows=50_000, Columns=50_000), 'no_rows.dcm': dicom_bytes(noise(), drop=('Rows',)),
    'bad_window.dcm': dicom_bytes(noise(), WindowCenter=100, WindowWidth=0),
    'two_pictures.tif': encoded(Image.fromarray(noise()), 'TIFF', save_all=True, append_images=[Image.fromarray(noise(seed=1))]),
    'nan.tif': encoded(Image.fromarray(np.full((20, 20), np.nan, np.float32)), 'TIFF'),
}

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', BAD_FILES)
def test_broken_files_are_refused_by_name(tmp_path, name):
    (tmp_path/name).write_bytes(BAD_FILES[name])
    with pytest.raises(GKError) as err: load_image(tmp_path/name)
    assert name in str(err.value) and err.value.remedy and '\n' not in str(err.value)

def test_not_there_and_folder(tmp_path):
    for p in (tmp_path/'no.png', tmp_path):
        with pytest.raises(GKError, match=p.name): load_image(p)

@pytest.mark.parametrize('x', [np.zeros((20, 20), np.float32), np.zeros((20, 20, 2), np.uint8), np.zeros(20, np.uint8),
                               np.zeros((2, 2), np.uint8), np.zeros((20, 20), bool), None, b'abc'])
def test_bad_arrays(x):
    with pytest.raises(GKError): load_image(x)

def test_every_cut_of_a_file_is_refused(tmp_path):
    p = tmp_path/'cut'
    for raw in (JPEG, PNG):
        for at in range(1, len(raw) - 12, max(1, len(raw) // 40)):
            p.write_bytes(raw[:at])
            with pytest.raises(GKError): load_image(p)

def test_a_flipped_byte_in_a_png_never_changes_the_picture(tmp_path):
    p, g = tmp_path/'x.png', smooth()
    raw = encoded(g, 'PNG'); refused = 0
    for at in range(8, len(raw), max(1, len(raw) // 300)):
        p.write_bytes(flipped(raw, at))
        try: assert (load_image(p) == g).all(), at
        except GKError: refused += 1
    assert refused > 250

def test_the_limit_can_be_moved(tmp_path):
    p = tmp_path/'a.png'; p.write_bytes(PNG)
    assert load_image(p).shape == (64, 48)
    with pytest.raises(GKError, match='max_pixels'): load_image(p, max_pixels=64 * 48 - 1)

def test_a_global_switch_cannot_let_half_pictures_pass(tmp_path, monkeypatch):
    p = tmp_path/'a.jpg'; p.write_bytes(BAD_FILES['half.jpg'])
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    with pytest.raises(GKError, match='LOAD_TRUNCATED_IMAGES'): load_image(p)

@pytest.mark.parametrize('mode', ['L', 'LA', 'RGB', 'RGBA', 'P', '1', 'I;16'])
def test_png_modes(tmp_path, mode):
    g = noise()
    if mode == '1': im = Image.fromarray((g > 127).astype(np.uint8) * 255).convert('1'); want = np.where(g > 127, 255, 0)
    elif mode == 'I;16': g[0, :2] = 0, 255; im = Image.fromarray(g.astype(np.uint16) * 16); want = g
    else: im = Image.fromarray(g).convert(mode); want = g
    im.save(tmp_path/'x.png')
    assert (load_image(tmp_path/'x.png') == want).all()

def test_transparent_is_black(tmp_path):
    rgba = np.dstack([noise()] * 3 + [np.full((64, 48), 255, np.uint8)]); rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path/'x.png')
    y = load_image(tmp_path/'x.png')
    assert (y[:10] == 0).all() and (y[10:] == rgba[10:, :, 0]).all()

def test_extension_does_not_matter(tmp_path):
    for name, raw in (('png_named.jpg', PNG), ('jpeg_named.png', JPEG), ('dicom_named.png', DCM), ('none', PNG)):
        (tmp_path/name).write_bytes(raw)
        assert load_image(tmp_path/name).shape == (64, 48)

def test_exif_rotation_is_followed_as_in_viewers(tmp_path):
    e = Image.Exif(); e[274] = 6
    (tmp_path/'x.jpg').write_bytes(encoded(smooth(), 'JPEG', quality=95, exif=e))
    assert np.abs(load_image(tmp_path/'x.jpg').astype(int) - np.rot90(smooth(), -1)).mean() < 2

@pytest.mark.parametrize('want,shape', [(None, (1200, 904)), (50, (150, 113)), (114, (300, 226)), (227, (600, 452)), (453, (1200, 904)),
                                        (5000, (1200, 904))])
def test_reduced_jpeg_never_goes_below(tmp_path, want, shape):
    p = tmp_path/'x.jpg'; p.write_bytes(encoded(smooth(1200, 904), 'JPEG', quality=95))
    x = load_image(p, min_side=want)
    assert x.shape == shape and (want is None or min(x.shape) >= min(want, 904))
    full = np.asarray(Image.fromarray(load_image(p)).resize(shape[::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(full - x).mean() < 2

def test_colour_jpeg_is_its_luma(tmp_path):
    rgb = np.zeros((64, 64, 3), np.uint8); rgb[..., 1] = 200
    (tmp_path/'x.jpg').write_bytes(encoded(rgb, 'JPEG'))
    assert abs(int(load_image(tmp_path/'x.jpg')[5, 5]) - round(.587 * 200)) <= 1

# --- DICOM ---
def dicom(tmp_path, *a, **k):
    p = tmp_path/'x.dcm'; p.write_bytes(dicom_bytes(*a, **k)); return load_image(p).astype(int)

def test_dicom_eight_bit_is_kept_and_monochrome1_inverted(tmp_path):
    g = noise()
    assert (dicom(tmp_path, g) == g).all() and (dicom(tmp_path, g, kind='MONOCHROME1') == 255 - g).all()

def test_dicom_window_formula(tmp_path):
    "PS3.3 C.11.2.1.2 on a ramp, computed by hand."
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    y = dicom(tmp_path, ramp, WindowCenter=1000, WindowWidth=401)
    want = np.clip((ramp.astype(float) - 999.5) / 400 + .5, 0, 1) * 255
    assert np.abs(y - want).max() <= 1
    assert (y[ramp < 799] == 0).all() and (y[ramp > 1200] == 255).all()

def test_dicom_rescale_signed_and_first_of_two_windows(tmp_path):
    ramp = (np.arange(64 * 64) - 2000).astype(np.int16).reshape(64, 64)
    y = dicom(tmp_path, ramp, RescaleSlope=2, RescaleIntercept=10, WindowCenter=[10, 500], WindowWidth=[801, 3])
    want = np.clip((2. * ramp + 10 - 9.5) / 800 + .5, 0, 1) * 255
    assert np.abs(y - want).max() <= 1

def test_dicom_negative_slope_window(tmp_path):
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    y = dicom(tmp_path, ramp, RescaleSlope=-1, RescaleIntercept=4095, WindowCenter=2048, WindowWidth=4096)
    assert y[0, 0] > 250 and y[-1, -1] < 5

def test_dicom_padding_does_not_set_the_range(tmp_path):
    x = np.full((32, 32), 1000, np.int16); x[:, 16:] = 1100; x[:4] = -2000
    y = dicom(tmp_path, x, PixelPaddingValue=-2000)
    assert (y[:4] == 0).all() and y[10, 0] == 0 and y[10, 31] == 255

def test_real_dicom_pair(real_data):
    if not (real_data/'dicom').is_dir(): pytest.skip('no dicom/ in the data root')
    plain, fake = load_image(next((real_data/'dicom').glob('1.2*.dcm'))), load_image(real_data/'dicom'/'Fake_MONOHR1.dcm')
    assert plain.shape == (1024, 1024) and (plain.astype(int) + fake == 255).all()

# --- frame ---
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(8, 1024), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_frame_round_trip(w, h, size, box):
    f = Frame(w, h, size)
    b = np.array([box])
    inside = f.to_frame(b)
    assert np.allclose(f.from_frame(inside), b, atol=1e-9) and (inside >= -1e-12).all() and (inside <= 1 + 1e-12).all()
    assert max(f.inner) == size and min(f.offset) >= 0
    t = torch.tensor(b, dtype=torch.float64)
    assert np.allclose(f.to_frame(t).numpy(), inside) and torch.allclose(f.from_frame(f.to_frame(t)), t, atol=1e-9)

@given(st.integers(20, 300), st.integers(20, 300), st.integers(64, 256))
def test_frame_agrees_with_the_pixels(w, h, size):
    "A white block's box, moved by the frame, is where resize_pad puts the block."
    x = np.zeros((h, w), np.uint8); x[h // 4:h // 2 + 1, w // 3:2 * w // 3 + 1] = 255
    y, f = resize_pad(x, size)
    rows, cols = np.flatnonzero((y > 127).any(1)), np.flatnonzero((y > 127).any(0))
    want = f.to_frame(np.array([[w // 3 / w, h // 4 / h, (2 * w // 3 + 1) / w, (h // 2 + 1) / h]]))[0] * size
    got = np.array([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1])
    assert np.abs(got - want).max() <= 1.5

def test_from_frame_cuts_the_padding():
    f = Frame(50, 100, 100)
    assert (np.allclose(f.from_frame(np.array([0, 0, 1, 1])), [0, 0, 1, 1])
            and np.allclose(f.from_frame(np.array([0, 0, 1, 1]), clip=False), [-.5, 0, 1.5, 1]))

@pytest.mark.parametrize('bad', [(0, 5, 5), (5, -1, 5), (5, 5, 0)])
def test_bad_frames(bad):
    with pytest.raises(GKError): Frame(*bad)

def test_resize_pad_shapes_and_refusals():
    for h, w in ((10, 1000), (1000, 10), (8, 8), (64, 64)):
        y, f = resize_pad(noise(h, w), 64)
        assert y.shape == (64, 64) and y.dtype == np.uint8 and (f.width, f.height) == (w, h)
    assert (resize_pad(noise(64, 64), 64)[0] == noise(64, 64)).all()
    with pytest.raises(GKError): resize_pad(np.zeros((4, 4, 3), np.uint8), 8)
    with pytest.raises(GKError): resize_pad(np.zeros((4, 4), np.float32), 8)

TOLERANCE = {'mean': .5, 'most': 10}                          # grey levels of 255 between reduced and whole decoding

@pytest.mark.parametrize(('side', 'size'), [(650, 128), (650, 64), (517, 224), (1024, 100), (130, 128)])
def test_load_square_of_reduced_jpeg_equals_the_plain_path(tmp_path, side, size):
    "Sides that are no multiple of 8 included: the last, partly filled block must not shift the picture."
    x = np.zeros((round(side * 1.2), side), np.uint8)
    x[side // 10:side // 10 + side] = make_study(PhantomConfig(n=9, size=side, seed=4), side % 7).image
    p = tmp_path/'x.jpg'; p.write_bytes(encoded(x, 'JPEG', quality=95))
    (fast, f), (slow, g) = load_square(p, size), resize_pad(load_image(p), size)
    d = np.abs(fast.astype(int) - slow)
    assert f == g and d.mean() < TOLERANCE['mean'] and d.max() <= TOLERANCE['most'], (d.mean(), d.max())

def test_reduced_decoding_of_real_pictures(real_data):
    "Burnt-in letters and wires are harder than phantoms: all but one pixel in a thousand within the tolerance."
    for size in (64, 128):
        d = []
        for p in sorted((real_data/'covid_chestxray'/'images').glob('*.jpg'))[::4]:
            (fast, f), (slow, g) = load_square(p, size), resize_pad(load_image(p), size)
            assert f == g
            d.append(np.abs(fast.astype(int) - slow))
        assert np.mean(d) < TOLERANCE['mean'] and np.quantile(d, .999) <= TOLERANCE['most'] and max(x.mean() for x in d) < 1

def test_turned_jpegs_have_no_shift_either(tmp_path):
    for turn in range(1, 9):
        e = Image.Exif(); e[0x0112] = turn
        p = tmp_path/f'{turn}.jpg'; p.write_bytes(encoded(smooth(613, 401), 'JPEG', quality=95, exif=e))
        (fast, f), (slow, g) = load_square(p, 64), resize_pad(load_image(p), 64)
        assert f == g and np.abs(fast.astype(int) - slow).max() <= TOLERANCE['most']

def test_a_picture_that_is_no_reduction_of_its_full_size_is_refused():
    assert resize_pad(noise(51, 26), 16, (203, 405))[1] == Frame(203, 405, 16)
    for full in ((203, 400), (26, 50), (2600, 5100)):
        with pytest.raises(GKError, match='decoding'): resize_pad(noise(51, 26), 16, full)

# --- tensors ---
def test_to_float():
    x = torch.randint(0, 256, (2, 8, 8), dtype=torch.uint8)
    y = to_float(x)
    assert y.shape == (2, 1, 8, 8) and y.dtype == torch.float32 and torch.equal(to_float(x[:, None]), y)
    assert torch.allclose(y[:, 0], (x / 255 - .5) / .25)
    for bad in (x.float(), x[0], torch.zeros(2, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(GKError): to_float(bad)

def gen(seed=0): return torch.Generator().manual_seed(seed)

def blocks(b=32, s=128):
    "Pictures with one bright block each on mid grey, and the block's box."
    rng = np.random.default_rng(3)
    x, boxes = torch.full((b, s, s), 60, dtype=torch.uint8), torch.zeros(b, 1, 4)
    for i in range(b):
        x0, y0 = rng.integers(30, 60, 2); w, h = rng.integers(16, 34, 2)
        x[i, y0:y0 + h, x0:x0 + w] = 230
        boxes[i, 0] = torch.tensor([x0, y0, x0 + w, y0 + h]) / s
    return to_float(x), boxes

@pytest.mark.parametrize('strength', [.3, 1., 2.])
def test_boxes_follow_the_picture(strength):
    x, boxes = blocks()
    y, moved = augment(x, gen(), boxes, strength)
    assert (moved - boxes).abs().max() > .01
    for im, b in zip(y[:, 0], moved[:, 0] * 128, strict=True):
        blockish = im > (im.min() + im.max()) / 2
        # opening: noise dots go
        mask = torch.nn.functional.max_pool2d(-torch.nn.functional.max_pool2d(-blockish[None].float(), 3, 1, 1), 3, 1, 1)[0] > .5
        rows, cols = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        got = torch.tensor([cols[0], rows[0], cols[-1] + 1, rows[-1] + 1])
        assert (got - b).abs().max() <= 4, (got, b)

def test_the_marker_stays_on_its_side_and_upright():
    s = 96
    x = torch.zeros(200, s, s, dtype=torch.uint8)
    x[:, 8:20, 74:86] = 255                                            # an L marker at the patient's left, at the top
    y, _ = augment(to_float(x), gen(5), strength=1.)
    w = (y - y.amin((2, 3), keepdim=True)).clamp(min=0)[:, 0] ** 4
    cx = (w.sum(1) * torch.arange(s)).sum(1) / w.sum((1, 2)); cy = (w.sum(2) * torch.arange(s)).sum(1) / w.sum((1, 2))
    assert (cx > s / 2).all() and (cy < s / 2).all()
    assert cx.std() > 1 and cy.std() > 1, 'it moves'

def test_handedness_is_kept():
    "Three corners of different brightness keep their turning sense: the map is never a mirror image."
    s = 96
    x = torch.zeros(64, s, s, dtype=torch.uint8)
    for v, (r, c) in ((80, (30, 30)), (160, (30, 60)), (250, (60, 30))): x[:, r - 4:r + 4, c - 4:c + 4] = v
    corner = torch.tensor([[30, 30], [60, 30], [30, 60]]) / s
    boxes = torch.cat([corner - .04, corner + .04], 1).expand(64, 3, 4)
    _, moved = augment(to_float(x), gen(2), boxes, 3.)
    c = (moved[..., :2] + moved[..., 2:]) / 2
    a, b = c[:, 1] - c[:, 0], c[:, 2] - c[:, 0]
    assert (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0] > 0).all()

def test_augment_is_a_function_of_the_generator_and_leaves_its_input():
    x, boxes = blocks(4)
    before = x.clone(), boxes.clone()
    torch.manual_seed(1); a = augment(x, gen(7), boxes)
    torch.manual_seed(2); b = augment(x, gen(7), boxes)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], augment(x, gen(8), boxes)[0])
    assert torch.equal(x, before[0]) and torch.equal(boxes, before[1])
    assert not torch.equal(a[0][0] - x[0], a[0][1] - x[1])

def test_augment_range_type_and_absent_boxes():
    x, _ = blocks(4)
    boxes = torch.zeros(4, 3, 4); boxes[:, 0] = torch.tensor([.2, .2, .6, .6]); boxes[:, 1] = torch.tensor([.5, .5, .5, .7])
    y, moved = augment(x, gen(), boxes)
    assert y.min() >= BLACK and y.max() <= 2 and y.dtype == x.dtype and torch.isfinite(y).all()
    assert (moved[:, 1:] == 0).all() and (moved[:, 0, 2:] > moved[:, 0, :2]).all() and moved.min() >= 0 and moved.max() <= 1
    assert augment(x.bfloat16(), gen())[0].dtype == torch.bfloat16
    same, same_boxes = augment(x, gen(), boxes, strength=0)
    assert torch.equal(same, x) and torch.equal(same_boxes, boxes)

@pytest.mark.parametrize('x,boxes,strength', [(torch.zeros(2, 8, 8), None, 1.), (torch.zeros(2, 1, 8, 9), None, 1.),
                                              (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), None, 1.), (torch.zeros(2, 3, 8, 8), None, 1.),
                                              (torch.zeros(2, 1, 8, 8), torch.zeros(2, 4), 1.),
                                              (torch.zeros(2, 1, 8, 8), torch.zeros(3, 1, 4), 1.), (torch.zeros(2, 1, 8, 8), None, -1.),
                                              (torch.zeros(2, 1, 8, 8), None, float('nan'))])
def test_augment_refuses(x, boxes, strength):
    with pytest.raises(GKError): augment(x, gen(), boxes, strength)

def test_every_real_picture_is_whole(real_data):
    n = 0
    for pattern in ('covid_chestxray/images/*.jpg', 'nih_chestxray14/images/*.png', 'nih_chestxray14/images_64px/*.png',
                    'vqa_rad/images/*.jpg'):
        for p in sorted(real_data.glob(pattern)):
            x = load_image(p, min_side=64); n += 1
            assert x.dtype == np.uint8 and x.ndim == 2 and x.std() > 1, p.name
    assert n == 275 + 25 + 1000 + 115
