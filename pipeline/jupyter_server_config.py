"""Read by every Jupyter server of the project's environment: the project's notebooks are saved without outputs.

`make setup` links it into the environment. An output may hold private images, and git tracks the notebooks; nor must
running one change it. Executed copies are in `reports/executed`. Notebooks elsewhere are saved as they are.
"""

import json
import warnings
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
OF_ONE_RUN = ("execution", "ExecuteTime", "collapsed", "scrolled")


def save_without_outputs(*, model, path, contents_manager, **_):
    """Take out of a notebook that is about to be saved what running it has put in, in place."""
    place = Path(contents_manager.root_dir, path.strip("/")).resolve()
    if model["type"] != "notebook" or not model.get("content") or NOTEBOOKS not in place.parents:
        return
    content = model["content"]
    for cell in content["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
        for name in OF_ONE_RUN:
            cell["metadata"].pop(name, None)
    content["metadata"].pop("widgets", None)
    if place.exists():  # the names that this machine's kernel goes by are nothing to save
        before = json.loads(place.read_text(encoding="utf-8"))["metadata"]
        names = {name: before[name] for name in ("kernelspec", "language_info") if name in before}
        content["metadata"].update(names)


warnings.filterwarnings("ignore", "Overriding existing pre_save_hook")  # said even when it is set for the first time
c.ContentsManager.pre_save_hook = save_without_outputs  # noqa: F821 (Jupyter gives `c`)
