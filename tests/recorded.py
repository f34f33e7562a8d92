"""One set of inputs and the bits that every machine is to make of them: ``recorded.json``, and how it is read.

A case is named after what is called, on which data, in which dtype, on how many samples. ``different`` computes cases
and tells what is not as recorded. The inputs are float64 numbers in hex, which larger cases repeat: their number is
prime, so that each comes to stand in each lane.

``python tests/recorded.py`` compares all cases, says so as it goes, and fails if anything differs. It takes two minutes
or more where the kernels must be compiled, else some seconds. With ``--write`` it records the results anew, of all
cases or of those named, and whoever does that with old ones changes what was promised.
"""

import argparse
import hashlib
import itertools
import json
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np

sys.path.append(str(Path(__file__).with_name("helpers")))  # where pytest does not do it

from combinations import COMBINATIONS, REGIONS, TOKEN, VARIANTS

from grpo_fast import (
    K3,
    Reject,
    RolloutStats,
    Sweep,
    grpo_loss,
    grpo_objective,
    grpo_stats,
    grpo_sweep,
    rollout_correction,
)
from grpo_fast.rollout_stats import ROLLOUT_KEYS
from grpo_fast.stats import KEYS

PATH = Path(__file__).with_name("recorded.json")
PROBABILITIES = "rhos", "A", "pi_theta_old", "pi_theta_ref"
MANY = 70_003  # enough for the parallel driver
LENGTHS = [0, 1, 7, 8, 9, 16, 17, 31, 33, 129]
LONG = [*LENGTHS, MANY]  # of which one is shared out among the threads
SHORT = LENGTHS * 300  # enough to be dealt to them
IN_PARALLEL = [19, 21, 27]  # combinations that are, too; padded and packed
SHOWN = 20  # of the differences
CORRECTIONS = {  # of each kernel one, and of each rule
    "token": {"normalize": True},
    "token, rejected": {"mode": "mask", "lower": 0.8, "reject": [Reject("ratio", "token", 0.7, 1.4)]},
    "sequence": {"level": "sequence", "mode": "raw", "reject": [Reject("k2", "seq_mean", upper=0.02)]},
    "geometric": {
        "level": "geometric",
        "reject": [Reject("k3", "token", upper=0.05), Reject("ratio", "geometric", 0.9)],
    },
}


@cache
def recording():
    return json.loads(PATH.read_text(encoding="utf-8"))


@cache
def inputs(kind):
    """The recorded arrays of a kind, by name."""
    found = recording()["inputs"][kind]
    return {name: np.frombuffer(bytes.fromhex("".join(lines)), ">f8").astype(float) for name, lines in found.items()}


# --- the cases --------------------------------------------------------------------------------------------------------
def of_samples(function, kind, dtype, n, weighted, each):
    """What one of the three functions of probabilities finds in n samples."""
    data = inputs(f"{kind} {dtype}" if kind == "extreme" else kind)
    arrays = [each(np.resize(data[name], n).astype(dtype)) for name in PROBABILITIES]
    option = {"importance_weighted": weighted}
    if function == "objective":
        betas = (0.01, 0) if weighted else (0.01,)  # without a KL term there is no difference
        return {f"beta={beta}": grpo_objective(*arrays, beta=beta, **option).hex() for beta in betas}
    if function == "stats":
        return spelled(grpo_stats(*arrays, **option))
    sweep = grpo_sweep(*arrays, [0.05, 0.2, 0.3], [0, 0.04], **option)
    objective = {f"objective {i}": x.hex() for i, x in enumerate(sweep.objective.ravel().tolist())}
    return objective | {"exact sums": digest(sums(sweep).encode())}


def of_tokens(number, kind, lengths, each):
    """What grpo_loss finds with a combination of options."""
    return of_row(COMBINATIONS[number], kind, lengths, each)


def of_region(number, kind, lengths, each):
    """What it finds with a trust region."""
    trust_region, row = REGIONS[number]
    return of_row(row, kind, lengths, each, trust_region=trust_region)


def of_variant(number, kind, lengths, each):
    """What it finds with what else there is."""
    trust_region, row = VARIANTS[number]
    return of_row(row, kind, lengths, each, trust_region=trust_region)


def of_row(row, kind, lengths, each, **options):
    """What it finds with the options of a row, and others."""
    arguments = {name: each(x) if isinstance(x, np.ndarray) else x for name, x in call(row, kind, lengths)}
    result = grpo_loss(**arguments, **options)
    found = {"loss": result.loss.hex(), **spelled(result.stats)}
    if result.grad is not None:
        found["grad"] = digest(result.grad.astype(result.grad.dtype.newbyteorder("<")).tobytes())
    return found


