"""Dumps of other engines, collected by running them: a recorder, and one adapter an engine.

from tools.collect import Recorder
"""

from tools.collect.recorder import Recorder

__all__ = ["Recorder"]
