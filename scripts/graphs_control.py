"""The shipped workflows that start from the structure of something: maps, masks, photos."""

from __future__ import annotations

from scripts.parts import (
    ENCODE_PICTURE,
    REFERENCE,
    SIZE,
    Graph,
    Group,
    Node,
    control_net,
    decode_latent,
    image_prompt,
    load_image,
    loaders,
    note,
    result,
    sample,
    sampling_after,
    scaled_picture,
    text_prompt,
)

POSE_AND_DEPTH = Graph(
    note(
        "The **image prompt** gives the look, two **ControlNets** the structure: one a pose, the "
        "other a depth map.",
        "**Put in**: a reference, and maps of your own; both are loaded ready made. For maps of a "
        "photo put a preprocessor in front.",
        "**strength** (ControlNet): how exactly a map is kept; 0 switches it off.",
        "**weight** (Apply IP-Adapter): 0.5 to 0.8.",
    ),
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
        (result("pose_and_depth"),),
    ),
)

T2I_ADAPTER = Graph(
    note(
        "The **image prompt** gives the look, a **T2I-Adapter** the structure from a depth map.",
        "**Put in**: a reference, and a depth map.",
        "**strength** (ControlNet): how exactly the map is kept.",
        "A T2I-Adapter is smaller and faster than a ControlNet; the same node loads both.",
    ),
    (
        (loaders("t2iadapter_depth_sd15v2.pth"),),
        (REFERENCE, Group("Depth", {"depth": load_image("depth", "depth")})),
        (image_prompt(0.7), text_prompt("a valley between mountains, best quality")),
        (Group("Control", {"control": control_net("net_1", "depth", 0.8)}), SIZE),
        (sampling_after("control"),),
        (result("t2i_adapter"),),
    ),
)

INPAINT = Graph(
    note(
        "Repaints the **masked part** of a picture after the **reference**.",
        "**Put in**: a picture, and a reference for what is to come. To paint a mask, right-click "
        "the picture and choose *Open in MaskEditor*. Apply IP-Adapter gets the same mask, so the "
        "reference acts only there.",
        "**weight** (Apply IP-Adapter): 1 is the reference, 0.6 with a text.",
        "**denoise** (KSampler): under 1 keeps a part of what was there.",
    ),
    (
        (loaders(checkpoint="sd-v1-5-inpainting.safetensors"),),
        (REFERENCE, scaled_picture("Picture with mask", load_image("inpaint", "with mask"))),
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
        (result("inpaint"),),
    ),
)

IMAGE_TO_IMAGE = Graph(
    note(
        "A **photo** keeps its composition and takes the look of the **reference**.",
        "**Put in**: a photo, and a picture whose look you want.",
        "**denoise** (KSampler): how much of the photo may change: 0.4 a little, 0.8 almost all.",
        "**weight** (Apply IP-Adapter): 0.6 to 1.",
    ),
    (
        (loaders(),),
        (REFERENCE, scaled_picture("Photo to repaint", load_image("photo", "photo"))),
        (image_prompt(0.8), text_prompt("best quality")),
        (
            Group(
                "Sampling",
                {
                    "latent": ENCODE_PICTURE,
                    "sampler": sample(denoise=0.6),
                    "decode": decode_latent(),
                },
            ),
        ),
        (result("image_to_image"),),
    ),
)
