"""Round trip: the phantom written in real formats at full size, read by the real loaders, equals the hidden state as far as each format
can say it."""
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gk_mvlp.data.anatomy import REGIONS
from gk_mvlp.data.check import check_data
from gk_mvlp.data.chexpert import CHEXPERT_TO_ENTITY
from gk_mvlp.data.images import load_image
from gk_mvlp.data.iu_xray import load_iu_xray
from gk_mvlp.data.mimic_cxr import load_mimic_cxr, split_sections
from gk_mvlp.data.phantom import PhantomConfig, make_study
from gk_mvlp.data.phantom_export import ENCODINGS, QUESTION_TYPES, export_phantom, mimic_ids, report_sections, rsna_id
from gk_mvlp.data.registry import load_dataset
from gk_mvlp.data.rsna import load_rsna
from gk_mvlp.data.study import validate
from gk_mvlp.data.vqa_rad import load_vqa_rad
from gk_mvlp.paths import GKError

configs = st.builds(PhantomConfig, n=st.just(60), size=st.just(1024), seed=st.integers(0, 10 ** 6), normal=st.sampled_from([0., .4]),
                    ap=st.sampled_from([0., 1., .35]), label_noise=st.sampled_from([0., .06, .6]),
                    hedging=st.sampled_from([0., .5]), boilerplate=st.sampled_from([0., 1.]),
                    severity=st.sampled_from([(0., 1.), (.9, 1.)]))
few = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# what one word of the source may mean
JOINED = {'nodule': {'nodule', 'mass'}, 'mass': {'nodule', 'mass'}, 'pleural thickening': {'pleural thickening', 'fibrosis'}}

def expected_facts(s):
    "Entities and relations that Chest ImaGenome can carry, by brute force from the phantom's."
    said = ([(r, e, v) for (r, e), v in s.relations.items()]
            + [(None, e, v) for e, v in s.entities.items() if v and v not in {w for (_, f), w in s.relations.items() if f == e}])
    entities, relations = {}, {}
    for r, e, v in said:
        for f in JOINED.get(e, {e}):
            w = 0 if v == 1 and e in JOINED else v
            entities[f] = max(w, entities.get(f, -1))
            if w and r: relations[r, f] = max(w, relations.get((r, f), -1))
    return entities, relations

def same_boxes(got, want, n):
    "Within half a pixel of n: the formats hold whole pixels."
    return set(got) == set(want) and all(np.abs(np.array(got[k]) - want[k]).max() <= .5001 / n for k in want)

@few
@given(configs)
def test_mimic_round_trip(tmp_path_factory, config):
    root = tmp_path_factory.mktemp('mimic')
    truth = export_phantom(config, root, ['mimic_cxr'], range(3), progress=False)
    back = {s.study_id: s for s in load_mimic_cxr(root, index=root/'index', workers=1)}
    assert len(back) == 3
    for i, t in enumerate(truth):
        s, (dicom, subject, study) = validate(back[mimic_ids(t)[0]]), mimic_ids(t)
        n, above = 1024, (round(1024 * 1.2) - 1024) // 2
        assert (s.report == ' '.join(report_sections(t.report)) and (s.split, s.view, s.sex) == (t.split, t.view, t.sex)
                and s.subject_id == f'mimic-{subject}' and s.attributes['examination'] == study)
        high = round(n * 1.2)
        moved = {k: (b[0], (b[1] * n + above) / high, b[2], (b[3] * n + above) / high) for k, b in t.regions.items()}
        assert set(s.regions) == set(REGIONS) and same_boxes(s.regions, moved, n)
        assert (s.entities, s.relations) == expected_facts(t)
        for f, e in CHEXPERT_TO_ENTITY.items():
            assert s.labels.get(f) == {1: 1, -1: 0, 0: None, None: 0}[t.entities.get(e)] or s.split != 'train' and t.entities.get(e) == 0
        assert t.age - 10 <= s.age <= t.age + 10
        x, want = load_image(s.image).astype(int), make_study(config, i).image
        assert x.shape == (high, n) and np.abs(x[above:above + n] - want).mean() < 2 and (x[:above - 8] <= 2).all()