def of_overflows(level, dtype, each):
    """What grpo_loss finds where the slopes of both terms overflow: ∞ − ∞ in the gradient, a NaN."""
    huge = float(np.finfo(dtype).max)
    arrays = [[[-1], [-1]], [[-2], [-41]], [[1], [-huge]], [[-2], [79]]]
    result = grpo_loss(
        *(each(np.array(x, dtype)) for x in arrays), kl=K3(huge / 1e8), importance_sampling_level=level, grad=True
    )
    return {"grad": result.grad.astype(result.grad.dtype.newbyteorder(">")).tobytes().hex()}


def of_corrections(number, kind, dtype, lengths, each):
    """What rollout_correction finds; the reference policy stands in for the sampler, some of it is missing."""
    data, n = inputs(kind), sum(lengths)
    old, rollout = (np.resize(data[name], n).astype(dtype) for name in ("old_logps", "ref_logps"))
    rollout[::13] = np.nan
    mask = np.resize(data["mask"] == 1, n)
    old[~mask] = np.nan
    cuts = np.append(0, np.cumsum(lengths))
    options = list(CORRECTIONS.values())[number]
    result = rollout_correction(each(old), each(rollout), mask=each(mask), cu_seqlens=each(cuts), **options)
    little_endian = result.weights.dtype.newbyteorder("<")
    found = {"weights": digest(result.weights.astype(little_endian).tobytes()), "mask": digest(result.mask.tobytes())}
    found |= {key: float(getattr(result.stats, name)).hex() for key, name in ROLLOUT_KEYS.items()}
    return found | {"exact sums": digest(sums(result.stats).encode())}


def call(row, kind, lengths):
    """The arguments of a call with a row's options; NaN wherever something is masked."""
    data, n = inputs(kind), np.array([sum(lengths)] if row.layout == "plain" else lengths)
    keep, where = np.ones(n.sum(), bool), np.arange(n.sum())
    if row.layout in ("padded", "holes"):
        keep = np.resize(data["mask"] == 1, n.sum())
    if row.layout == "padded":
        width = int(n.max()) + 2
        begin = np.arange(n.size) % (width - n + 1)
        where = np.concatenate([i * width + begin[i] + np.arange(k) for i, k in enumerate(n)])
        keep, where = np.zeros(n.size * width, bool), where[keep]
        keep[where] = True
    shape = (n.size, -1) if row.layout == "padded" else -1

    def tokens(name):
        full = np.full(keep.size, np.nan)
        full[keep] = np.resize(data[name], n.sum())[: keep.sum()]
        return full.astype(row.dtype).reshape(shape)

    def values(name, per):
        return tokens(name) if per == TOKEN else np.resize(data[name], n.size).astype(row.dtype)

    yield "logps", tokens("logps")
    yield "old_logps", None if row.on_policy else tokens("old_logps")
    yield "advantages", values("advantages", row.advantages)
    yield "ref_logps", None if row.kl is None else tokens("ref_logps")
    yield "rollout_is_weights", None if row.weights is None else values("rollout_is_weights", row.weights)
    # Of the same numbers, which are not negative.
    yield "loss_weights", None if row.loss_weights is None else values("rollout_is_weights", row.loss_weights)
    yield "mask", keep.reshape(shape) if row.layout in ("padded", "holes") else None
    yield "cu_seqlens", np.append(0, np.cumsum(n)) if row.layout in ("packed", "holes") else None
    yield from {"surrogate": row.surrogate, "kl": row.kl, "importance_sampling_level": row.level}.items()
    yield from {"aggregation": row.aggregation, "normalizer": row.normalizer, "grad": bool(row.grad)}.items()


def spelled(stats):
    """All that is said of a batch."""
    names = {key: name for key, name in KEYS.items() if key != "trust_region_ratio" or stats.options.trust_region}
    numbers = {key: float(getattr(stats, name)).hex() for key, name in names.items()}
    return numbers | {"exact sums": digest(sums(stats).encode())}


def sums(stats):
    """All that is added up exactly, as text."""
    if isinstance(stats, Sweep):
        values = [*stats.surrogate_numerators, stats.kl_numerator, stats.kl_sum]
    elif isinstance(stats, RolloutStats):
        values = stats.sums
    else:
        found = stats.sums
        values = [found.surrogate, found.kl, *stats.numerator, found.ratio, found.ratio_squared, found.log_ratio]
    return " ".join(f"{x.units:x}:{x.special}" for x in values)


