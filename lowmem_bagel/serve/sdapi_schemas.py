"""What picture tools send to A1111's web UI and get from it, as far as this server goes; the rest is ignored."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..settings import MAX_SEED, picture_options
from .openai_schemas import MAX_N
from .option_fields import fields_of
from .service import MAX_PICTURES, MAX_PROMPT

OWN_NAMES = frozenset({"seed", "width", "height"})
"""Options that these shapes have under the same name."""
TINY = "iVBORw0KGgoAAAANSUhEUgAAAAIAAAACCAIAAAD91JpzAAAAFklEQVR4nGP8z8DAwMDAxMDAwMDAAAANHQEDasKb6QAAAABJRU5ErkJggg=="
"""A picture of 2x2 pixels, for the document's example."""
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Txt2Img(BaseModel):
    """A picture to be drawn. Sampler settings may also be given by our own names, which count more."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "a red circle", "steps": 30, "cfg_scale": 4, "seed": -1}]}
    )

    prompt: str = Field(
        description="What is to be seen.", min_length=1, max_length=MAX_PROMPT, examples=["a red circle"]
    )
    negative_prompt: str | None = Field(
        None, description="Not used: BAGEL's guidance has no negative text. A note in `info` says so."
    )
    steps: Annotated[int, Field(ge=2, le=10_000)] | None = Field(None, description="num_timesteps; default: 50")
    cfg_scale: Annotated[Finite, Field(ge=0, le=1000)] | None = Field(
        None, description="cfg_text_scale, by which BAGEL is guided at 4 where nothing is said."
    )
    seed: Annotated[int, Field(ge=-1, le=MAX_SEED)] | None = Field(None, description="-1 and none: a random one.")
    width: Annotated[int, Field(ge=1, le=65536)] | None = Field(None, description="Pixels, a multiple of 16.")
    height: Annotated[int, Field(ge=1, le=65536)] | None = Field(None, description="Pixels, a multiple of 16.")
    batch_size: Annotated[int, Field(ge=1, le=MAX_N)] | None = Field(None, description="Pictures; default: 1")
    n_iter: Annotated[int, Field(ge=1, le=MAX_N)] | None = Field(None, description="As often so many; default: 1")
    send_images: bool | None = Field(None, description="Whether pictures are in the answer; default: true")
    enable_hr: bool | None = Field(None, description="Refused where true: ask for the size itself.")
    script_name: str | None = Field(None, description="Refused where one is named.")
    sampler_name: Any = Field(None, description="Not used: there is one.")
    scheduler: Any = Field(None, description="Not used: see timestep_shift.")
    override_settings: dict[str, Any] | None = Field(None, description="Not used.")


class Img2Img(Txt2Img):
    """A picture to be changed as the prompt says."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "make it blue", "init_images": [TINY], "steps": 30, "seed": -1}]}
    )

    init_images: list[str] = Field(
        description="Pictures in base64, or as data: URLs. Of several the last gives the size.",
        min_length=1,
        max_length=MAX_PICTURES,
    )
    mask: str | None = Field(None, description="Refused: the whole picture is seen; say in the prompt what changes.")
    denoising_strength: Any = Field(None, description="Not used: see cfg_img_scale.")


def sd_request(editing: bool) -> type[Txt2Img]:
    """The schema of a request with our sampler settings beside A1111's."""
    name, base = ("Img2ImgRequest", Img2Img) if editing else ("Txt2ImgRequest", Txt2Img)
    own = fields_of(about for about in picture_options(editing) if about.name not in OWN_NAMES)
    made: type[Txt2Img] = create_model(name, __base__=base, **own)
    made.__doc__ = base.__doc__
    return made


class SdPictures(BaseModel):
    """Pictures in the order of their seeds."""

    images: list[str] = Field(description="PNG files in base64, with prompt, seed and settings in them.")
    parameters: dict[str, Any] = Field(description="What was asked.")
    info: str = Field(description="A JSON text: what was drawn.")


class SdState(BaseModel):
    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_timestamp: str = "0"
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class SdProgress(BaseModel):
    """How far this client's requests are."""

    progress: float = Field(description="From 0 to 1.")
    eta_relative: float = Field(description="Seconds until all are done.")
    state: SdState
    current_image: str | None = Field(None, description="A small PNG in base64 of the picture as it forms.")
    textinfo: str | None = None


class SdModel(BaseModel):
    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class SdOptions(BaseModel):
    """Settings of A1111's that tools change; all but the model are not used."""

    sd_model_checkpoint: str | None = Field(None, description="The model that is served; another is refused.")
