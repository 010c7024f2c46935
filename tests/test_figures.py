"What figures draw, read back from their axes; sections, figures and folds of a report."
import json
import re
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from gk_mvlp.config import Preset
from gk_mvlp.paths import GKError
from gk_mvlp.study.claims import CLAIMS, report_text
from gk_mvlp.study.collect import drop_tables
from gk_mvlp.study.figures import plot_grounding
from gk_mvlp.study.paper_figures import FigureJob
from gk_mvlp.study.report_parts import FIGURES, NOTE, PICTURES, finish_report, finished, section
from gk_mvlp.study.study_figures import StudyFigures

P = Preset('a test', {}, {}, {}, {}, {}, methods=('scratch', 'itc_itm_lm', 'gk'), ratios=(10., 100.), seeds=(0, 1))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


def study(folder, **tables):
    (folder/'tables').mkdir(parents=True)
    for name, rows in tables.items(): pd.DataFrame(rows).to_csv(folder/f'tables/{name}.csv', index=False)
    return StudyFigures(P, '', folder/'runs', folder)


def drawn(ax):
    "{label: (difference, low, high, marker, is it filled?)} of a forest."
    out = {}
    for i, label in enumerate(ax.get_yticklabels()):
        line, point = ax.lines[2 * i], ax.lines[2 * i + 1]
        out[label.get_text()] = (float(point.get_xdata()[0]), *map(float, line.get_xdata()), point.get_marker(),
                                 point.get_markerfacecolor() == point.get_color())
    return out


def ablation(method, difference, p, metric='auroc', protocol='linear_probe'):
    return {'dataset': 'phantom', 'method': method, 'ratio': 100. if protocol == 'linear_probe' else np.nan, 'metric': metric,
            'protocol': protocol, 'reference': 'gk',
            'difference': difference, 'difference_low': difference - .01, 'difference_high': difference + .03, 'p_holm': p,
            'runs': 'probing/x'}


def test_ablations_have_the_sign_of_the_report(tmp_path):
    "The table has the ablation minus gk; the figure shows gk minus the ablation, and which comparisons were tested."
    rows = [ablation('gk-a', .1, .01), ablation('gk-b', -.1, .5), ablation('gk-a', .2, np.nan, 'clinical_f1', 'pretrained'),
            ablation('gk-b', .2, np.nan, 'clinical_f1', 'pretrained')]
    fig = study(tmp_path, ablation=rows).ablations()
    probe, written = (next(a for a in fig.axes if t in a.get_title())
                      for t in ('AUROC, linear probe', 'clinical F1, decoder as pre-trained'))
    a = drawn(probe)
    assert (a['gk-a'][:3] == pytest.approx((-.1, -.13, -.09)) and a['gk-a'][3:] == ('o', True) and a['gk-b'][0] == pytest.approx(.1)
            and a['gk-b'][3:] == ('o', False))
    assert {v[3] for v in drawn(written).values()} == {'x'}
    assert fig.axes[-1].get_xlabel() == 'gk minus the other' and (tmp_path/'figures/ablations.png').stat().st_size > 0


def test_curves_of_tasks(tmp_path):
    """A panel per headline metric and protocol of each task with several shares of labels; a baseline that is not random is drawn, too;
    controls are left to the tables."""
    def rows(task, metric, *methods):
        return [{'task': task, 'dataset': 'phantom', 'method': m, 'protocol': p, 'ratio': r, 'metric': metric, 'mean': .1 * i + r / 1000,
                 'low': .0, 'high': .9, 'seeds': 1 if p == 'baseline' else 2, 'runs': f'{task}/{m}'}
                for i, (m, p) in enumerate(methods) for r in (10., 100.)]
    job = study(tmp_path, vqa=rows('vqa', 'accuracy', ('gk', 'classification'), ('scratch', 'classification'), ('gk', 'generation'),
                                   ('question_only', 'baseline')) + rows('vqa', 'accuracy_open', ('gk', 'classification')),
                report_generation=rows('report_generation', 'bleu_4', ('gk', 'finetune'), ('gk-nearest', 'nearest'),
                                       ('nearest_neighbour', 'baseline')),
                localization=rows('localization', 'map_40_75', ('gk', 'finetune'))[:1])
    job.p = replace(P, tasks={'vqa': ['phantom'], 'report_generation': ['phantom'], 'localization': ['phantom']})
    fig = job.task_curves()
    assert ([a.get_ylabel() for a in fig.axes] == ['BLEU-4', 'accuracy', 'accuracy'] and 'answer chosen' in fig.axes[1].get_title()
            and '2 seed(s)' in fig.axes[1].get_title())
    lines = {x.get_label(): x.get_ydata().tolist() for x in fig.axes[1].lines if not x.get_label().startswith('_')}
    assert lines['question_only'] == pytest.approx([.31, .4]) and all(a.get_legend() is None for a in fig.axes)
    assert [x.get_text() for x in fig.legends[0].get_texts()] == ['scratch', 'gk', 'nearest_neighbour', 'question_only']
    assert 'vqa/question_only' in job.sources['task_curves'] and not any('nearest' == r.split('-')[-1] for r in job.sources['task_curves'])
    job.p = P
    assert job.task_curves() is None, 'a preset without tasks has none'


