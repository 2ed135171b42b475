"""Project rules: import directions, forbidden imports, file writing and startup cost."""

from __future__ import annotations

import ast
import functools
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import conceptseg_hf

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "conceptseg_hf"
TRAINERS = ROOT / "trainers" / "conceptseg_trainers"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *TRAINERS.rglob("*.py")])

# A module may import from its own row and the rows below (see ARCHITECTURE.md).
ROWS = [
    {"__main__"},
    {"cli", "integrations"},
    {"batch"},
    {"evaluation", "pipelines", "conversion"},
    {"visualization", "data", "loading", "profiles", "concept_tuning"},
    {"induction"},
    {"rules", "candidates"},
    {"coprs"},
    {
        "modeling_conceptseg",
        "checkpointing",
        "concept_prompt",
        "inference",
        "model_folder",
        "streaming",
        "vlm_engines",
        "vllm_engine",
    },
    {"processing_conceptseg", "prompt_processing", "generation", "hub"},
    {"postprocessing", "collation", "chat"},
    {"inputs", "outputs", "processor_settings"},
    {"coordinates"},
    {"references"},
    {"mosaic"},
]

NO_SOCKETS = """
import socket, sys
def refuse(*arguments, **options): raise AssertionError("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


@functools.cache
def calls_of(path: Path) -> list[tuple[str, ast.Call]]:
    """All calls of a file with the name that is called."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@functools.cache
def imports(path: Path, at_runtime: bool = False) -> set[str]:
    """Absolute names of all imports of a file, including nested ones; optionally without those for type checkers."""
    module = (
        path.relative_to(PACKAGE.parent if PACKAGE in path.parents else TRAINERS.parent).with_suffix("").parts
    )
    package = module[:-1]
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if at_runtime:
        guards = (
            n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)
        )
        for guard in guards:
            guard.body = [ast.Pass()]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *(node.module or "").split("."))).strip(".")
            names |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return names


def part(name: str) -> str | None:
    """The file or folder of conceptseg_hf that a dotted name belongs to."""
    match = re.match(r"conceptseg_hf\.(\w+)", name)
    return match[1] if match else None


def test_files_of_the_core_are_small():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert not {path.name: length for path, length in lengths.items() if length > 500}


