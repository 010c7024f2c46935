"""Studies a second of the phantom on one core: picture, boxes, relations, report and questions, at 128 and 512 pixels.

`studies_per_s_*` is by the clock of the processor (time spent in this process), fastest of several rounds: that of a core that does
nothing else, apart from caches and memory shared with others; `_wall` is by the clock on the
wall, with whatever else the machine did (`load_average`).
"""
import os
import time

ROUNDS, SECONDS = 7, 2.


def measure(size: int) -> tuple[float, float]:
    "(studies a second of processor time, of wall time), each the best of ROUNDS."
    from gk_mvlp.data.phantom import PhantomConfig, make_study
    config = PhantomConfig(n=4000, size=size, seed=1)
    make_study(config, 0)                         # tables that are made once
    n, best = max(12, int(SECONDS * (100 if size < 300 else 12))), [0., 0.]
    for r in range(ROUNDS):                       # the same studies in every round
        cpu, wall = time.process_time(), time.perf_counter()
        for i in range(n): make_study(config, i)
        best = [max(b, n / (clock() - start))
                for b, clock, start in zip(best, (time.process_time, time.perf_counter), (cpu, wall), strict=True)]
        print(f'{size} px, round {r + 1}: {best[0]:.1f}/s', flush=True)
    return best[0], best[1]


def main() -> None:
    from common import write
    result = {}
    for size in (128, 512): result[f'studies_per_s_{size}'], result[f'studies_per_s_{size}_wall'] = measure(size)
    write('phantom', result | {'rounds': ROUNDS, 'load_average': os.getloadavg()[0]})


if __name__ == '__main__': main()
