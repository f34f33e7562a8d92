"""What does a loss compute? `identify` says it in the words of `grpo_loss`, `check` whether it is what it should be.

The loss is called, not read: its policy term is measured along the ratio, its KL term along the distance from the
reference, its weights over batches of many shapes, and then everything is compared with
`grpo_fast.reference.grpo_loss`. Which file does what, each importing only from those above it::

    frameworks  signature  calling     a loss of NumPy, PyTorch or JAX → its value and gradient
    numbers  report                    numbers as they were meant; findings
    measuring  curves                  batches to measure weights with; one token along log ρ, value and gradient apart
    depth  precision  at_one           improbable tokens; few digits; where π_θ = π_old →
    surrogates  regions  slopes        which surrogate, which trust region, what is wrong with the gradient
    policy  kl_weights  kl  remainder  what is read: s(ρ, A), β·k, and what is there beside them;
    irregular  weights  floors         c_i: what it is, what is no product, constants that are none in larger batches;
    level  valued                      whose ratio; whether the value is averaged as its gradient is;
    masking  counted                   what leaks, and what is not counted though it is unmasked;
    alignment  advantages  penalised   arrays that are swapped or shifted; how advantages are taken
    cases  comparing  shrinking        the battery beside the reference
    naming  progress                   findings; the line on a terminal
    identifying  command               what the readings add up to; ``grpo-fast identify``
"""

from collections.abc import Callable, Mapping
from typing import Any

from .._checks import did_you_mean, flag, part_of
from ..terms import Options
from . import advantages, floors, identifying, naming
from .calling import CallFailed, Loss
from .cases import cases
from .comparing import checked, misses
from .frameworks import Framework
from .measuring import Normalizer
from .numbers import long_numbers
from .progress import Progress, progress_line
from .report import Finding, Report

__all__ = ["Finding", "Normalizer", "Report", "check", "identify"]


def identify(
    loss: Callable[..., Any],
    *,
    framework: Framework | None = None,
    device: Any = None,
    names: Mapping[str, str] | None = None,
    progress: bool | None = None,
) -> Report:
    """Return what a loss computes, as options of `grpo_loss`, and what it does wrong; a terminal sees the progress.

    The loss is called some thousand times with small batches. Nothing is assumed of its code: the bounds of the clip
    are where the measured curve bends, β is the factor of the measured KL.

    Parameters
    ----------
    loss : callable
        It takes any of ``logps``, ``old_logps``, ``advantages``, ``ref_logps``, ``mask`` by name, as arrays of its
        framework: (B, T), float64, ``advantages`` (B,) or (B, T), ``mask`` floats, or bools or int64 if it fails with
        those. It returns the loss, a scalar, or a tuple that begins with it. In NumPy it may return ``(loss, grad)``;
        of one that returns the loss alone the gradient is measured by central differences, which is that of the value,
        and only the values are compared.
    framework : "numpy", "torch" or "jax", optional
        What it is written in; found out unless given. The gradient is that of the framework's autograd.
    device : optional
        Where the tensors are to be, in torch.
    names : mapping, optional
        What the loss calls its arguments, where that is something else: ``{"logps": "log_prob", "mask":
        "response_mask"}``. What it takes besides must be bound, as by `functools.partial`, to something that fits any
        number of sequences and tokens.
    progress : bool, optional
        Whether a line on stderr says how far it is; unless given, if that is a terminal.

    Returns
    -------
    Report
        Its ``options`` are what the loss computes, ``findings`` what it does otherwise, ``ok`` whether nothing differs;
        it prints as a page. Numbers are read to seven digits or so, in batches of at most 65 rows, and of at most 130
        tokens in a row (more where a denominator is a constant): what a loss does beyond is not seen.

    Raises
    ------
    TypeError
        ``loss`` is not callable, takes other arguments, fails with all forms of these, answers in a format of 16 bits,
        or returns a gradient of another shape.
    ValueError
        ``framework`` is none of the three, or a key of ``names`` none of the arguments.
    ImportError
        ``framework`` is not installed.
    """
    called = Loss(loss, framework, device, names)
    with progress_line(f"identify {called.name}", lambda: called.calls, progress) as line:
        return _identified(called, line)


