"""What the planner expects of a row: asked before it is measured, and again of the plan that it was measured under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowmem_bagel.checkpoint.folder import ModelFolder
from lowmem_bagel.diagnostics.features import check_switched_off
from lowmem_bagel.errors import UserError
from lowmem_bagel.formats.registry import packages
from lowmem_bagel.hardware.profile import HardwareProfile, as_switched
from lowmem_bagel.planner.estimate import (
    PlanInputs,
    answer_workload,
    asked_of,
    drawing_workload,
    plan_from,
    predicted_seconds,
    this_machine,
)
from lowmem_bagel.planner.facts import ModelFacts
from lowmem_bagel.planner.load_options import options_from
from lowmem_bagel.settings import picture_settings, text_settings

from ..measuring import INSTRUCTION, PROMPT, QUESTION, load_settings
from ..rows import Row
from ..shapes import shape_named

if TYPE_CHECKING:
    from lowmem_bagel.planner.memory import Workload
    from lowmem_bagel.planner.plan import Plan
    from lowmem_bagel.settings import LoadOptions

    from ..measuring import Conditions

TEXTS = {"generate": PROMPT, "edit": INSTRUCTION, "ask": QUESTION}
BYTES_A_TOKEN = 4


@dataclass(frozen=True)
class Machine:
    """This machine for the device that rows are measured on."""

    profile: HardwareProfile

    @classmethod
    def probed(cls, device: str) -> Machine:
        """Raises SettingError where the device is not there, or a feature that is switched off is none."""
        check_switched_off()
        return cls(as_switched(this_machine(device)))

    def inputs(self, facts: ModelFacts, options: LoadOptions) -> PlanInputs:
        limits, request = asked_of(facts, options)
        return PlanInputs(facts, self.profile, limits, request)

    def expects(self, row: Row, conditions: Conditions) -> dict[str, Any]:
        """{"predicted": seconds and bytes, or None} of a row that can be, {"refused": why} of another."""
        try:
            facts, options = _facts(row, conditions), options_from(load_settings(row, conditions))
            inputs = self.inputs(facts, options)
            plan = plan_from(inputs, options)
        except UserError as refusal:
            return {"refused": str(refusal)}
        return {"predicted": prediction(plan, inputs, row, conditions, conditions.max_new_tokens)}


def prediction(
    plan: Plan, inputs: PlanInputs, row: Row, conditions: Conditions, tokens: int
) -> Mapping[str, float] | None:
    """Seconds of a whole picture, or of an answer of so many tokens, and the peak on the device in bytes.

    None where another package's code runs, whose speed the planner does not know.
    """
    if plan.prediction is None or row.backend in packages() or row.offload != "native":
        return None
    seconds = predicted_seconds(plan, inputs, _workload(inputs.facts, row, conditions, tokens))
    return {"seconds": sum(seconds.values()), "peak_bytes": plan.prediction.peak_bytes}


def _facts(row: Row, conditions: Conditions) -> ModelFacts:
    if Path(row.format).is_dir():
        return ModelFacts.of_folder(ModelFolder.open(row.format))
    return ModelFacts.of_config(shape_named(conditions.shape), row.format, conditions.shape)


def _workload(facts: ModelFacts, row: Row, conditions: Conditions, tokens: int) -> Workload:
    config, text_tokens = facts.config, -(-len(TEXTS[row.task]) // BYTES_A_TOKEN)
    shown = [] if row.task == "generate" else [(conditions.side(row),) * 2]
    if row.task == "ask":
        return answer_workload(config, text_settings({"max_new_tokens": max(tokens, 1)}), shown, text_tokens)
    given: dict[str, Any] = {"num_timesteps": conditions.num_timesteps, "step_cache": row.step_cache}
    given |= {"frames": row.frames, "frame_mode": row.frame_mode}
    if not shown:
        given |= dict.fromkeys(("height", "width"), conditions.side(row))
    longest = facts.latent_side * config.token_pixels
    settings = picture_settings(config, longest, bool(shown), given, lambda _: None)
    return drawing_workload(config, settings, shown, text_tokens)
