"""A real ComfyUI as a subprocess, started with this pack and stopped for certain.

Shared by the host tests, the demo and the screenshots. The pack is linked, not copied, into
`<base>/custom_nodes`, so what runs is the working tree.

    with Server(base) as server:
        result = server.run(prompt)
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil

from scripts.client import (
    Client,
    OutputImage,
    PromptFailed,
    PromptInterrupted,
    PromptRejected,
    Result,
    ServerError,
)
from scripts.host import REPOSITORY, HostError, find_host

__all__ = [
    "OutputImage",
    "PromptFailed",
    "PromptInterrupted",
    "PromptRejected",
    "Result",
    "Server",
    "ServerError",
]

START_SECONDS = 120.0
PACK_NAME = "ip-adapter"

# The host runs inside these lines, which end it when our end of its stdin closes: it cannot outlive
# us, however we end (also kill -9), on Linux and macOS alike.
LAUNCHER = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (os.read(0, 1), os._exit(0)), daemon=True).start()
sys.argv = sys.argv[1:]; sys.path[0] = os.getcwd()
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Server(Client):
    """A ComfyUI process on a free port.

    Args:
        base: Folder for models, input, output and log; made if missing.
        host: The ComfyUI folder; the one `find_host` finds if left out.
        packs: Further custom-node folders to link in, beside this pack.
        with_pack: Whether this pack is linked in.
        arguments: Further command-line arguments of the host.
        environment: Further environment variables of the host.
    """

    def __init__(
        self,
        base: Path,
        *,
        host: Path | None = None,
        packs: Sequence[Path] = (),
        with_pack: bool = True,
        arguments: Sequence[str] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        super().__init__(port=0)  # a free one is taken at start
        found = host or find_host()
        if found is None:
            raise HostError("No ComfyUI found; run `make setup`, or set COMFYUI_PATH.")
        self.base = base.resolve()
        self.host = found.resolve()
        self.log_file = self.base / "server.log"
        self._links = {pack.name: pack.resolve() for pack in packs}
        if with_pack:
            self._links[PACK_NAME] = REPOSITORY
        self._arguments = list(arguments)
        # Two threads on two shared cores made the host's small kernels up to 50 times slower.
        self._environment = {"OMP_NUM_THREADS": "1", **os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:
        """Start the host."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the host, whatever happened."""
        self.stop()

    def start(self) -> None:
        """Start the host and wait until it answers.

        Raises:
            ServerError: It ended, or did not answer within two minutes; with the end of its log.
        """
        self._link_packs()
        self.port = _free_port()
        command = [sys.executable, "-c", LAUNCHER, "main.py", "--cpu", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--disable-api-nodes"]
        command += ["--database-url", "sqlite:///:memory:", *self._arguments]
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=self.host,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us alone; we then stop the host in order
            )
        atexit.register(self.stop)
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the host; harmless when it is not running."""
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdin:
            process.stdin.close()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The running host process."""
        if self._process is None:
            raise ServerError("The server is not running.")
        return self._process

    def rss_bytes(self) -> int:
        """Resident memory of the host, in bytes."""
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def private_bytes(self) -> int:
        """Memory that the host holds alone, in bytes: without pages of files it has mapped."""
        used = psutil.Process(self.process.pid).memory_info()
        return int(used.rss - getattr(used, "shared", 0))  # Linux counts mapped files as shared

    def log_text(self) -> str:
        """All the host has logged so far."""
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def _link_packs(self) -> None:
        folder = self.base / "custom_nodes"
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            if old.is_symlink():
                old.unlink()
        for name, pack in self._links.items():
            (folder / name).symlink_to(pack, target_is_directory=True)

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                code = self.process.returncode
                raise ServerError(f"ComfyUI ended with {code} while starting.{self._log_tail()}")
            with contextlib.suppress(OSError):
                self.get("/system_stats")
                return
            time.sleep(0.1)
        raise ServerError(f"ComfyUI did not answer within {START_SECONDS:.0f} s.{self._log_tail()}")

    def _log_tail(self, lines: int = 25) -> str:
        last = "\n".join(self.log_text().splitlines()[-lines:])
        return f" End of {self.log_file}:\n{last}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
