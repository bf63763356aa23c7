"""TensorBoard's events, where it is installed; a log that cannot be written ends no run."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

log = logging.getLogger(__name__)


class Board:
    """Writes events into a folder.

    Args:
        folder: Where.
        step: Where training goes on; what was logged of later steps is taken back, as these come
            again.
        is_wanted: False for a board that writes nothing.
    """

    def __init__(self, folder: Path, step: int, is_wanted: bool = True) -> None:
        self._writer: Any = None
        if not is_wanted:
            return
        if importlib.util.find_spec("tensorboard") is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies warn of their own past
            from torch.utils.tensorboard import SummaryWriter
        self._try(lambda: setattr(self, "_writer", SummaryWriter(str(folder), purge_step=step + 1)))

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def number(self, name: str, value: float, step: int) -> None:
        """Log a number."""
        if self._writer is not None:
            self._try(lambda: self._writer.add_scalar(name, value, step))

    def picture(self, name: str, values: Tensor, step: int) -> None:
        """Log a picture, uint8 ``[H, W, 3]``."""
        if self._writer is not None:
            self._try(lambda: self._writer.add_image(name, values, step, dataformats="HWC"))

    def close(self) -> None:
        """Write what is still held back."""
        if self._writer is not None:
            self._try(self._writer.close)

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as error:
            self._writer = None
            log.warning("IP-Adapter: TensorBoard's log ends here, it cannot be written (%s)", error)
