"""The shipped workflows with faces: one read as a picture, one recognised, two people."""

from __future__ import annotations

from scripts.parts import (
    ENCODER,
    FACE_PACK,
    NEGATIVE,
    PLUS_FACE,
    SAMPLING,
    Graph,
    Group,
    Node,
    Value,
    apply_prompt,
    decode_latent,
    encode_image,
    load_image,
    loaders,
    note,
    reference,
    result,
    sample,
    text_prompt,
    words,
)


def _prepared(picture: str, what: str, position: str) -> dict[str, Node]:
    """A picture, and the square of it that the encoder gets."""
    inputs: dict[str, Value] = {"image": "portrait.IMAGE", "position": position}
    return {
        "portrait": load_image(picture, what),
        "prepare": Node("ImagePromptPrepare", inputs),
        "preview": Node("PreviewImage", {"images": "prepare.image"}, "What the encoder sees"),
    }


FACE = Graph(
    note(
        "**A face as a prompt**, with the *plus-face* adapter: it was trained on faces and reads "
        "them as pictures. No face recogniser is needed, and its licence is Apache-2.0.",
        "**Put in**: a picture that is nearly filled by the face.",
        "**position** (Prepare Reference): which square of the picture is taken; look at *What the "
        "encoder sees*.",
        "**weight** (Apply IP-Adapter): 0.5 to 0.8. More looks alike more, and follows the text "
        "less.",
        "Closer to the person: the template *05_face_identity*.",
    ),
    (
        (loaders(adapter=PLUS_FACE),),
        (Group("Face", _prepared("portrait", "face", "center")),),
        (
            Group(
                "Image prompt",
                {"encode": encode_image("prepare.image"), "apply": apply_prompt(0.7)},
            ),
            text_prompt("portrait of a person as an astronaut, best quality"),
        ),
        (SAMPLING,),
        (result("face"),),
    ),
)

FACE_IDENTITY = Graph(
    note(
        "**The person of a picture in a new one**, with FaceID-PlusV2: who it is comes from a face "
        "recogniser, what the face looks like from the image encoder.",
        "**Needed**: `python -m pip install onnxruntime` in ComfyUI's Python, and `buffalo_l.zip` "
        "of the [insightface releases](https://github.com/deepinsight/insightface/releases), "
        "unpacked into `models/insightface/models/buffalo_l`. The page does not download `.bin` "
        "files: put [the adapter](https://huggingface.co/h94/IP-Adapter-FaceID) into "
        "`models/ipadapter` yourself.",
        "**Licence**: the face models and the FaceID files are for non-commercial research only.",
        "**index** (Detect Face): another face of the picture; *Preview Image* shows which.",
        "**weight** (Apply IP-Adapter): 0.6 to 1. **strength** (LoRA): 0.5 to 0.8; it belongs to "
        "the adapter and is in its file.",
    ),
    (
        (
            loaders(adapter="ip-adapter-faceid-plusv2_sd15.bin"),
            Group(
                "Face model",
                {"face_model": Node("ImagePromptLoadFaceModel", {"pack_name": FACE_PACK})},
            ),
        ),
        (
            Group(
                "Face",
                {
                    "portrait": load_image("face", "face"),
                    "detect": Node(
                        "ImagePromptDetectFace",
                        {
                            "face_model": "face_model.face_model",
                            "image": "portrait.IMAGE",
                            "pick": "largest",
                            "index": 0,
                        },
                    ),
                    "preview": Node("PreviewImage", {"images": "detect.crop"}),
                },
            ),
        ),
        (
            Group(
                "Image prompt",
                {
                    "encode": Node(
                        "ImagePromptEncodeFace",
                        {
                            "ip_adapter": "adapter.ip_adapter",
                            "face": "detect.face",
                            "clip_vision": ENCODER,
                        },
                    ),
                    "lora": Node(
                        "ImagePromptFaceLoRA",
                        {
                            "model": "checkpoint.MODEL",
                            "ip_adapter": "adapter.ip_adapter",
                            "strength": 0.6,
                        },
                    ),
                    "apply": apply_prompt(0.8, model="lora.model"),
                },
            ),
            text_prompt("portrait of a person as an astronaut, best quality"),
        ),
        (SAMPLING,),
        (result("face_identity"),),
    ),
)

