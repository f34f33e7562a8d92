"""What TRL's and Liger-Kernel's own losses compute, as the guide says."""

import pytest

from grpo_fast import CISPO, K3, SAPO, VESPO, Clip
from grpo_fast.conformance import identify

pytest.importorskip("torch", reason="PyTorch is not installed")
from others import liger_loss, trl_loss

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # theirs are not ours

CLIP = {"surrogate": Clip(0.2, 0.28)}
COMPUTED = {
    "grpo": CLIP | {"aggregation": "seq-mean-token-mean"},
    "bnpo": CLIP | {"aggregation": "token-mean"},
    "dapo": CLIP | {"aggregation": "token-mean"},
    "luspo": CLIP | {"aggregation": "seq-mean-token-sum"},
    "dr_grpo": CLIP | {"aggregation": "token-sum"},
    "cispo": {"surrogate": CISPO(0.28), "aggregation": "token-mean"},
    "sapo": {"surrogate": SAPO(1.0, 1.05), "aggregation": "seq-mean-token-mean"},
    "vespo": {"surrogate": VESPO(), "aggregation": "token-mean", "importance_sampling_level": "sequence"},
}


def options_of(report):
    """Its options, without the denominator of ``dr_grpo``, which is a function of the batch."""
    assert report.ok, report
    options = dict(report.options)
    if callable(options.get("normalizer")):
        assert options.pop("normalizer").factors == (("B", 1),)
    return options


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", COMPUTED)
def test_trl(name, level):
    pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 is not installed")
    expected = COMPUTED[name] | {"kl": K3(0.04, "sequence" if level == "sequence" else True)}
    if level == "sequence":
        expected |= {"importance_sampling_level": level}
    assert options_of(identify(trl_loss(name, importance_sampling_level=level))) == expected


def test_trl_without_the_ratio_in_its_kl_and_with_delta():
    pytest.importorskip("trl", minversion="1.16", reason="TRL 1.16 is not installed")
    found = options_of(identify(trl_loss("grpo", use_bias_correction_kl=False, delta=3.0)))
    assert (found["kl"], found["surrogate"]) == (K3(0.04, False), Clip(0.2, 0.28, 3.0))


@pytest.mark.parametrize("name", [name for name in COMPUTED if name != "luspo"])
def test_liger(name):
    pytest.importorskip("liger_kernel", reason="Liger-Kernel is not installed")
    assert options_of(identify(liger_loss(name))) == COMPUTED[name] | {"kl": K3(0.04, False)}


def test_ligers_luspo_counts_masked_tokens():
    pytest.importorskip("liger_kernel", reason="Liger-Kernel is not installed")
    assert any("mask is not applied" in finding.what for finding in identify(liger_loss("luspo")).differs)
