"""Keep the translations in step with the English of the nodes' schemas and help pages.

    python -m scripts.locales           list what is missing, left over or stale
    python -m scripts.locales update    add what is missing, in English; remove what is left over
    python -m scripts.locales seal zh   the Chinese is of the present English; without zh all are

`locales/<lang>/nodeDefs.json` has the shape that the host merges and the front end reads. English
has no such file: the front end falls back to the schema. `locales/sources.json` keeps a digest of
the English that each node's translation was made of, so that no changed sentence is forgotten.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.host import REPOSITORY
from scripts.server import PACK_NAME, Server

Json = dict[str, Any]

LANGUAGES = {"zh": "Chinese", "ko": "Korean", "ja": "Japanese"}
LOCALES = REPOSITORY / "locales"
SOURCES = LOCALES / "sources.json"
PAGES = REPOSITORY / "web" / "docs"


def english(info: Json) -> Json:
    """The texts of a node that a translation has, from the host's description of it.

    Args:
        info: What `/object_info` says of the node.
    """
    inputs = {
        name: {"name": name, "tooltip": (declared[1] if len(declared) > 1 else {})["tooltip"]}
        for kind in ("required", "optional")
        for name, declared in info["input"].get(kind, {}).items()
    }
    ordered = [name for kind in info["input_order"].values() for name in kind if name in inputs]
    named = zip(info["output_name"], info["output_tooltips"], strict=True)
    outputs = {
        str(index): {"name": name, "tooltip": tooltip}
        for index, (name, tooltip) in enumerate(named)
    }
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: inputs[name] for name in ordered},
        **({"outputs": outputs} if outputs else {}),
    }


def merged(texts: Json, translated: Json) -> Json:
    """The translated texts in the shape and order of the English ones, which fill the gaps."""
    return {
        key: merged(text, translated.get(key, {}))
        if isinstance(text, dict)
        else translated.get(key, text)
        for key, text in texts.items()
    }


def flat(texts: Json, path: str = "") -> dict[str, str]:
    """Every text under its dotted path."""
    found: dict[str, str] = {}
    for key, text in texts.items():
        where = f"{path}.{key}" if path else key
        found |= flat(text, where) if isinstance(text, dict) else {where: text}
    return found


def digest(texts: Json, page: str) -> str:
    """Twelve digits that change with any word of a node's English."""
    whole = json.dumps(texts, sort_keys=True) + page
    return hashlib.sha256(whole.encode()).hexdigest()[:12]


def digests(nodes: dict[str, Json]) -> dict[str, str]:
    """The digest of each node's present English.

    Args:
        nodes: What `english` says of each, by id.
    """
    return {
        node: digest(texts, (PAGES / f"{node}.md").read_text(encoding="utf-8"))
        for node, texts in nodes.items()
    }


def read(path: Path) -> Json:
    """A JSON file; empty where there is none yet."""
    if not path.is_file():
        return {}
    content: Json = json.loads(path.read_text(encoding="utf-8"))
    return content


def texts_file(language: str) -> Path:
    """Where a language's texts are."""
    return LOCALES / language / "nodeDefs.json"


def stale(language: str, nodes: dict[str, Json]) -> list[str]:
    """Nodes whose English has changed since that language's translation was sealed."""
    sealed = read(SOURCES).get(language, {})
    return [node for node, now in digests(nodes).items() if sealed.get(node) != now]


def _write(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def update(nodes: dict[str, Json]) -> None:
    """Write each language's file anew: nothing missing, nothing left over, in the nodes' order."""
    for language in LANGUAGES:
        _write(texts_file(language), merged(nodes, read(texts_file(language))))


def seal(nodes: dict[str, Json], languages: list[str]) -> None:
    """Note that these languages' translations are of the present English."""
    _write(SOURCES, read(SOURCES) | {language: digests(nodes) for language in languages})


def report(nodes: dict[str, Json]) -> list[str]:
    """Say what is to be done, a line for each."""
    lines = []
    for language in LANGUAGES:
        wanted, there = flat(nodes), flat(read(texts_file(language)))
        same = [
            key
            for key in wanted
            if there.get(key) == wanted[key] and key.endswith(("tooltip", "description"))
        ]
        lines += [f"{language}: missing: {key}" for key in wanted if key not in there]
        lines += [f"{language}: left over: {key}" for key in there if key not in wanted]
        lines += [f"{language}: still English: {key}" for key in same]
        lines += [f"{language}: stale: {node}" for node in stale(language, nodes)]
        lines += [
            f"{language}: no page: {node}"
            for node in nodes
            if not (PAGES / node / f"{language}.md").is_file()
        ]
    return lines


def _ours() -> dict[str, Json]:
    """The English texts of our nodes, as a started host gives them; not the deprecated ids."""
    with tempfile.TemporaryDirectory() as base, Server(Path(base)) as server:
        known = server.object_info()
    return {
        node: english(info)
        for node, info in known.items()
        if info["python_module"] == f"custom_nodes.{PACK_NAME}" and not info["deprecated"]
    }


def main(arguments: list[str]) -> None:
    """Update, seal or report."""
    job, languages = arguments[:1], arguments[1:]
    if job not in ([], ["update"], ["seal"]) or not set(languages) <= LANGUAGES.keys():
        sys.exit(f"usage: python -m scripts.locales [update | seal [{' | '.join(LANGUAGES)}]]")
    nodes = _ours()
    if job == ["update"]:
        update(nodes)
    if job == ["seal"]:
        seal(nodes, languages or list(LANGUAGES))
    print("\n".join(report(nodes)) or "All translations are complete.")


if __name__ == "__main__":
    main(sys.argv[1:])
