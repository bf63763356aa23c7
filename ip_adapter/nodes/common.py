"""What the nodes share: socket types, the menu's place, the check of a chosen file."""

from __future__ import annotations

from comfy_api.latest import io

from ..errors import IPAdapterError
from ..host import folders

CATEGORY = "IP-Adapter"

IPAdapterType = io.Custom("IPADAPTER")
ImagePromptType = io.Custom("IMAGE_PROMPT")
ReferencesType = io.Custom("IMAGE_REFERENCES")
InfluenceType = io.Custom("INFLUENCE")
FaceModelType = io.Custom("FACE_MODEL")
FaceType = io.Custom("FACE")


def check_name(folder: str, name: str) -> bool | str:
    """Validate a chosen file in our words; the host's own message only lists what exists."""
    try:
        folders.find(folder, name)
    except IPAdapterError as error:
        return str(error)
    return True
