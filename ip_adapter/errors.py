"""The errors that reach a user, as one tree.

    IPAdapterError
    ├── CheckpointError         a weights file cannot be read, or is not what its folder promises
    ├── IncompatibleModelError  two good files that do not belong together
    ├── ImageError              a picture or mask that cannot become an image prompt
    ├── InfluenceError          a weight or step window that means nothing
    ├── MissingFileError        a named file is not in any of its folders
    └── DownloadError           a file was not fetched: refused, not reached, broken off, damaged

Every message says what was found, what is needed, and what to do about it.
"""

from __future__ import annotations


class IPAdapterError(Exception):
    """Base of every error this package raises on purpose."""

    # The host shows the full name of an error's class, and imports packs under their whole path.
    __module__ = "ip_adapter"

    def __init_subclass__(cls) -> None:
        """Name every error by the place it is exported from."""
        cls.__module__ = IPAdapterError.__module__


class CheckpointError(IPAdapterError):
    """A weights file cannot be read, or holds something else than its place promises."""


class IncompatibleModelError(IPAdapterError):
    """Adapter, image encoder, image prompt or base model do not belong together."""


class ImageError(IPAdapterError):
    """A reference image or a mask that cannot be used as given."""


class InfluenceError(IPAdapterError):
    """A weight or a step window that cannot be applied as given."""


class MissingFileError(IPAdapterError):
    """A file that was asked for by name is in none of the folders it may be in."""


class DownloadError(IPAdapterError):
    """A file that was asked for could not be fetched, or its licence was not accepted."""
