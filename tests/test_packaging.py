"""What is in the tree is in the wheel and in the editable install, under `kvcompile` only."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("policies", "kernels", "conf", "recipes")
FILES = ("pyproject.toml", "README.md", "LICENSE")


def shipped() -> set[str]:
    """Every Python, YAML and C++ file of the tree, and of the page, by its place in the installed package."""
    found = {"kvcompile/py.typed"}
    for top in ("kvcompile", *MAPPED):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".yaml", ".h", ".html", ".css", ".js"):
                inside = path.relative_to(ROOT).as_posix()
                found.add(inside if top == "kvcompile" else f"kvcompile/{inside}")
    return found


def run(code: str, where: Path, path: Path | None = None) -> str:
    environment = {**os.environ, "PYTHONPATH": str(path)} if path else dict(os.environ)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOOK = """
import importlib.util, json, kvcompile.policies, kvcompile.kernels
from kvcompile.config.compose import compose
from kvcompile.stack import discover
print(json.dumps({
    "home": kvcompile.__file__,
    "policies": sorted(discover()),
    "stack": list(compose(["recipe=snapkv"]).stack),
    "leaks": [n for n in ("policies", "kernels", "conf", "recipes") if importlib.util.find_spec(n)],
}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, so that nothing stale is in it and nothing is left behind."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for top in ("kvcompile", *MAPPED):
        shutil.copytree(ROOT / top, source / top, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "-w", str(place), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = place.glob("*.whl")
    return built


def test_the_wheel_holds_the_whole_tree_and_nothing_else(wheel: Path) -> None:
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert names == shipped()


def test_the_wheel_has_the_command_and_the_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "kvcompile = kvcompile.cli:main" in archive.read(entry).decode()
    assert any(n.endswith("licenses/LICENSE") for n in archive.namelist())


def test_the_wheel_works_away_from_the_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    seen = json.loads(run(LOOK, tmp_path, tmp_path / "site"))
    assert Path(seen["home"]) == tmp_path / "site" / "kvcompile" / "__init__.py"
    assert seen["stack"] == ["snapkv"]
    assert "snapkv" in seen["policies"]
    assert seen["leaks"] == []


def test_the_editable_install_works_away_from_the_tree(tmp_path: Path) -> None:
    direct = json.loads(distribution("kvcompile").read_text("direct_url.json") or "{}")
    if not direct.get("dir_info", {}).get("editable"):
        pytest.skip("kvcompile is not installed editable here")
    seen = json.loads(run(LOOK, tmp_path))
    assert Path(seen["home"]) == ROOT / "kvcompile" / "__init__.py"
    assert seen["stack"] == ["snapkv"]
    assert seen["leaks"] == []


def test_importing_kvcompile_does_nothing(tmp_path: Path) -> None:
    code = "import sys; before = set(sys.modules); import kvcompile; print(sorted(set(sys.modules) - before))"
    loaded = run(code, tmp_path)
    assert "torch" not in loaded
    assert "hydra" not in loaded


def test_public_names_are_declared() -> None:
    import kvcompile

    assert kvcompile.__version__ == distribution("kvcompile").version
    assert set(dir(kvcompile)) >= {"compile", "load", "from_pretrained", "KvcompileError"}
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = kvcompile.nope  # type: ignore[attr-defined]


def test_the_top_level_kernels_package_holds_a_docstring_only() -> None:
    import ast

    body = ast.parse((ROOT / "kernels" / "__init__.py").read_text("utf-8")).body
    assert [type(node).__name__ for node in body] == ["Expr"], "transformers imports a package called kernels"


def test_no_config_names_code_to_run() -> None:
    found = [p.name for top in ("conf", "recipes") for p in (ROOT / top).rglob("*.yaml") if "_target_" in p.read_text()]
    assert found == ["config.yaml"], "only Hydra's own callback may"
    text = (ROOT / "conf" / "config.yaml").read_text("utf-8")
    assert text.count("_target_") == text.count("_target_: kvcompile.config.sweep.SweepFolder") == 1
