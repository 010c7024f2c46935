"""Training on a CPU at mini size: ways of attention, layouts of the CNN stem, and the whole `gk` step with either, forwards and
backwards in bf16.

Attention over the patches of 32 pictures (no mask) and over the tokens of 32 reports (padding masked): PyTorch's fused kernel, its
unfused one as it comes (bf16 computed in float32) and told to stay in bf16, and the formula
(`plain_attention`), which training uses. The ways take turns; medians count.
"""
import argparse
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from common import in_turn, mini_gk, write
from torch.nn.attention import SDPBackend, sdpa_kernel

from gk_mvlp.models.gk_mvlp import GKMVLP
from gk_mvlp.training.trainer import attention_backend

BATCH = 32


@contextmanager
def unfused(bf16: bool):
    "PyTorch's unfused kernel, in bf16 or, as it comes, in float32."
    was = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(bf16)
    try:
        with sdpa_kernel(SDPBackend.MATH): yield
    finally: torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(was)


WAYS = {'fused': partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION), 'unfused': partial(unfused, False),
        'unfused_bf16': partial(unfused, True), 'formula': partial(attention_backend, 'cpu')}


def attention(way, tensors, mask) -> None:
    with way(): F.scaled_dot_product_attention(*tensors, attn_mask=mask).sum().backward()


def attention_ms(tokens: int, heads: int, width: int, padded: bool, rounds: int) -> dict[str, float]:
    "Milliseconds of attention, forwards and backwards, by way."
    g = torch.Generator().manual_seed(0)
    tensors = [torch.randn(BATCH, heads, tokens, width, generator=g).bfloat16().requires_grad_() for _ in range(3)]
    mask = (torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (BATCH, 1, 1, 1), generator=g)) if padded else None
    return {k: 1e3 * s for k, s in in_turn({k: partial(attention, way, tensors, mask) for k, way in WAYS.items()}, rounds, 3).items()}


def step(model, batch, way) -> None:
    model.zero_grad()
    with way(), torch.autocast('cpu', torch.bfloat16): loss = model(batch)['loss']
    loss.backward()


def stem(model, images, layout) -> None:
    with torch.autocast('cpu', torch.bfloat16): v = model.image_encoder.vit.patch_embed(images.to(memory_format=layout))
    v.float().sum().backward()


def main(rounds: int) -> None:
    torch.manual_seed(0)
    config, _, tokenizer, part = mini_gk(120)
    model, batch = GKMVLP(config, tokenizer).train(), part[list(range(BATCH))]
    vit = model.image_encoder.vit
    heads, width = vit.blocks[0].attn.num_heads, vit.embed_dim // vit.blocks[0].attn.num_heads
    sizes = {'patches': (vit.patch_embed.num_patches + 1, False), 'reports': (batch['input_ids'].shape[1], True)}
    times = {name: attention_ms(tokens, heads, width, padded, 5 * rounds) for name, (tokens, padded) in sizes.items()}
    layouts = in_turn({k: partial(stem, model, batch['images'], v)
                       for k, v in (('channels_last', torch.channels_last), ('channels_first', torch.contiguous_format))}, rounds)
    times['step'] = {k: 1e3 * s for k, s in in_turn({k: partial(step, model, batch, way) for k, way in WAYS.items()}, rounds).items()}
    out = {f'{k}_{name}_ms': v for name, t in times.items() for k, v in t.items()} | {f'stem_{k}_ms': 1e3 * s for k, s in layouts.items()}
    out |= {f'ratio_{k}_to_formula_{name}': v / t['formula'] for name, t in times.items() for k, v in t.items() if k != 'formula'}
    write('attention', out | {'ratio_stem_channels_last_to_first': layouts['channels_last'] / layouts['channels_first'], 'batch': BATCH,
                              'heads': heads, 'width': width, 'rounds': rounds})


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=20)
    main(p.parse_args().rounds)
