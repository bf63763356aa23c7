"""Workflows as people saved them with ComfyUI_IPAdapter_plus: from a graph to its two files.

`workflow` writes what the front end saved, in the compact form of 2024 (sockets only, a widget
among the inputs where it was turned into one) or in the form of 2025 (every widget among the
inputs). `prompt` writes what the front end exports of it for the API. The interfaces of the old
nodes are those of the record of the old pack, never those of ours.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

from tests.conftest import ROOT

Json = dict[str, Any]
Form = Literal["2024", "2025"]

RECORD: dict[str, Json] = json.loads(
    (ROOT / "tests" / "host" / "legacy_nodes.json").read_text(encoding="utf-8")
)
"""What a host reported of each node of the old pack."""

RUNS, MUTED, BYPASSED = 0, 2, 4
"""A node's mode."""

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
OF_THE_PAGE = {"seed": "fixed", "image": "image"}
"""Widgets that the front end adds below one of ours: how a seed changes, an upload button."""

REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
OLD_PACK = {"cnr_id": "comfyui_ipadapter_plus", "ver": "b188a6cb39b512a9c6da7235b880af42c78ccd0d"}


class At(NamedTuple):
    """An output of another node of the graph."""

    node: str
    slot: int = 0


Value = str | int | float | bool | At


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    Attributes:
        kind: The host's node id.
        inputs: Input name -> `At` for a link, else the widget's value; the rest has its default.
        mode: `RUNS`, `MUTED` or `BYPASSED`.
    """

    kind: str
    inputs: dict[str, Value] = field(default_factory=dict)
    mode: int = RUNS


@dataclass(frozen=True)
class Graph:
    """A workflow.

    Attributes:
        nodes: In the order of their numbers, from 1.
        form: Of which year its file is.
    """

    nodes: dict[str, Node]
    form: Form = "2024"

    def number(self, name: str) -> int:
        """The id that a node has in both files."""
        return list(self.nodes).index(name) + 1

    def kinds(self) -> set[str]:
        """The old nodes that run in it."""
        return {n.kind for n in self.nodes.values() if n.mode == RUNS} & RECORD.keys()


@dataclass(frozen=True)
class Interface:
    """What a node has.

    Attributes:
        sockets: Name -> type of the inputs that only take links, required ones first.
        widgets: Name -> type and default of the others, in the order of their values.
        outputs: Name and type.
        optional: Names of inputs.
    """

    sockets: dict[str, str]
    widgets: dict[str, tuple[str, Any]]
    outputs: list[tuple[str, str]]
    optional: frozenset[str] = frozenset()


def _core(outputs: str, **inputs: Any) -> Json:
    """A node of the host in the form of the record."""
    required = {
        k: [v] if isinstance(v, str) else [v[0], {"default": v[1]}] for k, v in inputs.items()
    }
    return {"input": {"required": required}, "output": outputs.split()}


_CLIP, _IMAGE, _MASK, _CONDITIONING = "CLIP", "IMAGE", "MASK", "CONDITIONING"
_WHERE = {"x": ("INT", 0), "y": ("INT", 0)}
_SIZE = {"width": ("INT", 64), "height": ("INT", 64)}

CORE: dict[str, Json] = {
    "CheckpointLoaderSimple": _core("MODEL CLIP VAE", ckpt_name="COMBO"),
    "CLIPVisionLoader": _core("CLIP_VISION", clip_name="COMBO"),
    "CLIPTextEncode": _core(_CONDITIONING, text=("STRING", ""), clip=_CLIP),
    "ConditioningCombine": _core(
        _CONDITIONING, conditioning_1=_CONDITIONING, conditioning_2=_CONDITIONING
    ),
    "EmptyLatentImage": _core("LATENT", **_SIZE, batch_size=("INT", 1)),
    "ImageBatch": _core(_IMAGE, image1=_IMAGE, image2=_IMAGE),
    "InvertMask": _core(_MASK, mask=_MASK),
    "KSampler": _core(
        "LATENT",
        model="MODEL",
        seed=("INT", 7),
        steps=("INT", 2),
        cfg=("FLOAT", 6.0),
        sampler_name=("COMBO", "euler"),
        scheduler=("COMBO", "normal"),
        positive=_CONDITIONING,
        negative=_CONDITIONING,
        latent_image="LATENT",
        denoise=("FLOAT", 1.0),
    ),
    "LoadImage": _core("IMAGE MASK", image="COMBO"),
    "MaskComposite": _core(
        _MASK, destination=_MASK, source=_MASK, **_WHERE, operation=("COMBO", "add")
    ),
    "MaskToImage": _core(_IMAGE, mask=_MASK),
    "PreviewImage": _core("", images=_IMAGE),
    "SaveImage": _core("", images=_IMAGE, filename_prefix=("STRING", "ComfyUI")),
    "SolidMask": _core(_MASK, value=("FLOAT", 1.0), **_SIZE),
    "VAEDecode": _core(_IMAGE, samples="LATENT", vae="VAE"),
}
"""The host's own nodes around the old ones, as they have been since 2023."""


