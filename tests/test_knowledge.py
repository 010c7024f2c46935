"Knowledge prompts and the report reader: every rule with its unhappy side, and the measured quality on real reports."
import hashlib
import json
import random
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gk_mvlp.data.anatomy import REGIONS, side
from gk_mvlp.data.knowledge import ENTITIES, ENTITY_INDEX, ENTITY_NAMES, extract_entities, extract_relations, lookup, normalize_name, prompt
from gk_mvlp.data.phantom import PhantomConfig, _rng, hidden_state, write_report
from gk_mvlp.paths import GKError

ORDER = ('lung opacity', 'consolidation', 'pneumonia', 'atelectasis', 'pulmonary edema', 'pleural effusion', 'pneumothorax', 'cardiomegaly',
         'nodule', 'mass', 'hyperinflation',
         'fibrosis', 'pleural thickening', 'fracture', 'hiatal hernia', 'mediastinal widening', 'granuloma', 'support device')


def test_the_order_of_entities_never_changes():
    assert ENTITY_NAMES == ORDER and [ENTITY_INDEX[n] for n in ORDER] == list(range(18))


def test_every_synonym_finds_its_entity_and_no_other():
    for e in ENTITIES:
        for w in (e.name, *e.synonyms):
            assert lookup(w) is e and lookup(w.upper().replace(' ', '_')) is e


def test_every_synonym_is_read_as_its_entity():
    missed = [(e.name, w, extract_entities(f'There is {w}.')) for e in ENTITIES
              for w in (e.name, *e.synonyms) if extract_entities(f'There is {w}.').get(e.name) != 1]
    assert not missed, missed


@pytest.mark.parametrize('name', ['', 'pleural efusion', 'knee', 'effusion nodule'])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(GKError, match='unknown entity'): lookup(name)


def test_normalize_name():
    assert normalize_name('  Pleural_Effusion ') == 'pleural effusion' and normalize_name('mass-like\n') == 'mass like'


def test_prompts_name_entity_and_region_and_stay_short():
    for n in ENTITY_NAMES:
        for r in (None, *REGIONS):
            p = prompt(n, r)
            assert p.startswith(n) and (r is None or f'in the {r}' in p) and len(p.split()) <= 40
    assert len({prompt(n, r) for n in ENTITY_NAMES for r in REGIONS}) == 18 * 29, 'no two prompts are the same'
    assert prompt('effusions', 'left lung') == prompt('pleural effusion', 'left lung')
    with pytest.raises(GKError, match='unknown region'): prompt('nodule', 'left knee')
    with pytest.raises(GKError, match='unknown entity'): prompt('rash')


