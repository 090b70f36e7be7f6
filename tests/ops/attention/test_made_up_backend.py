"""An attention backend that another distribution adds: one file, one entry point, and it is tried, planned and used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.made_up import Distribution

from lowmem_bagel.pictures.saving import read_metadata

PLAIN = '''
from lowmem_bagel.ops.attention.base import AttentionBackend
from lowmem_bagel.ops.attention.spec import AttentionSpec, Cost

class ByHand(AttentionBackend):
    """The definition, one head at a time."""

    name = "by-hand"

    def _full(self, q, k, v):
        return self._run(q, k, v, None)

    def _causal(self, q, k, v, mask):
        return self._run(q, k, v, mask.visible(q.shape[1], k.shape[1], q.device))

    def _run(self, q, k, v, visible):
        import torch

        group, heads = q.shape[2] // k.shape[2], []
        for head in range(q.shape[2]):
            scores = q[:, :, head].float() @ k[:, :, head // group].float().mT / q.shape[3] ** 0.5
            if visible is not None:
                scores = scores.masked_fill(~visible, -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, :, head // group].float())
        return torch.stack(heads, 2).to(q.dtype)

def scratch(call):
    return 3 * 4 * call.tokens * call.keys

BY_HAND = AttentionSpec(
    "by-hand", "one head at a time", lambda request: ByHand(), order=-1, cost=Cost(scratch, 0.01)
)
WRONG = AttentionSpec("wrong", "half of it", lambda request: Half(), order=-2, cost=BY_HAND.cost)
FOR_CARDS = AttentionSpec(
    "for-cards", "of a card to come", lambda request: ByHand(), order=5, cost=BY_HAND.cost, capability=(11, 0)
)

class Half(ByHand):
    name = "wrong"

    def _run(self, q, k, v, visible):
        return super()._run(q, k, v, visible) / 2
'''
POINTS = {"attention": {"by-hand": "BY_HAND", "wrong": "WRONG", "for-cards": "FOR_CARDS"}}
DRAWING = ["generate", "a red circle", "--height", 64, "--width", 64, "--num-timesteps", 3, "--device", "cpu"]


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Distribution:
    return Distribution(tmp_path_factory.mktemp("made_up"), PLAIN, POINTS)


def test_a_picture_is_drawn_with_it_on_the_command_line(by_hand: Distribution) -> None:
    by_hand.command(*DRAWING, "--attention", "by-hand", "-o", "out.png")
    made = read_metadata(by_hand.folder / "out.png")
    assert made["attention"] == "by-hand"


RUN = """
import json
from pathlib import Path
from lowmem_bagel import BagelPipeline
from lowmem_bagel.demo_checkpoint import FOLDER
settings = dict(height=64, width=64, num_timesteps=3, seed=1)
found = {}
for name in ("by-hand", "auto", "sdpa"):
    pipe = BagelPipeline.from_pretrained(FOLDER, device="cpu", dtype="float32", attention=name)
    found[name] = [pipe.model.attention.name, pipe.generate("a red circle", **settings).latent.flatten().tolist()]
    reasons = pipe.model.plan.reasons
    if name == "auto":
        found["refused"] = reasons["attention wrong"]
    if name == "by-hand":
        found["vit"] = reasons["vit attention"]
try:
    BagelPipeline.from_pretrained(FOLDER, device="cpu", attention="for-cards")
except Exception as error:
    found["for cards"] = str(error)
print(json.dumps(found))
"""


def test_it_is_tried_like_ours_and_what_is_wrong_is_passed_over(by_hand: Distribution) -> None:
    found = json.loads(by_hand.python(RUN))
    assert (found["by-hand"][0], found["vit"]) == ("by-hand", "by-hand")
    assert found["auto"][0] == "by-hand", "the first in the order whose trial passes"
    assert found["refused"].startswith("wrong result (relative error 5.0e-01)")
    assert found["by-hand"][1] == pytest.approx(found["sdpa"][1], abs=1e-4)
    assert (
        found["for cards"] == "attention for-cards cannot run here (needs a CUDA GPU, not cpu); choose attention auto"
    )


def plan(by_hand: Distribution, capability: str, *options: str) -> dict:
    card = ["--vram", "24GB", "--compute-capability", capability, "--card", "RTX 4090", "--ram", "64GB"]
    asked = ["--shape", "bagel-7b", "--format", "int8", "--task", "generate", "--json", *card]
    return json.loads(by_hand.command("plan", *asked, *options))["plan"]


def test_the_plan_goes_by_what_it_declares(by_hand: Distribution) -> None:
    slow = plan(by_hand, "8.9", "--attention", "by-hand")
    fast = plan(by_hand, "8.9", "--attention", "cudnn")
    assert (slow["attention"], fast["attention"]) == ("by-hand", "cudnn")
    assert slow["prediction"]["seconds"] > 2 * fast["prediction"]["seconds"], "a hundredth of the card's rate"
    assert plan(by_hand, "12.0")["attention"] == "wrong", "no trial: nothing is tried on a card that is not here"


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    broken = Distribution(tmp_path, "raise ImportError('no kernels here')", {"attention": {"broken": "BROKEN"}})
    with pytest.raises(AssertionError) as refused:
        broken.command("plan", "--shape", "bagel-7b", "--ram", "64GB")
    (line,) = str(refused.value).splitlines()
    why = "cannot be imported (ImportError: no kernels here); mend or uninstall it"
    assert line.endswith(f"lowmem-bagel: made-up, which adds broken, {why}")


def test_it_can_be_switched_off_and_doctor_shows_it(by_hand: Distribution, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWMEM_BAGEL_DISABLE", "by-hand")
    found = json.loads(by_hand.command("doctor", "--json", "--no-measure"))["profile"]
    assert found["attention_refused"]["by-hand"] == "switched off by LOWMEM_BAGEL_DISABLE"
    assert "by-hand" not in found["attention"]
    assert found["attention_refused"]["wrong"].startswith("wrong result")
