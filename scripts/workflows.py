"""Write the shipped workflows: lay out the tables of `graphs.py`, let the front end export them.

`workflows/<name>.json` is what the front end opens and saves, `workflows/api/<name>.json` its own
API export of that graph, which scripts post to the host. Socket types, outputs and the order of
widgets come from a running host, so a changed node needs no change here.

    python -m scripts.workflows
"""

from __future__ import annotations

import json
import math
import re
import tempfile
import uuid
from functools import cache
from pathlib import Path
from typing import Any

from scripts.browser import export_prompt, load_workflow, open_page
from scripts.graphs import GRAPHS
from scripts.host import REPOSITORY, host_version
from scripts.parts import FACE_FILES, MODELS, Graph, Node
from scripts.pictures import write_pictures
from scripts.prompts import FOLDER
from scripts.server import Server

Json = dict[str, Any]

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")

# Sizes in canvas units. The front end's own rows: 20 for a socket, 24 for a widget, 30 for a title.
TITLE, SOCKET_ROW, WIDGET_ROW = 30, 20, 24
TEXT_FIELD = 48  # what a text of several lines is higher by
NODE_GAP, GROUP_GAP, GROUP_TITLE, GROUP_EDGE = 20, 30, 44, 15
NOTE = "MarkdownNote"
HINT = (
    "Choose your own pictures in *Load Image*. What is missing is marked red when the workflow "
    "opens; *View details* offers the models for download."
)
NARROW, WIDE = 280, 370
WITH_CODE = 560  # a note with lines that should not be broken
WIDE_NODES = {
    "CheckpointLoaderSimple",
    "CLIPVisionLoader",
    "CLIPTextEncode",
    "ControlNetLoader",
    "ImagePromptAutoLoader",
    "ImagePromptLoadAdapter",
    "SaveImage",
}
REPORTING = {
    "ImagePromptApply",
    "ImagePromptApplyRegions",
    "ImagePromptDetectFace",
    "ImagePromptEncode",
    "ImagePromptEncodeFace",
    "ImagePromptFaceLoRA",
    "ImagePromptFade",
    "ImagePromptGrid",
    "ImagePromptInfluence",
    "ImagePromptLoadAdapter",
    "ImagePromptLoadFaceModel",
}
REPORT = 48  # room for the text that appears on these nodes when they have run
HEIGHTS = {
    "LoadImage": 360,
    "CLIPTextEncode": 130,
    "PreviewImage": 300,
    "SaveAnimatedWEBP": 480,
    "SaveImage": 420,
    "ImagePromptGridPicture": 340,  # it shows its picture too
    "ImagePromptAutoLoader": 250,  # with room for its text, of several lines
    "ImagePromptInfluence": 450,  # the front end shares it among three text fields, in whole pixels
}
GROUP_COLOUR = "#7f9db0"
COLOURS = {"Positive prompt": ("#232", "#353"), "Negative prompt": ("#322", "#533")}


def is_widget(kind: Any) -> bool:
    """Whether an input of this type is filled in on the node itself."""
    return isinstance(kind, list) or kind in WIDGETS


def _inputs(interface: Json) -> dict[str, tuple[Any, Json]]:
    """Name -> type and options of every input, in the host's order."""
    found: dict[str, tuple[Any, Json]] = {}
    for part in ("required", "optional"):
        for name, entry in interface["input"].get(part, {}).items():
            found[name] = (entry[0], entry[1] if len(entry) > 1 else {})
    return found


def _size(kind: str, interface: Json) -> tuple[int, int]:
    widgets = [is_widget(entry[0]) for entry in _inputs(interface).values()]
    sockets = max(len(widgets) - sum(widgets), len(interface["output"]))
    seeds = sum("control_after_generate" in o for _, o in _inputs(interface).values())
    texts = sum(bool(o.get("multiline")) for _, o in _inputs(interface).values())
    rows = sum(widgets) + seeds
    height = sockets * SOCKET_ROW + rows * WIDGET_ROW + texts * TEXT_FIELD + 14
    return WIDE if kind in WIDE_NODES else NARROW, HEIGHTS.get(kind, height)


