"Every data set in miniature: `build(case, root)` writes it whole, `load(case, root, bad)` reads it through the registry."
import json
import tarfile

import numpy as np
import pydicom
from PIL import Image

from gk_mvlp.data.chexpert import CHEXPERT_FINDINGS
from gk_mvlp.data.registry import load_dataset

N = 8           # studies of each, of as many patients

def picture(path, k, size=(26, 22), **save):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(k).integers(0, 256, size, np.uint8)).save(path, **save)

def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')

def dicom(path, pid, k):
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = pydicom.Dataset(); ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality, ds.PatientID, ds.PatientSex, ds.PatientAge = (pydicom.uid.SecondaryCaptureImageStorage,
                                                                                                  '1.2.3', 'CR', pid, 'F', '050Y')
    ds.Rows = ds.Columns = 1024
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation, ds.PhotometricInterpretation = 1, 8, 8, 7, 0, 'MONOCHROME2'
    x = np.zeros((1024, 1024), np.uint8); x[:4, :4] = np.random.default_rng(k).integers(0, 256, (4, 4)); ds.PixelData = x.tobytes()
    ds.save_as(path, enforce_file_format=True)

def covid_chestxray(root):
    d = root/'covid_chestxray'
    for k in range(N): picture(d/f'images/c{k}.jpg', k)
    text(d/'metadata.csv', 'patientid,sex,age,finding,view,filename,clinical_notes\n'
         + ''.join(f'{k},F,{40 + k},"COVID-19, ARDS",PA,c{k}.jpg,"Left effusion, day {k}."\n' for k in range(N)))
    text(d/'annotations/imageannotation_ai_lung_bounding_boxes.json',
         {'categories': [{'id': 1, 'name': 'Right Lung'}, {'id': 2, 'name': 'Left Lung'}],
          'images': [{'id': k, 'file_name': f'c{k}.jpg', 'width': 220, 'height': 260} for k in range(N)],
'annotations': [{'id': 10 * k + c, 'image_id': k, 'category_id': c, 'bbox': [20 + 100 * (c - 1), 30, 80, 150 + k]} for k in range(N)
                for c in (1, 2)]})

def nih(root):
    d = root/'nih_chestxray14'
    for k in range(N): picture(d/f'images_64px/{k:08d}_000.png', k)
    text(d/'Data_Entry_2017_v2020.csv',
         'Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View '
         'Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]\n'
         + ''.join(f'{k:08d}_000.png,{"Mass|Edema" if k % 2 else "No Finding"},0,{k},{50 + k},M,PA,10,10,.1,.1\n' for k in range(N)))
    text(d/'BBox_List_2017.csv', 'Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000001_000.png,Mass,256,512,128,256\n')

def rsna(root):
    d = root/'rsna_pneumonia'
    for k in range(N): dicom(d/f'stage_2_train_images/r{k}.dcm', f'r{k}', k)
    text(d/'stage_2_train_labels.csv',
         'patientId,x,y,width,height,Target\n'
         + ''.join(f'r{k},100.0,200.0,300.0,{400 + k}.0,1\n' if k % 2 else f'r{k},,,,,0\n' for k in range(N)))
    text(d/'stage_2_detailed_class_info.csv',
         'patientId,class\n' + ''.join(f'r{k},{"Lung Opacity" if k % 2 else "Normal"}\n' for k in range(N)))

def chexpert(root):
    d = root/'chexpert'; head = 'Path,Sex,Age,Frontal/Lateral,AP/PA,' + ','.join(CHEXPERT_FINDINGS) + '\n'
    for part, ks in (('train', range(N - 2)), ('valid', range(N - 2, N))):
        for k in ks: picture(d/part/f'patient{k:05d}/study1/view1_frontal.jpg', k)
        text(d/f'{part}.csv', head + ''.join(f'CheXpert-v1.0/{part}/patient{k:05d}/study1/view1_frontal.jpg,Female,{50 + k},Frontal,AP,'
                                             + ','.join(['1.0', '', '-1.0', '0.0'] + [''] * 10) + '\n' for k in ks))

