"""Every planted defect is named, and nothing else; what is fragile is named, and counts if that is asked for."""

import re

import pytest

from grpo_fast.conformance import check, identify
from grpo_fast.terms import Options

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
from planted import FRAGILE, PLANTED  # noqa: E402 - they need torch

DEFAULTS = Options()._asdict()
#: Those that are tried every time; all others take three minutes and are slow.
FAST = {
    "padded width",
    "mean of means",
    "detached self",
    "KL of the other direction",
    "KL without sampling term",
    "log-ratio ±10",
    "mean of masked advantages",
    "GSPO over the width",
    "max for min",
    "KL in the reward",
    "floor",
    "log π ≥ −10",
    "overlong",
    "random",
    "temperature",
    "without A = 0",
    "old shifted",
    "swapped",
    "GMPO of both sides",
}


def params(table):
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in table]


@pytest.mark.parametrize("name", params(PLANTED))
def test_a_planted_defect_is_named_and_nothing_else(name):
    loss, words, options = PLANTED[name]
    torch.manual_seed(0)  # for the one that is random
    report = identify(loss)
    assert not report.ok
    assert [finding.what for finding in report.differs if not re.search(words, finding.what)] == []
    assert report.differs, report
    if options is not None:
        assert DEFAULTS | report.options == DEFAULTS | options


@pytest.mark.parametrize("name", FRAGILE)
def test_what_is_fragile_is_named_and_counts_if_strict(name):
    loss, words = FRAGILE[name]
    report = identify(loss)
    assert report.ok
    assert any(re.search(words, finding.what) for finding in report.fragile), report
    assert not check(loss, strict=True, **report.options).ok
