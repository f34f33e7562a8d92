"""What `rollout_correction`, `Reject` and the two masks refuse, with an error that says what is allowed."""

import math

import numpy as np
import pytest
from samples import DTYPES

from grpo_fast import Reject, high_entropy_mask, off_policy_sequence_mask, rollout_correction

every_dtype = pytest.mark.parametrize("dtype", DTYPES)
X = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((0.0, 0.0), {}, ValueError, r"old_logps must be \(B, T\) or \(N,\), got shape \(\)"),
        ((X, X[0]), {}, ValueError, r"rollout_logps must have shape \(2, 3\) as old_logps, got \(3,\)"),
        ((X, X), {"mask": [1]}, ValueError, r"mask must have shape \(2, 3\) as old_logps, got \(1,\)"),
        ((X, X), {"mask": X + 2}, ValueError, r"mask must hold bools or 0/1, got mask\[0, 0\] = 2.0"),
        ((X[0], X[0]), {"cu_seqlens": [0, 2]}, ValueError, r"the size of old_logps, got 0 to 2; .*: old_logps\[:2\]"),
        (
            (X + np.nan, X),
            {},
            ValueError,
            r"old_logps must be finite where it is not masked, got old_logps\[0, 0\] = n",
        ),
        ((X, X - np.inf), {}, ValueError, r"rollout_logps must be finite, or NaN where it is missing, got rollout_log"),
        ((X + np.inf, X * np.nan), {}, ValueError, "old_logps must be finite where it is not masked"),
        (("a", X), {}, TypeError, "old_logps must hold real numbers"),
        ((X, X), {"level": "seq"}, ValueError, "level must be one of 'token', 'sequence', 'geometric', got 'seq'"),
        ((X, X), {"mode": "clip"}, ValueError, "mode must be one of 'truncate', 'mask', 'raw', got 'clip'"),
        ((X, X), {"mode": "raw", "upper": 2}, ValueError, "upper must be None with mode='raw', .* got 2"),
        ((X, X), {"mode": "raw", "lower": 0.5}, ValueError, "lower must be None with mode='raw'"),
        ((X, X), {"mode": "raw", "lower": 0}, ValueError, "lower must be None with mode='raw', .* got 0"),
        ((X, X), {"mode": "raw", "upper": math.inf}, ValueError, "upper must be None with mode='raw'"),
        ((X, X), {"lower": -1}, ValueError, r"lower must be a number in \[0, inf\], got -1"),
        ((X, X), {"lower": 3}, ValueError, r"upper must be a number in \[lower = 3.0, inf\], got 2.0"),
        ((X, X), {"upper": math.nan}, ValueError, "upper must be a number in"),
        ((X, X), {"reject": 0.5}, TypeError, r"reject must be any number of Reject\(…\), got 0.5"),
        ((X, X), {"reject": np.array(0.5)}, TypeError, r"reject must be any number of Reject\(…\), got array\(0.5\)"),
        ((X, X), {"reject": ["ratio"]}, TypeError, r"reject must be any number of Reject\(…\), got 'ratio'"),
        ((X, X), {"normalize": 1}, TypeError, "normalize must be True or False, got 1"),
        ((X, X), {"levle": "token"}, TypeError, "rollout_correction has no argument 'levle': did you mean 'level'?"),
    ],
)
def test_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        rollout_correction(*arguments, **options)


@pytest.mark.parametrize("at", [0, 3, 4095, 4096, 8999])
@pytest.mark.parametrize("level", ["token", "sequence"])
@every_dtype
def test_names_the_first_bad_token_wherever_it_is(dtype, level, at):
    old, rollout = np.full(9000, -1, dtype), np.full(9000, -1.5, dtype)
    bad = old.copy()
    bad[at] = -np.inf
    with pytest.raises(ValueError, match=rf"old_logps\[{at}\] = -inf"):
        rollout_correction(bad, rollout, level=level)
    with pytest.raises(ValueError, match=rf"old_logps\[{at}\] = -inf"):  # beside what is missing, too
        rollout_correction(bad, rollout * dtype(np.nan), level=level)
    with pytest.raises(ValueError, match=rf"rollout_logps\[{at}\] = -inf"):
        rollout_correction(rollout, bad, level=level)
    mask = np.arange(9000) != at
    assert rollout_correction(bad, bad, mask=mask, level=level).stats.tokens == 8999


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("r", "token"), ValueError, "statistic must be one of 'ratio', 'k2', 'k3', got 'r'"),
        (
            ("ratio", "seq_sum"),
            ValueError,
            "level of 'ratio' must be one of 'token', 'sequence', 'geometric', 'seq_min'",
        ),
        (("k2", "sequence"), ValueError, "level of 'k2' must be one of 'token', 'seq_sum', 'seq_mean', 'seq_max'"),
        (("ratio", "token", 2, 1), ValueError, r"upper must be a number in \[lower = 2.0, inf\], got 1"),
        (("ratio", "token", math.nan), ValueError, r"lower must be a number in \[-inf, inf\], got nan"),
        (("ratio", "token", "1"), TypeError, "lower must be a number"),
    ],
)
def test_reject_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        Reject(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: off_policy_sequence_mask(X, X, [1.0], 1), r"advantages must have shape \(2,\), one per sequence, got"),
        (lambda: off_policy_sequence_mask(X, X, X, 1), r"advantages must have shape \(2,\), one per sequence, got"),
        (lambda: off_policy_sequence_mask(X, X, [1, np.nan], 1), r"advantages must be finite .* advantages\[1\] = nan"),
        (lambda: off_policy_sequence_mask(X, X, [1, 1], -1), r"delta must be a number in \[0, inf\], got -1"),
        (lambda: off_policy_sequence_mask(X, X - np.inf, [1, 1], 1), "rollout_logps must be finite, or NaN"),
        (lambda: off_policy_sequence_mask(X + np.nan, X, [1, 1], 1), "logps must be finite where it is not masked"),
        (lambda: high_entropy_mask(X, 1.5), r"quantile must be a number in \[0, 1\], got 1.5"),
        (lambda: high_entropy_mask(X + np.nan, 0.5), r"entropies must be finite .* got entropies\[0, 0\] = nan"),
        (lambda: high_entropy_mask(X, 0.5, mask=[1]), r"mask must have shape \(2, 3\) as entropies, got \(1,\)"),
    ],
)
def test_masks_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