def test_what_a_study_has_no_longer_is_deleted(tmp_path):
    "A preset without its tasks or its disturbances: their old tables and figures would stand in the report as if they were new."
    job = study(tmp_path, robustness=[{'metric': 'auroc'}], ablation=[{'metric': 'auroc'}])
    for kind in ('md', 'tex'): (tmp_path/f'tables/robustness.{kind}').touch()
    drop_tables(tmp_path/'tables', ['robustness', 'never written'])
    assert [f.name for f in (tmp_path/'tables').iterdir()] == ['ablation.csv']
    (tmp_path/'tables/ablation.csv').unlink()
    (tmp_path/'figures').mkdir()
    for name in ('scaling.png', 'scaling.pdf', 'losses.png'): (tmp_path/'figures'/name).touch()
    assert list(job.draw()) == [] and [f.name for f in (tmp_path/'figures').iterdir()] == ['losses.png'], (
        'the figures of other notebooks are not theirs to delete')


def test_panels_of_a_forest(tmp_path):
    "Tasks with one row per protocol share a panel per metric; several shares of labels are named, one is not."
    row = {'dataset': 'phantom', 'method': 'gk', 'difference': .1, 'low': 0., 'high': .2, 'p_holm': .5}
    main = [row | {'task': 'classification', 'protocol': 'linear_probe', 'ratio': r, 'reference': 'scratch'} for r in (10., 100.)]
    tasks = [row | {'task': 'vqa', 'protocol': q, 'ratio': 100., 'metric': 'accuracy', 'reference': 'itc_itm_lm'}
             for q in ('classification', 'generation')]
    fig = study(tmp_path, comparisons=main, task_comparisons=tasks).forest()
    said = {a.get_title(): list(drawn(a)) for a in fig.axes}
    assert said == {'classification of findings: AUROC, linear probe (phantom)': ['scratch, 10 % of labels', 'scratch, 100 % of labels'],
                    'VQA: accuracy (phantom)': ['answer chosen: itc_itm_lm', 'answer written: itc_itm_lm']}


@pytest.mark.parametrize('weights, label, x', [((2e5, 9e5), 'trained weights', [2e5, 9e5]),
                                               ((np.nan, np.nan), 'model width (dim)', [32, 64]),
                                               ((np.nan, 9e5), 'model width (dim)', [32, 64])])
def test_the_axis_of_scaling_is_what_it_says(tmp_path, weights, label, x):
    rows = [{'dataset': 'phantom', 'method': 'gk', 'ratio': 100., 'metric': 'auroc', 'mean': .8, 'low': .7, 'high': .9, 'seeds': s,
             'protocol': 'linear_probe', 'factor': 'size', 'level': v, 'weights': w, 'runs': 'probing/x'}
            for s, v, w in zip((2, 3), (32, 64), weights)]
    growth = rows[0] | {'method': 'gk - itc_itm_lm', 'factor': 'size, highest against lowest', 'level': np.nan, 'weights': np.nan}
    ax, *more = study(tmp_path, scaling=[*rows, growth]).scaling().axes
    assert not more, 'a comparison of two levels has no curve'
    assert ax.get_xlabel() == label and list(ax.lines[0].get_xdata()) == x and ax.get_title() == 'phantom: size, 2 to 3 seeds'


