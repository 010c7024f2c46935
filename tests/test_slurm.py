"The smoke study on a real Slurm, through Snakemake's executor: a cancelled job fails the study, the same command then finishes it."
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gk_mvlp.config import load_preset
from gk_mvlp.study.launch import snakemake_command, study_jobs

HERE = Path(__file__).parent
PROFILE = """executor: slurm
jobs: 3
latency-wait: 20
slurm-no-account: true
slurm-status-command: squeue
slurm-init-seconds-before-status-checks: 3
default-resources: {slurm_partition: gpu, runtime: 30, mem_mb: 2500, cpus_per_task: 1}
set-threads: {detector: 2}
"""


@pytest.fixture
def slurm(tmp_path):
    "A running cluster of this machine; its environment."
    missing = [p for p in ('slurmctld', 'slurmd', 'sbatch', 'munged') if not shutil.which(p)]
    if missing: pytest.skip(f'no {missing[0]}: install slurmctld, slurmd, slurm-client and munge')
    if os.geteuid(): pytest.skip('starting slurmctld and slurmd needs root')
    folder = tmp_path/'slurm'
    r = subprocess.run(['bash', str(HERE/'slurm/cluster.sh'), 'start', str(folder)], capture_output=True, text=True)
    if r.returncode: pytest.skip(f'Slurm does not start here: {" ".join(r.stderr.split())[:300]}')
    yield os.environ | {'SLURM_CONF': str(folder/'slurm.conf'), 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}',
                        'GK_MVLP_OUT': str(tmp_path/'out')}
    subprocess.run(['bash', str(HERE/'slurm/cluster.sh'), 'stop', str(folder)])


def queue(env) -> dict[str, str]:
    "{job: rule} of what runs."
    r = subprocess.run(['squeue', '-h', '-t', 'RUNNING', '-o', '%i %k'], capture_output=True, text=True, env=env, check=True)
    return dict(line.split(' ', 1) for line in r.stdout.splitlines())


def test_the_profile_of_the_repository_plans_a_study(tmp_path, root):
    "Without a cluster: the graph must not need what only local runs have, such as a number of cores."
    command = snakemake_command('smoke', '', str(tmp_path/'runs'), str(tmp_path/'results'), 2, dry_run=True,
                                profile=str(root/'profiles/slurm'))
    r = subprocess.run(command, capture_output=True, text=True,
                       env=os.environ | {'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'})
    assert r.returncode == 0, r.stderr[-2000:]


@pytest.mark.slow
def test_smoke_on_slurm(slurm, tmp_path):
    (tmp_path/'profile').mkdir(); (tmp_path/'profile/config.yaml').write_text(PROFILE)
    command = [sys.executable, '-m', 'gk_mvlp.cli', 'paper', '--preset', 'smoke', '--profile', str(tmp_path/'profile')]
    out = tmp_path/'out/runs/smoke'
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=slurm)
    end, cancelled = time.time() + 600, None
    while cancelled is None and p.poll() is None and time.time() < end:      # a pre-training that has begun
        cancelled = next((i for i, rule in queue(slurm).items() if 'pretrain' in rule and list(out.glob('pretrain/*/history.csv'))), None)
        time.sleep(.5)
    assert cancelled, p.communicate()[0]
    subprocess.run(['scancel', cancelled], env=slurm, check=True)
    said = p.communicate(timeout=1500)[0]
    assert p.returncode == 1 and 'smoke is not complete' in said, said
    done = {f.parent.relative_to(out).as_posix(): f.stat().st_mtime_ns for f in out.glob('**/metrics.json')}
    assert {'detector'} <= set(done) < set(study_jobs(load_preset('smoke'))), 'the others went on'
    r = subprocess.run(command, capture_output=True, text=True, env=slurm, timeout=1500)
    assert r.returncode == 0, r.stdout + r.stderr
    assert all((out/j/'metrics.json').is_file() for j in study_jobs(load_preset('smoke')))
    assert all((out/j/'metrics.json').stat().st_mtime_ns == t for j, t in done.items()), 'finished jobs were kept'
    assert json.loads((tmp_path/'out/paper_results/smoke/manifest.json').read_text())['runs']
