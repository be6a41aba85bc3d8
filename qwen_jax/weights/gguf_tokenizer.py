"""The tokenizer that a GGUF file carries, as Hugging Face's tokenizers library runs it.

A file has the vocabulary, the merges and the kind of each token, but of the rules that split text
only a name. For ``qwen2`` they are those of Qwen2's ``tokenizer.json``, its NFC normalisation among
them, which llama.cpp leaves out; no other name is guessed at.
"""

from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from stages.errors import UserError

PREFIX = "tokenizer.ggml."
ARRAYS = tuple(PREFIX + name for name in ("tokens", "merges", "token_type", "scores"))
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5  # enum llama_token_type
# Qwen/Qwen2-7B, tokenizer.json
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def unsupported(metadata: Mapping[str, Any]) -> str | None:
    """Why text cannot be encoded as this file's model would; None if it can."""
    model, pre = (metadata.get(PREFIX + name) for name in ("model", "pre"))
    if model is None or model == "none":
        return "has no tokenizer"
    if (model, pre) != ("gpt2", "qwen2"):
        return (
            f"has a {model!r} tokenizer of kind {pre!r}, and only 'gpt2' of kind 'qwen2' is known"
        )
    for name in ("add_bos_token", "add_eos_token"):
        if metadata.get(PREFIX + name):
            return f"has a tokenizer with {name}, which Qwen2's has not"
    return None


def build(metadata: Mapping[str, Any], where: str) -> Tokenizer:
    """The tokenizer of a file about which ``unsupported`` has nothing to say.

    Raises:
        UserError: its parts are damaged, or do not go together.
    """
    texts, merges, kinds = (_array(metadata, name, where) for name in ARRAYS[:3])
    if len(kinds) != len(texts):
        raise UserError(f"{where}: {len(texts)} tokens, but {len(kinds)} token types")
    try:
        words = [text.decode() for text in texts]
        pairs = [tuple(text.decode().split(" ", 1)) for text in merges]
        # An unused id only fills the embedding; its text must not be found in a prompt.
        vocabulary = {w: n for n, w in enumerate(words) if kinds[n] != UNUSED}
        if len(vocabulary) != sum(kind != UNUSED for kind in kinds):
            raise ValueError("a token is there twice")
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the library raises bare Exception
        why = " ".join(str(error).split())
        raise UserError(f"{where}: its tokenizer is damaged: {why}") from None
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        added = [word for word, k in zip(words, kinds, strict=True) if k == kind and word]
        add = tokenizer.add_special_tokens if special else tokenizer.add_tokens
        add([AddedToken(word, normalized=False, special=special) for word in added])
    return tokenizer


def _array(metadata: Mapping[str, Any], name: str, where: str) -> list[Any]:
    value = metadata.get(name)
    strings = isinstance(value, list)
    if value is None or isinstance(value, str) or strings == name.endswith("token_type"):
        raise UserError(f"{where}: {name} is missing or of another kind")
    try:
        return value if strings else value.tolist()
    except AttributeError:
        raise UserError(f"{where}: {name} is no array") from None
