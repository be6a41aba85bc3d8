"""Dumps of other engines, collected by running them: a recorder, and one adapter an engine.

    from tools.collect import collect

    collect("llama.cpp", "model.gguf", "dump", prompt="The capital of France is", cache_k="q8_0")

A ``Recorder`` is for an engine of one's own. ``core`` runs an engine, ``session`` is what an
adapter of one has to be, ``options`` what can be set of it; ``files`` reads what other tools wrote.
"""

from tools.collect.core import collect
from tools.collect.recorder import Collected, Recorder

__all__ = ["Collected", "Recorder", "collect"]
