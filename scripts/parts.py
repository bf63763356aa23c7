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
    "ip-adapter-plus-face_sd15.safetensors": (
        "ipadapter",
        "h94/IP-Adapter",
        "models/ip-adapter-plus-face_sd15.safetensors",
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


def note(shows: str, *points: str) -> str:
    """An explanation in Markdown: what the workflow shows, then what to put in and to turn."""
    return "\n".join([shows, "", *(f"- {point}" for point in points)])


# The parts that most workflows share.

PLUS = "ip-adapter-plus_sd15.safetensors"
PLUS_FACE = "ip-adapter-plus-face_sd15.safetensors"
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


def reference(title: str, picture: str, what: str, suffix: str = "") -> Group:
    """A picture and what is encoded of it: `reference` and `encode`, each with the suffix."""
    name = f"reference{suffix}"
    nodes = {name: load_image(picture, what), f"encode{suffix}": encode_image(f"{name}.IMAGE")}
    return Group(title, nodes)


REFERENCE = reference("Reference image", "reference", "reference")


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


def words(title: str, text: str) -> Node:
    """Text -> CONDITIONING."""
    return Node("CLIPTextEncode", {"text": text, "clip": "checkpoint.CLIP"}, title)


NEGATIVE = words("Negative prompt", "monochrome, lowres, bad anatomy, worst quality, low quality")
"""What all workflows keep away from."""


def text_prompt(positive: str) -> Group:
    """The positive prompt, and the negative one that all share."""
    nodes = {"positive": words("Positive prompt", positive), "negative": NEGATIVE}
    return Group("Text prompt", nodes)


def sample(
    latent: str = "latent.LATENT",
    positive: str = "positive.CONDITIONING",
    negative: str = "negative.CONDITIONING",
    denoise: float = 1.0,
    seed: int = 42,
    model: str = "apply.model",
) -> Node:
    """A MODEL and a latent -> LATENT."""
    inputs: dict[str, Value] = {
        "model": model,
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


def scaled_picture(title: str, image: Node) -> Group:
    """A picture to work on, at the size SD 1.5 was trained with; its proportions stay."""
    inputs: dict[str, Value] = {
        "image": "photo.IMAGE",
        "upscale_method": "lanczos",
        "megapixels": 0.25,
    }
    return Group(title, {"photo": image, "scale": Node("ImageScaleToTotalPixels", inputs)})


ENCODE_PICTURE = Node("VAEEncode", {"pixels": "scale.IMAGE", "vae": "checkpoint.VAE"})
"""The picture of `scaled_picture` -> LATENT."""


def influence(layers: str, title: str | None = None) -> Node:
    """In which layers an image prompt acts -> INFLUENCE."""
    inputs: dict[str, Value] = {"weight": 1.0, "layers": layers, "scaling": "V only"}
    return Node("ImagePromptInfluence", inputs, title)


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
