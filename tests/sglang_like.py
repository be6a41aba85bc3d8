"""A Qwen2 whose modules are cut, called and named as SGLang's, and dumps as SGLang writes them.

``dump_passes`` and ``dump_values`` do what ``TensorDumper`` of its tensor_dump_forward_hook.py and
``_NonIntrusiveDumper`` of its dumper.py (0.5.23) do. Both were run over this model: their files
held the same names and values, those of the second also the inputs of every module.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qwen_jax.weights.base import Weights

Tensor = torch.Tensor


class Linear(nn.Module):
    """Weights side by side, and a pair as the result: the value and a bias left to add."""

    def __init__(self, *named: tuple[Tensor, Tensor | None]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.cat([weight for weight, _ in named]))
        self.bias = None if named[0][1] is None else nn.Parameter(torch.cat([b for _, b in named]))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return nn.functional.linear(x, self.weight, self.bias), None


class Norm(nn.Module):
    """RMSNorm that adds the residual first, where there is one, and gives both."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight), eps

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        x = x if residual is None else x + residual
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight
        return normed if residual is None else (normed, x)


class Rope(nn.Module):
    def __init__(self, size: int, theta: float) -> None:
        super().__init__()
        self.size = size
        self.inverse = theta ** (-torch.arange(0, size, 2).double() / size)

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        angle = (positions[:, None] * self.inverse)[:, None]
        cos, sin = angle.cos().float(), angle.sin().float()

        def turn(x: Tensor) -> Tensor:
            a, b = x.view(len(x), -1, self.size).chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).view(len(x), -1)

        return turn(q), turn(k)


class RadixAttention(nn.Module):
    """Attention over a cache of its own."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.kept = size, []

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.kept.append((k, v))
        k, v = (torch.cat(each) for each in zip(*self.kept, strict=True))
        q, k, v = (x.view(len(x), -1, self.size).transpose(0, 1) for x in (q, k, v))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        rows, keys = q.shape[1], k.shape[1]
        late = torch.arange(keys)[None] > torch.arange(keys - rows, keys)[:, None]
        scores = (q @ k.transpose(1, 2) * self.size**-0.5).masked_fill(late, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(0, 1).reshape(rows, -1)


class Attention(nn.Module):
    def __init__(self, read: Any, config: Any) -> None:
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj")
        self.qkv_proj = Linear(*((read(f"{n}.weight"), read(f"{n}.bias")) for n in names))
        self.o_proj = Linear((read("o_proj.weight"), None))
        self.rotary_emb = Rope(config.head_dim, config.rope_theta)
        self.attn = RadixAttention(config.head_dim)
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        self.sizes = [n * config.head_dim for n in (heads, kv, kv)]

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(x)[0].split(self.sizes, -1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v))[0]


class SiluAndMul(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return nn.functional.silu(gate) * up


class Mlp(nn.Module):
    def __init__(self, read: Any) -> None:
        super().__init__()
        self.gate_up_proj = Linear(*((read(f"{n}_proj.weight"), None) for n in ("gate", "up")))
        self.down_proj = Linear((read("down_proj.weight"), None))
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_up_proj(x)[0]))[0]


class Layer(nn.Module):
    def __init__(self, read: Any, config: Any) -> None:
        super().__init__()
        self.self_attn = Attention(lambda name: read(f"self_attn.{name}"), config)
        self.mlp = Mlp(lambda name: read(f"mlp.{name}"))
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(self, name, Norm(read(f"{name}.weight"), config.rms_norm_eps))

    def forward(self, positions: Tensor, x: Tensor, residual: Tensor | None) -> Any:
        if residual is None:
            x, residual = self.input_layernorm(x), x
        else:
            x, residual = self.input_layernorm(x, residual)
        x = self.self_attn(positions, x)
        x, residual = self.post_attention_layernorm(x, residual)
        return self.mlp(x), residual


class Model(nn.Module):
    def __init__(self, read: Any, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(read("model.embed_tokens.weight"))
        self.layers = nn.ModuleList(
            Layer(lambda name, n=n: read(f"model.layers.{n}.{name}"), config)
            for n in range(config.num_hidden_layers)
        )
        self.norm = Norm(read("model.norm.weight"), config.rms_norm_eps)

    def forward(self, ids: Tensor, positions: Tensor, batch: Any) -> Tensor:
        x, residual = self.embed_tokens(ids), None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return self.norm(x, residual)[0]


class LogitsProcessor(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x[-1:] @ self.weight.T  # of the last row of each request


class SglangLike(nn.Module):
    """Called with the ids and positions of one pass."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        read = lambda name: torch.from_numpy(weights.read(name))  # noqa: E731
        self.model = Model(read, weights.config)
        self.logits_processor = LogitsProcessor(read("lm_head.weight"))

    def forward(self, ids: Tensor, positions: Tensor, batch: Any = None) -> Tensor:
        if positions[0] == 0:  # another request
            for layer in self.model.layers:
                layer.self_attn.attn.kept.clear()
        return self.logits_processor(self.model(ids, positions, batch))


