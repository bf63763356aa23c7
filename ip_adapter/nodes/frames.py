"""Nodes that make references ready, and that fade from one image prompt to another."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from .. import images, retouch, strategies
from ..host.features import schema, show_on_node
from ..prompt import ImagePrompt
from ..strategies import CURVES, Curve
from .common import CATEGORY, ImagePromptType, image_prompt_output

POSITIONS = ("center", "top", "bottom", "left", "right", "pad")


class Prepare(io.ComfyNode):
    """IMAGE -> IMAGE, square and sharp."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptPrepare",
            display_name="Prepare Reference",
            category=CATEGORY,
            description=(
                "Makes a reference square and as small as the image encoder sees it: with the "
                "square of your choice, resized by Lanczos and sharpened. Encode nodes do without "
                "it; it is for pictures whose subject is not in the middle, or that look soft."
            ),
            search_aliases=["prep image for clip vision", "crop reference", "sharpen reference"],
            inputs=[
                io.Image.Input("image", tooltip="The reference, or a batch of them."),
                io.Combo.Input(
                    "position",
                    options=list(POSITIONS),
                    default=POSITIONS[0],
                    tooltip="Which square of a picture is kept: the middle, or the one at a side; "
                    "pad keeps all of it, on neutral ground.",
                ),
                io.Int.Input(
                    "size",
                    default=retouch.SIDE,
                    min=56,
                    max=2048,
                    step=14,
                    tooltip="Side of the result in pixels. 224 for most encoders, 336 for Kolors; "
                    "another one is resized once more when it is encoded.",
                ),
                io.Float.Input(
                    "sharpening",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much fine detail is raised, after the resize; edges get no halo.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image", display_name="image", tooltip="For an encode node or Image Reference."
                )
            ],
        )

    @classmethod
    def execute(
        cls, image: Any, position: retouch.Position, size: int, sharpening: float
    ) -> io.NodeOutput:
        """Crop or pad, resize, sharpen."""
        images.check(image)
        pixels = images.flatten(image).movedim(1, -1)
        return io.NodeOutput(
            retouch.prepare(
                pixels,
                position=position,
                size=size,
                sharpening=sharpening,
                ground=images.CLIP_MEAN,
            )
        )


class Noise(io.ComfyNode):
    """IMAGE or nothing -> IMAGE of noise."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptNoise",
            display_name="Noise Reference",
            category=CATEGORY,
            description=(
                "Makes a picture of noise to lead away from: give it to Image Reference in the "
                "role negative. It often makes results cleaner and richer in detail. The same "
                "inputs give the same noise."
            ),
            search_aliases=["ip adapter noise", "negative noise", "negative image"],
            inputs=[
                io.Combo.Input(
                    "kind",
                    options=list(get_args(retouch.Noise)),
                    default="fade",
                    tooltip="How noise meets the picture. fade: mixed in. dissolve: in place of "
                    "single values. gaussian: added. shuffle: added to the picture warped and "
                    "turned upside down.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Share of the noise; at 1 fade and dissolve leave nothing of the "
                    "picture.",
                ),
                io.Int.Input(
                    "blur",
                    default=0,
                    min=0,
                    max=32,
                    tooltip="Width in pixels of a blur over the result, of 224; 0 is none.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture that meets the noise, often the reference itself; a black "
                    "one where nothing is connected.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    display_name="image",
                    tooltip="224 by 224 pixels, for Image Reference in the role negative.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, kind: retouch.Noise, strength: float, blur: int, image: Any = None
    ) -> io.NodeOutput:
        """Make the noise."""
        return io.NodeOutput(retouch.noise(image, kind, strength, blur))


class Fade(io.ComfyNode):
    """Two IMAGE_PROMPTs -> one that goes from the first to the second over a batch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptFade",
            display_name="Fade Between Prompts",
            category=CATEGORY,
            description=(
                "Goes from one image prompt to another over the pictures of a batch, for "
                "animations or to see what lies between two references."
            ),
            search_aliases=["interpolate prompts", "morph", "transition", "ip adapter weights"],
            inputs=[
                ImagePromptType.Input("first", tooltip="What the first picture follows."),
                ImagePromptType.Input(
                    "second",
                    tooltip="What the last picture follows: of the same adapter, and with as many "
                    "tokens.",
                ),
                io.Int.Input(
                    "frames",
                    default=16,
                    min=2,
                    max=9999,
                    tooltip="How many pictures the way takes, the batch size of the latent; those "
                    "after them follow the second prompt.",
                ),
                io.Combo.Input(
                    "timing",
                    options=list(CURVES),
                    default=CURVES[0],
                    tooltip="linear: equal steps. ease_in: slower towards the end. ease_out: slow "
                    "at the start. ease_in_out: slow at both ends. As in ComfyUI_IPAdapter_plus.",
                ),
            ],
            outputs=[
                image_prompt_output("For Apply IP-Adapter; each picture has tokens of its own.")
            ],
        )

    @classmethod
    def execute(
        cls, first: ImagePrompt, second: ImagePrompt, frames: int, timing: Curve
    ) -> io.NodeOutput:
        """Mix the tokens for each picture."""
        faded = strategies.fade(first, second, strategies.fractions(frames, timing))
        show_on_node(f"{faded.tokens} image tokens for each of {frames} pictures")
        return io.NodeOutput(faded)


NODES: list[type[io.ComfyNode]] = [Prepare, Noise, Fade]
