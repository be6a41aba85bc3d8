"""Where error is created in a trace, and what the mistake is.

    from tools.localize import localize

    found = localize("engine-dump", "path/to/model", tokens=(1, 2, 3))
    found.verdict  # "clean", "precision" or "fault"
    print(found)  # what the command prints

``core`` measures and judges, ``stage_replay`` is one stage to be explained, ``catalogue`` the known
mistakes, ``shapes`` what else may explain an error, ``formats`` the arithmetic of engines with the
roundings of ``emulated``, ``fitting`` finds which of it is used, ``diagnose`` puts all of it to
work, ``report`` and ``show`` say what came out.
"""

from tools.localize.core import localize
from tools.localize.report import Localization

__all__ = ["Localization", "localize"]
