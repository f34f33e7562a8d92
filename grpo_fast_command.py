"""The console script ``grpo-fast``: so little that Ctrl-C is one line while all else is still being imported, too."""

import sys
from typing import Never


def command() -> Never:
    """Run `grpo_fast.__main__.command`."""
    try:
        from grpo_fast.__main__ import command as run
    except KeyboardInterrupt:
        print("grpo-fast: interrupted", file=sys.stderr)
        sys.exit(130)
    run()
