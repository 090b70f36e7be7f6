"""`--offload accelerate`, registered as an entry point of `lowmem_bagel.load_options`. No torch."""

from __future__ import annotations

from dataclasses import replace

from lowmem_bagel.planner.plan import Plan


class OffloadOption:
    """What moves weights that do not stay on the device."""

    name = "offload"
    help = "What moves weights that do not stay on the GPU; accelerate is there to compare with"
    default = "native"
    choices = ("native", "accelerate")

    def apply(self, plan: Plan, value: str) -> Plan:
        why = "asked for; placed as for native streaming, whose time is not predicted for it"
        layers = f"lowmem_bagel.benchmarks.baselines.{value}:AccelerateLayers"
        return replace(plan, offload=layers, prediction=None, reasons=plan.reasons | {"offload": why})


OFFLOAD = OffloadOption()
