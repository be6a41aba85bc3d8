"""Where error is created in a trace, and what the mistake is.

    from tools.localize import localize

    found = localize("engine-dump", "path/to/model", tokens=(1, 2, 3))
    found.verdict  # "clean", "precision" or "fault"
    print(found)  # what the command prints

``pipeline`` is the way of a dump from its files to the result. ``measure`` finds how much error
each stage creates, ``formats`` the arithmetic that an engine computes in, ``mistakes`` what it does
wrong, ``cost`` what that does to the next token. ``explaining`` and ``grouping`` make findings and
faults of suspects, ``result`` is what came out and ``show`` prints it.
"""

from tools.localize.pipeline import localize
from tools.localize.result import Localization

__all__ = ["Localization", "localize"]
