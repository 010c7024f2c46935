"Execute the library notebooks in place (outputs are committed, so that they can be read without running), then clean them."
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

root = Path(__file__).resolve().parents[1]
chosen = ([Path(a).resolve() for a in sys.argv[1:]]
          or sorted(p for p in (root/'nbs').rglob('*.ipynb') if p.parent.name not in ('experiments', 'paper')))
for path in chosen:
    nb = nbformat.read(path, as_version=4)
    print(path.relative_to(root), flush=True)
    NotebookClient(nb, timeout=600, kernel_name='python3', resources={'metadata': {'path': str(path.parent)}}).execute()
    for cell in nb.cells:                                         # progress bars and loading notes say nothing to a reader
        if 'outputs' in cell:
            cell.outputs = [o for o in cell.outputs
                            if not (o.get('name') == 'stderr'
                                    and ('\r' in o.text or 'it/s' in o.text or '[transformers]' in o.text or 'IProgress' in o.text
                                         or not o.text.strip()))]
    nb.metadata = {'kernelspec': {'display_name': 'python3', 'language': 'python', 'name': 'python3'}}
    nbformat.write(nb, path)
subprocess.run([str(root/'.venv/bin/nbdev_clean')], cwd=root, check=True)
