"""Talk to a running ComfyUI as its page does: routes over HTTP, progress over a websocket.

result = Client(8188).run(prompt)
"""

from __future__ import annotations

import contextlib
import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import websocket

Json = dict[str, Any]


class ServerError(RuntimeError):
    """The host did not start, ended early or did not answer in time."""


class PromptRejected(ServerError):
    """HTTP 400: the host's validation refused a prompt.

    Attributes:
        details: The host's JSON, with `error` and `node_errors`.
    """

    def __init__(self, details: Json) -> None:
        """Keep the host's JSON and quote its messages."""
        self.details = details
        error = details.get("error", {})
        lines = [error.get("message", str(error)) if isinstance(error, dict) else str(error)]
        for node, found in details.get("node_errors", {}).items():
            for each in found["errors"]:
                lines.append(
                    f"{found['class_type']} ({node}): {each['message']}: {each['details']}"
                )
        super().__init__("\n".join(lines))


class PromptFailed(ServerError):
    """A node raised while a prompt ran.

    Attributes:
        details: Data of the `execution_error` event.
    """

    def __init__(self, details: Json) -> None:
        """Keep the event and name node and exception."""
        self.details = details
        self.node_type: str = details["node_type"]
        self.exception_type: str = details["exception_type"]
        self.exception_message: str = details["exception_message"].strip()
        where = f"{self.node_type} ({details['node_id']})"
        super().__init__(f"{where}: {self.exception_type}: {self.exception_message}")


class PromptInterrupted(ServerError):
    """A prompt was interrupted while it ran."""


@dataclass(frozen=True)
class OutputImage:
    """One picture that an output node left: where it lies and its file's bytes."""

    node_id: str
    filename: str
    subfolder: str
    kind: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Result:
    """What a prompt left behind.

    Attributes:
        prompt_id: The host's id of the run.
        outputs: Node id -> what that output node reported.
        images: Every picture among the outputs, in node order.
        events: The websocket's JSON events of this prompt, in order.
    """

    prompt_id: str
    outputs: dict[str, Json]
    images: list[OutputImage]
    events: list[Json] = field(repr=False)

    def cached(self) -> set[str]:
        """Ids of the nodes whose results came from the host's cache."""
        found = (e["data"]["nodes"] for e in self.events if e["type"] == "execution_cached")
        return {node for nodes in found for node in nodes}


