"""What happens when the host loads this folder as a pack."""

from __future__ import annotations

import folder_paths

from . import family, host


def install() -> None:
    """Make the host know the miniature, and list its files in the loader nodes."""
    host.register()
    for folder in sorted(family.MODELS.iterdir()):
        if folder.is_dir():
            folder_paths.add_model_folder_path(folder.name, str(folder))
