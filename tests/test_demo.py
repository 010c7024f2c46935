"""The demo page: its parts against plain computations, and the whole of it in a real browser, with bad uploads, many at once, and
nothing asked of any other machine."""
import os
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from gk_mvlp.apps import demo, release  # noqa: F401  (release: save_pretrained of a predictor)
from gk_mvlp.apps.predict import Predictor
from gk_mvlp.cli import main
from gk_mvlp.data.knowledge import ENTITY_NAMES
from gk_mvlp.data.phantom import PhantomConfig, make_study
from gk_mvlp.models.detector import DetectorConfig, RegionDetector
from gk_mvlp.models.encoders import train_tokenizer
from gk_mvlp.models.gk_mvlp import GKMVLP, ModelConfig, prompt_book
from gk_mvlp.paths import GKError

PHANTOM = PhantomConfig(n=40, size=96)
# Runs the command in a process that notes every name or address outside this machine that anything in it wants; the first entry shows that
# it notes.
GUARD = '''
import ipaddress, os, socket, sys
real, connect = socket.getaddrinfo, socket.socket.connect
def outside(host):
    host = host.decode() if isinstance(host, bytes) else host
    if host in (None, '', 'localhost'): return False
    try: return not (ipaddress.ip_address(host).is_loopback or ipaddress.ip_address(host).is_unspecified)
    except ValueError: return True
def note(host):
    if outside(host): open(sys.argv[1], 'a').write(f'{host}\\n')
def getaddrinfo(host, *a, **k): note(host); return real(host, *a, **k)
def connected(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6): note(address[0])
    return connect(self, address)
socket.getaddrinfo, socket.socket.connect = getaddrinfo, connected
try: socket.getaddrinfo('noted.invalid', 80)
except OSError: pass
from gk_mvlp.cli import main
sys.exit(main(sys.argv[2:]))
'''


def png(path, x):
    Image.fromarray(x).save(path)
    return path


@pytest.fixture(scope='module')
def predictor():
    torch.manual_seed(1)
    config = ModelConfig(dim=32, image_depth=1, text_depth=1, encoder_depth=1, decoder_depth=1, vocab_size=500, max_length=24)
    tokenizer = train_tokenizer(prompt_book()[0] + [make_study(PHANTOM, i).report for i in range(5)], 500)
    return Predictor(GKMVLP(config, tokenizer), RegionDetector(DetectorConfig(score_threshold=0.)),
                     {'name': 'untrained <one>', 'preset': '', 'stuck': ['itc']})


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


@pytest.fixture(scope='module')
def server(predictor, tmp_path_factory):
    "(address, file of the hosts outside that were wanted) of a running page."
    d, port = tmp_path_factory.mktemp('demo'), free_port()
    predictor.save_pretrained(d/'model')
    (d/'pictures').mkdir(); png(d/'pictures'/'mine & yours.png', make_study(PHANTOM, 5).image)
    env = os.environ | {'GRADIO_TEMP_DIR': str(d/'uploads'), 'HF_HOME': str(d/'hub')}
    with open(d/'log', 'w') as log:
        p = subprocess.Popen([sys.executable, '-c', GUARD, str(d/'outside'), 'demo', '--model', str(d/'model'), '--port', str(port),
                              '--pictures', str(d/'pictures')], stdout=log, stderr=subprocess.STDOUT, env=env)
    try:
        for _ in range(600):
            if 'open http' in (d/'log').read_text() or p.poll() is not None: break
            time.sleep(.2)
        assert 'open http' in (d/'log').read_text() and 'not for clinical use' in (d/'log').read_text(), (d/'log').read_text()
        yield f'http://127.0.0.1:{port}', d/'outside'
        assert p.poll() is None, (d/'log').read_text()
    finally:
        p.terminate(); p.wait(20)


@pytest.fixture(scope='module')
def browser(chromium):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        yield b
        b.close()


