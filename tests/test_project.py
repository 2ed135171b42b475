"""Rules of the house: which way imports point, what must not be imported, and what starting up costs."""

from __future__ import annotations

import ast
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

# A module may import from its own row and the rows below it (ARCHITECTURE.md).
ROWS = [
    {"__main__"},
    {"cli", "integrations"},
    {"evaluation", "pipelines", "conversion"},
    {"visualization", "data", "loading", "profiles"},
    {"modeling_conceptseg", "inference"},
    {"processing_conceptseg", "inputs", "generation", "hub"},
]

NO_SOCKETS = """
import socket, sys
def refuse(*arguments, **options): raise AssertionError("a socket was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""


def imports(path: Path) -> set[str]:
    """Absolute names of everything a file imports, wherever in the file."""
    module = (
        path.relative_to(PACKAGE.parent if PACKAGE in path.parents else TRAINERS.parent).with_suffix("").parts
    )
    package = module[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join((*base, *(node.module or "").split("."))).strip(".")
            found |= {name, *(f"{name}.{alias.name}" for alias in node.names)}
    return found


def part(name: str) -> str | None:
    """The file or folder of conceptseg_hf that a dotted name belongs to."""
    match = re.match(r"conceptseg_hf\.(\w+)", name)
    return match[1] if match else None


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downwards(path):
    names = imports(path)
    if PACKAGE in path.parents:
        banned = {"trl", "deepspeed", "peft", "fiftyone", "conceptseg_trainers"}
        if PACKAGE / "integrations" in path.parents:
            banned.remove("fiftyone")
        assert not banned & {name.split(".")[0] for name in names}
    if PACKAGE not in path.parents or path == PACKAGE / "__init__.py":
        return
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    row = next((number for number, parts in enumerate(ROWS) if own in parts), len(ROWS))
    above = set().union(*ROWS[:row])
    assert not {part(name) for name in names} & above


# The same within evaluation/.
EVALUATION_ROWS = [{"running"}, {"reporting"}, {"records"}, {"metrics", "distributed"}]


@pytest.mark.parametrize("path", sorted((PACKAGE / "evaluation").glob("*/*.py")), ids=lambda path: path.name)
def test_imports_of_the_evaluation_point_downwards(path):
    row = next(number for number, parts in enumerate(EVALUATION_ROWS) if path.parent.name in parts)
    above = set().union(*EVALUATION_ROWS[:row])
    found = {name.split(".")[2] for name in imports(path) if name.startswith("conceptseg_hf.evaluation.")}
    assert not found & above


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_prints(path):
    if (PACKAGE / "cli") in path.parents:
        return
    calls = (
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    )
    assert not [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"]


# Appending to a log that is read line by line, where half a line is passed over; and a log of another program.
APPENDING = {
    "evaluation/records/store.py",
    "completions.py",
    "nano/loop.py",
    "integrations/fiftyone_app/app.py",
    "cli/outputs.py",
}
HASHED = {"loading.py", "completions.py", "integrations/fiftyone/runs.py"}  # JSON that is no file


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_json_are_written_in_one_place(path):
    """`writing.py`: whole files, and no NaN in JSON."""
    base = PACKAGE if PACKAGE in path.parents else TRAINERS
    name = path.relative_to(base).as_posix()
    if name == "writing.py":
        return
    calls = [
        (ast.unparse(node.func), node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    banned = {"write_text", "write_bytes", *(() if name in HASHED else ("json.dumps", "json.dump"))}
    found = [
        f"line {node.lineno}: {called}"
        for called, node in calls
        if called in banned or called.rpartition(".")[2] in banned
    ]
    for called, node in calls:
        modes = [part.value for part in node.args if isinstance(part, ast.Constant)]
        if called.rpartition(".")[2] == "open" and any(
            isinstance(mode, str) and re.fullmatch("[wax]b?t?[+]?", mode) for mode in modes
        ):
            found += [] if name in APPENDING else [f"line {node.lineno}: {called}"]
    assert found == []


def run_python(code: str, *words: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(ROOT), str(TRAINERS.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True
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
            for subcommand in "demo segment evaluate compare ablate train convert data info".split()
        ),
    ],
    ids=" ".join,
)
def test_help_loads_little_and_opens_no_socket(subcommand):
    """The standard library's argparse and what it needs; how long it takes is in `make bench`."""
    done = run_python(LAUNCH_LIGHTLY, str(PACKAGE / "cli" / "launcher.py"), *subcommand, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: conceptseg" in done.stdout
    assert int(done.stdout.splitlines()[-1]) < 250, "modules"


def test_importing_opens_no_socket_and_nothing_heavy():
    done = run_python(
        NO_SOCKETS
        + "from transformers import GenerationMixin\n"  # older releases bring scikit-learn, and that pandas
        + "theirs = set(sys.modules)\n"
        + "import conceptseg_hf, conceptseg_trainers\n"
        + "heavy = {'trl', 'deepspeed', 'fiftyone', 'datasets', 'pandas', 'pyarrow'} & (set(sys.modules) - theirs)\n"
        + "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr


def test_verbs_load_nothing_twice():
    """Subcommands run under the launcher's name for the package; what they import is the package itself."""
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


def test_version_is_said_once():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE)[1] == conceptseg_hf.__version__


def test_the_command_tells_it_without_importing_the_package():
    done = run_python(LAUNCH_LIGHTLY, str(PACKAGE / "cli" / "launcher.py"), "--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"conceptseg {conceptseg_hf.__version__}"


def test_constraints_pin_what_setup_installs():
    setup = (ROOT / ".ci" / "setup").read_text(encoding="utf-8")
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for name in ("torch", "torchvision"):
        version = re.search(rf"^{name}_version=(.+)$", setup, re.MULTILINE)[1]
        assert f"\n{name}=={version}\n" in constraints


def test_every_file_speaks_for_the_project_alone():
    """No machine's paths in what is shipped."""
    for path in [*SOURCES, *ROOT.glob("*.md"), *ROOT.glob("examples/*.py"), ROOT / "pyproject.toml"]:
        assert not re.search(r"/(home|root|work|Users)/", path.read_text(encoding="utf-8")), path