CASES = [
    # negation and where it ends
    ('No effusion.', {'pleural effusion': -1}),
    ('Without evidence of pneumothorax or effusion.', {'pleural effusion': -1, 'pneumothorax': -1}),
    ('Lungs are free of consolidation, edema, and mass.', {'consolidation': -1, 'pulmonary edema': -1, 'mass': -1}),
    ('Negative for pneumothorax.', {'pneumothorax': -1}),
    ('Neither effusion nor pneumothorax.', {'pleural effusion': -1, 'pneumothorax': -1}),
    ('Effusion and pneumothorax are not seen.', {'pleural effusion': -1, 'pneumothorax': -1}),
    ('Edema is no longer present.', {'pulmonary edema': -1}),
    ('Interval resolution of the effusion.', {'pleural effusion': -1}),
    ('Pneumonia has been excluded.', {'pneumonia': -1}),
    ('Interval removal of the chest tube.', {'support device': -1}),
    ('The chest tube has been removed.', {'support device': -1}),
    ('No effusion and the heart is enlarged.', {'pleural effusion': -1, 'cardiomegaly': 1}),
    ('No pneumothorax, however a small effusion persists.', {'pleural effusion': 1, 'pneumothorax': -1}),
    ('No acute disease except for atelectasis.', {'atelectasis': 1}),
    ('Cardiomegaly without edema.', {'cardiomegaly': 1, 'pulmonary edema': -1}),
    ('There is no focal consolidation, there is mild edema.', {'consolidation': -1, 'pulmonary edema': 1}),
    ('No effusion. Pneumothorax.', {'pleural effusion': -1, 'pneumothorax': 1}),
    ('No pneumothorax.Small effusion.', {'pleural effusion': 1, 'pneumothorax': -1}),
    # what only looks like negation
    ('No significant interval change in edema.', {'pulmonary edema': 1}),
    ('Without change in effusion.', {'pleural effusion': 1}),
    ('No increase in effusion.', {'pleural effusion': 1}),
    ('Not only consolidation but also effusion.', {'consolidation': 1, 'pleural effusion': 1}),
    ('The edema has not resolved.', {'pulmonary edema': 1}),
    ('The effusion has partially resolved.', {'pleural effusion': 1}),
    # doubt
    ('Possible pneumonia.', {'pneumonia': 0}),
    ('Atelectasis versus pneumonia.', {'atelectasis': 0, 'pneumonia': 0}),
    ('Findings suggestive of edema.', {'pulmonary edema': 0}),
    ('Cannot exclude a small pneumothorax.', {'pneumothorax': 0}),
    ('A pneumothorax is not excluded.', {'pneumothorax': 0}),
    ('Question of nodule.', {'nodule': 0}),
    ('Suspected fracture.', {'fracture': 0}),
    ('Consolidation is possible.', {'consolidation': 0}),
    ('Edema is less likely.', {'pulmonary edema': 0}),
    ('Probable atelectasis.', {'atelectasis': 0}),
    ('? pneumonia', {'pneumonia': 0}),
    ('Heart size is at the upper limits of normal.', {'cardiomegaly': 0}),
    ('Borderline cardiomegaly.', {'cardiomegaly': 0}),
    ('No findings to suggest pneumonia.', {'pneumonia': -1}),
    ('No effusion, possible atelectasis.', {'atelectasis': 0, 'pleural effusion': -1}),
    # the past and requests
    ('History of pneumonia.', {}), ('Evaluate for pneumothorax.', {}), ('Recommend CT for the nodule.', {}), ('Rule out pneumonia.', {}),
    ('INDICATION: pneumonia. FINDINGS: No effusion.', {'pleural effusion': -1}),
    ('FINDINGS: Effusion. COMPARISON: pneumothorax on prior.', {'pleural effusion': 1}),
    ('Old granulomatous disease.', {'granuloma': 1}), ('Effusion is unchanged since the prior.', {'pleural effusion': 1}),
    ('Status post pacemaker.', {'support device': 1}),
    # normal statements
    ('The cardiomediastinal silhouette is within normal limits.', {'cardiomegaly': -1, 'mediastinal widening': -1}),
    ('The heart, aorta and mediastinum are normal.', {'cardiomegaly': -1, 'mediastinal widening': -1}),
    ('Heart is not enlarged.', {'cardiomegaly': -1}), ('Normal heart size.', {'cardiomegaly': -1}),
    ('The heart is enlarged and the lungs are clear.', {'lung opacity': -1, 'consolidation': -1, 'cardiomegaly': 1}),
    ('Clear lungs.', {'lung opacity': -1, 'consolidation': -1}), ('Lungs are not clear.', {}),
    ('The lungs are clear of pneumothorax.', {'pneumothorax': -1}),
    ('Bony structures are intact.', {'fracture': -1}), ('Pleural spaces are clear.', {'pleural effusion': -1, 'pneumothorax': -1}),
    ('Pulmonary vascularity is normal.', {'pulmonary edema': -1}),
    # words that are not the finding
    ('Small pericardial effusion.', {}), ('Subcutaneous emphysema.', {}), ('Massive amounts of bowel gas.', {}),
    ('Transport was difficult.', {}), ('Umbilical hernia.', {}),
    ('Calcified nodule.', {'granuloma': 1}), ('Cystic fibrosis.', {}),
    # spread over words
    ('The heart is mildly enlarged.', {'cardiomegaly': 1}), ('Blunting of the right costophrenic angle.', {'pleural effusion': 1}),
    ('The left costophrenic angle is blunted.', {'pleural effusion': 1}),
    ('Flattening of the diaphragm.', {'hyperinflation': 1}), ('The mediastinum is widened.', {'mediastinal widening': 1}),
    # conflict and layout
    ('No nodule. Possible nodule.', {'nodule': 0}), ('Possible nodule. A nodule is seen.', {'nodule': 1}),
    ('NO\nPLEURAL\nEFFUSION.', {'pleural effusion': -1}), ('No air-space disease.', {'lung opacity': -1}), ('8.5 mm nodule', {'nodule': 1}),
    ('', {}), ('   \n', {}), ('XXXX', {}), ('...', {}),
]