@cache
def interface(kind: str) -> Interface:
    """The interface of an old node or of one of the host's.

    Args:
        kind: Its id.
    """
    if kind == REROUTE:
        return Interface({"": "*"}, {}, [("", "*")])
    if kind == PRIMITIVE:
        return Interface({}, {"value": ("FLOAT", 0.0)}, [("FLOAT", "FLOAT")])
    reported = RECORD.get(kind) or CORE[kind]
    sockets: dict[str, str] = {}
    widgets: dict[str, tuple[str, Any]] = {}
    for part in reported["input"].values():
        for name, (kind_or_options, *more) in part.items():
            options = more[0] if more else {}
            if isinstance(kind_or_options, list):
                first = kind_or_options[0] if kind_or_options else None
                widgets[name] = ("COMBO", options.get("default", first))
            elif kind_or_options in WIDGETS:
                widgets[name] = (kind_or_options, options.get("default"))
            else:
                sockets[name] = kind_or_options
    names = reported.get("output_name", reported["output"])
    outputs = list(zip(names, reported["output"], strict=True))
    return Interface(sockets, widgets, outputs, frozenset(reported["input"].get("optional", {})))


def widgets(graph: Graph, node: Node) -> dict[str, Any]:
    """The values of a node's widgets, in their order.

    A linked one keeps its default, except that a primitive writes its own value into it.
    """
    found = {name: default for name, (_, default) in interface(node.kind).widgets.items()}
    for name in found.keys() & node.inputs.keys():
        value = node.inputs[name]
        if isinstance(value, At) and graph.nodes[value.node].kind == PRIMITIVE:
            value = graph.nodes[value.node].inputs["value"]
        if not isinstance(value, At):
            found[name] = value
    return found


# API


def prompt(graph: Graph) -> Json:
    """What the front end exports of a graph: only nodes that run, links to what really runs."""
    exported: Json = {}
    for name, node in graph.nodes.items():
        if node.mode != RUNS or node.kind in (REROUTE, PRIMITIVE):
            continue
        inputs = widgets(graph, node)
        for key, value in node.inputs.items():
            source = _follow(graph, value) if isinstance(value, At) else value
            if source is not None:
                inputs[key] = source
        exported[str(graph.number(name))] = {"inputs": inputs, "class_type": node.kind}
    return exported


def _follow(graph: Graph, at: At) -> Any:
    """Where a link really begins: ``[id, slot]``, a primitive's value, or None for nowhere."""
    node = graph.nodes[at.node]
    if node.kind == PRIMITIVE:
        return node.inputs["value"]
    if node.kind == REROUTE:
        return _follow_input(graph, node, "")
    if node.mode == MUTED:
        return None
    if node.mode == BYPASSED:
        wanted = interface(node.kind).outputs[at.slot][1]
        same = (k for k, kind in interface(node.kind).sockets.items() if kind == wanted)
        return _follow_input(graph, node, next(same))
    return [str(graph.number(at.node)), at.slot]


def _follow_input(graph: Graph, node: Node, name: str) -> Any:
    source = node.inputs[name]
    assert isinstance(source, At)
    return _follow(graph, source)


# UI


def workflow(name: str, graph: Graph) -> Json:
    """What the front end saved of a graph.

    Args:
        name: Of the workflow; decides its permanent id.
        graph: What it holds.
    """
    saved = {key: _saved(graph, key) for key in graph.nodes}
    links: list[list[Any]] = []
    for key, node in graph.nodes.items():
        for slot, socket in enumerate(saved[key]["inputs"]):
            source = node.inputs.get(socket["name"])
            if isinstance(source, At):
                _link(saved, links, source, key, slot)
    _place(graph, saved)
    if graph.form == "2024":
        for node in saved.values():
            for each in ("inputs", "outputs", "widgets_values"):
                if not node[each]:
                    del node[each]
    head: Json = {"last_node_id": len(saved), "last_link_id": len(links)}
    if graph.form == "2025":
        number = uuid.uuid5(uuid.NAMESPACE_URL, f"ip-adapter/legacy/{name}")
        head = {"id": str(number), "revision": 0, **head}
    tail: Json = {"groups": [], "config": {}, "extra": {}, "version": 0.4}
    return {**head, "nodes": list(saved.values()), "links": links, **tail}


