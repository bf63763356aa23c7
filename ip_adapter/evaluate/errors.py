"""What an evaluation refuses, beside the errors of the library."""

from __future__ import annotations

from ..errors import IPAdapterError


class DataError(IPAdapterError):
    """A row of the data cannot be used; the message names it."""


class ProtocolError(IPAdapterError):
    """A choice that means nothing, or another one than a folder of results was begun with."""