def test_weights_on_the_axis_are_short(tmp_path):
    rows = [{'dataset': 'phantom', 'method': 'gk', 'ratio': 100., 'metric': 'auroc', 'mean': .8, 'low': .7, 'high': .9, 'seeds': 3,
             'protocol': 'linear_probe', 'factor': 'size', 'level': v, 'weights': w, 'runs': 'probing/x'}
            for v, w in ((32, 227_744), (96, 1_349_500))]
    fig = study(tmp_path, scaling=rows).scaling(); fig.canvas.draw()
    assert [t.get_text() for t in fig.axes[0].get_xticklabels()] == ['228k', '1.35M']


def test_a_shifted_group_stands_beside_its_method(tmp_path):
    row = {'dataset': 'phantom', 'method': 'gk', 'metric': 'auroc', 'mean': .8, 'low': .7, 'high': .9, 'attribute': 'sex', 'factor': np.nan,
           'level': np.nan, 'runs': 'probing/x'}
    rows = ([row | {'group': g} for g in ('F', 'M', 'gap')]
            + [row | {'group': g, 'factor': 'women', 'level': .1} for g in ('F', 'M', 'worst')])
    ax = study(tmp_path, subgroups=rows).subgroups().axes[0]
    assert ([t.get_text() for t in ax.get_legend().get_texts()] == ['gk', 'gk, trained on 10% women']
            and [t.get_text() for t in ax.get_xticklabels()] == ['F', 'M'])


def test_losses_lie_beside_what_a_model_that_knows_nothing_has(tmp_path):
    "Not beside what the untrained model of the last run had."
    (tmp_path/'detector').mkdir(); (tmp_path/'detector/metrics.json').write_text('{}')
    for m in ('itc_itm_lm', 'gk'):
        for s in P.seeds:
            f = tmp_path/f'pretrain/{m}-s{s}'; f.mkdir(parents=True)
            h = pd.DataFrame({'epoch': range(1, 5), 'itm': .6, 'val_itm': [np.nan, .62, np.nan, .6]})
            if m == 'gk': h = h.assign(ecls=1., val_ecls=1.1)
            h.to_csv(f/'history.csv', index=False)
            (f/'metrics.json').write_text(json.dumps({'itm_expected': .6365, 'itm_start': .84 + s}
                                                     | ({'ecls_expected': 1.5 + s, 'ecls_start': 1.5 + s} if m == 'gk' else {})))
    fig = FigureJob(P, '', tmp_path, tmp_path/'figures').losses()
    itm, ecls = fig.axes
    dotted = lambda ax: [float(x.get_ydata()[0]) for x in ax.lines if x.get_linestyle() == ':']
    assert (dotted(itm) == [.6365] and dotted(ecls) == [2.] and itm.get_title() == 'ITM\ndotted: prior, 0.6365'
            and ecls.get_title() == 'ECLS\ndotted: untrained, 2')
    fig.canvas.draw()
    assert all(float(t) == int(t) for t in itm.get_xticks())


class Told:
    "A model whose attention is given."
    def __init__(self, prompt, patch): self.z = {'prompt_attention': prompt, 'patch_attention': patch, 'entity_scores': prompt[:, 0, 0, 1:]}
    def eval(self): pass
    def image_encoder(self, images): return images
    def ground(self, v, batch, mode, need_maps): return self.z