def test_there_are_no_import_cycles():
    """Neither at module level nor by imports inside functions."""
    modules = {}
    for path in SOURCES:
        base = PACKAGE.parent if PACKAGE in path.parents else TRAINERS.parent
        name = ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")
        modules[name] = path
    graph = {
        name: {
            other
            for other in imports(path, at_runtime=True) & set(modules)
            if not name.startswith(f"{other}.")
        }
        - {name}
        for name, path in modules.items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(modules)  # raises a CycleError


def test_imports_point_downwards():
    violations = {}
    for path in SOURCES:
        names, found = imports(path), set()
        if PACKAGE in path.parents:
            banned = {"trl", "deepspeed", "peft", "fiftyone", "conceptseg_trainers"}
            if PACKAGE / "integrations" in path.parents:
                banned.remove("fiftyone")
            found |= banned & {name.split(".")[0] for name in names}
        if PACKAGE in path.parents and path != PACKAGE / "__init__.py":
            own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
            row = next((number for number, parts in enumerate(ROWS) if own in parts), len(ROWS))
            found |= {part(name) for name in names} & set().union(*ROWS[:row])
        if found:
            violations[str(path.relative_to(ROOT))] = found
    assert violations == {}


# Rows of the modules in evaluation/.
EVALUATION_ROWS = [{"running"}, {"reporting"}, {"records"}, {"metrics", "distributed"}]


def test_imports_of_the_evaluation_point_downwards():
    paths = sorted((PACKAGE / "evaluation").glob("*/*.py"))
    assert len(paths) > 20
    violations = {}
    for path in paths:
        row = next(number for number, parts in enumerate(EVALUATION_ROWS) if path.parent.name in parts)
        above = set().union(*EVALUATION_ROWS[:row])
        names = {name for name in imports(path) if name.startswith("conceptseg_hf.evaluation.")}
        if found := {name.split(".")[2] for name in names} & above:
            violations[path.name] = found
    assert violations == {}


def test_only_the_cli_prints():
    assert [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if (PACKAGE / "cli") not in path.parents
        for called, node in calls_of(path)
        if called == "print"
    ] == []


# Logs that are appended to and read line by line, skipping partial lines; and the log of another program.
APPENDING = {
    "evaluation/records/store.py",
    "completions.py",
    "from_scratch/loop.py",
    "integrations/fiftyone_app/app.py",
    "cli/outputs.py",
}
HASHED = {"loading.py", "completions.py", "integrations/fiftyone/runs.py"}  # JSON that is hashed, not written


def test_files_and_json_are_written_by_writing_module():
    """`writing.py` writes files atomically, and JSON without NaN."""
    violations = []
    for path in SOURCES:
        name = path.relative_to(PACKAGE if PACKAGE in path.parents else TRAINERS).as_posix()
        if name == "writing.py":
            continue
        banned = {"write_text", "write_bytes", *(() if name in HASHED else ("json.dumps", "json.dump"))}
        for called, node in calls_of(path):
            modes = [part.value for part in node.args if isinstance(part, ast.Constant)]
            opened = called.rpartition(".")[2] == "open" and any(
                isinstance(mode, str) and re.fullmatch("[wax]b?t?[+]?", mode) for mode in modes
            )
            if called in banned or called.rpartition(".")[2] in banned or (opened and name not in APPENDING):
                violations.append(f"{path.relative_to(ROOT)}:{node.lineno}: {called}")
    assert violations == []


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(TRAINERS.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True
    )


LAUNCH = "import runpy; launch = runpy.run_path(sys.argv.pop(1))['main']\nsys.argv[0] = 'conceptseg'\n"
LAUNCH_LIGHTLY = (
    NO_SOCKETS
    + LAUNCH
    + "try:\n    launch()\nfinally:\n    assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
    + "    print(len(sys.modules))"
)


@pytest.mark.parametrize(
    "subcommand",
    [
        (),
        *(
            (subcommand,)
            for subcommand in (
                "demo app segment induce batch evaluate compare ablate train convert data info env".split()
            )
        ),
    ],
    ids=" ".join,
)
def test_help_loads_little_and_opens_no_socket(subcommand):
    """Only the standard library is imported; the startup time is measured by `make bench`."""
    done = run_python(LAUNCH_LIGHTLY, str(PACKAGE / "cli" / "launcher.py"), *subcommand, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: conceptseg" in done.stdout
    assert int(done.stdout.splitlines()[-1]) < 250, "modules"


def test_subcommands_are_not_imported_twice():
    """The launcher loads the CLI under another name, and subcommands import the regular package."""
    code = LAUNCH + (
        "code = launch()\n"
        "names = sorted(name for name in sys.modules if name.startswith('conceptseg_cli'))\n"
        "assert 'conceptseg_hf.cli' not in sys.modules and 'conceptseg_cli.segment' in names, names\n"
        "sys.exit(code)"
    )
    done = run_python(
        "import sys\n" + code, str(PACKAGE / "cli" / "launcher.py"), "segment", "no.png", "--prompt", "x"
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "conceptseg segment: image 'no.png' is not a file; give the path of an image.\n"


def test_version_matches_pyproject():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1] == conceptseg_hf.__version__


def test_version_option_does_not_import_the_package():
    done = run_python(LAUNCH_LIGHTLY, str(PACKAGE / "cli" / "launcher.py"), "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"conceptseg {conceptseg_hf.__version__}"


def test_constraints_pin_what_setup_installs():
    setup = (ROOT / ".ci" / "setup").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("torch", "torchvision"):
        version = re.search(rf"^{name}_version=(.+)$", setup, re.MULTILINE)[1]
        assert f"\n{name}=={version}\n" in constraints


def test_files_contain_no_local_paths():
    for path in [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("examples/*.py"), ROOT / "pyproject.toml"]:
        assert not re.search(r"/(home|root|work|Users)/", path.read_text(encoding="utf-8")), path
