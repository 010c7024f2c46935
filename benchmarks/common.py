"What the benchmarks share: where results go, and what they say of the machine."
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

RESULTS = Path(__file__).parent/'results'


def machine() -> dict:
    "The hardware and versions a figure belongs to; figures of different machines are not comparable, ratios are."
    import torch
    names = [l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')] if Path('/proc/cpuinfo').is_file() else []
    return {'cpu': names[0] if names else platform.processor(), 'cpus': os.cpu_count(), 'threads': torch.get_num_threads(), 'torch': torch.__version__, 'python': platform.python_version()}


def in_turn(functions: dict, # name -> function
            rounds: int, warmup: int = 1) -> dict[str, float]:
    "Median seconds of each function; they run one after the other in every round, so that a busy machine slows all alike."
    seen = {name: [] for name in functions}
    for r in range(warmup + rounds):
        for name, f in functions.items():
            start = time.perf_counter(); f()
            if r >= warmup: seen[name].append(time.perf_counter() - start)
    return {name: statistics.median(v) for name, v in seen.items()}


def write(name: str, result: dict) -> None:
    "results/<name>.json, flat, with the machine and how busy it was in the last minutes, and the same as lines on the screen."
    result = {**result, **{f'load_average_{m}_min': round(v, 2) for m, v in zip((1, 5, 15), os.getloadavg(), strict=True)}}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS/f'{name}.json').write_text(json.dumps({**result, **machine()}, indent=1) + '\n', encoding='utf-8')
    for k, v in result.items(): print(f'{k:32} {v:.3g}' if isinstance(v, float) else f'{k:32} {v}')
    sys.stdout.flush()
