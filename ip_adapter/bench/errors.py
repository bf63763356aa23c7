"""What the benchmark refuses, beside the errors of the library."""

from __future__ import annotations

from ..errors import IPAdapterError


class BenchError(IPAdapterError):
    """A measurement that cannot be made here, or results that do not belong together."""
