"""What OpenAI's clients send and get, as far as this server goes; requests' sampler settings come from our options."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from ..settings import Option, TextSettings, answer_options, options_of, picture_options
from .option_fields import fields_of
from .service import MAX_PROMPT

MAX_N = 10
"""Pictures of one request, as OpenAI has it."""
MAX_PARTIAL = 3
MAX_MESSAGES = 200
MAX_PARTS = 64
MAX_STOPS = 16
SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"

Flag = Annotated[bool, Field(strict=True)]
Whole = Annotated[int, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


def _example(**body: Any) -> ConfigDict:
    """A whole body for readers, and for those who try the document out."""
    return ConfigDict(json_schema_extra={"examples": [body]})


def _ignored(what: str) -> Any:
    return Field(None, description=f"{what}; accepted and not used.", json_schema_extra={"deprecated": True})


class PictureFields(BaseModel):
    """What a drawing and an edit have in common."""

    model_config = ConfigDict(extra="forbid") | _example(
        prompt="a red circle on a white background", size="auto", seed=1, num_timesteps=30
    )

    prompt: str = Field(
        description="What is to be seen, or to be changed.",
        min_length=1,
        max_length=MAX_PROMPT,
        examples=["a red circle on a white background"],
    )
    n: Annotated[Whole, Field(ge=1, le=MAX_N)] | None = Field(
        None, description="How many pictures: each a job of its own, with the seed after the one before it; default: 1"
    )
    size: Annotated[str, Field(pattern=SIZE)] | None = Field(
        None,
        description="Width and height in pixels as WIDTHxHEIGHT, rounded to multiples of 16; `auto`, which is the "
        "default, is the model's largest square for a drawing, and the last picture's own size for an edit.",
        examples=["1024x768"],
    )
    output_format: Literal["png", "jpeg", "webp"] | None = Field(
        None, description="All three carry prompt, seed and settings; default: png"
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="`b64_json`, which is the default; `url` is refused, because this server keeps no pictures."
    )
    stream: Flag | None = Field(None, description="Answer with server-sent events; default: false")
    partial_images: Annotated[Whole, Field(ge=0, le=MAX_PARTIAL)] | None = Field(
        None, description="With `stream`: how often the picture is shown, small, while it forms; default: 0"
    )
    model: str | None = Field(None, description="Any name: one model is served, and /v1/models names it.")
    quality: Any = _ignored("Use num_timesteps")
    style: Any = _ignored("Say it in the prompt")
    background: Any = _ignored("Pictures are opaque")
    moderation: Any = _ignored("Nothing is filtered")
    output_compression: Any = _ignored("JPEG is written at quality 95, WebP without loss")
    complexity: Any = _ignored("Of other models")
    user: Any = _ignored("Who asks")
    safety_identifier: Any = _ignored("Who asks")


class EditFields(PictureFields):
    """What an edit has beside."""

    input_fidelity: Any = _ignored("Use cfg_img_scale")


def picture_request(editing: bool) -> type[PictureFields]:
    """The schema of a drawing or of an edit: OpenAI's fields and our sampler settings."""
    name, base = ("ImageEditRequest", EditFields) if editing else ("ImageRequest", PictureFields)
    made: type[PictureFields] = create_model(name, __base__=base, **fields_of(picture_options(editing)))
    made.__doc__ = "A picture to be drawn." if not editing else "A picture to be changed."
    return made


class PictureTokens(BaseModel):
    image_tokens: int
    text_tokens: int


class PictureUsage(BaseModel):
    """Tokens that the model saw and made."""

    input_tokens: int
    input_tokens_details: PictureTokens
    output_tokens: int
    output_tokens_details: PictureTokens
    total_tokens: int


class PictureData(BaseModel):
    """One picture."""

    b64_json: str = Field(description="The file in base64.")
    revised_prompt: str | None = Field(None, description="With `think`: the plan that the model wrote first.")
    settings: dict[str, Any] = Field(description="Every setting used, the seed among them; the file carries the same.")


