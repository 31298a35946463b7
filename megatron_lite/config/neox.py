"""Keys that GPT-NeoX's files have besides those of the sections.

Second names of keys; keys that lost their purpose (retired: accepted, with one line why); and keys of
features that are not there (refused, when their value asks for something). The sections' keys, these and
those of :mod:`megatron_lite.config.older_keys` are all there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

ALIASES = {
    "gas": "gradient_accumulation_steps",
    "moe_expert_parallel_size": "expert_parallel_size",
    "num_experts": "moe_num_experts",
    "batch_size": "train_micro_batch_size_per_gpu",
    "save_interval": "checkpoint_factor",
    "clip_grad": "gradient_clipping",
    "lr": "optimizer.params.lr",
    "optimizer_type": "optimizer.type",
    "zero_stage": "zero_optimization.stage",
    "zero_reduce_scatter": "zero_optimization.reduce_scatter",
    "zero_contiguous_gradients": "zero_optimization.contiguous_gradients",
    "zero_reduce_bucket_size": "zero_optimization.reduce_bucket_size",
    "zero_allgather_bucket_size": "zero_optimization.allgather_bucket_size",
    "loss_scale": "fp16.loss_scale",
    "loss_scale_window": "fp16.loss_scale_window",
    "hysteresis": "fp16.hysteresis",
    "min_scale": "fp16.min_loss_scale",
    "fragment_fim_rate": "fim_fragment_rate",
    "no_fim_prefix": "fim_no_prefix",
}
"""Second names of keys."""


@dataclass(frozen=True)
class Unused:
    """A key without effect: the reason, and the values about which it is silent.

    Attributes: why: half a sentence for the user. neutral: values that ask for nothing; None: all of them.
    Null, an empty list or block, and a block with ``enabled: false`` always ask for nothing."""

    why: str
    neutral: tuple[Any, ...] | None

    def is_neutral(self, value: Any) -> bool:
        """Whether ``value`` asks for nothing."""
        if self.neutral is None or value is None or value == [] or value == {}:
            return True
        if isinstance(value, dict) and value.get("enabled") is False:
            return True
        return value in self.neutral


def _keys(why: str, names: str, *neutral: Any) -> dict[str, Unused]:
    return {name: Unused(why, neutral or (False,)) for name in names.split()}


def _silent(why: str, names: str) -> dict[str, Unused]:
    return {name: Unused(why, None) for name in names.split()}


RETIRED: dict[str, Unused] = (
    _keys(
        "the kernels are chosen by device and number format, and printed at start",
        "scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion bias_dropout_fusion "
        "rope_fusion layernorm_fusion rmsnorm_fusion use_flashattn_swiglu",
    )
    | _keys("softmax is always computed in fp32", "attention_softmax_in_fp32 apply_query_key_layer_scaling")
    | _keys("the loss is always computed in fp32", "fp16_lm_cross_entropy")
    | _keys("weights do not depend on where they are drawn", "use_cpu_initialization")
    | _keys("rotary frequencies are computed, not stored", "rotary_save_freqs_buffer")
    | _keys("the kernels know which tokens are seen", "requires_attention_mask", True)
    | _keys("the head is always divided over the vocabulary", "output_layer_parallelism", "column")
    | _keys("it follows from the parallel degrees", "is_pipe_parallel is_context_parallel")
    | _keys(
        "the backend follows from the device: nccl on CUDA, gloo on a CPU",
        "distributed_backend",
        "nccl",
        "gloo",
    )
    | _keys("everything runs under DeepSpeed", "deepspeed", True)
    | _keys("reductions are fp32 with communication_data_type: fp32", "fp32_allreduce")
    | _keys(
        "sequence_parallel divides activations over the tensor-parallel ranks",
        "partition_activations contiguous_checkpointing",
    )
    | _keys("checkpointed layers need no synchronisation", "synchronize_each_layer profile_backward")
    | _keys("torch's checkpointing is used", "deepspeed_activation_checkpointing", True)
    | _keys("recomputing is asked for by checkpoint_activations", "activation_checkpointing")
    | _keys("checkpoints are written by this program, not by DeepSpeed", "checkpoint")
    | _keys("data files are memory-mapped and samples computed on demand", "data_impl", "infer", "mmap")
    | _keys("reading needs no worker processes", "num_workers", 0, 1, 2)
    | _keys("the operating system reads ahead", "mmap_warmup")
    | _keys("nothing is built that would have to be shared", "use_shared_fs", True)
    | _keys(
        "the schedule is a function of the step and of these keys only",
        "override_lr_scheduler use_checkpoint_lr_scheduler",
    )
    | _keys("a checkpoint is always complete", "no_save_optim no_save_rng")
    | _keys(
        "every file of a checkpoint has a checksum",
        "checkpoint_validation_with_forward_pass",
    )
    | _keys("every checkpoint can be resumed under another layout", "load_universal")
    | _keys("evaluation always reports bits per byte", "char_level_ppl")
    | _keys("the gradient's norm is always logged", "log_grad_norm")
    | _keys("rank 0 reports for all", "wandb_init_all_ranks")
    | _keys("the log goes to standard error, figures to the run's folder", "log_dir")
    | _keys("progress is printed every log_interval steps", "steps_per_print", 10)
    | _keys(
        "every optimizer here is allowed under ZeRO",
        "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
        True,
        False,
    )
    | _keys("ranks are found in the environment", "deepspeed_mpi deepspeed_slurm detect_nvlink_pairs")
    | _keys("there is no ONNX export", "onnx_safe")
    | _keys("there is one kind of start", "lazy_mpu_init deepscale deepscale_config")
    | _silent("belongs to masked language models", "short_seq_prob")
    | _silent(
        "set during the run, not by the configuration",
        "rank local_rank global_num_gpus user_script git_hash config_files tensorboard_writer tokenizer "
        "comet_experiment adlr_autoresume_object do_train do_valid do_test save_iters padded_vocab_size "
        "dynamic_loss_scale curriculum_seqlen",
    )
    | _silent(
        "belongs to an attention_config kind that is not there",
        "sparsity_config gmlp_attn_dim dim_att head_size ffn_dim mamba_selective_scan_fusion "
        "mamba_causal_conv_fusion mamba_inner_func_fusion mamba_selective_fp32_params "
        "mamba_use_bias_in_conv mamba_use_bias_in_linears",
    )
    | _silent(
        "belongs to a pos_emb that is not there",
        "rpe_num_buckets rpe_max_distance mup_rp_embedding_mult",
    )
    | _silent("belongs to num_unique_layers", "param_sharing_style")
    | _silent("belongs to moe_type: deepspeed", "moe_use_residual")
    | _silent(
        "belongs to moe_token_dropping",
        "moe_train_capacity_factor moe_eval_capacity_factor moe_min_capacity",
    )
    | _keys("there is one kind of experts, without capacity", "moe_type", "megablocks")
    | _keys("experts need no package", "use_tutel")
    | _keys("experts are in parameter groups of their own where they must be", "create_moe_param_group", True)
    | _keys("routing and its loss are always computed in fp32", "moe_lbl_in_fp32")
    | _keys("model_parallel_size divides experts, too", "enable_expert_tensor_parallelism", True, False)
    | _silent(
        "belongs to the te_ layers",
        "te_fp8_format te_fp8_wgrad te_fp8_amax_history_len te_fp8_amax_compute_algo te_fp8_margin",
    )
    | _silent(
        "belongs to serve_model_weights or dataset_impl",
        "weight_server_port online_dataserver_ips online_dataserver_ports",
    )
    | _silent(
        "belongs to train_impl",
        "dpo_fp32 dpo_reference_free dpo_beta kto_fp32 kto_desirable_weight kto_undesirable_weight "
        "kto_beta fp32_reinforce kl_impl kl_div_beta reinforce_leave_one_out",
    )
    | _silent(
        "belongs to use_mup",
        "base_shapes_file mup_init_scale mup_attn_temp mup_output_temp mup_embedding_mult mup_width_scale",
    )
    | _silent(
        "belongs to use_comet",
        "comet_workspace comet_project comet_experiment_name comet_tags comet_others",
    )
    | _silent(
        "belongs to log_gradient_noise_scale",
        "gradient_noise_scale_n_batches gradient_noise_scale_cpu_offload",
    )
    | _keys("fim_rate above 0 alone asks for fill-in-the-middle", "fim_data")
    | _silent("a document ends with the tokenizer's own token", "fim_eod_token")
    | _silent(
        "belongs to profile or memory_profiling",
        "profile_step_start profile_step_stop memory_profiling_path",
    )
    | _silent("belongs to adlr_autoresume", "adlr_autoresume_interval")
    | _silent("belongs to s3_path", "s3_chunk_size")
    | _silent("belongs to autotuning", "autotuning_run")
    | _silent("belongs to text_gen_type: precompute", "precompute_model_name")
)
"""Accepted without effect."""

REFUSED: dict[str, Unused] = (
    _keys("no token is ever dropped; set it to false", "moe_token_dropping")
    | _keys("gated experts are chosen by activation: swiglu", "moe_glu")
    | _keys("the router adds no noise; leave it out", "moe_jitter_eps", 0)
    | _keys("a token goes to its best experts; leave it out", "moe_router_type", "topk", "top_k")
    | _keys("every layer has weights of its own; leave it out", "num_unique_layers")
    | _keys("there is no soft prompt tuning", "soft_prompt_tuning")
    | _keys("a gated MLP is chosen by activation: swiglu", "mlp_type", "regular")
    | _keys("there is no muP", "use_mup coord_check save_base_shapes")
    | _keys(
        "there is no bitsandbytes optimizer; the optimizers are those of optimizer.type",
        "use_bnb_optimizer",
    )
    | _keys(
        "there are no Transformer Engine layers; set it to false",
        "te_columnparallel te_rowparallel te_layernorm_mlp te_mha te_fp8_mha",
    )
    | _keys("weights are not served over sockets", "serve_model_weights")
    | _keys("training is measured in steps: use train_iters", "train_epochs")
    | _keys("the schedule is made of lr_decay_style, warmup and their companions", "scheduler")
    | _keys("there is one kind of data set, of text", "dataset_impl", "gpt2")
    | _keys("training is on next tokens only", "train_impl", "normal")
    | _keys("the z-loss is not there", "z_loss", 0)
    | _keys(
        "data sets with rewards or preferences are not there",
        "train_reward_data_paths "
        "valid_reward_data_paths test_reward_data_paths pos_train_data_paths neg_train_data_paths "
        "pos_valid_data_paths neg_valid_data_paths pos_test_data_paths neg_test_data_paths "
        "pos_train_label_data_paths neg_train_label_data_paths pos_valid_label_data_paths "
        "neg_valid_label_data_paths pos_test_label_data_paths neg_test_label_data_paths",
    )
    | _keys("checkpoints are written to folders", "s3_path")
    | _keys("kept activations stay on the device", "checkpoint_in_cpu")
    | _keys("figures go to JSONL, TensorBoard and Weights & Biases", "use_comet")
    | _keys(
        "this figure is not there",
        "log_grad_pct_zeros log_param_norm log_optimizer_states log_gradient_noise_scale",
    )
    | _keys("profile with flops_profiler or a profiler of torch", "profile memory_profiling")
    | _keys("the scheduler's own requeueing resumes a run", "adlr_autoresume")
    | _keys("logits are not written with samples", "return_logits")
    | _keys("there is no autotuning", "autotuning")
    | _keys("there is no curriculum", "data_efficiency")
    | _keys(
        "DeepSpeed has removed it",
        "amp elasticity sparse_attention curriculum_learning compression_training sparse_gradients "
        "progressive_layer_drop eigenvalue quantize_training nebula graph_harvesting",
    )
)
"""Refused, unless the value asks for nothing."""
