"""Fixtures that start MongoDB, headless Chromium and App servers when a test requests them.

FiftyOne reads its settings on import, so test modules import it inside of fixtures and tests, after `folder`.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from reached_hosts import audited, hosts_in

from conceptseg_hf.integrations.fiftyone_app.app import start_server
from conceptseg_hf.integrations.fiftyone_app.mongodb import find_mongod, free_port, start_mongod

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "@conceptseg/conceptseg"


def _installed(name: str) -> bool:
    spec = importlib.util.find_spec(name)
    return spec is not None and spec.origin is not None


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Return the folder for all files of FiftyOne, after setting FiftyOne's environment variables."""
    if not _installed("fiftyone"):
        pytest.skip("FiftyOne is not installed: pip install -e '.[fiftyone]'")
    if find_mongod() is None:
        pytest.skip(
            "mongod was not found: see conceptseg_hf/integrations/fiftyone_app/mongodb.py for the searched locations"
        )
    folder = tmp_path_factory.mktemp("fiftyone")
    (folder / "plugins").mkdir()
    (folder / "plugins" / "conceptseg").symlink_to(ROOT / "fiftyone_plugin", target_is_directory=True)
    zoo_plugin = os.environ.get("CONCEPTSEG_ZOO_PLUGIN")  # see test_model_zoo.py
    if zoo_plugin is not None:
        (folder / "plugins" / "zoo").symlink_to(Path(zoo_plugin).absolute(), target_is_directory=True)
    os.environ |= {
        "FIFTYONE_DATABASE_NAME": "conceptseg_tests",
        "FIFTYONE_DATABASE_VALIDATION": "false",
        "FIFTYONE_DO_NOT_TRACK": "true",
        "FIFTYONE_DEFAULT_APP_ADDRESS": "127.0.0.1",
        "FIFTYONE_ALLOW_LEGACY_ORCHESTRATORS": "true",
        "FIFTYONE_PLUGINS_DIR": str(folder / "plugins"),
        "FIFTYONE_CONFIG_PATH": str(folder / "config.json"),
        "FIFTYONE_MODEL_ZOO_DIR": str(folder / "zoo"),
        "FIFTYONE_DEFAULT_DATASET_DIR": str(folder / "data"),
        "FIFTYONE_SHOW_PROGRESS_BARS": "false",
        "FIFTYONE_DATABASE_URI": start_mongod(folder / "database"),
    }
    return folder


@pytest.fixture(scope="session")
def fo(folder) -> Any:
    """Return the module `fiftyone`."""
    import fiftyone

    return fiftyone


@pytest.fixture()
def make_dataset(fo, request) -> Iterator[Callable[..., Any]]:
    """Return a function that creates ConceptShapes datasets for the test."""
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    names = []

    def make(limit: int = 12, split: str = "test") -> Any:
        names.append(f"shapes-{request.node.name[:50]}-{len(names)}".replace("[", "-").replace("]", ""))
        return load_concept_benchmark("concept-shapes", split=split, limit=limit, dataset_name=names[-1])

    yield make
    for name in names:
        fo.delete_dataset(name)


@pytest.fixture(scope="session")
def shadow_source(fo):
    """Return a dataset of five shadows, a concept that the embedded checkpoint knows, and five other samples."""
    from conceptseg_hf.integrations.fiftyone import load_concept_benchmark

    loaded = load_concept_benchmark("concept-shapes", split="test", limit=120, dataset_name="shadow-source")
    targets = loaded.match({"role": "target"})
    ids = (
        targets.match({"family": "shadow"}).values("id")
        + targets.match({"family": "attribute"}).values("id")[:5]
    )
    dataset = loaded.select(ids, ordered=True).clone("shadows")
    yield dataset
    fo.delete_dataset("shadows")
    fo.delete_dataset("shadow-source")


@pytest.fixture()
def shadows(fo, shadow_source, request):
    """Return a copy of `shadow_source` for one test."""
    name = f"shadows-{request.node.name[:50]}".replace("[", "-").replace("]", "")
    yield shadow_source.clone(name)
    if fo.dataset_exists(name):
        fo.delete_dataset(name)


@pytest.fixture()
def ids(shadows):
    """Return the ids of the shadows, then of the other samples."""
    return shadows.values("id")


@pytest.fixture()
def induced(shadows, ids):
    """Return the concept "shadow", which three samples show."""
    from conceptseg_hf.integrations.fiftyone import InductionJob, induce_concept

    return induce_concept(shadows, InductionJob("shadow", ids[:3]))


