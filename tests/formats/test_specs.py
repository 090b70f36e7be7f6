"""Formats declare their parts and ways; what plans and loads must agree on them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.paths import CHECKPOINT

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.errors import SettingError
from lowmem_bagel.formats import linears
from lowmem_bagel.formats.base import DenseLinears, Refused, Site, StoredLinears
from lowmem_bagel.formats.dense.spec import DENSE_WAYS
from lowmem_bagel.formats.registry import check_backend, format_spec, formats
from lowmem_bagel.formats.spec import Environment, Way
from lowmem_bagel.hardware.profile import Availability, HardwareProfile
from lowmem_bagel.ops.linear import Dense
from lowmem_bagel.planner.compute import Overrides, environment, first_way
from lowmem_bagel.planner.facts import ModelFacts

CAPABILITIES = [(5, 2), (6, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
FEATURES = ["triton", "nvrtc", "groups of one weight"]
environments = st.builds(
    lambda device, dtype, capability, missing: Environment(
        device, dtype, capability if device == "cuda" else (0, 0), {name: f"no {name}" for name in missing}
    ),
    st.sampled_from(["cpu", "cuda"]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.sampled_from(CAPABILITIES),
    st.sets(st.sampled_from(FEATURES)),
)


@cache
def folder() -> ModelFolder:
    """Opened once for some hundred examples."""
    return ModelFolder.open(CHECKPOINT)


def site(backend: str) -> Site:
    return Site(
        folder(),
        torch.device("cpu"),
        torch.float32,
        backend,
        {},
        DenseLinears(torch.float32, Dense()),
    )


@settings(max_examples=300)
@given(here=environments, name=st.sampled_from([*formats()]), auto=st.booleans(), data=st.data())
def test_planner_and_loader_take_the_same_way(here: Environment, name: str, auto: bool, data: st.DataObject) -> None:
    """Where no trial fails. Where the planner finds none, the loader refuses too."""
    spec = format_spec(name)
    backend = "auto" if auto else data.draw(st.sampled_from(spec.backends))
    ways = tuple(spec.ways_by(backend))
    taken: list[Way] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears, "make", lambda way, site: taken.append(way) or StoredLinears.__new__(StoredLinears))
        try:
            planned, _ = first_way(ways, here, Overrides(backend=backend))
        except SettingError:
            with pytest.raises(SettingError):
                linears.first_way(ways, site(backend), here, name)
            return
        linears.first_way(ways, site(backend), here, name)
    assert taken == [planned]


@settings(max_examples=100)
@given(here=environments, name=st.sampled_from([*formats()]), failing=st.sets(st.integers(0, 8)))
def test_a_failed_trial_is_passed_over_and_said(here: Environment, name: str, failing: set[int]) -> None:
    ways = tuple(format_spec(name).ways_by("auto"))
    able = [way for way in ways if way.requires.unmet(here) is None]
    passing = [way for index, way in enumerate(able) if index not in failing]

    def make(way: Way, site: Site) -> StoredLinears:
        if way not in passing:
            raise Refused("made to fail")
        made.append(way)
        return StoredLinears.__new__(StoredLinears)

    made: list[Way] = []
    on = site("auto")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linears, "make", make)
        if not passing:
            with pytest.raises(SettingError, match="choose backend auto"):
                linears.first_way(ways, on, here, name)
            return
        linears.first_way(ways, on, here, name)
    assert made == passing[:1]
    before = ways[: ways.index(passing[0])]
    assert set(on.reasons) == {f"{name} kernel {way.name}" for way in before}
    assert all((on.reasons[f"{name} kernel {way.name}"] == "made to fail") == (way in able) for way in before)


@pytest.mark.parametrize("name", [*formats()])
def test_some_way_serves_every_machine(name: str) -> None:
    """The last resort needs nothing."""
    for device, dtype in (("cpu", "float32"), ("cpu", "float16"), ("cuda", "bfloat16"), ("cuda", "float16")):
        here = Environment(device, dtype, (5, 0) if device == "cuda" else (0, 0), dict.fromkeys(FEATURES, "missing"))
        first_way(tuple(format_spec(name).ways_by("auto")), here, Overrides())


def test_a_profile_and_its_device_are_one_environment() -> None:
    profile = HardwareProfile.hypothetical(24 << 30, (7, 5), 32 << 30, 12.0)
    profile = profile.__class__(**{**vars(profile), "packages": {"triton": Availability(False, "not installed")}})
    here = environment(ModelFacts.of_shape("int8"), profile, "cuda:1", "float16")
    assert here == Environment("cuda", "float16", (7, 5), {"triton": "not installed"})


@pytest.mark.parametrize("spec", formats().values(), ids=lambda spec: spec.name)
def test_declarations_are_whole(spec) -> None:
    names = [way.name for way in spec.ways]
    assert len(set(names)) == len(names)
    assert all(way.make and way.says for way in spec.ways)
    assert spec.backends[0] == "native"
    assert spec.encoded == bool(spec.parts or spec.bits)
    for way in (*spec.ways, *DENSE_WAYS):
        module, _, name = way.make.partition(":")
        assert callable(getattr(__import__(module, fromlist=[name]), name)), way.make
    check_backend(spec, "auto")
    with pytest.raises(SettingError, match="choose auto or one of"):
        check_backend(spec, "magic")
