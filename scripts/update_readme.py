"Write the generated parts of README.md from paper_results/, so that no number in them is typed. `--check` only compares."
import json
import re
import sys
from pathlib import Path

import pandas as pd

from gk_mvlp.study.collect import ORDER, SHORT_NAMES
from gk_mvlp.study.launch import time_estimate
from gk_mvlp.study.report_parts import section
from gk_mvlp.study.study_figures import BASELINE_OF
from gk_mvlp.study.task_tables import HEADLINE

ROOT = Path(__file__).resolve().parents[1]
METHODS = ('constant', 'pixels', 'scratch', 'itc_itm_lm', 'itc_itm_lm_ecls', 'gk', 'gk-roi_pool', 'gk-null_prompts', 'gk-shuffled_prompts')


DETECTOR = {'region_iou': 'on held-out phantoms, mean IoU of the 29 regions',
            'lung_iou': 'trained on phantoms alone, on real X-rays, mean IoU of the lungs'}


def detector_sentence(folder: Path, metric: str) -> str:
    "The detector beside the constant box in a metric of `DETECTOR`; '' where it was not measured."
    t = pd.read_csv(folder/'tables/detector.csv')
    d = t[t['metric'] == metric].set_index('method')
    if not len(d): return ''
    return (f'Detector {DETECTOR[metric]}: {d.loc["detector", "mean"]:.3f} '
            f'({d.loc["detector", "low"]:.3f}-{d.loc["detector", "high"]:.3f}), constant box {d.loc["constant", "mean"]:.3f}, n = '
            f'{d.loc["detector", "n"]}.')


TASKS = {'localization': 'localization', 'report_generation': 'reports', 'vqa': 'VQA'}
FINE_TUNED = ('finetune', 'classification')      # the second: an answer of VQA is chosen


def task_lines(folder: Path) -> list[str]:
    "Localization, reports and VQA with all labels beside each task's baseline; nothing where a preset has none of them."
    columns, seeds = {}, set()
    for task, baseline in BASELINE_OF.items():
        if not (f := folder/f'tables/{task}.csv').is_file(): continue
        t = pd.read_csv(f)
        t = t[(t['ratio'] == t['ratio'].max()) & (t['protocol'].isin(FINE_TUNED) | (t['method'] == baseline))]
        for metric in HEADLINE[task]:
            own = t[(t['metric'] == metric) & ~t['method'].str.contains('-')]
            seeds |= set(own.loc[own['method'] != baseline, 'seeds'])
            columns[f'{TASKS[task]}, {SHORT_NAMES.get(metric, metric)}'] = {'baseline'
                if r.method == baseline
                else r.method: f'{r.mean_:.3f} ({r.low:.3f}-{r.high:.3f})' + (f', {baseline}' if r.method == baseline else '')
                                      for r in own.rename(columns={'mean': 'mean_'}).itertuples()}
    if not columns: return []
    wide = pd.DataFrame(columns)
    order = [m for m in ('baseline', *ORDER) if m in wide.index]
    return [f'Fine-tuned with all labels, mean and 95 % interval over patients and {" or ".join(str(s) for s in sorted(seeds))} seed(s). '
            '`baseline`: what each task reaches without pre-training.', '', wide.loc[order].rename_axis('method').to_markdown(), '']


