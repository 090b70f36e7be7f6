"""`--offload accelerate`, registered as an entry point of `lowmem_bagel.load_options`. No torch."""

from __future__ import annotations

from dataclasses import replace

from lowmem_bagel.planner.plan import Plan


class OffloadOption:
    """What moves weights that do not stay on the device."""

    name = "offload"
    help = "What moves weights that do not stay on the GPU, and between GPUs; accelerate is there to compare with"
    default = "native"
    choices = ("native", "accelerate")

    def apply(self, plan: Plan, value: str) -> Plan:
        why = "asked for; placed as for native streaming, whose time is not predicted for it"
        layers = f"lowmem_bagel.benchmarks.baselines.{value}:AccelerateLayers"
        relay = f"lowmem_bagel.benchmarks.baselines.{value}:AccelerateStretch" if plan.divided else plan.relay
        others = tuple(replace(other, offload=layers, prediction=None) for other in plan.others)
        reasons = plan.reasons | {"offload": why}
        return replace(plan, offload=layers, relay=relay, others=others, prediction=None, reasons=reasons)


OFFLOAD = OffloadOption()