def iu_r2gen(root):
    d, parts = root/'iu_xray', {'train': [], 'val': [], 'test': []}
    for k in range(N):
        for v in (0, 1): picture(d/f'images/CXR{k}_IM-1/{v}.png', 10 * k + v)
        split = 'train' if k < 4 else 'val' if k < 6 else 'test'
        parts[split].append({'id': f'CXR{k}_IM-1', 'report': f'Small left effusion number {k}.',
                             'image_path': [f'CXR{k}_IM-1/0.png', f'CXR{k}_IM-1/1.png'], 'split': split})
    text(d/'annotation.json', parts)

def iu_openi(root):
    d = root/'iu_xray'
    for k in range(N):
        for v in (1001, 2001): picture(d/f'NLMCXR_png/CXR{k}_IM-1-{v}.png', k + v)
        text(d/f'ecgen-radiology/{k}.xml',
             f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{k}"/><AbstractText Label="FINDINGS">Small effusion '
             f'{k}.</AbstractText><AbstractText Label="IMPRESSION">None.</AbstractText>'
             f'<MeSH><major>normal</major></MeSH><parentImage id="CXR{k}_IM-1-1001"/><parentImage id="CXR{k}_IM-1-2001"/></eCitation>')
    text(d/'indiana_projections.csv',
         'uid,filename,projection\n' + ''.join(f'{k},{k}_IM-1-1001.dcm.png,Lateral\n{k},{k}_IM-1-2001.dcm.png,Frontal\n' for k in range(N)))

def vqa_rad(root):
    d = root/'vqa_rad'
    for k in range(N): picture(d/f'images/v{k}.jpg', k)
    q = [{'qid': k, 'image_name': f'v{k}.jpg', 'image_organ': 'CHEST', 'answer': 'yes', 'answer_type': 'CLOSED', 'question_type': 'PRES',
          'question': f'Effusion {k}?', 'phrase_type': 'freeform'} for k in range(N)]
    text(d/'trainset.json', q[:6]); text(d/'testset.json', q[6:])

def slake(root):
    d = root/'slake'
    q = [{'img_id': k, 'img_name': f'xmlab{k}/source.jpg', 'question': f'Is it healthy ({k})?', 'answer': 'No', 'q_lang': 'en',
          'location': 'Lung', 'modality': 'X-Ray', 'answer_type': 'CLOSED', 'base_type': 'vqa', 'content_type': 'Abnormality',
          'triple': ['vhead', '_', '_'], 'qid': k} for k in range(N)]
    for k in range(N): picture(d/f'imgs/xmlab{k}/source.jpg', k)
    text(d/'train.json', q[:4]); text(d/'validate.json', q[4:6]); text(d/'test.json', q[6:])

def mimic_cxr(root):
    jpg, cig = root/'mimic_cxr_jpg', root/'chest_imagenome/silver_dataset'
    ids = [(f'd{k}-0', 10000000 + k, 50000000 + k) for k in range(N)]
    for k, (d, p, s) in enumerate(ids):
        picture(jpg/f'files/p10/p{p}/s{s}/{d}.jpg', k)
        text(root/f'mimic_cxr/files/p10/p{p}/s{s}.txt', f' FINAL REPORT\n\n FINDINGS: Small left effusion {k}.\n\n IMPRESSION: Effusion.\n')
        text(cig/f'scene_graph/{d}_SceneGraph.json',
             {'image_id': d, 'viewpoint': 'PA', 'patient_id': p, 'study_id': s, 'gender': 'M', 'age_decile': '60-70', 'relationships': [],
'objects': [{'bbox_name': 'left lung', 'original_x1': 10 + k, 'original_y1': 2, 'original_x2': 20, 'original_y2': 24}],
'attributes': [{'bbox_name': 'left lung', 'attributes': [['anatomicalfinding|yes|pleural effusion']]}]})
    text(jpg/'mimic-cxr-2.0.0-metadata.csv',
         'dicom_id,subject_id,study_id,ViewPosition,Rows,Columns\n' + ''.join(f'{d},{p},{s},PA,26,22\n' for d, p, s in ids))
    text(jpg/'mimic-cxr-2.0.0-split.csv',
         'dicom_id,study_id,subject_id,split\n'
         + ''.join(f'{d},{s},{p},{"train" if k < 4 else "validate" if k < 6 else "test"}\n' for k, (d, p, s) in enumerate(ids)))
    text(jpg/'mimic-cxr-2.0.0-chexpert.csv',
         'subject_id,study_id,' + ','.join(CHEXPERT_FINDINGS) + '\n'
         + ''.join(f'{p},{s},' + ','.join(['1.0', '', '-1.0', '0.0'] + [''] * 10) + '\n' for _, p, s in ids))

