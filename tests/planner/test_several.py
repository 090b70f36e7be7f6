"""What is planned for several cards: who does what, by predicted seconds; and as a table, `data/planner_several.txt`.

After a change of the planner or its constants: `python tests/planner/test_several.py` writes the table anew, and its
rows on the page; read the difference line by line before committing it.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from support.paths import DATA, ROOT

from lowmem_bagel.cli.machine import known_machine
from lowmem_bagel.errors import CheckpointError, DeviceError, DoesNotFitError, SettingError
from lowmem_bagel.hardware.gpu_specs import called
from lowmem_bagel.hardware.profile import GIB, HardwareProfile
from lowmem_bagel.planner.calibration import MEASURED
from lowmem_bagel.planner.cards import PlanInputs
from lowmem_bagel.planner.devices import asked_devices, device_names
from lowmem_bagel.planner.estimate import on_devices, predicted_seconds, with_variants
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.memory import STAGEABLE
from lowmem_bagel.planner.plan import Plan
from lowmem_bagel.planner.several import make_plans, seconds_of_several
from lowmem_bagel.planner.solve import Limits, Overrides, Request, make_plan
from lowmem_bagel.settings import LoadOptions, Task

TABLE = DATA / "planner_several.txt"
PAGE = ROOT / "docs" / "several-gpus.md"
ROW = re.compile(r"    (\dx \d|\d+ \+ \d)")
CASE = 36
"""Characters of a row that say what it is of."""
MACHINES = (("4090", "4090"), ("4090", "4090", "4090"), ("3090", "3090"), ("3060", "3060"), ("4090", "3060"),
            ("3060", "4090"))  # fmt: skip
FORMATS = ("source", "dfloat11", "int8", "nf4")
MIXED = (
    ((("4090", "3060"), "dfloat11+int8"), "generate"), ((("4090", "3060"), "dfloat11+int8"), "edit"),
    ((("4090", "3060"), "dfloat11+nf4"), "edit"), ((("4090", "4080"), "source+int8"), "generate"),
    ((("4090", "4080"), "dfloat11+int8"), "edit"),
)  # fmt: skip
"""Cards that hold a format each."""
TASKS: tuple[Task, ...] = ("generate", "edit", "ask")
RAM = 64
HEAD = (
    "A picture from text, an edit and an answer of 128 tokens, 1024x1024, 50 timesteps, 7B shape, with 64 GB of RAM.",
    "`alone`: seconds with the first card; `here`: the branches of guidance or the layers that each card has, and how",
    "many units stream through it; `peak` in 1e9 bytes.",
    "",
    "cards          format        task     alone several share here",
)


def inputs(
    names: tuple[str, ...], form: str = "int8", tasks: tuple[Task, ...] = ("generate",), **limits: Any
) -> PlanInputs:
    """`form`: of all cards, or "first+second" of two that hold their own."""
    form, _, other = form.partition("+")
    machines = [known_machine(card, RAM) for name in names if (card := called(name)) is not None]
    first = PlanInputs(ModelFacts.of_shape(form), machines[0], Limits(**limits), Request(tasks=tasks))
    given = on_devices(first, [f"cuda:{index}" for index in range(len(names))], machines)
    return with_variants(given, ["", other], lambda of: (ModelFacts.of_shape(of), "the same shape")) if other else given


def changed(given: PlanInputs, card: int, **profile: Any) -> PlanInputs:
    """With another machine around a card."""
    others = [*given.others]
    others[card - 1] = others[card - 1]._replace(profile=replace(others[card - 1].profile, **profile))
    return given._replace(others=tuple(others))


def shown(cards: tuple[str, ...]) -> str:
    return f"{len(cards)}x {cards[0]}" if len(set(cards)) == 1 else " + ".join(cards)


def streamed(card: Plan) -> str:
    count = len(card.residency.streamed)
    stream = f" {count} stream" if count else ""
    return f"{stream}, peak {card.prediction.peak_bytes / 1e9:.1f}"


def line(cards: tuple[str, ...], form: str, task: Task) -> str:
    given = inputs(cards, form, (task,))
    plan, alone = make_plans(given), make_plan(*given[:4])
    each = []
    for number, card in enumerate((plan, *plan.others)):
        if card.layers is not None:
            each.append(f"{card.layers[1] - card.layers[0]} layers{streamed(card)}")
            continue
        own = ["full"] if number == 0 else []
        own += [name for name in ("text", "image") if plan.branches.get(name, 0) == number]
        own = own if task == "edit" else [name for name in own if name != "image"]
        each.append(f"{'+'.join(own)}{streamed(card)}")
    share = plan.prediction.seconds / alone.prediction.seconds
    seconds = f"{alone.prediction.seconds:5.0f} {plan.prediction.seconds:7.0f} {share:5.2f}"
    return f"{shown(cards):14} {form:13} {task:8} {seconds} {'; '.join(each) if plan.others else 'one card'}"


def table() -> str:
    cases = (case for case in product(MACHINES, FORMATS, TASKS) if case[2] != "ask" or case[1] in ("source", "int8"))
    mixed = (line(*cards_and_formats, task) for cards_and_formats, task in MIXED)
    return "\n".join([*HEAD, *(line(*case) for case in cases), *mixed]) + "\n"


def test_the_table_is_as_it_was_reviewed() -> None:
    assert table().splitlines() == TABLE.read_text().splitlines()


def test_the_table_of_the_docs_is_of_it() -> None:
    rows = [row for row in PAGE.read_text().splitlines() if ROW.match(row)]
    assert len(rows) >= len(MACHINES)
    assert {row.strip() for row in rows} <= {row.strip() for row in TABLE.read_text().splitlines()}


def test_two_cards_draw_in_little_more_than_half_the_time() -> None:
    plan, alone = make_plans(inputs(("H100", "H100"), "source")), make_plan(*inputs(("H100",), "source")[:4])
    assert plan.prediction.seconds < 0.62 * alone.prediction.seconds
    assert plan.branches == {"text": 1} and not plan.guidance_batch
    assert re.fullmatch(
        r"full on cuda:0 \(H100\); text on cuda:1 \(H100\): a guided step takes 0\.\d+ s, 0\.\d+ s on .* alone",
        plan.reasons["devices"],
    )


def test_an_edit_on_two_cards() -> None:
    """The cheap branch, of texts alone, goes with the one that lacks a text; the dear one is alone."""
    plan, alone = (make_plans(inputs(cards, "source", ("edit",))) for cards in (("H100", "H100"), ("H100",)))
    assert plan.prediction.seconds < 0.75 * alone.prediction.seconds
    assert plan.branches == {"text": 1, "image": 1}


def test_the_other_cards_hold_the_decoder_alone() -> None:
    plan = make_plans(inputs(("4090", "4090", "4090"), "int8", ("edit", "generate", "ask"), context_store="auto"))
    assert plan.branches == {"text": 1, "image": 2}
    assert plan.context_store is not None
    for other in plan.others:
        assert other.left_out == STAGEABLE and other.context_store is None and other.dtype == plan.dtype
        assert other.prediction.peak_bytes < plan.prediction.peak_bytes
        assert not other.residency.staged
    assert [other.device for other in plan.others] == ["cuda:1", "cuda:2"]


def test_launches_that_return_at_once_are_made_by_the_thread_of_the_request() -> None:
    """Weights that stream, and stand-ins on a processor, would keep it waiting."""
    (resident,) = make_plans(inputs(("4090", "4090"))).others
    assert resident.launcher == "request" and resident.reasons["launches"].startswith("by the request's thread")
    (streaming,) = make_plans(inputs(("4090", "4090"), "source")).others
    assert streaming.residency.streamed and streaming.launcher == "thread"
    assert "weights that stream are waited for" in streaming.reasons["launches"]


def test_a_card_that_has_nothing_to_do_is_left_out() -> None:
    plan = make_plans(inputs(("4090", "4090", "4090")))
    assert len(plan.others) == 1
    assert plan.reasons["cuda:2 (RTX 4090)"] == "not used: the others are done sooner without it"


def test_a_slow_card_gets_nothing_where_it_would_hold_up_the_other() -> None:
    plan = make_plans(inputs(("4090", "3060")))
    assert not plan.others and plan.guidance_batch
    assert "one card: a guided step" in plan.reasons["devices"] and "RTX 3060" in plan.reasons["devices"]


def test_a_slower_card_gets_the_cheapest_branch() -> None:
    """An edit on a 4080 beside two 4090s."""
    plan = make_plans(inputs(("4090", "4080", "4090"), "int8", ("edit",)))
    assert plan.branches == {"text": 2, "image": 1}


def test_a_faster_card_is_better_named_first() -> None:
    """Though most layers are on it already."""
    assert (
        make_plans(inputs(("3060", "4090"))).reasons["devices"].endswith("cuda:1 (RTX 4090) is faster: name it first")
    )


@pytest.mark.parametrize("memory", [{"vram_free": GIB}, {"vram_total": GIB, "vram_free": GIB}])
def test_a_busy_card_or_one_that_is_too_small_is_planned_around(memory: dict[str, int]) -> None:
    plan = make_plans(changed(inputs(("4090", "4090")), 1, **memory))
    assert not plan.others
    assert re.search(r"one card: cuda:1 .* needs .* of GPU memory, and 1.07 GB may be used", plan.reasons["devices"])
    three = make_plans(changed(inputs(("4090", "4090", "4090"), "int8", ("edit",)), 1, **memory))
    assert three.branches == {"text": 1, "image": 1} and three.others[0].device == "cuda:2"
    assert "needs" in three.reasons["cuda:1 (RTX 4090)"]


def test_a_thread_that_launches_for_all_cards_is_what_fast_ones_wait_for() -> None:
    """A picture of 256x256 takes a card less than launching it, and two take what launching both takes; unless graphs
    are replayed."""
    first = inputs(("H100", "H100"), overrides=Overrides(divide="guidance"))
    slow = replace(MEASURED, several_layer_seconds=4 * MEASURED.several_layer_seconds)
    both = 2 * 2 * 28 * MEASURED.several_layer_seconds
    for side, share in ((1024, 0.7), (256, 0.5)):
        given = first._replace(request=replace(first.request, height=side, width=side))
        plan = make_plans(given)
        (workload,) = given.request.workloads(given.facts.config)
        assert all("pictures by graph" in own.reasons for own in (plan, *plan.others))
        assert all(own.graph_tokens >= workload.picture_tokens for own in (plan, *plan.others))
        plain = replace(plan, graph_tokens=0, others=tuple(replace(other, graph_tokens=0) for other in plan.others))
        hosts = [sum(seconds_of_several(plain, given, workload, host).values()) for host in (MEASURED, slow)]
        assert 0.8 * both * workload.guided_steps < hosts[0] and hosts[1] > 2 * hosts[0]
        assert plan.prediction.seconds < share * hosts[0]
        assert plan.prediction.seconds == pytest.approx(make_plans(given, slow).prediction.seconds, rel=0.05)


DEAD = {"device": "cpu", "problems": ("CUDA: x", "a computation on the card: RuntimeError: CUDA error: device lost")}
"""What a probe finds of a card that is there and fails."""


def test_a_card_that_fails_when_it_is_tried_is_planned_around() -> None:
    said = "computes nothing right (RuntimeError: CUDA error: device lost)"
    two = make_plans(changed(inputs(("4090", "4090")), 1, **DEAD))
    assert not two.others and f"one card: cuda:1 (RTX 4090) {said}" in two.reasons["devices"]
    three = make_plans(changed(inputs(("4090", "4090", "4090"), "source"), 1, **DEAD))
    assert [other.device for other in three.others] == ["cuda:2"]
    assert three.reasons["cuda:1 (RTX 4090)"] == f"not used: {said}"
    with pytest.raises(DoesNotFitError, match=re.escape(f"divide guidance: cuda:1 (RTX 4090) {said}")):
        make_plans(changed(inputs(("4090", "4090"), overrides=Overrides(divide="guidance")), 1, **DEAD))


def test_a_first_card_that_fails_when_it_is_tried_is_named() -> None:
    given = inputs(("4090", "4090"))
    with pytest.raises(DeviceError, match=r"cuda:0 .*computes nothing right .*device lost\); name another card first"):
        make_plans(given._replace(profile=replace(given.profile, **DEAD)))


def test_a_card_with_little_memory_streams() -> None:
    plan = make_plans(changed(inputs(("4090", "4090"), "source"), 1, vram_free=8 * GIB))
    assert len(plan.others[0].residency.streamed) > 20
    assert plan.others[0].prediction.peak_bytes < 8 * GIB


def test_what_is_not_measured_is_said() -> None:
    alike, streaming = (
        make_plans(inputs(("4090", "4090"), form)).reasons["assumptions"] for form in ("int8", "source")
    )
    assert alike.startswith("cards lose 0.3 ms to each other at every exchange; RTX 4090 reaches")
    assert "weights stream to several cards at once as fast as to one" in streaming and "stream" not in alike


def test_cards_share_the_ram() -> None:
    given = inputs(("3060", "3060"), "source")
    small = on_devices(
        given, ["cuda:0", "cuda:1"], [replace(given.profile, ram_available=24 * GIB, pin_limit=12 * GIB)] * 2
    )
    plan = make_plans(small)
    facts = given.facts
    waiting = [
        unit
        for card in (plan, *plan.others)
        for unit in card.residency.streamed
        if card.residency.place(unit) != "disk"
    ]
    assert plan.others and sum(facts.units[unit].nbytes(2) for unit in waiting) < 0.9 * 24 * GIB


def test_answers_have_no_branches() -> None:
    plan = make_plans(inputs(("4090", "4090"), "int8", ("ask",)))
    assert not plan.others and plan.reasons["devices"].startswith("one card: ")
    assert "these tasks have no branches of guidance" in plan.reasons["devices"]


def test_limits_are_of_each_card() -> None:
    plan = make_plans(inputs(("4090", "4090"), "int8", max_vram=12 * 10**9))
    assert all(card.prediction.peak_bytes < 12 * 10**9 and card.max_vram == 12 * 10**9 for card in (plan, *plan.others))


def test_what_is_asked_for_is_done_though_it_does_not_pay() -> None:
    asked = Overrides(divide="guidance")
    assert make_plans(inputs(("4090", "3060"), overrides=asked)).branches == {"text": 1}
    with pytest.raises(DoesNotFitError, match=r"divide guidance: these tasks have no branches"):
        make_plans(inputs(("4090", "3060"), tasks=("ask",), overrides=asked))


def test_a_card_may_hold_a_format_of_its_own() -> None:
    """An edit on a 4090, with the checkpoint's bits, and a 3060, which holds 4 bits a weight of it."""
    given = inputs(("4090", "4080"), "dfloat11+int8", ("edit",))
    plan, alike = make_plans(given), make_plans(inputs(("4090", "4080"), "dfloat11", ("edit",)))
    (other,) = plan.others
    assert (other.variant, other.reasons["variant"]) == ("int8", "the same shape") and not plan.variant
    assert "int8" in other.reasons["linears"] and "int8" not in plan.reasons["linears"]
    assert other.dtype == plan.dtype and not other.residency.streamed
    assert plan.prediction.seconds < 0.9 * alike.prediction.seconds, "the smaller card need not stream"
    said = plan.reasons["variants"]
    assert said.startswith("cuda:1 (RTX 4080) holds int8, of bagel-7b") and "not those of one card" in said
    (workload,) = given.request.workloads(given.facts.config)
    assert sum(predicted_seconds(plan, given, workload).values()) == pytest.approx(plan.prediction.seconds)


