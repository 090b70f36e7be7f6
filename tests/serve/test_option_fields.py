"""Every option of ours is a field of the API, typed and bounded, without a line for it."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError, create_model

from lowmem_bagel.serve.openai_schemas import chat_request, picture_request, text_options
from lowmem_bagel.serve.option_fields import TYPES, fields_of, given
from lowmem_bagel.serve.sdapi_schemas import sd_request
from lowmem_bagel.settings import Option, picture_options

NEW = (
    Option(name="halo", kind="number", help="Of light", default=0.5, low=0.0, high=2.0),
    Option(name="tint", kind="text", help="Of it", default="warm", choices=("warm", "cold"), aliases={"hot": "cold"}),
    Option(name="rays", kind="whole", help="Of light", low=1, high=2**64 - 1),
    Option(name="span", kind="pair", help="Of light", default=(0.0, 1.0), low=0.0, high=1.0),
    Option(name="soft", kind="flag", help="Of light", default=False),
)


def test_a_new_option_is_a_field_with_its_limits() -> None:
    schema = create_model("Made", **fields_of(NEW))
    described = schema.model_json_schema()["properties"]
    halo = described["halo"]["anyOf"][0]
    assert (halo["type"], halo["minimum"], halo["maximum"]) == ("number", 0.0, 2.0)
    assert described["halo"]["description"] == "Of light; default: 0.5"
    assert described["tint"]["anyOf"][0]["enum"] == ["warm", "cold", "hot"]
    assert described["rays"]["anyOf"][0]["maximum"] == 2**64 - 1
    assert described["span"]["anyOf"][0]["maxItems"] == 2
    body = schema.model_validate({"halo": 1, "tint": "hot", "span": [0.1, 1], "soft": False, "rays": None})
    assert given(body, NEW) == {"halo": 1.0, "tint": "hot", "span": (0.1, 1.0), "soft": False}


@pytest.mark.parametrize(
    "wrong",
    [
        {"halo": 2.1}, {"halo": float("nan")}, {"halo": "1"}, {"halo": True}, {"tint": "x"}, {"rays": 0}, {"rays": 1.5},
        {"rays": True}, {"rays": 2**64}, {"span": [0.1]}, {"span": [0, 2]}, {"span": [0, float("inf")]}, {"span": "01"},
        {"soft": 1}, {"soft": "true"},
    ],
)  # fmt: skip
def test_what_an_option_does_not_allow_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        create_model("Made", **fields_of(NEW)).model_validate(wrong)


@pytest.mark.parametrize("editing", [False, True])
def test_every_setting_is_in_the_schemas(editing: bool) -> None:
    names = {about.name for about in picture_options(editing)}
    assert {about.kind for about in (*picture_options(editing), *text_options())} <= TYPES.keys()
    assert names <= picture_request(editing).model_fields.keys()
    assert names <= sd_request(editing).model_fields.keys()
    assert {about.name for about in text_options()} <= chat_request().model_fields.keys()


def test_defaults_that_are_told_are_those_of_the_task() -> None:
    told = [picture_request(editing).model_fields["cfg_img_scale"].description for editing in (False, True)]
    assert [text and text.rpartition(" ")[2] for text in told] == ["1.0", "2.0"]
