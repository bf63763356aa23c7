"""Workflows of the old pack, as its users had them: every old node at least once.

They name the small models of `tests.synthetic.models`, and what `tests.host.legacy_server` puts
beside them.
"""

from __future__ import annotations

from tests.legacy_workflows import (
    BYPASSED,
    MUTED,
    PRIMITIVE,
    REROUTE,
    At,
    Form,
    Graph,
    Node,
    Value,
)
from tests.synthetic.models import (
    ADAPTER_BASE,
    ADAPTER_FACE,
    ADAPTER_PLUS,
    CHECKPOINT,
    CLIP_VISION,
)

COMPOSITION = ADAPTER_PLUS.with_name("ip_plus_composition_sd15.safetensors")
EMBEDS = "legacy/anna.ipadpt"
"""Saved features ``[1, 1024]`` in the input folder."""

WRITTEN = "legacy/written"
"""Prefix of what is saved in the output folder."""

SIZE = 64

MODEL, CLIP, VAE = At("checkpoint", 0), At("checkpoint", 1), At("checkpoint", 2)
STYLE, OTHER, FACE, BOTH = At("style"), At("other"), At("face"), At("both")
ADAPTER, ENCODER = At("adapter"), At("encoder")
POSITIVE, NEGATIVE = At("positive"), At("negative")


def _picture(name: str) -> Node:
    return Node("LoadImage", {"image": f"ip_adapter_{name}.png"})


LOADED = {
    "style": _picture("reference"),
    "other": _picture("reference_2"),
    "both": Node("ImageBatch", {"image1": STYLE, "image2": OTHER}),
    "face": _picture("face"),
    "encoder": Node("CLIPVisionLoader", {"clip_name": CLIP_VISION.name}),
}


def _loaded(*names: str) -> dict[str, Node]:
    return {name: LOADED[name] for name in names}


def _adapter(file: str) -> dict[str, Node]:
    return {"adapter": Node("IPAdapterModelLoader", {"ipadapter_file": file})}


def _sampled(
    form: Form,
    model: At,
    nodes: dict[str, Node],
    *,
    frames: Value = 1,
    text: Value = "a lighthouse on a cliff",
    positive: At = POSITIVE,
    negative: At = NEGATIVE,
) -> Graph:
    """The nodes between a checkpoint and a picture."""
    first = {"checkpoint": Node("CheckpointLoaderSimple", {"ckpt_name": CHECKPOINT.name})}
    last = {
        "positive": Node("CLIPTextEncode", {"text": text, "clip": CLIP}),
        "negative": Node("CLIPTextEncode", {"text": "blurry, noisy", "clip": CLIP}),
        "latent": Node("EmptyLatentImage", {"width": SIZE, "height": SIZE, "batch_size": frames}),
        "sampler": Node(
            "KSampler",
            {
                "model": model,
                "positive": positive,
                "negative": negative,
                "latent_image": At("latent"),
            },
        ),
        "decode": Node("VAEDecode", {"samples": At("sampler"), "vae": VAE}),
        "save": Node("SaveImage", {"images": At("decode"), "filename_prefix": "legacy"}),
    }
    return Graph({**first, **nodes, **last}, form)


