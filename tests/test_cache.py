"""No stale machine code: a file whose functions Numba caches changes with the files that they inline."""

import hashlib
from pathlib import Path

import pytest

from grpo_fast import measure, objective_kernels, sequence_level, sweep_kernels, token_level

_OF_OBJECTIVE = ("elementary.py", "exact.py", "objective_runs.py", "simd.py", "staging.py")
_OF_LOSS = ("elementary.py", "exact.py", "loss_batch.py", "loss_terms.py", "simd.py", "staging.py", "terms.py")
INLINED_FILES = {
    objective_kernels: _OF_OBJECTIVE,
    sweep_kernels: _OF_OBJECTIVE,
    token_level: _OF_LOSS,
    sequence_level: _OF_LOSS,
    measure: ("simd.py",),
}


@pytest.mark.parametrize("module", INLINED_FILES, ids=lambda module: module.__name__)
def test_the_digest_is_that_of_the_inlined_files(module):
    folder = Path(module.__file__).parent
    text = b"".join((folder / name).read_bytes() for name in INLINED_FILES[module])
    digest = hashlib.sha256(text).hexdigest()[:16]
    assert digest == module.INLINED, f'write INLINED = "{digest}" in {module.__file__}'