def visit(browser, url, width=1280):
    "A page that has its first result, and the list of requests that left this machine (filled as they come)."
    page, outside = browser.new_page(viewport={'width': width, 'height': 844}), []
    page.on('request', lambda r: outside.append(r.url)
            if not r.url.startswith((url, url.replace('http', 'ws'), 'data:', 'blob:')) else None)
    page.on('pageerror', lambda e: outside.append(str(e)))
    page.goto(url)
    page.wait_for_selector('.gk-view[data-entity]', timeout=60_000)
    return page, outside


def upload(page, path, wait):
    page.locator('#upload input[type=file]').set_input_files(path)
    page.wait_for_selector(wait, timeout=60_000)


def test_light_compares_regions(predictor):
    p = predictor(make_study(PHANTOM, 3).image, 'all')
    x = demo.light(p)
    for name in ENTITY_NAMES:
        a = p.attention[name]
        for r in a.index: assert np.isclose(x.loc[r, name], (a[r] - a.min()) / (a.max() - a.min()), atol=1e-5)
        assert x[name].idxmax() == p.entities.loc[name, 'region'] and p.entities.loc[name, 'region'] in demo.spread(p)[name]


def test_rank_counts_lower_scores(predictor):
    p = predictor(make_study(PHANTOM, 3).image, 'all')
    reference = demo.reference_scores(predictor, 7, 96)
    assert reference.shape == (7, len(ENTITY_NAMES))
    one = predictor(make_study(PhantomConfig(n=7, size=96, seed=demo.SEED + 1), 2).image).entities['score']
    assert np.allclose(reference.iloc[2], one[list(ENTITY_NAMES)], atol=1e-4), 'the scores that the predictor gives'
    rows = re.findall(r'<tr data-entity="([^"]+)".*?<span>(\d+)</span>', demo.scores_html(p, reference))
    assert {n for n, _ in rows} == set(ENTITY_NAMES) and [int(k) for _, k in rows] == sorted((int(k) for _, k in rows), reverse=True)
    for n, k in rows: assert int(k) == round(100 * sum(reference[n] < p.entities.loc[n, 'score']) / 7)


