"A fork of the warm server must be, for whoever started it, the process that was asked for."
import gc
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gk_mvlp.study import warm

pytestmark = pytest.mark.skipif(not warm.usable(), reason='no server on this machine: it needs Linux with pidfd and no NVIDIA driver')

JOB = '''
import os, signal, subprocess, sys, time
what = sys.argv[1]
print('pid', os.getpid(), os.getcwd(), os.environ.get('MARK'), __name__, flush=True)
if what == 'exit': sys.exit(int(sys.argv[2]))
if what == 'raise': raise ValueError('a mistake')
if what == 'die': os.kill(os.getpid(), signal.SIGKILL)
if what == 'read': print('read', sys.stdin.readline().strip())
if what == 'child': print('child', subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True); time.sleep(600)
if what == 'wait':
    try: time.sleep(600)
    except KeyboardInterrupt: print('interrupted'); sys.exit(7)
'''


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "A server without preloaded modules (they take seconds and change nothing here), and a folder with a job."
    d = tmp_path_factory.mktemp('warm')
    (d/'gk_test_job.py').write_text(JOB)
    (d/'library').write_text('as it was')                     # other tests' work on the real one must not disturb these
    code = (f'from pathlib import Path; from gk_mvlp.study import warm; warm.PRELOAD = (); '
            f'warm.library_state = Path({str(d/"library")!r}).read_text; warm.serve({str(d/"s")!r})')
    server = subprocess.Popen([sys.executable, '-c', code], stdin=subprocess.PIPE)
    until = time.monotonic() + 60
    while not (d/'s').exists() and time.monotonic() < until: time.sleep(.05)
    yield d, {**os.environ, warm.ADDRESS: str(d/'s'), 'PYTHONPATH': f'{d}{os.pathsep}{Path(warm.__file__).parents[2]}', 'MARK': 'mine'}
    server.stdin.close()
    assert server.wait(timeout=20) == 0, 'a server ends with whoever started it'


def start(served, *argv, **options):
    d, env = served
    return subprocess.Popen(warm.client_command(['gk_test_job', *argv]), env=env, cwd=d, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **options)


def alive(pid: int) -> bool:
    try: return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except (FileNotFoundError, ProcessLookupError): return False


def gone(pid: int) -> bool:
    until = time.monotonic() + 20
    while alive(pid) and time.monotonic() < until: time.sleep(.05)
    return not alive(pid)


def test_streams_folder_environment_and_status_are_the_clients(served):
    p = start(served, 'exit', '5')
    out, err = p.communicate(timeout=60)
    assert p.returncode == 5 and err == ''
    _, pid, cwd, mark, name = out.split()
    assert (cwd, mark, name) == (str(served[0]), 'mine', '__main__') and int(pid) != p.pid
    p = start(served, 'read')
    assert p.communicate('a line\n', timeout=60)[0].endswith('read a line\n') and p.returncode == 0
    p = start(served, 'raise')
    out, err = p.communicate(timeout=60)
    assert p.returncode == 1 and 'ValueError: a mistake' in err


def test_a_fork_killed_by_a_signal_is_a_client_killed_by_it(served):
    p = start(served, 'die')
    p.communicate(timeout=60)
    assert p.returncode == -signal.SIGKILL


def test_signals_reach_the_fork(served):
    p = start(served, 'wait')
    p.stdout.readline(); time.sleep(.3)
    p.send_signal(signal.SIGINT)
    out, _ = p.communicate(timeout=60)
    assert p.returncode == 7 and 'interrupted' in out
    p = start(served, 'wait')
    p.stdout.readline(); p.send_signal(signal.SIGTERM)
    p.communicate(timeout=60)
    assert p.returncode == -signal.SIGTERM


def test_a_killed_client_takes_the_fork_and_its_children_along(served):
    p = start(served, 'child')
    pid, child = (int(p.stdout.readline().split()[1]) for _ in range(2))
    assert alive(pid) and alive(child)
    p.kill(); p.wait()
    assert gone(pid) and gone(child)


