"""Test only: lets the host recognise the nano UNets of `tests/synthetic/models.py`.

The host tells the Stable Diffusion families by their width of 320 channels. This registers the
same models at 32 channels, and Kolors, which the host does not know at all: an SDXL that reads
wider text states through a Linear of its own, as packs that bring Kolors to the host have it.
Inpainting UNets are recognised from their nine input channels as usual. No nodes.
"""

from __future__ import annotations

from typing import Any

from comfy import model_base, supported_models
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep, UNetModel

CHANNELS = {"model_channels": 32}


class NanoSD15(supported_models.SD15):  # type: ignore[misc]
    """Stable Diffusion 1.5 with 32 instead of 320 channels."""

    unet_config = {**supported_models.SD15.unet_config, **CHANNELS}  # noqa: RUF012


class NanoSD20(supported_models.SD20):  # type: ignore[misc]
    """Stable Diffusion 2.x with 32 instead of 320 channels, and heads of 16 instead of 64.

    The first level is too narrow for one head of 64.
    """

    unet_config = {**supported_models.SD20.unet_config, **CHANNELS}  # noqa: RUF012
    unet_extra_config = {  # noqa: RUF012
        **supported_models.SD20.unet_extra_config,
        "num_head_channels": 16,
    }


class NanoSDXL(supported_models.SDXL):  # type: ignore[misc]
    """SDXL with 32 instead of 320 channels: one and two heads of 64."""

    unet_config = {**supported_models.SDXL.unet_config, **CHANNELS}  # noqa: RUF012


class KolorsUNet(UNetModel):  # type: ignore[misc]
    """SDXL's UNet behind a Linear that takes ChatGLM's text states to its own width."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        place = {"dtype": kwargs.get("dtype"), "device": kwargs.get("device")}
        self.encoder_hid_proj = kwargs["operations"].Linear(4096, 2048, **place)

    def forward(self, x: Any, timesteps: Any = None, context: Any = None, **kwargs: Any) -> Any:
        """Project the text states, then run SDXL's UNet."""
        return super().forward(x, timesteps, self.encoder_hid_proj(context), **kwargs)


class Kolors(model_base.SDXL):  # type: ignore[misc]
    """SDXL with `KolorsUNet`; its pooled text state is 4096 wide, hence a label of 5632."""

    def __init__(self, model_config: Any, model_type: Any, device: Any = None) -> None:
        model_base.BaseModel.__init__(
            self, model_config, model_type, device=device, unet_model=KolorsUNet
        )
        self.embedder = Timestep(256)
        self.noise_augmentor = None  # reads unCLIP conditionings, which Kolors has none of


class NanoKolors(NanoSDXL):
    """Kolors with 32 instead of 320 channels, and Kolors' own noise schedule."""

    unet_config = {**NanoSDXL.unet_config, "adm_in_channels": 5632}  # noqa: RUF012
    sampling_settings = {  # noqa: RUF012
        "beta_schedule": "linear",
        "linear_start": 0.00085,
        "linear_end": 0.014,
        "timesteps": 1100,
    }

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> Kolors:
        """Build the model that the host samples with."""
        return Kolors(self, self.model_type(state_dict, prefix), device)


for model in (NanoSD15, NanoSD20, NanoSDXL, NanoKolors):
    if not any(known.__name__ == model.__name__ for known in supported_models.models):
        supported_models.models.append(model)

NODE_CLASS_MAPPINGS: dict[str, type] = {}