@few
@given(configs, st.sampled_from(ENCODINGS))
def test_rsna_round_trip(tmp_path_factory, config, encoding):
    root = tmp_path_factory.mktemp('rsna')
    truth = export_phantom(config, root, ['rsna'], range(4), encoding, progress=False)
    back = {s.study_id: s for s in load_rsna(root, layout='dicom')}
    assert len(back) == 4
    for i, t in enumerate(truth):
        s = validate(back[rsna_id(t)])
        want = [f.box for f in t.findings if f.entity in ('pneumonia', 'consolidation', 'lung opacity')]
        assert (s.labels['pneumonia'] == int(bool(want)) and len(s.findings) == len(want)
                and (s.sex, s.age, s.view) == (t.sex, t.age, t.view))
        for f, b in zip(s.findings, want, strict=True): assert f.entity == 'pneumonia' and np.abs(np.array(f.box) - b).max() <= .5001 / 1024
        assert (s.attributes['detailed_class']
                == ('Lung Opacity' if want else 'No Lung Opacity / Not Normal' if any(t.labels.values()) else 'Normal'))
        x, y = load_image(s.image).astype(int), make_study(config, i).image
        assert (x == y).all() if encoding != 'jpeg' else np.abs(x - y).mean() < 2

@few
@given(configs)
def test_r2gen_and_vqa_round_trip(tmp_path_factory, config):
    root, config = tmp_path_factory.mktemp('text'), PhantomConfig(**{**config.__dict__, 'size': 512})
    truth = export_phantom(config, root, ['iu_xray', 'vqa_rad'], range(10), progress=False)
    back = {s.study_id: s for s in load_iu_xray(root)}
    for i, t in enumerate(truth):
        s = validate(back[t.study_id])
        assert s.report == report_sections(t.report)[0] and s.split == t.split
        if i < 2: assert (load_image(s.image) == make_study(config, i).image).all()
    want = {(t.study_id, q.question, q.answer, q.answer_type, QUESTION_TYPES[q.question_type], 'test' if t.split == 'test' else 'train')
            for t in truth for q in t.qa}
    for layout in ('mevf', 'official'):
        try: vqa = load_vqa_rad(root, layout=layout)
        except GKError: assert len({t.split == 'test' for t in truth}) == 1; continue                # one of the two files is empty
        assert {(s.image.stem, q.question, q.answer, q.answer_type, q.question_type, s.split) for s in vqa for q in s.qa} == want

def test_full_size_pictures_and_check_data(tmp_path, monkeypatch):
    "One study at the real size, 3053 x 2544, and the checks over the whole."
    monkeypatch.setenv('GK_MVLP_OUT', str(tmp_path/'out'))
    config = PhantomConfig(n=40, size=2544, seed=3)
    (t,) = export_phantom(config, tmp_path, ['mimic_cxr'], [0], progress=False)
    (s,) = load_mimic_cxr(tmp_path, workers=1)
    assert load_image(s.image, min_side=300).shape == (382, 318) and (s.entities, s.relations) == expected_facts(t)
    assert not [c for c in check_data('mimic_cxr', tmp_path, {'workers': 1}, progress=False) if c.level == 'error']

def test_reports_survive_broken_lines():
    for i in range(150):
        s = make_study(PhantomConfig(n=200, size=32, seed=8, boilerplate=1.), i)
        assert (split_sections('FINAL REPORT\n' + s.report.replace(' IMPRESSION', '\n IMPRESSION'))['findings']
                == report_sections(s.report)[0])

def test_splits_by_patient_come_back(tmp_path):
    config = PhantomConfig(n=60, size=1024, seed=2, two_studies=1.)
    truth = export_phantom(config, tmp_path, ['rsna', 'mimic_cxr'], range(0, 6), progress=False)
    s = load_dataset('mimic_cxr', tmp_path, index=tmp_path/'i', workers=1, check_pictures=False)
    assert len({x.subject_id for x in s}) == len({t.subject_id for t in truth}) == 3
    assert load_mimic_cxr(tmp_path, index=tmp_path/'i', workers=1, split_from='mimic')[0].split == truth[0].split

def test_workers_write_the_same_bytes(tmp_path):
    config = PhantomConfig(n=4, size=128, seed=1)
    for k in (1, 2): export_phantom(config, tmp_path/str(k), ['iu_xray', 'vqa_rad', 'mimic_cxr'], workers=k, progress=False)
    files = sorted(p.relative_to(tmp_path/'1') for p in (tmp_path/'1').rglob('*') if p.is_file())
    assert files and all((tmp_path/'1'/p).read_bytes() == (tmp_path/'2'/p).read_bytes() for p in files)

def test_refusals(tmp_path):
    with pytest.raises(GKError, match="'nih'"): export_phantom(PhantomConfig(n=1), tmp_path, ['nih'])
    with pytest.raises(GKError, match='size=1024'): export_phantom(PhantomConfig(n=1, size=64), tmp_path, ['rsna'], progress=False)
    with pytest.raises(GKError, match='encoding'):
        export_phantom(PhantomConfig(n=1, size=1024), tmp_path, ['rsna'], encoding='png', progress=False)
    assert not (tmp_path/'rsna_pneumonia'/'stage_2_train_labels.csv').exists(), 'no table of an export that failed'