@pytest.mark.parametrize('text,want', CASES, ids=[c[0][:40] or 'empty' for c in CASES])
def test_rule(text, want):
    assert extract_entities(text) == want


def R(*regions_entity_value): return {(r, e): v for r, e, v in regions_entity_value}


PLACES = [
    ('There is a pneumothorax.', {}),
    ('Opacity in the lower lobe on the left.', R(('left lower lung zone', 'lung opacity', 1))),
    ('RLL consolidation.', R(('right lower lung zone', 'consolidation', 1))),
    ('Right middle lobe pneumonia.', R(('right mid lung zone', 'pneumonia', 1))),
    ('No effusion in the left costophrenic angle and no opacity in the right lower lung zone.',
     R(('right lower lung zone', 'lung opacity', -1), ('left costophrenic angle', 'pleural effusion', -1))),
    ('Left lower lobe consolidation and right apical pneumothorax.',
     R(('left lower lung zone', 'consolidation', 1), ('right apical zone', 'pneumothorax', 1))),
    ('Nodule in the left upper lobe and consolidation in the right lower lobe.',
     R(('left upper lung zone', 'nodule', 1), ('right lower lung zone', 'consolidation', 1))),
    ('Opacities in the left mid and lower lung zones.',
     R(('left mid lung zone', 'lung opacity', 1), ('left lower lung zone', 'lung opacity', 1))),
    ('Left lower lobe and right upper lobe consolidation.',
     R(('left lower lung zone', 'consolidation', 1), ('right upper lung zone', 'consolidation', 1))),
    ('Small bilateral effusions and bibasilar atelectasis.',
     R(*[(f'{s} {r}', e, 1) for s in ('right', 'left')
         for r, e in (('lung', 'pleural effusion'), ('costophrenic angle', 'pleural effusion'), ('lower lung zone', 'atelectasis'))])),
    ('Moderate right effusion with adjacent atelectasis in the right lower lobe.',
     R(('right lung', 'pleural effusion', 1), ('right costophrenic angle', 'pleural effusion', 1),
       ('right lower lung zone', 'atelectasis', 1))),
    ('Right perihilar opacity.', R(('right hilar structures', 'lung opacity', 1))),
    ('Consolidation at the left base, but no left effusion.',
     R(('left lower lung zone', 'consolidation', 1), ('left lung', 'pleural effusion', -1),
       ('left costophrenic angle', 'pleural effusion', -1))),
    ('Nodule near the right ventricle.', {}),
    ('Cardiomegaly and left basilar atelectasis.',
     R(('cardiac silhouette', 'cardiomegaly', 1), ('left lower lung zone', 'atelectasis', 1))),
    ('Possible left effusion.', {}), ('History of right pneumothorax.', {}), ('', {}),
    ('Tube tip above the carina.', R(('carina', 'support device', 1))),
    ('The right lung is clear.', R(('right lung', 'lung opacity', -1), ('right lung', 'consolidation', -1))),
    ('No left effusion. Small right effusion.',
     R(('left lung', 'pleural effusion', -1), ('left costophrenic angle', 'pleural effusion', -1), ('right lung', 'pleural effusion', 1),
       ('right costophrenic angle', 'pleural effusion', 1))),
]


@pytest.mark.parametrize('text,want', PLACES, ids=[c[0][:40] or 'empty' for c in PLACES])
def test_place(text, want):
    assert extract_relations(text) == want


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(['no', 'left', 'right', 'base', 'effusion', 'and', ',', '.', 'nodule', 'heart', 'is', 'enlarged', 'normal',
                                 'possible', 'clear', 'lungs', 'both', 'lower', 'lobe', 'upper', 'in the', '/', '(', ')', '?', '1.',
                                 'costophrenic', 'angles', 'blunted', 'history of', 'FINDINGS:', 'but', 'calcified', '\n\n', 'ü', '0.5']),
                max_size=25))