class Client:
    """One caller of a ComfyUI on 127.0.0.1.

    Args:
        port: Port of the host.
    """

    def __init__(self, port: int) -> None:
        self.port = port
        self.client_id = uuid.uuid4().hex
        # Whatever proxy the user has, it is not for the loopback address.
        self._http = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def url(self, path: str = "/") -> str:
        """Address of one of the host's routes."""
        return f"http://127.0.0.1:{self.port}{path}"

    def get_bytes(self, path: str) -> bytes:
        """Body of a GET request."""
        with self._http.open(self.url(path), timeout=60) as answer:
            return bytes(answer.read())

    def get(self, path: str) -> Any:
        """JSON of a GET request."""
        return json.loads(self.get_bytes(path))

    def post(self, path: str, content: Json) -> Any:
        """POST JSON; returns the answer's JSON, or None for an empty answer."""
        return self._post(path, json.dumps(content).encode(), "application/json")

    def object_info(self, node: str | None = None) -> Json:
        """Interfaces of all nodes, or of one (empty where the host does not know it)."""
        one = f"/{urllib.parse.quote(node)}" if node else ""
        answer: dict[str, Json] = self.get(f"/object_info{one}")
        return answer.get(node, {}) if node else answer

    def history(self, prompt_id: str) -> Json:
        """What the host remembers of a finished prompt; empty while it is not finished."""
        answer: dict[str, Json] = self.get(f"/history/{prompt_id}")
        return answer.get(prompt_id, {})

    def interrupt(self) -> None:
        """Interrupt whatever runs."""
        self.post("/interrupt", {})

    def free(self) -> None:
        """Ask the host to unload its models and drop its caches; done when its queue is idle."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def upload_image(self, name: str, png: bytes) -> Json:
        """Put a picture into the host's input folder, over one of that name."""
        boundary = uuid.uuid4().hex
        parts = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: image/png\r\n\r\n"
        )
        body = parts.encode() + png + f"\r\n--{boundary}--\r\n".encode()
        answer: Json = self._post(
            "/upload/image", body, f"multipart/form-data; boundary={boundary}"
        )
        return answer

    def queue(self, prompt: Json, **extra: Any) -> str:
        """Queue an API-format prompt and return its id without waiting.

        Args:
            prompt: Node id -> `{"class_type", "inputs"}`.
            extra: Further keys of the request, such as `extra_data`.

        Raises:
            PromptRejected: The host refused it, wholly or for one of its outputs.
        """
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id, **extra})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            raise PromptRejected(json.loads(error.read())) from error
        if answer["node_errors"]:  # some outputs are valid and now run; the graph still is wrong
            raise PromptRejected({"error": "A part was refused.", **answer})
        return str(answer["prompt_id"])

    def run(
        self,
        prompt: Json,
        on_event: Callable[[Json], None] | None = None,
        timeout: float = 120.0,
        **extra: Any,
    ) -> Result:
        """Queue a prompt, follow it to its end and collect what it made.

        Args:
            prompt: As for `queue`.
            on_event: Called with each JSON event of this prompt.
            timeout: Seconds until giving up.
            extra: As for `queue`.

        Raises:
            PromptRejected: The host refused the prompt.
            PromptFailed: A node raised.
            PromptInterrupted: Somebody interrupted it.
            ServerError: The host ended, or the time was up.
        """
        deadline = time.monotonic() + timeout
        address = f"ws://127.0.0.1:{self.port}/ws?clientId={self.client_id}"
        connection = websocket.create_connection(address, timeout=10, http_no_proxy=["127.0.0.1"])
        events: list[Json] = []
        with contextlib.closing(connection):
            prompt_id = self.queue(prompt, **extra)
            for event in self._events(connection, prompt_id, deadline):
                events.append(event)
                if on_event:
                    on_event(event)
        for event in events:
            if event["type"] == "execution_error":
                raise PromptFailed(event["data"])
            if event["type"] == "execution_interrupted":
                raise PromptInterrupted(f"Prompt {prompt_id} was interrupted.")
        outputs = self.history(prompt_id)["outputs"]
        return Result(prompt_id, outputs, list(self._images(outputs)), events)

    def _events(
        self, connection: websocket.WebSocket, prompt_id: str, deadline: float
    ) -> Iterator[Json]:
        while True:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                message = connection.recv()
            except websocket.WebSocketTimeoutException as error:
                raise ServerError(
                    f"Prompt {prompt_id} did not end in time.{self._log_tail()}"
                ) from error
            except (websocket.WebSocketException, OSError) as error:
                raise ServerError(f"The host hung up.{self._log_tail()}") from error
            if not isinstance(message, str) or not message:  # previews; a closing frame
                continue
            event: Json = json.loads(message)
            if event.get("data", {}).get("prompt_id") != prompt_id:
                continue
            yield event
            # Sent after the history is written, whether the prompt went well or not.
            if event["type"] == "executing" and event["data"]["node"] is None:
                return

    def _log_tail(self) -> str:
        return ""  # whoever owns the process knows its log

    def _images(self, outputs: dict[str, Json]) -> Iterator[OutputImage]:
        for node_id, output in outputs.items():
            for image in output.get("images", []):
                data = self.get_bytes("/view?" + urllib.parse.urlencode(image))
                yield OutputImage(
                    node_id, image["filename"], image["subfolder"], image["type"], data
                )

    def _post(self, path: str, body: bytes, content_type: str) -> Any:
        headers = {"Content-Type": content_type}
        request = urllib.request.Request(self.url(path), data=body, headers=headers)
        with self._http.open(request, timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if content else None
