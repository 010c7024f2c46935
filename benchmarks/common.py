"What the benchmarks share: where results go, and what they say of the machine."
import json
import os
import platform
import sys
from pathlib import Path

RESULTS = Path(__file__).parent/'results'


def machine() -> dict:
    "The hardware and versions a figure belongs to; figures of different machines are not comparable, ratios are."
    import torch
    names = [l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')] if Path('/proc/cpuinfo').is_file() else []
    return {'cpu': names[0] if names else platform.processor(), 'cpus': os.cpu_count(), 'threads': torch.get_num_threads(), 'torch': torch.__version__, 'python': platform.python_version()}


def write(name: str, result: dict) -> None:
    "results/<name>.json, flat, and the same as lines on the screen."
    RESULTS.mkdir(exist_ok=True)
    (RESULTS/f'{name}.json').write_text(json.dumps({**result, **machine()}, indent=1) + '\n', encoding='utf-8')
    for k, v in result.items(): print(f'{k:32} {v:.3g}' if isinstance(v, float) else f'{k:32} {v}')
    sys.stdout.flush()
