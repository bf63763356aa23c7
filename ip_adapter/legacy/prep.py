"""The old pack's nodes that make pictures ready: a square for the encoder, noise as a negative."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from .. import retouch
from .common import Choice, image_in, number_in, old


class PrepareImage(io.ComfyNode):
    """A square of a picture, small and sharpened."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "PrepImageForClipVision",
            "Prep Image For ClipVision",
            "ipadapter/utils",
            "Prepare Reference",
            inputs=[
                image_in(),
                Choice("interpolation", options=list(get_args(retouch.Resample))),
                Choice("crop_position", options=list(get_args(retouch.Position))),
                number_in("sharpening", 0, 1, 0.0),
            ],
            outputs=[io.Image.Output("image", display_name="IMAGE")],
        )

    @classmethod
    def execute(
        cls,
        image: Any,
        interpolation: retouch.Resample,
        crop_position: retouch.Position,
        sharpening: float,
    ) -> io.NodeOutput:
        """Crop, resize and sharpen."""
        return io.NodeOutput(
            retouch.prepare(image, interpolation, crop_position, sharpening=sharpening)
        )


class Noise(io.ComfyNode):
    """Noise, of a picture or of nothing."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return old(
            "IPAdapterNoise",
            "IPAdapter Noise",
            "ipadapter/utils",
            "Noise Reference",
            inputs=[
                Choice("type", options=list(get_args(retouch.Noise))),
                number_in("strength", 0, 1),
                io.Int.Input("blur", default=0, min=0, max=32, step=1),
                io.Image.Input("image_optional", optional=True),
            ],
            outputs=[io.Image.Output("image", display_name="IMAGE")],
        )

    @classmethod
    def execute(
        cls, type: retouch.Noise, strength: float, blur: int, image_optional: Any = None
    ) -> io.NodeOutput:
        """Make it."""
        return io.NodeOutput(retouch.noise(image_optional, type, strength, blur))


NODES: list[type[io.ComfyNode]] = [PrepareImage, Noise]
