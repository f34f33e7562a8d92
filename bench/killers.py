"""What `mutants` needs to be told: which tests hold what a file promises, and which changes make nothing wrong."""

from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "grpo_fast"

PROBABILITIES = "test_example test_bad_input test_against_reference test_same_bits test_adding test_arrays"
LOSS = "test_loss test_loss_bad_input test_loss_same_bits"
CORRECTION = "test_rollout test_rollout_same_bits test_rollout_bad_input"
CONFORMANCE = "test_conformance_battery test_conformance_calling test_conformance"
FILES = "test_files test_files_bad_input test_files_edges test_by test_files_rollout test_bounded_memory test_executors"
#: For each file the recorded cases that show what it computes, by their first words, and the tests of what it promises.
KILLERS = {
    "_kernels/elementary.py": (("objective", "stats", "loss"), f"test_elementary {PROBABILITIES} {LOSS}"),
    "_kernels/simd.py": (("objective", "stats", "sweep", "loss"), f"test_simd {LOSS} {PROBABILITIES}"),
    "_kernels/sums.py": (("stats", "loss"), f"test_adding {PROBABILITIES} {LOSS}"),
    "_kernels/exact.py": (("stats", "loss"), "test_adding test_same_bits test_loss_same_bits test_against_reference"),
    "_kernels/blocks.py": (("objective", "stats", "loss"), f"{PROBABILITIES} {LOSS}"),
    "_kernels/samples.py": (("objective", "stats", "sweep"), PROBABILITIES),
    "_kernels/sample_blocks.py": (("objective", "stats"), PROBABILITIES),
    "_kernels/sweep_blocks.py": (("sweep",), PROBABILITIES),
    "_kernels/tokens.py": (("loss",), f"{LOSS} test_fuzz"),
    "_kernels/runs.py": (("loss",), f"{LOSS} test_fuzz"),
    "_kernels/ways.py": (("loss",), f"{LOSS} test_elementary"),
    "_kernels/tasks.py": (
        ("objective", "sweep", "loss"),
        "test_same_bits test_threads_and_processes test_loss_same_bits",
    ),
    "_kernels/formulas.py": (("loss",), LOSS),
    "_kernels/penalties.py": (("loss",), LOSS),
    "_kernels/token_level.py": (("loss",), LOSS),
    "_kernels/sequence_level.py": (("loss",), LOSS),
    "_kernels/rollout.py": (("correction",), f"{CORRECTION} test_fuzz"),
    "_kernels/rollout_sums.py": (("correction",), CORRECTION),
    "_shares.py": (("loss", "correction"), "test_integers test_loss_same_bits test_rollout_same_bits"),
    "rollout.py": (("correction",), f"{CORRECTION} test_fuzz test_torch_rollout"),
    "rollout_masks.py": ((), "test_rollout test_rollout_bad_input test_torch_rollout"),
    "rollout_stats.py": (("correction",), f"{CORRECTION} test_files_rollout"),
    "rollout_terms.py": ((), f"{CORRECTION} test_files_rollout test_fuzz"),
    "loss.py": (("loss",), f"{LOSS} test_fuzz"),
    "objective.py": (("objective", "stats", "sweep"), f"{PROBABILITIES} test_fuzz"),
    "stats.py": (("stats", "sweep", "loss"), f"{PROBABILITIES} {LOSS} test_files test_printing"),
    "_additive.py": (("stats", "sweep", "correction"), "test_adding test_files test_files_rollout test_printing"),
    **{
        f"terms/{name}.py": ((), f"test_terms {LOSS} test_bad_input test_fuzz test_printing")
        for name in ("option", "options", "surrogates", "trust_regions", "kl_terms")
    },
    "advantages.py": ((), "test_group_advantages test_other_advantages test_fuzz"),
    "_groups.py": ((), "test_group_advantages test_other_advantages test_fuzz"),
    "_checks.py": (
        (),
        f"test_arrays test_bad_input test_loss_bad_input test_group_advantages test_hints test_fuzz {LOSS}",
    ),
    "_loss_inputs.py": ((), f"test_loss_bad_input test_hints test_fuzz {LOSS}"),
    "_kernels/threads.py": (
        ("stats",),
        "test_threads_and_processes test_same_bits test_loss_same_bits test_files test_host",
    ),
    "_kernels/cache.py": ((), "test_cache_folder test_cache test_host"),
    "_kernels/own_stack.py": ((), "test_host test_cache test_threads_and_processes"),
    "_kernels/float_mode.py": ((), "test_host"),
    "_kernels/notices.py": ((), "test_announcing test_cache test_host"),
    "_kernels/cache_folder.py": ((), "test_cache_folder test_cache"),
    "_kernels/compiling.py": (("objective", "loss"), "test_host test_cache test_threads_and_processes test_simd"),
    "reference.py": (
        (),
        "test_reference_loss test_trust_region test_variants test_rollout test_loss test_against_reference",
    ),
    "prompt_weights.py": ((), "test_prompt_weights test_bad_input"),
    **{file: ((), FILES) for file in ("files.py", "_columns.py", "_formats.py", "_layouts.py", "_plan.py")},
    **{file: ((), FILES) for file in ("_rollouts.py", "_jobs.py", "_workers.py", "_summing.py", "_arrow.py")},
    **{file: ((), f"test_inputs {FILES}") for file in ("_paths.py", "_sources.py", "_directories.py")},
    "_json_lines.py": ((), f"test_inputs {FILES}"),
    "_keys.py": ((), f"test_by {FILES}"),
    "_histograms.py": ((), f"test_histogram test_run_pictures {FILES}"),
    "_worst.py": ((), f"test_worst {FILES}"),
    "_writer.py": ((), "test_writer test_whole_way"),
    "_atomic.py": ((), "test_writer test_whole_way test_run_pictures"),
    **{
        f"conformance/{path.name}": ((), f"{CONFORMANCE} test_conformance_planted")
        for path in sorted((PACKAGE / "conformance").glob("*.py"))
        if path.name != "progress.py"
    },
}


