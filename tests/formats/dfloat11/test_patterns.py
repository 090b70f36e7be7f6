"""Patterns of module names match as regular expressions do, whatever they are made of, and in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.dfloat11_groups import PUBLISHED

from lowmem_bagel.formats.dfloat11.groups import OWN_PATTERNS
from lowmem_bagel.formats.dfloat11.patterns import MAX_LENGTH, matcher

NAMES = [
    "", "a", "ab", "aab", "b", "a.b", "a-b", "1", "12", "é", "language_model.lm_head", "language_modelXlm_head",
    "language_model.model.layers.3", "language_model.model.layers.17.mlp_moe_gen.up",
    "language_model.model.layers.3.self_attn.q_proj",
]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    [
        *PUBLISHED,
        *OWN_PATTERNS,
        r"^language_model\.lm_head$",
        r"language_model.lm_head",
        r".*\.(q|k|v)_proj",
        r"(?:a|ab)(?:b|)",
        r"[a-c.]+",
        r"[ab-]*",
        r"\w+\-?b?",
        r"(a(b)?)*",
        "",
        "|a",
        r"a\$?",
    ],
)
def test_as_a_regular_expression(pattern: str) -> None:
    matches = matcher(pattern)
    for name in NAMES:
        assert matches(name) == bool(re.fullmatch(pattern, name, re.ASCII)), name


ATOMS = st.sampled_from(["a", "b", r"\.", ".", r"\d", r"\w", "[ab]", "[0-5.]", "(a|b)", "(a|ab|)", "(a(b|1))"])
PIECES = st.lists(st.builds(str.__add__, ATOMS, st.sampled_from(["", "?", "*", "+"])), max_size=5).map("".join)
PATTERNS = st.lists(PIECES, max_size=2).map("|".join).filter(lambda text: text.count("*") + text.count("+") < 5)


@settings(max_examples=300)
@given(PATTERNS, st.text("ab.1", max_size=9))
def test_any_pattern_as_a_regular_expression(pattern: str, name: str) -> None:
    assert matcher(pattern)(name) == bool(re.fullmatch(pattern, name, re.ASCII))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "without its other half"),
        (")", "without its other half"),
        ("a)", "without its other half"),
        ("[", "without its other half"),
        ("[a", "without its other half"),
        ("a\\", "not understood"),
        ("*", "not understood"),
        ("a**", "repetition of a repetition"),
        ("a{3}", "{ is not understood"),
        ("(?=a)", "a kind that is not understood"),
        (r"(a)\1", "not understood"),
        ("[^a]", "not understood in a set"),
        ("a^b", "^ is not understood"),
        ("((((a))))", "too deep"),
        ("a*" * 5, "more than 4 repetitions"),
        ("(" * 5000, "longer than"),
    ],
)
def test_what_is_none(pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        matcher(pattern)


@pytest.mark.parametrize("pattern", ["(a*)*b", "(a|a)*b", "(a|aa)+b", ".*.*.*.*b", "(((.*)*)*)*b", "a?" * 70 + "b"])
def test_no_pattern_takes_long(pattern: str) -> None:
    """Python's own matcher does not return from most of these."""
    started = time.process_time()
    assert not matcher(pattern)("a" * MAX_LENGTH)
    assert time.process_time() - started < 0.5


def test_names_of_absurd_length_match_nothing() -> None:
    assert not matcher(".*")("a" * (MAX_LENGTH + 1))
