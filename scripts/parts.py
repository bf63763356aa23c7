"""What the shipped workflows are made of: their tables, the model files, the parts most share.

An input that is a socket names its source as "node.output"; every other input is a widget value.
Inputs left out keep the host's defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    "ip-adapter-faceid-plusv2_sd15.bin": (
        "ipadapter",
        "h94/IP-Adapter-FaceID",
        "ip-adapter-faceid-plusv2_sd15.bin",
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

FACE_PACK = "buffalo_l"
FACE_FILES = (
    f"insightface/models/{FACE_PACK}/det_10g.onnx",
    f"insightface/models/{FACE_PACK}/w600k_r50.onnx",
)
"""Below models/, from an archive, which the front end cannot download."""


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

ENCODER, PROMPT = "encoder.CLIP_VISION", "encode.image_prompt"


def load_image(name: str, what: str) -> Node:
    """One of the pictures of `pictures.py`, by the middle of its file's name."""
    return Node("LoadImage", {"image": f"ip_adapter_{name}.png"}, f"Load Image ({what})")


def loaders(
    *control_nets: str,
    adapter: str = "ip-adapter_sd15.safetensors",
    checkpoint: str = "v1-5-pruned-emaonly-fp16.safetensors",
) -> Group:
    """Checkpoint, adapter and image encoder by name, and control nets as `net_1`, `net_2`, ..."""
    encoder = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
    nodes = {
        "checkpoint": Node("CheckpointLoaderSimple", {"ckpt_name": checkpoint}),
        "adapter": Node("ImagePromptLoadAdapter", {"adapter_name": adapter}),
        "encoder": Node("CLIPVisionLoader", {"clip_name": encoder}),
    }
    for number, name in enumerate(control_nets, start=1):
        nodes[f"net_{number}"] = Node("ControlNetLoader", {"control_net_name": name})
    return Group("Models", nodes)


def encode_image(image: str, clip_vision: str = ENCODER) -> Node:
    """References -> IMAGE_PROMPT."""
    inputs: dict[str, Value] = {
        "ip_adapter": "adapter.ip_adapter",
        "clip_vision": clip_vision,
        "image": image,
        "fit": "crop",
    }
    return Node("ImagePromptEncode", inputs)


REFERENCE = Group(
    "Reference image",
    {"reference": load_image("reference", "reference"), "encode": encode_image("reference.IMAGE")},
)


def apply_prompt(
    weight: float, prompt: str = PROMPT, model: str = "checkpoint.MODEL", **more: str
) -> Node:
    """MODEL + IMAGE_PROMPT -> MODEL; `more` are the optional inputs."""
    inputs: dict[str, Value] = {
        "model": model,
        "ip_adapter": "adapter.ip_adapter",
        "image_prompt": prompt,
        "weight": weight,
        **more,
    }
    return Node("ImagePromptApply", inputs)


def image_prompt(weight: float, **mask: str) -> Group:
    """The image prompt of `REFERENCE`, applied."""
    return Group("Image prompt", {"apply": apply_prompt(weight, **mask)})


def text_prompt(positive: str) -> Group:
    """The positive prompt, and the negative one that all share."""
    negative = "monochrome, lowres, bad anatomy, worst quality, low quality"
    words = {"Positive prompt": positive, "Negative prompt": negative}
    nodes = {
        title.split()[0].lower(): Node(
            "CLIPTextEncode", {"text": text, "clip": "checkpoint.CLIP"}, title
        )
        for title, text in words.items()
    }
    return Group("Text prompt", nodes)


def sample(
    latent: str = "latent.LATENT",
    positive: str = "positive.CONDITIONING",
    negative: str = "negative.CONDITIONING",
    denoise: float = 1.0,
    seed: int = 42,
) -> Node:
    """The MODEL of `apply` and a latent -> LATENT."""
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


def decode_latent(sampler: str = "sampler") -> Node:
    """LATENT -> IMAGE."""
    return Node("VAEDecode", {"samples": f"{sampler}.LATENT", "vae": "checkpoint.VAE"})


def save_image(name: str, decoded: str = "decode") -> Node:
    """IMAGE -> file."""
    prefix = f"ip_adapter/{name}"
    return Node("SaveImage", {"images": f"{decoded}.IMAGE", "filename_prefix": prefix})


EMPTY_LATENT = Node("EmptyLatentImage", {"width": 512, "height": 512})
SIZE = Group("Size", {"latent": EMPTY_LATENT})
SAMPLING = Group(
    "Sampling", {"latent": EMPTY_LATENT, "sampler": sample(), "decode": decode_latent()}
)


def result(name: str) -> Group:
    """The one picture of a workflow."""
    return Group("Result", {"save": save_image(name)})


def control_net(
    net: str,
    image: str,
    strength: float,
    positive: str = "positive.CONDITIONING",
    negative: str = "negative.CONDITIONING",
) -> Node:
    """A control net or T2I-Adapter that looks at an image."""
    inputs: dict[str, Value] = {
        "positive": positive,
        "negative": negative,
        "control_net": f"{net}.CONTROL_NET",
        "image": f"{image}.IMAGE",
        "vae": "checkpoint.VAE",
        "strength": strength,
    }
    return Node("ControlNetApplyAdvanced", inputs)


def sampling_after(control: str, latent: str = "latent.LATENT") -> Group:
    """Sampling with the conditioning that another node changed."""
    sampler = sample(latent, f"{control}.positive", f"{control}.negative")
    return Group("Sampling", {"sampler": sampler, "decode": decode_latent()})
