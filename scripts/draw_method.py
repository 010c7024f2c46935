"Draw the picture of the method, docs/method.svg and docs/method.png."
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from gk_mvlp.data.anatomy import REGIONS
from gk_mvlp.data.phantom import PhantomConfig, make_study
from gk_mvlp.study.figures import region_colours

OUT = Path(__file__).resolve().parents[1]/'docs'
IMAGE, TEXT, GK, LOSS = '#dbe9f6', '#e6f2e1', '#fdebd0', '#f3dfe9'
SHOWN = ('right upper lung zone', 'right lower lung zone', 'left upper lung zone', 'left costophrenic angle', 'cardiac silhouette',
         'aortic arch', 'trachea')


def box(ax, x, y, w, h, text, colour, size=9.5, weight='normal'):
    ax.add_patch(FancyBboxPatch((x, y), w, h, boxstyle='round,pad=0,rounding_size=.12', fc=colour, ec='#55606a', lw=1))
    ax.text(x + w / 2, y + h / 2, text, ha='center', va='center', fontsize=size, weight=weight, linespacing=1.25)


def arrow(ax, start, end, bend=0., text='', at=None, colour='#37424c'):
    ax.add_patch(FancyArrowPatch(start, end, arrowstyle='-|>', mutation_scale=11, lw=1.2, color=colour, shrinkA=1, shrinkB=1,
                                 connectionstyle=f'arc3,rad={bend}'))
    if text:
        ax.text(*(at or ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + .12)), text, fontsize=8.5, ha='center', va='bottom',
                color=colour)


def draw() -> plt.Figure:
    "The method as one picture: what goes in at the left, losses at the right."
    fig, ax = plt.subplots(figsize=(12, 6.2))
    ax.set(xlim=(0, 15.4), ylim=(0, 8), aspect='equal'); ax.axis('off')
    study = make_study(PhantomConfig(n=30, size=192), 3)
    ax.imshow(study.image, cmap='gray', extent=(.2, 2.6, 4.35, 6.75), zorder=1)
    colours = dict(zip(REGIONS, region_colours(), strict=True))
    for name in SHOWN:
        x1, y1, x2, y2 = np.array(study.regions[name]) * 2.4
        ax.add_patch(Rectangle((.2 + x1, 6.75 - y2), x2 - x1, y2 - y1, fill=False, ec=colours[name], lw=1.3, zorder=2))
    ax.text(1.4, 6.9, 'chest X-ray', ha='center', fontsize=9.5)
    ax.add_patch(Rectangle((3.05, 1.95), 7.15, 3.7, fc='#fff8ec', ec='#d9a441', lw=1.2, ls=(0, (4, 2)), zorder=0))
    ax.text(10.1, 5.35, 'GK module', ha='right', va='center', fontsize=10, weight='bold', color='#a8741a')
    box(ax, 3.3, 6.3, 2.4, .9, 'image encoder\n(ViT)', IMAGE, weight='bold')
    box(ax, 3.3, 4.3, 2.4, .9, 'region detector\n(frozen)', IMAGE)
    box(ax, 3.3, 2.3, 2.4, .9, 'knowledge encoder', TEXT)
    box(ax, .2, 2.15, 2.4, 1.2, 'knowledge prompts\n"effusion, usually seen in\n... : fluid between ..."', 'white', 7.6)
    box(ax, .2, .3, 2.4, 1.1, 'report\n"Small left pleural\neffusion. No ..."', 'white', 7.6)
    box(ax, 3.3, .4, 2.4, .9, 'report encoder\n(BERT)', TEXT, weight='bold')
    box(ax, 6.75, 3.2, 1.5, 1.3, 'regions\nask\nprompts', GK)
    box(ax, 8.55, 3.2, 1.5, 1.3, 'then the\nwhole\npicture', GK)
    box(ax, 10.75, 4.05, 1.75, 1.1, 'memory\n' + r'$m=[v;z_{fused}]$', IMAGE)
    box(ax, 10.75, 2.1, 1.75, 1.1, 'image-report\nencoder', TEXT)
    box(ax, 12.85, 4.05, 1.15, 1.1, 'report\ndecoder', TEXT)
    for y, name, what in ((6.35, 'ECLS', 'which entities\nare there?'), (4.2, 'LM', 'write the\nreport'), (2.25, 'ITM', 'do they\nmatch?'),
                          (.45, 'ITC', 'picture near\nits report')):
        ax.add_patch(FancyBboxPatch((14.2, y), 1.1, .85, boxstyle='round,pad=0,rounding_size=.12', fc=LOSS, ec='#a04a78', lw=1.1))
        ax.text(14.75, y + .6, name, ha='center', va='center', fontsize=9.5, weight='bold', color='#7d2f58')
        ax.text(14.75, y + .27, what, ha='center', va='center', fontsize=6.4, linespacing=1.05)
    arrow(ax, (2.6, 6.1), (3.3, 6.75)); arrow(ax, (2.6, 5.0), (3.3, 4.75)); arrow(ax, (2.6, 2.75), (3.3, 2.75))
    arrow(ax, (2.6, .85), (3.3, .85))
    arrow(ax, (5.7, 4.75), (6.75, 4.1), text='$r$', at=(6.2, 4.5)); arrow(ax, (5.7, 2.75), (6.75, 3.5), text='$p$', at=(6.2, 3.2))
    arrow(ax, (8.25, 3.85), (8.55, 3.85)); ax.text(8.4, 4.6, '$z_{local}$', fontsize=8.5, ha='center', color='#37424c')
    arrow(ax, (10.05, 3.95), (10.75, 4.4), text='$z_{fused}$', at=(10.33, 4.42))
    arrow(ax, (5.7, 6.55), (9.3, 4.5), bend=-.2, text='patches', at=(8.25, 5.72))
    arrow(ax, (5.7, 6.7), (11.6, 5.15), bend=-.28, text='$v$', at=(10.9, 5.95))
    arrow(ax, (5.7, 6.85), (14.2, 6.85), text='class token $v_{cls}$', at=(9.6, 6.87))
    box(ax, 11.6, 7.15, 1.9, .6, 'entity encoder', TEXT); arrow(ax, (13.5, 7.35), (14.2, 7.1))
    ax.text(1.4, 1.78, 'chosen by the entity scores of ECLS', ha='center', va='center', fontsize=7, color='#7d2f58')
    arrow(ax, (12.5, 4.6), (12.85, 4.6)); arrow(ax, (14.0, 4.6), (14.2, 4.6)); arrow(ax, (11.62, 4.05), (11.62, 3.2))
    arrow(ax, (12.5, 2.65), (14.2, 2.65))
    arrow(ax, (5.7, .95), (11.3, 2.1), bend=.12, text='$t$', at=(8.6, .98)); arrow(ax, (5.7, .75), (14.2, .75))
    ax.text(10.6, .5, 'with $v_{cls}$', fontsize=7.5, ha='center', color='#37424c')
    fig.subplots_adjust(0, 0, 1, 1)
    return fig


if __name__ == '__main__':
    plt.rcParams |= {'svg.hashsalt': 'gk-mvlp', 'svg.fonttype': 'path', 'mathtext.fontset': 'dejavusans'}
    figure = draw()
    figure.savefig(OUT/'method.svg', metadata={'Date': None, 'Creator': None})
    figure.savefig(OUT/'method.png', dpi=120, metadata={'Software': None})
