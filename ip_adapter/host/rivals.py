"""ComfyUI_IPAdapter_plus, or a fork of it, beside us: who answers for the old node ids.

The host gives an id to the pack that was loaded last. We do not take an id that another pack has
already, so that in either order the other pack answers, whole; our own nodes are there in any case.
The user is told once, when all packs are loaded.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

_PACK = Path(__file__).parents[2].name
"""The folder we are installed in."""

_LISTED = 3  # ids that the message names

_known: dict[str, type] = {}
"""What `watch` was given, for messages."""


def answering(ours: Mapping[str, type]) -> dict[str, list[str]]:
    """The folders of other packs that answer for ids of ours, each with these ids.

    Args:
        ours: Our classes by their ids.
    """
    found: dict[str, list[str]] = {}
    for node_id, cls in _registered().items():
        if node_id in ours and cls is not ours[node_id] and _folder(cls) != _PACK:
            found.setdefault(_folder(cls), []).append(node_id)
    return found


def free(ours: Mapping[str, type]) -> list[type]:
    """Our classes without those whose id another pack has already."""
    taken = {node_id for ids in answering(ours).values() for node_id in ids}
    return [cls for node_id, cls in ours.items() if node_id not in taken]


def watch(ours: Mapping[str, type]) -> None:
    """Tell the user who answers: when the server starts, or at once where there is none."""
    _known.update(ours)
    try:
        started = sys.modules["server"].PromptServer.instance.app.on_startup
    except (KeyError, AttributeError):  # an embedded run
        tell(ours)
        return

    async def check(app: Any) -> None:
        tell(ours)

    try:
        started.append(check)
    except RuntimeError:  # it is running already: a pack that was installed meanwhile
        tell(ours)


def tell(ours: Mapping[str, type]) -> None:
    """Say in the log which other packs answer, and how to change that."""
    for folder, ids in answering(ours).items():
        log.warning(
            "IP-Adapter: %s is installed, too, and answers for %d of the %d old nodes (%s). Saved "
            "workflows run on it, not on %s. Do not connect IPADAPTER, EMBEDS or INSIGHTFACE from "
            "its nodes to ours, or back. To have ours answer: disable or remove %s, and start "
            "ComfyUI again.",
            *(folder, len(ids), len(ours), _some(ids), _PACK, folder),
        )


def explanation() -> str:
    """Why an old node's output may be another pack's, and what to do; empty where there is none."""
    found = ", ".join(answering(_known))
    if not found:
        return ""
    return (
        f"{found} is installed, too, and answers for old nodes such as IPAdapter Model Loader; "
        f"its outputs do not fit our nodes. Disable or remove {found} and start ComfyUI again, so "
        "that ours answer."
    )


def _some(ids: Iterable[str]) -> str:
    names = sorted(ids)
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def _folder(cls: type) -> str:
    """The folder of the pack that registered a node; the host notes it: ``custom_nodes.name``."""
    noted = getattr(cls, "RELATIVE_PYTHON_MODULE", None) or cls.__module__
    return str(noted).removeprefix("custom_nodes.")


def _registered() -> Mapping[str, type]:
    """The host's own table; its module is named like this pack's file."""
    found: Mapping[str, type] = sys.modules["nodes"].NODE_CLASS_MAPPINGS
    return found
