"""Train the demo model that ships in ``qwen_jax/demo``.

The demo is a real Qwen2 checkpoint, only small: the published file layout, the published tensor
names, bfloat16 weights, a byte-level BPE with Qwen2's own splitting rule.  It lets everything that
needs a checkpoint run without a download.  It is trained here with transformers' Qwen2ForCausalLM,
so that the file is written by something other than the code that reads it, and it is trained far
enough that attention attends, that the biases matter, and that the most likely token means
something; random weights show none of this.

The text is what every CPython carries: the docstrings of the standard library's top-level modules
and the language reference of ``pydoc_data.topics``.  Both change a little from one release to the
next, so the script prints the SHA-256 of what it found and compares it with the committed model's.

    python -m tests.maintain.train_demo [--out qwen_jax/demo] [--steps N]

takes about eight minutes on two free CPU cores.
"""

import argparse
import ast
import hashlib
import json
import math
import platform
import pydoc_data.topics
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import Qwen2Config, Qwen2ForCausalLM

# Of the text that the committed model was trained on (CPython 3.11.7).
TEXT_SHA256 = "ade987ce34008d4862dfc9ebb817592cddfe07ab9ab9357d875217c73afd4cf7"

SEED = 0
CONTEXT = 320
BATCH = 4
STEPS = 1600
WARM_UP = 100
PEAK_RATE = 3e-3
BIAS_STD = 0.5
HELD_OUT = 0.05

END = "<|endoftext|>"
VOCABULARY = 2048
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The keys of the published Qwen2 config.json files, and head_dim: 14 heads of 32 are twice as wide
# as the hidden state, so nothing that derives one from the other can pass unnoticed.
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": VOCABULARY - 1,
    "eos_token_id": VOCABULARY - 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 224,
    "initializer_range": 0.05,
    "intermediate_size": 608,
    "max_position_embeddings": 2048,
    "model_type": "qwen2",
    "num_attention_heads": 14,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}

TOKENIZER_CONFIG = {
    "add_prefix_space": False,
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": END,
    "errors": "replace",
    "model_max_length": CONFIG["max_position_embeddings"],
    "pad_token": END,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def documents():
    """Yield each text: one per standard-library module, then one per topic of the reference."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if path.stem in sys.stdlib_module_names and not path.stem.startswith("_"):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            nodes = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, kinds)]
            yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
    yield from pydoc_data.topics.topics.values()


def corpus():
    """Join the documents, each paragraph kept only where it first occurs.

    Topics quote one another at length; without this the held-out part would be known by heart.
    """
    seen = set()
    texts = []
    for document in documents():
        fresh = [p for p in document.split("\n\n") if p.strip() and p not in seen]
        fresh = list(dict.fromkeys(fresh))
        seen.update(fresh)
        if fresh:
            texts.append("\n\n".join(fresh).strip("\n") + "\n")
    return END.join(texts)


def train_tokenizer(text):
    """Byte-level BPE as in Qwen2: ordinary tokens first, then the special one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split(END), trainer)
    tokenizer.add_special_tokens([END])
    assert tokenizer.get_vocab_size() == VOCABULARY
    return tokenizer


def make_model():
    """A fresh model whose q, k and v biases start far enough from zero to count."""
    model = Qwen2ForCausalLM(Qwen2Config(**CONFIG)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=BIAS_STD)
    return model


def next_token_loss(model, ids):
    """Cross-entropy in nats and whether the arg-max is right, for each target in (batch, n + 1)."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.flatten(0, 1)
    targets = ids[:, 1:].flatten()
    return cross_entropy(logits.float(), targets, reduction="none"), logits.argmax(-1) == targets


@torch.no_grad()
def evaluate(model, ids):
    """Mean loss in nats and top-1 accuracy over consecutive windows of CONTEXT tokens."""
    model.eval()
    starts = range(0, len(ids) - 1, CONTEXT)
    scores = [next_token_loss(model, ids[None, s : s + CONTEXT + 1]) for s in starts]
    loss, right = (torch.cat(column) for column in zip(*scores, strict=True))
    model.train()
    return loss.mean().item(), right.float().mean().item()


def rate(step, steps):
    """Linear warm-up, then a cosine down to a fiftieth of the peak, as a factor of the peak."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2