def test_boxes_and_cells_are_the_prediction(predictor):
    p, study = predictor(make_study(PHANTOM, 3).image, 'predicted'), make_study(PHANTOM, 3)
    svg = demo.picture_html(p, study)
    rects = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" class="gk-box" data-region="([^"]+)"', svg)
    for *box, r in rects:
        x, y, w, h = map(float, box)
        assert np.allclose([x, y, x + w, y + h], p.regions.loc[r, ['x1', 'y1', 'x2', 'y2']].astype(float) * 96, atol=.11)
    assert len(rects) == p.regions['found'].sum() and svg.count('gk-truth"') == len(study.findings)
    cells = re.findall(r'title="([^",]+), ([^":]+): lift ([\d.]+)"', demo.heat_map_html(p))
    assert len(cells) == p.attention.size
    for r, n, v in cells:
        assert np.isclose(float(v), p.attention.loc[r, '(null)' if n == 'no knowledge' else n] * p.attention.shape[1], atol=.006)


def test_nothing_given_runs_as_markup(predictor):
    evil = '<img src=x onerror=alert(1)>'
    page = demo.Page(predictor, [])
    html, seen = page.show(make_study(PHANTOM, 3).image, 'all', evil)
    assert (evil not in html and evil not in demo.report_html(evil) and evil not in demo.error_html(evil)
            and evil not in page.ask(seen, f'Is there {evil}?'))
    assert 'untrained &lt;one&gt;' in html and 'did not learn ITC' in html


def test_messages_instead_of_results(predictor, tmp_path):
    page = demo.Page(predictor, demo.samples(64))
    for html, seen in (page.upload(None, 'all'), page.again(None, 'all'), page.show(tmp_path/'none.png', 'all', 'none.png')):
        assert 'That did not work' in html and seen is None and str(tmp_path) not in html
    assert 'no picture' in page.ask(None, 'Is there a mass?') and 'Write a question' in page.ask(page.pick(0, 'all')[1], '  ')
    assert 'none</b>' in page.again(page.pick(1, 'all')[1], 'none')[0]
    with pytest.raises(GKError, match='no such folder'): demo.samples(64, tmp_path/'none')
    with pytest.raises(GKError, match='no picture in it'): demo.samples(64, tmp_path)


def test_no_region_found(predictor):
    strict = Predictor(predictor.model, RegionDetector(DetectorConfig(score_threshold=.999)))
    html, seen = demo.Page(strict, []).show(make_study(PHANTOM, 3).image, 'all', 'x')
    assert 'No region was found' in html and not seen.prediction.regions['found'].any()


def test_command_refuses(capsys, server):
    assert main(['demo', '--port', '70000']) == 1 and 'port 70000' in capsys.readouterr().err
    assert main(['demo', '--pictures', 'no/such/folder']) == 1 and 'no such folder' in capsys.readouterr().err


def test_a_visit(server, browser, predictor, tmp_path):
    "Upload, read the result, choose findings, change prompts, ask; with a picture of the page at each step."
    url, _ = server
    page, outside = visit(browser, url)
    assert page.locator('.gk-notice').inner_text().startswith('Research only, not for clinical use')
    picture = png(tmp_path/'my x-ray.png', make_study(PHANTOM, 7).image)
    upload(page, picture, '.gk-view small:has-text("my x-ray.png")')
    p = predictor(picture, 'all')
    assert page.locator('.gk-box').count() == p.regions['found'].sum() and page.locator('.gk-scores tbody tr').count() == len(ENTITY_NAMES)
    assert page.locator('.gk-report').first.inner_text().split() == p.report.split()
    lit, before = demo.light(p), page.screenshot()
    for name in ('pleural effusion', 'mass'):
        page.locator(f'.gk-scores button[data-entity="{name}"]').click()
        shown = page.evaluate('Object.fromEntries([...document.querySelectorAll(".gk-box")].map(b => [b.dataset.region, '
                              '+b.style.getPropertyValue("--l")]))')
        for r in lit.index: assert np.isclose(shown[r], lit.loc[r, name], atol=6e-4), (name, r)
        assert (set(page.evaluate('[...document.querySelectorAll(".gk-box.gk-strong")].map(b => b.dataset.region)'))
                == set(lit[name].nlargest(3).index))
        assert (page.locator('.gk-said').inner_text().startswith(f'{name}: strongest in {lit[name].idxmax()}')
                and page.locator('.gk-heat td.gk-on').count() == len(lit))
    after = page.screenshot(path=tmp_path/'chosen.png')
    assert after != before
    page.locator('.gk-heat td[data-entity="nodule"][data-region="trachea"]').click()
    assert (page.locator('.gk-said').inner_text().startswith('trachea, nodule: lift')
            and page.locator('.gk-box.gk-chosen').get_attribute('data-region') == 'trachea')
    page.locator('.gk-all').click()
    assert page.locator('.gk-lit').count() == 0
    page.locator('#mode label', has_text='predicted').click()
    page.wait_for_selector('.gk-foot:has-text("prompts predicted")')
    assert (page.locator('.gk-heat thead button').count() == predictor.model.config.top_k
            and page.locator('.gk-scores button:disabled').count() == len(ENTITY_NAMES) - predictor.model.config.top_k)
    page.locator('#mode label', has_text='none').click()
    page.wait_for_selector('.gk-empty:has-text("only the null prompt")')
    page.locator('#question textarea').fill('Is there a pneumothorax?'); page.locator('#ask').click()
    page.wait_for_selector('.gk-answer')
    assert page.locator('.gk-answer b').inner_text() == predictor.ask(p, 'Is there a pneumothorax?').text
    page.locator('#question textarea').fill('How old is the moon?'); page.locator('#ask').click()
    page.wait_for_selector('#answer .gk-error:has-text("not understood")')
    page.locator('#samples button').nth(2).click()
    page.wait_for_selector('.gk-view small:has-text("phantom, cardiomegaly")')
    assert 'True report' in page.content() and page.locator('#answer .gk-error').count() == 0
    page.locator('#samples button').last.click()
    page.wait_for_selector('.gk-view small:has-text("mine & yours.png")')
    assert not outside
    page.close()


def test_phone(server, browser):
    page, outside = visit(browser, server[0], 390)
    assert page.evaluate('document.documentElement.scrollWidth - innerWidth') <= 0, 'nothing is wider than the screen'
    box = lambda s: page.locator(s).first.bounding_box()
    assert box('#result')['y'] > box('#upload')['y'] + box('#upload')['height'] and box('.gk-picture svg')['width'] > 300
    assert not outside
    page.close()


BAD = {'notes.txt': 'not a JPEG, PNG', 'dot.png': 'too small', 'photo.jpg': 'in colour', 'cut.png': 'broken',
       'huge.png': 'maximum allowed size'}


def test_bad_uploads(server, browser, tmp_path):
    "A clear message that names the file each time, and the page works on."
    (tmp_path/'notes.txt').write_text('The heart is enlarged.')
    (tmp_path/'huge.png').write_bytes(os.urandom(1 << 20) * 50)
    png(tmp_path/'dot.png', np.zeros((1, 1), np.uint8))
    png(tmp_path/'photo.jpg', np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8).repeat(20, 0).repeat(20, 1))
    (tmp_path/'cut.png').write_bytes(png(tmp_path/'whole.png', make_study(PHANTOM, 3).image).read_bytes()[:3000])
    page, outside = visit(browser, server[0])
    for name, words in BAD.items():
        if name == 'huge.png':                               # the page says so before anything is sent
            upload(page, tmp_path/name, f'text=/{words}/i')
            assert page.locator('.gk-view').count() == 1
            continue
        upload(page, tmp_path/name, f'#result .gk-error p:has-text("{name}")')
        said = page.locator('#result .gk-error p').inner_text()
        assert words in said and 'uploads' not in said, said
        page.locator('#samples button').first.click()
        page.wait_for_selector('.gk-view small:has-text("phantom, normal")')
    assert not outside
    page.close()


def test_the_server_refuses_a_large_file_by_itself(server, tmp_path):
    "One who does not use the page is stopped, too, and the page is still served."
    import httpx
    r = httpx.post(f'{server[0]}/gradio_api/upload', files={'files': ('huge.png', os.urandom(1 << 20) * 50)}, timeout=60)
    assert r.status_code == 413 and httpx.get(server[0]).status_code == 200


def test_twenty_at_once(server, predictor, tmp_path):
    "Each of 20 concurrent requests gets the answer to its own picture."
    from gradio_client import Client, handle_file
    files = [png(tmp_path/f'{i}.png', make_study(PHANTOM, i).image) for i in range(4)]
    page = demo.Page(predictor, [])
    scores = lambda html: re.findall(r'gk-num">([\d.]+)<', html)
    with ThreadPoolExecutor(20) as pool:
        clients = list(pool.map(lambda _: Client(server[0], verbose=False, analytics_enabled=False), range(20)))
        got = list(pool.map(lambda k: clients[k].predict(handle_file(str(files[k % 4])), 'all', api_name='/upload'), range(20)))
    want = [page.show(f, 'all', f.name)[1].prediction for f in files]
    assert len(got) == 20 and len({w.report for w in want} | {str(w.entities['score'].round(3).tolist()) for w in want}) > 4
    for k, answer in enumerate(got):
        html, w = answer[0] if isinstance(answer, tuple) else answer, want[k % 4]
        assert (f'>{k % 4}.png<' in html and demo.report_html(w.report) in html and demo.picture_html(w).split('<figcaption')[0] in html
                and scores(html))


def test_the_server_asked_no_other_machine(server):
    "After all of the above; the guard's own look-up shows that it notes."
    assert server[1].read_text().split() == ['noted.invalid']
