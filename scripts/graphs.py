"""The shipped workflows as tables: which nodes, in which columns and groups, joined how.

`workflows.py` lays them out and writes the JSON. An input that is a socket names its source as
"node.output"; every other input is a widget value. Inputs left out keep the host's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

Value = str | int | float | bool

CONTROLNETS = "comfyanonymous/ControlNet-v1-1_fp16_safetensors"
MODELS = {
    "v1-5-pruned-emaonly-fp16.safetensors": (
        "checkpoints",
        "Comfy-Org/stable-diffusion-v1-5-archive",
        "v1-5-pruned-emaonly-fp16.safetensors",
    ),
    "sd-v1-5-inpainting.safetensors": (
        "checkpoints",
        "webui/stable-diffusion-inpainting",
        "sd-v1-5-inpainting.safetensors",
    ),
    "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": (
        "clip_vision",
        "h94/IP-Adapter",
        "models/image_encoder/model.safetensors",
    ),
    "ip-adapter_sd15.safetensors": (
        "ipadapter",
        "h94/IP-Adapter",
        "models/ip-adapter_sd15.safetensors",
    ),
    "ip-adapter-plus_sd15.safetensors": (
        "ipadapter",
        "h94/IP-Adapter",
        "models/ip-adapter-plus_sd15.safetensors",
    ),
    "control_v11p_sd15_openpose_fp16.safetensors": (
        "controlnet",
        CONTROLNETS,
        "control_v11p_sd15_openpose_fp16.safetensors",
    ),
    "control_v11f1p_sd15_depth_fp16.safetensors": (
        "controlnet",
        CONTROLNETS,
        "control_v11f1p_sd15_depth_fp16.safetensors",
    ),
    "t2iadapter_depth_sd15v2.pth": (
        "controlnet",
        "TencentARC/T2I-Adapter",
        "models/t2iadapter_depth_sd15v2.pth",
    ),
}
"""File name -> folder below models/, Hugging Face repository, file there.

The front end offers to download what is missing, under the name on the left.
"""


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    Attributes:
        kind: The host's node id.
        inputs: Input name -> "node.output" for a socket, else the widget's value.
        title: Shown instead of the node's own name.
    """

    kind: str
    inputs: dict[str, Value]
    title: str | None = None


@dataclass(frozen=True)
class Group:
    """A titled frame around nodes that stand below one another."""

    title: str
    nodes: dict[str, Node]


@dataclass(frozen=True)
class Graph:
    """A workflow: its explanation, and columns of groups from left to right."""

    note: str
    columns: tuple[tuple[Group, ...], ...]


# The parts that most workflows share.


def _image(name: str, what: str) -> Node:
    return Node("LoadImage", {"image": f"ip_adapter_{name}.png"}, f"Load Image ({what})")


