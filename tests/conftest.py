"""How Hypothesis is set for all tests, and which of them run. What they share is in ``helpers``."""

from hypothesis import settings

settings.register_profile("grpo_fast", deadline=None)  # the first example may compile
settings.load_profile("grpo_fast")


def pytest_collection_modifyitems(config, items):
    """What is exhaustive runs only if it is asked for by that name: ``-m slow`` leaves it out in slow files, too."""
    if config.option.markexpr and "exhaustive" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
