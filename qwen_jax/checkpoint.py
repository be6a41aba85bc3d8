"""Hugging Face Qwen2 checkpoints: which tensors there must be, and reading them one at a time.

Imports neither jax nor torch. Shards are opened lazily and nothing is kept after a read, so a
checkpoint of any size needs the memory of the tensors asked for.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes  # noqa: F401 -- teaches NumPy, and so safetensors, the name "bfloat16"
import numpy as np
import safetensors
import xxhash

from qwen_jax.config import Config, from_hf, read_json
from stages.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F32", "BF16", "F16")

# field of LayerParams -> the tensor's name below "model.layers.<n>."
LAYER_TENSORS = {
    "input_layernorm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "q_bias": "self_attn.q_proj.bias",
    "k_bias": "self_attn.k_proj.bias",
    "v_bias": "self_attn.v_proj.bias",
    "o_proj": "self_attn.o_proj.weight",
    "post_attention_layernorm": "post_attention_layernorm.weight",
    "gate_proj": "mlp.gate_proj.weight",
    "up_proj": "mlp.up_proj.weight",
    "down_proj": "mlp.down_proj.weight",
}
START_NAMES = {"embed_tokens": "model.embed_tokens.weight"}
HEAD = "lm_head.weight"


def layer_names(layer: int) -> dict[str, str]:
    """Field of LayerParams -> full tensor name."""
    return {field: f"model.layers.{layer}.{name}" for field, name in LAYER_TENSORS.items()}


def end_names(config: Config) -> dict[str, str]:
    """Field of EndParams -> full tensor name. A tied head is the embedding itself."""
    head = START_NAMES["embed_tokens"] if config.tie_word_embeddings else HEAD
    return {"norm": "model.norm.weight", "lm_head": head}


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this architecture must hold, by name."""
    dims = config.dims(1)
    d, f, v = dims["D"], dims["F"], dims["V"]
    q, kv = dims["N"] * dims["H"], dims["K"] * dims["H"]
    layer = {
        "input_layernorm": (d,),
        "q_proj": (q, d),
        "k_proj": (kv, d),
        "v_proj": (kv, d),
        "q_bias": (q,),
        "k_bias": (kv,),
        "v_bias": (kv,),
        "o_proj": (d, q),
        "post_attention_layernorm": (d,),
        "gate_proj": (f, d),
        "up_proj": (f, d),
        "down_proj": (d, f),
    }
    shapes = {START_NAMES["embed_tokens"]: (v, d)}
    for index in range(config.num_hidden_layers):
        shapes |= {name: layer[field] for field, name in layer_names(index).items()}
    return shapes | {name: (d,) if f == "norm" else (v, d) for f, name in end_names(config).items()}


