"""The house rules that a tool does not hold: who imports whom, and what is said where."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from sherl_pipe.pipeline.config import RunConfig, read_config

ROOT = Path(__file__).parent.parent
FOLDERS = ("cache", "stages", "pipeline")
WORKERS = {ROOT / "pipeline" / f"workers{end}.py" for end in ("", "_tune", "_train")}


def code(*folders: str) -> list[Path]:
    found = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert found
    return found


def imports(source: str) -> Iterator[str]:
    """Full names of everything that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import would hide its target; design.md wants absolute ones.
            assert node.level == 0, f"relative import in line {node.lineno}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def below(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_imports_are_found_wherever_they_hide() -> None:
    source = "import a.b\nfrom sherl_pipe import pipeline\ndef f():\n  from ray.tune import run\n"
    found = list(imports(source))
    assert found == ["a.b", "sherl_pipe.pipeline", "ray.tune.run"]
    assert below("ray.tune.run", "ray") and not below("rays", "ray")
    with pytest.raises(AssertionError, match="relative"):
        list(imports("from . import b"))


@pytest.mark.parametrize("file", code("cache"), ids=lambda file: file.name)
def test_cache_needs_numpy_and_zarr_only(file: Path) -> None:
    allowed = (*sys.stdlib_module_names, "numpy", "zarr", "numcodecs", "sherl_pipe.cache")
    source = file.read_text()
    foreign = [name for name in imports(source) if not below(name, *allowed)]
    if file.name == "connect.py":
        # The way to object stores, for whoever names one: inside functions, never at the top.
        top = [
            node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert all(below(n, *allowed) for node in top for n in imports(ast.unparse(node)))
        assert {name.split(".")[0] for name in foreign} == {"obstore", "botocore"}
    else:
        assert foreign == []


@pytest.mark.parametrize("file", code("stages"), ids=lambda file: file.stem)
def test_stages_know_no_command_line(file: Path) -> None:
    forbidden = ("ray", "click", "rich", "sherl_pipe.pipeline")
    assert [name for name in imports(file.read_text()) if below(name, *forbidden)] == []


def test_only_workers_import_ray() -> None:
    files = [file for file in code(*FOLDERS) if file not in WORKERS]
    assert [file for file in files if any(below(n, "ray") for n in imports(file.read_text()))] == []


def test_nobody_imports_the_workers_before_they_are_asked_for() -> None:
    """An import of Ray takes seconds and starts nothing on most runs."""
    for file in set(code(*FOLDERS)) - WORKERS:
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.stmt)]
        lines = [ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("workers" in line for line in lines), file


HELP = """
import json, sys
before = set(sys.modules)
from sherl_pipe.pipeline import cli, entry
codes = []
for command in ([], *([name] for name in cli.cli.commands)):
    sys.argv = ["sherl-pipe", *command, "--help"]
    codes.append(entry.run())
new = {name.split(".")[0] for name in set(sys.modules) - before}
print(json.dumps([codes, sorted(new - set(sys.stdlib_module_names))]), file=sys.stderr)
"""


def test_help_imports_click_alone() -> None:
    """What keeps `--help` under half a second, for every command."""
    run = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    codes, modules = json.loads(run.stderr)
    assert len(codes) == 10 and not any(codes)
    assert set(modules) <= {"click", "sherl_pipe"}
    for command in (
        "extract",
        "plan",
        "tune",
        "predict",
        "inspect",
        "verify",
        "label",
        "run",
        "sweep",
    ):
        assert f"sherl-pipe {command} [OPTIONS]" in run.stdout


def test_console_script_is_installed() -> None:
    script = Path(sys.executable).with_name("sherl-pipe")
    run = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert version in run.stdout


def test_example_config_names_every_key() -> None:
    file = ROOT / "pipeline.yaml"
    values = read_config(file).model_dump()
    assert values["tune"] == RunConfig().model_dump()["tune"]

    def same_keys(values: dict[str, object], model: type[BaseModel]) -> None:
        assert list(values) == list(model.model_fields)
        for key, value in values.items():
            kind = model.model_fields[key].annotation
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                assert isinstance(value, dict)
                same_keys(value, kind)

    same_keys(yaml.safe_load(file.read_text()), RunConfig)


@pytest.mark.parametrize("file", code(*FOLDERS), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_library_code_is_quiet_and_at_home_anywhere(file: Path) -> None:
    source = file.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id != "print", f"print in line {node.lineno}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"bare except in line {node.lineno}"
    assert not re.search(r"""(?<![\w.])/(work|tmp|home|root)\b""", source)


def test_packages_are_all_folders_with_code() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = sorted(
        {file.parent.relative_to(ROOT) for file in code(*FOLDERS)}, key=lambda path: path.parts
    )
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)
    names = {".".join(["sherl_pipe", *folder.parts]): str(folder) for folder in folders}
    assert sorted(tool["packages"]) == sorted(names)
    assert tool["package-dir"] == names
    for package, patterns in tool["package-data"].items():
        if "py.typed" in patterns:
            assert (ROOT / names[package] / "py.typed").is_file()
