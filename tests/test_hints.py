"""Errors that say what was meant: by keywords that do not exist, options of another kind, arrays of another shape."""

import inspect

import numpy as np
import pytest

import grpo_fast
from grpo_fast import K3, Clip, evaluate, files, group_advantages, grpo_loss, grpo_objective, grpo_stats, grpo_sweep

LOGPS = np.full((4, 3), -1.0)
FOUR = [[1.0]] * 4
CALLS = {
    grpo_loss: (LOGPS, None, [1.0] * 4),
    grpo_objective: FOUR,
    grpo_stats: FOUR,
    grpo_sweep: (*FOUR, 0.1, 0.1),
    group_advantages: ([[1.0, 0.0]],),
    evaluate: ("x.parquet",),
    files.sweep: ("x.parquet",),
}


def refused(error, message, call, *arguments, **options):
    with pytest.raises(error) as raised:
        call(*arguments, **options)
    assert message in str(raised.value)


# --- keywords ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_an_unknown_keyword_is_named_with_what_was_meant(call):
    grid = {"epsilons": 0.1, "betas": 0.1} if call is files.sweep else {}
    keywords = [p.name for p in inspect.signature(call).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert "unknown" not in inspect.signature(call).parameters
    for name in {name for name in keywords if len(name) > 3} - set(grid):
        typo = name[:-2] + name[-1] + name[-2] + "x"
        message = f"{call.__name__} has no argument {typo!r}: did you mean {name!r}?"
        refused(TypeError, message, call, *CALLS[call], **grid, **{typo: 1})
    with pytest.raises(TypeError, match=rf"^{call.__name__} has no argument 'zzz'$"):
        call(*CALLS[call], **grid, zzz=1)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("epsilon", "surrogate=Clip(epsilon=…)"),
        ("epsilon_high", "surrogate=Clip(epsilon_high=…)"),
        ("delta", "surrogate=Clip(delta=…)"),
        ("beta", "kl=K3(beta=…)"),
        ("importance_weighted", "kl=K3(beta, importance_weighted=…)"),
    ],
)
def test_an_argument_of_an_option_says_where_it_belongs(name, hint):
    refused(
        TypeError, f"grpo_loss has no argument {name!r}: it is a part of ", grpo_loss, *CALLS[grpo_loss], **{name: 1}
    )
    refused(TypeError, hint, grpo_loss, *CALLS[grpo_loss], **{name: 1})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "token_mean"}, "got 'token_mean': did you mean 'token-mean'?"),
        ({"aggregation": "Token-Mean"}, "did you mean 'token-mean'?"),
        ({"importance_sampling_level": "sequences"}, "did you mean 'sequence'?"),
        ({"aggregation": "zzz"}, "'seq-mean-token-sum', got 'zzz'"),
        ({"kl": 0.04}, "kl must be a K1, K2, K3 or None, got 0.04: did you mean K3(0.04)?"),
        ({"kl": K3}, "make one, such as K3(0.04)"),
        (
            {"surrogate": 0.2},
            "surrogate must be a Clip, CISPO, SAPO, Unclipped, VESPO or GMPO, got 0.2: did you mean Clip(0.2)?",
        ),
        ({"surrogate": Clip}, "make one, such as Clip()"),
        ({"surrogate": "clip"}, "got 'clip'"),
    ],
)
def test_an_option_of_another_kind_says_what_was_meant(options, message):
    refused((TypeError, ValueError), message, grpo_loss, *CALLS[grpo_loss], **options)


@pytest.mark.parametrize("name", ["surrogate", "kl"])
def test_a_bool_is_no_number_of_an_option(name):
    with pytest.raises(TypeError, match=r"got True$"):
        grpo_loss(*CALLS[grpo_loss], **{name: True})


def test_scale_says_it_too():
    refused(ValueError, "did you mean 'group'?", group_advantages, [[1.0]], scale="groups")


# --- arrays -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LOGPS, None, np.ones((2, 2))), {}, "got (2, 2): advantages.ravel() has one per sequence"),
        (
            (LOGPS, None, [1.0] * 4),
            {"rollout_is_weights": np.ones((2, 2))},
            "rollout_is_weights.ravel() has one per sequence",
        ),
        ((LOGPS[None], None, [1.0] * 4), {}, "got shape (1, 4, 3): logps.ravel() is (N,)"),
        (
            (LOGPS.ravel(), LOGPS, [1.0]),
            {},
            "old_logps must have shape (12,) as logps, got (4, 3): old_logps.ravel() has it",
        ),
        ((LOGPS, None, [1.0] * 4), {"cu_seqlens": [0, 12]}, "logps.ravel() is, and logps[mask] without padding"),
        ((LOGPS[:1], None, [1.0]), {"cu_seqlens": [0, 3]}, "logps[0] is"),
        ((LOGPS[0], None, [1.0]), {"cu_seqlens": [[0, 3]]}, "cu_seqlens.ravel() is"),
    ],
)
def test_dimensions_too_many_say_how_to_lose_them(arguments, options, message):
    refused(ValueError, message, grpo_loss, *arguments, **options)


def test_other_functions_say_it_too():
    refused(ValueError, "rewards.ravel() is 1-D", group_advantages, [[1.0, 0.0]], group_size=2)
    refused(ValueError, "epsilons.ravel() is one", grpo_sweep, *FOUR, [[0.1, 0.2]], 0.1)


@pytest.mark.parametrize("call", [grpo_objective, grpo_stats])
def test_no_samples_have_no_mean(call):
    refused(ValueError, "must hold at least one sample, got shape (0,): the mean of none is no number", call, *[[]] * 4)


def test_a_shape_that_no_ravel_mends_gets_no_such_hint():
    with pytest.raises(ValueError, match=r"one per sequence, got \(3, 5\)$"):
        grpo_loss(LOGPS, None, np.ones((3, 5)))
    with pytest.raises(ValueError, match=r"as logps, got \(2, 3\)$"):
        grpo_loss(LOGPS.ravel(), np.ones((2, 3)), [1.0])
    assert grpo_fast.grpo_loss is grpo_loss
