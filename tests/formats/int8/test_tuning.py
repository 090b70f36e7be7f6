"""INT8's tiles measured on a card: which are chosen, what is kept, and that nothing fails without it."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import forkserver

from lowmem_bagel import BagelPipeline
from lowmem_bagel.checkpoint.config import BAGEL_7B
from lowmem_bagel.cli.doctor import finding_rows
from lowmem_bagel.diagnostics.trials import Findings
from lowmem_bagel.formats.int8 import tuning, ways
from lowmem_bagel.formats.int8.tiles import AMPERE, CANDIDATES, FEW_ROWS, HOPPER, Shape, Tile, Tiles
from lowmem_bagel.formats.int8.trial import MATMUL
from lowmem_bagel.formats.int8.tuning import compare, read, shapes_of, tuned_tiles, written
from lowmem_bagel.hardware import host
from lowmem_bagel.hardware.host import DriverCard
from lowmem_bagel.kernels.trial_inputs import SMALL, Sizes

SIZES = Sizes(BAGEL_7B.decoder, torch.bfloat16)
PLAIN = Tiles(28, bulk=False)
DOWN, WIDE = (3584, 18944), (37888, 3584)
KEY = {"card": "NVIDIA GeForce RTX 3060", "driver": "580.65.06"}


def seconds_of(shape: Shape, tile: Tile) -> float:
    """Made up, another tile the best at every shape, as only measuring tells."""
    return 1e-3 + (sum(shape) + CANDIDATES.index(tile) * 7919) % 97 * 1e-5


# --- what is chosen ---


def test_candidates_are_few_and_told_apart_by_name() -> None:
    assert len({tile.name for tile in CANDIDATES}) == len(CANDIDATES)
    for bulk in (False, True):
        assert 3 <= len(Tiles(28, bulk).candidates(3584)) <= 6
        assert {tile.bulk for tile in Tiles(28, bulk).candidates(3584)} == {bulk}
        assert {tile.bulk for tile in Tiles(28, bulk).candidates(100)} == {False}


@pytest.mark.parametrize("shape", shapes_of(SIZES))
def test_the_fastest_is_taken_where_it_was_measured(shape: Shape) -> None:
    timings = compare(shapes_of(SIZES), PLAIN, seconds_of, limit=math.inf)[0]
    timings[shape][PLAIN.choose(*shape)] = 1.0
    tiles = replace(PLAIN, measured=timings)
    assert tiles.choose(*shape) == min(timings[shape], key=lambda tile: timings[shape][tile])
    assert {PLAIN.choose(*s) for s in shapes_of(SIZES)} != {tiles.choose(*s) for s in shapes_of(SIZES)}


def test_the_nearest_measured_number_of_tokens_serves_the_others() -> None:
    small, large = AMPERE[2], AMPERE[1]
    measured = {
        Shape(300, *WIDE): {small: 1.0, large: 9.0},
        Shape(4096, *WIDE): {small: 9.0, large: 1.0},
        Shape(8192, *WIDE): {},
    }
    tiles = replace(PLAIN, measured=measured)
    assert [tiles.choose(m, *WIDE) for m in (65, 300, 1000, 1200, 4096, 4098, 4902, 8192)] == [small] * 3 + [large] * 5


def test_the_estimated_tile_stays_where_another_is_faster_by_noise_only() -> None:
    estimated, other = PLAIN.choose(4096, *WIDE), AMPERE[2]
    for share, wanted in ((0.99, estimated), (0.97, other)):
        assert (
            replace(PLAIN, measured={Shape(4096, *WIDE): {estimated: 1.0, other: share}}).choose(4096, *WIDE) == wanted
        )


def test_waves_count_between_measured_shapes() -> None:
    """2 tiles of 128 rows on 2 multiprocessors are one wave, 3 are two; of 64 rows 3 and 5 are two and three."""
    large, small = AMPERE[1], AMPERE[2]
    tiles = Tiles(2, False, {Shape(256, 128, 64): {large: 1.0, small: 1.1}})
    assert tiles.choose(256, 128, 64) == large
    assert tiles.choose(257, 128, 64) == small


def test_without_measurements_of_a_weight_estimates_serve() -> None:
    tiles = replace(PLAIN, measured={Shape(4096, *DOWN): {AMPERE[2]: 1.0}, Shape(4096, *WIDE): {}})
    assert tiles.choose(4096, *DOWN) == AMPERE[2]
    assert tiles.choose(4096, *WIDE) == PLAIN.choose(4096, *WIDE)
    assert [tiles.choose(m, *DOWN) for m in (2, 32, 64)] == list(FEW_ROWS)
    assert {Tiles(132, bulk).choose(m, *DOWN) for bulk in (False, True) for m in range(65, 9000, 37)} <= {
        *AMPERE, *HOPPER
    }  # fmt: skip


# --- what is measured ---


def test_every_candidate_is_measured_at_every_shape_the_longest_first() -> None:
    found, failed = compare(shapes_of(SIZES), PLAIN, seconds_of, limit=math.inf)
    assert failed == {}
    work = [math.prod(shape) for shape in found]
    assert work == sorted(work, reverse=True)
    assert set(found) == {Shape(m, n, k) for n, k, _ in SIZES.linears for m in (300, 4096, 8192)}
    assert all(list(timed) == list(PLAIN.candidates(shape.k)) for shape, timed in found.items())


def test_a_tile_that_fails_is_no_candidate() -> None:
    def seconds(shape: Shape, tile: Tile) -> float:
        if tile == AMPERE[0]:
            raise RuntimeError("out of resource: shared memory")
        return seconds_of(shape, tile)

    found, failed = compare(shapes_of(SIZES), PLAIN, seconds, limit=math.inf)
    assert failed == {AMPERE[0]: "out of resource: shared memory"}
    tiles = replace(PLAIN, measured=found)
    assert all(len(timed) == len(PLAIN.candidates(shape.k)) - 1 for shape, timed in found.items())
    assert AMPERE[0] not in {tiles.choose(*shape) for shape in found}


def test_it_ends_when_its_time_is_over_and_keeps_no_half_comparison() -> None:
    shapes, now = shapes_of(SIZES), 100.0

    def seconds(shape: Shape, tile: Tile) -> float:
        nonlocal now
        now += 1.0
        return seconds_of(shape, tile)

    per_shape = len(PLAIN.candidates(3584))
    found, _ = compare(shapes, PLAIN, seconds, lambda: now, limit=2 * per_shape + 1.5)
    assert now - 100 == 2 * per_shape + 2
    assert list(found) == shapes
    assert [bool(timed) for timed in found.values()] == [True, True] + [False] * (len(shapes) - 2)


def test_a_shape_without_memory_is_left_for_another_time() -> None:
    def seconds(shape: Shape, tile: Tile) -> float:
        if shape == Shape(8192, *WIDE):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return seconds_of(shape, tile)

    assert set(shapes_of(SIZES)) - set(compare(shapes_of(SIZES), PLAIN, seconds, limit=math.inf)[0]) == {
        Shape(8192, *WIDE)
    }  # fmt: skip


# --- what is kept ---


def test_what_is_written_is_read_again() -> None:
    timings = compare(shapes_of(SIZES), PLAIN, seconds_of, limit=math.inf)[0] | {Shape(1, 2, 3): {}}
    assert read(json.loads(json.dumps(written(KEY, timings))), KEY) == timings


@pytest.mark.parametrize(
    "spoil",
    [
        lambda value: None,
        lambda value: [value],
        lambda value: value["seconds"],
        lambda value: value | {"for": KEY | {"driver": "590.1"}},
        lambda value: value | {"seconds": [1]},
        lambda value: value | {"seconds": {"4096x2": {}}},
        lambda value: value | {"seconds": {"4096x2xk": {}}},
        lambda value: value | {"seconds": {"4096x2x0": {}}},
        lambda value: value | {"seconds": {"4096x2x3": {"a tile of another version": 1.0}}},
        lambda value: value | {"seconds": {"4096x2x3": [1.0]}},
        lambda value: value | {"seconds": {"4096x2x3": {AMPERE[0].name: "soon"}}},
        lambda value: value | {"seconds": {"4096x2x3": {AMPERE[0].name: None}}},
        lambda value: value | {"seconds": {"4096x2x3": {AMPERE[0].name: 0.0}}},
        lambda value: value | {"seconds": {"4096x2x3": {AMPERE[0].name: math.nan}}},
        lambda value: value | {"seconds": {"4096x2x3": {AMPERE[0].name: math.inf}}},
    ],
)
def test_a_damaged_or_foreign_file_holds_nothing(spoil: Callable[[Any], Any]) -> None:
    timings = {Shape(4096, *WIDE): {AMPERE[0]: 1.0}}
    assert read(written(KEY, timings), KEY) == timings
    assert read(spoil(written(KEY, timings)), KEY) == {}


def test_the_driver_is_told_by_linux_or_else_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "version").write_text("580.65.06\n")
    assert host.driver_version(tmp_path / "version") == "580.65.06"
    monkeypatch.setattr(host, "driver_cards", lambda: [DriverCard("NVIDIA GeForce RTX 4090", (8, 9), "580.10", 0)])
    assert host.driver_version(tmp_path / "missing") == "580.10"
    monkeypatch.setattr(host, "driver_cards", list)
    assert host.driver_version(tmp_path / "missing") == "unknown"

    def fails() -> list[DriverCard]:
        raise OSError("nvidia-smi does not answer")

    monkeypatch.setattr(host, "driver_cards", fails)
    assert host.driver_version(tmp_path / "missing") == "unknown"


# --- all of it, on a card that is made up ---


class MadeUpCard:
    """Stands for a card: counts what is measured on it."""

    device = torch.device("cuda", 0)

    def __init__(self, cache: Path) -> None:
        self.cache, self.measured, self.driver, self.fails = cache, list[Shape](), "580.65.06", False

    def __call__(self, device: torch.device, dtype: torch.dtype, tiles: Tiles) -> MadeUpSeconds:
        assert (device, tiles.measured) == (self.device, {})
        return MadeUpSeconds(self)

    @property
    def files(self) -> list[Path]:
        return sorted(self.cache.rglob("*")) if self.cache.is_dir() else []

    def load(self, sizes: Sizes = SIZES, tune: bool = True) -> tuple[Tiles, str, int]:
        """The tiles, the reason, and how many shapes were measured for it."""
        before = len(self.measured)
        tiles, why = tuned_tiles(self.device, sizes, tune)
        return tiles, why, len(dict.fromkeys(self.measured[before:]))


class MadeUpSeconds:
    def __init__(self, card: MadeUpCard) -> None:
        self.card = card

    def compile(self, shapes: list[Shape]) -> None:
        assert shapes

    def __call__(self, shape: Shape, tile: Tile) -> float:
        self.card.measured.append(shape)
        if self.card.fails:
            raise RuntimeError("no kernel image is available")
        return seconds_of(shape, tile)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MadeUpCard:
    made_up = MadeUpCard(tmp_path / "cache" / "lowmem-bagel")
    properties = SimpleNamespace(name="NVIDIA GeForce RTX 3060", multi_processor_count=28)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(tuning, "CardSeconds", made_up)
    monkeypatch.setattr(tuning, "on", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(tuning, "driver_version", lambda: made_up.driver)
    return made_up


def test_a_card_is_measured_once(card: MadeUpCard) -> None:
    tiles, why, measured = card.load()
    assert measured == len(shapes_of(SIZES)) == len(tiles.measured)
    assert why.startswith("measured on this card in ")
    (file,) = card.files
    for part in ("NVIDIA-GeForce-RTX-3060", "28", "580.65.06"):
        assert part in file.name
    assert card.load() == (tiles, "measured on this card before", 0)


@pytest.mark.parametrize(
    "spoil", [Path.unlink, lambda file: file.write_text("{"), lambda file: file.write_bytes(b"\xff")]
)
def test_a_file_that_is_gone_or_damaged_is_made_anew(card: MadeUpCard, spoil: Callable[[Path], Any]) -> None:
    tiles, _, measured = card.load()
    spoil(card.files[0])
    again, why, once_more = card.load()
    assert (again, once_more) == (tiles, measured)
    assert why.startswith("measured on this card in ")
    assert card.load()[2] == 0


def test_another_driver_is_another_file(card: MadeUpCard) -> None:
    card.load()
    card.driver = "590.1"
    assert card.load()[2] == len(shapes_of(SIZES))
    assert len(card.files) == 2
    card.driver = "580.65.06"
    assert card.load()[2] == 0


def test_a_file_of_another_card_under_this_ones_name_is_not_believed(card: MadeUpCard) -> None:
    card.load()
    value = json.loads(card.files[0].read_text())
    card.files[0].write_text(json.dumps(value | {"for": value["for"] | {"card": "NVIDIA GeForce RTX 4090"}}))
    assert card.load()[2] == len(shapes_of(SIZES))


def test_of_another_model_only_what_is_missing_is_measured(card: MadeUpCard) -> None:
    card.load()
    other = Sizes(SMALL, torch.bfloat16)
    assert card.load(other)[2] == len(shapes_of(other))
    tiles, _, measured = card.load()
    assert measured == 0
    assert set(shapes_of(SIZES)) | set(shapes_of(other)) == set(tiles.measured)


def test_what_cannot_be_measured_is_not_tried_at_every_load(card: MadeUpCard) -> None:
    card.fails = True
    tiles, why, measured = card.load()
    assert measured
    assert f"; {PLAIN.candidates(3584)[0].name} fails: no kernel image is available" in why
    assert tiles.choose(4096, *WIDE) == PLAIN.choose(4096, *WIDE)
    assert card.load()[2] == 0


def test_what_finds_no_memory_to_compile_for_is_left_to_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = tuning.CardSeconds(torch.device("cpu"), torch.bfloat16, PLAIN)
    held: list[Shape] = []

    def hold(shape: Shape) -> None:
        held.append(shape)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(seconds, "_hold", hold)
    seconds.compile(shapes_of(SIZES))
    assert {shape.k for shape in held} == {shape.k for shape in shapes_of(SIZES)}


def test_estimates_are_taken_where_they_are_asked_for(card: MadeUpCard) -> None:
    assert card.load(tune=False) == (PLAIN, "estimated, as asked for", 0)
    card.load()
    assert card.load(tune=False) == (PLAIN, "estimated, as asked for", 0)


def test_a_folder_that_cannot_be_written_leaves_estimates_and_costs_no_time(card: MadeUpCard) -> None:
    card.cache.parent.write_text("not a folder")
    tiles, why, measured = card.load()
    assert (tiles, measured) == (PLAIN, 0)
    assert why.startswith("estimated: what is measured cannot be kept (")


def test_a_user_without_a_home(card: MadeUpCard, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    tiles, why, measured = card.load()
    assert (tiles, measured) == (PLAIN, 0)
    assert "Could not determine home directory" in why


def test_no_card_is_asked_for_on_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: pytest.fail("there is no card"))
    cpu = torch.device("cpu")
    assert tuned_tiles(cpu, SIZES, True) == (Tiles.of(cpu), "estimated: there is no card")
    assert tuning.tiles_report(cpu) == {}


def keep_one(folder: str, shape: Shape) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", folder)
        for _ in range(20):
            tuning.keep_timings(FULL_KEY, {shape: {AMPERE[0]: 1.0}})


FULL_KEY = dict.fromkeys(("card", "multiprocessors", "driver", "triton", "version"), "1")


def test_two_processes_at_once(card: MadeUpCard) -> None:
    shapes, context = [Shape(300, 8, 16), Shape(4096, 8, 16)], forkserver.context()
    folder = str(card.cache.parent)
    processes = [context.Process(target=keep_one, args=(folder, shape)) for shape in shapes]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(card.files) == 1, "a part of a file is left"
    assert set(tuning.kept_timings(FULL_KEY)) & set(shapes), "the file is damaged"


def test_doctor_shows_the_tiles(card: MadeUpCard) -> None:
    assert tuning.tiles_report(card.device) == {}
    tiles, _, _ = card.load()
    found = tuning.tiles_report(card.device)
    assert list(found) == ["300 tokens", "4096 tokens", "8192 tokens"]
    shape = Shape(4096, *WIDE)
    tile = tiles.choose(*shape)
    line = f"37888x3584 by {tile.name} in {tiles.measured[shape][tile] * 1e3:.3g} ms"
    assert line in found["4096 tokens"].split("; ")
    assert dict(finding_rows(Findings(tuned={"int8": found})))["int8, 4096 tokens"] == found["4096 tokens"]


def test_the_option_reaches_the_plan(reference_checkpoint: Path) -> None:
    for tune in (True, False):
        assert BagelPipeline.from_pretrained(reference_checkpoint, device="cpu", tune=tune).model.plan.tune == tune


@pytest.mark.parametrize("tune", [True, False])
def test_a_model_that_is_loaded_uses_them(card: MadeUpCard, monkeypatch: pytest.MonkeyPatch, tune: bool) -> None:
    tried: list[object] = []
    site: Any = SimpleNamespace(
        device=card.device, sizes=SIZES, tune=tune, reasons={}, require=lambda *kernels: tried.extend(kernels),
        runs_groups=lambda *kernels: tune, source=None,
    )  # fmt: skip
    monkeypatch.setattr(ways, "why_not_pairs", lambda source: None if tune else "its trial failed")
    monkeypatch.setattr(ways, "Int8Linears", lambda site, product, name: product)
    product: Any = ways.triton(site)
    assert tried == ["fused", MATMUL]
    assert product.groups == tune
    assert (product.pairs is not None) == tune
    assert site.reasons["int8 many tokens"] == ("by pairs of blocks" if tune else "by Triton's tiles: its trial failed")
    assert product.tiles == tuned_tiles(card.device, SIZES, tune)[0]
    assert site.reasons["int8 tiles"].startswith("measured on this card in" if tune else "estimated, as asked for")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_real_card_is_measured_in_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cuda", 0)
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("needs int8 tensor cores")
    tiles, why = tuned_tiles(device, SIZES, True)
    took = re.fullmatch(r"measured on this card in ([\d.]+) s", why)
    assert took and float(took[1]) < tuning.SECONDS + 1, why
    finished = [shape for shape, seconds in tiles.measured.items() if seconds]
    assert len(finished) >= len(shapes_of(SIZES)) // 2, why
    assert tuned_tiles(device, SIZES, True) == (tiles, "measured on this card before")
    assert len(tuning.tiles_report(device)) == 3
