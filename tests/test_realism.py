"Greys and spectra of collections of pictures, against brute force and pictures of known spectrum."
import numpy as np
import pytest

from gk_mvlp.data.realism import central_square, compare_spectra, grey_distance, radial_spectrum
from gk_mvlp.paths import GKError


def test_grey_distance_is_that_of_sorted_pixels():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 200, (3, 20, 20), np.uint8), rng.integers(50, 256, (3, 20, 20), np.uint8)
    assert grey_distance(a, b) == pytest.approx(np.abs(np.sort(a.ravel()).astype(int) - np.sort(b.ravel())).mean())
    assert grey_distance(a, b[:1]) == pytest.approx(grey_distance(b[:1], a))

@pytest.mark.parametrize('k', [3, 11, 25])
def test_a_wave_has_its_power_at_its_frequency(k):
    x = np.cos(2 * np.pi * k * np.arange(64) / 64)
    for wave in (np.tile(x, (64, 1)), np.tile(x, (64, 1)).T):
        f, log_p = radial_spectrum([wave])
        assert f[log_p.argmax()] == k

def test_brightness_and_contrast_do_not_count():
    x = np.random.default_rng(1).random((2, 32, 32))
    assert np.allclose(radial_spectrum(x)[1], radial_spectrum(100 * x + 7)[1])

def test_shares_of_variance_add_up():
    "Ring mean times number of frequencies, over all rings, is Parseval's sum: 1 for unit variance."
    x = np.random.default_rng(2).random((40, 64, 64))
    f, log_p = radial_spectrum(x)
    u = np.fft.fftfreq(64, 1 / 64); count = np.bincount(np.rint(np.hypot(u[:, None], u)).astype(int).ravel())
    inside = (10 ** log_p * count[f]).sum() / (count[f].sum() / 64 ** 2)
    assert inside == pytest.approx(1, abs=.05)

def test_distance_of_spectra():
    f = np.arange(1, 100)
    y = -2 * np.log10(f)
    got = compare_spectra(f, y, y + .3)
    assert got['rms'] == pytest.approx(.3) and got['slope_a'] == pytest.approx(got['slope_b']) == pytest.approx(-2, abs=.01)

def test_refusals():
    for bad in ([np.zeros((8, 9))], [np.ones((8, 8)), np.ones((9, 9))], [np.full((8, 8), 3.)], []):
        with pytest.raises(GKError): radial_spectrum(bad)

def test_the_central_square_of_a_picture():
    x = np.zeros((100, 60), np.uint8); x[23:77, 3:57] = 200
    assert (central_square(x, 54) == 200).all() and central_square(x, 27).shape == (27, 27)
