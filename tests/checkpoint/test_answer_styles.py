"""How families ask for pictures, as data."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.paths import CHECKPOINT

from lowmem_bagel.checkpoint.answer_styles import AUTO, BASE, STYLES, style_name
from lowmem_bagel.checkpoint.config import BagelConfig, ResizeRule
from lowmem_bagel.checkpoint.folder import ModelFolder


@pytest.mark.parametrize(
    ("style", "text", "whole", "asks"),
    [
        ("base", "see <image_start>", True, False),
        ("thinkmorph", "<think>so</think><image_start>", True, True),
        ("thinkmorph", "<think>so</think><image_start> and", False, True),
        ("thinkmorph", "<think>so</think><image_sta", False, False),
        ("thinkmorph", "<answer>4</answer>", True, False),
        ("unicot", "draw <image_start>", True, True),
        ("zebra-cot", "THOUGHT 0: a cube", True, True),
        ("zebra-cot", "THOUGHT 0: a cu", False, False),
        ("zebra-cot", "Final Answer: 4", True, False),
        ("twiff", "frame_1\n<image>", True, True),
        ("twiff", "<img>", True, True),
        ("twiff", "<ans>the <img></ans>", True, False),
        ("twiff", "it goes on", True, False),
    ],
)
def test_what_asks_for_a_picture(style: str, text: str, whole: bool, asks: bool) -> None:
    assert STYLES[style].asks(text, whole) is asks


@pytest.mark.parametrize(
    ("names", "style"),
    [
        (["ThinkMorph-7B"], "thinkmorph"),
        (["bagel-int8", "multimodal-reasoning-lab/Bagel-Zebra-CoT"], "zebra-cot"),
        (["TwiFF-7B"], "twiff"),
        (["UniCoT-7B-MoT"], "unicot"),
        (["BAGEL-7B-MoT"], BASE),
        ([], BASE),
    ],
)
def test_auto_goes_by_the_checkpoint_s_names(names: list[str], style: str) -> None:
    assert style_name(AUTO, names) == style
    assert style_name("twiff", names) == "twiff"


def test_a_family_s_rule_holds_where_the_folder_has_none_of_its_own() -> None:
    published = ModelFolder.open(CHECKPOINT).config
    published = replace(published, vit_resize=BagelConfig.vit_resize)
    assert STYLES["zebra-cot"].shown_by(published).vit_resize == ResizeRule(980, 512, 14)
    own = replace(published, vit_resize=ResizeRule(112, 28, 14))
    assert STYLES["zebra-cot"].shown_by(own) is own
    assert STYLES[BASE].shown_by(published) is published
