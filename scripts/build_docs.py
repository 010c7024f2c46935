"Build the documentation site, offline, from the notebooks, docs/ and paper_results/: `build_docs.py [--out _docs]`."
import argparse
import importlib
import inspect
import json
import os
import re
import shutil
import sys
from dataclasses import is_dataclass
from pathlib import Path

os.environ['NO_MKDOCS_2_WARNING'] = '1'
import nbformat
import pandas as pd
from fastcore.docments import docments
from mkdocs.commands.build import build
from mkdocs.config import load_config
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import Preprocessor

from gk_mvlp.study.report_parts import section

ROOT = Path(__file__).resolve().parents[1]
NBS, PRESETS = ROOT/'nbs', ('full', 'mini', 'sweeps', 'public')
SECTIONS = {'tutorials': 'Tutorial', '': 'Foundations', 'data': 'Data', 'models': 'Model', 'training': 'Training', 'tasks': 'Tasks',
            'evaluation': 'Evaluation', 'study': 'Study engine', 'apps': 'Using a model',
            'experiments': 'Experiments', 'paper': 'Tables and figures'}
CSS = '''.formula { overflow-x: auto; overflow-y: hidden; padding: .4em 0; } .md-typeset table:not([class]) { font-size: .62rem; } .md-typeset .jp { overflow-x: auto; } .md-typeset img { background: #fff; }
.md-typeset pre > code { font-size: .62rem; } .md-typeset math { font-size: 1.05em; }
.md-typeset .api h3 code { word-break: break-word; }
'''


class Readable(Preprocessor):
    "Drops nbdev's directives and cells that hold nothing else; says which cells are parameters."
    def preprocess(self, nb, resources):
        cells = []
        for c in nb.cells:
            if c.cell_type == 'code':
                c.source = '\n'.join(x for x in c.source.split('\n') if not x.startswith('#|')).strip('\n')
                if not c.source: continue
                if 'parameters' in c.metadata.get('tags', []): cells.append(nbformat.v4.new_markdown_cell('*Parameters of the run:*'))
            cells.append(c)
        nb.cells, nb.metadata['language_info'] = cells, {'name': 'python'}
        return nb, resources


def notebooks() -> list[Path]:
    return sorted(NBS.rglob('*.ipynb'), key=lambda p: (list(SECTIONS).index(p.parent.relative_to(NBS).as_posix().replace('.', '')), p.name))
def page_of(nb: Path) -> str: return nb.relative_to(NBS).with_suffix('.md').as_posix()
def title_of(nb: Path) -> str:
    return next(''.join(c['source']) for c in json.loads(nb.read_text(encoding='utf-8'))['cells']
                if c['cell_type'] == 'markdown').split('\n')[0].lstrip('# ').strip()


def write_notebook(nb: Path, out: Path) -> None:
    "One notebook as a page with its pictures beside it."
    exporter = MarkdownExporter(preprocessors=[Readable])
    body, resources = exporter.from_filename(str(nb), resources={'unique_key': nb.stem, 'output_files_dir': f'{nb.stem}_files'})
    body = re.sub(r'<style scoped>.*?</style>\s*', '', body, flags=re.DOTALL)            # pandas' own table style; the theme has one
    body = re.sub(r'<table border="1" class="dataframe">', '<table>', body)
    page = out/page_of(nb)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(body, encoding='utf-8')
    for name, data in resources.get('outputs', {}).items():
        f = page.parent/name
        f.parent.mkdir(parents=True, exist_ok=True); f.write_bytes(data)


def _name(annotation) -> str:
    return ('' if annotation is inspect.Parameter.empty
            else inspect.formatannotation(annotation).replace('gk_mvlp.', '').replace('typing.', ''))


def _parameters(obj) -> list[str]:
    "Table of the parameters or fields that have a comment."
    try: found = docments(obj, full=True)
    except (TypeError, ValueError, OSError, SyntaxError): return []
    rows = [(k, v) for k, v in found.items() if v.get('docment') and k not in ('self', 'return')]
    cell = lambda x: str(x).replace('|', '\\|').replace('\n', ' ')
    out = [f'| `{k}` | {"`" + cell(_name(v["anno"])) + "`" if _name(v["anno"]) else ""} | {cell(v["docment"])} |' for k, v in rows]
    if (r := found.get('return')) and r.get('docment'): out.append(f'| *returns* | `{cell(_name(r["anno"]))}` | {cell(r["docment"])} |')
    return ['', '| name | type | meaning |', '|---|---|---|', *out] if out else []


def _entry(name: str, obj, level: int) -> list[str]:
    "Heading, signature, docstring and parameters of one name; of a class, its public methods too."
    try: signature = str(inspect.signature(obj))
    except (TypeError, ValueError): signature = '(...)'
    signature = re.sub(r"'?gk_mvlp\.[\w.]*\.(\w+)'?", r'\1', signature).replace('"', '')
    text = inspect.getdoc(obj) or ''
    if is_dataclass(obj) and text.startswith(f'{obj.__name__}('): text = ''
    out = ['', f'{"#" * level} `{name}`', '', '```python', f'{name.split(".")[-1]}{signature}' if len(signature) < 4000 else f'{name}(...)',
           '```', '', text, *_parameters(obj)]
    if inspect.isclass(obj):
        for k, v in vars(obj).items():
            f = v.__func__ if isinstance(v, classmethod | staticmethod) else v.fget if isinstance(v, property) else v
            if not k.startswith('_') and inspect.isfunction(f) and f.__module__.startswith('gk_mvlp') and inspect.getdoc(f):
                out += _entry(f'{name}.{k}', f, level + 1)
    return out


