"""Requests in A1111's shapes: as ours, to their pictures, and which of a client's are under way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import Request

from .. import __version__
from ..errors import Cancelled, SettingError
from ..pictures.callers import is_url
from ..settings import picture_options
from .following import client_of, result_of
from .intake import Given, Intake, Link, base64_of, cancel
from .jobs import Job
from .openai_images import each_its_seed
from .openai_schemas import MAX_N
from .option_fields import given
from .sdapi_schemas import OWN_NAMES, Img2Img, SdPictures, SdProgress, SdState, Txt2Img

if TYPE_CHECKING:
    from ..generation.results import Result

NO_NEGATIVE = "negative_prompt was not used: BAGEL's guidance has no negative text"


class Desk:
    """Carries requests out, and knows which jobs of a client are under way: a client sees and stops its own alone."""

    def __init__(self, intake: Intake) -> None:
        self.intake, self.service = intake, intake.service
        self._under_way: dict[str, list[Job]] = {}

    async def draw(self, request: Request, body: Txt2Img) -> SdPictures:
        """Draw, or edit the body's pictures; what is interrupted ends with the pictures that were done before."""
        refuse_what_is_not_done(body)
        settings = each_its_seed(settings_of(body), self._count(body))
        jobs = await self.intake.submit(request, terms_of(body), "image", settings)
        results: list[Result] = []
        with self._watched(client_of(request), jobs):
            for job in jobs:
                try:
                    results.append(await result_of(request, self.service, job))
                except Cancelled:
                    if not results:
                        raise
                    break
        shown = results if body.send_images is not False else []
        images = [await base64_of(image, "png", each.settings) for each in shown for image in each.images]
        each_image = [result for result in results for _ in result.images]
        asked = body.model_dump(exclude={"init_images", "mask"})
        return SdPictures(
            images=images, parameters=asked, info=json.dumps(info_of(body, each_image, self.service.name))
        )

    def _count(self, body: Txt2Img) -> int:
        count, room = (body.batch_size or 1) * (body.n_iter or 1), min(MAX_N, self.service.options.queue)
        if count > room:
            raise SettingError(f"{count} pictures; this server draws {room} a request: lower batch_size or n_iter")
        return count

    @contextmanager
    def _watched(self, client: str, jobs: Sequence[Job]) -> Iterator[None]:
        """Known to be under way meanwhile, and over at the end in any case."""
        self._under_way.setdefault(client, []).extend(jobs)
        try:
            yield
        finally:
            cancel(self.service, jobs)
            left = [job for job in self._under_way[client] if job not in jobs]
            self._under_way[client] = left
            if not left:
                del self._under_way[client]

    async def progress(self, client: str, pictured: bool) -> SdProgress:
        """How far the client's jobs are, all together."""
        jobs = self._under_way.get(client, [])
        if not jobs:
            return SdProgress(progress=0, eta_relative=0, state=SdState(), current_image=None, textinfo=None)
        parts = [job.progress for job in jobs]
        shares = [1.0 if part.over else part.step / part.steps if part.steps else 0.0 for part in parts]
        place = next((i for i, part in enumerate(parts) if not part.over), len(jobs) - 1)
        outlooks = [outlook.seconds for outlook in map(self.service.outlook, jobs) if outlook is not None]
        preview = parts[place].preview
        jobs[place].previews = jobs[place].previews or pictured  # made from when somebody looks
        return SdProgress(
            progress=sum(shares) / len(shares),
            eta_relative=max(outlooks, default=0.0),
            state=SdState(
                job=jobs[place].id,
                job_count=len(jobs),
                job_no=place,
                job_timestamp=time.strftime("%Y%m%d%H%M%S"),
                interrupted=any(job.stopped is not None for job in jobs),
                sampling_step=parts[place].step,
                sampling_steps=parts[place].steps,
            ),
            current_image=await base64_of(preview, "png", {}) if pictured and preview is not None else None,
            textinfo=parts[place].text or None,
        )

    def interrupt(self, client: str) -> None:
        """Stop what the client has under way."""
        cancel(self.service, list(self._under_way.get(client, [])))


def refuse_what_is_not_done(body: Txt2Img) -> None:
    """Raises SettingError for what would change the picture and cannot be had."""
    if body.enable_hr:
        raise SettingError("enable_hr is not supported: ask for the size itself with width and height")
    if body.script_name:
        raise SettingError("script_name is not supported: this server runs no scripts")
    if isinstance(body, Img2Img) and body.mask:
        raise SettingError("mask is not supported: the whole picture is seen; say in the prompt what is to change")


def terms_of(body: Txt2Img) -> list[Given]:
    """The pictures, and the prompt after them."""
    pictures = body.init_images if isinstance(body, Img2Img) else []
    return [*map(_link, pictures), body.prompt]


def _link(picture: str) -> Link:
    known = is_url(picture) or picture[:8].lower().startswith(("http:", "https:"))
    return Link(picture if known else f"data:image/png;base64,{picture}")


def settings_of(body: Txt2Img) -> dict[str, Any]:
    """A1111's names as ours; what is given by our own names counts more."""
    theirs = {
        "num_timesteps": body.steps,
        "cfg_text_scale": body.cfg_scale,
        "seed": None if body.seed == -1 else body.seed,
        "width": body.width,
        "height": body.height,
    }
    own = (about for about in picture_options(isinstance(body, Img2Img)) if about.name not in OWN_NAMES)
    return {name: value for name, value in theirs.items() if value is not None} | given(body, own)


def info_of(body: Txt2Img, results: Sequence[Result], model: str) -> dict[str, Any]:
    """What A1111 says of pictures, and our settings of each."""
    first, count = results[0].settings, len(results)
    negative = body.negative_prompt or ""
    seeds = [result.seed for result in results]
    return {
        "prompt": body.prompt,
        "all_prompts": [body.prompt] * count,
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * count,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": first["width"],
        "height": first["height"],
        "sampler_name": "Euler",
        "cfg_scale": first["cfg_text_scale"],
        "steps": first["num_timesteps"],
        "batch_size": body.batch_size or 1,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model,
        "sd_model_hash": None,
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [_infotext(body, result, model) for result in results],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": 1,
        "is_using_inpainting_conditioning": False,
        "version": f"lowmem-bagel {__version__}",
        "settings": [dict(result.settings) for result in results],
        "notes": [NO_NEGATIVE] if negative.strip() else [],
    }


def _infotext(body: Txt2Img, result: Result, model: str) -> str:
    used = result.settings
    return (
        f"{body.prompt}\nSteps: {used['num_timesteps']}, Sampler: Euler, CFG scale: {used['cfg_text_scale']:g}, "
        f"Seed: {result.seed}, Size: {used['width']}x{used['height']}, Model: {model}"
    )
