"""Files that look like an IP-Adapter for Stable Diffusion, or lie in its folder, and are none.

Each function gives the flat tensors of one kind, with the key names of the published files. Shapes
are exact unless a function says otherwise; all numbers are zeros that share one storage, so whole
gigabytes cost nothing. `adapters.write_sparse` and `adapters.write_bin` write them as they are.

Sources: the publishers' modules and loaders.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import catalogue, layouts
from .catalogue import ROWS, Layout, hollow

Tensors = dict[str, Tensor]


def _under(prefix: str, layout: Layout) -> Layout:
    return {f"{prefix}.{key}": shape for key, shape in layout.items()}


def _linear(name: str, rows: int, columns: int) -> Layout:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _norm(name: str, width: int) -> Layout:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _sdxl_key_values() -> Layout:
    return _under("ip_adapter", catalogue.key_values(catalogue.widths("SDXL"), 2048))


def _id_encoder() -> Layout:
    def chain(name: str, *sizes: int) -> Layout:
        layout: Layout = {}
        for step in range(3):
            layout |= _linear(f"{name}.{3 * step}", sizes[step + 1], sizes[step])
            if step < 2:
                layout |= _norm(f"{name}.{3 * step + 1}", sizes[step + 1])
        return layout

    layout = chain("body", 1280, 1024, 1024, 5 * 2048)
    for i in range(5):
        layout |= chain(f"mapping_{i}", 1024, 1024, 1024, 2048)
        layout |= chain(f"mapping_patch_{i}", 1024, 1024, 1024, 2048)
    return layout


def pulid_sdxl() -> Tensors:
    """PuLID for SDXL as its ComfyUI pack has it: the very parts and attention keys of ours."""
    return hollow(_under("image_proj", _id_encoder()) | _sdxl_key_values())


def pulid_original() -> Tensors:
    """PuLID for SDXL as its authors published it."""
    layers: Layout = {}
    for position, width in enumerate(catalogue.widths("SDXL")):
        for name in ("id_to_k", "id_to_v"):
            layers[f"id_adapter_attn_layers.{2 * position + 1}.{name}.weight"] = (width, 2048)
    return hollow(_under("id_adapter", _id_encoder()) | layers)


def csgo() -> Tensors:
    """CSGO: two projections, and content keys beside the style keys; sizes are a guess."""
    content = {
        key.replace("_ip.", "_ip_content."): shape for key, shape in _sdxl_key_values().items()
    }
    return hollow(
        _under("content_image_proj", catalogue.resampler(1664, 2048, 12, 2048, tokens=4))
        | _under("style_image_proj", catalogue.resampler(1664, 2048, 12, 2048, tokens=16))
        | _sdxl_key_values()
        | content
    )


def storymaker() -> Tensors:
    """StoryMaker: FaceID's attention keys under another name of the projection, guessed here."""
    attention = catalogue.attention_with_lora(catalogue.widths("SDXL"), 2048)
    projection = catalogue.face_perceiver(1280, 2048, tokens=20)
    return hollow(_under("image_proj_model", projection) | _under("ip_adapter", attention))


def _xlabs(tokens: int) -> Tensors:
    layout = _linear("ip_adapter_proj_model.proj", tokens * 4096, 768)
    layout |= _norm("ip_adapter_proj_model.norm", 4096)
    for i in range(19):
        for name in ("k", "v"):
            module = f"double_blocks.{i}.processor.ip_adapter_double_stream_{name}_proj"
            layout |= _linear(module, 3072, 4096)
    return hollow(layout, torch.bfloat16)


def flux_xlabs_v1() -> Tensors:
    """XLabs' adapter for FLUX.1, four tokens."""
    return _xlabs(4)


def flux_xlabs_v2() -> Tensors:
    """XLabs' adapter for FLUX.1, sixteen tokens."""
    return _xlabs(16)


def flux_instantx() -> Tensors:
    """InstantX's adapter for FLUX.1: FaceID's projection keys, attention numbered 0 to 56."""
    layout = _linear("image_proj.proj.0", 2304, 1152) | _norm("image_proj.norm", 4096)
    layout |= _linear("image_proj.proj.2", 128 * 4096, 2304)
    for i in range(57):
        for name in ("to_k_ip", "to_v_ip"):
            layout[f"ip_adapter.{i}.{name}.weight"] = (3072, 4096)
    return hollow(layout, torch.bfloat16)


