"""The shipped workflows as tables: which nodes, in which columns and groups, joined how.

`workflows.py` lays them out and writes the JSON.
"""

from __future__ import annotations

from dataclasses import replace

from scripts.parts import (
    ENCODER,
    FACE_PACK,
    REFERENCE,
    SAMPLING,
    SIZE,
    Graph,
    Group,
    Node,
    Value,
    apply_prompt,
    control_net,
    decode_latent,
    encode_image,
    image_prompt,
    load_image,
    loaders,
    result,
    sample,
    sampling_after,
    save_image,
    text_prompt,
)

TEXT_AND_IMAGE = Graph(
    "A **reference image** and a **text prompt** together: the picture shows what it should look "
    "like, the words say what is different.\n\n"
    "- **weight** (Apply IP-Adapter): 1 follows the reference closely, 0.5 to 0.7 leaves room for "
    "the text.\n"
    "- **fit**: *crop* encodes the middle of the reference, *pad* all of it.",
    (
        (loaders(),),
        (REFERENCE,),
        (image_prompt(0.7), text_prompt("a lighthouse on a cliff in winter, snow, best quality")),
        (SAMPLING,),
        (result("text_and_image"),),
    ),
)

IMAGE_ONLY = Graph(
    "**Variations of a picture without words.** The positive prompt stays empty and the weight is "
    "1, so the image prompt decides alone.\n\n"
    "The *plus* adapter looks at the reference in more detail; with `ip-adapter_sd15` the results "
    "stray further from it.",
    (
        (loaders(adapter="ip-adapter-plus_sd15.safetensors"),),
        (REFERENCE,),
        (image_prompt(1.0), text_prompt("")),
        (SAMPLING,),
        (result("image_only"),),
    ),
)

CONTROLNET_POSE_DEPTH = Graph(
    "The **image prompt** gives the look, two **ControlNets** the structure: one a pose, the other "
    "a depth map.\n\n"
    "Both maps are loaded ready made; replace them with your own, or put a preprocessor in front. "
    "A strength of 0 switches a ControlNet off.",
    (
        (
            loaders(
                "control_v11p_sd15_openpose_fp16.safetensors",
                "control_v11f1p_sd15_depth_fp16.safetensors",
            ),
        ),
        (REFERENCE, Group("Pose", {"pose": load_image("pose", "pose")})),
        (
            image_prompt(0.7),
            text_prompt("a dancer on a stage, best quality"),
            Group("Depth", {"depth": load_image("depth", "depth")}),
        ),
        (
            Group(
                "Control",
                {
                    "control": control_net("net_1", "pose", 0.8),
                    "control_2": control_net(
                        "net_2", "depth", 0.5, "control.positive", "control.negative"
                    ),
                },
            ),
            SIZE,
        ),
        (sampling_after("control_2"),),
        (result("controlnet_pose_depth"),),
    ),
)

T2I_ADAPTER = Graph(
    "The **image prompt** gives the look, a **T2I-Adapter** the structure from a depth map.\n\n"
    "A T2I-Adapter is smaller and faster than a ControlNet; the same node loads both.",
    (
        (loaders("t2iadapter_depth_sd15v2.pth"),),
        (REFERENCE, Group("Depth", {"depth": load_image("depth", "depth")})),
        (image_prompt(0.7), text_prompt("a valley between mountains, best quality")),
        (Group("Control", {"control": control_net("net_1", "depth", 0.8)}), SIZE),
        (sampling_after("control"),),
        (result("t2i_adapter"),),
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
        (loaders(),),
        (REFERENCE, _picture("Photo to repaint", load_image("photo", "photo"))),
        (image_prompt(0.8), text_prompt("best quality")),
        (
            Group(
                "Sampling",
                {
                    "latent": Node("VAEEncode", {"pixels": "scale.IMAGE", "vae": "checkpoint.VAE"}),
                    "sampler": sample(denoise=0.6),
                    "decode": decode_latent(),
                },
            ),
        ),
        (result("image_to_image"),),
    ),
)

INPAINTING = Graph(
    "Repaints the **masked part** of a picture after the **reference**.\n\n"
    "To paint a mask, right-click the picture and choose *Open in MaskEditor*. Apply IP-Adapter "
    "gets the same mask, so the reference acts only there.",
    (
        (loaders(checkpoint="sd-v1-5-inpainting.safetensors"),),
        (REFERENCE, _picture("Picture with mask", load_image("inpaint", "with mask"))),
        (image_prompt(1.0, mask="photo.MASK"), text_prompt("best quality")),
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
        (sampling_after("inpaint", "inpaint.latent"),),
        (result("inpainting"),),
    ),
)

TWO_REFERENCES = Graph(
    "**Two reference images** as one image prompt: what they show is mixed.\n\n"
    "Chain *Join Image Prompts* for more references. To give each its own weight, use one "
    "*Apply IP-Adapter* for each instead.",
    (
        (loaders(),),
        (
            REFERENCE,
            Group(
                "Second reference image",
                {
                    "reference_2": load_image("reference_2", "second reference"),
                    "encode_2": encode_image("reference_2.IMAGE"),
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
                    "apply": apply_prompt(0.8, "join.image_prompt"),
                },
            ),
            text_prompt("best quality"),
        ),
        (SAMPLING,),
        (result("two_references"),),
    ),
)