def test_formats_that_are_both_lossless_give_what_one_card_gives() -> None:
    plan = make_plans(inputs(("4090", "4090"), "source+dfloat11", ("edit",)))
    assert plan.others[0].variant == "dfloat11" and "results are those of one card" in plan.reasons["variants"]


def test_layers_may_be_of_formats_of_their_own() -> None:
    plan = make_plans(inputs(("4090", "3060"), "source+int8", ("ask",), overrides=Overrides(divide="layers")))
    assert plan.divided and plan.others[0].variant == "int8" and "its layers are computed" in plan.reasons["variants"]


def test_one_format_is_not_worth_a_word() -> None:
    plan = make_plans(inputs(("4090", "4090")))
    assert not plan.others[0].variant and "variants" not in plan.reasons


def test_what_runs_the_first_ones_format_is_not_asked_of_another() -> None:
    given = inputs(("4090", "4090"), "int8+source", overrides=Overrides(backend="native"))
    assert [card.limits.overrides.backend for card in (given, *given.others)] == ["native", "auto"]


def test_a_variant_that_only_answers_is_refused() -> None:
    given = inputs(("4090", "4090"))
    und = {unit: stored for unit, stored in given.facts.units.items() if unit[1] == "und"}
    with pytest.raises(CheckpointError, match="x: lacks the gen expert; convert both experts"):
        with_variants(given, ["", "x"], lambda _: (replace(given.facts, units=und), ""))


