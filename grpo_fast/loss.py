"""The loss from log-probabilities: `grpo_loss`, with its gradient and every diagnostic."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypedDict, Unpack, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ._checks import Array, hides_unknown, refuse_unknown
from ._kernels import sequence_level, threads, token_level
from ._kernels.blocks import BLOCK, blocks_in
from ._kernels.formulas import HELD_CONSTANT
from ._kernels.penalties import kl_for_kernels
from ._kernels.sums import empty_accumulators, merged
from ._kernels.tasks import perform
from ._kernels.tokens import Batch, LossTerms
from ._loss_inputs import Inputs, refuse_if_not_finite
from ._shares import all_sequences, begin_long, ranges_of
from .stats import Stats
from .terms import DEFAULT_SURROGATE, GMPO, KL, Aggregation, Level, Options, Surrogate, TrustRegion

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    Gradient = TypeVar("Gradient", bound=NDArray[Any] | None, default=NDArray[Any] | None)
else:
    from typing import TypeVar

    Gradient = TypeVar("Gradient")


class LossResult(NamedTuple, Generic[Gradient]):
    """What `grpo_loss` returns; it prints as a table."""

    loss: float  # what an optimiser minimises
    grad: Gradient  # ∂loss/∂logps, in the shape of logps; None unless asked for
    stats: Stats

    def __repr__(self) -> str:
        grad: Array | None = self.grad
        return f"{self.stats}\n{'grad':<24} {None if grad is None else f'{grad.dtype} {grad.shape}'}"


class LossOptions(TypedDict, total=False):
    """The keywords of `grpo_loss` but for ``grad``, which decides what it returns; for those who check types."""

    mask: ArrayLike | None
    cu_seqlens: ArrayLike | None
    surrogate: Surrogate
    kl: KL | None
    importance_sampling_level: Level
    rollout_is_weights: ArrayLike | None
    loss_weights: ArrayLike | None
    aggregation: Aggregation
    normalizer: float | None
    trust_region: TrustRegion | None


@overload
def grpo_loss(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    advantages: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    grad: Literal[False] = False,
    **options: Unpack[LossOptions],
) -> LossResult[None]: ...


@overload
def grpo_loss(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    advantages: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    grad: Literal[True] | NDArray[Any],
    **options: Unpack[LossOptions],
) -> LossResult[NDArray[Any]]: ...


@overload
def grpo_loss(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    advantages: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    grad: bool | NDArray[Any],
    **options: Unpack[LossOptions],
) -> LossResult: ...


@hides_unknown
def grpo_loss(
    logps: ArrayLike,
    old_logps: ArrayLike | None,
    advantages: ArrayLike,
    ref_logps: ArrayLike | None = None,
    *,
    mask: ArrayLike | None = None,
    cu_seqlens: ArrayLike | None = None,
    surrogate: Surrogate = DEFAULT_SURROGATE,
    kl: KL | None = None,
    importance_sampling_level: Level = "token",
    rollout_is_weights: ArrayLike | None = None,
    loss_weights: ArrayLike | None = None,
    aggregation: Aggregation = "seq-mean-token-mean",
    normalizer: float | None = None,
    trust_region: TrustRegion | None = None,
    grad: bool | NDArray[Any] = False,
    **unknown: Any,
) -> LossResult[Any]:
    """The loss of GRPO and its family, its gradient and its diagnostics, in one pass over memory.

    Without a ``kl`` there is no KL term: ``ref_logps`` may be given and is ignored. With ``grad=array`` the gradient is
    written into that array.

    ::

        ρ            = π_θ/π_old = exp(logp − old)
        loss         = −Σ_i c_i·Σ_t u·(M·w·s − β·k)
        ∂loss/∂logp  = −c_i·( D[u·(M·w·∂s/∂log ρ − β·∂k/∂log ρ)] + u·(M·w·∂s/∂logp − β·∂k/∂logp) )

    for each unmasked token t of sequence i: s is the policy term (``surrogate``), k the KL term (``kl``, times the
    token's own ρ if it is importance-weighted, the sequence's with "sequence"), w the rollout weight, u the loss
    weight, M 0 where ``trust_region`` drops the policy term and else 1, c_i what ``aggregation`` gives the sequence's
    tokens, and D is ∂log ρ/∂logp: at sequence level the mean over the sequence (of GMPO, at the tokens that it does not
    clip, and at the others 0), at the others the identity. ∂k/∂log ρ is 0 but with "sequence": a token's own ρ is in
    ∂k/∂logp.

    Parameters
    ----------
    logps : (B, T) padded, or (N,) packed with ``cu_seqlens``, or (N,) alone, which is one sequence
        log π_θ of each token. float32, bfloat16 and float16 compute in float32, everything else in float64; the other
        arrays are cast to it.
    old_logps : like ``logps``, or None
        log π_old. None is on-policy: ρ = 1, with the gradient of ρ.
    advantages : like ``logps``, or one per sequence: (B,), (S,), (B, 1), (S, 1), or a number for one sequence
        A. Packed, (1, N) is one per token, too; (S,) with S = N is refused unless all sequences have one token, since
        it could be either.
    ref_logps : like ``logps``, or None
        log π_ref; neither read nor checked without a ``kl``.
    mask : like ``logps``, bools or 0/1, or None
        Which tokens count. What any array holds elsewhere is never used; the gradient is 0 there.
    cu_seqlens : (S + 1,) ints, or None
        Where packed sequences begin and end: from 0, never falling, to N.
    surrogate : Clip, CISPO, SAPO or Unclipped; at sequence level also VESPO or GMPO
        The policy term.
    kl : K1, K2, K3 or None
        The KL term, with its β.
    importance_sampling_level : "token", "sequence" or "sequence_token"
        One ρ for each token, or one for each sequence, exp of the mean log-ratio (GSPO, arXiv:2507.18071, Eq. 7). At
        "sequence_token" that mean is a constant in the gradient, and each token has the gradient of its own A and
        weights (GSPO-token, section 4.3; what verl, SkyRL, slime and tunix call GSPO).
    rollout_is_weights : like ``advantages``, or None
        w, weights against the mismatch between trainer and sampler (truncated importance sampling); they scale the
        policy term only.
    loss_weights : like ``advantages``, not negative, or None
        u, weights of both terms; the denominators stay. See `prompt_mean_weights`.
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
    normalizer : float, in [0, inf), or None
        The denominator instead; 0 only where no token counts. One for all micro-batches, accumulation steps and ranks
        makes them add up: gradients are slices of the whole batch's, losses add to rounding.
    trust_region : TV, BinaryKL, Band or None
        Which tokens keep their policy term, and its gradient; the KL term and the denominators stay. None keeps all.
        It is held constant, and compares π_θ with ``old_logps``: on-policy nothing is dropped, but by a `Band` that
        leaves out 1.
    grad : bool, or array like ``logps`` of the dtype that computes
        Whether to compute the gradient, or where to write it.

    Returns
    -------
    LossResult
        ``loss``, ``grad`` (None unless asked for) and ``stats``, all diagnostics; `Stats` of parts of a batch add up to
        those of the whole, exactly. A sequence adds the same bits in whichever batch, padding or packing it stands, on
        any number of threads, on any CPU. Where no token counts, the loss is 0.

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
    if unknown:
        refuse_unknown(grpo_loss, unknown)
    options = Options(surrogate, kl, importance_sampling_level, aggregation, normalizer, trust_region)
    if kl is None:
        ref_logps = None
    elif ref_logps is None:
        raise ValueError("ref_logps must be given with a kl, got None")
    inputs = Inputs.of(
        logps, old_logps, advantages, ref_logps, mask, cu_seqlens, rollout_is_weights, loss_weights, grad
    )
    if type(surrogate) is GMPO:
        inputs.refuse_advantages_of_tokens()
    stats = _compute(inputs, options)
    return LossResult(stats.loss, inputs.place, stats)