class PicturesAnswer(BaseModel):
    """Pictures, in the order of their seeds."""

    created: int = Field(description="Seconds since 1970.")
    background: Literal["opaque"] = "opaque"
    output_format: Literal["png", "jpeg", "webp"]
    size: str = Field(examples=["1024x1024"])
    data: list[PictureData]
    usage: PictureUsage


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class PictureUrl(BaseModel):
    url: str = Field(
        description="data:image/...;base64,...; http(s) where the server was started with --remote-images.",
        examples=["data:image/png;base64,iVBORw0KGgo..."],
    )
    detail: Any = _ignored("Pictures are seen at the model's own size")


class PicturePart(BaseModel):
    type: Literal["image_url"]
    image_url: PictureUrl | str


Part = Annotated[TextPart | PicturePart, Field(discriminator="type")]


class Message(BaseModel):
    """One turn: a text, or texts and pictures in the order in which the model is to see them."""

    role: Literal["system", "developer", "user", "assistant"] = Field(
        description="The model knows no roles; turns are told apart by their order."
    )
    content: str | Annotated[list[Part], Field(max_length=MAX_PARTS)] | None = None


MODALITIES = '["text"], or ["text", "image"]: the model may draw in its answer. Others are refused.'


class StreamOptions(BaseModel):
    include_usage: Flag | None = Field(None, description="Whether the last piece before the end counts tokens.")


class ChatFields(BaseModel):
    """OpenAI's part of a chat request; fields that are not named here are not used."""

    model_config = _example(messages=[{"role": "user", "content": "What is a bagel?"}], max_tokens=100)

    messages: list[Message] = Field(
        min_length=1, max_length=MAX_MESSAGES, examples=[[{"role": "user", "content": "What is a bagel?"}]]
    )
    model: str | None = Field(None, description="Any name: one model is served, and /v1/models names it.")
    max_tokens: Annotated[Whole, Field(ge=1, le=32767)] | None = Field(
        None, description="Most tokens of the answer; default: 511"
    )
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=32767)] | None = Field(
        None, description="The same under its newer name, which counts where both are given."
    )
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = Field(
        None, description="Above 0 tokens are drawn; 0 and none at all are the likeliest answer."
    )
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="Below 1 tokens are drawn, among the likeliest of this mass together."
    )
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = Field(
        None, description="The answer ends before the first of these."
    )
    stream: Flag | None = Field(None, description="Answer in pieces, as server-sent events; default: false")
    stream_options: StreamOptions | None = None
    n: Whole | None = Field(None, description="1; more are refused.")
    tools: list[Any] | None = Field(None, description="Refused where there are any: the model calls nothing.")
    functions: list[Any] | None = Field(None, description="As tools.")
    response_format: dict[str, Any] | None = Field(None, description='{"type": "text"}; others are refused.')
    logprobs: Flag | None = Field(None, description="Refused where true.")
    modalities: list[str] | None = Field(None, description=MODALITIES)


OWN_NAMES = frozenset({"temperature", "top_p"})
"""Settings of ours that a chat request has already."""


def text_options() -> tuple[Option, ...]:
    return options_of(TextSettings)


def chat_request() -> type[ChatFields]:
    """The schema of a chat request: OpenAI's fields and our settings of an answer, in texts and pictures too."""
    own = fields_of(about for about in answer_options() if about.name not in OWN_NAMES)
    made: type[ChatFields] = create_model("ChatRequest", __base__=ChatFields, **own)
    made.__doc__ = "Turns, the last of which is to be answered."
    return made


class Answer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class DrawnAnswer(Answer):
    """An answer in texts and pictures; `content` has the texts, one under the other."""

    images: list[PicturePart] = Field(description="The pictures.")
    parts: list[Part] = Field(description="All in order, as the content of a message of a next request takes it.")


class Choice(BaseModel):
    index: int = 0
    message: DrawnAnswer | Answer
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatUsage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatAnswer(BaseModel):
    """An answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: ChatUsage
    settings: dict[str, Any] = Field(description="Every setting used, the seed among them.")


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lowmem-bagel"


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]