def _models(
    *control_nets: str,
    adapter: str = "ip-adapter_sd15.safetensors",
    checkpoint: str = "v1-5-pruned-emaonly-fp16.safetensors",
) -> Group:
    encoder = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
    nodes = {
        "checkpoint": Node("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "adapter": Node("ImagePromptLoadAdapter", {"adapter_name": adapter}),
        "encoder": Node("CLIPVisionLoader", {"clip_name": encoder}),
    }
    for number, name in enumerate(control_nets, start=1):
        nodes[f"net_{number}"] = Node("ControlNetLoader", {"control_net_name": name})
    return Group("Models", nodes)


def _encode(image: str) -> Node:
    inputs: dict[str, Value] = {
        "ip_adapter": "adapter.ip_adapter",
        "clip_vision": "encoder.CLIP_VISION",
        "image": image,
        "fit": "crop",
    }
    return Node("ImagePromptEncode", inputs)


REFERENCE = Group(
    "Reference image",
    {"reference": _image("reference", "reference"), "encode": _encode("reference.IMAGE")},
)


def _apply(weight: float, prompt: str = "encode.image_prompt", **mask: str) -> Node:
    inputs: dict[str, Value] = {
        "model": "checkpoint.MODEL",
        "ip_adapter": "adapter.ip_adapter",
        "image_prompt": prompt,
        "weight": weight,
        **mask,
    }
    return Node("ImagePromptApply", inputs)


def _image_prompt(weight: float, **mask: str) -> Group:
    return Group("Image prompt", {"apply": _apply(weight, **mask)})


def _text(positive: str) -> Group:
    negative = "monochrome, lowres, bad anatomy, worst quality, low quality"
    words = {"Positive prompt": positive, "Negative prompt": negative}
    nodes = {
        title.split()[0].lower(): Node(
            "CLIPTextEncode", {"text": text, "clip": "checkpoint.CLIP"}, title
        )
        for title, text in words.items()
    }
    return Group("Text prompt", nodes)


def _sampler(
    latent: str = "latent.LATENT",
    positive: str = "positive.CONDITIONING",
    negative: str = "negative.CONDITIONING",
    denoise: float = 1.0,
    seed: int = 42,
) -> Node:
    inputs: dict[str, Value] = {
        "model": "apply.model",
        "positive": positive,
        "negative": negative,
        "latent_image": latent,
        "seed": seed,
        "steps": 25,
        "cfg": 7.0,
        "sampler_name": "dpmpp_2m",
        "scheduler": "karras",
        "denoise": denoise,
    }
    return Node("KSampler", inputs)


def _decode(sampler: str = "sampler") -> Node:
    return Node("VAEDecode", {"samples": f"{sampler}.LATENT", "vae": "checkpoint.VAE"})


def _save(name: str, decoded: str = "decode") -> Node:
    prefix = f"ip_adapter/{name}"
    return Node("SaveImage", {"images": f"{decoded}.IMAGE", "filename_prefix": prefix})


EMPTY_LATENT = Node("EmptyLatentImage", {"width": 512, "height": 512})
SIZE = Group("Size", {"latent": EMPTY_LATENT})
SAMPLING = Group("Sampling", {"latent": EMPTY_LATENT, "sampler": _sampler(), "decode": _decode()})


def _result(name: str) -> Group:
    return Group("Result", {"save": _save(name)})


def _control(
    net: str,
    image: str,
    strength: float,
    positive: str = "positive.CONDITIONING",
    negative: str = "negative.CONDITIONING",
) -> Node:
    inputs: dict[str, Value] = {
        "positive": positive,
        "negative": negative,
        "control_net": f"{net}.CONTROL_NET",
        "image": f"{image}.IMAGE",
        "vae": "checkpoint.VAE",
        "strength": strength,
    }
    return Node("ControlNetApplyAdvanced", inputs)


def _sampling_after(control: str, latent: str = "latent.LATENT") -> Group:
    sampler = _sampler(latent, f"{control}.positive", f"{control}.negative")
    return Group("Sampling", {"sampler": sampler, "decode": _decode()})


# The workflows.

TEXT_AND_IMAGE = Graph(
    "A **reference image** and a **text prompt** together: the picture shows what it should look "
    "like, the words say what is different.\n\n"
    "- **weight** (Apply IP-Adapter): 1 follows the reference closely, 0.5 to 0.7 leaves room for "
    "the text.\n"
    "- **fit**: *crop* encodes the middle of the reference, *pad* all of it.",
    (
        (_models(),),
        (REFERENCE,),
        (_image_prompt(0.7), _text("a lighthouse on a cliff in winter, snow, best quality")),
        (SAMPLING,),
        (_result("text_and_image"),),
    ),
)

IMAGE_ONLY = Graph(
    "**Variations of a picture without words.** The positive prompt stays empty and the weight is "
    "1, so the image prompt decides alone.\n\n"
    "The *plus* adapter looks at the reference in more detail; with `ip-adapter_sd15` the results "
    "stray further from it.",
    (
        (_models(adapter="ip-adapter-plus_sd15.safetensors"),),
        (REFERENCE,),
        (_image_prompt(1.0), _text("")),
        (SAMPLING,),
        (_result("image_only"),),
    ),
)

CONTROLNET_POSE_DEPTH = Graph(
    "The **image prompt** gives the look, two **ControlNets** the structure: one a pose, the other "
    "a depth map.\n\n"
    "Both maps are loaded ready made; replace them with your own, or put a preprocessor in front. "
    "A strength of 0 switches a ControlNet off.",
    (
        (
            _models(
                "control_v11p_sd15_openpose_fp16.safetensors",
                "control_v11f1p_sd15_depth_fp16.safetensors",
            ),
        ),
        (REFERENCE, Group("Pose", {"pose": _image("pose", "pose")})),
        (
            _image_prompt(0.7),
            _text("a dancer on a stage, best quality"),
            Group("Depth", {"depth": _image("depth", "depth")}),
        ),
        (
            Group(
                "Control",
                {
                    "control": _control("net_1", "pose", 0.8),
                    "control_2": _control(
                        "net_2", "depth", 0.5, "control.positive", "control.negative"
                    ),
                },
            ),
            SIZE,
        ),
        (_sampling_after("control_2"),),
        (_result("controlnet_pose_depth"),),
    ),
)

T2I_ADAPTER = Graph(
    "The **image prompt** gives the look, a **T2I-Adapter** the structure from a depth map.\n\n"
    "A T2I-Adapter is smaller and faster than a ControlNet; the same node loads both.",
    (
        (_models("t2iadapter_depth_sd15v2.pth"),),
        (REFERENCE, Group("Depth", {"depth": _image("depth", "depth")})),
        (_image_prompt(0.7), _text("a valley between mountains, best quality")),
        (Group("Control", {"control": _control("net_1", "depth", 0.8)}), SIZE),
        (_sampling_after("control"),),
        (_result("t2i_adapter"),),
    ),
)


def _picture(title: str, image: Node) -> Group:
    """A picture to work on, at the size SD 1.5 was trained with; its proportions stay."""
    scaled: dict[str, Value] = {
        "image": "photo.IMAGE",
        "upscale_method": "lanczos",
        "megapixels": 0.25,
    }
    return Group(title, {"photo": image, "scale": Node("ImageScaleToTotalPixels", scaled)})


IMAGE_TO_IMAGE = Graph(
    "A **photo** keeps its composition and takes the look of the **reference**.\n\n"
    "**denoise** (KSampler) says how much of the photo may change: 0.4 a little, 0.8 almost all.",
    (
        (_models(),),
        (REFERENCE, _picture("Photo to repaint", _image("photo", "photo"))),
        (_image_prompt(0.8), _text("best quality")),
        (
            Group(
                "Sampling",
                {
                    "latent": Node("VAEEncode", {"pixels": "scale.IMAGE", "vae": "checkpoint.VAE"}),
                    "sampler": _sampler(denoise=0.6),
                    "decode": _decode(),
                },
            ),
        ),
        (_result("image_to_image"),),
    ),
)

INPAINTING = Graph(
    "Repaints the **masked part** of a picture after the **reference**.\n\n"
    "To paint a mask, right-click the picture and choose *Open in MaskEditor*. Apply IP-Adapter "
    "gets the same mask, so the reference acts only there.",
    (
        (_models(checkpoint="sd-v1-5-inpainting.safetensors"),),
        (REFERENCE, _picture("Picture with mask", _image("inpaint", "with mask"))),
        (_image_prompt(1.0, mask="photo.MASK"), _text("best quality")),
        (
            Group(
                "Masked picture",
                {
                    "inpaint": Node(
                        "InpaintModelConditioning",
                        {
                            "positive": "positive.CONDITIONING",
                            "negative": "negative.CONDITIONING",
                            "vae": "checkpoint.VAE",
                            "pixels": "scale.IMAGE",
                            "mask": "photo.MASK",
                        },
                    ),
                },
            ),
        ),
        (_sampling_after("inpaint", "inpaint.latent"),),
        (_result("inpainting"),),
    ),
)

TWO_REFERENCES = Graph(
    "**Two reference images** as one image prompt: what they show is mixed.\n\n"
    "Chain *Join Image Prompts* for more references. To give each its own weight, use one "
    "*Apply IP-Adapter* for each instead.",
    (
        (_models(),),
        (
            REFERENCE,
            Group(
                "Second reference image",
                {
                    "reference_2": _image("reference_2", "second reference"),
                    "encode_2": _encode("reference_2.IMAGE"),
                },
            ),
        ),
        (
            Group(
                "Image prompt",
                {
                    "join": Node(
                        "ImagePromptJoin",
                        {"first": "encode.image_prompt", "second": "encode_2.image_prompt"},
                    ),
                    "apply": _apply(0.8, "join.image_prompt"),
                },
            ),
            _text("best quality"),
        ),
        (SAMPLING,),
        (_result("two_references"),),
    ),
)


def _seed(number: int) -> Group:
    """One picture from a seed of its own. The front end writes the seed into the file's name."""
    name, title = f"sampler_{number}", f"Sampler {number}"
    nodes = {
        name: replace(_sampler(seed=number), title=title),
        f"decode_{number}": _decode(name),
        f"save_{number}": _save(f"seed_%{title}.seed%", f"decode_{number}"),
    }
    return Group(f"Seed {number}", nodes)


SEED_BATCH = Graph(
    "**Four seeds of one prompt in one run.** Model, image prompt and text are prepared once and "
    "shared.\n\n"
    "Every picture has its own seed, which is also in its file name: keep what you like, change "
    "the other seeds and run again. Only the changed ones are made anew.",
    (
        (_models(),),
        (REFERENCE, SIZE),
        (_image_prompt(0.7), _text("a lighthouse on a cliff, best quality")),
        *((_seed(number),) for number in (1, 2, 3, 4)),
    ),
)

GRAPHS = {
    "text_and_image": TEXT_AND_IMAGE,
    "image_only": IMAGE_ONLY,
    "controlnet_pose_depth": CONTROLNET_POSE_DEPTH,
    "t2i_adapter": T2I_ADAPTER,
    "image_to_image": IMAGE_TO_IMAGE,
    "inpainting": INPAINTING,
    "two_references": TWO_REFERENCES,
    "seed_batch": SEED_BATCH,
}
"""Every shipped workflow by the name of its file."""
