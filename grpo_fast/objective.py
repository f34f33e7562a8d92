"""The objective from probabilities: `grpo_objective`, every diagnostic with it, and the grid over ε and β."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Never

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import first_problem, flag, hides_unknown, refuse_unknown, same_shape
from ._kernels import sample_blocks, sweep_blocks, threads
from ._kernels.blocks import BLOCK, blocks_in
from ._kernels.exact import Exact, rounded_sum
from ._kernels.sums import Totals, empty_accumulators, merged
from ._kernels.tasks import perform
from .stats import Stats, Sweep, objective_of
from .terms import BETA, EPSILON, K3, Clip, Options


@hides_unknown
def grpo_objective(
    rhos: ArrayLike,
    A: ArrayLike,
    pi_theta_old: ArrayLike | None,
    pi_theta_ref: ArrayLike | None,
    epsilon: float = EPSILON,
    beta: float = BETA,
    *,
    importance_weighted: bool = True,
    **unknown: Never,
) -> float:
    """The GRPO objective over N samples, in one pass over memory.

    ::

        π_θ = ρ·π_old,   r = π_ref/π_θ
        L   = mean( min(ρA, clip(ρ, 1−ε, 1+ε)·A)  −  β·ρ·(r − log r − 1) )

    with the KL term of DeepSeek-V3.2; with ``importance_weighted=False`` that of DeepSeekMath, −β·(r − log r − 1).

    Parameters
    ----------
    rhos : array-like of any shape
        ρ = π_θ/π_old, the ratio of each sample; positive.
    A : array-like, same shape
        Advantages; finite.
    pi_theta_old, pi_theta_ref : array-like, same shape
        Probabilities under the policy that sampled and under the reference; positive. They need not be normalised.
        With ``beta=0`` they are neither read nor checked, and may be None.
    epsilon : float, in [0, inf]
        ε, how far ρ may leave 1 before a sample stops counting.
    beta : float, in [0, inf)
        β, the weight of the KL term.
    importance_weighted : bool
        Whether ρ multiplies the KL term, as in `K3`.

    Returns
    -------
    float
        L. The same bits for any number of threads, on any CPU.

    Raises
    ------
    TypeError, ValueError
        Shapes differ, nothing is in them, an option is outside its interval, or a sample is outside the domain (the
        message has the first index): ρ, ρ·π_old and r must be normal numbers of the computing dtype, r at most an
        eighth of the largest; π_old and π_ref positive and finite; A finite.

    Notes
    -----
    float64 and float32 are computed natively; other dtypes are promoted by NumPy's rules, and mixed ones to the wider.
    C-contiguous float64 or float32 arrays, `numpy.memmap` among them, are not copied.

    The KL term is the k3 estimator, computed without cancellation; with ρ, it is unbiased in value and gradient under
    samples from π_old (DeepSeek-V3.2, arXiv:2512.02556, Eq. 7; TRL's ``use_bias_correction_kl``). Without ρ, L is that
    of DeepSeekMath, arXiv:2402.03300, Eq. 3 and 4, with one sample for each token. The domain is the same for both.

    Examples
    --------
    >>> from grpo_fast import grpo_objective
    >>> round(grpo_objective([1.2, 0.8, 1.1], [1.0, 1.0, 1.0], [0.9, 1.1, 1.0], [1.0, 0.5, 1.5]), 5)
    1.03277
    """
    if unknown:
        refuse_unknown(grpo_objective, unknown)
    terms = _terms(epsilon, beta, importance_weighted)
    arrays, shape = _arrays((rhos, A, pi_theta_old, pi_theta_ref), terms.beta != 0.0)
    n = arrays[0].size
    if n <= BLOCK:
        surrogate, kl, illegal = terms.objective_block(*arrays, terms.low, terms.high)
    elif n < threads.WORTH_SHARING:
        surrogates, kls = np.empty((2, blocks_in(n)))
        illegal = sample_blocks.objective_blocks(*arrays, terms.unweighted, terms.low, terms.high, surrogates, kls)
        surrogate, kl = rounded_sum(surrogates.tolist()), rounded_sum(kls.tolist())
    else:
        totals = _totals(arrays, terms, None)
        surrogate, kl, illegal = totals.surrogate_numerator, totals.kl_numerator, totals.suspect > 0
    if illegal:
        _refuse(arrays, shape)
    return objective_of(surrogate / n, kl / n, terms.beta)


@hides_unknown
def grpo_stats(
    rhos: ArrayLike,
    A: ArrayLike,
    pi_theta_old: ArrayLike | None,
    pi_theta_ref: ArrayLike | None,
    epsilon: float = EPSILON,
    beta: float = BETA,
    *,
    importance_weighted: bool = True,
    **unknown: Never,
) -> Stats:
    """The objective and every diagnostic, in the same pass.

    Parameters, errors and sources are those of `grpo_objective`; but all arrays are read, whatever β is, unless with
    ``beta=0`` both probabilities are None: then there is no KL term, and ``kl`` is NaN.

    Returns
    -------
    Stats
        Its ``objective`` is that of `grpo_objective`, to the bit. The results of shards add to that of the whole
        exactly if the shards are cut at multiples of ``grpo_fast.BLOCK`` samples, and to rounding otherwise.
    """
    if unknown:
        refuse_unknown(grpo_stats, unknown)
    terms = _terms(epsilon, beta, importance_weighted)
    with_kl = terms.beta != 0.0 or pi_theta_old is not None or pi_theta_ref is not None
    arrays, shape = _arrays((rhos, A, pi_theta_old, pi_theta_ref), with_kl)
    totals = _totals(arrays, terms, True)
    if totals.suspect:
        _refuse(arrays, shape)
    options = Options(terms.clip, terms.k3 if with_kl else None, aggregation="token-mean")
    return Stats.of(options, totals, sequence_count=None)


@hides_unknown
def grpo_sweep(
    rhos: ArrayLike,
    A: ArrayLike,
    pi_theta_old: ArrayLike | None,
    pi_theta_ref: ArrayLike | None,
    epsilons: ArrayLike,
    betas: ArrayLike,
    *,
    importance_weighted: bool = True,
    **unknown: Never,
) -> Sweep:
    """The objective for every pair of ε and β from one read of the data.

    Parameters
    ----------
    rhos, A, pi_theta_old, pi_theta_ref : array-like
        As in `grpo_objective`; the last two are neither read nor checked if all β are 0.
    epsilons, betas : (E,), (B,) array-like, or a single number
        Only the ε cost anything; β is algebra on two sums.
    importance_weighted : bool
        As in `grpo_objective`.

    Returns
    -------
    Sweep
        Its ``objective[e, b]`` is ``grpo_objective(…, epsilon=epsilons[e], beta=betas[b])``, to the bit.

    Raises
    ------
    TypeError, ValueError
        As `grpo_objective`.
    """
    if unknown:
        refuse_unknown(grpo_sweep, unknown)
    grid = grid_of(epsilons, betas)
    k3 = K3(1.0, flag("importance_weighted", importance_weighted))
    with_kl = any(grid[1])
    arrays, shape = _arrays((rhos, A, pi_theta_old, pi_theta_ref), with_kl)
    steps = np.array(grid[0])
    n = arrays[0].size
    with threads.tasks(n) as tasks:
        pairs, shared = sweep_blocks.sweep_accumulators(tasks, steps.size)
        arguments = (*arrays, _unweighted(k3), np.maximum(1.0 - steps, 0.0), 1.0 + steps, pairs, shared)
        perform(sweep_blocks.sweep, arguments, tasks)
    sweep_blocks.merge_sweep(pairs, shared)
    if shared["suspect"][0]:
        _refuse(arrays, shape)
    (kl_sum,) = Exact.of_limbs(shared["kl"][:1])
    return Sweep(
        grid=grid,
        options=Options(Clip(grid[0][0]), k3 if with_kl else None, aggregation="token-mean"),
        tokens=n,
        sequence_count=None,
        surrogate_numerators=tuple(Exact.of_limbs(pairs["surrogate"][0])),
        kl_numerator=kl_sum,
        kl_sum=kl_sum,
        clipped_low=tuple(pairs["clipped_low"][0].tolist()),
        clipped_high=tuple(pairs["clipped_high"][0].tolist()),
    )


def grid_of(epsilons: ArrayLike, betas: ArrayLike) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The ε and the β of a sweep, checked."""
    return (
        tuple(Clip(epsilon).epsilon for epsilon in _axis("epsilons", epsilons)),
        tuple(K3(beta).beta for beta in _axis("betas", betas)),
    )


def _axis(name: str, values: ArrayLike) -> list[float]:
    """One axis of a grid as a list of numbers, or the ValueError that names it."""
    try:
        array = np.atleast_1d(np.asarray(values))
    except ValueError:  # ragged
        array = np.array([])
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iuf":
        flat = f": {name}.ravel() is one" if array.ndim > 1 and array.size else ""
        raise ValueError(f"{name} must be a number or a one-dimensional array of numbers, got {values!r}{flat}")
    return list(array.tolist())


@dataclass(frozen=True, slots=True)
class _Terms:
    """Both terms, and what is made of them: β, the bounds of ρ, and which kernels such a KL term takes."""

    clip: Clip
    k3: K3
    beta: float
    low: float
    high: float
    objective_block: Any
    unweighted: bool | None


def _make_terms(epsilon: float, beta: float, importance_weighted: bool = True) -> _Terms:
    clip, k3 = Clip(epsilon), K3(beta, flag("importance_weighted", importance_weighted))
    objective_block = sample_blocks.objective_block if k3.importance_weighted else sample_blocks.unweighted_block
    return _Terms(clip, k3, k3.beta, 1.0 - clip.epsilon, 1.0 + clip.epsilon_high, objective_block, _unweighted(k3))


def _unweighted(k3: K3) -> bool | None:
    """As kernels have it: None, which leaves no trace in their code, if the term is importance-weighted."""
    return None if k3.importance_weighted else True


_cached_terms = lru_cache(maxsize=256, typed=True)(_make_terms)


def _terms(epsilon: float, beta: float, importance_weighted: bool) -> _Terms:
    """Both terms, checked; from a cache, since making them would be a third of a small call."""
    try:
        if importance_weighted is True:  # as nearly always; a longer key takes longer to look up
            return _cached_terms(epsilon, beta)
        return _cached_terms(epsilon, beta, importance_weighted)
    except TypeError:  # not hashable, hence neither a number nor a bool, or just none
        return _make_terms(epsilon, beta, importance_weighted)


_NAMES = ("rhos", "A", "pi_theta_old", "pi_theta_ref")


def _arrays(values: tuple[Any, ...], with_kl: bool) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """The arrays of `Samples`, None for probabilities that are not needed, and the shape that the caller's have."""
    if with_kl:
        return same_shape(_NAMES, values)
    arrays, shape = same_shape(_NAMES[:2], values[:2])
    return (*arrays, None, None), shape


def _totals(arrays: tuple[Any, ...], terms: _Terms, diagnostics: bool | None) -> Totals:
    """The totals of all samples; without ``diagnostics`` (None) only surrogate, kl and suspect are right."""
    with threads.tasks(arrays[0].size) as tasks:
        accumulators = empty_accumulators(tasks)
        arguments = (*arrays, terms.unweighted, terms.low, terms.high, diagnostics, accumulators)
        perform(sample_blocks.totals, arguments, tasks)
    return merged(accumulators)


def _refuse(arrays: tuple[Any, ...], shape: tuple[int, ...]) -> Never:
    """Raise the ValueError for the first illegal sample."""
    message = first_problem(_problems, [a for a in arrays if a is not None], shape)
    assert message, "a kernel found an illegal sample that the checks here do not know"
    raise ValueError(message)


def _problems(rho: Any, a: Any, pi_old: Any = None, pi_ref: Any = None) -> Mapping[str, NDArray[np.bool_]]:
    """What can be wrong with samples, in this order, and where it is: the limits of `samples._load_carefully`."""
    limits = np.finfo(rho.dtype)
    wider = "" if rho.dtype == np.float64 else "pass float64, or "
    advice = f"{wider}use grpo_loss on log-probabilities"
    tiny = f"a normal {rho.dtype} (at least {limits.tiny:.3g})"

    def positive(x: Any) -> Any:
        return (x > 0) & (x <= limits.max)

    reasons = {
        "rhos must be positive and finite, got rhos[{i}] = {values[0]!r}": ~positive(rho),
        "A must be finite, got A[{i}] = {values[1]!r}": ~np.isfinite(a),
    }
    if pi_old is not None:
        reasons |= {
            "pi_theta_old must be positive and finite, got pi_theta_old[{i}] = {values[2]!r}": ~positive(pi_old),
            "pi_theta_ref must be positive and finite, got pi_theta_ref[{i}] = {values[3]!r}": ~positive(pi_ref),
        }
    reasons[f"rhos must be {tiny}, got rhos[{{i}}] = {{values[0]!r}}: {advice}"] = rho < limits.tiny
    if pi_old is not None:
        pi = rho * pi_old
        r = pi_ref / pi
        reasons |= {
            f"rhos·pi_theta_old must be {tiny} and finite, got index {{i}} of {{values}}: {advice}": ~(
                (pi >= limits.tiny) & (pi <= limits.max)
            ),
            f"pi_theta_ref/(rhos·pi_theta_old) must be {tiny} and at most {limits.max / 8:.3g}, "
            f"got index {{i}} of {{values}}: {advice}": ~((r >= limits.tiny) & (r <= limits.max / 8)),
        }
    return reasons
