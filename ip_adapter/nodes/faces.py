"""The nodes for faces: schemas and tooltips, one library call each; no arithmetic."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..errors import IPAdapterError
from ..faces import By, Pick, from_tensor
from ..host import faces
from ..host.features import schema, show_on_node
from .common import CATEGORY, FaceModelType, FaceType

PREVIEW = 224
"""Side of the crop that is shown, in pixels."""


class LoadFaceModel(io.ComfyNode):
    """Pack -> INSIGHTFACE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptLoadFaceModel",
            display_name="Load Face Model",
            category=CATEGORY,
            description=(
                "Loads a face detector and recogniser from models/insightface/models, for FaceID "
                "adapters. insightface itself is not needed, onnxruntime is. Licence: "
                "insightface's packs (buffalo_l, antelopev2) are for non-commercial research only, "
                "which the FaceID adapters trained with them inherit."
            ),
            search_aliases=["insightface", "faceid", "buffalo_l", "antelopev2", "face analysis"],
            inputs=[
                io.Combo.Input(
                    "pack_name",
                    options=faces.choices(),
                    tooltip="A folder with the .onnx files of a pack: buffalo_l for most FaceID "
                    "adapters, antelopev2 for InstantID and Kolors.",
                ),
                io.Combo.Input(
                    "provider",
                    options=list(faces.PROVIDERS),
                    default=faces.PROVIDERS[0],
                    tooltip="Where onnxruntime computes. auto: the GPU if this onnxruntime can "
                    "use it, else the CPU.",
                ),
            ],
            outputs=[
                FaceModelType.Output(
                    "face_model", display_name="face_model", tooltip="For Detect Face."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, pack_name: str) -> bool | str:
        """Say where the pack was looked for when it is not there."""
        try:
            faces.find(pack_name)
        except IPAdapterError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, pack_name: str, provider: str) -> str:
        """Load again when the files changed."""
        return faces.stamp(pack_name)

    @classmethod
    def execute(cls, pack_name: str, provider: str) -> io.NodeOutput:
        """Load the pack."""
        model = faces.load(pack_name, provider)
        show_on_node(f"{model.label} on {model.provider}")
        return io.NodeOutput(model)


class DetectFace(io.ComfyNode):
    """Pictures -> FACE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptDetectFace",
            display_name="Detect Face",
            category=CATEGORY,
            description=(
                "Finds one face in each picture and reads who it is. A batch gives one reference "
                "per picture."
            ),
            search_aliases=["insightface", "faceid", "face embeds", "face crop", "face detection"],
            inputs=[
                FaceModelType.Input("face_model", tooltip="From Load Face Model."),
                io.Image.Input("image", tooltip="A picture with a face, or a batch of them."),
                io.Combo.Input(
                    "pick",
                    options=list(get_args(By)),
                    default="largest",
                    tooltip="How the faces of a picture with several are put in order. centre: "
                    "nearest to the centre first.",
                ),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=999,
                    tooltip="Which one in that order; 0 is the first.",
                ),
            ],
            outputs=[
                FaceType.Output(
                    "face",
                    display_name="face",
                    tooltip="The face of each picture, as FaceID reads it.",
                ),
                io.Image.Output(
                    "crop",
                    display_name="crop",
                    tooltip="The face as the recogniser sees it, turned upright: shows whether "
                    "the right one was found.",
                ),
            ],
        )

    @classmethod
    def execute(cls, face_model: Any, image: Any, pick: By, index: int) -> io.NodeOutput:
        """Detect and read."""
        found = faces.detect(faces.require(face_model), image, Pick(pick, index))
        show_on_node(f"{len(found)} x {found.label}")
        return io.NodeOutput(found, found.crops(PREVIEW))


class FaceFromTensor(io.ComfyNode):
    """Vector of another program -> FACE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node to the host."""
        return schema(
            node_id="ImagePromptFaceFromTensor",
            display_name="Face From Tensor",
            category=CATEGORY,
            description=(
                "Takes a face vector that another node or program computed; any detector serves, "
                "and neither face model nor onnxruntime is needed."
            ),
            search_aliases=["faceid", "face embedding", "insightface", "arcface"],
            inputs=[
                io.AnyType.Input(
                    "embedding",
                    tooltip="A tensor of 512 numbers per face, [512] or [faces, 512], from the "
                    "recogniser that the adapter was trained with, not normalised.",
                ),
                io.Image.Input(
                    "crop",
                    optional=True,
                    tooltip="An upright crop of each face, for the adapters that also look at it "
                    "(FaceID Plus).",
                ),
            ],
            outputs=[FaceType.Output("face", display_name="face", tooltip="As from Detect Face.")],
        )

    @classmethod
    def execute(cls, embedding: Any, crop: Any = None) -> io.NodeOutput:
        """Check and wrap the vector."""
        found = from_tensor(embedding, crop)
        show_on_node(f"{len(found)} x {found.label}")
        return io.NodeOutput(found)


NODES: list[type[io.ComfyNode]] = [LoadFaceModel, DetectFace, FaceFromTensor]
