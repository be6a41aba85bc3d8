"""The example notebook: ``python -m tests.maintain.notebook`` writes and runs docs/example.ipynb.

Needs nbclient and ipykernel.
"""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).parents[2] / "docs" / "example.ipynb"

CELLS = [
    "# A broken engine, in a notebook\n\nEverything that the commands do is a function. Results "
    "show themselves.",
    "import qwen_jax\nfrom tools.diff import diff\nfrom tools.localize import localize\n"
    "from tests.planted import faults\n\n"
    "model = qwen_jax.open_model()  # the demo; or a directory, a hub id, a GGUF\n"
    "tokens = tuple(range(1, 49))\nreference = qwen_jax.trace_model(model, tokens)\nreference",
    "An engine with a mistake in layer 3: the second residual is taken from the layer's input. Its "
    "dump is that of any other engine, files of float32.",
    'mistake = "post_ffn_residual.residual_layer_input"\n'
    'wrong = faults.plant(qwen_jax.weights.DEMO, list(tokens), mistake, [3], "f32")\n'
    'dump = wrong.dump("engine-dump")',
    "A comparison shows where the error has *arrived*: everywhere after it.",
    "diff(dump, reference)",
    "`localize` shows where it is *created*, and what it is. It needs no reference.",
    "found = localize(dump, model, tokens)\nfound",
    'found.to_json()["faults"]',
]


def main() -> None:
    cells = [
        nbformat.v4.new_code_cell(text) if n % 2 else nbformat.v4.new_markdown_cell(text)
        for n, text in enumerate(CELLS[:-1])
    ]
    cells.append(nbformat.v4.new_code_cell(CELLS[-1]))
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=600).execute()
    for cell in notebook.cells:
        cell["metadata"].clear()
    nbformat.validate(notebook)
    nbformat.write(notebook, PATH)


if __name__ == "__main__":
    main()