def test_one_device_is_planned_as_ever() -> None:
    given = inputs(("4090",), "int8")
    assert make_plans(given) == make_plan(*given[:4])


@pytest.mark.parametrize(
    ("task", "divide"), [("generate", "guidance"), ("edit", "guidance"), *product(TASKS, ["layers"])]
)
def test_seconds_of_a_request_are_those_of_the_plan(task: Task, divide: str) -> None:
    given = inputs(("4090", "4090", "3060"), "source", (task,), overrides=Overrides(divide=divide))
    plan = make_plans(given)
    assert plan.others and plan.divided == (divide == "layers")
    (workload,) = given.request.workloads(given.facts.config)
    assert sum(predicted_seconds(plan, given, workload).values()) == pytest.approx(plan.prediction.seconds)


def test_layers_that_no_card_holds_are_divided() -> None:
    """Two cards limited to 16 GB: one would stream half of the weights at every step."""
    given = inputs(("H100", "H100"), "source", max_vram=16 * 10**9)
    plan = make_plans(given)
    assert plan.divided and not plan.branches
    assert plan.prediction.seconds < 0.8 * make_plan(*given[:4]).prediction.seconds
    assert re.match(r"\d+ of 28 layers on cuda:0 \(H100\); \d+ of 28 layers on cuda:1", plan.reasons["devices"])
    assert plan.prediction.peak_bytes < 16e9 and plan.others[0].prediction.peak_bytes < 16e9


