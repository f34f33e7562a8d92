"""How Hypothesis is set for all tests. What they share is in ``helpers``."""

from hypothesis import settings

settings.register_profile("grpo_fast", deadline=None)  # the first example may compile
settings.load_profile("grpo_fast")
