"""A pack with the old ids beside ours, in both orders: who answers, and what the user is told."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.server import PACK_NAME, Server
from tests.conftest import ROOT

pytestmark = pytest.mark.host

FORK = "IPAdapter_plus-a.fork"
TAKEN = ["IPAdapter", "IPAdapterAdvanced", "IPAdapterModelLoader", "IPAdapterNoise"]
SOURCE = f"""
class Old:
    RETURN_TYPES = ("IPADAPTER",)
    FUNCTION = "run"
    CATEGORY = "ipadapter"

    @classmethod
    def INPUT_TYPES(cls):
        return {{"required": {{}}}}

    def run(self):
        return ({{"image_proj": {{}}, "ip_adapter": {{}}}},)


NODE_CLASS_MAPPINGS = {{name: type(name, (Old,), {{}}) for name in {TAKEN!r}}}
"""


@pytest.fixture
def fork(tmp_path: Path) -> Path:
    folder = tmp_path / "packs" / FORK
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(SOURCE)
    return folder


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Our pack in a folder of another name, so that it is loaded anew."""
    link = tmp_path / "packs" / PACK_NAME
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(ROOT, target_is_directory=True)
    return link


@pytest.fixture
def load(host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, str]]]:
    """Load packs into a host without any, in this order; who answers for which id."""
    mappings: dict[str, Any] = {}
    monkeypatch.setattr(host.nodes, "NODE_CLASS_MAPPINGS", mappings)
    before = set(sys.modules)

    def load_all(*packs: Path) -> dict[str, str]:
        for pack in packs:
            assert asyncio.run(host.nodes.load_custom_node(str(pack)))
        return {name: cls.RELATIVE_PYTHON_MODULE for name, cls in mappings.items()}

    yield load_all
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be called when a server starts."""
    callbacks: list[Any] = []
    server = SimpleNamespace(app=SimpleNamespace(on_startup=callbacks))
    stand_in = SimpleNamespace(PromptServer=SimpleNamespace(instance=server))
    monkeypatch.setitem(sys.modules, "server", stand_in)  # type: ignore[misc]
    return callbacks


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("is_first", [True, False])
def test_the_other_pack_answers_in_either_order(
    load: Callable[..., dict[str, str]],
    started: list[Any],
    fork: Path,
    ours: Path,
    caplog: pytest.LogCaptureFixture,
    is_first: bool,
) -> None:
    answering = load(*((fork, ours) if is_first else (ours, fork)))
    assert {name for name, pack in answering.items() if pack == f"custom_nodes.{FORK}"} == set(
        TAKEN
    )
    assert set(answering.values()) == {f"custom_nodes.{FORK}", f"custom_nodes.{PACK_NAME}"}
    assert answering["IPAdapterBatch"] == f"custom_nodes.{PACK_NAME}"
    own = [name for name in answering if name.startswith("ImagePrompt")]
    assert len(own) > 15
    assert all(answering[name] == f"custom_nodes.{PACK_NAME}" for name in own)

    assert warnings(caplog) == []  # more packs may come
    (callback,) = started
    asyncio.run(callback(None))
    (message,) = warnings(caplog)
    assert f"{FORK} is installed, too, and answers for 4 of the " in message
    assert "(IPAdapter, IPAdapterAdvanced, IPAdapterModelLoader and 1 more)" in message
    assert f"not on {PACK_NAME}" in message
    assert f"disable or remove {FORK}, and start ComfyUI again" in message


def test_alone_nothing_is_said(
    load: Callable[..., dict[str, str]],
    started: list[Any],
    ours: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    answering = load(ours)
    load(ours)  # as a pack manager reloads it: the new one answers
    assert set(TAKEN) <= set(answering)
    for callback in started:
        asyncio.run(callback(None))
    assert warnings(caplog) == []


def test_without_a_server_it_is_said_at_once(
    load: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    fork: Path,
    ours: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.delitem(sys.modules, "server", raising=False)
    load(fork, ours)
    assert len(warnings(caplog)) == 1 and FORK in warnings(caplog)[0]


def test_a_running_server_is_no_obstacle(
    load: Callable[..., dict[str, str]],
    started: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    fork: Path,
    ours: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Frozen(list[Any]):
        def append(self, value: Any) -> None:
            raise RuntimeError("Cannot modify frozen list.")

    app = sys.modules["server"].PromptServer.instance.app
    monkeypatch.setattr(app, "on_startup", Frozen())
    load(fork, ours)
    assert len(warnings(caplog)) == 1


def test_the_reason_is_there_for_messages(
    load: Callable[..., dict[str, str]], started: list[Any], fork: Path, ours: Path
) -> None:
    load(fork, ours)
    (name,) = (n for n in sys.modules if n.startswith(str(ours)) and n.endswith("host.rivals"))
    text = sys.modules[name].explanation()
    assert text.startswith(f"{FORK} is installed, too")
    assert f"Disable or remove {FORK} and start ComfyUI again" in text


def test_on_a_real_server(fork: Path, tmp_path: Path) -> None:
    with Server(tmp_path / "base", packs=[fork]) as server:
        info = server.get("/object_info")
        log = server.log_text()
    packs = {name: info[name]["python_module"] for name in info}
    assert {name for name, pack in packs.items() if pack == f"custom_nodes.{FORK}"} == set(TAKEN)
    assert packs["IPAdapterApply"] == packs["ImagePromptApply"] == f"custom_nodes.{PACK_NAME}"
    (line,) = (line for line in log.splitlines() if "is installed, too" in line)
    assert FORK in line
    assert "[WARNING]" in line or "[WARNING]" not in log  # older hosts do not write the level
