"""The nodes: schemas and tooltips, one library call each; no arithmetic.

Node ids, input names and output order are permanent: saved workflows refer to them.
"""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import ComfyExtension, io

from .ip_adapter import images, prompt
from .ip_adapter.errors import IPAdapterError
from .ip_adapter.host import adapters, encoding, folders, openclip, patching
from .ip_adapter.host.features import schema, show_on_node

CATEGORY = "IP-Adapter"

IPAdapterType = io.Custom("IPADAPTER")
ImagePromptType = io.Custom("IMAGE_PROMPT")


def _check_name(folder: str, name: str) -> bool | str:
    """Validate a chosen file in our words; the host's own message only lists what exists."""
    try:
        folders.find(folder, name)
    except IPAdapterError as error:
        return str(error)
    return True


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
                )
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
        return _check_name(folders.ADAPTERS, adapter_name)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> str:
        """Load again when the file changed."""
        return folders.stamp(folders.ADAPTERS, adapter_name)

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        """Load the file."""
        adapter = adapters.load(folders.find(folders.ADAPTERS, adapter_name))
        show_on_node(adapter.spec.describe())
        return io.NodeOutput(adapter)


class LoadOpenCLIP(io.ComfyNode):
    """Original OpenCLIP file -> CLIP_VISION."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptLoadOpenCLIP",
            display_name="Load OpenCLIP Image Encoder",
            category=CATEGORY,
            description=(
                "Loads the image half of an original OpenCLIP file (ViT-H/14 or ViT-bigG/14) and "
                "runs it with open_clip. Files in the Hugging Face layout go into Load CLIP Vision."
            ),
            search_aliases=["clip vision", "image encoder", "open_clip", "ViT-H", "bigG"],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=folders.choices(folders.ENCODERS),
                    tooltip="An open_clip_pytorch_model.bin or open_clip_model.safetensors in "
                    "models/clip_vision, under any name.",
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
        return _check_name(folders.ENCODERS, encoder_name)

    @classmethod
    def fingerprint_inputs(cls, encoder_name: str) -> str:
        """Load again when the file changed."""
        return folders.stamp(folders.ENCODERS, encoder_name)

    @classmethod
    def execute(cls, encoder_name: str) -> io.NodeOutput:
        """Load the visual tower."""
        encoder = openclip.load(folders.find(folders.ENCODERS, encoder_name))
        show_on_node(f"OpenCLIP {encoder.model.architecture}")
        return io.NodeOutput(encoder)


class Encode(io.ComfyNode):
    """Reference images -> IMAGE_PROMPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptEncode",
            display_name="Encode Image Prompt",
            category=CATEGORY,
            description=(
                "Encodes one or several reference images to an image prompt. A batch is one prompt "
                "of several references; images of different sizes are encoded one by one and put "
                "together with Join Image Prompts."
            ),
            search_aliases=["ip adapter encode", "reference image", "image embeds"],
            inputs=[
                IPAdapterType.Input(
                    "ip_adapter", tooltip="The adapter that the prompt will be applied with."
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The image encoder the adapter was trained with: ViT-H/14 for most, "
                    "ViT-bigG/14 for the vit-G files. A wrong one is refused.",
                ),
                io.Image.Input(
                    "image",
                    tooltip="The reference, or a batch of them. Transparent parts say nothing.",
                ),
                io.Combo.Input(
                    "fit",
                    options=list(get_args(images.Fit)),
                    default="crop",
                    tooltip="For pictures that are not square. crop: the centre square only. pad: "
                    "all of it, smaller, on neutral ground. tile: overlapping squares that cover "
                    "it, each a reference of its own.",
                ),
            ],
            outputs=[
                ImagePromptType.Output(
                    "image_prompt",
                    display_name="image_prompt",
                    tooltip="For Apply IP-Adapter, Join and Save Image Prompt.",
                )
            ],
        )

    @classmethod
    def execute(
        cls, ip_adapter: Any, clip_vision: Any, image: Any, fit: images.Fit
    ) -> io.NodeOutput:
        """Encode the references."""
        encoded = encoding.encode(adapters.require(ip_adapter), clip_vision, image, fit)
        show_on_node(f"{encoded.tokens} image tokens")
        return io.NodeOutput(encoded)


