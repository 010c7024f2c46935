"""Beam-4 generation of 60 tokens by the paper-size decoder, batch 8: ours beside transformers' own encoder-decoder generation with
cache, and beside the same search without any cache.

All three hold the same weights and attend to the same visual memory (197 patches and 29 regions), and must write the same tokens. Every
text runs to its full length. The search without a cache may be cut off after `--limit` seconds; `uncached_tokens` then says how far it
came, and `ratio_to_uncached` is a lower bound.
"""
import argparse

import torch
from common import in_turn, write
from transformers import BertConfig, BertModel, EncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

from gk_mvlp.models.multimodal import ReportDecoder

BATCH, TOKENS, BEAMS, MEMORY, DIM, DEPTH, HEADS, VOCAB = 8, 60, 4, 197 + 29, 768, 6, 12, 31090     # the vocabulary is SciBERT's


@torch.no_grad()
def main(rounds: int, limit: float | None) -> None:
    torch.manual_seed(0)
    net = ReportDecoder(VOCAB, DIM, DEPTH, HEADS, TOKENS + 4).eval()
    memory, mask = torch.randn(BATCH, MEMORY, DIM), torch.ones(BATCH, MEMORY, dtype=torch.bool)
    # never run: its output is given
    encoder = BertModel(BertConfig(vocab_size=8, hidden_size=DIM, num_hidden_layers=1, num_attention_heads=HEADS))
    peer = EncoderDecoderModel(encoder=encoder, decoder=net.lm).eval()
    start, out = torch.full((BATCH, 1), net.bos), {}
    def ours(n=TOKENS): out['ours'] = net.generate(memory, mask, n, BEAMS, min_new_tokens=n)
    def transformers(n=TOKENS):
        out['transformers'] = peer.generate(encoder_outputs=BaseModelOutput(memory.clone()), attention_mask=mask.long(),
                                            decoder_input_ids=start, max_new_tokens=n, min_new_tokens=n,
                                            num_beams=BEAMS, do_sample=False, pad_token_id=net.pad, eos_token_id=net.eos,
                                            decoder_start_token_id=net.bos)
    def uncached(n=TOKENS, limit=limit):
        out['uncached'] = net.lm.generate(input_ids=start, attention_mask=torch.ones_like(start), encoder_hidden_states=memory,
                                          encoder_attention_mask=mask.long(), use_cache=False, max_new_tokens=n,
                                          min_new_tokens=n, num_beams=BEAMS, do_sample=False, pad_token_id=net.pad, eos_token_id=net.eos,
                                          max_time=limit)
    ours(2); transformers(2); uncached(2, None)                   # warm-up, and a first comparison
    assert torch.equal(out['ours'], out['transformers']) and torch.equal(out['ours'], out['uncached']), 'not the same tokens'
    t = in_turn({'ours': ours, 'transformers': transformers}, rounds, warmup=0)
    assert torch.equal(out['ours'], out['transformers']), 'not the same tokens'
    t |= in_turn({'uncached': uncached}, 1, warmup=0)
    write('generation', {'ratio_to_transformers': t['transformers'] / t['ours'], 'ratio_to_uncached': t['uncached'] / t['ours'],
                         **{f'{k}_s': v for k, v in t.items()},
                         'uncached_tokens': out['uncached'].shape[1] - 1, 'batch': BATCH, 'tokens': TOKENS, 'beams': BEAMS,
                         'rounds': rounds})


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--rounds', type=int, default=3)
    p.add_argument('--limit', type=float, help='seconds for the search without a cache; none: to its end')
    a = p.parse_args(); main(a.rounds, a.limit)
