"""config.json: what is understood, and that nothing else is passed over in silence."""

import json
from dataclasses import asdict, replace

import pytest

from qwen_jax.config import Config, Yarn, from_hf
from stages.architectures import ARCHITECTURES
from stages.disk import read_json
from stages.errors import UserError
from tests.tiny import hf_config


def refusal(**overrides):
    with pytest.raises(UserError) as error:
        from_hf(hf_config(**overrides), "there/config.json")
    message = str(error.value)
    assert len(message.splitlines()) == 1 and message.startswith("there/config.json: ")
    return message


def test_a_config():
    assert from_hf(hf_config()) == Config(
        architecture="qwen2",
        vocab_size=48,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        yarn=None,
        tie_word_embeddings=False,
        sliding_window=None,
        sliding_layers=(False, False),
        max_position_embeddings=256,
    )


def test_dims():
    dims = from_hf(hf_config()).dims(5)
    assert dims == {"T": 5, "S": 5, "N": 4, "K": 2, "H": 8, "D": 24, "F": 40, "V": 48}


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("type", ARCHITECTURES)
@pytest.mark.parametrize("overrides", [{}, {"rope_scaling": YARN}, {"use_sliding_window": True}])
def test_plain_data_and_back(type, overrides):
    config = from_hf(hf_config(model_type=type, **overrides, sliding_window=7, max_window_layers=1))
    assert config.arch is ARCHITECTURES[type]
    data = json.loads(json.dumps(config.to_json()))
    assert Config.from_json(data) == config and hash(Config.from_json(data)) == hash(config)


# --- published configurations

USUAL = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
}


def published(hidden, layers, heads, kv_heads, ffn, vocab, tie, max_positions, **others):
    return USUAL | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": tie,
        "max_position_embeddings": max_positions,
        "max_window_layers": layers,
        "sliding_window": max_positions,
        **others,
    }