@pytest.fixture()
def form_of(fo):
    """Return a function that returns the inputs of an operator's form for given values."""
    from fiftyone.operators.executor import ExecutionContext
    from fiftyone.operators.registry import OperatorRegistry

    def build_form(operator: str, dataset, params=None, **context):
        request = {"dataset_name": dataset.name, "params": params or {}, **context}
        instance = OperatorRegistry().get_operator(f"{PLUGIN}/{operator}")
        return instance.resolve_input(ExecutionContext(request)).type.properties

    return build_form


@pytest.fixture()
def messages(form_of):
    """Return a function that returns the blocking warnings in a form for given values."""
    from fiftyone.operators import types

    def blocking_warnings(operator: str, dataset, params=None, **context):
        return [
            field.view.label
            for field in form_of(operator, dataset, params, **context).values()
            if isinstance(field.view, types.Warning) and field.invalid
        ]

    return blocking_warnings


@pytest.fixture()
def open_explorer(fo) -> Callable[[Any], tuple[Any, Any]]:
    """Return a function that loads the Concept explorer and returns it with its context.

    `context.panel.state` is the state of the panel, and `context.shown` lists the views that it opened.
    """
    from fiftyone.operators.registry import OperatorRegistry

    def load(dataset: Any) -> tuple[Any, Any]:
        state, shown, fields = {}, [], []

        def set_state(name: Any, value: Any = None) -> None:
            state.update(name if isinstance(name, dict) else {name: value})

        panel = SimpleNamespace(
            state=state, get_state=state.get, set_state=set_state, set_data=lambda data: None
        )
        ops = SimpleNamespace(set_view=lambda view: shown.append(view), set_active_fields=fields.extend)
        context = SimpleNamespace(
            dataset=dataset, panel=panel, ops=ops, params={}, shown=shown, active_fields=fields
        )
        explorer = OperatorRegistry().get_operator(f"{PLUGIN}/concept_explorer")
        explorer.on_load(context)
        return explorer, context

    return load


@pytest.fixture(scope="session")
def run_operator(fo) -> Callable[..., Any]:
    """Return a function that runs an operator of the plugin like a Python user.

    It uses a separate thread, because FiftyOne would return an unawaited task while Playwright's event loop is running.
    """
    import fiftyone.operators as foo

    def run(name: str, dataset: Any = None, params: dict[str, Any] | None = None, **context: Any) -> Any:
        context |= {"params": params or {}} | ({} if dataset is None else {"dataset": dataset.name})
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(foo.execute_operator, f"{PLUGIN}/{name}", context).result()

    return run


@pytest.fixture(scope="session")
def run_queued(fo) -> Callable[[Any], None]:
    """Return a function that runs the scheduled operations of a dataset like a worker, in a separate thread, too."""
    from fiftyone.operators.delegated import DelegatedOperationService

    def run(dataset: Any) -> None:
        service = DelegatedOperationService()
        with ThreadPoolExecutor(1) as thread:
            thread.submit(service.execute_queued_operations, dataset_name=dataset.name).result()

    return run


@pytest.fixture()
def server(fo, folder) -> Iterator[str]:
    """Start an App server for the test, as a server remembers the last dataset, and return its address."""
    port = free_port()
    with mock.patch.dict(os.environ, audited(os.environ, folder / "hosts")):
        process = start_server(port, folder / "server.log")
    yield f"http://127.0.0.1:{port}"
    process.kill()  # `terminate` would wait for connections of the page
    process.wait()


@pytest.fixture()
def hosts_reached(server, folder) -> Callable[[], set[str]]:
    """Return a function that returns the hosts that the server's Python process has contacted."""
    return lambda: hosts_in(folder / "hosts")


@pytest.fixture()
def outside() -> list[str]:
    """Return the list of URLs outside of the loopback interface that the test's page requested."""
    return []


@pytest.fixture()
def page(chromium, outside, folder, request) -> Iterator[Any]:
    """Return a new page that can only access the loopback interface."""
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    context.set_default_timeout(600_000)

    def guard(route: Any) -> None:
        host = route.request.url.split("/")[2].split(":")[0]
        if host == "127.0.0.1" or not route.request.url.startswith("http"):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    context.route("**/*", guard)
    page = context.new_page()
    failed = request.session.testsfailed
    yield page
    if request.session.testsfailed > failed:
        page.screenshot(path=folder / f"{request.node.name}.png")
        warnings.warn(f"screenshot of the page: {folder / request.node.name}.png", stacklevel=1)
    context.close()
