"""What a pre-training sample costs at paper size, counted and not timed: parameters and FLOPs by part, and the memory of weights,
gradients and AdamW's moments.

FLOPs are those of matrix products, convolutions and attention (`torch.utils.flop_counter`), two per multiplication with addition, of one
forward pass in training mode without dropout's effect; a backward pass costs twice as much. The knowledge encoder is frozen: its texts
were encoded when the model was made, and prompts cost nothing. Region features are given, as they are cached in training. open_clip's
CoCa of the same size (`pretrain_step`) stands beside it.
"""
import torch
from common import write
from pretrain_step import BATCH, TOKENS, coca, ours
from torch.utils.flop_counter import FlopCounterMode


def counted(step) -> FlopCounterMode:
    "The FLOPs of a forward pass."
    with torch.no_grad(), FlopCounterMode(display=False, depth=2) as counter: step()
    return counter


def main() -> None:
    torch.manual_seed(0)
    model, step = ours('gk')
    counter = counted(step)
    flops = {k.split('.', 1)[1]: sum(v.values()) for k, v in counter.get_flop_counts().items() if k.count('.') == 1}
    total, out = sum(counter.get_flop_counts()['Global'].values()), {}
    for name, part in model.named_children():
        n = sum(p.numel() for p in part.parameters())
        if n < 1e6 and flops.get(name, 0) < 1e8 * BATCH: continue
        out[f'parameters_m_{name}'], out[f'forward_gflops_{name}'] = n / 1e6, flops.get(name, 0) / BATCH / 1e9
    out['forward_gflops_elsewhere'] = total / BATCH / 1e9 - sum(v for k, v in out.items() if k.startswith('forward'))
    every, trained = (sum(p.numel() for p in model.parameters() if f(p)) for f in (lambda p: True, lambda p: p.requires_grad))
    try: beside = {'coca_forward_gflops': counted(coca()[1]).get_total_flops() / BATCH / 1e9}
    except ImportError: beside = {}                                # open_clip is not installed
    write('costs', out | beside | {'forward_gflops': total / BATCH / 1e9, 'step_gflops': 3 * total / BATCH / 1e9,
                                   'parameters_m': every / 1e6, 'trained_parameters_m': trained / 1e6,
                          'weights_gb': every * 4 / 2**30, 'gradients_and_moments_gb': trained * 12 / 2**30, 'tokens': TOKENS,
                          'batch': BATCH})


if __name__ == '__main__': main()
