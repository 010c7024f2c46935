"""The guides in the repository, and the site: built once, every page and public name is there, every link leads somewhere, nothing is
fetched from elsewhere."""
import importlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from gk_mvlp.data.phantom import PhantomConfig


GUIDES = ('README.md', 'CONTRIBUTING.md', 'benchmarks/README.md',
          *sorted(f'docs/{p.name}' for p in (Path(__file__).resolve().parents[1]/'docs').glob('*.md')))


def headings(text: str) -> set[str]:
    "Anchors of a Markdown file as a repository's pages make them: small letters, spaces to hyphens, no other signs."
    return {re.sub(r'[^\w\- ]', '', h.lower()).strip().replace(' ', '-') for h in re.findall(r'^#+ (.+)$', text, re.MULTILINE)}


@pytest.mark.parametrize('name', GUIDES)
def test_links_of_the_guides_lead_somewhere_in_the_repository(root, name):
    path = root/name
    text = re.sub(r'^```.*?^```', '', path.read_text(encoding='utf-8'), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r'\]\(([^)\s]+)\)', text):
        url = urlsplit(link)
        if url.scheme: continue
        target = (path.parent/unquote(url.path)).resolve() if url.path else path
        assert target.exists() and target.is_relative_to(root), f'{name}: {link}'
        if url.fragment: assert url.fragment in headings(target.read_text(encoding='utf-8')), f'{name}: {link} (no such heading)'


@pytest.mark.parametrize('name', GUIDES)
def test_commands_are_those_that_make_install_makes(root, name):
    text = (root/name).read_text(encoding='utf-8')
    shell = '\n'.join([*re.findall(r'^```sh\n(.*?)^```', text, re.MULTILINE | re.DOTALL), *re.findall(r'`([^`\n]+)`', text)])
    assert not (bare := re.findall(r'^\s*((?:gk-mvlp|pytest|nbdev_\w+) .*)', shell, re.MULTILINE)), f'{name}: .venv/bin/ is missing: {bare}'
    targets = set(re.findall(r'^(\w+):', (root/'Makefile').read_text(encoding='utf-8'), re.MULTILINE))
    assert set(re.findall(r'^\s*make (\w+)', shell, re.MULTILINE)) <= targets, name
    for nb in re.findall(r'nbs/experiments/\w+\.ipynb', shell):
        assert (root/nb).is_file() or name == 'docs/add_a_task.md' and '79_triage' in nb, f'{name}: {nb}'


def test_add_a_task_names_what_is_there(root):
    for path, row in re.findall(r'^\| \d \| \[\w+\]\(\.\./(\S+?)\) \| (.*) \|$', (root/'docs/add_a_task.md').read_text(encoding='utf-8'),
                                re.MULTILINE):
        code = ''.join(''.join(c['source']) for c in json.loads((root/path).read_text(encoding='utf-8'))['cells']
                       if c['cell_type'] == 'code')
        names = [n for n in re.findall(r'`(\w+)`', row) if n.isupper() or n in ('task_values', 'run_metrics')]
        assert names and all(re.search(rf'^(def )?{n}\b', code, re.MULTILINE) for n in names), (path, names)


def test_readme_says_how_visible_findings_are(root):
    text = ' '.join((root/'README.md').read_text(encoding='utf-8').split())
    for preset in ('full', 'mini'):
        d = yaml.safe_load((root/f'presets/{preset}.yaml').read_text(encoding='utf-8'))['data']
        assert f'contrast: {d["contrast"]}, normal: {d["normal"]}' in text, preset
    assert f'defaults are {PhantomConfig().contrast} and {PhantomConfig().normal}' in text


class Page(HTMLParser):
    "What a page links to, loads, names and says (outside of script and style)."
    def __init__(self, path):
        super().__init__()
        self.links, self.loads, self.ids, self.text, self._skip = [], [], set(), [], 0
        self.feed(path.read_text(encoding='utf-8'))

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.append(a['href'])
        if tag in ('script', 'img', 'iframe', 'source', 'embed') and a.get('src'): self.loads.append(a['src'])
        if tag == 'link' and a.get('href') and a.get('rel') not in ('canonical', 'next', 'prev'): self.loads.append(a['href'])
        self._skip += tag in ('script', 'style')

    def handle_endtag(self, tag): self._skip -= tag in ('script', 'style')

    def handle_data(self, data):
        if not self._skip: self.text.append(data)


