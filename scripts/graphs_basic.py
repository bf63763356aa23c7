"""The shipped workflows of one idea: the first picture, style, composition, several references."""

from __future__ import annotations

from scripts.parts import (
    PLUS,
    REFERENCE,
    SAMPLING,
    SIZE,
    Graph,
    Group,
    Node,
    apply_prompt,
    decode_latent,
    encode_image,
    image_prompt,
    influence,
    load_image,
    loaders,
    note,
    reference,
    result,
    sample,
    text_prompt,
)

FIRST_IMAGE_PROMPT = Graph(
    note(
        "**A picture as a prompt.** The reference shows what it should look like, the words say "
        "what is different.",
        "**Put in**: your own picture in *Load Image*, and a text.",
        "**weight** (Apply IP-Adapter): 1 follows the reference closely, 0.5 to 0.7 leaves room "
        "for the text.",
        "**start_at**: 0.2 or more leaves the layout to the text.",
        "**fit**: *crop* encodes the middle of the reference, *pad* all of it.",
    ),
    (
        (loaders(),),
        (REFERENCE,),
        (image_prompt(0.7), text_prompt("a lighthouse on a cliff in winter, snow, best quality")),
        (SAMPLING,),
        (result("first_image_prompt"),),
    ),
)

STYLE_ONLY = Graph(
    note(
        "**Only the style of a picture**: colours and brush of the reference, while the text says "
        "what is to be seen. *Image Prompt Influence* lets the reference act only in the layers "
        "that carry style.",
        "**Put in**: a picture whose look you want, and a text for the content.",
        "**layers**: *strong style transfer* where it is too weak, *style transfer precise* where "
        "things of the reference still come along.",
        "**weight** (Apply IP-Adapter): up to 1.5 here; fewer layers bear more.",
        "SDXL keeps style and layout further apart than SD 1.5.",
    ),
    (
        (loaders(adapter=PLUS),),
        (reference("Style", "reference", "style"),),
        (
            Group("Where it acts", {"style": influence("style transfer")}),
            Group("Image prompt", {"apply": apply_prompt(1.0, influence="style.influence")}),
        ),
        (text_prompt("a lighthouse on a cliff, best quality"), SIZE),
        (Group("Sampling", {"sampler": sample(), "decode": decode_latent()}),),
        (result("style_only"),),
    ),
)

COMPOSITION_ONLY = Graph(
    note(
        "**Only the composition of a picture**: what stands where, as in the reference, while the "
        "text says what it is and how it looks.",
        "**Put in**: a picture whose layout you want, and a text for all the rest.",
        "**layers**: *composition precise* where colours of the reference still come along.",
        "**weight** (Apply IP-Adapter): 0.8 to 1.5.",
        "**end_at**: 0.5 is often enough, for the layout is decided early.",
    ),
    (
        (loaders(adapter=PLUS),),
        (reference("Composition", "photo", "composition"),),
        (
            Group("Where it acts", {"composition": influence("composition")}),
            Group("Image prompt", {"apply": apply_prompt(1.0, influence="composition.influence")}),
        ),
        (text_prompt("a windmill in a field of tulips, oil painting, best quality"), SIZE),
        (Group("Sampling", {"sampler": sample(), "decode": decode_latent()}),),
        (result("composition_only"),),
    ),
)

IMAGE_ONLY = Graph(
    note(
        "**Variations of a picture without words.** The positive prompt stays empty and the weight "
        "is 1, so the image prompt decides alone.",
        "**Put in**: your own picture in *Load Image*.",
        "**weight** (Apply IP-Adapter): 0.8 strays further from it.",
        "**seed** (KSampler): another variation.",
        "The *plus* adapter looks at the reference in more detail than `ip-adapter_sd15`.",
    ),
    (
        (loaders(adapter=PLUS),),
        (REFERENCE,),
        (image_prompt(1.0), text_prompt("")),
        (SAMPLING,),
        (result("image_only"),),
    ),
)

TWO_REFERENCES = Graph(
    note(
        "**Two reference images** as one image prompt: what they show is mixed.",
        "**Put in**: two pictures. Chain *Join Image Prompts* for more.",
        "**weight** (Apply IP-Adapter): of both together. To give each its own, use one *Apply "
        "IP-Adapter* for each instead.",
    ),
    (
        (loaders(),),
        (REFERENCE, reference("Second reference image", "reference_2", "second reference", "_2")),
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

STYLE_AND_COMPOSITION = Graph(
    note(
        "**Style of one image, composition of another.** Each reference has an *Image Prompt "
        "Influence* that says in which layers of the model it acts.",
        "**Put in**: a picture for the look, another for the layout.",
        "**layers** (Influence): the *strong* and *precise* kinds; **layer_weights** by hand.",
        "**weight** (Apply IP-Adapter): one for each of the two.",
        "SDXL keeps style and composition further apart than SD 1.5.",
    ),
    (
        (loaders(adapter=PLUS),),
        (
            Group(
                "Style",
                {
                    **reference("Style", "reference", "style").nodes,
                    "style": influence("style transfer", "Influence (style)"),
                },
            ),
        ),
        (
            Group(
                "Composition",
                {
                    **reference("Composition", "photo", "composition", "_2").nodes,
                    "composition": influence("composition", "Influence (composition)"),
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

AUTOMATIC = Graph(
    note(
        "**Nobody has to pick files that go together.** *Load IP-Adapter (automatic)* looks into "
        "the installed files and takes the adapter for the **purpose** and for the family of the "
        "checkpoint, and the image encoder that this adapter was trained with. The files may have "
        "any name.",
        "**Put in**: a checkpoint of any family, and a picture.",
        "**purpose**: what the picture is to give.",
        "What it took is written below it. If something is missing, it says what it looked for, "
        "what is there instead, and where to download it and into which folder. This one needs "
        "[ip-adapter-plus_sd15](https://huggingface.co/h94/IP-Adapter/tree/main/models) in "
        "`models/ipadapter` and its `image_encoder/model.safetensors` in `models/clip_vision`.",
    ),
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