INSTRUCT = {"eos_token_id": 151645, "transformers_version": "4.43.1"}
MROPE = {"use_mrope": False}  # of the files written by Qwen's own fork of transformers
PUBLISHED = {
    "Qwen2-0.5B": published(896, 24, 14, 2, 4864, 151936, True, 131072),
    "Qwen2-1.5B": published(1536, 28, 12, 2, 8960, 151936, True, 131072),
    "Qwen2-7B-Instruct": published(3584, 28, 28, 4, 18944, 152064, False, 32768, **INSTRUCT),
    "Qwen2-72B-Instruct": published(
        8192, 80, 64, 8, 29568, 152064, False, 32768, sliding_window=131072, **INSTRUCT
    ),
    "Qwen2.5-0.5B": published(896, 24, 14, 2, 4864, 151936, True, 32768, **MROPE),
    "Qwen2.5-0.5B-Instruct": published(
        896, 24, 14, 2, 4864, 151936, True, 32768, max_window_layers=21, **INSTRUCT
    ),
    "Qwen2.5-1.5B": published(1536, 28, 12, 2, 8960, 151936, True, 131072, **MROPE),
    "Qwen2.5-3B": published(2048, 36, 16, 2, 11008, 151936, True, 32768, **MROPE),
    "Qwen2.5-7B": published(3584, 28, 28, 4, 18944, 152064, False, 131072, **MROPE),
    "Qwen2.5-Coder-7B-Instruct": published(
        3584, 28, 28, 4, 18944, 152064, False, 32768, sliding_window=131072, **INSTRUCT
    ),
    "Qwen2.5-14B": published(5120, 48, 40, 8, 13824, 152064, False, 131072, rms_norm_eps=1e-05),
    "Qwen2.5-32B": published(5120, 64, 40, 8, 27648, 152064, False, 131072, rms_norm_eps=1e-05),
    "Qwen2.5-32B-Instruct": published(
        5120, 64, 40, 8, 27648, 152064, False, 32768, max_window_layers=70, **INSTRUCT
    ),
    "Qwen2.5-72B": published(8192, 80, 64, 8, 29568, 152064, False, 131072, rms_norm_eps=1e-05),
    "DeepSeek-R1-Distill-Qwen-1.5B": published(
        1536, 28, 12, 2, 8960, 151936, False, 131072, rope_theta=10000, bos_token_id=151646,
        max_window_layers=21, sliding_window=4096, **MROPE,
    ),
    "DeepSeek-R1-Distill-Qwen-32B": published(
        5120, 64, 40, 8, 27648, 152064, False, 131072, rms_norm_eps=1e-05, bos_token_id=151646,
        pad_token_id=None, **MROPE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configurations(name):
    raw = PUBLISHED[name]
    config = from_hf(raw)
    for field in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta",
        "tie_word_embeddings", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(config, field) == raw[field], field
    assert config.head_dim == (64 if "0.5B" in name else 128)
    assert config.sliding_window is None and not any(config.sliding_layers)
    assert config.yarn is None


# --- Qwen3

USUAL_3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def published_3(hidden, layers, heads, ffn, tie, **others):
    return USUAL_3 | {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": ffn,
        "tie_word_embeddings": tie,
        "max_window_layers": layers,
        **others,
    }


BASE = {"eos_token_id": 151643, "max_position_embeddings": 32768}
PUBLISHED_3 = {
    "Qwen3-0.6B": published_3(1024, 28, 16, 3072, True),
    "Qwen3-0.6B-Base": published_3(1024, 28, 16, 3072, True, **BASE),
    "Qwen3-1.7B": published_3(2048, 28, 16, 6144, True),
    "Qwen3-4B": published_3(2560, 36, 32, 9728, True),
    "Qwen3-4B-Instruct-2507": published_3(
        2560, 36, 32, 9728, True, max_position_embeddings=262144, rope_theta=5000000
    ),
    "Qwen3-8B": published_3(4096, 36, 32, 12288, False),
    "Qwen3-14B": published_3(5120, 40, 40, 17408, False),
    "Qwen3-32B": published_3(5120, 64, 64, 25600, False),
}


@pytest.mark.parametrize("name", PUBLISHED_3)
def test_published_configurations_of_qwen3(name):
    raw = PUBLISHED_3[name]
    config = from_hf(raw)
    for field in (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
        "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta",
        "tie_word_embeddings", "max_position_embeddings",
    ):  # fmt: skip
        assert getattr(config, field) == raw[field], field
    assert config.architecture == "qwen3"
    assert config.sliding_window is None and not any(config.sliding_layers)
    assert config.yarn is None


def test_a_published_setting_that_engines_read_differently():
    """DeepSeek-R1-0528-Qwen3-8B: transformers passes attn_factor over, vLLM multiplies by it."""
    scaling = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "attn_factor": 0.8782488562869419,
    }
    message = refusal(**published_3(4096, 36, 32, 12288, False, rope_scaling=scaling))
    assert "unknown RoPE settings ['attn_factor']" in message


def test_the_same_settings_of_another_architecture():
    two, three = from_hf(hf_config()), from_hf(hf_config(model_type="qwen3"))
    assert two != three and replace(three, architecture="qwen2") == two
    assert two.shapes.keys() != three.shapes.keys()


def test_a_head_size_of_its_own():
    """128 where nothing is said, whatever D/N is; Qwen2's is D/N."""
    silent = {"head_dim": ..., "hidden_size": 32}
    assert from_hf(hf_config(model_type="qwen3", **silent)).head_dim == 128
    assert from_hf(hf_config(model_type="qwen2", **silent)).head_dim == 8
    config = from_hf(hf_config(model_type="qwen3"))
    assert config.num_attention_heads * config.head_dim != config.hidden_size
    assert config.shapes["model.layers.0.self_attn.q_proj.weight"] == (32, 24)
    assert config.shapes["model.layers.0.self_attn.o_proj.weight"] == (24, 32)
    assert config.shapes["model.layers.0.self_attn.k_norm.weight"] == (8,)


@pytest.mark.parametrize("field", ["num_key_value_heads", "head_dim", "max_window_layers"])
def test_transformers_has_the_same_defaults(field):
    """The tables' defaults, and a published size's, against a configuration of nothing."""
    transformers = pytest.importorskip("transformers")
    for name, arch in ARCHITECTURES.items():
        theirs = transformers.AutoConfig.for_model(name)
        if field in arch.defaults:
            assert arch.defaults[field] == getattr(theirs, field), name


@pytest.mark.parametrize("type", ARCHITECTURES)
def test_what_transformers_means_by_leaving_a_setting_out(type):
    transformers = pytest.importorskip("transformers")
    required = {
        "vocab_size": 48, "hidden_size": 256, "intermediate_size": 40, "num_hidden_layers": 40,
        "num_attention_heads": 32,
    }  # fmt: skip
    for more in ({}, {"use_sliding_window": True}):
        raw = {"model_type": type, **required, **more}
        theirs = transformers.AutoConfig.for_model(type, **required, **more)
        assert from_hf(raw) == from_hf(theirs.to_dict())


@pytest.mark.parametrize(("type", "supported"), [("qwen2", True), ("qwen3", False)])
def test_biases_are_as_the_architecture_has_them(type, supported):
    config = from_hf(hf_config(model_type=type, attention_bias=supported))
    assert config == from_hf(hf_config(model_type=type, attention_bias=...))
    biases = [name for name in config.shapes if name.endswith(".bias")]
    assert len(biases) == (6 if supported else 0)
    says = f"attention_bias is {not supported}; only {supported} is supported"
    assert says in refusal(model_type=type, attention_bias=not supported)


SETTINGS = [(name, size) for name in ARCHITECTURES for size in ARCHITECTURES[name].published]


@pytest.mark.parametrize(("name", "size"), SETTINGS)
def test_published_sizes_are_those_of_the_published_files(name, size):
    """What ``synthetic:SIZE`` makes is what the model of that size has."""
    files = PUBLISHED if name == "qwen2" else PUBLISHED_3
    stem = "Qwen2.5-" if name == "qwen2" else "Qwen3-"
    found = [each for each in files if each.lower().startswith(f"{stem}{size}".lower())]
    if not found:
        pytest.fail(f"no published file of {name} {size} is known here")
    ours, raw = ARCHITECTURES[name].published[size], files[found[0]]
    assert {field: raw[field] for field in ours if field in raw} == {
        field: value for field, value in ours.items() if field in raw
    }
    absent = set(ours) - set(raw)
    assert absent <= {"head_dim"}
    assert from_hf({**raw, **ours}) == from_hf(raw)


# --- RoPE


def test_both_spellings_of_rope_say_the_same():
    four = from_hf(hf_config(rope_theta=5e5))
    five = hf_config(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert from_hf(five) == four and four.rope_theta == 5e5


def test_no_theta_is_ten_thousand_as_in_transformers():
    assert from_hf(hf_config(rope_theta=...)).rope_theta == 10000.0
    assert from_hf(hf_config(rope_theta=..., rope_parameters=None)).rope_theta == 10000.0


def test_an_integer_theta():
    assert from_hf(hf_config(rope_theta=10000)) == from_hf(hf_config(rope_theta=10000.0))


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_yarn(spelling, key):
    rope = {key: "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    config = from_hf(hf_config(**{spelling: rope}, rope_theta=1e6))
    assert config.rope_theta == 1e6
    assert asdict(config.yarn) == {
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": None,
        "truncate": True,
    }


def test_yarn_with_everything():
    rope = {
        "type": "yarn", "rope_type": "yarn", "rope_theta": 2e6, "factor": 8,
        "original_max_position_embeddings": 128, "beta_fast": 16, "beta_slow": 2,
        "attention_factor": 1.5, "truncate": False,
    }  # fmt: skip
    config = from_hf(hf_config(rope_parameters=rope))
    assert config.rope_theta == 2e6
    assert config.yarn == Yarn(
        factor=8.0,
        original_max_position_embeddings=128,
        beta_fast=16.0,
        beta_slow=2.0,
        attention_factor=1.5,
        truncate=False,
    )


def test_yarn_without_or_with_null_settings():
    yarn = from_hf(hf_config(rope_scaling={"type": "yarn", "factor": 2.0})).yarn
    assert yarn == Yarn(factor=2.0, original_max_position_embeddings=256)
    nulls = {"factor": None, "original_max_position_embeddings": 64, "beta_fast": None}
    nulls |= {"attention_factor": None}
    yarn = from_hf(hf_config(rope_scaling={"type": "yarn"} | nulls)).yarn
    assert yarn == Yarn(factor=4.0, original_max_position_embeddings=64)


def test_rope_scaling_counts_where_both_are_given():
    both = {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}
    config = from_hf(hf_config(**both))
    assert config.yarn is not None and config.rope_theta == 10000.0


@pytest.mark.parametrize(
    ("rope", "says"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "'linear'"),
        ({"type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"rope_type": "mrope", "mrope_section": [16, 24, 24]}, "'mrope'"),
        ({"rope_type": ["yarn"]}, "['yarn']"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "full_attention"),
        (YARN | {"mscale": 1.0}, "mscale"),
        ({"rope_type": "yarn"}, "factor is None"),
        (YARN | {"factor": "4"}, "factor is '4'"),
        (YARN | {"factor": 0}, "factor is 0"),
        (YARN | {"original_max_position_embeddings": 64.0}, "64.0"),
        (YARN | {"beta_fast": True}, "beta_fast is True"),
        (YARN | {"beta_slow": [1]}, "beta_slow is [1]"),
        (YARN | {"attention_factor": "1"}, "attention_factor is '1'"),
        (YARN | {"truncate": 0}, "truncate is 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ("yarn", "'yarn'"),
        ([1], "[1]"),
        (1.0, "1.0"),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rope_that_is_not_understood(spelling, rope, says):
    assert says in refusal(**{spelling: rope})


@pytest.mark.parametrize("theta", [0, -1.0, "10000", None, True, float("nan"), float("inf")])
def test_a_theta_that_is_no_positive_number(theta):
    assert "rope_theta" in refusal(rope_theta=theta)


# --- sliding windows


def window(**overrides):
    config = from_hf(hf_config(**overrides))
    return config.sliding_window, config.sliding_layers


def test_no_window_unless_it_is_used():
    assert window(sliding_window=7, max_window_layers=0) == (None, (False, False))
    assert window(use_sliding_window=..., sliding_window=7) == (None, (False, False))


def test_a_window_from_a_layer_on():
    on = {"use_sliding_window": True, "sliding_window": 7}
    assert window(**on, max_window_layers=0) == (7, (True, True))
    assert window(**on, max_window_layers=1) == (7, (False, True))
    assert window(**on, max_window_layers=2) == (None, (False, False))
    assert window(**on, max_window_layers=...) == (None, (False, False))  # 28 of 2 layers


def test_a_window_of_layer_types():
    on = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0}
    types = ["sliding_attention", "full_attention"]
    assert window(**on, layer_types=types) == (7, (True, False))
    assert window(**on, layer_types=["full_attention"] * 2) == (None, (False, False))
    assert window(layer_types=["full_attention"] * 2) == (None, (False, False))


def test_the_window_by_default():
    on = {"use_sliding_window": True, "max_window_layers": 0}
    assert window(**on, sliding_window=...) == (4096, (True, True))
    assert window(**on, sliding_window=None) == (None, (False, False))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window is 0"),
        ({"use_sliding_window": True, "sliding_window": "7"}, "sliding_window is '7'"),
        ({"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
        ({"use_sliding_window": True, "max_window_layers": None}, "max_window_layers is None"),
        ({"max_window_layers": -1}, "max_window_layers is -1"),
        ({"layer_types": ["full_attention"]}, "2 layers; found 1"),
        ({"layer_types": ["full_attention"] * 3}, "2 layers; found 3"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "'chunked_attention'"),
        ({"layer_types": ["full_attention", ["x"]]}, "['x']"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": 2}, "layer_types"),
        ({"layer_types": ["sliding_attention"] * 2}, "use_sliding_window is false"),
    ],
)
def test_windows_that_are_not_understood(overrides, says):
    assert says in refusal(**overrides)


# --- everything else


@pytest.mark.parametrize("type", ["qwen3_moe", "qwen2_moe", "llama", "Qwen2", None, ...])
def test_another_architecture(type):
    message = refusal(model_type=type)
    assert f"model_type is {None if type is ... else type!r}" in message
    assert "'qwen2' and 'qwen3'" in message


@pytest.mark.parametrize("type", [["qwen2"], {}, 2])
def test_a_model_type_that_is_no_text(type):
    assert f"model_type is {type!r}" in refusal(model_type=type)


@pytest.mark.parametrize("name", ["qk_norm", "logit_scale", "RoPE_theta", "vocabsize"])
def test_an_unknown_attribute_is_named(name):
    assert f"unknown attribute {name!r} (17)" in refusal(**{name: 17})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_act", "gelu"),
        ("hidden_act", None),
        ("attention_bias", False),
        ("mlp_bias", True),
        ("use_mrope", True),
        ("is_decoder", True),
        ("quantization_config", {"quant_method": "awq", "bits": 4}),
    ],
)
def test_a_known_attribute_at_a_value_that_changes_the_forward_pass(name, value):
    assert f"{name} is {value!r}" in refusal(**{name: value})


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings")


@pytest.mark.parametrize("value", [0, -1, 1.0, "8", True, [8]])
@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_is_no_positive_integer(name, value):
    assert f"{name} is {value!r}" in refusal(**{name: value})


@pytest.mark.parametrize("value", [None, ...])
@pytest.mark.parametrize("name", [*SIZES[:5]])
def test_a_size_that_must_be_given(name, value):
    assert f"{name} is None" in refusal(**{name: value})


@pytest.mark.parametrize("value", [0, -1e-6, "1e-6", None, True, float("nan"), 10**400])
def test_an_epsilon_that_is_no_positive_number(value):
    assert "rms_norm_eps" in refusal(rms_norm_eps=value)


@pytest.mark.parametrize("value", ["false", 0, None])
def test_a_flag_that_is_neither_true_nor_false(value):
    assert "tie_word_embeddings" in refusal(tie_word_embeddings=value)


def test_sizes_by_default():
    config = from_hf(
        hf_config(head_dim=..., max_position_embeddings=..., rms_norm_eps=..., hidden_size=32)
    )
    assert (config.head_dim, config.max_position_embeddings) == (8, 32768)
    assert config.rms_norm_eps == 1e-6
    assert from_hf(hf_config(head_dim=None, hidden_size=32)).head_dim == 8
    assert from_hf(hf_config(num_key_value_heads=None)).num_key_value_heads == 4
    assert from_hf(hf_config(num_attention_heads=64, num_key_value_heads=...)).dims(1)["K"] == 32


def test_heads_that_cannot_work():
    assert "4 query heads cannot share 3" in refusal(num_key_value_heads=3)
    assert "must be even" in refusal(head_dim=7)
    assert "32 key/value heads" in refusal(num_key_value_heads=...)  # transformers' default


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "JSON"),
        (b'{"a": 1', "JSON"),
        (b"\xff{}", "JSON"),
        (b"\xef\xbb\xbf{}", "BOM"),
        (b"[" * 100_000, "JSON"),
        (b"[]", "found list"),
        (b"null", "found NoneType"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path, content, says):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_json(path)
    assert str(path) in str(error.value) and says in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match="cannot be read"):
        read_json(tmp_path)


@pytest.mark.parametrize("type", ARCHITECTURES)
@pytest.mark.parametrize("how", ["saved", "all"])
@pytest.mark.parametrize(
    "overrides",
    [{}, {"rope_scaling": YARN}, {"use_sliding_window": True, "max_window_layers": 1}],
)
def test_transformers_reads_its_files_as_we_do(tmp_path, type, how, overrides):
    """What transformers 5 makes of a file of transformers 4, saves and reads again."""
    transformers = pytest.importorskip("transformers")
    ours = hf_config(model_type=type, **overrides)
    theirs = transformers.AutoConfig.for_model(**ours)
    theirs.save_pretrained(tmp_path)
    raw = read_json(tmp_path / "config.json") if how == "saved" else theirs.to_dict()
    assert from_hf(raw) == from_hf(ours)
