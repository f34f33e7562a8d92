"""Where a batch ends: nothing is in it, or as much as makes one shape two things. The rule is the reference's, too."""

import numpy as np
import pytest
from samples import DTYPES

from grpo_fast import CISPO, K3, SAPO, Clip, group_advantages, grpo_loss, reference
from grpo_fast._kernels import sequence_level, token_level

LOSSES = pytest.mark.parametrize("loss", [grpo_loss, reference.grpo_loss], ids=["fast", "reference"])
LEVELS = pytest.mark.parametrize("level", ["token", "sequence"])
AGGREGATIONS = ["token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"]


# --- nothing ----------------------------------------------------------------------------------------------------------
EMPTY = {
    "(2, 0)": ((2, 0), [1.0, 1.0], None, 2),
    "(0, 5)": ((0, 5), [], None, 0),
    "(0, 0)": ((0, 0), [], None, 0),
    "(0,)": ((0,), [1.0], None, 1),
    "two packed": ((0,), [1.0, -1.0], [0, 0, 0], 2),
    "none packed": ((0,), [], [0], 0),
    "all masked": ((2, 3), [1.0, 1.0], None, 2),
}


@LOSSES
@LEVELS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", EMPTY)
def test_a_batch_without_a_token_has_loss_0(case, dtype, level, loss):
    shape, advantages, cu_seqlens, sequences = EMPTY[case]
    logps = np.full(shape, np.nan, dtype)
    options = {"kl": K3(0.1), "importance_sampling_level": level, "cu_seqlens": cu_seqlens, "grad": True}
    options["mask"] = np.zeros(shape, bool)
    for aggregation in AGGREGATIONS:
        result = loss(logps, logps, advantages, logps, aggregation=aggregation, **options)
        assert result.loss == 0
        assert (result.grad.shape, result.grad.dtype, result.grad.any()) == (shape, dtype, False)
        stats = result.stats if isinstance(result.stats, dict) else result.stats.as_dict()
        assert (stats["tokens"], stats["sequences"], stats["objective"]) == (0, sequences, 0)
        assert np.isnan(stats["kl"])  # of nothing


@LEVELS
@pytest.mark.parametrize("surrogate", [Clip(), CISPO(), SAPO()])
def test_an_empty_part_adds_only_its_sequences(surrogate, level):
    logps = np.log([[0.5, 0.4], [0.1, 0.9]])
    options = {"surrogate": surrogate, "importance_sampling_level": level, "aggregation": "token-sum"}
    whole = grpo_loss(logps, logps - 0.1, [1.0, -1.0], **options).stats
    empty = grpo_loss(np.zeros((2, 0)), None, [1.0, 1.0], **options).stats
    for total in (whole + empty, empty + whole, sum([empty, whole])):
        assert total.loss == whole.loss
        assert total.as_dict() | {"sequences": 2} == whole.as_dict()


def test_no_rewards_have_no_advantages():
    for scale in ("group", "batch", "none"):
        for shape, groups in (((0, 4), {}), ((2, 0), {}), (0, {"group_size": 4}), (0, {"group_ids": []})):
            found = group_advantages(np.zeros(shape, "f4"), scale=scale, **groups)
            assert (found.shape, found.dtype) == (np.zeros(shape).shape, np.float32)


# --- a normalizer of nothing ------------------------------------------------------------------------------------------
@LOSSES
@LEVELS
def test_a_normalizer_of_0_is_right_where_no_token_counts(level, loss):
    mask = np.zeros((2, 3))
    for aggregation in AGGREGATIONS:
        options = {"aggregation": aggregation, "importance_sampling_level": level, "mask": mask, "grad": True}
        result = loss(np.zeros((2, 3)), None, [1.0, 2.0], normalizer=mask.sum(), **options)
        assert (result.loss, result.grad.any()) == (0, False)


@LOSSES
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_elsewhere_it_is_refused(aggregation, grad, loss):
    for mask in (None, [[1, 0, 0], [0, 0, 0]]):
        with pytest.raises(ValueError, match="normalizer must be above 0 where a token counts"):
            loss(np.zeros((2, 3)), None, [1.0, 2.0], normalizer=0, mask=mask, aggregation=aggregation, grad=grad)


def test_all_denominators_are_of_one_kernel():
    logps = np.log([[0.5, 0.4], [0.1, 0.9]])
    kernels = [token_level.token_level, sequence_level.sequence_level]
    for level in ("token", "sequence"):
        grpo_loss(logps, logps, [1.0, -1.0], importance_sampling_level=level, grad=True)
    compiled = [len(kernel.signatures) for kernel in kernels]
    for level in ("token", "sequence"):
        for aggregation in AGGREGATIONS:
            options = {"importance_sampling_level": level, "aggregation": aggregation, "grad": True}
            for normalizer in (None, 3, 0.5, np.float32(2)):
                grpo_loss(logps, logps, [1.0, -1.0], normalizer=normalizer, **options)
    assert [len(kernel.signatures) for kernel in kernels] == compiled


