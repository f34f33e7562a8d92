"""The loss from log-probabilities: `grpo_loss`, with its gradient and every diagnostic."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import Array, one_of, positive, real
from ._kernels import exact, sequence_level, threads, token_level
from ._kernels.blocks import BLOCK
from ._kernels.exact import Exact
from ._kernels.tokens import COUNTS, SUMS, SURROGATE_MEAN, TOKENS, Batch, Objective, Result
from ._loss_inputs import batch_of, place_for_gradient, refuse_if_not_finite
from .stats import Options, Stats
from .terms import CISPO, K1, K2, K3, KL, SAPO, Aggregation, Clip, Level, Surrogate

#: Into so many pieces each task's sequences are cut, of about equal length: tasks take them in turns, and so share the
#: padding, wherever in the batch the short sequences are.
_PIECES = 16
#: Sequences of more tokens may be shared out among the threads, one after the other.
_LONG = 1 << 16


class LossResult(NamedTuple):
    """What `grpo_loss` returns."""

    loss: float  # what an optimiser minimises
    grad: NDArray[Any] | None  # ∂loss/∂logps, in the shape of logps
    stats: Stats


def grpo_loss(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    advantages: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    surrogate: Surrogate = Clip(epsilon=0.2),  # noqa: B008 - an immutable value
    kl: KL | None = None,
    importance_sampling_level: Level = "token",
    rollout_is_weights: ArrayLike | None = None,
    aggregation: Aggregation = "seq-mean-token-mean",
    normalizer: float | None = None,
    grad: bool | NDArray[Any] = False,
) -> LossResult:
    """The loss of GRPO and its family, its gradient and its diagnostics, in one pass over memory.

    ::

        ρ            = π_θ/π_old = exp(logp − old)
        loss         = −Σ_i c_i·Σ_t (w·s − β·k)
        ∂loss/∂logp  = −c_i·( D[w·∂s/∂log ρ − β·∂k/∂log ρ] + w·∂s/∂logp − β·∂k/∂logp )

    for each unmasked token t of sequence i: s is the policy term (``surrogate``), k the KL term (``kl``, times ρ if it
    is importance-weighted), w the rollout weight, c_i what ``aggregation`` gives the sequence's tokens, and D is
    ∂log ρ/∂logp: at token level the identity, at sequence level the mean over the sequence.

    Parameters
    ----------
    logps : (B, T) padded, or (N,) packed with ``cu_seqlens``, or (N,) alone, which is one sequence
        log π_θ of each token. float32 computes in float32, everything else in float64; the other arrays are cast to it.
    old_logps : like ``logps``, or None
        log π_old. None is on-policy: ρ = 1, with the gradient of ρ.
    advantages : like ``logps``, or one per sequence: (B,), (S,), or a number for one sequence
        A. What could be either is one per token.
    ref_logps : like ``logps``, or None
        log π_ref; neither read nor checked without a ``kl``.
    mask : like ``logps``, bools or 0/1, or None
        Which tokens count. What any array holds elsewhere is never used; the gradient is 0 there.
    cu_seqlens : (S + 1,) ints, or None
        Where packed sequences begin and end: from 0, never falling, to N.
    surrogate : Clip, CISPO or SAPO
        The policy term.
    kl : K1, K2, K3 or None
        The KL term, with its β.
    importance_sampling_level : "token" or "sequence"
        One ρ for each token, or one for each sequence, exp of the mean log-ratio (GSPO, arXiv:2507.18071, Eq. 7).
    rollout_is_weights : like ``advantages``, or None
        w, weights against the mismatch between trainer and sampler (truncated importance sampling); they scale the
        policy term only.
    aggregation : str
        With n_i the number of unmasked tokens of sequence i (at least 1), B the number of sequences (masked ones too):

        =====================  =========  =======================  ===============================================
        aggregation            c_i        replaced by normalizer   also known as
        =====================  =========  =======================  ===============================================
        "token-mean"           1/Σn       Σn                       verl; TRL "bnpo", "dapo" (arXiv:2503.14476)
        "token-sum"            1          1                        verl; Dr. GRPO (arXiv:2503.20783) with B·max_length
        "seq-mean-token-mean"  1/(B·n_i)  B                        TRL "grpo" (arXiv:2402.03300, Eq. 3)
        "seq-mean-token-sum"   1/B        B                        verl
        =====================  =========  =======================  ===============================================
    normalizer : float, in (0, inf), or None
        The denominator instead. One for all micro-batches, accumulation steps and ranks makes them add up: gradients
        are slices of the whole batch's, losses add to rounding.
    grad : bool, or array like ``logps`` of the dtype that computes
        Whether to compute the gradient, or where to write it.

    Returns
    -------
    LossResult
        ``loss``, ``grad`` (None unless asked for) and ``stats``, all diagnostics; `Stats` of parts of a batch add up to
        those of the whole, exactly. A sequence adds the same bits in whichever batch, padding or packing it stands, on
        any number of threads, on any CPU. If all is masked, the loss is 0.

    Raises
    ------
    TypeError, ValueError
        Shapes do not fit, an option is unknown or outside its interval, a KL term has no ``ref_logps``, or an unmasked
        token is not finite; the message has the first index. Then ``grad`` may have been written to.

    Notes
    -----
    Not copied: C-contiguous arrays of the dtype that computes, int64 ``cu_seqlens``, and masks of bools. Where an exp
    overflows, the result is what the formula says, with 0·∞ = 0. A place for the gradient, passed as ``grad`` again and
    again, spares the system the work of finding fresh memory, which for large batches takes longer than the gradient.

    Examples
    --------
    >>> import numpy as np
    >>> from grpo_fast import Clip, grpo_loss
    >>> logps = np.log([[0.5, 0.4], [0.1, 0.9]])
    >>> result = grpo_loss(logps, np.log([[0.5, 0.5], [0.2, 0.5]]), [1.0, -1.0], surrogate=Clip(0.2), grad=True)
    >>> round(result.loss, 6)
    0.2
    """
    options = options_of(surrogate, kl, importance_sampling_level, aggregation, normalizer)
    array = real("logps", logps)
    if array.ndim not in (1, 2) or array.size == 0:
        raise ValueError(f"logps must be (B, T) or (N,) and not empty, got shape {array.shape}")
    inputs = {
        "logps": array,
        "old_logps": old_logps,
        "advantages": advantages,
        "ref_logps": None if kl is None else ref_logps,
        "mask": mask,
        "rollout_is_weights": rollout_is_weights,
    }
    if kl is not None and ref_logps is None:
        raise ValueError("ref_logps must be given with a kl, got None")
    batch = batch_of(array.shape, inputs, cu_seqlens)
    place = place_for_gradient(grad, array.shape, batch.logps.dtype, inputs | {"cu_seqlens": cu_seqlens})
    stats = _compute(batch, options, place, array.shape)
    return LossResult(stats.loss, place, stats)


def options_of(
    surrogate: Surrogate = Clip(epsilon=0.2),  # noqa: B008 - an immutable value
    kl: KL | None = None,
    importance_sampling_level: Level = "token",
    aggregation: Aggregation = "seq-mean-token-mean",
    normalizer: float | None = None,
) -> Options:
    """The options of `grpo_loss`, checked."""
    if type(surrogate) not in (Clip, CISPO, SAPO):
        raise TypeError(f"surrogate must be a Clip, CISPO or SAPO, got {surrogate!r}")
    if kl is not None and type(kl) not in (K1, K2, K3):
        raise TypeError(f"kl must be a K1, K2, K3 or None, got {kl!r}")
    return Options(
        surrogate,
        kl,
        one_of("importance_sampling_level", importance_sampling_level, ("token", "sequence")),
        one_of("aggregation", aggregation, ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum")),
        None if normalizer is None else positive("normalizer", normalizer),
    )


# --- drivers --------------------------------------------------------------------------------------------------------
def _compute(batch: Batch, options: Options, place: NDArray[Any] | None, shape: tuple[int, ...]) -> Stats:
    """Run the kernels over a batch; the gradient goes to ``place``."""
    gradient = None
    if place is not None:
        gradient = np.asarray(place) if place.flags.carray else np.empty(shape, place.dtype)
        gradient = gradient.reshape(-1)
    objective = Objective(
        surrogate=options.surrogate,
        kl=options.kl,
        denominator=_denominator(batch, options, gradient is not None),
        mean_within=options.aggregation == "seq-mean-token-mean",
    )
    add_up = _at_token_level if options.importance_sampling_level == "token" else _at_sequence_level
    with threads.tasks(2 * batch.logps.size) as tasks:  # a token costs what two samples of probabilities do
        result = Result(
            rows=np.zeros((tasks, SUMS, exact.ROW), np.int64),
            counts=np.zeros((tasks, COUNTS), np.int64),
            extremes=np.array([(np.inf, -np.inf)] * tasks),
        )
        add_up(batch, objective, gradient, result)
    exact.merge(result.rows)
    low, high, beyond, doubtful, tokens = result.counts.sum(axis=0).tolist()
    if doubtful:
        refuse_if_not_finite(batch, shape)
    if place is not None and gradient is not None and not place.flags.carray:
        place[...] = gradient.reshape(shape)
    sums = Exact.of_rows(result.rows[0] if objective.mean_within else result.rows[0, :SURROGATE_MEAN])
    return Stats.of(
        options,
        tokens=tokens,
        sequence_count=len(batch.bounds) - 1,
        sums=sums,
        clipped=(low, high, beyond),
        extremes=result.extremes,
    )


def _at_token_level(batch: Batch, objective: Objective, gradient: Array | None, result: Result) -> None:
    """Work on a batch with as many threads as there are tasks in ``result``."""
    tasks = len(result.rows)
    if tasks == 1:
        token_level.token_level(batch, objective, gradient, None, *_alone(batch, result))
        return
    pieces, limit, long = _pieces(batch, tasks)
    if len(long) <= len(batch.bounds) - 2:
        token_level.token_level_parallel(batch, *objective, gradient, None, pieces, limit, *result)
    shares = [_share_out(batch, gradient, sequence, tasks, result) for sequence in long]
    if long:
        parts = token_level.Parts(*(np.concatenate(column) for column in zip(*shares, strict=True)))
        numbers = np.arange(len(parts.start) + 1)
        pieces = np.column_stack((numbers[:-1], numbers[1:]))
        token_level.token_level_parallel(batch, *objective, gradient, parts, pieces, limit, *result)


def _at_sequence_level(batch: Batch, objective: Objective, gradient: Array | None, result: Result) -> None:
    """Work on a batch with as many threads as there are tasks in ``result``."""
    kernels, tasks = sequence_level, len(result.rows)
    if tasks == 1:
        kernels.sequence_level(batch, objective, gradient, *_alone(batch, result))
        return
    pieces, limit, long = _pieces(batch, tasks)
    if len(long) <= len(batch.bounds) - 2:
        kernels.sequence_level_parallel(batch, *objective, gradient, pieces, limit, *result)
    for sequence in long:
        start, stop, tokens = _extent(batch, gradient, sequence, result)
        if tokens:
            collected = np.empty((-(-(stop - start) // BLOCK), kernels.COLLECTED))
            kernels.collect_parallel(batch, *objective, gradient, sequence, start, stop, collected, tasks)
            made_of = kernels.conclude(batch, objective, tokens, collected, Result(*(x[0] for x in result)))
            if gradient is not None:
                kernels.spread_parallel(batch, *objective, gradient, made_of, sequence, start, stop, tasks)


def _alone(batch: Batch, result: Result) -> tuple[Any, ...]:
    """The last arguments of a kernel for the one task that does all."""
    pieces = np.array([[0, len(batch.bounds) - 1]])
    return pieces, batch.logps.size, 0, 1, Result(*(x[0] for x in result))


def _pieces(batch: Batch, tasks: int) -> tuple[Array, int, list[int]]:
    """Ranges of sequences for tasks to take in turns; the length beyond which one is shared out; those longer."""
    bounds, size, count = batch.bounds, batch.logps.size, _PIECES * tasks
    limit = max(_LONG, size // count)
    edges = np.searchsorted(bounds, np.arange(count + 1) * (size / count))
    edges[-1] = len(bounds) - 1
    pieces = np.empty((count, 2), np.int64)
    pieces[:, 0], pieces[:, 1] = edges[:-1], edges[1:]
    # From large to small: in any other order one task's turns could all be the larger pieces, or the only ones.
    sizes = bounds[pieces[:, 1]] - bounds[pieces[:, 0]]
    pieces = pieces[np.argsort(-sizes, kind="stable")]
    lengths = bounds[1:] - bounds[:-1]
    return pieces, limit, np.flatnonzero(lengths > limit).tolist() if lengths.max() > limit else []


def _extent(batch: Batch, gradient: Array | None, sequence: int, result: Result) -> tuple[int, int, int]:
    """As `tokens.extent` for a long sequence, whose masked ends are done with here."""
    first, last = batch.bounds[sequence : sequence + 2].tolist()
    start, stop, tokens = first, last, last - first
    if batch.mask is not None:
        mask = batch.mask[first:last] != 0
        tokens = int(np.count_nonzero(mask))
        start, stop = first + int(mask.argmax()), last - int(mask[::-1].argmax())
        stop = stop if tokens else start
    if gradient is not None:
        gradient[first:start] = 0
        gradient[stop:last] = 0
    result.counts[0, TOKENS] += tokens
    return start, stop, tokens


def _share_out(
    batch: Batch, gradient: Array | None, sequence: int, tasks: int, result: Result
) -> tuple[Array, Array, Array, Array]:
    """The `token_level.Parts` of one long sequence: of whole blocks, one for each task."""
    start, stop, tokens = _extent(batch, gradient, sequence, result)
    cuts = start + np.arange(tasks + 1) * -(-(stop - start) // BLOCK) // tasks * BLOCK
    return np.full(tasks, sequence), cuts[:-1], np.minimum(cuts[1:], stop), np.full(tasks, tokens)


def _denominator(batch: Batch, options: Options, with_gradient: bool) -> float:
    """What the aggregation divides the gradient by; what it divides the loss by is known afterwards."""
    if options.normalizer is not None:
        return options.normalizer
    if options.aggregation == "token-sum":
        return 1.0
    if options.aggregation != "token-mean":
        return float(len(batch.bounds) - 1)
    if batch.mask is None or not with_gradient:
        return float(batch.logps.size)
    return float(max(int(np.count_nonzero(batch.mask)), 1))