@pytest.mark.parametrize('said', [True, False])
def test_grounding_frames_what_is_stated_on_a_fixed_scale(said):
    import torch

    from gk_mvlp.data.anatomy import REGIONS
    from gk_mvlp.data.knowledge import ENTITY_NAMES
    n = 1 + len(ENTITY_NAMES)
    prompt = torch.full((1, 2, 29, n), 1 / n); prompt[..., 3, 1 + ENTITY_NAMES.index('nodule')] *= 1.05
    valid = torch.ones(1, 29, dtype=torch.bool); valid[0, 0] = False
    boxes = torch.tensor([.2, .2, .6, .6]).repeat(1, 29, 1)
    batch = {'images': torch.zeros(1, 1, 16, 16), 'region_boxes': boxes, 'region_valid': valid}
    stated = [(REGIONS[5], 'nodule'), (REGIONS[0], 'nodule')] if said else []                       # the second region was not found
    fig = plot_grounding(Told(prompt, torch.rand(1, 2, 29, 16)), batch, np.zeros((16, 16), np.uint8), stated,
                         {'nodule': np.array([[.3, .3, .4, .4]])}, 'nodule')
    heat = fig.axes[0]
    assert heat.collections[0].get_clim() == (-2, 2), 'small differences do not fill the scale'
    assert [p.get_xy() for p in heat.patches] == ([(1 + ENTITY_NAMES.index('nodule'), 4)] if said else [])
    titles = ' '.join(a.get_title() for a in fig.axes)
    assert (f'stated: nodule\nin {REGIONS[5]}' in titles and f'patches of {REGIONS[3]}, which asks most' in titles
            and 'has rank 2 of 28' in titles) == said
    assert len([a for a in fig.axes if a.images]) == (4 if said else 2)


def made(root):
    "Names of the figures that a study writes."
    code = (root/'gk_mvlp/study/paper_figures.py').read_text() + (root/'gk_mvlp/study/study_figures.py').read_text()
    return set(re.findall(r"self\._?(?:save|panels|curves)\(.*?'([a-z_]+)'(?:, [^'\n]*)?(?:\)|, )",
                          code)) & set(re.findall(r'^def ([a-z_]+)\(self: (?:FigureJob|StudyFigures)', code, re.MULTILINE))


def test_every_figure_has_a_caption_and_a_section(root):
    assert {'losses', 'forest', 'scaling', 'grounding', 'roc', 'reports', 'subgroups'} <= made(root) <= set(FIGURES)
    text = report_text(P, [], {}, 'test')
    for name, (heading, caption) in FIGURES.items():
        assert section(text, heading), name
        assert 20 < len(caption) < 180, name
    assert {h for h, _ in FIGURES.values()} - {'Did the models learn?', 'The detector'} <= {c.title for c in CLAIMS}


def test_a_finished_report(tmp_path):
    "Each figure of the folder once, below its section's text; the parts that README shows are those of the report before."
    (tmp_path/'figures').mkdir()
    for n in ('losses', 'forest', 'robustness'): (tmp_path/f'figures/{n}.png').touch()
    plain = report_text(P, [], {}, 'test')
    text = finish_report(plain, tmp_path)
    assert text == (tmp_path/'REPORT.md').read_text() == finished(plain, tmp_path)
    assert text.count(NOTE) == 1 and text.index(NOTE) < text.index('\n## ')
    assert re.findall(r'\]\(figures/(\w+)\.png\)', text) == ['losses', 'forest', 'robustness']
    assert text.index('## Did the models learn?') < text.index('figures/losses.png') < text.index('## In short')
    for h in re.findall(r'^## (.+)$', plain, re.MULTILINE): assert section(text, h) == section(plain, h), h


def test_a_report_to_be_given_away_leaves_out_pictures(tmp_path):
    (tmp_path/'figures').mkdir()
    for n in ('losses', *PICTURES): (tmp_path/f'figures/{n}.png').touch()
    linked = lambda **k: set(re.findall(r'\]\(figures/(\w+)\.png\)', finished(report_text(P, [], {}, 'test'), tmp_path, **k)))
    assert linked() == {'losses', *PICTURES} and linked(pictures=False) == {'losses'}


@pytest.mark.parametrize('preset', ['full', 'mini', 'public', 'sweeps'])
def test_parts_of_the_committed_reports(root, preset):
    "README and the site get the verdicts and the sentence on the gates, whatever stands between or after them."
    text = (root/f'paper_results/{preset}/REPORT.md').read_text(encoding='utf-8')
    short, gates = section(text, 'In short'), section(text, 'Did the models learn?')
    assert (short.startswith('| claim') and len(short.splitlines()) == 2 + len(re.findall(r'^\| [A-Z]', short, re.MULTILINE))
            and 'figures/' not in short)
    assert re.search(r'All gates hold\.|gates do(?:es)? not hold\.', gates.splitlines()[-1])
    with pytest.raises(GKError, match='no section'): section(text, 'In long')