# --- one per token or one per sequence --------------------------------------------------------------------------------
@LOSSES
@pytest.mark.parametrize("name", ["advantages", "rollout_is_weights"])
def test_what_could_be_either_is_to_be_said(name, loss):
    def found(values):
        arguments = {"advantages": np.ones((2, 1))} | {name: values}
        return loss([-1.0, -1.0], [-1.0, -1.0], cu_seqlens=[0, 0, 2], **arguments).loss

    with pytest.raises(ValueError, match=rf"{name} must have shape \((1, 2|1, N)\), one per token, or"):
        found([5.0, 3.0])
    assert found([[5.0, 3.0]]) == -(5 + 3) / 2 / 2  # of 2 tokens, and of 2 sequences, one of which is empty
    assert found([[5.0], [3.0]]) == -3 / 2


@LOSSES
def test_an_advantage_for_each_sequence_of_one_token_is_one_for_each_token(loss):
    expected = loss([-1.0, -2.0], None, [[5.0], [3.0]], cu_seqlens=[0, 1, 2], grad=True)
    for same in ([5.0, 3.0], [[5.0, 3.0]]):
        result = loss([-1.0, -2.0], None, same, cu_seqlens=[0, 1, 2], grad=True)
        assert (result.loss, result.grad.tolist()) == (expected.loss, expected.grad.tolist())


@LOSSES
@pytest.mark.parametrize("name", ["advantages", "rollout_is_weights"])
def test_columns_are_one_per_sequence(name, loss):
    rng = np.random.default_rng(0)
    for shape, cu_seqlens, sequences in (((3, 4), None, 3), ((3, 1), None, 3), ((7,), [0, 3, 7], 2), ((7,), None, 1)):
        logps = rng.normal(size=shape)
        arguments = {"advantages": rng.normal(size=sequences), "cu_seqlens": cu_seqlens, "grad": True}
        arguments |= {name: rng.uniform(0.5, 1, sequences)}
        expected = loss(logps, None, **arguments)
        result = loss(logps, None, **arguments | {name: arguments[name][:, None]})
        assert (result.loss, result.grad.tolist()) == (expected.loss, expected.grad.tolist())


@LOSSES
def test_other_shapes_are_refused(loss):
    for shape, cu_seqlens, wrong in (((3, 4), None, (1, 3)), ((3, 4), None, (4,)), ((7,), [0, 3, 7], (1, 2))):
        with pytest.raises(ValueError, match="advantages must have shape"):
            loss(np.zeros(shape), None, np.ones(wrong), cu_seqlens=cu_seqlens)


# --- no clip ----------------------------------------------------------------------------------------------------------
@LEVELS
@pytest.mark.parametrize(
    "clip", [Clip(1.0), Clip(1e6), Clip(np.inf), Clip(0.2, np.inf), Clip(2.5, 0.1), Clip(np.array(0.2))]
)
def test_any_epsilon_is_allowed(clip, level):
    rng = np.random.default_rng(0)
    logps, old, advantages = -rng.exponential(size=(4, 9)), -rng.exponential(size=(4, 9)), rng.normal(size=(4, 9))
    options = {"surrogate": clip, "importance_sampling_level": level, "grad": True}
    result, expected = (
        grpo_loss(logps, old, advantages, **options),
        reference.grpo_loss(logps, old, advantages, **options),
    )
    np.testing.assert_allclose(result.loss, expected.loss, rtol=1e-13)
    np.testing.assert_allclose(result.grad, expected.grad, rtol=1e-13)
    for name in ("clip_ratio_low", "clip_ratio_high"):
        assert getattr(result.stats, name) == expected.stats[name]


# --- overflow ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("clip", [Clip(0.2, np.inf), Clip(np.inf), Clip(0.2, 1e308), Clip(0.2), CISPO(np.inf), SAPO()])
@pytest.mark.parametrize("dtype", DTYPES)
@LEVELS
def test_an_infinite_ratio_without_an_advantage_is_nothing(level, dtype, clip):
    logps, old = np.array([[800.0, -1.0], [-1.0, -1.0]], dtype), np.array([[-800.0, -1.0], [-1.0, -1.0]], dtype)
    for loss in (grpo_loss, reference.grpo_loss):
        a = np.array([[0.0, 0.0], [1.0, -2.0]], dtype)
        assert np.isfinite(loss(logps, old, a, surrogate=clip, importance_sampling_level=level).loss)
    found = grpo_loss(logps, old, a, surrogate=clip, importance_sampling_level=level, grad=True)
    assert np.isfinite(found.grad).all()
    assert found.stats.ratio_max == np.inf


def test_what_belongs_to_an_empty_sequence_is_not_looked_at():
    far = np.full(20, -1e308)  # whose log-ratios overflow, so that all is looked at
    assert grpo_loss(far, -far, [np.nan, 1.0], cu_seqlens=[0, 0, 20]).loss == 0
    with pytest.raises(ValueError, match=r"advantages must be finite .* got advantages\[1\] = nan"):
        grpo_loss(far, -far, [1.0, np.nan], cu_seqlens=[0, 0, 20])