def test_any_text_gives_valid_labels(words):
    text = ' '.join(words); e, r = extract_entities(text), extract_relations(text)
    assert set(e) <= set(ENTITY_NAMES) and set(e.values()) <= {-1, 0, 1}
    assert all(k[0] in REGIONS and k[1] in e and v in (-1, 1) and v <= e[k[1]] for k, v in r.items()), (
        'a stated place never says more than the report')


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text):
    extract_entities(text); extract_relations(text)


def test_swapping_sides_swaps_regions():
    swap = lambda w: ' '.join({'left': 'right', 'right': 'left'}.get(x, x) for x in w.split())
    texts = [t for t, w in PLACES if w and not any(x in t for x in ('RLL', 'iddle', 'ventricle'))]
    assert len(texts) > 10
    for t in texts:
        t = t.lower().replace('.', ' .')
        assert {(swap(r), e): v for (r, e), v in extract_relations(t).items()} == extract_relations(swap(t)), t


# ---- real reports
# -------------------------------------------------------------------------------------------------------------------------------

PROBLEMS = {
    'lung opacity': ('opacity', 'infiltrate', 'airspace disease'), 'consolidation': ('consolidation',), 'pneumonia': ('pneumonia',),
    'atelectasis': ('pulmonary atelectasis',),
    'pulmonary edema': ('pulmonary edema', 'pulmonary congestion'), 'pleural effusion': ('pleural effusion', 'hydropneumothorax'),
    'pneumothorax': ('pneumothorax', 'hydropneumothorax'),
    'cardiomegaly': ('cardiomegaly',), 'nodule': ('nodule',), 'mass': ('mass',), 'fracture': ('fractures, bone',),
    'hiatal hernia': ('hernia, hiatal',),
    'hyperinflation': ('emphysema', 'pulmonary emphysema', 'pulmonary disease, chronic obstructive', 'lung, hyperlucent',
                       'bullous emphysema'),
    'fibrosis': ('cicatrix', 'pulmonary fibrosis', 'lung diseases, interstitial'),
    'granuloma': ('granuloma', 'calcified granuloma', 'granulomatous disease'),
    'support device': ('catheters, indwelling', 'implanted medical device', 'tube, inserted', 'medical device'), 'pleural thickening': ()}
MESH = {   # headings with qualifiers that mean the entity as well
    'hyperinflation': r'lung/hyperdistention|diaphragm/(?:bilateral/)?flattened', 'pleural effusion': r'costophrenic angle/',
    'pleural thickening': r'thickening/pleura',
    'granuloma': r'calcinosis/lung|calcinosis/lymph nodes|nodule/lung/calcified', 'cardiomegaly': r'cardiac shadow/enlarged',
    'nodule': r'(?:opacity|density)/lung[^;]*/round'}
# micro F1 of the odd half when the rules were frozen: .919 (even half, on which they were tuned: .91); floors leave room for small edits of
# the rules only
FLOOR = {'micro': .90, 'lung opacity': .93, 'atelectasis': .92, 'pleural effusion': .86, 'cardiomegaly': .90, 'hyperinflation': .93,
         'granuloma': .88, 'fibrosis': .87, 'support device': .83, 'fracture': .80, 'pulmonary edema': .82, 'nodule': .74}


@pytest.fixture(scope='module')
def reports(real_data):
    path = real_data/'iu_xray'/'indiana_reports.csv'
    if not path.is_file(): pytest.skip(f'{path}: not there')
    d = pd.read_csv(path).fillna('')
    d = d[(d['uid'] % 2 == 1) & ((d['findings'] + d['impression']).str.strip() != '') & ~d['Problems'].str.contains('No Indexing')]
    return d.assign(text=d['findings'] + '\n\n' + d['impression'])


def indexed(d, entity):
    heads = d['Problems'].str.lower().str.split(';').map(lambda x: {s.strip() for s in x})
    y = heads.map(lambda h: any(k in h for k in PROBLEMS[entity])).to_numpy(bool)
    return y | d['MeSH'].str.lower().str.contains(MESH[entity]).to_numpy(bool) if entity in MESH else y


