"""The node that trains an adapter on a few pictures, inside the graph."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io, ui

from ..host import adapters, folders
from ..host.features import schema, show_on_node
from ..host.standalone import Models
from ..train import in_graph
from .common import CATEGORY, IPAdapterType


class Train(io.ComfyNode):
    """MODEL, VAE, CLIP, CLIP_VISION + pictures -> IPADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptTrain",
            display_name="Train IP-Adapter",
            category=CATEGORY,
            description=(
                "Trains an IP-Adapter on a few pictures, or goes on with one, and writes it to "
                "models/ipadapter. For small runs: to fine-tune, or to try things. It shows the "
                "loss and samples as it goes. The stop button ends it and keeps what was trained. "
                "For more than some hundred pictures there is the command line, python -m "
                "ip_adapter.train."
            ),
            search_aliases=["train ip adapter", "ipadapter training", "fine-tune", "finetune"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The base model. It stays as it is; image prompts on it do "
                    "not take part.",
                ),
                io.Vae.Input("vae", tooltip="The base model's VAE."),
                io.Clip.Input("clip", tooltip="The base model's text encoder."),
                io.ClipVision.Input(
                    "clip_vision", tooltip="The image encoder that the adapter will need."
                ),
                io.Image.Input("images", tooltip="What the base model is to make, as a batch."),
                io.String.Input(
                    "captions",
                    default="",
                    multiline=True,
                    tooltip="What is in the pictures: a line for each in their order, or one line "
                    "for all of them.",
                ),
                io.Combo.Input(
                    "projection",
                    options=list(in_graph.PROJECTIONS),
                    default=in_graph.PROJECTIONS[0],
                    tooltip="global: 4 tokens of the whole picture. plus: 16 tokens of its parts, "
                    "closer to the reference. full: one token for each part. With ip_adapter "
                    "connected, it is that adapter's.",
                ),
                io.Int.Input(
                    "steps",
                    default=500,
                    min=1,
                    max=100_000,
                    tooltip="Steps of the optimizer. A new adapter needs 20,000 and more, on many "
                    "pictures; to fine-tune one, some hundred.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0001,
                    min=0.0000001,
                    max=0.1,
                    step=0.0000001,
                    tooltip="0.0001 as in the paper; less, such as 0.00001, to fine-tune.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Of everything that is drawn: equal seeds give equal adapters.",
                ),
                io.String.Input(
                    "filename_prefix",
                    default="trained/adapter",
                    tooltip="Name of the new file; a number is added. May name a sub-folder.",
                ),
                io.Image.Input(
                    "references",
                    optional=True,
                    tooltip="What the pictures are to be made from: one for each, or one for all. "
                    "Without it each picture is its own reference, and the adapter learns to copy.",
                ),
                IPAdapterType.Input(
                    "ip_adapter",
                    optional=True,
                    tooltip="The adapter to go on with; without it a new one is begun.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Pictures per step. More is steadier, and takes more memory.",
                ),
                io.Int.Input(
                    "size",
                    default=0,
                    min=0,
                    max=2048,
                    step=64,
                    optional=True,
                    tooltip="Side of the pictures in pixels: their short side is resized to it and "
                    "the centre is kept. 0 is 512, for SDXL 1024.",
                ),
                io.Int.Input(
                    "sample_every",
                    default=100,
                    min=0,
                    max=100_000,
                    optional=True,
                    tooltip="Steps from one sample to the next: a picture made with the adapter as "
                    "it is, from the first reference and caption, shown on the node with the loss. "
                    "Fewer are made where they would take more than a tenth of the time. 0 is "
                    "none. What is learned is the same.",
                ),
            ],
            outputs=[
                IPAdapterType.Output(
                    "ip_adapter",
                    display_name="ip_adapter",
                    tooltip="The trained adapter, for the encode and apply nodes.",
                ),
                io.String.Output("path", display_name="path", tooltip="The file that was written."),
                io.Image.Output(
                    "loss_curve",
                    display_name="loss_curve",
                    tooltip="The loss of every step, and their moving mean. It hardly moves; that "
                    "is no sign of a bad adapter.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        vae: Any,
        clip: Any,
        clip_vision: Any,
        images: Any,
        captions: str,
        projection: str,
        steps: int,
        learning_rate: float,
        seed: int,
        filename_prefix: str,
        references: Any = None,
        ip_adapter: Any = None,
        batch_size: int = 1,
        size: int = 0,
        sample_every: int = 100,
    ) -> io.NodeOutput:
        """Train, and load what was written."""
        done = in_graph.train(
            Models(model, clip, vae, clip_vision),
            images,
            captions,
            references,
            projection,
            None if ip_adapter is None else adapters.require(ip_adapter),
            folders.new_file(folders.ADAPTERS, filename_prefix),
            size=size,
            sample_every=sample_every,
            steps=steps,
            learning_rate=learning_rate,
            seed=seed,
            batch_size=batch_size,
        )
        show_on_node(f"wrote {done.adapter.path.name}\n{done.words}".strip())
        return io.NodeOutput(
            done.adapter, str(done.adapter.path), done.curve, ui=ui.PreviewImage(done.shown)
        )


def _can_train() -> bool:
    """Whether this torch computes gradients; some builds for inference do not."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            number = torch.ones((), requires_grad=True)
            (number * number).backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False
    return number.grad is not None


NODES: list[type[io.ComfyNode]] = [Train] if _can_train() else []