def test_every_layer_has_its_card() -> None:
    plan = make_plans(
        inputs(("3060", "4060", "3060"), "source", ("ask", "generate"), overrides=Overrides(divide="layers"))
    )
    each = [plan, *plan.others]
    assert [card.layers[0] for card in each] == [0, *(card.layers[1] for card in each[:-1])]
    assert each[-1].layers[1] == 28
    for card in each:
        assert {layer for layer, _ in card.residency.streamed} <= set(range(*card.layers))
        assert {*card.residency.pageable, *card.residency.disk} <= {*card.residency.streamed}


def test_answers_that_no_card_holds_the_weights_for() -> None:
    given = inputs(("3060", "3060"), "source", ("ask",))
    plan = make_plans(given)
    assert plan.divided and not any(card.residency.streamed for card in (plan, *plan.others))
    assert plan.prediction.seconds < 0.6 * make_plan(*given[:4]).prediction.seconds


def test_a_faster_card_has_more_of_the_layers() -> None:
    plan = make_plans(inputs(("3060", "4090"), "source"))
    assert plan.divided and plan.others[0].layers[1] - plan.others[0].layers[0] > 20


def test_routed_experts_are_divided_with_their_layers() -> None:
    whole = ModelFacts.of_shape("int8", "bagel-moe-7b")
    given = inputs(("3060", "3060"), overrides=Overrides(divide="layers"))
    others = tuple(other._replace(facts=whole) for other in given.others)
    start, stop = make_plans(given._replace(facts=whole, others=others)).others[0].layers
    part, layers = whole.of_layers(range(start, stop)), range(start, stop)
    assert part.units == {(at - start, of): unit for (at, of), unit in whole.units.items() if at in layers}
    assert len(part.config.decoder.routed.layers) == len(whole.config.decoder.routed.layers & {*layers})


