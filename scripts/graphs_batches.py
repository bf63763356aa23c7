"""The shipped workflows that make several pictures: frames, weights, seeds, by a script."""

from __future__ import annotations

from dataclasses import replace

from scripts.parts import (
    EMPTY_LATENT,
    ENCODE_PICTURE,
    NEGATIVE,
    PLUS,
    REFERENCE,
    SIZE,
    Graph,
    Group,
    Node,
    apply_prompt,
    decode_latent,
    encode_image,
    image_prompt,
    load_image,
    loaders,
    note,
    reference,
    sample,
    save_image,
    scaled_picture,
    text_prompt,
    words,
)

FRAMES = 8

ANIMATION_BATCH = Graph(
    note(
        "**An animation in one batch**: a photo keeps its composition, and its look fades from one "
        "reference to another. Every frame has an image prompt of its own.",
        "**Put in**: a photo and two references.",
        f"**frames** (Fade Between Prompts) and **amount** (Repeat Latent Batch): both {FRAMES} "
        "here; all frames are in memory at once.",
        "**denoise** (KSampler): 0.4 flickers little, 0.7 changes much. For smooth motion put an "
        "AnimateDiff loader in front of *Apply IP-Adapter*.",
        "A reference for each frame instead: load them as a batch into *Encode Image Prompt* and "
        "set **batch** to *one per frame*.",
    ),
    (
        (loaders(),),
        (reference("First reference", "reference", "first"),),
        (reference("Last reference", "reference_2", "last", "_2"),),
        (
            Group(
                "Image prompt",
                {
                    "fade": Node(
                        "ImagePromptFade",
                        {
                            "first": "encode.image_prompt",
                            "second": "encode_2.image_prompt",
                            "frames": FRAMES,
                            "timing": "linear",
                        },
                    ),
                    "apply": apply_prompt(0.9, "fade.image_prompt"),
                },
            ),
            text_prompt("best quality"),
        ),
        (
            scaled_picture("Photo", load_image("photo", "photo")),
            Group(
                "Frames",
                {
                    "coded": ENCODE_PICTURE,
                    "latent": Node(
                        "RepeatLatentBatch", {"samples": "coded.LATENT", "amount": FRAMES}
                    ),
                },
            ),
        ),
        (Group("Sampling", {"sampler": sample(denoise=0.55), "decode": decode_latent()}),),
        (
            Group(
                "Result",
                {
                    "save": save_image("animation_frame"),
                    "film": Node(
                        "SaveAnimatedWEBP",
                        {
                            "images": "decode.IMAGE",
                            "filename_prefix": "ip_adapter/animation",
                            "fps": 4.0,
                            "lossless": False,
                        },
                    ),
                },
            ),
        ),
    ),
)

WEIGHT_GRID = Graph(
    note(
        "**Which weight is right?** One run makes a picture for every weight and every preset, all "
        "from the same noise, and puts them on one sheet with their names.",
        "**Put in**: a reference and a text.",
        "**weights** (Image Prompt Grid): a column for each; 0 is the model without the image.",
        "**presets**: a row for each; *linear* is all layers alike.",
        "Then take the weight you like into *01_first_image_prompt*, the preset into "
        "*02_style_only*.",
    ),
    (
        (loaders(adapter=PLUS),),
        (REFERENCE,),
        (
            Group(
                "Image prompts",
                {
                    "grid": Node(
                        "ImagePromptGrid",
                        {
                            "model": "checkpoint.MODEL",
                            "ip_adapter": "adapter.ip_adapter",
                            "image_prompt": "encode.image_prompt",
                            "weights": "0, 0.4, 0.7, 1",
                            "presets": "linear, style transfer",
                        },
                    )
                },
            ),
            text_prompt("a lighthouse on a cliff, best quality"),
        ),
        (
            Group(
                "Sampling",
                {
                    "latent": EMPTY_LATENT,
                    "sampler": sample(model="grid.model"),
                    "decode": decode_latent(),
                },
            ),
        ),
        (
            Group(
                "Result",
                {
                    "picture": Node(
                        "ImagePromptGridPicture",
                        {"images": "decode.IMAGE", "grid": "grid.grid"},
                    ),
                    "save": Node(
                        "SaveImage",
                        {"images": "picture.image", "filename_prefix": "ip_adapter/weight_grid"},
                    ),
                },
            ),
        ),
    ),
)

PROGRAM = """
import json
from pathlib import Path
from urllib.request import Request, urlopen

graph = json.loads(Path("workflows/api/11_api_batch.json").read_text())
nodes = {n["_meta"]["title"]: n["inputs"] for n in graph.values()}
for picture in ["ip_adapter_reference.png", "ip_adapter_photo.png"]:
    nodes["Reference"]["image"] = picture
    nodes["Save"]["filename_prefix"] = "batch/" + picture
    body = json.dumps({"prompt": graph}).encode()
    urlopen(Request("http://127.0.0.1:8188/prompt", body)).close()
"""
"""What a script does with `API_BATCH`; a test runs it."""

API_BATCH = Graph(
    note(
        "**Many pictures by a script.** The inputs that a script changes have titles of their own: "
        "*Reference*, *Text*, *Sampler*, *Save*. The same graph for the API is in the pack's "
        "folder, `workflows/api`; of your own graph, *File > Export (API)* makes it.",
        "**Put in**: names of pictures in ComfyUI's `input` folder.",
        "This queues one run for each picture. Models and text stay loaded in between:",
    )
    + f"\n\n```python\n{PROGRAM.strip()}\n```",
    (
        (loaders(),),
        (
            Group(
                "Reference image",
                {
                    "reference": Node(
                        "LoadImage", {"image": "ip_adapter_reference.png"}, "Reference"
                    ),
                    "encode": encode_image("reference.IMAGE"),
                },
            ),
        ),
        (
            image_prompt(0.7),
            Group(
                "Text prompt",
                {
                    "positive": words("Text", "a lighthouse on a cliff, best quality"),
                    "negative": NEGATIVE,
                },
            ),
        ),
        (
            Group(
                "Sampling",
                {
                    "latent": EMPTY_LATENT,
                    "sampler": Node("KSampler", sample().inputs, "Sampler"),
                    "decode": decode_latent(),
                },
            ),
        ),
        (Group("Result", {"save": Node("SaveImage", save_image("api_batch").inputs, "Save")}),),
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
    note(
        "**Four seeds of one prompt in one run.** Model, image prompt and text are prepared once "
        "and shared.",
        "**Put in**: a reference and a text.",
        "**seed** (Sampler): every picture has its own, which is also in its file name. Keep what "
        "you like, change the other seeds and run again: only the changed ones are made anew.",
    ),
    (
        (loaders(),),
        (REFERENCE, SIZE),
        (image_prompt(0.7), text_prompt("a lighthouse on a cliff, best quality")),
        *((_seed(number),) for number in (1, 2, 3, 4)),
    ),
)
