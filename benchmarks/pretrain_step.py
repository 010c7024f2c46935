"""One pre-training step at paper size on this machine: ours with and without GK, beside open_clip's CoCa.

ViT-B/16 at 224 px, 12-layer report encoder, 6-layer image-report encoder, 6-layer decoder, 60 tokens, batch 4, forward, backward and
optimizer. CoCa (ViT-B/16, 12 + 12 text layers) does ITC and LM only, which is less work. Each configuration runs in a process of its own
(so that its peak memory is its own), the configurations in turn, in several rounds; the fastest step of all rounds counts, and the load
averages of the machine are noted. All configurations run under the same allocator settings (`ALLOCATOR`). The detector's region features
are given, as they are cached in training, and the knowledge encoder is frozen, as `PAPER_SIZE` has it.
"""
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import nullcontext

BATCH, TOKENS, STEPS, ROUNDS = 4, 60, 3, 2
VOCAB = 31090                                     # of SciBERT
# glibc keeps freed memory: new pages cost a fifth of a step otherwise
ALLOCATOR = {'MALLOC_MMAP_THRESHOLD_': str(2**32), 'MALLOC_TRIM_THRESHOLD_': str(2**33)}


def tokenizer():
    "A vocabulary of SciBERT's size; only its size matters here."
    from gk_mvlp.data.knowledge import ENTITY_NAMES
    from gk_mvlp.models.encoders import SPECIAL_TOKENS, train_tokenizer
    from gk_mvlp.models.gk_mvlp import prompt_book
    tok = train_tokenizer([*prompt_book()[0], *ENTITY_NAMES], 1000)
    tok.add_tokens([f'w{i}' for i in range(VOCAB - len(tok))])
    assert len(tok) == VOCAB and tok.pad_token == SPECIAL_TOKENS['pad_token']
    return tok


def ours(objective: str, n: int = BATCH, device: str = 'cpu'):
    "(model, step function returning the loss) of our model at paper size, on `n` samples."
    import torch

    from gk_mvlp.data.knowledge import ENTITIES
    from gk_mvlp.models.gk_mvlp import GKMVLP, PAPER_SIZE, ModelConfig
    tok = tokenizer()
    config = ModelConfig(objective=objective, **PAPER_SIZE | dict(image_checkpoint='', text_encoder='', max_length=TOKENS))
    model = GKMVLP(config, tok).train().to(device)
    g = torch.Generator().manual_seed(0)
    xy = torch.rand(n, 29, 2, generator=g) * .5
    ids = torch.randint(10, VOCAB, (n, TOKENS), generator=g); ids[:, 0], ids[:, -1] = tok.cls_token_id, tok.sep_token_id
    batch = {'images': torch.randn(n, 1, 224, 224, generator=g), 'input_ids': ids, 'attention_mask': torch.ones_like(ids),
             'report_key': torch.arange(n), 'study_key': torch.arange(n),
             'region_boxes': torch.cat([xy, xy + .3], -1), 'region_valid': torch.ones(n, 29, dtype=torch.bool),
             'region_features': torch.randn(n, 29, config.detector_dim, generator=g),
             'entities': torch.randint(-1, 2, (n, len(ENTITIES)), generator=g).float(),
             'relations': torch.zeros(n, 29, len(ENTITIES))}
    batch = {k: v.to(device) for k, v in batch.items()}
    return model, lambda: model(batch)['loss']


def coca():
    "(model, step function) of open_clip's CoCa ViT-B/16 size with its own loss."
    import open_clip
    import torch
    from open_clip.loss import CoCaLoss
    config = open_clip.get_model_config('coca_ViT-B-32')
    config['vision_cfg']['patch_size'] = 16
    config.pop('custom_text', None)
    model = open_clip.coca_model.CoCa(**config).train()
    loss = CoCaLoss(caption_loss_weight=2., clip_loss_weight=1.)
    g = torch.Generator().manual_seed(0)
    images, texts = torch.randn(BATCH, 3, 224, 224, generator=g), torch.randint(1, 49000, (BATCH, TOKENS), generator=g)
    def step():
        out = model(images, texts)
        return sum(loss(**{k: out[k] for k in ('image_features', 'text_features', 'logits', 'labels', 'logit_scale')}))
    return model, step


def measure(name: str, bf16: bool) -> dict:
    "Seconds of the fastest step after a warm-up, and this process's peak memory."
    import torch

    from gk_mvlp.training.trainer import attention_backend
    torch.manual_seed(0)
    model, step = coca() if name == 'coca' else ours(name)
    opt, best = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, fused=True), float('inf')
    for i in range(STEPS + 1):
        start = time.perf_counter()
        opt.zero_grad()
        with attention_backend('cpu') if name != 'coca' else nullcontext(), torch.autocast('cpu', torch.bfloat16, enabled=bf16):
            loss = step()
        loss.backward(); opt.step()
        if i: best = min(best, time.perf_counter() - start)
    return {'seconds': best, 'peak_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            'parameters': sum(p.numel() for p in model.parameters())}


def main() -> None:
    names, seen, loads = ['gk', 'itc_itm_lm', 'coca'], {}, []
    for r in range(ROUNDS):
        for bf16 in (True, False):
            for name in list(names):
                p = subprocess.run([sys.executable, __file__, name, str(int(bf16))], capture_output=True, text=True,
                                   env={**os.environ, **ALLOCATOR})
                if p.returncode:
                    print(f'{name}: left out ({p.stderr.strip().splitlines()[-1]})', flush=True)
                    names.remove(name); continue
                loads.append(os.getloadavg()[0])
                m, key = json.loads(p.stdout.splitlines()[-1]), (name, bf16)
                print(f'round {r + 1}: {name} {"bf16" if bf16 else "fp32"} {BATCH / m["seconds"]:.2f} images/s, {m["peak_gb"]:.1f} GB',
                      flush=True)
                if key not in seen or m['seconds'] < seen[key]['seconds']: seen[key] = m
    from common import write
    out = {}
    for bf16, tail in ((True, ''), (False, '_fp32')):
        gk, base, other = (seen.get((n, bf16)) for n in ('gk', 'itc_itm_lm', 'coca'))
        out |= {f'ours_images_per_s{tail}': BATCH / gk['seconds'], f'ours_without_gk_images_per_s{tail}': BATCH / base['seconds'],
                f'ours_peak_gb{tail}': gk['peak_gb'],
                f'gk_overhead_percent{tail}': 100 * (gk['seconds'] / base['seconds'] - 1)}
        if other:
            out |= {f'coca_images_per_s{tail}': BATCH / other['seconds'], f'coca_peak_gb{tail}': other['peak_gb'],
                    f'ratio_to_coca{tail}': other['seconds'] / gk['seconds']}
    write('pretrain_step', out | {'parameters': seen['gk', True]['parameters'], 'load_average_low': min(loads),
                                  'load_average_high': max(loads)})


if __name__ == '__main__':
    if len(sys.argv) == 3: print(json.dumps(measure(sys.argv[1], bool(int(sys.argv[2])))))
    else: main()