def _widget_values(node: Node, interface: Json) -> list[Any]:
    """All widget values in order; two widgets of the front end's own follow seeds and pictures."""
    values: list[Any] = []
    for name, (kind, options) in _inputs(interface).items():
        if not is_widget(kind):
            continue
        choices = kind if isinstance(kind, list) else options.get("options")
        default = options.get("default", choices[0] if choices else None)
        values.append(node.inputs.get(name, default))
        if options.get("control_after_generate"):
            values.append("fixed")
        if options.get("image_upload"):
            values.append("image")
    return values


@cache
def _project_name() -> str:
    project = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(r'^name = "(.+)"', project, re.MULTILINE)
    return match.group(1) if match else ""


def _properties(node: Node, interface: Json, host: str) -> Json:
    properties: Json = {"Node name for S&R": node.kind}
    if interface["python_module"].startswith("custom_nodes."):
        properties["cnr_id"] = _project_name()
    else:
        properties |= {"cnr_id": "comfy-core", "ver": host}
    models = [
        {
            "name": value,
            "url": f"https://huggingface.co/{MODELS[value][1]}/resolve/main/{MODELS[value][2]}",
            "directory": MODELS[value][0],
        }
        for value in node.inputs.values()
        if isinstance(value, str) and value in MODELS
    ]
    return properties | ({"models": models} if models else {})


def _node(node: Node, number: int, interface: Json, host: str) -> Json:
    """A node as the front end saves it, not yet placed or linked."""
    inputs = _inputs(interface)
    optional = {name: {"shape": 7} for name in interface["input"].get("optional", {})}
    sockets = [
        {"localized_name": name, "name": name, "type": kind, "link": None} | optional.get(name, {})
        for name, (kind, _) in inputs.items()
        if not is_widget(kind)
    ]
    widgets = [(name, kind) for name, (kind, _) in inputs.items() if is_widget(kind)]
    if any(options.get("image_upload") for _, options in inputs.values()):
        widgets.append(("upload", "IMAGEUPLOAD"))
    outputs = [
        {"localized_name": name, "name": name, "type": kind, "links": []}
        | ({"shape": 6} if is_list else {})
        for name, kind, is_list in zip(
            interface["output_name"], interface["output"], interface["output_is_list"], strict=True
        )
    ]
    saved: Json = {
        "id": number,
        "type": node.kind,
        "pos": [0, 0],
        "size": list(_size(node.kind, interface)),
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": sockets
        + [
            {
                "localized_name": "choose file to upload" if name == "upload" else name,
                "name": name,
                "type": "COMBO" if isinstance(kind, list) else kind,
                "widget": {"name": name},
                "link": None,
            }
            | optional.get(name, {})
            for name, kind in widgets
        ],
        "outputs": outputs,
        "properties": _properties(node, interface, host),
        "widgets_values": _widget_values(node, interface),
    }
    if node.title:
        saved["title"] = node.title
        if node.title in COLOURS:
            saved["color"], saved["bgcolor"] = COLOURS[node.title]
    return saved


def _note(text: str, number: int) -> Json:
    text = f"{text}\n\n{HINT}"
    width = WITH_CODE if "```" in text else WIDE
    shown = re.sub(r"\]\([^)]*\)", "]", text)  # of a link, its words
    lines = sum(math.ceil(max(len(line), 1) / (width / 5.6)) for line in shown.split("\n"))
    return {
        "id": number,
        "type": NOTE,
        "pos": [0, 0],
        "size": [width, 16 * lines + 44],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "About this workflow",
        "properties": {},
        "widgets_values": [text],
        "color": "#432",
        "bgcolor": "#653",
    }


