"""One pre-training step at paper size on a GPU: images a second, memory and model FLOPs utilisation (MFU) at growing batches.

`gk` and `itc_itm_lm` in bf16, forward, backward and AdamW, as `pretrain_step` builds them; the batch doubles until the memory is full.
MFU counts three forward passes' worth of FLOPs a sample (docs/scaling.md) against the card's peak in dense bf16: from its data sheet
(`PEAK`) or `--peak TFLOPS`. `matmul_tflops` is what one large product reaches there in the same run, which no model can beat.
`--compile` times the model under `torch.compile` as well. Without a GPU nothing is measured, and earlier results stay.
"""
import argparse
import sys
import time

import torch
from common import write
from costs import counted
from pretrain_step import ours

# dense bf16, in TFLOP/s, from NVIDIA's data sheets; the first name that occurs in the card's counts
PEAK = {'H200': 989, 'H100 PCIe': 756, 'H100': 989, 'A100': 312, 'A40': 150, 'L40S': 362, 'L40': 181, 'L4': 121, 'A10G': 70, 'A10': 125,
        'RTX 4090': 165, 'RTX 3090': 71}
WARMUP, STEPS = 3, 10


def seconds(f, device: str, steps: int) -> float:
    "Mean seconds of `f` over `steps` calls after a warm-up, with everything on the device done."
    wait = torch.cuda.synchronize if device == 'cuda' else lambda: None
    for _ in range(min(WARMUP, steps)): f()
    wait(); start = time.perf_counter()
    for _ in range(steps): f()
    wait()
    return (time.perf_counter() - start) / steps


def matmul_tflops(device: str, n: int, steps: int) -> float:
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / seconds(lambda: a @ b, device, steps) / 1e12


def measure(objective: str, n: int, device: str, steps: int, compiled: bool = False) -> dict[str, float]:
    "images_per_s, gflops of a step per sample, and the peak of the device's memory in GB, with a batch of `n`."
    torch.manual_seed(0)
    model, loss = ours(objective, n, device)
    with torch.autocast(device, torch.bfloat16): flops = counted(loss).get_total_flops()
    if compiled: model.forward = torch.compile(model.forward)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-5, fused=True)
    def step():
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16): value = loss()
        value.backward(); optimizer.step()
    if device == 'cuda': torch.cuda.reset_peak_memory_stats()
    rate = n / seconds(step, device, steps)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device == 'cuda' else float('nan')
    return {'images_per_s': rate, 'gflops': 3 * flops / n / 1e9, 'peak_gb': peak}


def main(argv: list[str]) -> int:
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--device', default='cuda'); p.add_argument('--peak', type=float, help='TFLOP/s of the card in dense bf16')
    p.add_argument('--batches', type=int, nargs='*', default=[32, 64, 128, 256, 512]); p.add_argument('--steps', type=int, default=STEPS)
    p.add_argument('--compile', action='store_true'); args = p.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        print('no GPU here: nothing measured')
        return 0
    card = torch.cuda.get_device_name() if args.device == 'cuda' else args.device
    peak = args.peak or next((v for k, v in PEAK.items() if k in card), None)
    top = matmul_tflops(args.device, 8192 if args.device == 'cuda' else 512, args.steps)
    out = {'gpu': card, 'matmul_tflops': top} | ({'peak_tflops': peak} if peak else {})
    print(f'{card}: {top:.0f} TFLOP/s in one product; peak {peak or "unknown: give it with --peak"}', flush=True)
    for name, compiled in [('gk', False), ('itc_itm_lm', False), *([('gk', True)] if args.compile else [])]:
        tag, best = name + ('_compiled' if compiled else ''), None
        for n in args.batches:
            try: m = measure(name, n, args.device, args.steps, compiled)
            except torch.cuda.OutOfMemoryError:
                print(f'{tag}, batch {n}: the memory is full', flush=True); break
            finally:
                if args.device == 'cuda': torch.cuda.empty_cache()
            print(f'{tag}, batch {n}: {m["images_per_s"]:.1f} images/s, {m["peak_gb"]:.1f} GB', flush=True)
            if best is None or m['images_per_s'] > best['images_per_s']: best = m | {'batch': n}
        if best is None: continue
        reached = best['images_per_s'] * best['gflops'] / 1e3
        out |= {f'{tag}_{k}': v for k, v in best.items()} | {f'{tag}_tflops': reached}
        if peak: out[f'{tag}_mfu_percent'] = 100 * reached / peak
    if 'gk_images_per_s' in out and 'itc_itm_lm_images_per_s' in out:
        out['gk_overhead_percent'] = 100 * (out['itc_itm_lm_images_per_s'] / out['gk_images_per_s'] - 1)
    if args.device == 'cuda': write('gpu_step', out)
    return 0


if __name__ == '__main__': sys.exit(main(sys.argv[1:]))
