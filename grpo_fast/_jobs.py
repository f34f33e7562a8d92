"""What is computed of each batch of a file: `evaluation` and `sweeping` make the jobs of `evaluate` and `sweep`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ._advice import AdvisedError, Keywords
from ._checks import Array, flag, part_of
from ._columns import Form
from ._kernels.blocks import BLOCK
from .loss import grpo_loss
from .objective import grpo_stats, grpo_sweep
from .rollout import rollout_correction
from .rollout_terms import RolloutOptions, options_of
from .stats import Stats, Sweep
from .terms import BETA, EPSILON, K3, KL, Clip, Options

#: What is computed of a batch; None if there is nothing in it.
Job: TypeAlias = Callable[[dict[str, Array]], Any]

#: The arguments that only a KL term needs.
_PI, _REF = {"pi_theta_old", "pi_theta_ref"}, {"ref_logps"}
#: Of log-probabilities, those that no loss needs.
_SAMPLER = {"rollout_logps"}


class Corrected(NamedTuple):
    """The options of log-probabilities whose weights are between trainer and sampler."""

    options: Options
    correction: RolloutOptions


class Work(NamedTuple):
    """A job, and what it needs to know of the files."""

    job: Job
    unread: set[str]  # the arguments whose columns it does not need
    options: Options | Corrected | None  # of log-probabilities
    optional: tuple[str, ...] = ()  # arguments that are read only where a file has them, beside those always so


def evaluation(form: Form, *, options: dict[str, Any]) -> Work:
    """What `evaluate` computes, or the error for an option that is not one of that form."""
    if form is Form.PROBABILITIES:
        _refuse_others(options, "probability", ("epsilon", "beta", "importance_weighted"))
        clip = Clip(options.get("epsilon", EPSILON))
        k3 = K3(options.get("beta", BETA), flag("importance_weighted", options.get("importance_weighted", True)))
        return Work(partial(_stats_of_samples, epsilon=clip.epsilon, k3=k3), set() if k3.beta else _PI, None)
    _refuse_others(options, "log-probability", (*Options._fields, "rollout_correction"))
    correction = options.pop("rollout_correction", None)
    checked = Options(**options)
    unread = set() if checked.kl else _REF
    if correction is None:
        return Work(partial(_stats_of_tokens, options=checked), unread | _SAMPLER, checked)
    corrected = Corrected(checked, options_of(correction))
    return Work(partial(_stats_of_corrected_tokens, corrected=corrected), unread | {"rollout_is_weights"}, corrected)


def sweeping(form: Form, *, grid: tuple[tuple[float, ...], ...], options: dict[str, Any]) -> Work:
    """What `sweep` computes, likewise."""
    with_kl = any(grid[1])
    if form is Form.PROBABILITIES:
        _refuse_others(options, "probability", ("importance_weighted",))
        weighted = flag("importance_weighted", options.get("importance_weighted", True))
        of_samples = partial(_sweep_of_samples, grid=grid, importance_weighted=weighted)
        return Work(of_samples, set() if with_kl else _PI, None)
    by_level = ("importance_sampling_level", "aggregation", "normalizer", "trust_region")
    if "importance_weighted" in options:
        raise TypeError(
            "importance_weighted is an option of probability columns; of log-probability columns it is a part of kl: "
            f"kl=functools.partial(K3, importance_weighted={options['importance_weighted']!r})"
        )
    _refuse_others(options, "log-probability", ("epsilon_high", "delta", "kl", *by_level))
    term: Callable[[float], KL] = options.get("kl", K3)
    if not callable(term):
        raise TypeError(f"kl must be K1, K2, K3 or a function of β that returns one, got {term!r}")
    clips = [Clip(epsilon, options.get("epsilon_high"), options.get("delta")) for epsilon in grid[0]]
    kl = term(1.0) if with_kl else None
    checked = Options(clips[0], kl, **{name: options[name] for name in by_level if name in options})
    if kl is not None:
        _refuse_unless_one_term(term, kl, grid[1])
    job = partial(_sweep_of_tokens, grid=grid, clips=clips, options=checked)
    return Work(job, _SAMPLER if with_kl else _SAMPLER | _REF, checked)


def _refuse_unless_one_term(term: Callable[[float], KL], kl: KL, betas: Iterable[float]) -> None:
    """Raise the ValueError if ``term`` makes of a β that counts another term than ``kl``, which it makes of 1."""
    for beta in filter(None, betas):
        made, expected = term(beta), kl._replace(beta=beta)
        if made != expected:
            raise ValueError(
                f"kl must return the same KL term for every β, with that β: for {beta:g} {expected!r}, got {made!r}"
            )


def _refuse_others(options: Mapping[str, Any], kind: str, allowed: tuple[str, ...]) -> None:
    """Raise the TypeError for the first option that is not allowed, if any."""
    for name in options:
        if name not in allowed:
            raise TypeError(f"options of {kind} columns are {', '.join(allowed)}; got {name}{part_of(name, allowed)}")


def _stats_of_samples(arrays: dict[str, Array], *, epsilon: float, k3: K3) -> Stats | None:
    samples = _samples_of(arrays)
    if not samples[0].size:
        return None
    return grpo_stats(*samples, epsilon, k3.beta, importance_weighted=bool(k3.importance_weighted))


def _sweep_of_samples(
    arrays: dict[str, Array], *, grid: tuple[tuple[float, ...], ...], importance_weighted: bool
) -> Sweep | None:
    samples = _samples_of(arrays)
    return grpo_sweep(*samples, *grid, importance_weighted=importance_weighted) if samples[0].size else None


def _samples_of(arrays: dict[str, Array]) -> tuple[Array, Array, Any, Any]:
    """The arguments of `grpo_stats`, None for probabilities that were not read."""
    return arrays["rhos"], arrays["A"], arrays.get("pi_theta_old"), arrays.get("pi_theta_ref")


def _stats_of_tokens(arrays: dict[str, Array], *, options: Options) -> Stats:
    return _stats_by_options(arrays, [options])[0]


def _stats_of_corrected_tokens(arrays: dict[str, Array], *, corrected: Corrected) -> Stats:
    arrays, flat = _with_bounds(arrays)
    old = arrays.get("old_logps", arrays["logps"])  # on-policy, they are the same
    keywords: dict[str, Any] = {name: arrays[name] for name in ("mask", "cu_seqlens") if name in arrays}
    keywords |= corrected.correction._asdict()
    sampler = arrays.pop("rollout_logps", None)
    if sampler is None:  # `with_sampler` has seen to it that only shards of empty lists lack it
        sampler = np.full(old.shape, np.nan)
    weights, _, rollout = rollout_correction(old, sampler, **keywords)
    stats = _stats_by_options(arrays | {"rollout_is_weights": weights}, [corrected.options])[0]
    if flat:
        stats, rollout = replace(stats, sequence_count=None), rollout.without_sequences()
    return replace(stats, rollout=rollout)


def _sweep_of_tokens(arrays: dict[str, Array], *, grid: Any, clips: list[Clip], options: Options) -> Sweep:
    by_epsilon = [options._replace(surrogate=clip, kl=None) for clip in clips]
    by_epsilon[0] = by_epsilon[0]._replace(kl=options.kl)  # the KL term is the same for every ε
    results = _stats_by_options(arrays, by_epsilon)
    first = results[0]
    # Of a clip whose sides differ, if there is one: where ε_high is given, those of some ε may be equal by chance.
    clip = next((clip for clip in clips if clip.epsilon != clip.epsilon_high), clips[0])
    return Sweep(
        grid=grid,
        options=first.options._replace(surrogate=clip),
        tokens=first.tokens,
        sequence_count=first.sequence_count,
        surrogate_numerators=tuple(stats.numerator.surrogate for stats in results),
        kl_numerator=first.numerator.kl,
        kl_sum=first.sums.kl,
        clipped_low=tuple(stats.clipped.low for stats in results),
        clipped_high=tuple(stats.clipped.high for stats in results),
    )


def _stats_by_options(arrays: dict[str, Array], several: Iterable[Options]) -> list[Stats]:
    """The Stats of a batch of tokens under each of several options."""
    arrays, flat = _with_bounds(arrays)
    batch: dict[str, Any] = {"old_logps": None, **arrays}
    results = [grpo_loss(**batch, **options._asdict()).stats for options in several]
    return [replace(stats, sequence_count=None) for stats in results] if flat else results


def _with_bounds(arrays: dict[str, Array]) -> tuple[dict[str, Array], bool]:
    """The arrays, copied, with ``cu_seqlens``; and whether the columns are flat, which do not say where they are.

    Then blocks are sequences, so that a mask does not move them, wherever a batch begins.
    """
    if "cu_seqlens" in arrays:
        return arrays.copy(), False
    size = arrays["logps"].size
    return arrays | {"cu_seqlens": np.append(np.arange(0, size, BLOCK, dtype=np.int64), size)}, True


def refuse_sequences(name: str, options: Options | Corrected) -> None:
    """Raise the error for options that need sequences, where the columns are flat."""
    if isinstance(options, Corrected):
        if options.correction.needs_sequences:
            raise ValueError(
                f"{name}: the columns are flat, which does not say where sequences begin: rollout_correction must be "
                "at level 'token', and so must what it rejects. For the others, store each sequence as a list"
            )
        options = options.options
    if options.importance_sampling_level != "token" or options.aggregation not in ("token-mean", "token-sum"):
        raise AdvisedError(
            "{name}: the columns are flat, which does not say where sequences begin: take {mean} or {sum}, at token "
            "level, got {given}. For the others, store each sequence as a list",
            {
                "name": name,
                "mean": Keywords({"aggregation": "token-mean"}),
                "sum": Keywords({"aggregation": "token-sum"}),
                "given": Keywords(
                    {
                        "importance_sampling_level": options.importance_sampling_level,
                        "aggregation": options.aggregation,
                    }
                ),
            },
        )
