"""Nodes that load adapters and image encoders."""

from __future__ import annotations

from comfy_api.latest import io

from .. import catalogue
from ..convert import convert
from ..detection import AUTOMATIC
from ..host import adapters, folders, vision
from ..host.features import schema, show_on_node
from .common import CATEGORY, IPAdapterType, check_name


def _variant(*, optional: bool = False) -> io.Combo.Input:
    return io.Combo.Input(
        "variant",
        options=[AUTOMATIC, *sorted({row.variant for row in catalogue.PUBLISHED})],
        default=AUTOMATIC,
        optional=optional,
        tooltip="Leave it at automatic. Some adapters have equal tensors (plus and plus-face, "
        "FaceID-plus v1 and v2); of a copy that is not the published file, the node says what it "
        "took it for, and this corrects it.",
    )


class LoadAdapter(io.ComfyNode):
    """File -> IPADAPTER."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptLoadAdapter",
            display_name="Load IP-Adapter",
            category=CATEGORY,
            description=(
                "Loads an IP-Adapter from models/ipadapter. What it is, and which image encoder it "
                "needs, is read from its tensors; the file may have any name."
            ),
            search_aliases=["ip adapter", "ipadapter", "image prompt", "reference image"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.choices(folders.ADAPTERS),
                    tooltip="An adapter file, .safetensors or .bin. 'plus' files follow the "
                    "reference more closely than the others.",
                ),
                _variant(optional=True),
            ],
            outputs=[
                IPAdapterType.Output(
                    "ip_adapter",
                    display_name="ip_adapter",
                    tooltip="For Encode Image Prompt and Apply IP-Adapter.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str) -> bool | str:
        """Say where the file was looked for when it is not there."""
        return check_name(folders.ADAPTERS, adapter_name)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, variant: str = AUTOMATIC) -> str:
        """Load again when the file changed."""
        return folders.stamp(folders.ADAPTERS, adapter_name)

    @classmethod
    def execute(cls, adapter_name: str, variant: str = AUTOMATIC) -> io.NodeOutput:
        """Load the file."""
        adapter = adapters.load(folders.find(folders.ADAPTERS, adapter_name), variant)
        show_on_node(adapter.spec.describe())
        return io.NodeOutput(adapter)


class LoadEncoder(io.ComfyNode):
    """Image encoder file -> CLIP_VISION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptLoadEncoder",
            display_name="Load Image Encoder",
            category=CATEGORY,
            description=(
                "Loads an image encoder and says which one it is, by its tensors; both published "
                "ones are called model.safetensors. Files in the Hugging Face layout run in "
                "ComfyUI's own CLIP Vision, original OpenCLIP files in open_clip."
            ),
            search_aliases=["clip vision", "image encoder", "open_clip", "ViT-H", "bigG"],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=folders.choices(folders.ENCODERS),
                    tooltip="A file in models/clip_vision: ViT-H/14 for most adapters, ViT-bigG/14 "
                    "for vit-G and the first SDXL one, ViT-L/14-336 for Kolors.",
                )
            ],
            outputs=[
                io.ClipVision.Output(
                    "clip_vision",
                    display_name="clip_vision",
                    tooltip="Works wherever the output of Load CLIP Vision does.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, encoder_name: str) -> bool | str:
        """Say where the file was looked for when it is not there."""
        return check_name(folders.ENCODERS, encoder_name)

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str) -> str:
        """Load again when the file changed."""
        return folders.stamp(folders.ENCODERS, encoder_name)

    @classmethod
    def execute(cls, encoder_name: str) -> io.NodeOutput:
        """Load the vision tower."""
        encoder = vision.load(folders.find(folders.ENCODERS, encoder_name))
        show_on_node(vision.describe(encoder))
        return io.NodeOutput(encoder)


class Convert(io.ComfyNode):
    """Adapter file -> the same adapter as .safetensors."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptConvert",
            display_name="Convert IP-Adapter",
            category=CATEGORY,
            description=(
                "Writes an adapter of any kind, or a training dump, as one .safetensors in "
                "models/ipadapter whose metadata says what it is. Nothing is lost; the source is "
                "not touched."
            ),
            search_aliases=["convert ip adapter", "bin to safetensors", "training dump"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.choices(folders.ADAPTERS),
                    tooltip="The file in models/ipadapter to convert.",
                ),
                _variant(),
                io.String.Input(
                    "filename_prefix",
                    default="converted/adapter",
                    tooltip="Name of the new file; a number is added. May name a sub-folder.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str) -> bool | str:
        """Say where the file was looked for when it is not there."""
        return check_name(folders.ADAPTERS, adapter_name)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str, variant: str, filename_prefix: str) -> str:
        """Convert again when the file changed."""
        return folders.stamp(folders.ADAPTERS, adapter_name)

    @classmethod
    def execute(cls, adapter_name: str, variant: str, filename_prefix: str) -> io.NodeOutput:
        """Write the file."""
        source = folders.find(folders.ADAPTERS, adapter_name)
        done = convert(source, folders.new_file(folders.ADAPTERS, filename_prefix), variant=variant)
        show_on_node(f"wrote {done.path.name}: {done.spec.describe()}")
        return io.NodeOutput(ui={"text": [done.path.name]})


NODES: list[type[io.ComfyNode]] = [LoadAdapter, LoadEncoder, Convert]