def test_an_orphaned_client_ends(served):
    "A kernel's client whose job was killed."
    d, env = served
    code = f'import subprocess, time; subprocess.Popen({warm.client_command(["gk_test_job", "wait"])!r}); time.sleep(600)'
    p = subprocess.Popen([sys.executable, '-c', code], env=env, cwd=d, stdout=subprocess.PIPE, text=True)
    pid = int(p.stdout.readline().split()[1])
    p.kill(); p.wait()
    assert gone(pid)


def test_without_a_server_or_with_a_changed_library_the_client_becomes_the_process(served, tmp_path):
    d, env = served
    for e in ({k: v for k, v in env.items() if k != warm.ADDRESS}, env | {warm.ADDRESS: str(tmp_path/'nobody')}):
        p = subprocess.Popen(warm.client_command(['gk_test_job', 'exit', '4']), env=e, cwd=d, stdout=subprocess.PIPE, text=True)
        out, _ = p.communicate(timeout=60)
        assert p.returncode == 4 and int(out.split()[1]) == p.pid, 'the same process'
    try:
        (d/'library').write_text('changed')
        p = start(served, 'exit', '4')
        assert int(p.communicate(timeout=60)[0].split()[1]) == p.pid
    finally: (d/'library').write_text('as it was')
    p = start(served, 'exit', '4')
    assert int(p.communicate(timeout=60)[0].split()[1]) != p.pid


def test_library_state_is_what_the_files_say(tmp_path, monkeypatch):
    for name in ('study/warm.py', 'models/gk.py'):
        (tmp_path/name).parent.mkdir()
        (tmp_path/name).write_text('x = 1\n')
    monkeypatch.setattr(warm, '__file__', str(tmp_path/'study/warm.py'))
    was = warm.library_state()
    os.utime(tmp_path/'models/gk.py', (1, 1))
    assert warm.library_state() == was, 'a file that was only written anew'
    (tmp_path/'models/gk.py').write_text('x = 2\n')
    assert warm.library_state() != was
    (tmp_path/'models/gk.py').unlink()
    assert len(warm.library_state()) == 1


def test_the_server_serves_on_after_nonsense(served):
    import socket
    d, env = served
    for said in (b'', b'\0\0\0\5', b'\0\0\0\5abcde'):
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(env[warm.ADDRESS]); s.send(said)
    p = start(served, 'exit', '0')
    p.communicate(timeout=60)
    assert p.returncode == 0


def test_what_is_preloaded_leaves_figures_to_the_kernel():
    "The inline backend configures the kernel that imports it first; imported in the server, it would leave every kernel without figures."
    code = (f"import importlib, sys; [importlib.import_module(m) for m in {warm.PRELOAD!r}]; assert 'matplotlib_inline.backend_inline' not "
            "in sys.modules; assert sys.modules['matplotlib.pyplot']._backend_mod is None")
    r = subprocess.run([sys.executable, '-c', code], env={**os.environ, 'MPLBACKEND': 'module://matplotlib_inline.backend_inline'},
                       capture_output=True, text=True)
    assert r.returncode == 0, r.stderr


@pytest.mark.parametrize('forked', [True, False])
def test_a_kernel_has_no_ports(served, tmp_path, monkeypatch, forked):
    """Two jobs that begin at once find the same free ports, and one kernel dies. A socket in a folder is nobody else's, and goes with
    the kernel."""
    import nbformat
    import papermill
    if forked: monkeypatch.setenv(warm.ADDRESS, served[1][warm.ADDRESS])
    else: monkeypatch.delenv(warm.ADDRESS, raising=False)
    cell = nbformat.v4.new_code_cell('import json, os\nfrom ipykernel.connect import '
                                     'get_connection_info\nprint(json.dumps([*map(json.loads(get_connection_info()).get, ("transport", '
                                     '"ip")), os.getppid()]))')
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path/'a.ipynb')
    out = papermill.execute_notebook(str(tmp_path/'a.ipynb'), str(tmp_path/'b.ipynb'), kernel_name='python3', language='python',
                                     progress_bar=False, **warm.kernel_options())
    transport, ip, parent = json.loads(out.cells[-1].outputs[0].text)
    assert transport == 'ipc' and Path(ip).parent.name.startswith('gk-mvlp-') and len(ip) < 90
    assert (parent != os.getpid()) == forked
    gc.collect()
    assert not Path(ip).parent.exists()