def check(
    loss: Callable[..., Any],
    *,
    strict: bool = False,
    framework: Framework | None = None,
    device: Any = None,
    names: Mapping[str, str] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Report:
    """Return whether a loss is `grpo_loss` with these options, on a battery of inputs; a terminal sees the progress.

    Loss and gradient are compared with `grpo_fast.reference.grpo_loss` in float64: ragged masks, padding left, right
    and between, an empty sequence, one token, advantages per token, ties at every bound of ρ, A = 0, log-ratios from
    1e-7 to 80, KL from 1e-7, NaN and infinity where masked, micro-batches, permuted and padded copies. They agree if
    they are no further apart than 32·eps·Σ c_i·S_i, eps that of the dtype of the loss: what the formula in a textbook
    can give. S is the size of a token's terms, (|s| + |∂s/∂logp|)·(1 + (|log ρ| + |log π_θ|)/32) + β·w·(e^(−l) + l² +
    |l| + 1), l = log π_θ − log π_ref and w = max(1, ρ) where ρ weighs the KL or its gradient, else 1. SAPO's s and
    slope count 1 + max(τ)·min(ρ, 10) times, VESPO's 1 + (k⁺ + λ⁺ + k⁻ + λ⁻)·min(1 + ρ, 20) times: the argument of their
    exp is rounded. In float32 the inputs are, too: the bound is 1 + max |log-probability| times as large.
    If anything differs, the loss is identified, so that the report can say what it is instead.

    Parameters
    ----------
    loss, framework, device, names, progress
        As in `identify`.
    strict : bool
        Whether ``ok`` wants nothing fragile, either.
    **options
        Keyword arguments of `grpo_loss`; ``normalizer`` may be a function of the mask.

    Returns
    -------
    Report
        ``assert report.ok, str(report)`` is a test (of what is no string pytest shows the beginning).

    Raises
    ------
    TypeError, ValueError
        As in `identify`; and an option is none of `grpo_loss`.
    """
    strict = flag("strict", strict)
    asked = _checked(options)
    called = Loss(loss, framework, device, names)
    with progress_line(f"check {called.name}", lambda: called.calls, progress) as line:
        return _checked_report(called, asked, strict, line)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options of a call, after `Options` has seen them."""
    for name in options:
        if name not in Options._fields:
            hint = part_of(name, Options._fields) or did_you_mean(name, Options._fields)
            known = ", ".join(Options._fields)
            raise TypeError(f"check takes the options {known} of grpo_loss, and strict, got {name!r}{hint}")
    checked(options)
    return options


def _identified(loss: Loss, line: Progress) -> Report:
    try:
        read = identifying.read(loss, line)
    except CallFailed as error:
        finding = Finding("differs", f"raises {error}", "ordinary numbers", "", error.at)
        return _report(loss, None, [finding], [])
    if read.options is None:
        return _report(loss, None, list(read.findings), list(read.notes))._replace(parts=read.parts)
    line.stage("comparing with the reference")
    missed, compared = misses(loss, read.options, cases(read.options, loss, read.per_token), line.tick)
    if long_numbers(read.options):  # they are not known to the last digit
        missed = [miss for miss in missed if miss.how != "differs slightly" and miss.case.kind != "tie"]
    findings = [*read.findings, *naming.of_misses(loss, read.options, missed, read.findings)]
    if any(x.severity == "differs" for x in findings) and not any(x.severity == "differs" for x in read.findings):
        findings = identifying.is_random(loss, 10) or findings
    report = _report(loss, read.options, findings, list(read.notes))
    return report._replace(compared=compared, disagreed=len(missed))


def _checked_report(loss: Loss, asked: dict[str, Any], strict: bool, line: Progress) -> Report:
    line.stage("comparing with the reference")
    try:
        per_token = advantages.read(loss).per_token
    except CallFailed:
        per_token = False
    missed, compared = misses(loss, asked, cases(asked, loss, per_token), line.tick)
    findings: list[Finding] = []
    notes: list[str] = []
    if missed:
        eps = loss.eps
        try:
            read = identifying.read(loss, line)
            if loss.eps != eps:  # it is computed in float32, whatever it answers in
                missed, compared = misses(loss, asked, cases(asked, loss, per_token), line.tick)
        except CallFailed as error:
            findings.append(Finding("differs", f"raises {error}", "ordinary numbers", "", error.at))
        else:
            findings += read.findings
            notes += read.notes
            serious = [m for m in missed if m.case.severity == "differs" and m.how in ("differs", "is not finite")]
            if read.options is not None and serious:
                among = cases(asked, loss, per_token)
                findings += naming.of_options(asked, read.options, loss.takes, among, read.findings)
            if not serious:  # what was read differs from the usual, not from what was asked for
                findings = [x for x in findings if x.severity == "fragile"]
        findings += naming.of_misses(loss, asked, missed, findings)
    if not any(finding.severity == "differs" for finding in findings):
        of_constant = floors.of_options(loss, asked)
        findings += of_constant.findings
        notes += of_constant.notes
    report = _report(loss, asked, findings, notes)
    return report._replace(compared=compared, disagreed=len(missed), strict=strict, asked=True)


def _report(loss: Loss, options: dict[str, Any] | None, findings: list[Finding], notes: list[str]) -> Report:
    unique = list({finding.what: finding for finding in reversed(findings)}.values())[::-1]
    unique.sort(key=lambda finding: finding.severity != "differs")
    if not loss.gives_gradient:
        notes = [*notes, "it returns no gradient: only the values are compared, and what it holds constant is unknown"]
    return Report(loss.name, loss.framework, loss.dtype, options, tuple(unique), tuple(notes))