@pytest.fixture(scope='module')
def site(root, tmp_path_factory):
    out = tmp_path_factory.mktemp('docs')
    r = subprocess.run([sys.executable, str(root/'scripts/build_docs.py'), '--out', str(out/'site'), '--pages', str(out/'pages')],
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return out/'site'


@pytest.fixture(scope='module')
def pages(site): return {p: Page(p) for p in site.rglob('*.html')}


def test_every_notebook_has_a_page(root, site):
    for nb in (root/'nbs').rglob('*.ipynb'): assert (site/nb.relative_to(root/'nbs').with_suffix('.html')).is_file(), nb
    assert {f'{Path(g).stem}.html' for g in GUIDES if g.startswith('docs/')} <= {p.name for p in site.glob('*.html')}


def test_every_public_name_is_in_the_reference(root, pages, site):
    n = 0
    for source in (root/'gk_mvlp').rglob('*.py'):
        if source.name.startswith('_') or 'AUTOGENERATED' not in source.read_text(encoding='utf-8'): continue
        name = '.'.join(source.relative_to(root).with_suffix('').parts)
        text = ' '.join(pages[site/'api'/f'{name.removeprefix("gk_mvlp.")}.html'].text)
        for symbol in importlib.import_module(name).__all__: assert symbol in text, f'{name}.{symbol}'; n += 1
    assert n > 200


def test_links_lead_somewhere(pages):
    "Files and anchors inside the site; addresses outside are only looked at."
    broken, outside = [], set()
    for path, page in pages.items():
        for link in page.links + page.loads:
            url = urlsplit(link)
            if url.scheme in ('http', 'https', 'mailto'): outside.add(link); continue
            if url.scheme == 'data': continue
            target = (path.parent/unquote(url.path)).resolve() if url.path else path.resolve()
            if target.is_dir(): target = target/'index.html'
            if not target.is_file(): broken.append(f'{path.name}: {link}')
            elif url.fragment and target in pages and unquote(url.fragment) not in pages[target].ids | {'__top'}:
                broken.append(f'{path.name}: {link} (no such anchor)')
    assert not broken, broken[:10]
    assert outside, 'the paper, at least'


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert not [x for x in page.loads if urlsplit(x).scheme in ('http', 'https') or x.startswith('//')], path
    for css in site.rglob('*.css'): assert not re.search(r'url\(\s*["\']?(?:https?:)?//', css.read_text(encoding='utf-8')), css


def test_no_directive_formula_source_or_machine_path_is_shown(pages):
    for path, page in pages.items():
        text = ' '.join(page.text)
        assert not re.search(r'#\| ?(export|eval|default_exp|hide)', text), path
        assert '\\mathrm' not in text and '\\frac' not in text, path
        assert not re.search(r'(?<![\w.])/(?:root|work|opt|tmp)/\w', text), path
    assert sum('<math' in p.read_text(encoding='utf-8') for p in pages) > 8


def test_published_numbers_are_shown(root, pages, site):
    text = ' '.join(pages[site/'results/published.html'].text)
    rows = (root/'paper_results/published/classification.csv').read_text(encoding='utf-8').splitlines()[1:]
    assert rows and all(r.split(',')[0] in text for r in rows)


def test_blocks_of_the_guides_are_filled_in(pages, site):
    front, scaling = (' '.join(pages[site/f'{name}.html'].text) for name in ('index', 'scaling'))
    assert 'GFLOPs per sample' in scaling and 'benchmarks/README.md' not in scaling
    assert 'claim' in front and 'study by study' not in front


def test_in_a_browser(site, chromium):
    "In Chromium, at desktop and phone width: no request leaves the disk, nothing is wider than the screen, formulas are drawn."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        for width in (1280, 390):
            page, asked, errors = browser.new_page(viewport={'width': width, 'height': 844}), [], []
            page.on('request', lambda r: asked.append(r.url)); page.on('pageerror', lambda e: errors.append(str(e)))
            for name in ('index.html', 'models/22_gk_module.html', 'api/models.gk_mvlp.html', 'tutorials/03_first_prediction.html',
                         'results/published.html'):
                page.goto((site/name).as_uri())
                assert page.evaluate('document.documentElement.scrollWidth - innerWidth') <= 0, f'{name} is wider than {width} pixels'
                assert page.locator('h1').first.is_visible()
                sizes = page.evaluate('[...document.querySelectorAll("article img")].map(i => i.naturalWidth)')
                assert all(sizes), f'{name}: a picture is missing'
            page.goto((site/'models/22_gk_module.html').as_uri())
            assert max(page.evaluate('[...document.querySelectorAll("math")].map(m => m.getBoundingClientRect().height)')) > 20, (
                'formulas are drawn')
            assert not [u for u in asked if not u.startswith(('file:', 'data:'))] and not errors
        browser.close()