def test_contexts_are_not_kept_where_layers_are_divided() -> None:
    plan = make_plans(inputs(("4090", "4090"), overrides=Overrides(divide="layers"), context_store="auto"))
    assert plan.context_store is None and plan.reasons["context store"] == "off: layers are on several cards"


def test_a_plan_is_data() -> None:
    plan = make_plans(inputs(("4090", "4090")))
    assert plan.to_json()["others"][0]["device"] == "cuda:1"
    assert isinstance(plan, Plan)


class TestNames:
    @pytest.mark.parametrize(
        ("given", "names"),
        [
            ("0,1", ("cuda:0", "cuda:1")),
            (" cuda:2, 0", ("cuda:2", "cuda:0")),
            ("cpu,cpu,cpu", ("cpu",) * 3),
            ("1", ("cuda:1",)),
        ],
    )
    def test_names(self, given: str, names: tuple[str, ...]) -> None:
        assert device_names(LoadOptions(devices=given)) == names

    @pytest.mark.parametrize(
        ("given", "asked"),
        [
            ("0,1=/models/int8", [("cuda:0", ""), ("cuda:1", "/models/int8")]),
            ("0, cuda:2 = a=b, 1", [("cuda:0", ""), ("cuda:2", "a=b"), ("cuda:1", "")]),
            ("0,1=/of June, seven,2=x", [("cuda:0", ""), ("cuda:1", "/of June, seven"), ("cuda:2", "x")]),
            ("cpu,cpu=C:\\models", [("cpu", ""), ("cpu", "C:\\models")]),
            ("", [("auto", "")]),
        ],
    )
    def test_folders_of_their_own(self, given: str, asked: list[tuple[str, str]]) -> None:
        assert [tuple(device) for device in asked_devices(LoadOptions(devices=given))] == asked

    @pytest.mark.parametrize(("given", "said"), [("0=x,1", "the first one has the model"), ("0,1=", "say cuda:1=FOLD")])
    def test_a_folder_that_is_none(self, given: str, said: str) -> None:
        with pytest.raises(SettingError, match=said):
            asked_devices(LoadOptions(devices=given))

    def test_without_any_it_is_the_device(self) -> None:
        assert device_names(LoadOptions(device="cuda:1")) == ("cuda:1",)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"devices": "0,0"}, "cuda:0 twice"),
            ({"devices": "0,cuda:0"}, "cuda:0 twice"),
            ({"devices": "0,cpu"}, "not both"),
            ({"devices": "0,"}, "numbers of cards"),
            ({"devices": "cuda,cuda:1"}, "numbers of cards"),
            ({"devices": "0,-1"}, "numbers of cards"),
            ({"devices": ",".join(map(str, range(9)))}, "at most"),
            ({"devices": "0,1", "device": "cuda:0"}, "either device or devices"),
        ],
    )
    def test_a_name_that_is_none(self, given: dict[str, str], said: str) -> None:
        with pytest.raises(SettingError, match=said):
            device_names(LoadOptions(**given))

    def test_a_card_that_is_not_there(self, reference_checkpoint: Any) -> None:
        from lowmem_bagel import BagelPipeline

        with pytest.raises(SettingError, match="CUDA device"):
            BagelPipeline.from_pretrained(reference_checkpoint, devices="0,17")


def test_a_machine_of_processors_alone() -> None:
    """Stand-ins, which CI has; the planner takes them at their word."""
    machine = HardwareProfile.hypothetical(0, None, 256, 0)
    first = PlanInputs(ModelFacts.of_shape("int8"), machine, Limits(), Request(tasks=("generate",)))
    plan = make_plans(on_devices(first, ["cpu", "cpu"], [machine, machine]))
    assert [(other.device, other.launcher) for other in plan.others] == [("cpu", "thread")]


if __name__ == "__main__":
    TABLE.write_text(table())
    known = {row[:CASE]: f"    {row}" for row in table().splitlines()}
    page = [known[row.strip().ljust(CASE)[:CASE]] if ROW.match(row) else row for row in PAGE.read_text().splitlines()]
    PAGE.write_text("\n".join(page) + "\n")
