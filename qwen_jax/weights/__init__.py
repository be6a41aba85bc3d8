"""Where weights come from: every form of a model that ``--model`` takes, behind one interface.

A form is a class of ``base.Weights`` that gives rows of a tensor on request. ``FORMS`` lists them;
a new one is a module here and a line in that list. Imports neither jax nor torch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from qwen_jax.weights import gguf, huggingface, orbax, synthetic
from qwen_jax.weights.base import Weights
from qwen_jax.weights.gguf_file import is_gguf
from stages.errors import UserError, called

DEMO = Path(__file__).parents[1] / "demo"
UNFINISHED = "CONVERTING"  # the file that marks a directory in which tools.convert is at work


class Form(NamedTuple):
    """One form of a model.

    Attributes:
        spec: how ``--model`` names it, for people.
        says: what that is.
        accepts: whether a spec names a model of this form.
        open: the model that a spec names.
    """

    spec: str
    says: str
    accepts: Callable[[str], bool]
    open: Callable[[str], Weights]


def _demo(spec: str) -> Weights:
    return huggingface.HuggingFaceWeights(DEMO, "demo")


# The first form that accepts a spec opens it; the last one accepts everything.
FORMS = (
    Form("demo", "the embedded demo model", lambda spec: spec == "demo", _demo),
    Form(
        "synthetic:SIZE",
        f"random weights in the published size {', '.join(synthetic.size_names())} "
        "(synthetic:7b:2 is its first 2 layers)",
        lambda spec: spec.startswith(synthetic.PREFIX),
        synthetic.open_synthetic,
    ),
    Form(
        "FILE.gguf",
        "a GGUF file (of a split model the first)",
        lambda spec: is_gguf(Path(spec)),
        lambda spec: gguf.GgufWeights(Path(spec)),
    ),
    Form(
        "DIR",
        "a directory that tools.convert has made",
        lambda spec: orbax.is_orbax(Path(spec)),
        lambda spec: orbax.OrbaxWeights(Path(spec)),
    ),
    Form(
        "DIR|HUB_ID",
        "a Hugging Face directory or hub id",
        lambda spec: True,
        huggingface.open_directory_or_hub,
    ),
)


def open_model(spec: str | Path | None = None) -> Weights:
    """The weights that ``spec`` names, as ``--model`` does: None is the demo model.

    Raises:
        UserError: no such model, another architecture, or files that are damaged or missing.
    """
    spec = "demo" if spec is None else str(spec)
    if (Path(spec) / UNFINISHED).exists():
        raise UserError(
            f"{spec}: an unfinished conversion: run {called('tools.convert')} again, which starts "
            "anew there, or remove the directory"
        )
    return next(form for form in FORMS if form.accepts(spec)).open(spec)