def train(model, ids, held_out, steps):
    """AdamW on random windows of ``ids``; biases, norms and embeddings are not decayed."""
    matrices, others = [], []
    for name, weight in model.named_parameters():
        decayed = weight.ndim == 2 and "embed_tokens" not in name
        (matrices if decayed else others).append(weight)
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    offsets = torch.arange(CONTEXT + 1)

    start = time.perf_counter()
    recent = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(ids) - CONTEXT, (BATCH, 1))
        loss = next_token_loss(model, ids[starts + offsets])[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        recent.append(loss.item())

        if step % 25 == 0 or step == steps:
            spent = time.perf_counter() - start
            line = (
                f"step {step:5d}/{steps}  loss {sum(recent) / len(recent):.3f}"
                f"  {step * BATCH * CONTEXT / spent:6.0f} tokens/s"
                f"  ETA {spent / step * (steps - step):4.0f} s"
            )
            recent.clear()
            if step % 100 == 0 or step == steps:
                line += "  held-out loss {:.3f}, top-1 {:.1%}".format(*evaluate(model, held_out))
            print(line, flush=True)
    return time.perf_counter() - start


def choose_prompt(text, tokenizer):
    """The first beginning of a document in ``text``, in whole paragraphs, of 200 to 280 tokens."""
    for document in text.split(END)[1:]:
        paragraphs = document.split("\n\n")
        for count in range(1, len(paragraphs) + 1):
            prompt = "\n\n".join(paragraphs[:count])
            length = len(tokenizer.encode(prompt).ids)
            if 200 <= length <= 280:
                return prompt, length
    raise ValueError("no passage of the right length")


def rms(weight):
    return weight.detach().float().square().mean().sqrt().item()


CARD = """\
# Demo model

A very small Qwen2 language model, trained from scratch on Python's own documentation, in the file
layout of the published Qwen2 checkpoints. It exists so that the code can be run and tested against
a real checkpoint without a download. It writes text that looks like the Python reference and knows
nothing: use it for arithmetic, not for answers.

`python -m tests.maintain.train_demo` wrote all the files here, this one included.

## Shape

{parameters:,} parameters, bfloat16. {num_hidden_layers} layers, hidden size {hidden_size},
{num_attention_heads} query heads and {num_key_value_heads} key/value heads of size {head_dim} (the
7:1 ratio of Qwen2-7B; 1/sqrt({head_dim}) is not a power of two), intermediate size
{intermediate_size}, RoPE theta {rope_theta:,.0f}, RMSNorm epsilon {rms_norm_eps}, input and output
embeddings not tied.

Vocabulary: {vocab_size} tokens. Byte-level BPE with Qwen2's splitting rule and NFC, trained on the
training part of the text: the 256 bytes, {merges} merges, and `{end_token}` (id {end}), which
separates documents.

## Text

The docstrings of the standard library's top-level modules, then the language reference in
`pydoc_data.topics`, as CPython {python} carries them; each paragraph only where it first occurs.
{characters:,} characters, SHA-256

    {sha}

Copyright © 2001 Python Software Foundation; all rights reserved. Used under the [PSF License
Agreement, version 2](https://docs.python.org/3/license.html). A few modules carry notices of their
own: `codecs` (© CNRI), `socketserver` (© 2000 Luke Kenneth Casson Leighton) and `ast` (© 2008 Armin
Ronacher) name them in the docstrings used here.

The last {held_out:.0%} ({held_bytes:,} bytes, {held_tokens:,} tokens) were held out, from the
tokenizer too. `prompt.txt` is the beginning of a document there, word for word: {prompt_tokens}
tokens.

## Training

transformers' `Qwen2ForCausalLM` in float32, seed {seed}, {steps} steps of {batch} windows of
{context} tokens ({epochs:.1f} times the {train_tokens:,} training tokens), AdamW, {warm_up} steps
of warm-up to a learning rate of {peak_rate}, then a cosine. It took {minutes:.1f} minutes with two
threads; two cores with nothing else to do need about eight. The q, k and v biases were drawn from
N(0, {bias_std}²) and then trained; the norm weights started at one.

On the held-out text, in windows of {context} tokens:

| weights | nats/token | bits/byte | top-1 accuracy |
| --- | --- | --- | --- |
| float32, as trained | {loss_f32:.4f} | {bits_f32:.4f} | {top_f32:.2%} |
| bfloat16, as saved (float32 arithmetic) | {loss_bf16:.4f} | {bits_bf16:.4f} | {top_bf16:.2%} |
| the same with every bias set to zero | {loss_zero:.4f} | {bits_zero:.4f} | {top_zero:.2%} |

Root mean square of the biases, and of the norm weights' distance from one, as saved:

| layer | q bias | k bias | v bias | input norm distance | post-attention norm distance |
| --- | --- | --- | --- | --- | --- |
{layers}

The final norm's distance from one: {final_norm:.3f}.

## Making it again

    python -m tests.maintain.train_demo

The text's SHA-256 is the same only under the same CPython release; the script says when it is not.
With another release, another torch or another processor the weights come out different, but as
good. Versions: CPython {python}, torch {torch}, transformers {transformers}, tokenizers
{tokenizers}.
"""


def fill(card):
    """Break the lines of each prose paragraph anew, now that the numbers are in it."""
    return "\n\n".join(
        paragraph
        if paragraph[0] in "#| "
        else textwrap.fill(paragraph, 100, break_on_hyphens=False)
        for paragraph in card.strip().split("\n\n")
    )


def layer_table(model):
    rows = []
    for number, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        values = [
            attention.q_proj.bias,
            attention.k_proj.bias,
            attention.v_proj.bias,
            layer.input_layernorm.weight - 1,
            layer.post_attention_layernorm.weight - 1,
        ]
        rows.append(f"| {number} | " + " | ".join(f"{rms(v):.3f}" for v in values) + " |")
    return "\n".join(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("qwen_jax/demo"), metavar="DIR")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()

    torch.set_num_threads(2)
    torch.manual_seed(SEED)

    text = corpus()
    sha = hashlib.sha256(text.encode()).hexdigest()
    print(f"text: {len(text):,} characters, SHA-256 {sha}")
    if sha != TEXT_SHA256:
        print(f"this is not the text of the committed model ({TEXT_SHA256})")

    cut = int(len(text) * (1 - HELD_OUT))
    tokenizer = train_tokenizer(text[:cut])
    ids = torch.tensor(tokenizer.encode(text[:cut]).ids)
    held_out = torch.tensor(tokenizer.encode(text[cut:]).ids)
    prompt, prompt_tokens = choose_prompt(text[cut:], tokenizer)
    print(f"{len(ids):,} tokens to train on, {len(held_out):,} held out, {prompt_tokens} in prompt")

    model = make_model()
    seconds = train(model, ids, held_out, args.steps)
    loss_f32, top_f32 = evaluate(model, held_out)

    saved = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    biases = {name: torch.zeros_like(weight) for name, weight in saved.items() if "bias" in name}
    model.load_state_dict(saved | biases)
    loss_zero, top_zero = evaluate(model, held_out)
    model.load_state_dict(saved)
    loss_bf16, top_bf16 = evaluate(model, held_out)
    held_bytes = len(text[cut:].encode())
    bits_per_byte = len(held_out) / held_bytes / math.log(2)
    print(f"held-out with the saved weights: {loss_bf16:.4f} nats/token, top-1 {top_bf16:.2%}")

    args.out.mkdir(parents=True, exist_ok=True)
    save_file(saved, args.out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(args.out / "tokenizer.json"))
    for name, content in [("config", CONFIG), ("tokenizer_config", TOKENIZER_CONFIG)]:
        (args.out / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    (args.out / "prompt.txt").write_text(prompt, encoding="utf-8")
    card = CARD.format(
        **CONFIG,
        parameters=sum(weight.numel() for weight in saved.values()),
        merges=VOCABULARY - 257,
        end_token=END,
        end=VOCABULARY - 1,
        characters=len(text),
        sha=sha,
        held_out=HELD_OUT,
        held_bytes=held_bytes,
        held_tokens=len(held_out),
        prompt_tokens=prompt_tokens,
        seed=SEED,
        steps=args.steps,
        batch=BATCH,
        context=CONTEXT,
        epochs=args.steps * BATCH * CONTEXT / len(ids),
        train_tokens=len(ids),
        peak_rate=PEAK_RATE,
        warm_up=WARM_UP,
        minutes=seconds / 60,
        loss_f32=loss_f32,
        bits_f32=loss_f32 * bits_per_byte,
        top_f32=top_f32,
        loss_bf16=loss_bf16,
        bits_bf16=loss_bf16 * bits_per_byte,
        top_bf16=top_bf16,
        loss_zero=loss_zero,
        bits_zero=loss_zero * bits_per_byte,
        top_zero=top_zero,
        bias_std=BIAS_STD,
        layers=layer_table(model),
        final_norm=rms(model.model.norm.weight - 1),
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        tokenizers=tokenizers.__version__,
    )
    (args.out / "README.md").write_text(fill(card) + "\n", encoding="utf-8")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