# --- drivers ----------------------------------------------------------------------------------------------------------
def _compute(inputs: Inputs, options: Options) -> Stats:
    """The `Stats` of a batch; writes the gradient on the way."""
    batch = inputs.batch
    kl, weighting = kl_for_kernels(options.kl)
    terms = LossTerms(
        options.surrogate,
        options.trust_region,
        kl,
        weighting,
        denominator=math.nan if batch.grad is None else _denominator(batch, options),
        mean_within=options.mean_within,
        own_slopes=(options.importance_sampling_level == "sequence_token" or type(options.surrogate) in HELD_CONSTANT),
    )
    compute = _at_token_level if options.importance_sampling_level == "token" else _at_sequence_level
    with threads.tasks(2 * batch.logps.size) as tasks:  # a token costs what two samples of probabilities do
        accumulators = empty_accumulators(tasks)
        compute(batch, terms, accumulators)
    totals = merged(accumulators, numerator_apart=options.mean_within or batch.loss_weights is not None)
    if totals.suspect:
        refuse_if_not_finite(inputs)
    inputs.deliver_gradient()
    return Stats.of(options, totals, sequence_count=len(batch.bounds) - 1)


def _denominator(batch: Batch, options: Options) -> float:
    """What the aggregation divides the gradient by, for which it may have to count the unmasked tokens."""
    tokens = batch.logps.size
    matter = options.normalizer == 0 or (options.normalizer is None and options.aggregation == "token-mean")
    if matter and batch.mask is not None:
        tokens = int(np.count_nonzero(batch.mask))
    return options.denominator(tokens, len(batch.bounds) - 1)