WIDE, HIGH = 768, 512


def _person(number: int, side: str, picture: str, text: str) -> Group:
    """One of two people: a face and a text."""
    shown = reference(f"{side} person", picture, side.lower(), f"_{number}").nodes
    return Group(f"{side} person", {**shown, f"text_{number}": words(f"Text ({side})", text)})


def _region(number: int, side: str, mask: str, **before: str) -> Node:
    inputs: dict[str, Value] = {
        "image_prompt": f"encode_{number}.image_prompt",
        "weight": 0.8,
        "mask": mask,
        "positive": f"text_{number}.CONDITIONING",
        **before,
    }
    return Node("ImagePromptRegion", inputs, f"Image Prompt Region ({side})")


def _solid(value: float, width: int, title: str) -> Node:
    return Node("SolidMask", {"value": value, "width": width, "height": HIGH}, title)


TWO_PEOPLE = Graph(
    note(
        "**Two people in one picture**, each with a face and a text of its own. An *Image Prompt "
        "Region* keeps both to a mask: the left and the right half, made in the graph.",
        "**Put in**: two pictures, each nearly filled by a face, and what each person is or does.",
        "**weight** (Image Prompt Region): how closely each follows its picture, 0.5 to 0.9. "
        "**text_weight**: how much its text counts.",
        "**width** (Mask: left part): where the border is. For parts of any form, connect a mask "
        "of *Load Image* instead.",
        "The text of the whole picture also joins them: say there how many people are where.",
    ),
    (
        (loaders(adapter=PLUS_FACE),),
        (_person(1, "Left", "portrait", "a woman in a green coat"),),
        (_person(2, "Right", "portrait_2", "a man in a yellow jacket"),),
        (
            Group(
                "Masks",
                {
                    "black": _solid(0.0, WIDE, "Mask: whole picture"),
                    "white": _solid(1.0, WIDE // 2, "Mask: left part"),
                    "left": Node(
                        "MaskComposite",
                        {
                            "destination": "black.MASK",
                            "source": "white.MASK",
                            "x": 0,
                            "y": 0,
                            "operation": "add",
                        },
                    ),
                    "right": Node("InvertMask", {"mask": "left.MASK"}, "Invert Mask: right part"),
                },
            ),
            Group(
                "Whole picture",
                {
                    "whole": words("Text (whole picture)", "two people at a market, best quality"),
                    "negative": NEGATIVE,
                },
            ),
        ),
        (
            Group(
                "Regions",
                {
                    "region_1": _region(1, "left", "left.MASK"),
                    "region_2": _region(2, "right", "right.MASK", regions="region_1.regions"),
                    "both": Node(
                        "ConditioningCombine",
                        {
                            "conditioning_1": "region_1.positive",
                            "conditioning_2": "region_2.positive",
                        },
                    ),
                    "all": Node(
                        "ConditioningCombine",
                        {
                            "conditioning_1": "both.CONDITIONING",
                            "conditioning_2": "whole.CONDITIONING",
                        },
                    ),
                    "apply": Node(
                        "ImagePromptApplyRegions",
                        {
                            "model": "checkpoint.MODEL",
                            "ip_adapter": "adapter.ip_adapter",
                            "regions": "region_2.regions",
                            "weight": 1.0,
                        },
                    ),
                },
            ),
        ),
        (
            Group(
                "Sampling",
                {
                    "latent": Node("EmptyLatentImage", {"width": WIDE, "height": HIGH}),
                    "sampler": sample(positive="all.CONDITIONING"),
                    "decode": decode_latent(),
                },
            ),
        ),
        (result("two_people"),),
    ),
)