#: Changes that make nothing wrong: what their line begins with, and what is changed (anything if that is empty).
HARMLESS = [
    ("_INLINED =", ""),  # how it is compiled
    ("WORTH_SHARING = 1 << 16", ""),  # by whom, the bits do not tell
    ("_LONG = 1 << 16", ""),
    ("_RANGES = 16", ""),
    ("vanishing=-104.0", "104.0"),  # from −103.98 on, float32 has nothing but 0
    ("LIMBS = 68", ""),  # of more, the last are 0
    ("_SEARCH = 1 << 16", ""),  # how much is looked at at once
    ("if type(array) is np.ndarray and array.dtype is dtype", ""),  # the shorter of two ways
    ("std = unit * np.std(", "0.0"),  # divides only zeros
    ("if array.dtype.kind not in", "8"),  # no dtype has 9 bytes
    ("if values is None or isinstance(values, (list, tuple))", "or"),  # no memory that is shared
    ("weights_per_token, weights = True, None", "True"),  # nobody asks of what there is not
    ("_FOLLOW_NO_LINK = getattr(", "0"),  # for systems that have no such flag
    ("_DO_NOT_WAIT = getattr(", "0"),
    ("def open(self, name: str, mode: str, permissions: int = 0)", ""),  # to read, nothing is made
    ("elif name.endswith(_TEMPORARY) and", "<"),  # a day to the nanosecond
    ("print(_LINE, file=sys.stderr, flush=True)", "True"),  # it is written line by line anyway
    ("_LEAST_BYTES = 2 << 20", ""),  # how much is read at once
    ("for shape in ((1, 5), (4, 1), (3, 3), (2, 7)):", ""),  # of random batches
    ("self.width = 1", "1"),  # set before it is asked for
    ("at = batch(np.full(shape, -1.0), advantages=0.0 if name", "0.0"),  # with A = 1 the example shows it as well
    ("if any(tokens.of(0.0, -1.0)):", "0.0"),  # at any other ratio it shows as well
    ("prefetch_if_given(", ""),  # the same numbers, later
    ("if careful or lane_max(ratio_max) >= 1.0 / form.safe_least", ""),  # the more careful of two ways, sooner
    ("ln2_low=9.0580006145e-06", ""),  # of float32, whose logs move by 0.02 ulp at most
    ("k = where(a < 0.0,", "0.0"),  # A is 1, −1, or 0, for which there is no ratio
    ("slope = where(a < 0.0, full_like(rho, surrogate.lambda_neg)", "0.0"),
    ("old, rollout = where(old > 0.0, zero, old)", ">"),  # 0 in place of 0
]
