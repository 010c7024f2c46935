"Write the generated part of README.md from paper_results/, so that no number in it is typed. `--check` only compares."
import json
import sys
from pathlib import Path

import pandas as pd

from gk_mvlp.study.report_parts import section

ROOT = Path(__file__).resolve().parents[1]
START, END = '<!-- results: written by scripts/update_readme.py -->', '<!-- end of results -->'
METHODS = ('constant', 'pixels', 'scratch', 'itc_itm_lm', 'itc_itm_lm_ecls', 'gk', 'gk-roi_pool', 'gk-null_prompts', 'gk-shuffled_prompts')


def study(folder: Path) -> list[str]:
    "Duration, table and comparisons of one preset."
    manifest = json.loads((folder/'manifest.json').read_text(encoding='utf-8'))
    table = pd.read_csv(folder/'tables/classification.csv')
    table = table[table['metric'] == 'auroc']
    seconds = [r['seconds'] for r in manifest['runs'].values()]
    hardware = next(iter(manifest['runs'].values()))['hardware']
    out = [f'### `{folder.name}`', '', f'{len(seconds)} runs, {sum(seconds) / 60:.0f} minutes of run time together on {hardware["cpus"]} cores'
           f'{" and " + hardware["gpu"] if hardware["gpu"] else ""} (two runs at a time).', '']
    t = table[(table['protocol'] == 'linear_probe') & table['method'].isin(METHODS)].copy()
    t['cell'] = [f'{m:.3f} ({a:.3f}-{b:.3f})' for m, a, b in zip(t['mean'], t['low'], t['high'])]
    t['column'] = [f'{d}, {r:g} %' for d, r in zip(t['dataset'], t['ratio'])]
    wide = t.pivot(index='method', columns='column', values='cell')[list(dict.fromkeys(t.sort_values(['dataset', 'ratio'])['column']))]
    n = '; '.join(f'{d}: {g["n"].iloc[0]} test studies of {g["n_patients"].iloc[0]} patients' for d, g in table.groupby('dataset'))
    out += [f'Linear probe, AUROC, mean and 95 % interval over patients and {int(table["seeds"].max())} seed(s). {n}.', '',
            wide.loc[[m for m in METHODS if m in wide.index]].to_markdown(), '']
    report = (folder/'REPORT.md').read_text(encoding='utf-8')
    out += [f'[Report]({folder.relative_to(ROOT)}/REPORT.md). ' + section(report, 'Did the models learn?').splitlines()[-1], '', section(report, 'In short'), '']
    detector = pd.read_csv(folder/'tables/detector.csv')
    for metric, what in (('region_iou', 'on held-out phantoms, mean IoU of the 29 regions'), ('lung_iou', 'on real X-rays, mean IoU of the lungs')):
        d = detector[detector['metric'] == metric].set_index('method')
        if len(d): out.append(f'Detector {what}: {d.loc["detector", "mean"]:.3f} ({d.loc["detector", "low"]:.3f}-{d.loc["detector", "high"]:.3f}), constant box {d.loc["constant", "mean"]:.3f}, n = {d.loc["detector", "n"]}.')
    return [*out, '']


def generated() -> str:
    "The text between the markers."
    folders = [ROOT/'paper_results'/p for p in ('mini', 'full', 'public') if (ROOT/'paper_results'/p/'manifest.json').is_file()]
    return '\n'.join([START, '', *[line for f in folders for line in study(f)], END])


def main() -> int:
    path = ROOT/'README.md'
    text = path.read_text(encoding='utf-8')
    before, rest = text.split(START, 1)
    new = before + generated() + rest.split(END, 1)[1]
    if '--check' in sys.argv:
        if new != text: print('error: README.md differs from paper_results. Run: make readme', file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding='utf-8')
    return 0


if __name__ == '__main__': sys.exit(main())