def sd35_instantx() -> Tensors:
    """InstantX's adapter for Stable Diffusion 3.5 Large."""
    projection = catalogue.resampler(1152, 1280, 20, 2432, tokens=64)
    projection |= _linear("time_embedding.linear_1", 1280, 320)
    projection |= _linear("time_embedding.linear_2", 1280, 1280)
    for i in range(4):
        projection |= _linear(f"layers.{i}.2.1", 5120, 1280)
    attention: Layout = {}
    for n in range(38):
        attention |= _linear(f"{n}.norm_ip.linear", 4864, 1280)
        attention |= {f"{n}.{name}.weight": (2432, 2432) for name in ("to_k_ip", "to_v_ip")}
        attention |= {f"{n}.{name}.weight": (64,) for name in ("norm_q", "norm_k", "norm_ip_k")}
    return hollow(_under("image_proj", projection) | _under("ip_adapter", attention))


def sd3_instruct() -> Tensors:
    """IP-Adapter-Instruct for Stable Diffusion 3 Medium: even blocks only."""
    instruct = catalogue.instruct_projection(1280, 20, 4096)
    renamed = {"proj_out": "proj_out_big", "norm_out": "norm_out_big"}
    projection = {
        ".".join([renamed.get(head, head), *rest]): shape
        for key, shape in instruct.items()
        for head, *rest in [key.split(".")]
    }
    modules = (
        *("to_k_ip", "to_v_ip", "add_k_proj_ip", "add_v_proj_ip", "proj_ip"),
        *("proj_encoder_hidden_states_ip", "proj_encoder_passthrough_ip"),
    )
    attention = {f"{n}.{name}.weight": (1536, 1536) for n in range(0, 24, 2) for name in modules}
    return hollow(_under("image_proj", projection) | _under("ip_adapter", attention), torch.float32)


def instantcharacter() -> Tensors:
    """InstantCharacter for FLUX.1; of the projection only the first keys of each part."""
    projection: Layout = {"resampler.latents": (1, 1024, 1280)}
    projection |= _linear("resampler.proj_in", 1280, 4096) | _norm("resampler.norm_out", 4096)
    for stack in ("cross_layer_blocks", "cross_scale_blocks"):
        for i in range(4):
            projection |= _norm(f"{stack}.{i}.norm1", 2688)
            projection[f"{stack}.{i}.attn1.to_q.weight"] = (2688, 2688)
    attention: Layout = {}
    for n in range(57):
        attention |= {f"{n}.norm_ip_q.scale": (128,), f"{n}.norm_ip_k.scale": (128,)}
        attention |= _linear(f"{n}.to_k_ip", 3072, 4096) | _linear(f"{n}.to_v_ip", 3072, 4096)
    return hollow(
        _under("image_proj", projection) | _under("ip_adapter", attention), torch.bfloat16
    )


def controlnet() -> Tensors:
    """A ControlNet 1.1 for Stable Diffusion 1.5."""
    return hollow(_under("control_model", layouts.controlnet(320)))