def digest(data):
    return hashlib.sha256(data).hexdigest()[:32]


CASES = {
    **{
        f"{function} {kind} {dtype} {n}{how}": (of_samples, function, kind, dtype, n, not how)
        for how, function, kind, dtype, n in itertools.product(
            ("", " unweighted"),
            ("objective", "stats", "sweep"),
            ("near", "far", "extreme"),
            ("f8", "f4"),
            (5, 127, MANY),
        )
    },
    **{
        f"loss {kind} {number}": (of_tokens, number, kind, LENGTHS)
        for kind, number in itertools.product(("usual", "unusual"), range(len(COMBINATIONS)))
    },
    **{
        f"loss region {kind} {number}": (of_region, number, kind, LENGTHS)
        for kind, number in itertools.product(("usual", "unusual"), range(len(REGIONS)))
    },
    **{
        f"loss variant {kind} {number}": (of_variant, number, kind, LENGTHS)
        for kind, number in itertools.product(("usual", "unusual"), range(len(VARIANTS)))
    },
    **{f"loss usual {number} long": (of_tokens, number, "usual", LONG) for number in IN_PARALLEL},
    **{f"loss usual {number} short": (of_tokens, number, "usual", SHORT) for number in IN_PARALLEL},
    **{
        f"loss overflowing {level} {dtype}": (of_overflows, level, dtype)
        for level, dtype in itertools.product(("token", "sequence"), ("f8", "f4"))
    },
    **{
        f"correction {kind} {number} {dtype} {len(lengths)}": (of_corrections, number, kind, dtype, lengths)
        for kind, number, dtype in itertools.product(("usual", "unusual"), range(len(CORRECTIONS)), ("f8", "f4"))
        for lengths in ([LENGTHS, LONG] if kind == "usual" else [LENGTHS])
    },
}


# --- the comparison ---------------------------------------------------------------------------------------------------
def computed(case, each=np.asarray):
    function, *arguments = CASES[case]
    return function(*arguments, each)


def different(cases=CASES, each=np.asarray):
    """What is not as recorded; ``each`` is done to all arrays before they are handed over."""
    for case in cases:
        expected, found = recording()["results"][case], computed(case, each)
        for name in expected | found:
            if expected.get(name) != found.get(name):
                yield f"{case}: {name} is {found.get(name)}, recorded is {expected.get(name)}"


def groups(cases):
    """The cases by what is called, on which kind of data; in their order."""
    for name, group in itertools.groupby(cases, key=lambda case: " ".join(case.split()[:2])):
        yield name, list(group)


def compare(cases, until_first=False):
    """Compare cases and return all that is different, or the first of it.

    Prints a line for each group of cases, on it a dot for each case.
    """
    found = []
    for name, group in groups(cases):
        print(f"{name}, {len(group)} cases ", end="", flush=True)
        begin, before = time.perf_counter(), len(found)
        for case in group:
            found += different([case])
            print(".", end="", flush=True)
            if found and until_first:
                break
        count = len(found) - before
        print(f" {f'{count} DIFFERENT' if count else 'the same'}, {time.perf_counter() - begin:.1f} s")
        if found and until_first:
            return found[:1]
    return found


def record(cases):
    """Record what this process computes in these cases; what is recorded of others stays, if they are still there."""
    results = {}
    for name, group in groups(cases):
        print(f"{name}, {len(group)} cases", flush=True)
        results |= {case: computed(case) for case in group}
    before = recording()["results"]
    every = {case: results.get(case, before.get(case)) for case in CASES if case in results or case in before}
    PATH.write_text(json.dumps(recording() | {"results": every}, indent=1) + "\n", encoding="utf-8")
    print(f"recorded {len(results)} cases in {PATH}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only cases whose names begin with one of these")
    parser.add_argument("--first", action="store_true", help="stop where something differs first")
    parser.add_argument("--write", action="store_true", help="record what this process computes")
    arguments = parser.parse_args()
    cases = [case for case in CASES if case.startswith(tuple(arguments.words) or "")]
    if not cases:
        parser.error(f"no case begins with {' or '.join(arguments.words)}")
    if arguments.write:
        record(cases)
        return
    begin = time.perf_counter()
    found = compare(cases, arguments.first)
    if not found:
        print(f"all the same: {len(cases)} cases in {time.perf_counter() - begin:.0f} s")
        return
    print(*found[:SHOWN], *([f"… and {len(found) - SHOWN} more"] if len(found) > SHOWN else []), sep="\n")
    raise SystemExit(f"NOT the same: {len(found)} results differ from what was recorded")


if __name__ == "__main__":
    main()
