"""What can be switched off, held to what asks whether it is."""

from __future__ import annotations

import ast

import pytest
from support.modules import MODULES

from lowmem_bagel.diagnostics.features import feature_names
from lowmem_bagel.ops.attention.registry import attention_backends


def asked() -> set[str]:
    """The names that `why_off` is asked about as they stand in the code."""
    calls = (node for path in MODULES.values() for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    return {
        argument.value
        for call in calls
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "why_off"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


def test_whatever_is_asked_about_can_be_switched_off() -> None:
    assert {"triton", "nvrtc", "pinning", "peer"} <= asked() <= set(feature_names())
    assert set(attention_backends()) <= set(feature_names())


def test_each_switch_is_there_once() -> None:
    assert len(feature_names()) == len(set(feature_names()))


@pytest.mark.parametrize("name", ["bf16", "triton", "cudnn", "quanto"])
def test_switches_by_name(name: str) -> None:
    assert name in feature_names()
