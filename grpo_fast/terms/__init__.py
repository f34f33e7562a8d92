"""The options as values: policy terms (``Clip`` …), trust regions (``TV`` …), KL terms (``K1`` …); and ``Options``.

A term is a NamedTuple; one whose fields are floats is read by Numba as it is, which compiles one kernel for each class,
while the numbers stay run-time values. (Of a KL term a kernel reads what `_kernels.formulas.kl_for_kernels` makes of
it.) Every way to make one (call, ``_replace``, copy, unpickle) goes through its constructor, so a kernel never meets an
invalid term, nor a None or an int that would make it another type. It prints as it is called, with as little as makes
it again: ``K3(beta=0.04)``.

::

    options                               `Options`: what goes together, and what a sum is divided by
    surrogates  trust_regions  kl_terms   s(ρ, A), M and k(l), with their formulas and sources
    option                                what all of them share

Notation, per token: ρ = π_θ/π_old (for a whole sequence at sequence level), A the advantage, l = log π_θ − log π_ref.
"""

from .kl_terms import BETA, K1, K2, K3, KL, KL_GRADIENTS, ImportanceWeighted, KLGradient
from .options import AGGREGATIONS, LEVELS, Aggregation, Level, Options
from .surrogates import CISPO, DEFAULT_SURROGATE, EPSILON, GMPO, SAPO, VESPO, Clip, Surrogate, Unclipped
from .trust_regions import TV, Band, BinaryKL, TrustRegion

__all__ = [
    "AGGREGATIONS",
    "BETA",
    "CISPO",
    "DEFAULT_SURROGATE",
    "EPSILON",
    "GMPO",
    "K1",
    "K2",
    "K3",
    "KL",
    "KL_GRADIENTS",
    "LEVELS",
    "SAPO",
    "TV",
    "VESPO",
    "Aggregation",
    "Band",
    "BinaryKL",
    "Clip",
    "ImportanceWeighted",
    "KLGradient",
    "Level",
    "Options",
    "Surrogate",
    "TrustRegion",
    "Unclipped",
]
