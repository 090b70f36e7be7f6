"""A weight format that another distribution adds: it is converted to, inspected, planned, verified and drawn with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.made_up import Distribution
from support.paths import CHECKPOINT

from lowmem_bagel.pictures.saving import read_metadata

INT16 = """
from lowmem_bagel.converters.engine.base import Encoded, component, in_decoder_linear, matrix_shape, refuse_options
from lowmem_bagel.formats.spec import FormatSpec, Part, Requires, Way

SPEC = FormatSpec(
    "int16", "INT16", lossless=False,
    parts=(Part("weight", "", "I16", lambda weight: weight), Part("scale", "_scale", "F32", lambda weight: weight[:1])),
    ways=(
        Way("never", "made_up:never", requires=Requires("cuda", features=("a card that nobody has",)), says="never"),
        Way("fails", "made_up:fails", says="each weight is made dense", weights="dequantized"),
        Way("dense", "made_up:dense", says="each weight is made dense", weights="dequantized"),
        Way("library", "made_up:never", "library", by_name=True, package=("made_up", "made-up")),
    ),
)

def dequantize(weight, scale, dtype):
    return (weight.float() * scale[:, None]).to(dtype)

def fails(site):
    from lowmem_bagel.formats.base import Refused

    raise Refused("its trial is made to fail")

def dense(site):
    from lowmem_bagel.formats.base import Dequantized, StoredLinears

    return StoredLinears(site, SPEC, Dequantized(dequantize), "int16 (made dense)")

class Converter:
    name, version, lossless, options = "int16", 1, False, {}

    def __init__(self, options):
        refuse_options(self.name, options)

    def encodes(self, spec):
        return in_decoder_linear(spec)

    def bytes_estimate(self, shape):
        return SPEC.nbytes(shape)

    def convert(self, unit):
        for tensor in unit:
            scale = tensor.data.float().abs().amax(1) / 32767
            weight = (tensor.data.float() / scale[:, None]).round().short()
            name = tensor.spec.name
            yield Encoded(tensor, "int16", {name: weight, f"{name}_scale": scale}, {"weight_rel_l2": 1e-4})

    @staticmethod
    def restore(record, stored):
        import torch

        shape = matrix_shape(record)
        weight = component(record, stored, "", shape, "int16")
        scale = component(record, stored, "_scale", shape[:1], "float32")
        return dequantize(weight, scale, torch.float32)

    def config_entries(self, specs):
        return {}
"""
DRAWING = ["generate", "a red circle", "--height", 64, "--width", 64, "--seed", 1, "--num-timesteps", 3]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    points = {"formats": {"int16": "SPEC"}, "converters": {"int16": "Converter"}}
    found = Distribution(tmp_path_factory.mktemp("made_up"), INT16, points)
    found.command("convert", CHECKPOINT, "variant", "--to", "int16")
    return found


def test_the_variant_is_inspected_verified_and_planned(made: Distribution) -> None:
    parts = json.loads(made.command("inspect", "variant", "--json"))["parts"]
    bits = {part["bits_per_weight"] for part in parts if part["encoding"] == "int16"}
    assert bits
    assert all(16 < found < 17 for found in bits)
    assert "have the source's bits" in made.command("verify", "variant", "--source", CHECKPOINT)
    planned = json.loads(made.command("plan", "--shape", "bagel-7b", "--format", "int16", "--ram", "64GB", "--json"))
    assert planned["plan"]["reasons"]["linears"] == "each weight is made dense"


RUN = """
import json
from lowmem_bagel import BagelPipeline
pipe = BagelPipeline.from_pretrained("variant", device="cpu", dtype="float32")
drawn = pipe.generate("a red circle", height=64, width=64, seed=1, num_timesteps=3)
drawn.save("python.png")
print(json.dumps(pipe.model.plan.reasons))
"""


def test_a_picture_is_drawn_with_it(made: Distribution) -> None:
    made.command(*DRAWING, "--model", "variant", "--device", "cpu", "--dtype", "float32", "-o", "out.png")
    found = read_metadata(made.folder / "out.png")
    assert found is not None
    assert found["format"] == "int16"
    reasons = json.loads(made.python(RUN))
    assert reasons["linears"] == "int16 (made dense)"
    assert reasons["int16 kernel fails"] == "its trial is made to fail"
    assert "needs a CUDA GPU" in reasons["int16 kernel never"]
    assert (made.folder / "python.png").read_bytes()[:8] == (made.folder / "out.png").read_bytes()[:8]


def test_a_backend_that_it_lacks_is_refused(made: Distribution) -> None:
    code = (
        "from lowmem_bagel import BagelPipeline, errors\n"
        "try:\n    BagelPipeline.from_pretrained('variant', backend='quanto')\n"
        "except errors.SettingError as error:\n    print(error)"
    )
    assert "backend 'quanto' cannot run int16; choose auto or one of native, library" in made.python(code)


def test_whatever_lists_formats_and_packages_has_its_own(made: Distribution) -> None:
    code = (
        "from lowmem_bagel.diagnostics.features import feature_names\n"
        "from lowmem_bagel.diagnostics.probe import probe\n"
        "print(*feature_names(), probe(measure=False).packages)"
    )
    named, _, found = made.python(code).partition("{")
    assert "library" in named.split()
    assert "'library': Availability(available=True, reason='1.0')" in found
    for command in ("convert", "plan"):
        assert "int16" in made.command(command, "--help")


def test_without_the_distribution_the_folder_is_refused_by_name(made: Distribution, tmp_path: Path) -> None:
    other = Distribution(tmp_path, "", {})
    code = (
        "from lowmem_bagel import BagelPipeline, errors\n"
        f"try:\n    BagelPipeline.from_pretrained({str(made.folder / 'variant')!r})\n"
        "except errors.CheckpointError as error:\n    print(error)"
    )
    assert "unknown format 'int16'" in other.python(code)