def _saved(graph: Graph, name: str) -> Json:
    """A node as it is saved, not yet linked or placed."""
    node, is_new = graph.nodes[name], graph.form == "2025"
    own = interface(node.kind)
    inputs: list[Json] = [{"name": k, "type": v, "link": None} for k, v in own.sockets.items()]
    for key, (kind, _) in own.widgets.items():
        is_link = isinstance(node.inputs.get(key), At)
        if node.kind != PRIMITIVE and (is_new or is_link):
            inputs.append({"name": key, "type": kind, "link": None, "widget": {"name": key}})
    outputs: list[Json] = [{"name": k, "type": v, "links": []} for k, v in own.outputs]
    values: list[Any] = []
    for key, value in widgets(graph, node).items():
        values.append(value)
        if key in OF_THE_PAGE and node.kind not in RECORD:
            values.append(OF_THE_PAGE[key])
    properties: Json = {"Node name for S&R": node.kind}
    if is_new:
        for each in inputs:
            each["localized_name"] = each["name"]
            if each["name"] in own.optional:
                each["shape"] = 7
        mine = OLD_PACK if node.kind in RECORD else {"cnr_id": "comfy-core", "ver": "0.3.27"}
        properties = {**mine, **properties}
    else:
        for slot, each in enumerate(outputs):
            each |= {"shape": 3, "slot_index": slot}
    saved: Json = {"id": graph.number(name), "type": node.kind, "flags": {}, "order": 0}
    saved |= {"mode": node.mode, "inputs": inputs, "outputs": outputs}
    saved |= {"properties": properties, "widgets_values": values}
    if node.kind == REROUTE:
        saved["properties"] = {"showOutputText": False, "horizontal": False}
        outputs[0]["type"] = _type(graph, At(name))
    if node.kind == PRIMITIVE:
        (target,) = (
            key for n in graph.nodes.values() for key, v in n.inputs.items() if v == At(name)
        )
        outputs[0]["widget"] = {"name": target}
        saved |= {"title": target, "properties": {"Run widget replace on values": False}}
        values.append("fixed")
    return saved


def _type(graph: Graph, at: At) -> str:
    """What an output gives, through reroutes."""
    node = graph.nodes[at.node]
    if node.kind != REROUTE:
        return interface(node.kind).outputs[at.slot][1]
    source = node.inputs[""]
    assert isinstance(source, At)
    return _type(graph, source)


def _link(saved: dict[str, Json], links: list[list[Any]], source: At, to: str, slot: int) -> None:
    """Join two sockets: in both nodes, and in the list as [id, from, output, to, input, type]."""
    number, output = len(links) + 1, saved[source.node]["outputs"][source.slot]
    output["links"].append(number)
    saved[to]["inputs"][slot]["link"] = number
    ends = (saved[source.node]["id"], source.slot, saved[to]["id"], slot)
    links.append([number, *ends, output["type"]])


def _place(graph: Graph, saved: dict[str, Json]) -> None:
    """Order and positions: each node right of its sources, columns filled from the top."""
    depth: dict[str, int] = {}

    def column(name: str) -> int:
        if name not in depth:
            links = (v.node for v in graph.nodes[name].inputs.values() if isinstance(v, At))
            depth[name] = 1 + max(map(column, links), default=-1)
        return depth[name]

    bottoms: dict[int, int] = {}
    for order, name in enumerate(sorted(graph.nodes, key=column)):
        node = saved[name]
        sockets = sum("widget" not in each for each in node["inputs"])
        height = 20 * max(sockets, len(node["outputs"])) + 24 * len(node["widgets_values"]) + 26
        height += {"LoadImage": 250, "PreviewImage": 200, "SaveImage": 200}.get(node["type"], 0)
        size = [75, 26] if node["type"] == REROUTE else [300, height]
        top = bottoms.setdefault(column(name), 40)
        bottoms[column(name)] = top + size[1] + 50
        is_new = graph.form == "2025"
        node["order"], node["pos"] = order, [360 * column(name), top]
        node["size"] = size if is_new else {"0": size[0], "1": size[1]}