def _at_token_level(batch: Batch, terms: LossTerms, accumulators: Array) -> None:
    """Add a batch to the accumulators, of which each is a task's, and write its gradient."""
    tasks = len(accumulators)
    if tasks == 1:
        arguments = (*batch, *terms, None, all_sequences(batch), batch.logps.size, accumulators)
        perform(token_level.token_level, arguments, tasks)
        return
    ranges, limit, long = ranges_of(batch, tasks)
    if len(long) < len(batch.bounds) - 1:  # there are others
        perform(token_level.token_level, (*batch, *terms, None, ranges, limit, accumulators), tasks)
    if long:
        spans = [_spans(batch, sequence, tasks, accumulators) for sequence in long]
        together = token_level.Spans(*(np.concatenate(column) for column in zip(*spans, strict=True)))
        numbers = np.arange(len(together.start) + 1, dtype=np.int64)
        each = np.column_stack((numbers[:-1], numbers[1:]))
        perform(token_level.token_level, (*batch, *terms, together, each, limit, accumulators), tasks)


def _at_sequence_level(batch: Batch, terms: LossTerms, accumulators: Array) -> None:
    """Add a batch to the accumulators, of which each is a task's, and write its gradient."""
    tasks = len(accumulators)
    if tasks == 1:
        arguments = (*batch, *terms, all_sequences(batch), batch.logps.size, accumulators)
        perform(sequence_level.sequence_level, arguments, tasks)
        return
    ranges, limit, long = ranges_of(batch, tasks)
    if len(long) < len(batch.bounds) - 1:  # there are others
        perform(sequence_level.sequence_level, (*batch, *terms, ranges, limit, accumulators), tasks)
    for sequence in long:
        extent = begin_long(batch, sequence, accumulators)
        if extent.tokens:
            collected = np.empty(blocks_in(extent.stop - extent.start), sequence_level.COLLECTED)
            perform(sequence_level.collect_long, (batch, terms, sequence, extent, collected, tasks), tasks)
            concluded = sequence_level.conclude_long(batch, terms, extent.tokens, collected, accumulators)
            coefficients = sequence_level.GradientCoefficients(*concluded)
            if batch.grad is not None:
                perform(sequence_level.spread_long, (batch, terms, coefficients, sequence, extent, tasks), tasks)


def _spans(batch: Batch, sequence: int, tasks: int, accumulators: Array) -> token_level.Spans:
    """A long sequence, begun, as spans of whole blocks: one for each task."""
    extent = begin_long(batch, sequence, accumulators)
    blocks = blocks_in(extent.stop - extent.start)
    cuts = extent.start + np.arange(tasks + 1, dtype=np.int64) * blocks // tasks * BLOCK
    stops = np.minimum(cuts[1:], extent.stop)
    of_each, tokens = (np.full(tasks, x, np.int64) for x in (sequence, extent.tokens))
    return token_level.Spans(of_each, cuts[:-1], stops, tokens)