class Join(io.ComfyNode):
    """Two IMAGE_PROMPTs -> one."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptJoin",
            display_name="Join Image Prompts",
            category=CATEGORY,
            description=(
                "Makes one image prompt of two, as if their images had been encoded together: they "
                "share one weight. To give each its own weight, chain two Apply IP-Adapter nodes."
            ),
            search_aliases=["combine image prompts", "concat embeds", "multiple references"],
            inputs=[
                ImagePromptType.Input("first", tooltip="An image prompt."),
                ImagePromptType.Input("second", tooltip="Another one, of the same adapter."),
            ],
            outputs=[
                ImagePromptType.Output(
                    "image_prompt", display_name="image_prompt", tooltip="Both together."
                )
            ],
        )

    @classmethod
    def execute(cls, first: prompt.ImagePrompt, second: prompt.ImagePrompt) -> io.NodeOutput:
        """Put the tokens side by side."""
        return io.NodeOutput(prompt.join([first, second]))


class Apply(io.ComfyNode):
    """MODEL + IMAGE_PROMPT -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptApply",
            display_name="Apply IP-Adapter",
            category=CATEGORY,
            description=(
                "Lets a MODEL see an image prompt beside its text prompt. Chain several for "
                "several references; ControlNet nodes work as ever. The incoming MODEL is not "
                "changed."
            ),
            search_aliases=["ip adapter apply", "ipadapter", "image prompt", "style reference"],
            inputs=[
                io.Model.Input("model", tooltip="The model to apply the image prompt to."),
                IPAdapterType.Input(
                    "ip_adapter", tooltip="The adapter that encoded the image prompt."
                ),
                ImagePromptType.Input(
                    "image_prompt", tooltip="From Encode Image Prompt or Load Image Prompt."
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=-1.0,
                    max=3.0,
                    step=0.05,
                    tooltip="How strongly the image counts. 1 is how the adapter was trained, for "
                    "an image alone; about 0.5 leaves room for a text prompt; 0 is the base model.",
                ),
                io.Float.Input(
                    "start_at",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the schedule at which the image begins to count. Later "
                    "leaves the composition to the text.",
                ),
                io.Float.Input(
                    "end_at",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Fraction of the schedule at which the image stops counting. Earlier "
                    "leaves details to the text.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Where in the picture the image counts: white fully, black not at all. "
                    "Any size; one mask, or one per picture of the batch.",
                ),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="For a sampler."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        ip_adapter: Any,
        image_prompt: prompt.ImagePrompt,
        weight: float,
        start_at: float,
        end_at: float,
        mask: Any = None,
    ) -> io.NodeOutput:
        """Patch a clone."""
        patched, report = patching.apply(
            model,
            adapters.require(ip_adapter),
            image_prompt,
            weight=weight,
            start=start_at,
            end=end_at,
            mask=mask,
        )
        show_on_node(report)
        return io.NodeOutput(patched)


class Save(io.ComfyNode):
    """IMAGE_PROMPT -> file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptSave",
            display_name="Save Image Prompt",
            category=CATEGORY,
            description=(
                "Saves an image prompt to models/image_prompts, where Load Image Prompt finds it. "
                "The file is small, needs no image encoder to use, and fits one adapter."
            ),
            search_aliases=["save embeds", "export image prompt"],
            inputs=[
                ImagePromptType.Input("image_prompt", tooltip="The image prompt to save."),
                io.String.Input(
                    "filename_prefix",
                    default="image_prompt",
                    tooltip="Name of the file; a number is added. May name a sub-folder.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image_prompt: prompt.ImagePrompt, filename_prefix: str) -> io.NodeOutput:
        """Write the file."""
        path = folders.new_file(folders.IMAGE_PROMPTS, filename_prefix)
        prompt.save(image_prompt, path)
        show_on_node(f"saved {path.name}")
        return io.NodeOutput(ui={"text": [path.name]})


class Load(io.ComfyNode):
    """File -> IMAGE_PROMPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptLoad",
            display_name="Load Image Prompt",
            category=CATEGORY,
            description="Loads an image prompt that Save Image Prompt wrote.",
            search_aliases=["load embeds", "import image prompt"],
            inputs=[
                io.Combo.Input(
                    "prompt_name",
                    options=folders.choices(folders.IMAGE_PROMPTS),
                    tooltip="A file in models/image_prompts.",
                )
            ],
            outputs=[
                ImagePromptType.Output(
                    "image_prompt",
                    display_name="image_prompt",
                    tooltip="For Apply IP-Adapter, with the adapter that encoded it.",
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt_name: str) -> bool | str:
        """Say where the file was looked for when it is not there."""
        return _check_name(folders.IMAGE_PROMPTS, prompt_name)

    @classmethod
    def fingerprint_inputs(cls, prompt_name: str) -> str:
        """Load again when the file changed."""
        return folders.stamp(folders.IMAGE_PROMPTS, prompt_name)

    @classmethod
    def execute(cls, prompt_name: str) -> io.NodeOutput:
        """Read the file."""
        return io.NodeOutput(prompt.load(folders.find(folders.IMAGE_PROMPTS, prompt_name)))


NODES: list[type[io.ComfyNode]] = [LoadAdapter, LoadOpenCLIP, Encode, Join, Apply, Save, Load]


class ImagePromptExtension(ComfyExtension):
    """What the host asks for our nodes."""

    async def on_load(self) -> None:
        """Register our model folders."""
        folders.register()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """List the nodes."""
        return NODES