def test_quality_on_real_reports_not_used_to_write_the_rules(reports):
    start = time.perf_counter(); found = reports['text'].map(extract_entities); seconds = time.perf_counter() - start
    total, rows = np.zeros(3, int), []
    for n in PROBLEMS:
        y, s = indexed(reports, n), found.map(lambda e: e.get(n) == 1).to_numpy(bool)
        c = np.array([(y & s).sum(), (~y & s).sum(), (y & ~s).sum()]); total += c
        rows.append((n, int(y.sum()), c[0]/max(c[0] + c[1], 1), c[0]/max(c[0] + c[2], 1), 2*c[0]/max(2*c[0] + c[1] + c[2], 1)))
    table = pd.DataFrame(rows, columns=['entity', 'n', 'precision', 'recall', 'f1']).set_index('entity')
    micro = 2*total[0]/(2*total[0] + total[1] + total[2])
    print(f'\n{table.round(3)}\nmicro F1 {micro:.3f}, {len(reports)} reports in {seconds:.1f} s')
    assert micro >= FLOOR['micro'] and all(table.loc[n, 'f1'] >= f for n, f in FLOOR.items() if n != 'micro'), table
    assert seconds < 60


def test_normal_reports_have_no_findings(reports):
    normal = reports[reports['MeSH'].str.strip().str.lower() == 'normal']['text'].map(extract_entities)
    assert len(normal) > 500 and normal.map(lambda e: 1 in e.values()).mean() < .06


def test_sides_of_relations_agree_with_the_index(reports):
    heads = {'pleural effusion': 'pleural effusion', 'pulmonary atelectasis': 'atelectasis', 'opacity': 'lung opacity', 'nodule': 'nodule',
             'calcified granuloma': 'granuloma', 'consolidation': 'consolidation', 'pneumonia': 'pneumonia', 'cicatrix': 'fibrosis'}
    hit = wrong = missed = 0
    for text, mesh in zip(reports['text'], reports['MeSH']):
        want: dict[str, set] = {}
        for h in mesh.lower().split(';'):
            head, *q = [x.strip() for x in h.split('/')]
            if head in heads:
                want.setdefault(heads[head], set()).update({'left', 'right'} if 'bilateral' in q else {'left', 'right'} & set(q))
        rel = extract_relations(text)
        for e, sides in want.items():
            got = {side(r) for (r, n), v in rel.items() if n == e and v == 1} - {'midline'}
            if sides and got: hit += len(got & sides); wrong += len(got - sides)
            if sides: missed += len(sides - got)
    print(f'\nsides: precision {hit/(hit + wrong):.3f}, recall {hit/(hit + missed):.3f}')
    assert hit/(hit + wrong) > .96 and hit/(hit + missed) > .72


def test_shuffled_reports_score_badly(reports):
    "The check above can fail: the same labels against the wrong reports."
    found = reports['text'].map(extract_entities).tolist(); random.Random(0).shuffle(found)
    y, s = indexed(reports, 'lung opacity'), np.array([e.get('lung opacity') == 1 for e in found])
    assert 2*(y & s).sum()/(y.sum() + s.sum()) < .4


def fingerprint(things) -> str: return hashlib.sha256(json.dumps(things).encode()).hexdigest()[:16]


def readings(texts): return [[sorted(extract_entities(t).items()), sorted([*k, v] for k, v in extract_relations(t).items())] for t in texts]


def test_the_reading_of_phantom_reports_stands_still():
    "Rules may be rewritten, but labels and results rest on what they read: a change of a single entity or relation must be meant."
    config, texts = PhantomConfig(n=300, seed=5), []
    for i in range(300):
        body, found, labels = hidden_state(config, i)
        texts.append(write_report(config, body, found, labels, _rng(config, 4, i))[0])
    assert fingerprint(texts) == '039303548ae2fbf0', 'the phantom writes other reports: renew both fingerprints'
    assert fingerprint(readings(texts)) == 'a3c7232138269c4b', 'the same reports are read differently'


def test_the_reading_of_real_reports_stands_still(reports):
    assert fingerprint(reports['text'].tolist()) == 'a31713d1ce599dde', 'another version of the reports'
    assert fingerprint(readings(reports['text'])) == '5b009b8db0f831bf', 'the same reports are read differently'