def _short(value) -> str:
    "The value in at most 90 characters of one table cell."
    text = ' '.join(repr(value).split()).replace('|', '\\|').replace('`', "'")
    return text if len(text) <= 90 else text[:87] + '...'


def write_api(out: Path) -> list[dict]:
    "A page per module with every public name; the nav."
    nav: dict[str, list] = {}
    for nb in notebooks():
        code = ''.join(''.join(c['source']) + '\n' for c in json.loads(nb.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code')
        if not (m := re.search(r'^#\| *default_exp +(\S+)', code, re.MULTILINE)): continue
        name = f'gk_mvlp.{m[1]}'
        module, page = importlib.import_module(name), out/'api'/f'{m[1]}.md'
        lines = [f'# `{name}`', '', (module.__doc__ or '').strip(), '', f'Explained in [{title_of(nb)}](../{page_of(nb)}).']
        public = {k: getattr(module, k) for k in module.__all__}
        constants = {k: v for k, v in public.items() if not (inspect.isclass(v) or inspect.isroutine(v))}
        for k, v in public.items():
            if k not in constants: lines += _entry(k, v, 2)
        if constants:
            lines += ['', '## Constants', '', '| name | type | value |', '|---|---|---|',
                      *(f'| `{k}` | {type(v).__name__} | `{_short(v)}` |' for k, v in constants.items())]
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text('\n'.join(lines) + '\n', encoding='utf-8')
        nav.setdefault(SECTIONS[nb.parent.relative_to(NBS).as_posix().replace('.', '')], []).append({m[1]: f'api/{m[1]}.md'})
    return [{k: v} for k, v in nav.items()]


def write_results(out: Path) -> tuple[list[dict], str]:
    "A page per study that has tables; the nav, and the figures for the landing page."
    nav, front = [], ''
    for preset in [p for p in PRESETS if (ROOT/'paper_results'/p/'tables').is_dir()]:
        source, lines = ROOT/'paper_results'/preset, [f'# Results of study `{preset}`', '']
        (out/'results').mkdir(parents=True, exist_ok=True)
        if (source/'OUTDATED.md').is_file():
            lines += ['!!! warning', '', '    ' + ' '.join((source/'OUTDATED.md').read_text(encoding='utf-8').split()), '']
        if (source/'manifest.json').is_file():
            runs = json.loads((source/'manifest.json').read_text(encoding='utf-8'))['runs']
            lines += [f'{len(runs)} runs, {sum(r["seconds"] or 0 for r in runs.values()) / 60:.0f} minutes of run time together. Every '
                      f'file below is tied to its runs by `paper_results/{preset}/manifest.json`.', '']
        report = (source/'REPORT.md').read_text(encoding='utf-8') if (source/'REPORT.md').is_file() else ''
        if report: lines += [re.sub(r'^# .*\n', '', report).replace('](figures/', f']({preset}-').strip(), '']
        pictures = []
        for f in sorted((source/'figures').glob('*.png')):
            name = f'{preset}-{f.name}'
            shutil.copyfile(f, out/'results'/name)
            pictures.append((f.stem.replace('_', ' '), name))
        for t in sorted((source/'tables').glob('*.csv')):
            lines += [f'## {t.stem.replace("_", " ").capitalize()}', '', '<div class="jp" markdown>', '']
            text = t.with_suffix('.md')
            lines += [re.sub(r'^#+ ', '### ', text.read_text(encoding='utf-8'), flags=re.MULTILINE)
                      if text.is_file() else pd.read_csv(t).to_markdown(index=False, floatfmt='.3f'), '', '</div>', '']
        shown = {f'{preset}-{f}' for f in re.findall(r'\]\(figures/(\S+?)\)', report)}
        for what, name in [x for x in pictures if x[1] not in shown]: lines += [f'## Figure: {what}', '', f'![{what}]({name})', '']
        (out/'results'/f'{preset}.md').write_text('\n'.join(lines), encoding='utf-8')
        nav.append({f'Study {preset}': f'results/{preset}.md'})
        if not front and pictures:
            short = [section(report, 'Did the models learn?').splitlines()[-1], '', section(report, 'In short'), ''] if report else []
            front = '\n'.join([f'From [study {preset}](results/{preset}.md):', '', *short,
                               *(f'![{w}](results/{n})' for w, n in pictures if w in ('low data', 'grounding', 'regions'))])
    published = pd.read_csv(ROOT/'paper_results'/'published'/'classification.csv')
    (out/'results').mkdir(exist_ok=True)
    (out/'results'/'published.md').write_text('# Published numbers\n\nFrom the literature, with source and protocol; not comparable with '
                                              'runs on other data or under another protocol.\n\n<div class="jp" markdown>\n\n'
                                              + published.astype(object).fillna('').to_markdown(index=False) + '\n\n</div>\n',
                                              encoding='utf-8')
    return ([*nav, {'Published numbers': 'results/published.md'}],
            front or 'No study of this version has been run to its end and committed, so there is no result to show yet: `make paper` '
                     'makes them.')


def costs_table() -> str:
    "Parameters and FLOPs of the paper-size model by part, as `benchmarks/costs.py` counted them."
    d = json.loads((ROOT/'benchmarks'/'results'/'costs.json').read_text(encoding='utf-8'))
    rows = [(k.removeprefix('parameters_m_').replace('_', ' '), v, d.get(k.replace('parameters_m_', 'forward_gflops_')))
            for k, v in d.items() if k.startswith('parameters_m_')]
    rows += [('elsewhere (heads, attention between modules)', None, d['forward_gflops_elsewhere']),
             ('**all**', d['parameters_m'], d['forward_gflops']), ('**a training step, per sample (F)**', None, d['step_gflops'])]
    table = pd.DataFrame([(name, *('' if x is None else f'{x:.1f}' for x in xs)) for name, *xs in rows],
                         columns=['part', 'parameters (M)', 'GFLOPs per sample']).to_markdown(index=False, disable_numparse=True)
    return (f'{table}\n\nWeights {d["weights_gb"]:.1f} GB; gradients and moments of the {d["trained_parameters_m"]:.0f} M trained ones '
            f'{d["gradients_and_moments_gb"]:.1f} GB. '
            f'At an MFU of 45 % a card of 989 TFLOP/s (H100, bf16) would see {.45 * 989e3 / d["step_gflops"]:.0f} images a second.')


def between(text: str, name: str, new: str) -> str:
    "`text` with what stands between the markers of a block replaced: in the repository a link stands there."
    start, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
    return text[:text.index(start)] + new + text[text.index(end) + len(end):]


def site_links(text: str) -> str:
    "Links of docs/*.md into the repository, turned to the pages of the site; of a file without a page only the words are left."
    def page(m: re.Match) -> str:
        path = m['path']
        if path.startswith('nbs/'): to = path.removeprefix('nbs/').replace('.ipynb', '.md')
        elif path.startswith('gk_mvlp/'): to = f'api/{path.removeprefix("gk_mvlp/").removesuffix(".py").replace("/", ".")}.md'
        elif path.startswith('paper_results/'): to = f'results/{path.split("/")[1]}.md'
        else: return m['words']
        return f'[{m["words"]}]({to}{m["anchor"] or ""})'
    return re.sub(r'\[(?P<words>[^\]]+)\]\(\.\./(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]+)?\)', page, text)


def write_pages(out: Path) -> list[dict]:
    "All Markdown pages; the nav."
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT/'docs', out)
    (out/'style.css').write_text(CSS, encoding='utf-8')
    sections: dict[str, list] = {}
    for nb in notebooks():
        write_notebook(nb, out)
        sections.setdefault(SECTIONS[nb.parent.relative_to(NBS).as_posix().replace('.', '')], []).append({title_of(nb): page_of(nb)})
    api, (results, front) = write_api(out), write_results(out)
    blocks = {'index.md': ('results', front), 'scaling.md': ('costs', costs_table())}
    for source in sorted((ROOT/'docs').glob('*.md')):
        text = source.read_text(encoding='utf-8')
        if source.name in blocks: text = between(text, *blocks[source.name])
        (out/source.name).write_text(site_links(text), encoding='utf-8')
    guides = [{'Your own data': 'your_data.md'}, {'Add a task': 'add_a_task.md'}, {'Run on Slurm': 'slurm.md'},
              {'From one GPU to many': 'scaling.md'},
              {"The peers' code": 'peers.md'}]
    return [{'Start': 'index.md'}, {'Tutorial': sections.pop('Tutorial')}, {'Results': results},
            {'Method': [{k: v} for k, v in sections.items()]}, {'Guides': guides}, {'API': api}]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--out', default=str(ROOT/'_docs'), help='folder of the site')
    p.add_argument('--pages', default=str(ROOT/'_proc'/'docs'), help='folder of the Markdown pages in between')
    a = p.parse_args(argv)
    nav = write_pages(Path(a.pages))
    out = Path(a.out)
    build(load_config(str(ROOT/'mkdocs.yml'), docs_dir=a.pages, site_dir=a.out, nav=nav))
    (out/'404.html').unlink(missing_ok=True)                     # its links are those of a server's root
    for f in out.rglob('*.html'):  # the theme fetches a helper for its search when a page is opened from a disk
        f.write_text(f.read_text(encoding='utf-8').replace('https://unpkg.com/iframe-worker/shim', 'data:text/javascript,'),
                     encoding='utf-8')
    print(f'{out}/index.html: open it in a browser (its search needs a server: python -m http.server -d {out})')
    return 0


if __name__ == '__main__': sys.exit(main())
