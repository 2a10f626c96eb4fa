"""Which part may import which: the harness and the engine meet in `spdbench.backend` and in the command line only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = ("spdbench", "spdbench_backends")

BASE = {"types", "errors", "console", "processors", "input_files", "output_files", "chat_rows"}
ENGINE = {"models", "decoding", "pipeline"}
HARNESS = {"prompts", "measure", "judge", "render"}

MAY_IMPORT = {
    "version": set[str](),
    "types": set[str](),
    "errors": set[str](),
    "console": set[str](),
    "processors": set[str](),
    "input_files": {"errors"},
    "output_files": set[str](),
    "chat_rows": {"types", "errors", "input_files"},
    "hub": set[str](),
    "append_log": {"errors", "console", "input_files", "output_files"},
    "plugins": {"errors"},
    "backend": BASE | {"plugins"},
    "prompts": BASE | {"hub"},
    "profiles": BASE,
    "judge": BASE | {"profiles"},
    "render": BASE | {"judge"},
    "measure": BASE | {"version", "append_log", "backend", "prompts", "judge"},
    "models": BASE | {"hub"} | ENGINE,
    "decoding": BASE | {"profiles"} | ENGINE,
    "pipeline": BASE | {"profiles"} | ENGINE,
    "training": BASE | {"append_log", "plugins"} | ENGINE,
    "cli": BASE | {"version", "backend"} | HARNESS,
    "wiring": BASE
    | {"version", "append_log", "plugins", "backend", "cli", "profiles", "wiring", "training"}
    | HARNESS
    | ENGINE,
    "__main__": {"cli"},
    "spdbench_backends": BASE | {"backend", "profiles", "training"} | ENGINE,
}
"""Part -> the other parts that it may import; its own always."""

WIRING = (
    "spdbench.api",
    "spdbench.cli.setup",
    "spdbench.cli.env",
    "spdbench.cli.readiness",
    "spdbench.cli.ranks",
    "spdbench.cli.sweep",
    "spdbench.cli.run",
    "spdbench.cli.audit",
    "spdbench.cli.reading.report",
    "spdbench.cli.reading.trace",
    "spdbench.cli.reading.show",
    "spdbench.cli.reading.answers",
    "spdbench.cli.distill",
    "spdbench.cli.train",
    "spdbench.cli.evaluate",
    "spdbench.cli.project",
)
"""Where harness and engine are put together: the only modules and packages of commands that know models."""

NO_TORCH = BASE | {"version", "hub", "append_log", "plugins", "backend", "prompts", "profiles", "judge", "render"}
HEAVY = {"torch", "transformers"}


def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name."""
    found = {}
    for base, package in ((ROOT, "spdbench"), (ROOT / "backends", "spdbench_backends")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def part_of(module: str) -> str:
    if module.startswith(WIRING):
        return "wiring"
    package, *rest = module.split(".")
    if package != "spdbench":
        return package
    return rest[0] if rest else "version"


def imports(path: Path, module: str) -> Iterator[str]:
    """Modules that `path` imports at any depth of its code, but for those that only a type checker sees."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            todo += node.orelse
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else str(node.module)
        else:
            todo += ast.iter_child_nodes(node)


IMPORTS = {module: set(imports(path, module)) for module, path in MODULES.items()}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def test_there_is_something_to_check() -> None:
    assert {"spdbench.judge.results.schema", "spdbench.cli.main", "spdbench_backends.vanilla"} <= MODULES.keys()
    assert "spdbench.models.decoder" in IMPORTS["spdbench.models.target"]
    assert forbidden_imports(["spdbench.models.target"], lambda *_: True).keys() == {"spdbench.models.target"}


def forbidden_imports(modules: Iterable[str], forbidden: Callable[[str, str], bool]) -> dict[str, set[str]]:
    """Module -> what it imports although it may not, by `forbidden(module, imported)`; only modules that do."""
    found = {module: {name for name in IMPORTS[module] if forbidden(module, name)} for module in modules}
    return {module: names for module, names in found.items() if names}


def test_pyproject_lists_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    assert set(settings["tool"]["setuptools"]["packages"]) == packages | {"spdbench_suites"}


def test_every_module_imports_only_what_its_part_may() -> None:
    def forbidden(module: str, imported: str) -> bool:
        part = part_of(module)
        return package_of(imported) in OURS and part_of(imported) not in MAY_IMPORT[part] | {part}

    assert forbidden_imports(MODULES, forbidden) == {}


def test_spdbench_never_imports_its_backends() -> None:
    ours = [module for module in MODULES if module.startswith("spdbench.")]
    assert forbidden_imports(ours, lambda _, imported: package_of(imported) == "spdbench_backends") == {}


def test_modules_that_need_no_torch_never_ask_for_it() -> None:
    light = [module for module in MODULES if part_of(module) in NO_TORCH or module == "spdbench.pipeline.schedule"]
    assert forbidden_imports(light, lambda _, imported: package_of(imported) in HEAVY) == {}


def test_only_one_module_knows_transformers() -> None:
    others = [module for module in MODULES if module != "spdbench.models.hf.library"]
    assert forbidden_imports(others, lambda _, imported: package_of(imported) == "transformers") == {}


def test_what_judges_reads_and_schedules_really_loads_no_torch() -> None:
    light = [module for module in MODULES if part_of(module) in NO_TORCH]
    light += [
        "spdbench.pipeline.schedule",
        "spdbench.cli.main",
        "spdbench.cli.reading.compare",
        "spdbench.cli.listings",
    ]
    light += ["spdbench_backends.vanilla", "spdbench_backends.spd.backend"]
    script = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        f"    loaded = {HEAVY} & sys.modules.keys()\n"
        "    if loaded: sys.exit(f'{name} loads {loaded}')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, *light], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("own", "found"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
    ids=["nothing chosen", "a count", "a policy"],
)
def test_openmps_threads_soon_stop_looking_for_work_unless_the_user_chose_otherwise(
    own: dict[str, str], found: str | None
) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import spdbench.cli.main, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **own}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(found), "False"]
