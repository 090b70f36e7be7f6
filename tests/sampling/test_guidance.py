"""Where guidance begins: at the edges of its scales and of its interval."""

from __future__ import annotations

import pytest

from lowmem_bagel.sampling.guidance import Guidance


def guidance(text: float = 4.0, image: float = 2.0, interval: tuple[float, float] = (0.4, 1.0)) -> Guidance:
    return Guidance(text, image, interval, "global", 0.0)


@pytest.mark.parametrize(
    ("text", "image", "wanted"), [(4.0, 1.0, False), (4.0, 1.0 + 1e-6, True), (1.0, 2.0, False), (4.0, 0.5, False)]
)
def test_the_branch_of_texts_alone_is_computed_only_where_it_counts(text: float, image: float, wanted: bool) -> None:
    """At scale 1 it would be multiplied by nothing, at the cost of a third of all evaluations."""
    assert guidance(text, image).uses_image_branch == wanted


@pytest.mark.parametrize(("text", "wanted"), [(1.0, False), (1.0 + 1e-6, True), (0.5, False)])
def test_guidance_by_text_is_on_above_one(text: float, wanted: bool) -> None:
    assert guidance(text).active(0.5) == wanted


@pytest.mark.parametrize(("t", "wanted"), [(0.4, False), (0.4001, True), (1.0, True), (1.0001, False)])
def test_the_interval_is_open_below_and_closed_above(t: float, wanted: bool) -> None:
    assert guidance().active(t) == wanted
