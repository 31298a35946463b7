"""Folders that transformers wrote, imported: the same logits, and exported again the same tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_folders import ABSENT, edit_config, make_folder
from transformers import AutoModelForCausalLM

from megatron_lite.checkpoint import read_weights, verify
from megatron_lite.config import load_config
from megatron_lite.generation import load_model
from megatron_lite.hf import export_folder, import_folder
from megatron_lite.hf.families import FAMILIES
from megatron_lite.hf.rotary import ORIGINAL
from megatron_lite.utils.log import LOGGER

CPU = torch.device("cpu")
EPSILON = {"rms_norm_eps": 1e-3}  # large enough to be seen
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "pythia": ("gpt_neox", {"layer_norm_eps": 1e-3}),
    "neox sequential, tied": (
        "gpt_neox",
        {"use_parallel_residual": False, "tie_word_embeddings": True, "attention_bias": False},
    ),
    "neox activation": ("gpt_neox", {"hidden_act": "gelu_new", "rotary_pct": 1.0, "rotary_emb_base": 500}),
    "llama": ("llama", EPSILON),
    "llama grouped": ("llama", {"num_key_value_heads": 2, "rope_parameters": {"rope_theta": 5e5}}),
    "llama multi-query, biases, tied": (
        "llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama 3.1": ("llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}}),
    "llama geglu": ("llama", {"hidden_act": "gelu"}),
    "mistral": ("mistral", EPSILON | {"num_key_value_heads": 2, "sliding_window": 7}),
    "mistral without window, narrow heads": (
        "mistral",
        {"head_dim": 6, "num_key_value_heads": 2, "sliding_window": None},
    ),
    "qwen2": ("qwen2", EPSILON | {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2 windows, yarn": (
        "qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 1e6,
            },
        },
    ),
    "qwen3": ("qwen3", EPSILON | {"num_key_value_heads": 2, "head_dim": 8}),
    "qwen3 windows": (
        "qwen3",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "attention_bias": True,
        },
    ),
    "mixtral": ("mixtral", EPSILON | {"num_local_experts": 3}),
    "mixtral window": (
        "mixtral",
        {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 7},
    ),
    "qwen3 experts": (
        "qwen3_moe",
        {"num_experts": 5, "num_experts_per_tok": 3, "attention_bias": True},
    ),
    "qwen3 experts in some layers": (
        "qwen3_moe",
        {
            "num_hidden_layers": 4,
            "mlp_only_layers": [1, 3],
            "moe_intermediate_size": 56,
            "use_sliding_window": True,
            "sliding_window": 7,
        },
    ),
    "qwen3 experts, one a token": (
        "qwen3_moe",
        {"num_experts_per_tok": 1, "norm_topk_prob": False},
    ),
    "gpt-neo": ("gpt_neo", {"layer_norm_epsilon": 1e-3, "window_size": 6}),
    "gpt-neo global, untied": (
        "gpt_neo",
        {
            "attention_types": [[["global"], 2]],
            "activation_function": "silu",
            "intermediate_size": None,
            "tie_word_embeddings": False,
        },
    ),
    "gpt-neo local": ("gpt_neo", {"attention_types": [[["local"], 2]], "window_size": 3}),
    "opt": ("opt", {}),
    "galactica": (
        "opt",
        {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
            "tie_word_embeddings": False,
        },
    ),
    "gpt-j": ("gptj", {"layer_norm_epsilon": 1e-3}),
    "gpt-j heads that turn whole": ("gptj", {"rotary_dim": 8, "n_inner": 56, "activation_function": "relu"}),
    "phi": ("phi", {"layer_norm_eps": 1e-3}),
    "phi grouped": (
        "phi",
        {"num_key_value_heads": 2, "hidden_act": "gelu", "rope_parameters": {"partial_rotary_factor": 0.75}},
    ),
    "phi-3": ("phi3", EPSILON | {"sliding_window": 9}),
    "phi-3.5": (
        "phi3",
        {
            "num_key_value_heads": 2,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2],
                "long_factor": [1.5, 2.0, 3.0],
            },
        },
    ),
    "olmo": ("olmo", {"num_key_value_heads": 2, "attention_bias": True}),
    "stablelm": ("stablelm", {"num_key_value_heads": 2, "layer_norm_eps": 1e-3, "use_qkv_bias": True}),
    "stablelm 2": (
        "stablelm",
        {"num_key_value_heads": 4, "use_parallel_residual": True, "tie_word_embeddings": True},
    ),
    "starcoder 2": ("starcoder2", {"sliding_window": 6, "norm_epsilon": 1e-3}),
    "starcoder 2, broken base": ("starcoder2", {"rope_parameters": {"rope_theta": 99.4420358813}}),
    "starcoder 2 without biases": ("starcoder2", {"use_bias": False, "tie_word_embeddings": False}),
    "gpt2": ("gpt2", {"layer_norm_epsilon": 1e-3}),
    "gpt2 untied, other width and scale": (
        "gpt2",
        {
            "n_inner": 56,
            "activation_function": "relu",
            "scale_attn_weights": False,
            "tie_word_embeddings": False,
        },
    ),
}


def test_every_family_is_tested() -> None:
    assert {family for family, _ in MODELS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(tmp_path: Path, name: str) -> None:
    """Logits within 1e-5; a sound checkpoint; exported again all tensors bitwise; so in every able family."""
    family, fields = MODELS[name]
    theirs = make_folder(tmp_path / "theirs", family, **fields)

    config = import_folder(tmp_path / "theirs", tmp_path / "ours")

    verify(tmp_path / "ours")
    tokens = torch.randint(0, 260, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.3
        logits = load_model(tmp_path / "ours", CPU).gpt(tokens)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert config == load_config([tmp_path / "ours" / "model.yml"])

    able = [each for each in FAMILIES if not list(FAMILIES[each].reasons_against(config))]
    assert family in able
    for each in able:
        export_folder(tmp_path / "ours", tmp_path / each, family=each)
        again, report = AutoModelForCausalLM.from_pretrained(tmp_path / each, output_loading_info=True)
        assert not any(report.values())
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(tokens).logits, expected, rtol=0, atol=1e-5)
    before, after = (load_file(tmp_path / each / "model.safetensors") for each in ("theirs", family))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_all_experts_in_one_tensor(tmp_path: Path, family: str) -> None:
    """transformers can write them as it keeps them."""
    theirs = make_folder(tmp_path / "theirs", family)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_original_format=False)
    names = load_file(tmp_path / "theirs" / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    import_folder(tmp_path / "theirs", tmp_path / "fused")
    ours, fused = (dict(read_weights(tmp_path / each)) for each in ("ours", "fused"))
    assert all(torch.equal(ours[name], fused[name]) for name in ours | fused)


SUMMARY = {"summary_type": "cls_index", "summary_use_proj": True, "summary_first_dropout": 0.1}
PUBLISHED: dict[str, dict[str, Any]] = {
    "gpt_neox": {
        "rope_parameters": ABSENT,
        "rope_scaling": None,
        "rotary_emb_base": 10000,
        "rope_theta": 10000,
        "rotary_pct": 0.25,
        "partial_rotary_factor": 0.25,
    },
    "gpt2": SUMMARY
    | {"_num_labels": 1, "output_past": True, "n_ctx": 64, "n_special": 0, "predict_special_tokens": True},
    "gpt_neo": SUMMARY | {"attention_layers": ["global", "local"], "gradient_checkpointing": True},
    "gptj": SUMMARY | {"rotary": True, "scale_attn_weights": True, "n_inner": None},
    "opt": {"activation_dropout": 0.0, "layerdrop": 0.0, "prefix": "</s>", "_remove_final_layer_norm": False},
    "phi": {"num_key_value_heads": None, "partial_rotary_factor": 0.5, "rope_scaling": None},
    "phi3": {
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "full_attn_mod": 1,
        "interpolate_factor": 1,
        "custom_pipelines": {"text-generation": {"impl": "other.Pipeline"}},
    },
    "starcoder2": {
        "activation_function": "gelu",
        "attention_softmax_in_fp32": True,
        "layer_norm_epsilon": 1e-4,
        "mlp_type": "default",
        "norm_type": "layer_norm",
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
    },
    "mixtral": {"output_router_logits": True, "sliding_window": None},
    "qwen3_moe": {"qkv_bias": False, "use_qk_norm": True, "max_window_layers": 48, "sliding_window": None},
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_fields_of_published_files_are_known(
    tmp_path: Path, family: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that transformers no longer writes: it reads the same model with them, and so do we."""
    theirs = make_folder(tmp_path / "theirs", family)
    config = import_folder(tmp_path / "theirs", tmp_path / "ours")
    edit_config(tmp_path / "theirs", **PUBLISHED[family])
    monkeypatch.setattr(LOGGER, "propagate", True)
    assert import_folder(tmp_path / "theirs", tmp_path / "again").model == config.model
    assert ("auto_map" in caplog.text) == ("auto_map" in PUBLISHED[family])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("scaling", "unread"),
    [
        ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 16, "finetuned": True}, ["finetuned"]),
        ({"rope_type": "yarn", "factor": 4.0, ORIGINAL: 16, "attn_factor": 2.0}, ["attn_factor"]),
        ({"rope_type": "linear", "factor": 4.0, ORIGINAL: 16}, [ORIGINAL]),
        ({"rope_type": "default", "factor": 4.0, ORIGINAL: 16}, ["factor", ORIGINAL]),
        ({"rope_type": "linear", "factor": 4.0, "attention_factor": None}, []),
    ],
    ids=str,
)
def test_what_a_scaling_does_not_read_is_dropped_and_told(
    tmp_path: Path,
    scaling: dict[str, Any],
    unread: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers drops it too, so the logits are the same."""
    monkeypatch.setattr(LOGGER, "propagate", True)
    theirs = make_folder(tmp_path / "theirs", "mistral", num_key_value_heads=4, rope_parameters=scaling)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert [
        record.getMessage().split("without ")[1].split(", as in")[0]
        for record in caplog.records
        if ("is read without" in record.getMessage())
    ] == ([", ".join(unread)] if unread else [])
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = load_model(tmp_path / "ours", CPU).gpt(tokens)
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("beside", "inside"), [(16, None), (16, 24), (None, 24), (None, None)])
def test_the_first_length_of_a_scaling(tmp_path: Path, beside: int | None, inside: int | None) -> None:
    """Beside the dictionary it counts first; said nowhere, it is max_position_embeddings."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4} | ({ORIGINAL: inside} if inside else {})
    make_folder(tmp_path / "theirs", "llama")
    edit_config(tmp_path / "theirs", rope_parameters=scaling, **({ORIGINAL: beside} if beside else {}))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = load_model(tmp_path / "ours", CPU).gpt(tokens)
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("end", "told"), [(None, False), ([5, 256], False), (256, False), (5, True)])
def test_another_end_of_text_is_told(
    tmp_path: Path,
    end: Any,
    told: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tokenizer of these folders ends a text with 256."""
    monkeypatch.setattr(LOGGER, "propagate", True)
    make_folder(tmp_path / "theirs", "llama")
    edit_config(tmp_path / "theirs", eos_token_id=end)
    import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert ("ends with token 5, by the tokenizer with 256" in caplog.text) == told


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_older_names_of_phi_3_scaling(tmp_path: Path, kind: str) -> None:
    """Its first files call longrope "su", and some "yarn"."""
    family, fields = MODELS["phi-3.5"]
    make_folder(tmp_path / "theirs", family, **fields)
    factors = {ORIGINAL: 16, "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 2.0, 3.0]}
    edit_config(tmp_path / "theirs", rope_parameters=ABSENT, rope_scaling={"type": kind, **factors})
    edit_config(tmp_path / "theirs", rope_theta=1e4, partial_rotary_factor=0.75)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    config = import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert config.model.rope_scaling.rope_type == "longrope"
    tokens = torch.arange(40)[None]
    with torch.no_grad():
        logits = load_model(tmp_path / "ours", CPU).gpt(tokens)
        torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "top_k"), [("mixtral", 3), ("qwen3_moe", 1)])
def test_the_balance_loss_is_as_strong(tmp_path: Path, family: str, top_k: int) -> None:
    """transformers' loss counts each of a token's k choices, ours their mean: even use costs k times less."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    fields: dict[str, Any] = {"num_experts_per_tok": top_k, "router_aux_loss_coef": 0.02}
    if family == "qwen3_moe":
        fields["norm_topk_prob"] = top_k > 1
    make_folder(tmp_path / "theirs", family, **fields)
    config = import_folder(tmp_path / "theirs", tmp_path / "ours").model
    even = load_balancing_loss_func((torch.zeros(64, 4),), 4, top_k)
    assert config.moe_loss_coeff == pytest.approx(0.02 * float(even))
