"""Every benchmark in turn, each in a process of its own; then the table of all results.

`python benchmarks/all.py [NAME ...]` runs all or the named ones, `--table` only writes the table (benchmarks/README.md). A benchmark
that fails does not stop the others; the exit status is then 1.
"""
import ast
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NAMES = sorted(p.stem for p in HERE.glob('*.py') if p.stem not in ('all', 'common'))
MACHINE = ('cpu', 'cpus', 'threads', 'torch', 'python', 'gpu')


def about(name: str) -> str:
    "The first sentence of a benchmark's docstring."
    text = ast.get_docstring(ast.parse((HERE/f'{name}.py').read_text(encoding='utf-8')))
    return ' '.join(text.split('\n\n')[0].split()).split('. ')[0].rstrip('.') + '.'


def table() -> str:
    "All results as Markdown, a section per benchmark."
    out = ['# Speed', '',
           'Written by `make bench` from `benchmarks/results/*.json`. Ratios compare ways that ran in turn on one machine; they carry over '
           'to other machines better than rates do.', '']
    for path in sorted((HERE/'results').glob('*.json')):
        r = json.loads(path.read_text(encoding='utf-8'))
        out += [f'## {path.stem}', '', about(path.stem), '',
                f'On {r["gpu"] + ", " if "gpu" in r else ""}{r["cpu"]}, {r["cpus"]} cores, {r["threads"]} thread(s), torch {r["torch"]}, '
                f'Python {r["python"]}.', '',
                '| figure | value |', '|:--|--:|']
        out += [f'| {k} | {v:,.3g} |' if isinstance(v, float) and abs(v) < 1000 else f'| {k} | {v:,.0f} |'
                if isinstance(v, (int, float)) else f'| {k} | {v} |' for k, v in r.items() if k not in MACHINE]
        out.append('')
    return '\n'.join(out)


def main(argv: list[str]) -> int:
    names = [a for a in argv if a != '--table']
    if unknown := [n for n in names if n not in NAMES]:
        print(f'error: no benchmark {unknown[0]!r}. Use some of: {", ".join(NAMES)}', file=sys.stderr)
        return 1
    failed = []
    for name in [] if '--table' in argv else names or NAMES:
        print(f'== {name}: {about(name)}', flush=True)
        if subprocess.run([sys.executable, str(HERE/f'{name}.py')]).returncode: failed.append(name)
    (HERE/'README.md').write_text(table(), encoding='utf-8')
    if failed: print(f'error: failed: {", ".join(failed)}; their results are those of an earlier run, if any', file=sys.stderr)
    return int(bool(failed))


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