def _influence(layers: str, title: str) -> Node:
    inputs: dict[str, Value] = {"weight": 1.0, "layers": layers, "scaling": "V only"}
    return Node("ImagePromptInfluence", inputs, title)


STYLE_AND_COMPOSITION = Graph(
    "**Style of one image, composition of another.** Each reference has an *Image Prompt "
    "Influence* that says in which layers of the model it acts.\n\n"
    "Other presets and weights by hand are in the same node, also keyframes over the schedule. "
    "SDXL keeps style and composition further apart than SD 1.5.",
    (
        (loaders(adapter="ip-adapter-plus_sd15.safetensors"),),
        (
            Group(
                "Style",
                {
                    "reference": load_image("reference", "style"),
                    "encode": encode_image("reference.IMAGE"),
                    "style": _influence("style transfer", "Influence (style)"),
                },
            ),
        ),
        (
            Group(
                "Composition",
                {
                    "photo": load_image("photo", "composition"),
                    "encode_2": encode_image("photo.IMAGE"),
                    "composition": _influence("composition", "Influence (composition)"),
                },
            ),
        ),
        (
            Group(
                "Image prompts",
                {
                    "apply_style": apply_prompt(1.0, influence="style.influence"),
                    "apply": apply_prompt(
                        1.0,
                        "encode_2.image_prompt",
                        "apply_style.model",
                        influence="composition.influence",
                    ),
                },
            ),
            text_prompt("best quality"),
        ),
        (SAMPLING,),
        (result("style_and_composition"),),
    ),
)


def _seed(number: int) -> Group:
    """One picture from a seed of its own. The front end writes the seed into the file's name."""
    name, title = f"sampler_{number}", f"Sampler {number}"
    nodes = {
        name: replace(sample(seed=number), title=title),
        f"decode_{number}": decode_latent(name),
        f"save_{number}": save_image(f"seed_%{title}.seed%", f"decode_{number}"),
    }
    return Group(f"Seed {number}", nodes)


SEED_BATCH = Graph(
    "**Four seeds of one prompt in one run.** Model, image prompt and text are prepared once and "
    "shared.\n\n"
    "Every picture has its own seed, which is also in its file name: keep what you like, change "
    "the other seeds and run again. Only the changed ones are made anew.",
    (
        (loaders(),),
        (REFERENCE, SIZE),
        (image_prompt(0.7), text_prompt("a lighthouse on a cliff, best quality")),
        *((_seed(number),) for number in (1, 2, 3, 4)),
    ),
)

AUTOMATIC = Graph(
    "**Nobody has to pick files that go together.** *Load IP-Adapter (automatic)* looks into the "
    "installed files and takes the adapter for the **purpose** and for the family of the "
    "checkpoint, and the image encoder that this adapter was trained with. The files may have any "
    "name.\n\n"
    "What it took is written below it. If something is missing, it says what it looked for, what "
    "is there instead, and where to download it and into which folder. This one needs "
    "[ip-adapter-plus_sd15](https://huggingface.co/h94/IP-Adapter/tree/main/models) in "
    "`models/ipadapter` and its `image_encoder/model.safetensors` in `models/clip_vision`.",
    (
        (
            Group(
                "Models",
                {
                    "checkpoint": Node(
                        "CheckpointLoaderSimple",
                        {"ckpt_name": "v1-5-pruned-emaonly-fp16.safetensors"},
                    ),
                    "adapter": Node(
                        "ImagePromptAutoLoader", {"model": "checkpoint.MODEL", "purpose": "strong"}
                    ),
                },
            ),
        ),
        (
            Group(
                "Reference image",
                {
                    "reference": load_image("reference", "reference"),
                    "encode": encode_image("reference.IMAGE", "adapter.clip_vision"),
                },
            ),
        ),
        (
            Group("Image prompt", {"apply": apply_prompt(0.7, model="adapter.model")}),
            text_prompt("a lighthouse on a cliff in winter, snow, best quality"),
        ),
        (SAMPLING,),
        (result("automatic"),),
    ),
)

FACE_IDENTITY = Graph(
    "**The person of a picture in a new one**, with FaceID-PlusV2: who it is comes from a face "
    "recogniser, what the face looks like from the image encoder.\n\n"
    "- **Needed**: `python -m pip install onnxruntime` in ComfyUI's Python, and `buffalo_l.zip` of "
    "the [insightface releases](https://github.com/deepinsight/insightface/releases), unpacked "
    "into `models/insightface/models/buffalo_l`.\n"
    "- **Licence**: the face models and the FaceID files are for non-commercial research only.\n"
    "- **Preview Image** shows the face that was taken; **index** takes another one.\n"
    "- The **LoRA** belongs to the adapter and is in its file.",
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

GRAPHS = {
    "text_and_image": TEXT_AND_IMAGE,
    "image_only": IMAGE_ONLY,
    "controlnet_pose_depth": CONTROLNET_POSE_DEPTH,
    "t2i_adapter": T2I_ADAPTER,
    "image_to_image": IMAGE_TO_IMAGE,
    "inpainting": INPAINTING,
    "two_references": TWO_REFERENCES,
    "seed_batch": SEED_BATCH,
    "automatic": AUTOMATIC,
    "face_identity": FACE_IDENTITY,
    "style_and_composition": STYLE_AND_COMPOSITION,
}
"""Every shipped workflow by the name of its file."""