def object_cxr(root):
    d = root/'object_cxr'
    for part, ks in (('train', range(6)), ('dev', range(6, N))):
        for k in ks: picture(d/part/f'o{k}.jpg', k)
        text(d/f'{part}.json', {'categories': [{'id': 1, 'name': 'foreign object'}],
                                'images': [{'id': k, 'file_name': f'o{k}.jpg', 'width': 22, 'height': 26} for k in ks],
             'annotations': [{'id': k, 'image_id': k, 'category_id': 1, 'bbox': [2, 3, 10, 12 + k]} for k in ks]})

def covidx(root):
    d = root/'covidx'
    for part, ks in (('train', range(6)), ('test', range(6, N))):
        for k in ks: picture(d/part/f'x{k}.png', k)
        text(d/f'{part}.txt', ''.join(f'{k} x{k}.png {"positive" if k % 2 else "negative"} rsna\n' for k in ks))

def table(root):
    for k in range(N): picture(root/f'pictures/t{k}.png', k)
    text(root/'studies.csv', 'image,subject_id,report,age,split,nodule\n'
         + ''.join(f'pictures/t{k}.png,p{k},Small nodule {k}.,{50 + k},{"train" if k < 5 else "val" if k < 6 else "test"},{k % 2}\n'
                   for k in range(N)))

def folder(root):
    for k in range(N): picture(root/f'{"train" if k < 5 else "val" if k < 6 else "test"}/{"normal" if k % 2 else "nodule"}/p{k}_0.png', k)

CASES = {f.__name__: f for f in (covid_chestxray, nih, rsna, chexpert, iu_r2gen, iu_openi, vqa_rad, slake, mimic_cxr, object_cxr, covidx,
                                 table, folder)}
_NAMES = {'iu_r2gen': 'iu_xray', 'iu_openi': 'iu_xray'}
_OPTIONS = {'rsna': {'layout': 'dicom'}, 'iu_openi': {'layout': 'openi'}, 'mimic_cxr': {'workers': 1}, 'folder': {'patient': r'(p\d+)_'}}

def build(case, root):
    CASES[case](root)
    return root

def load(case, root, bad='raise'):
    options = _OPTIONS.get(case, {}) | ({'index': root/'.index'} if case == 'mimic_cxr' else {})
    return load_dataset(_NAMES.get(case, case), root, bad=bad, **options)

def pictures(case, root):
    "All picture files of a data set, those of single studies first."
    return sorted(p for p in root.rglob('*') if p.suffix in ('.png', '.jpg', '.dcm') and '.index' not in p.parts)

def pack_reports(root, members):
    "iu_openi: reports as an archive with the given extra (TarInfo, bytes)."
    import io
    with tarfile.open(root/'iu_xray/NLMCXR_reports.tgz', 'w:gz') as tar:
        tar.add(root/'iu_xray/ecgen-radiology', 'ecgen-radiology')
        for info, raw in members: info.size = len(raw); tar.addfile(info, io.BytesIO(raw))
