"""Nodes that make, join and keep image prompts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .. import images, prompt
from ..faces import Faces
from ..host import adapters, encoding, folders
from ..host.features import schema, show_on_node
from ..references import UNCONDITIONALS, Unconditional
from .common import (
    CATEGORY,
    FaceType,
    ImagePromptType,
    IPAdapterType,
    check_name,
    fit_input,
    image_prompt_output,
    image_size_input,
    unconditional_input,
)

BATCHES = ("together", "one per frame")
"""What a batch of references means."""


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
                fit_input(
                    "For pictures that are not square. crop: the centre square only. pad: "
                    "all of it, smaller, on neutral ground. tile: overlapping squares that cover "
                    "it, each a reference of its own."
                ),
                image_size_input(
                    "Side of the square that the encoder sees, in pixels; 0 is its own. "
                    "For adapters trained at another size: 448 for the NoobAI fine-tune."
                ),
                io.Combo.Input(
                    "batch",
                    options=list(BATCHES),
                    default=BATCHES[0],
                    optional=True,
                    tooltip="What a batch of references means. together: all of them for every "
                    "picture. one per frame: the first for the first picture of the latent batch, "
                    "and so on, for animations; the last one serves the rest.",
                ),
                unconditional_input(),
            ],
            outputs=[image_prompt_output("For Apply IP-Adapter, Join and Save Image Prompt.")],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: Any,
        clip_vision: Any,
        image: Any,
        fit: images.Fit,
        image_size: int = 0,
        batch: str = BATCHES[0],
        unconditional: Unconditional = UNCONDITIONALS[0],
    ) -> io.NodeOutput:
        """Encode the references."""
        encoded = encoding.encode(
            adapters.require(ip_adapter),
            clip_vision,
            image,
            fit,
            image_size or None,
            per_frame=batch == BATCHES[1],
            unconditional=unconditional,
        )
        frames = f" for each of {encoded.frames} pictures" if encoded.frames > 1 else ""
        show_on_node(f"{encoded.tokens} image tokens{frames}")
        return io.NodeOutput(encoded)


class EncodeInstructed(io.ComfyNode):
    """Reference images and an instruction -> IMAGE_PROMPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptEncodeInstructed",
            display_name="Encode Instructed Prompt",
            category=CATEGORY,
            description=(
                "Encodes reference images with an instruction that says what to take from them. "
                "For IP-Adapter Instruct."
            ),
            search_aliases=["ip adapter instruct", "instruction", "reference image"],
            inputs=[
                IPAdapterType.Input("ip_adapter", tooltip="An IP-Adapter Instruct."),
                io.ClipVision.Input("clip_vision", tooltip="Its image encoder, ViT-H/14."),
                io.Clip.Input(
                    "clip",
                    tooltip="The CLIP of an SD 1.5 or SDXL checkpoint; its CLIP-L reads the texts.",
                ),
                io.Image.Input("image", tooltip="The reference, or a batch of them."),
                fit_input("For pictures that are not square: see Encode Image Prompt."),
                io.String.Input(
                    "instruction",
                    default="use the style of the image",
                    multiline=True,
                    tooltip="What to take from the image. It was trained with sentences such as "
                    "'use the composition from the image', 'use the face', 'use everything'.",
                ),
                io.String.Input(
                    "description",
                    default="",
                    multiline=True,
                    tooltip="The text prompt of the picture to be made, as given to the sampler.",
                ),
            ],
            outputs=[image_prompt_output("For Apply IP-Adapter.")],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: Any,
        clip_vision: Any,
        clip: Any,
        image: Any,
        fit: images.Fit,
        instruction: str,
        description: str,
    ) -> io.NodeOutput:
        """Encode the references and the texts."""
        adapter = adapters.require(ip_adapter)
        encoded = encoding.encode_instructed(
            adapter, clip_vision, clip, image, fit, instruction, description
        )
        show_on_node(f"{encoded.tokens} image tokens")
        return io.NodeOutput(encoded)


class EncodeFace(io.ComfyNode):
    """Faces -> IMAGE_PROMPT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptEncodeFace",
            display_name="Encode Face Prompt",
            category=CATEGORY,
            description=(
                "Encodes who somebody is, for FaceID, portrait and InstantID adapters. Several "
                "faces of one person make one prompt. FaceID also wants Apply FaceID LoRA on the "
                "model."
            ),
            search_aliases=["faceid", "instantid", "face identity", "portrait", "face embeds"],
            inputs=[
                IPAdapterType.Input("ip_adapter", tooltip="A FaceID, portrait or InstantID file."),
                FaceType.Input("face", tooltip="From Detect Face or Face from Tensor."),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="For the 'plus' adapters, which also read the structure of the face: "
                    "ViT-H/14, for Kolors ViT-L/14-336. The others do without.",
                ),
                io.Float.Input(
                    "structure_weight",
                    default=1.0,
                    min=0.0,
                    max=5.0,
                    step=0.05,
                    optional=True,
                    tooltip="FaceID-PlusV2 and Kolors FaceID-Plus only: how much the structure of "
                    "the face counts against its identity.",
                ),
                unconditional_input(),
            ],
            outputs=[image_prompt_output("For Apply IP-Adapter.")],
        )

    @classmethod
    def execute(
        cls,
        ip_adapter: Any,
        face: Faces,
        clip_vision: Any = None,
        structure_weight: float = 1.0,
        unconditional: Unconditional = UNCONDITIONALS[0],
    ) -> io.NodeOutput:
        """Encode the faces."""
        adapter = adapters.require(ip_adapter)
        encoded = encoding.encode_faces(
            adapter, face, clip_vision, structure_weight, unconditional=unconditional
        )
        show_on_node(f"{encoded.tokens} image tokens of {len(face.embeddings)} faces")
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
            outputs=[image_prompt_output("Both together.")],
        )

    @classmethod
    def execute(cls, first: prompt.ImagePrompt, second: prompt.ImagePrompt) -> io.NodeOutput:
        """Put the tokens side by side."""
        return io.NodeOutput(prompt.join([first, second]))


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
                image_prompt_output("For Apply IP-Adapter, with the adapter that encoded it.")
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt_name: str) -> bool | str:
        """Say where the file was looked for when it is not there."""
        return check_name(folders.IMAGE_PROMPTS, prompt_name)

    @classmethod
    def fingerprint_inputs(cls, prompt_name: str) -> str:
        """Load again when the file changed."""
        return folders.stamp(folders.IMAGE_PROMPTS, prompt_name)

    @classmethod
    def execute(cls, prompt_name: str) -> io.NodeOutput:
        """Read the file."""
        return io.NodeOutput(prompt.load(folders.find(folders.IMAGE_PROMPTS, prompt_name)))


NODES: list[type[io.ComfyNode]] = [Encode, EncodeInstructed, EncodeFace, Join, Save, Load]