Pass = tuple[list[int], list[int]]  # token ids, positions


def dump_passes(weights: Weights, passes: list[Pass], folder: Path) -> None:
    """--debug-tensor-dump-output-folder: one dictionary a pass, written as "model" ends."""
    network, held = SglangLike(weights), {}
    folder = folder / "TP0_PP0_Rank0_pid4711"
    folder.mkdir(parents=True)
    written = []

    def keep(name: str, value: Any) -> None:
        values = [value] if isinstance(value, Tensor) else [v for v in value if v is not None]
        held[name] = values[0] if len(values) == 1 else values

    def hook(name: str) -> Any:
        def see(module: Any, given: Any, result: Any) -> None:
            if name == "model":
                held["model.forward_batch_info.input_ids"] = given[0]
                held["model.forward_batch_info.positions"] = given[1]
                held["model.forward_batch_info.seq_lens"] = given[1][-1:] + 1
                torch.save(dict(held), folder / f"Pass{len(written):05d}.pt")
                written.append(held.copy())
                held.clear()
            keep(name, result)

        return see

    for name, module in network.named_modules():
        if name and (name == "model" or not list(module.children())):
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        for ids, positions in passes:
            network(torch.tensor(ids), torch.tensor(positions))


def dump_values(weights: Weights, passes: list[Pass], folder: Path) -> None:
    """The dumper with DUMPER_NON_INTRUSIVE_MODE=all: a file a value, its tags in its name."""
    network, state = SglangLike(weights), {"step": 0, "index": 0, "layer": None}
    folder = folder / "dump_1"
    folder.mkdir(parents=True)

    def save(name: str, value: Tensor) -> None:
        state["index"] += 1
        tags = {"step": state["step"], "rank": 0, "dump_index": state["index"], "name": name}
        tags["recompute_status"] = "disabled"
        if state["layer"] is not None:
            tags["layer_id"] = state["layer"]
        path = folder / ("___".join(f"{key}={value}" for key, value in tags.items()) + ".pt")
        torch.save({"value": value.clone(), "meta": {**tags, "world_rank": 0}}, path)

    def hook(name: str) -> Any:
        def see(module: Any, given: Any, result: Any) -> None:
            values = [result] if isinstance(result, Tensor) else list(result)
            values = [value for value in values if isinstance(value, Tensor)]
            for place, value in enumerate(values):
                item = f".{place}" if len(values) > 1 else ""
                save(f"non_intrusive__{name}.output{item}", value)

        return see

    def enter(layer: int | None) -> Any:
        return lambda *_: state.update(layer=layer)

    for name, module in network.named_modules():
        number = name.removeprefix("model.layers.")
        if number.isdecimal():
            module.register_forward_pre_hook(enter(int(number)))
            module.register_forward_hook(enter(None))
        if name:
            module.register_forward_hook(hook(name))
    with torch.no_grad():
        for ids, positions in passes:
            save("input_ids", torch.tensor(ids))
            save("positions", torch.tensor(positions))
            network(torch.tensor(ids), torch.tensor(positions))
            state["step"] += 1