def study(folder: Path) -> list[str]:
    "Duration, table and comparisons of one preset."
    manifest = json.loads((folder/'manifest.json').read_text(encoding='utf-8'))
    table = pd.read_csv(folder/'tables/classification.csv')
    table = table[table['metric'] == 'auroc']
    seconds = [r['seconds'] for r in manifest['runs'].values()]
    hardware = next(iter(manifest['runs'].values()))['hardware']
    out = [f'### `{folder.name}`', '',
           f'{len(seconds)} runs, {sum(seconds) / 60:.0f} minutes of run time together on {hardware["cpus"]} cores'
           f'{" and " + hardware["gpu"] if hardware["gpu"] else ""} (two runs at a time).', '']
    t = table[(table['protocol'] == 'linear_probe') & table['method'].isin(METHODS)].copy()
    t['cell'] = [f'{m:.3f} ({a:.3f}-{b:.3f})' for m, a, b in zip(t['mean'], t['low'], t['high'])]
    t['column'] = [f'{d}, {r:g} %' for d, r in zip(t['dataset'], t['ratio'])]
    wide = t.pivot(index='method', columns='column', values='cell')[list(dict.fromkeys(t.sort_values(['dataset', 'ratio'])['column']))]
    n = '; '.join(f'{d}: {g["n"].iloc[0]} test studies of {g["n_patients"].iloc[0]} patients' for d, g in table.groupby('dataset'))
    out += [f'Linear probe, AUROC, mean and 95 % interval over patients and {int(table["seeds"].max())} seed(s). {n}.', '',
            wide.loc[[m for m in METHODS if m in wide.index]].to_markdown(), '', *task_lines(folder)]
    report = (folder/'REPORT.md').read_text(encoding='utf-8')
    out += [f'[Report]({folder.relative_to(ROOT)}/REPORT.md). ' + section(report, 'Did the models learn?').splitlines()[-1], '',
            section(report, 'In short'), '']
    out += [x for m in DETECTOR if (x := detector_sentence(folder, m))]
    for name, says in (('low_data', 'AUROC against the share of labels, with intervals'),
                       ('task_curves', 'Localization, reports and VQA against the share of labels, with intervals')):
        if (folder/f'figures/{name}.png').is_file(): out += ['', f'![{says}]({folder.relative_to(ROOT)}/figures/{name}.png)']
    return [*out, '']


VERDICT = re.compile('supported in part|not supported|supported|contradicted|mixed|no change found|not testable here')


def report_of(folder: Path) -> str: return (folder/'REPORT.md').read_text(encoding='utf-8')
def manifest_of(folder: Path) -> dict: return json.loads((folder/'manifest.json').read_text(encoding='utf-8'))
def link(folder: Path) -> str: return f'[`{folder.name}`]({folder.relative_to(ROOT)}/REPORT.md)'


def outdated(folder: Path) -> str:
    "Why a study's numbers no longer stand, from its OUTDATED.md; '' if they do."
    f = folder/'OUTDATED.md'
    return ' '.join(f.read_text(encoding='utf-8').split()) if f.is_file() else ''


def gate_sentence(report: str) -> str:
    "What the report says of its gates."
    return re.search(r'^(All gates hold\.|\d+ of \d+ gates do(?:es)? not hold\.|No gate was measured\.)', report, re.MULTILINE)[1]


def claims_by_verdict(report: str) -> dict[str, list[str]]:
    "{verdict: claims, each with its number of tests} from the table of claims."
    table = re.search(r'^\| claim +\| verdict +\|.*\n\|[-:| ]+\|\n((?:\|.*\|\n)+)', report, re.MULTILINE)[1]
    out: dict[str, list[str]] = {}
    for row in table.splitlines():
        claim, verdict, *_ = (x.strip() for x in row.strip('|').split('|'))
        kind = m[0] if (m := VERDICT.match(verdict)) else verdict
        # it will stand in brackets itself
        tests = re.sub(r'^\W*(in )?(?=\w)', '', verdict.removeprefix(kind)).replace(' (', '; ').rstrip(')')
        out.setdefault(kind, []).append(claim + (f' ({tests})' if tests else ''))
    return out


def verdict_sentences(report: str) -> str:
    "Claims for or against which something was found by name, the others by their number."
    said = claims_by_verdict(report)
    quiet = {k: v for k, v in said.items() if k.startswith('no')}
    out = [f'{k.capitalize()}: {"; ".join(v)}.' for k, v in said.items() if k not in quiet]
    return ' '.join([*out, *([f'{"The other claims" if out else "Claims"}: {", ".join(f"{len(v)} {k}" for k, v in quiet.items())}.']
                             if quiet else [])])


ASKED = {'gk': 'on the features of GK-MVLP', 'gk-roi_pool': 'when the same checkpoint only pools its regions',
         'gk-image_only': 'when it looks at the whole picture alone', 'itc_itm_lm': 'for the model without the GK module',
         'itc_itm_lm_ecls': 'for that model with entity labels', 'scratch': 'for the network that was never pre-trained'}