class Checkpoint:
    """One checkpoint directory, checked against its config when it is opened.

    Attributes:
        name: the directory's name; what files are named after.
        config: the architecture.
        hashes: tensor name -> {"dtype", "shape", "xxh3"} of every tensor read so far.

    Raises:
        UserError: nothing there, unreadable, or tensors that do not fit the config.
    """

    def __init__(self, directory: Path, name: str | None = None) -> None:
        if not directory.is_dir():
            raise UserError(f"no such model directory: {directory}")
        self.directory = directory
        self.name = name or directory.resolve().name
        config_path = directory / "config.json"
        if not config_path.exists():
            raise UserError(f"{directory} has no config.json; expected a Hugging Face model")
        self.config = from_hf(read_json(config_path), str(config_path))
        self.hashes: dict[str, dict] = {}
        self._files = self._locate()
        self._check()

    def _locate(self) -> dict[str, Path]:
        """Tensor name -> the file that holds it."""
        single, index = self.directory / SINGLE, self.directory / INDEX
        if single.exists() and index.exists():
            raise UserError(
                f"{self.directory} has both {SINGLE} and {INDEX}; keep the one you mean"
            )
        if index.exists():
            return self._locate_shards(index)
        if not single.exists():
            raise UserError(f"{self.directory} has neither {SINGLE} nor {INDEX}")
        return dict.fromkeys(_keys(single), single)

    def _locate_shards(self, index: Path) -> dict[str, Path]:
        told = read_json(index).get("weight_map")
        if not isinstance(told, dict) or not all(isinstance(s, str) for s in told.values()):
            raise UserError(f"{index}: expected 'weight_map', an object of file names")
        shards = sorted(set(told.values()))
        outside = [s for s in shards if s != Path(s).name or s == ".."]
        if outside:
            raise UserError(f"{index} names a file outside its directory: {outside[0]!r}")
        absent = [s for s in shards if not (self.directory / s).exists()]
        if absent:
            raise UserError(f"{self.directory}: missing {_some(absent, 'shard')} of {INDEX}")
        found = {shard: set(_keys(self.directory / shard)) for shard in shards}
        lost = sorted(name for name, shard in told.items() if name not in found[shard])
        if lost:
            raise UserError(f"{index} lists {_some(lost, 'tensor')} that its shard lacks")
        counted = Counter(name for names in found.values() for name in names)
        twice = sorted(name for name, count in counted.items() if count > 1)
        if twice:
            raise UserError(f"{self.directory}: {_some(twice, 'tensor')} in two shards")
        return {name: self.directory / s for s, names in found.items() for name in names}

    def _check(self) -> None:
        expected = expected_shapes(self.config)
        embedding = START_NAMES["embed_tokens"]
        tied_head = self.config.tie_word_embeddings and HEAD in self._files
        if tied_head:  # needless, but some files have it
            expected[HEAD] = expected[embedding]
        found = {name for name in self._files if not name.endswith("rotary_emb.inv_freq")}
        problems = []
        if missing := [name for name in expected if name not in found]:
            problems.append(f"missing {_some(missing, 'tensor')}")
        if unexpected := sorted(found - expected.keys()):
            problems.append(f"unexpected {_some(unexpected, 'tensor')}")
        wrong = []
        for name in [name for name in expected if name in found]:
            with _open(self._files[name]) as file:
                view = file.get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
            if shape != expected[name]:
                wrong.append(f"{name} is {list(shape)}, not {list(expected[name])}")
            if dtype not in FLOATS:
                wrong.append(f"{name} is {dtype}, not one of {', '.join(FLOATS)}")
        if wrong:
            problems.append(_some(wrong, "mismatch", "mismatches"))
        if problems:
            raise UserError(
                f"{self.directory}: weights do not fit config.json: " + "; ".join(problems)
            )
        if tied_head:
            # Equal hashes are equal bits; that holds for NaN too, and for one tensor at a time.
            self.read(HEAD)
            self.read(embedding)
            if self.hashes.pop(HEAD) != self.hashes[embedding]:
                raise UserError(
                    f"{self.directory}: config.json ties the head to the embedding, but {HEAD} "
                    "is there and differs from it"
                )

    def read(self, name: str) -> np.ndarray:
        """One tensor in its own dtype. Its content hash is kept in ``hashes``."""
        with _open(self._files[name]) as file:
            array = file.get_tensor(name)
        if name not in self.hashes:
            digest = xxhash.xxh3_64_hexdigest(array.reshape(-1).view(np.uint8))
            dtype, shape = str(array.dtype), list(array.shape)
            self.hashes[name] = {"dtype": dtype, "shape": shape, "xxh3": digest}
        return array

    def read_group(self, names: dict[str, str]) -> dict[str, np.ndarray]:
        """``{field: tensor}`` for ``{field: tensor name}``."""
        return {field: self.read(name) for field, name in names.items()}


def _open(path: Path) -> safetensors.safe_open:
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from None


def _keys(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _some(items: Iterable[str], one: str, many: str | None = None) -> str:
    """'1 tensor (a)' or '7 tensors (a, b, c, ...)'."""
    items = list(items)
    noun = one if len(items) == 1 else many or one + "s"
    return f"{len(items)} {noun} ({', '.join(items[:3])}{', ...' if len(items) > 3 else ''})"
