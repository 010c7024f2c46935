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
    names = ([l.split(':')[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name')]
             if Path('/proc/cpuinfo').is_file() else [])
    return {'cpu': names[0] if names else platform.processor(), 'cpus': os.cpu_count(), 'threads': torch.get_num_threads(),
            'torch': torch.__version__, 'python': platform.python_version()}


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


def mini_gk(studies: int) -> tuple:
    "(model configuration, training configuration, tokenizer, training set) of `gk` as the preset mini pre-trains it, on so many phantoms."
    from dataclasses import asdict, replace

    from gk_mvlp.config import load_preset
    from gk_mvlp.data.phantom import PhantomConfig, load_phantom
    from gk_mvlp.models.detector import DetectorConfig, RegionDetector
    from gk_mvlp.study.experiments import corpus_tokenizer, pretrain_configs, study_set
    settings = asdict(load_preset('mini'))
    config, train, strength = pretrain_configs(settings, 'gk', 0)
    data = load_phantom(PhantomConfig(**settings['data'] | {'n': studies}), progress=False)
    tokenizer = corpus_tokenizer(data, config)
    part = study_set(data, 'train', tokenizer, RegionDetector(DetectorConfig(image_size=config.image_size)), config, strength, 0)
    return replace(config, detector_dim=part.fields['region_features'].shape[-1]), train, tokenizer, part
