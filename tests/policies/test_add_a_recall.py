"""The package on the page about attending to a part, installed as it stands there, passes the contract by one row."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "attend-to-a-part.md").read_text("utf-8")
MODULE, _ = re.findall(r"```python\n(.*?)```", PAGE, re.S)
(PROJECT,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
(ROW,) = re.findall(r'`"mean_pages": (Row\(.*?\))`', PAGE)

RUN = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import contract_recall
from contract_recall import Row
contract_recall.TABLE["mean_pages"] = {row}
import test_contract_recall as contract

for beside in ("alone", "kivi"):
    contract.test_a_budget_of_everything_is_the_stack_without_it("mean_pages", beside, "gemma2")
    contract.test_bytes_are_the_planned_ones("mean_pages", beside, "llama")
    contract.test_what_is_read_is_sinks_budget_and_recent("mean_pages", beside)
contract.test_a_small_budget_is_another_model("mean_pages", "snapkv")
contract.test_forks_go_their_own_way("mean_pages", "paged")
contract.test_what_is_loaded_is_what_was_saved("mean_pages", "alone", Path("saved"))
layer = contract_recall.model_of("mean_pages").kvcompile.plan.layers[1]
print(layer.recall.policy, layer.recall.grouping)
"""


def installed(folder: Path) -> Path:
    """The two files, as pip would leave them."""
    project = tomllib.loads(PROJECT)["project"]
    info = folder / f"kvcompile_mean_pages-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, points),) = project["entry-points"].items()
    (info / "entry_points.txt").write_text("\n".join((f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))))
    (folder / "mean_pages.py").write_text(MODULE, "utf-8")
    return folder


def test_the_package_of_the_page(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN.format(tests=str(ROOT / "tests"), row=ROW)],
        env={**os.environ, "PYTHONPATH": str(installed(tmp_path / "site")), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "mean_pages Means(page=4)"
