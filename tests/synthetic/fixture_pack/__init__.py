"""Test only: lets the host recognise the nano UNets of `tests/synthetic/models.py`.

The host tells Stable Diffusion 1.5 by its width of 320 channels. This registers the same model at
32 channels; the inpainting UNet is recognised from its nine input channels as usual. No nodes.
"""

from comfy import supported_models


class NanoSD15(supported_models.SD15):  # type: ignore[misc, name-defined]
    """Stable Diffusion 1.5 with 32 instead of 320 channels."""

    unet_config = {**supported_models.SD15.unet_config, "model_channels": 32}  # noqa: RUF012


if not any(known.__name__ == NanoSD15.__name__ for known in supported_models.models):
    supported_models.models.append(NanoSD15)

NODE_CLASS_MAPPINGS: dict[str, type] = {}