def controlnet_diffusers() -> Tensors:
    """The same under diffusers' names; the first keys of each part."""
    layout: Layout = {"conv_in.weight": (320, 4, 3, 3), "conv_in.bias": (320,)}
    layout |= _linear("time_embedding.linear_1", 1280, 320)
    layout |= {"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}
    layout |= {"controlnet_mid_block.weight": (1280, 1280, 1, 1)}
    for i, width in enumerate((320,) * 4 + (640,) * 3 + (1280,) * 5):
        layout[f"controlnet_down_blocks.{i}.weight"] = (width, width, 1, 1)
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    layout |= {f"{block}.attn2.to_k.weight": (320, 768), f"{block}.attn2.to_v.weight": (320, 768)}
    return hollow(layout)


def _lora_modules() -> list[tuple[str, int, int]]:
    modules = []
    for path, width in zip(catalogue.paths("SD 1.5"), catalogue.widths("SD 1.5"), strict=True):
        modules += [(f"{path}.attn2.to_q", width, width), (f"{path}.attn2.to_k", width, 768)]
    return modules


def lora_kohya() -> Tensors:
    """A LoRA for Stable Diffusion 1.5 as most tools write it."""
    layout: Layout = {}
    for path, rows, columns in _lora_modules():
        name = f"lora_unet_{path.replace('.', '_')}"
        layout |= {f"{name}.lora_down.weight": (16, columns), f"{name}.lora_up.weight": (rows, 16)}
        layout[f"{name}.alpha"] = ()
    return hollow(layout)


def lora_peft() -> Tensors:
    """A LoRA as diffusers and PEFT write it."""
    layout: Layout = {}
    for path, rows, columns in _lora_modules():
        layout[f"unet.{path}.lora_A.weight"] = (16, columns)
        layout[f"unet.{path}.lora_B.weight"] = (rows, 16)
    return hollow(layout)


def faceid_lora() -> Tensors:
    """The companion LoRA of a FaceID adapter, chosen in place of the adapter."""
    row = ROWS["faceid_sd15"]
    return catalogue.companion(row, hollow(catalogue.layout(row)))


def clip_vision() -> Tensors:
    """The image encoder, chosen in place of the adapter."""
    return hollow(layouts.clip_vision_h())


def clip_text() -> Tensors:
    """A text encoder."""
    return hollow(layouts.clip_text())


def autoencoder() -> Tensors:
    """A VAE of Stable Diffusion; the first keys of each part."""
    return hollow(
        {
            "encoder.conv_in.weight": (128, 3, 3, 3),
            "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
            "decoder.conv_in.weight": (512, 4, 3, 3),
            "decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
            "quant_conv.weight": (8, 8, 1, 1),
            "post_quant_conv.weight": (4, 4, 1, 1),
        }
    )


def checkpoint() -> Tensors:
    """A whole Stable Diffusion 1.5 checkpoint, with a tiny autoencoder."""
    return hollow(
        _under("model.diffusion_model", layouts.unet(320))
        | _under("first_stage_model", layouts.tiny_autoencoder())
        | _under("cond_stage_model.transformer", layouts.clip_text())
    )


def diffusion_model() -> Tensors:
    """A UNet alone, original names without prefix."""
    return hollow(layouts.unet(320))


def _without(row: str, *beginnings: str) -> Tensors:
    layout = catalogue.layout(ROWS[row])
    return hollow({key: s for key, s in layout.items() if not key.startswith(beginnings)})


def truncated() -> Tensors:
    """A file whose download or conversion lost its last tensors, in the order of the file."""
    whole = hollow(catalogue.layout(ROWS["sd15"]))
    return {key: whole[key] for key in sorted(whole)[:-5]}


def missing_value() -> Tensors:
    """One layer has a key matrix and no value matrix."""
    return _without("sd15", "ip_adapter.13.to_v_ip.weight")


def missing_projection_tensor() -> Tensors:
    """The projection lacks one of its tensors."""
    return _without("plus_sd15", "image_proj.layers.2.0.to_kv.weight")


def projection_only() -> Tensors:
    """No attention part."""
    return _without("sd15", "ip_adapter.")


def attention_only() -> Tensors:
    """No projection."""
    return _without("sd15", "image_proj.")


def _transposed(key: str) -> Tensors:
    layout = catalogue.layout(ROWS["sd15"])
    return hollow(layout | {key: layout[key][::-1]})


def transposed_layer() -> Tensors:
    """One attention matrix lies on its side."""
    return _transposed("ip_adapter.1.to_k_ip.weight")


def transposed_projection() -> Tensors:
    """The projection's matrix lies on its side."""
    return _transposed("image_proj.proj.weight")


def layers_15() -> Tensors:
    """SD 1.5's adapter without its middle block."""
    return _without("sd15", "ip_adapter.31.")


def layers_69() -> Tensors:
    """SDXL's adapter without the last layer of its middle block."""
    return _without("sdxl_vit-h", "ip_adapter.139.")


def layers_ssd1b() -> Tensors:
    """An adapter for a distilled SDXL (SSD-1B): 34 layers, no middle block."""
    plan = (640,) * 4 + (1280,) * 8 + (1280,) * 18 + (640,) * 4
    attention = catalogue.key_values(plan, 2048)
    projection = catalogue.global_projection(1024, 2048)
    return hollow(_under("image_proj", projection) | _under("ip_adapter", attention))


def context_1280() -> Tensors:
    """SD 1.5's number of layers with the text tokens of the SDXL refiner."""
    attention = catalogue.key_values(catalogue.widths("SD 1.5"), 1280)
    projection = catalogue.global_projection(1024, 1280)
    return hollow(_under("image_proj", projection) | _under("ip_adapter", attention))


def unknown_projection() -> Tensors:
    """Attention as always, and a projection that nobody published."""
    attention = catalogue.key_values(catalogue.widths("SD 1.5"), 768)
    projection = _linear("mixer.0", 3072, 1024) | _linear("mixer.1", 3072, 3072)
    return hollow(_under("image_proj", projection) | _under("ip_adapter", attention))


def nothing() -> Tensors:
    """A file without tensors."""
    return {}


NEAR_MISSES: dict[str, Callable[[], Tensors]] = {
    make.__name__: make
    for make in (
        *(pulid_sdxl, pulid_original, csgo, storymaker),
        *(flux_xlabs_v1, flux_xlabs_v2, flux_instantx, sd35_instantx, sd3_instruct),
        *(instantcharacter, controlnet, controlnet_diffusers, lora_kohya, lora_peft, faceid_lora),
        *(clip_vision, clip_text, autoencoder, checkpoint, diffusion_model),
        *(truncated, missing_value, missing_projection_tensor, projection_only, attention_only),
        *(transposed_layer, transposed_projection, layers_15, layers_69, layers_ssd1b),
        *(context_1280, unknown_projection, nothing),
    )
}
"""What a loader of IP-Adapters must refuse, each with a message of its own."""