def _place(graph: Graph, nodes: dict[str, Json], note: Json) -> list[Json]:
    """Set every position, columns from left to right; returns the groups."""
    groups: list[Json] = []
    left = 0
    for column, members in enumerate(graph.columns):
        width = max(nodes[name]["size"][0] for group in members for name in group.nodes)
        top = 0
        if column == 0:
            note["pos"] = [left, TITLE]
            width = max(width, note["size"][0])
            top = TITLE + note["size"][1] + GROUP_GAP
        for group in members:
            y = top + GROUP_TITLE
            for name in group.nodes:
                y += TITLE
                nodes[name]["pos"] = [left, y]
                nodes[name]["size"][0] = width
                reports = group.nodes[name].kind in REPORTING
                y += nodes[name]["size"][1] + NODE_GAP + REPORT * reports
            bottom = y - NODE_GAP + GROUP_EDGE
            frame = [left - GROUP_EDGE, top, width + 2 * GROUP_EDGE, bottom - top]
            number = len(groups) + 1
            title = f"{number}  {group.title}"
            groups.append(
                {
                    "id": number,
                    "title": title,
                    "bounding": frame,
                    "color": GROUP_COLOUR,
                    "flags": {},
                }
            )
            top = bottom + GROUP_GAP
        left += width + 2 * GROUP_EDGE + GROUP_GAP
    return groups


def _link(tables: dict[str, Node], nodes: dict[str, Json]) -> list[list[Any]]:
    """Join the sockets; returns the links as [id, from, output, to, input, type]."""
    links: list[list[Any]] = []
    for name, table in tables.items():
        for slot, socket in enumerate(nodes[name]["inputs"]):
            source = table.inputs.get(socket["name"])
            if "widget" in socket or source is None:
                continue
            start, _, output = str(source).partition(".")
            names = [each["name"] for each in nodes[start]["outputs"]]
            index = names.index(output)
            socket["link"] = len(links) + 1
            nodes[start]["outputs"][index]["links"].append(socket["link"])
            ends = [nodes[start]["id"], index, nodes[name]["id"], slot]
            links.append([socket["link"], *ends, socket["type"]])
    return links


def _order(nodes: list[Json], links: list[list[Any]]) -> None:
    """Number the nodes as the front end does: sources first, then whatever became ready."""
    by_id = {node["id"]: node for node in nodes}
    waiting = {node: sum(link[3] == node for link in links) for node in by_id}
    ready = [node for node in by_id if waiting[node] == 0]
    for order, node in enumerate(ready):  # grows while it is walked
        by_id[node]["order"] = order
        for output in by_id[node]["outputs"]:
            for link in output["links"]:
                target = links[link - 1][3]
                waiting[target] -= 1
                if waiting[target] == 0:
                    ready.append(target)


def build(name: str, graph: Graph, object_info: Json, host: str, front_end: str) -> Json:
    """A workflow in the UI format.

    Args:
        name: Name of its file; decides its permanent id.
        graph: The table.
        object_info: Interfaces of all nodes, from the host.
        host: Version of the host.
        front_end: Version of the front end.
    """
    groups_of_nodes = [group.nodes for column in graph.columns for group in column]
    tables = {each: node for group in groups_of_nodes for each, node in group.items()}
    nodes = {
        each: _node(node, number, object_info[node.kind], host)
        for number, (each, node) in enumerate(tables.items(), start=1)
    }
    links = _link(tables, nodes)
    note = _note(graph.note, len(nodes) + 1)
    groups = _place(graph, nodes, note)
    saved = [*nodes.values(), note]
    _order(saved, links)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"ip-adapter/workflows/{name}")),
        "revision": 0,
        "last_node_id": note["id"],
        "last_link_id": len(links),
        "nodes": saved,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {"frontendVersion": front_end},
        "version": 0.4,
    }


def write_placeholders(base: Path) -> None:
    """Empty files under the models' names, for a host that only lists them; and the pictures."""
    files = [f"{folder}/{name}" for name, (folder, *_) in MODELS.items()]
    for file in (*files, *FACE_FILES):
        path = base / "models" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    write_pictures(base / "input")


def _write(path: Path, content: Json) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Write every workflow in both formats."""
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch)
        write_placeholders(base)
        with Server(base) as server, open_page(server) as page:
            info = server.object_info()
            front_end = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
            for name, graph in GRAPHS.items():
                workflow = build(name, graph, info, host_version(server.host), front_end)
                load_workflow(page, workflow, name)
                _write(FOLDER / f"{name}.json", workflow)
                _write(FOLDER / "api" / f"{name}.json", export_prompt(page))
                print(f"workflows/{name}.json")


if __name__ == "__main__":
    main()
