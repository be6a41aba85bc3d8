"""From an engine's model file to its verdict: two commands, on a model of 0.5B."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from qwen_jax import open_model
from tests import ggml
from tests.field import models
from tests.field.runs import Row

MODEL = "synthetic:0.5b"


def write(path: Path) -> Path:
    """Random weights of the size of Qwen2.5-0.5B in Q8_0: its 896 channels are no blocks of 256."""
    weights = open_model(MODEL)
    raw = models.config() | weights.config.to_json()
    raw |= {"model_type": "qwen2", "head_dim": weights.config.head_dim}
    into = ggml.writer(path, raw)
    into.add_tokenizer_model("none")
    for name in weights.shapes:
        value = np.asarray(weights.read(name)).astype(np.float32)
        ggml.add_tensors(into, raw, {name: value}, "Q8_0")
    ggml.finish(into)
    return path


def run(made: models.Models) -> Row:
    path, trace = write(made.directory / "large.gguf"), made.directory / "large"
    told = []
    begun = time.monotonic()
    for words in (
        ["tools.collect", "llama.cpp", path, "--tokens", "random:16", "--out", trace],
        ["tools.localize", trace, "--model", path],
    ):
        start, before = time.monotonic(), _processor_seconds()
        command = [sys.executable, "-m", *map(str, words)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        wall, used = time.monotonic() - start, _processor_seconds() - before
        told.append(f"{words[0]} {wall:.0f} s, of processors {used:.0f} s")
    seconds = round(time.monotonic() - begun, 1)  # of a clock: the figure that is promised
    says = f"{'; '.join(told)}; load average {os.getloadavg()[0]:.0f}"
    verdict = done.stdout.partition(":")[0]
    return Row("timing", MODEL, "llama.cpp", "Q8_0", "", 16, 1, verdict, says, seconds=seconds)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
