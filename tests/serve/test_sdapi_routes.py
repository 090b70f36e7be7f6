"""A1111's shapes, as picture tools send them."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from support.api import listening
from support.serving import PROMPT, running_service, until

from lowmem_bagel.pictures.saving import read_metadata
from lowmem_bagel.serve.service import Service

TOOLS = {
    "prompt": PROMPT, "negative_prompt": "", "seed": 7, "subseed": -1, "subseed_strength": 0, "steps": 3,
    "cfg_scale": 2.5, "width": 32, "height": 32, "sampler_name": "DPM++ 2M", "sampler_index": "Euler",
    "scheduler": "Karras", "batch_size": 1, "n_iter": 1, "restore_faces": False, "tiling": False, "styles": [],
    "override_settings": {"sd_model_checkpoint": "other", "CLIP_stop_at_last_layers": 2}, "enable_hr": False,
    "override_settings_restore_afterwards": True, "alwayson_scripts": {"ADetailer": {"args": []}}, "eta": None,
    "script_name": None, "script_args": [], "send_images": True, "save_images": False, "s_noise": 1.0,
}  # fmt: skip
"""What a typical tool sends."""


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running_service(page=False, queue=4) as made:
        yield made


@pytest.fixture(scope="module")
def api(service: Service) -> Iterator[httpx.Client]:
    with listening(service) as url, httpx.Client(base_url=f"{url}/sdapi/v1", timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def png() -> str:
    file = io.BytesIO()
    Image.new("RGB", (64, 32), "red").save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def told(answer: httpx.Response) -> str:
    assert answer.status_code == 400, answer.text
    message: str = answer.json()["error"]["message"]
    return message


def test_pictures_are_drawn(api: httpx.Client, service: Service, tmp_path: Path) -> None:
    answer = api.post("/txt2img", json={**TOOLS, "n_iter": 2}).json()
    info = json.loads(answer["info"])
    assert (info["all_seeds"], info["steps"], info["cfg_scale"], info["width"]) == ([7, 8], 3, 2.5, 32)
    assert info["infotexts"][1].endswith(f"Seed: 8, Size: 32x32, Model: {service.name}")
    assert info["notes"] == []
    assert len(answer["images"]) == 2 and answer["parameters"]["prompt"] == PROMPT
    content = base64.b64decode(answer["images"][0])
    (tmp_path / "a.png").write_bytes(content)
    assert read_metadata(tmp_path / "a.png") == info["settings"][0]
    assert service.loaded is not None
    size = {"width": 32, "height": 32}
    wanted = service.loaded.pipeline.generate(PROMPT, seed=7, num_timesteps=3, cfg_text_scale=2.5, **size)
    assert wanted.image is not None
    assert Image.open(io.BytesIO(content)).tobytes() == wanted.image.tobytes()


def test_frames_are_pictures_of_one_seed(api: httpx.Client) -> None:
    answer = api.post("/txt2img", json={**TOOLS, "frames": 3, "frame_mode": "turn"}).json()
    assert len(answer["images"]) == len(json.loads(answer["info"])["infotexts"]) == 3
    assert json.loads(answer["info"])["all_seeds"] == [7, 7, 7]


def test_our_own_names_count_more_and_minus_one_is_a_random_seed(api: httpx.Client) -> None:
    body = {**TOOLS, "seed": -1, "num_timesteps": 2, "timestep_shift": 1.5, "negative_prompt": "ugly"}
    infos = [json.loads(api.post("/txt2img", json={**body, "send_images": False}).json()["info"]) for _ in range(2)]
    assert infos[0]["seed"] != infos[1]["seed"]
    assert infos[0]["settings"][0]["num_timesteps"] == 2 and infos[0]["settings"][0]["timestep_shift"] == 1.5
    assert "no negative text" in infos[0]["notes"][0]


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_a_picture_is_changed(api: httpx.Client, png: str, prefix: str) -> None:
    sizes = {"width": None, "height": None}
    body = {**TOOLS, **sizes, "init_images": [prefix + png], "denoising_strength": 0.75, "mask": None}
    answer = api.post("/img2img", json=body).json()
    assert Image.open(io.BytesIO(base64.b64decode(answer["images"][0]))).size == (128, 64)
    assert "init_images" not in answer["parameters"]
    assert json.loads(answer["info"])["settings"][0]["cfg_renorm_type"] == "text_channel"


def test_progress_and_interrupt(api: httpx.Client, service: Service) -> None:
    assert api.get("/progress").json()["progress"] == 0
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(api.post, "/txt2img", json={**TOOLS, "steps": 5000, "n_iter": 2})
        unseen = {"skip_current_image": "true"}
        until(lambda: api.get("/progress", params=unseen).json()["state"]["sampling_step"] > 1)
        assert service.worker.running is not None
        assert not service.worker.running.previews, "nobody asked to see it"
        api.get("/progress")
        assert service.worker.running.previews
        service.worker.running.update(preview=Image.new("RGB", (4, 4)))
        seen = api.get("/progress").json()
        assert 0 < seen["progress"] < 0.6 and seen["eta_relative"] > 0
        assert (seen["state"]["job_count"], seen["state"]["job_no"]) == (2, 0)
        assert seen["state"]["sampling_steps"] == 4999 and seen["state"]["sampling_step"] > 0
        Image.open(io.BytesIO(base64.b64decode(seen["current_image"]))).load()
        assert api.get("/progress", params=unseen).json()["current_image"] is None
        assert api.post("/interrupt").json() == {}
        assert drawing.result(10).status_code == 503
    assert api.get("/progress").json()["state"]["job_count"] == 0
    assert service.queue.order() == []


def test_what_was_done_before_an_interrupt_is_kept(api: httpx.Client, service: Service) -> None:
    with ThreadPoolExecutor(1) as pool:
        drawing = pool.submit(api.post, "/txt2img", json={**TOOLS, "steps": 50, "n_iter": 3})
        until(lambda: api.get("/progress").json()["state"]["job_no"] == 1)
        api.post("/interrupt")
        assert len(drawing.result(10).json()["images"]) in (1, 2)


def test_another_clients_pictures_are_neither_seen_nor_stopped(api: httpx.Client, service: Service) -> None:
    other = service.submit([PROMPT], "image", {"num_timesteps": 3000, "width": 32, "height": 32}, "other", True)
    until(lambda: other.progress.step > 0)
    assert api.get("/progress").json()["state"]["job_count"] == 0
    api.post("/interrupt")
    assert other.stopped is None
    service.cancel(other)


def test_what_tools_ask_for_at_the_start_is_there(api: httpx.Client, service: Service) -> None:
    assert api.get("/sd-models").json()[0]["title"] == service.name
    assert api.get("/samplers").json()[0]["name"] == "Euler"
    for name in ("schedulers", "upscalers", "sd-vae", "loras", "scripts", "embeddings", "cmd-flags", "prompt-styles"):
        assert api.get(f"/{name}").status_code == 200
    assert api.get("/options").json()["sd_model_checkpoint"] == service.name
    assert api.post("/options", json={"sd_model_checkpoint": service.name, "unknown": 1}).json() is None
    assert "not served here" in told(api.post("/options", json={"sd_model_checkpoint": "sdxl"}))


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/txt2img", {"enable_hr": True}, "enable_hr"),
        ("/txt2img", {"script_name": "SD upscale"}, "scripts"),
        ("/txt2img", {"batch_size": 3, "n_iter": 2}, "6 pictures; this server draws 4"),
        ("/txt2img", {"batch_size": 10**30}, "batch_size"),
        ("/txt2img", {"steps": "many"}, "steps"),
        ("/txt2img", {"seed": -2}, "seed"),
        ("/txt2img", {"prompt": None}, "prompt"),
        ("/txt2img", {"width": 100_000}, "width"),
        ("/img2img", {"init_images": []}, "init_images"),
        ("/img2img", {"init_images": ["!"]}, "base64"),
        ("/img2img", {"init_images": ["AAAA"]}, "not a picture"),
        ("/img2img", {"init_images": ["/etc/passwd"]}, "picture"),
        ("/img2img", {"init_images": ["http://127.0.0.1/"]}, "--remote-images"),
        ("/img2img", {"init_images": ["AAAA"], "mask": "AAAA"}, "mask is not supported"),
    ],
)
def test_what_cannot_be_done_is_said(api: httpx.Client, path: str, body: dict[str, Any], said: str) -> None:
    assert said in told(api.post(path, json={**TOOLS, **body}))