def _halves() -> dict[str, Node]:
    """The masks `left` and `right`, of the picture's size."""
    joined: dict[str, Value] = {"destination": At("black"), "source": At("white")}
    return {
        "black": Node("SolidMask", {"value": 0.0, "width": SIZE, "height": SIZE}),
        "white": Node("SolidMask", {"value": 1.0, "width": SIZE // 2, "height": SIZE}),
        "left": Node("MaskComposite", {**joined, "operation": "add"}),
        "right": Node("InvertMask", {"mask": At("left")}),
    }


def _both(first: At, second: At) -> Node:
    return Node("ConditioningCombine", {"conditioning_1": first, "conditioning_2": second})


def _apply(kind: str, model: At, image: At, inputs: dict[str, Value], *, loader: str = "") -> Node:
    """An apply node behind a model loader and an encoder, or behind a unified loader."""
    if loader:
        return Node(kind, {"model": model, "ipadapter": At(loader, 1), "image": image} | inputs)
    start: dict[str, Value] = {"model": model, "ipadapter": ADAPTER, "image": image}
    return Node(kind, start | inputs | {"clip_vision": ENCODER})


def _unified(preset: str) -> dict[str, Node]:
    return {"loader": Node("IPAdapterUnifiedLoader", {"model": MODEL, "preset": preset})}


STANDARD, PLUS = "STANDARD (medium strength)", "PLUS (high strength)"

SIMPLE = _sampled(
    "2024",
    At("bypassed"),
    _loaded("style")
    | _unified(STANDARD)
    | {
        "along": Node(REROUTE, {"": STYLE}),
        "prepared": Node(
            "PrepImageForClipVision",
            {"image": At("along"), "interpolation": "LANCZOS", "crop_position": "top"}
            | {"sharpening": 0.15},
        ),
        "look": Node("PreviewImage", {"images": At("prepared")}, MUTED),
        "apply": _apply(
            *("IPAdapter", At("loader"), At("prepared")),
            {"weight": 0.8, "end_at": 0.889, "weight_type": "style transfer"},
            loader="loader",
        ),
        "patched": Node(REROUTE, {"": At("apply")}),
        "further": Node(REROUTE, {"": At("patched")}),
        "bypassed": Node(
            "IPAdapterAdvanced",
            {"model": At("further"), "ipadapter": At("loader", 1), "image": STYLE, "weight": -0.5},
            BYPASSED,
        ),
    },
)

ADVANCED = _sampled(
    "2025",
    At("scientist"),
    _loaded("style", "other", "both", "encoder")
    | _adapter(ADAPTER_PLUS.name)
    | _halves()
    | {
        "noise": Node(
            "IPAdapterNoise",
            {"type": "dissolve", "strength": 0.45, "blur": 3, "image_optional": STYLE},
        ),
        "muted": Node("IPAdapterNoise", {"type": "gaussian", "strength": 0.33}, MUTED),
        "amount": Node(PRIMITIVE, {"value": 0.85}),
        "apply": _apply(
            *("IPAdapterAdvanced", MODEL, BOTH),
            {"weight": At("amount"), "weight_type": "ease in-out", "combine_embeds": "average"}
            | {"end_at": 0.95, "embeds_scaling": "K+V"}
            | {"image_negative": At("noise"), "attn_mask": At("left")},
        ),
        "scientist": _apply(
            *("IPAdapterMS", At("apply"), STYLE),
            {"weight": 0.72, "weight_type": "composition", "combine_embeds": "norm average"}
            | {"embeds_scaling": "K+V w/ C penalty", "layer_weights": "3:0.8, 6:1.2,\n9:-0.5"}
            | {"image_negative": At("muted")},
        ),
    },
)

PRECISE = _sampled(
    "2024",
    At("composed"),
    _loaded("style", "other", "both")
    | _unified(PLUS)
    | {
        "transfer": _apply(
            *("IPAdapterPreciseStyleTransfer", At("loader"), STYLE),
            {"weight": 0.9, "style_boost": 1.4, "embeds_scaling": "K+mean(V) w/ C penalty"},
            loader="loader",
        ),
        "layout": _apply(
            *("IPAdapterPreciseComposition", At("transfer"), BOTH),
            {"weight": 0.6, "composition_boost": 0.35, "combine_embeds": "subtract"},
            loader="loader",
        ),
        "composed": Node(
            "IPAdapterStyleComposition",
            {"model": At("layout"), "ipadapter": At("loader", 1), "image_style": STYLE}
            | {"image_composition": OTHER, "weight_style": 1.15, "weight_composition": 0.7}
            | {"expand_style": True, "image_negative": OTHER},
        ),
    },
)

BATCHES = _sampled(
    "2025",
    At("enhanced"),
    _loaded("style", "other", "both", "encoder")
    | _adapter(ADAPTER_BASE.name)
    | _halves()
    | {
        "batch": _apply(
            *("IPAdapterBatch", MODEL, BOTH),
            {"weight": 0.9, "weight_type": "weak input", "encode_batch_size": 1},
        ),
        "transfer": _apply(
            *("IPAdapterPreciseStyleTransferBatch", At("batch"), BOTH),
            {"weight": 0.5, "style_boost": 1.2, "attn_mask": At("left")},
        ),
        "layout": _apply(
            *("IPAdapterPreciseCompositionBatch", At("transfer"), BOTH),
            {"weight": 0.5, "composition_boost": -0.2, "combine_embeds": "add"},
        ),
        "composed": Node(
            "IPAdapterStyleCompositionBatch",
            {"model": At("layout"), "ipadapter": ADAPTER, "clip_vision": ENCODER}
            | {"image_style": BOTH, "image_composition": BOTH}
            | {"weight_style": 0.8, "weight_composition": 0.4, "end_at": 0.5},
        ),
        "enhanced": _apply(
            *("IPAdapterClipVisionEnhancerBatch", At("composed"), OTHER),
            {"weight": 0.6, "weight_type": "strong middle", "enhance_tiles": 2}
            | {"enhance_ratio": 0.65, "encode_batch_size": 2, "attn_mask": At("right")},
        ),
    },
    frames=2,
)

WEIGHTS = _sampled(
    "2024",
    At("third"),
    _loaded("style", "other", "both", "encoder")
    | _adapter(ADAPTER_BASE.name)
    | {
        "weights": Node(
            "IPAdapterWeights",
            {"weights": "1.0, 0.0", "timing": "ease_in_out", "frames": 3, "image": BOTH}
            | {"add_starting_frames": 1, "method": "shift batches"},
        ),
        "again": Node(
            "IPAdapterWeightsFromStrategy", {"weights_strategy": At("weights", 5), "image": BOTH}
        ),
        "schedule": Node(
            "IPAdapterPromptScheduleFromWeightsStrategy",
            {"weights_strategy": At("again", 5), "prompt": "a lighthouse\na harbour, evening"},
        ),
        "joined": Node("IPAdapterCombineWeights", {"weights_1": At("weights"), "weights_2": 0.25}),
        "first": _apply("IPAdapterBatch", MODEL, At("weights", 3), {"weight": At("weights")}),
        "second": _apply(
            *("IPAdapterBatch", At("first"), At("again", 4)),
            {"weight": At("again", 1), "end_at": 0.7},
        ),
        "third": _apply(
            *("IPAdapterBatch", At("second"), STYLE),
            {"weight": At("joined"), "weight_type": "style transfer"},
        ),
    },
    frames=At("weights", 2),
    text=At("schedule"),
)

TILES = _sampled(
    "2025",
    At("enhanced"),
    _loaded("style", "encoder")
    | _adapter(ADAPTER_PLUS.name)
    | _halves()
    | {
        "tiled": _apply(
            *("IPAdapterTiled", MODEL, STYLE),
            {"weight": 0.7, "sharpening": 0.2, "attn_mask": At("left")},
        ),
        "tiles": Node("PreviewImage", {"images": At("tiled", 1)}),
        "masks": Node("MaskToImage", {"mask": At("tiled", 2)}),
        "regions": Node("PreviewImage", {"images": At("masks")}),
        "frames": _apply(
            *("IPAdapterTiledBatch", At("tiled"), STYLE), {"weight": 0.4, "encode_batch_size": 3}
        ),
        "enhanced": _apply(
            *("IPAdapterClipVisionEnhancer", At("frames"), STYLE),
            {"weight": 0.5, "enhance_tiles": 2, "enhance_ratio": 0.75},
        ),
    },
    frames=2,
)

EMBEDDED = _sampled(
    "2024",
    At("frames"),
    _loaded("style", "other", "encoder")
    | _adapter(ADAPTER_BASE.name)
    | _halves()
    | {
        "one": Node(
            "IPAdapterEncoder",
            {"ipadapter": ADAPTER, "image": STYLE, "weight": 0.82}
            | {"mask": At("left"), "clip_vision": ENCODER},
        ),
        "two": Node(
            "IPAdapterEncoder", {"ipadapter": ADAPTER, "image": OTHER, "clip_vision": ENCODER}
        ),
        "kept": Node("IPAdapterLoadEmbeds", {"embeds": EMBEDS}),
        "joined": Node(
            "IPAdapterCombineEmbeds",
            {"embed1": At("one"), "method": "norm average"}
            | {"embed2": At("two"), "embed3": At("kept")},
        ),
        "all": Node("IPAdapterCombineEmbeds", {"embed1": At("joined"), "embed2": At("two")}),
        "written": Node("IPAdapterSaveEmbeds", {"embeds": At("all"), "filename_prefix": WRITTEN}),
        "apply": Node(
            "IPAdapterEmbeds",
            {"model": MODEL, "ipadapter": ADAPTER, "pos_embed": At("joined"), "weight": 0.65}
            | {"neg_embed": At("two", 1), "weight_type": "reverse in-out"}
            | {"attn_mask": At("right"), "clip_vision": ENCODER},
        ),
        "frames": Node(
            "IPAdapterEmbedsBatch",
            {"model": At("apply"), "ipadapter": ADAPTER, "pos_embed": At("all"), "weight": 0.45}
            | {"start_at": 0.1, "clip_vision": ENCODER},
        ),
    },
    frames=2,
)

REGIONS = _sampled(
    "2025",
    At("apply"),
    _loaded("style", "other")
    | _unified(PLUS)
    | _halves()
    | {
        "harbour": Node("CLIPTextEncode", {"text": "a harbour", "clip": CLIP}),
        "hills": Node("CLIPTextEncode", {"text": "hills in snow", "clip": CLIP}),
        "first": Node(
            "IPAdapterRegionalConditioning",
            {"image": STYLE, "image_weight": 0.9, "prompt_weight": 1.1, "mask": At("left")}
            | {"weight_type": "strong style transfer"}
            | {"positive": At("harbour"), "negative": NEGATIVE},
        ),
        "second": Node(
            "IPAdapterRegionalConditioning",
            {"image": OTHER, "image_weight": 0.55, "prompt_weight": 0.8, "mask": At("right")}
            | {"end_at": 0.75, "positive": At("hills"), "negative": NEGATIVE},
        ),
        "params": Node(
            "IPAdapterCombineParams", {"params_1": At("first"), "params_2": At("second")}
        ),
        "apply": Node(
            "IPAdapterFromParams",
            {"model": At("loader"), "ipadapter": At("loader", 1)}
            | {"ipadapter_params": At("params"), "embeds_scaling": "K+V"},
        ),
        "texts": _both(At("first", 1), At("second", 1)),
        "avoided": _both(At("first", 2), At("second", 2)),
    },
    positive=At("texts"),
    negative=At("avoided"),
)

FACES = _sampled(
    "2024",
    At("kolors"),
    _loaded("face", "encoder")
    | _adapter(ADAPTER_FACE.name)
    | {
        "loader": Node(
            "IPAdapterUnifiedLoaderFaceID",
            {"model": MODEL, "preset": "FACEID PLUS V2", "lora_strength": 0.55},
        ),
        "insight": Node("IPAdapterInsightFaceLoader"),
        "apply": _apply(
            *("IPAdapterFaceID", At("loader"), FACE),
            {"weight": 0.85, "weight_faceidv2": 1.7},
            loader="loader",
        ),
        "seen": Node("PreviewImage", {"images": At("apply", 1)}),
        "frames": _apply(
            *("IPAAdapterFaceIDBatch", At("apply"), FACE),
            {"weight": 0.4, "weight_faceidv2": 1.25},
            loader="loader",
        ),
        "kolors": _apply(
            *("IPAdapterFaceIDKolors", At("frames"), FACE),
            {"weight": 0.3, "weight_kolors": 0.65, "insightface": At("insight")},
        ),
    },
)

COMMUNITY = _sampled(
    "2025",
    At("apply"),
    _loaded("style")
    | _unified(STANDARD)
    | {
        "community": Node(
            "IPAdapterUnifiedLoaderCommunity",
            {"model": At("loader"), "preset": "Composition", "ipadapter": At("loader", 1)},
        ),
        "apply": _apply(
            *("IPAdapterAdvanced", At("community"), STYLE),
            {"weight_type": "style and composition"},
            loader="community",
        ),
    },
)

GRAPHS: dict[str, Graph] = {
    "simple": SIMPLE,
    "advanced": ADVANCED,
    "precise": PRECISE,
    "batches": BATCHES,
    "weights": WEIGHTS,
    "tiles": TILES,
    "embeds": EMBEDDED,
    "regions": REGIONS,
    "faces": FACES,
    "community": COMMUNITY,
}
"""Name -> workflow."""
