"""Helpers that benchmarks/planted.py found to be tested from afar only, if at all."""

import pytest

from project.runs.compare import _close
from project.runs.receipt import _same_lines
from project.runs.secrets import _Hider


@pytest.mark.parametrize(
    ("here", "there", "same"),
    [
        (["a", "b"], ["a", "b "], True),
        (["a"], ["a", "b"], False),
        (["a", "b"], ["a"], False),
        (["from project.core import a"], ["from .core import a"], True),
        (["a"], ["b"], False),
    ],
)
def test_a_line_more_or_less_is_another_module(here, there, same):
    assert _same_lines(here, there) is same


@pytest.mark.parametrize(("a", "b", "same"), [(1, 1.05, True), (1, 1.2, False), ("1", 1, False), (1, None, False)])
def test_only_numbers_have_a_tolerance(a, b, same):
    assert _close(a, b, 0.1) is same


@pytest.mark.parametrize("value", ["0123456789abcdef", "0123456789abcdefghijklmnop"])
def test_a_long_value_that_a_traceback_cuts_off_is_hidden(value):
    said = _Hider([value])(f"key='{value[:12]}...")
    assert value[:8] not in said