def in_words(folders: list[Path]) -> list[str]:
    "What the main study found, in sentences: every number and verdict comes from its tables and report."
    if not folders: return ['No study of this version has been run to its end yet.']
    main, *others = folders
    report, t = report_of(main), pd.read_csv(main/'tables/classification.csv')
    t = t[(t['metric'] == 'auroc') & (t['protocol'] == 'linear_probe') & (t['ratio'] == t['ratio'].max())]
    dataset = t['dataset'].iloc[0]
    t = t[t['dataset'] == dataset].set_index('method')
    auroc = [f'{t.loc[m, "mean"]:.3f} {says}' for m, says in ASKED.items() if m in t.index]
    c = pd.concat([pd.read_csv(f) for name in ('comparisons', 'task_comparisons') if (f := main/f'tables/{name}.csv').is_file()])
    c = c[(c['method'] == 'gk') & c['reference'].str.startswith('gk-') & c['p_holm'].notna()]
    sure = c['p_holm'] < .05
    better, worse = int((sure & (c['difference'] > 0)).sum()), int((sure & (c['difference'] < 0)).sum())
    g = t.loc['gk']
    size = f'{int(g["seeds"])} seeds, {int(g["n"])} test studies of {int(g["n_patients"])} patients ({dataset})'
    return [f'- The main study here is {link(main)}: {size}. {gate_sentence(report)}',
            f'- Linear probe with {t["ratio"].iloc[0]:g} % of the labels, AUROC: {", ".join(auroc)}.',
            f'- Beside its own controls `gk` is better in {better} and worse in {worse} of {len(c)} tests'
            + ('.' if better else ': no gain is credited to knowledge prompts or grounding.'),
            f'- {verdict_sentences(report)}',
            *(f'- {link(f)}: '
              f'{outdated(f) or gate_sentence(report_of(f)) + " " + verdict_sentences(report_of(f)) + " " + detector_sentence(f, "lung_iou")}'.rstrip() for f in others)]


def transcript(folder: Path) -> list[str]:
    "What `make paper` prints for a preset, by the times in its manifest."
    if not (folder/'manifest.json').is_file(): return ['`make paper` has not been run to its end for this version.']
    runs = manifest_of(folder)['runs']
    cores, n, name = next(iter(runs.values()))['hardware']['cpus'], len(runs), folder.relative_to(ROOT)
    minutes = max(1, round(time_estimate(list(runs), folder/'manifest.json', cores) / 60))
    return [f'On {cores} cores `{folder.name}` prints:', '', '```text',
            f'{folder.name}: ... {n} jobs, 0 of them finished before; about {minutes} minutes by the times in {name}/manifest.json.',
            'start  detector', f'done   [1/{n}] detector in {runs["detector"]["seconds"]:.0f} s', '...',
            f'done   [{n}/{n}] report in {runs["report"]["seconds"]:.0f} s', '', '(AUROC table, gates, verdicts)', '',
            f'{name}: REPORT.md, tables/, figures/ and manifest.json; executed notebooks in runs/{folder.name} (... s)', '```']


def blocks() -> dict[str, list[str]]:
    "{name of the block: its lines}. The main study, the largest whose numbers stand, comes first and is the only one with tables."
    folders = [f for p in ('full', 'mini', 'sweeps', 'public') if ((f := ROOT/'paper_results'/p)/'manifest.json').is_file()]
    folders.sort(key=lambda f: bool(outdated(f)))
    return {'transcript': transcript(ROOT/'paper_results'/'mini'), 'sentences': in_words(folders),
            'results': [line for f in folders[:1] for line in study(f)]}


def main() -> int:
    path = ROOT/'README.md'
    text = new = path.read_text(encoding='utf-8')
    for name, lines in blocks().items():
        start, end = f'<!-- {name}: written by scripts/update_readme.py -->', f'<!-- end of {name} -->'
        before, rest = new.split(start, 1)
        new = before + start + '\n\n' + '\n'.join(lines).strip() + '\n\n' + end + rest.split(end, 1)[1]
    if '--check' in sys.argv:
        if new != text: print('error: README.md differs from paper_results. Run: make readme', file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding='utf-8')
    return 0


if __name__ == '__main__': sys.exit(main())
