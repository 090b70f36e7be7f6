"""The rule by which a format and a step cache are chosen, and what it knows of losses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem_bagel.errors import DoesNotFitError
from lowmem_bagel.formats.registry import formats
from lowmem_bagel.hardware.gpu_specs import CARDS
from lowmem_bagel.hardware.profile import HardwareProfile
from lowmem_bagel.planner import choice as rule
from lowmem_bagel.planner.choice import BEYOND, Choice, Offer, Wanted, choose, compared, offers, preferred, stored_bytes
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.fidelity import LARGEST_ERROR, MOST_POINTS, Loss, losses, measured
from lowmem_bagel.planner.plan import Plan, Prediction
from lowmem_bagel.sampling.step_caches.registry import step_caches

SOURCE = ModelFacts.of_shape("source")
CONVERTED = ("bf16", "fp16", "dfloat11", "int8", "nf4", "gguf-q8_0", "gguf-q4_k")
BOUNDED, BEYOND_BOUNDS = Loss("some", 0.01, 0.0), Loss("more", 0.5, 0.0)


def card(name: str, vram: float | None = None, ram: float = 32) -> HardwareProfile:
    known = next(card for card in CARDS if card.name == name)
    return HardwareProfile.hypothetical(vram or known.memory_gb, known.capability, ram, 25, name=name)


def taking(seconds: float, *lost: Loss, peak: int = 1) -> Choice:
    plan = Plan("cuda", "bfloat16", "bfloat16", "bfloat16", prediction=Prediction(peak, 0, seconds))
    return Choice(Offer(SOURCE), "none", plan, losses=lost)


@pytest.mark.parametrize(
    ("choices", "best"),
    [
        ([taking(14), taking(10, BOUNDED)], 0),
        ([taking(16), taking(10, BOUNDED)], 1),
        ([taking(16), taking(10, BOUNDED), taking(7, BOUNDED, BOUNDED)], 1),
        ([taking(16), taking(10, BOUNDED), taking(6, BOUNDED, BOUNDED)], 2),
        ([taking(16), taking(14, BOUNDED), taking(10, BOUNDED, BOUNDED)], 2),
        ([taking(16), taking(5, BEYOND_BOUNDS)], 0),
        ([taking(16), taking(3, BEYOND_BOUNDS)], 1),
        ([taking(16, BEYOND_BOUNDS)], 0),
        ([taking(10, peak=9), taking(10.4, peak=5)], 1),
        ([taking(10, peak=9), taking(11, peak=5)], 0),
        ([taking(10, BOUNDED, peak=9), taking(10, replace(BOUNDED, error=0.02), peak=5)], 0),
    ],
)
def test_a_loss_must_bring_what_the_rule_says(choices: list[Choice], best: int) -> None:
    assert preferred(choices) is choices[best]
    assert preferred(choices[::-1]) is choices[best]


def test_bounds_of_losses() -> None:
    assert BOUNDED.bounded and not BEYOND_BOUNDS.bounded
    assert not Loss("unknown").bounded
    assert not Loss("few right", LARGEST_ERROR / 2, MOST_POINTS + 0.5).bounded
    assert Loss("judged alone", None, MOST_POINTS).bounded
    assert taking(1, BOUNDED, BEYOND_BOUNDS).level == BEYOND
    assert taking(1, BOUNDED).level == 1


def test_losses_of_formats_and_caches_are_known() -> None:
    known = formats()
    assert (
        losses(known["dfloat11"], "bfloat16", "flash", "none", "generate")
        == losses(known["source"], "float32", "flash", "none", "generate")
        == ()
    )
    assert (
        losses(known["fp16"], "float16", "flash", "none", "generate")
        == losses(known["dfloat11"], "float16", "flash", "none", "generate")
        == ()
    )
    (int8,) = losses(known["int8"], "bfloat16", "flash", "none", "generate")
    assert int8.bounded and int8.error and "int8" in int8.words
    assert not losses(known["nf4"], "bfloat16", "flash", "none", "generate")[0].bounded
    names = [loss.name for loss in losses(known["int8"], "bfloat16", "flash", "taylorseer", "generate")]
    assert names == ["int8", "taylorseer"]
    names = [loss.name for loss in losses(known["int8"], "bfloat16", "int8", "none", "generate")]
    assert names == ["int8", "attention int8"], "attention that rounds is a loss of its own"
    unknown = losses(replace(known["int8"], name="made-up"), "bfloat16", "flash", "none", "generate")[0]
    assert not unknown.bounded and unknown.words == "made-up not measured"
    for cache in measured()["step_caches"]:
        bounded = losses(known["source"], "bfloat16", "flash", cache, "generate")[0].bounded
        assert bounded == (cache != "velocity-late")  # which is for edits
    assert not losses(known["source"], "bfloat16", "flash", "velocity-early", "edit")[0].bounded  # it is for drawings
    assert losses(known["source"], "bfloat16", "flash", "velocity-late", "edit")[0].bounded


@pytest.mark.parametrize("card_of", CARDS, ids=lambda card: card.name)
@pytest.mark.parametrize("task", ["generate", "edit", "ask"])
def test_every_known_card_gets_a_choice(card_of, task) -> None:  # type: ignore[no-untyped-def]
    profile = card(card_of.name)
    ranked = choose(offers(SOURCE, CONVERTED, profile), profile, Wanted(task=task))
    best = ranked[0]
    assert best.plan is not None and 0 < best.peak <= profile.vram_total and best.seconds > 0
    assert best.ram < profile.ram_total and best.stored > 5e9
    assert best.level != BEYOND
    assert best.plan.dtype == ("bfloat16" if profile.native_bf16 else "float16")
    assert compared(best, best) == "recommended"
    assert all(compared(choice, best) != "recommended" for choice in ranked[1:])
    found = {(choice.facts.format, choice.step_cache) for choice in ranked}
    assert len(found) == len(ranked) == 6 * (1 if task == "ask" else len(step_caches()))


def test_what_is_offered() -> None:
    def names(profile: HardwareProfile, facts: ModelFacts = SOURCE) -> list[str]:
        return [offer.facts.format for offer in offers(facts, CONVERTED, profile, "there")]

    assert names(card("RTX 4090")) == ["source", "dfloat11", "int8", "nf4", "gguf-q8_0", "gguf-q4_k"]
    assert names(card("T4")) == ["dfloat11", "int8", "fp16", "nf4", "gguf-q8_0", "gguf-q4_k"]
    assert names(card("T4"), ModelFacts.of_shape("int8")) == ["int8"]
    assert [offer.converted for offer in offers(SOURCE, CONVERTED, card("RTX 4090"))][:2] == [False, True]


def test_lossless_alone() -> None:
    profile = card("RTX 3060")
    ranked = choose(offers(SOURCE, CONVERTED, profile), profile, Wanted(lossless=True))
    assert {choice.facts.format for choice in ranked} == {"source", "dfloat11"}
    assert all(choice.fidelity == "lossless" for choice in ranked)


def test_what_does_not_fit_says_what_it_needs() -> None:
    profile = card("RTX 4060", 4)
    ranked = choose(offers(SOURCE, CONVERTED, profile), profile, Wanted())
    assert ranked[0].facts.format == "int8"
    refused = [choice for choice in ranked if choice.plan is None]
    assert refused and ranked[-len(refused) :] == refused
    assert all("needs" in compared(choice, ranked[0]) and choice.seconds == float("inf") for choice in refused)


@pytest.mark.parametrize(
    ("profile", "wanted", "words"),
    [
        (card("RTX 4090", 2), Wanted(), "nothing fits on RTX 4090.*--device cpu.*minutes in"),
        (card("RTX 4090", 3, ram=8), Wanted(), r"pictures of 768x768 in GGUF Q4_K.*\(--size 768\)"),
        (card("RTX 4060", 4), Wanted(lossless=True), "nothing lossless fits.*leave --lossless out; or draw"),
        (HardwareProfile.hypothetical(0, None, 4, 0), Wanted(), "this processor .*use a machine with more memory"),
    ],
)
def test_where_nothing_fits_the_line_says_what_would(profile: HardwareProfile, wanted: Wanted, words: str) -> None:
    with pytest.raises(DoesNotFitError, match=words) as refused:
        choose(offers(SOURCE, CONVERTED, profile), profile, wanted)
    assert "\n" not in str(refused.value)


def test_why_a_choice_comes_after_the_best() -> None:
    best = taking(10)
    assert compared(taking(20), best) == "2.0 times slower"
    assert compared(taking(8, BOUNDED), best) == f"1.2 times faster: a loss must bring {rule.A_LOSS_BRINGS:g}"
    assert compared(taking(10, BOUNDED), best) == "as fast, and loses more"
    assert compared(taking(10, peak=2), best) == "as fast, and needs more memory"
    assert compared(taking(8, BEYOND_BOUNDS), best) == "a loss beyond bounds, or not measured"


def test_sizes_on_disk() -> None:
    """Of the published checkpoint: 29.21 GB of weights, and 0.34 of an autoencoder in float32."""
    assert stored_bytes(SOURCE) == pytest.approx(29.55e9, rel=0.002)
    for format in ("dfloat11", "int8", "nf4"):
        facts = ModelFacts.of_shape(format)
        assert stored_bytes(facts, "ask") < 0.7 * stored_bytes(facts) < 0.7 * stored_bytes(SOURCE)
