"""The keys of a Hugging Face config.json, read with a record of what was read."""

from typing import Any

# Keys that do not change what the model computes: training, memory, provenance, generation (which
# `generation` reads), and the tokenizer.
NO_EFFECT = frozenset(
    """
    _name_or_path architectures attention_dropout attention_probs_dropout_prob attn_dropout
    attn_implementation attn_pdrop auto_map bos_token_id chunk_size_feed_forward
    classifier_bias classifier_dropout classifier_pooling classifier_activation cls_token_id
    cross_attention_hidden_size dropout dtype embd_pdrop embedding_dropout eos_token_id
    finetuning_task gradient_checkpointing
    hidden_dropout hidden_dropout_prob id2label init_std initializer_cutoff_factor
    initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id
    layerdrop mask_token_id max_length mlp_dropout offset_alibi output_attentions
    output_hidden_states output_router_logits pad_token_id position_embedding_type prefix
    pretraining_tp problem_type reference_compile repad_logits_with_grad resid_pdrop
    resid_dropout residual_dropout return_dict return_dict_in_generate router_aux_loss_coef
    router_jitter_noise router_z_loss_coef scan_layers sep_token_id slow_but_exact
    sparse_pred_ignore_index sparse_prediction summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj task_specific_params temperature
    tokenizer_class top_k top_p torch_dtype transformers_version transformers.js_config
    type_vocab_size unk_token_id unsloth_fixed use_cache use_mem_eff_path vision_config
    bad_words_ids begin_suppress_tokens decoder_start_token_id do_sample length_penalty
    min_length no_repeat_ngram_size num_beams repetition_penalty suppress_tokens
    attention_type deterministic_flash_attn max_window_layers decoder_bias
    layer_norm_elementwise_affine fused_bias_fc is_cross_attention cache_implementation
    _attn_implementation_autoset n_positions_original experts_implementation
    encoder_no_repeat_ngram_size n_ctx
    """.split()
)

# Types of values: a wrong one would be understood as another model, or as none.
_INTEGERS = frozenset(
    """
    decoder_sparse_step experts_per_token ffn_dim ffn_hidden_size global_attn_every_n_layers
    head_dim hidden_size intermediate_size local_attention max_position_embeddings
    max_window_layers moe_intermediate_size n_embd n_embed n_head n_inner n_layer n_positions
    num_attention_heads num_experts num_experts_per_tok num_hidden_layers num_key_value_heads
    n_head_kv no_rope_layer_interval num_kv_heads num_local_experts num_ln_in_parallel_attn
    original_max_position_embeddings rotary_dim seq_length sliding_window sliding_window_pattern
    _sliding_window_pattern vocab_size word_embed_proj_dim
    """.split()
)
_NUMBERS = frozenset(
    """
    attention_multiplier attn_logit_softcapping embedding_multiplier final_logit_softcapping
    global_rope_theta initializer_range init_std
    layer_norm_eps layer_norm_epsilon local_rope_theta logit_scale logits_scaling norm_eps
    norm_epsilon partial_rotary_factor query_pre_attn_scalar residual_multiplier rms_norm_eps
    rope_local_base_freq rope_theta rotary_emb_base rotary_pct
    """.split()
)
_BOOLEANS = frozenset(
    """
    alibi attention_bias bias decoder_bias mlp_bias multi_query new_decoder_architecture
    norm_topk_prob parallel_attn tie_word_embeddings use_bias use_parallel_residual
    use_qk_norm use_qkv_bias use_sliding_window
    """.split()
)
_STRINGS = frozenset(
    "activation activation_function hidden_act hidden_activation model_type".split()
)
_LISTS = frozenset("layer_types mlp_only_layers no_rope_layers".split())
_OBJECTS = frozenset("rope_parameters rope_scaling text_config".split())
_KINDS: tuple[tuple[frozenset[str], type | tuple[type, ...], str], ...] = (
    (_INTEGERS, int, "a whole number"),
    (_NUMBERS, (int, float), "a number"),
    (_BOOLEANS, bool, "true or false"),
    (_STRINGS, str, "a string"),
    (_LISTS, list, "a list"),
    (_OBJECTS, dict, "an object"),
)


def check_types(config: dict) -> None:
    """Raise ValueError that names the first key of a config.json whose value has another type than
    the key has in transformers; null passes."""
    for names, kind, said in _KINDS:
        for key in names & config.keys():
            value = config[key]
            wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
            if value is not None and wrong:
                raise ValueError(
                    f"{key}={value!r} of config.json must be {said}; correct it, or copy the file "
                    "again"
                )


class Keys:
    """A config.json whose keys are marked as read. ``defaults`` are those of the model's class in
    transformers, for keys that a file leaves out."""

    def __init__(self, config: dict, defaults: dict | None = None):
        self._config = config
        self._defaults = defaults or {}
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise ValueError(f"config.json has no {key}; copy it from the model's page")
        return value

    def get(self, *keys: str, default: Any = None) -> Any:
        """Return the value of the first of ``keys`` that is there and not null; all count as
        read."""
        self._read.update(keys)
        for source in (self._config, self._defaults):
            for key in keys:
                if source.get(key) is not None:
                    return source[key]
        return default

    def number(self, *keys: str, default: float | None = None) -> Any:
        """Return a number. Raises ValueError if it is something else, or missing without a
        default."""
        value = self.get(*keys, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            name = next((key for key in keys if self._config.get(key) is not None), keys[0])
            raise ValueError(f"{name}={value!r} of config.json must be a number; correct it")
        return value

    def must_be(self, key: str, *allowed: Any) -> None:
        """Raise ValueError if ``key`` has another value; null and missing keys pass."""
        value = self.get(key)
        if value is not None and value not in allowed:
            raise ValueError(
                f"{key}={value!r} of config.json is not supported; it must be "
                f"{' or '.join(map(repr, allowed))}"
            )

    def refuse_unread(self) -> None:
        """Raise ValueError naming the keys that may change what the model computes and were not
        read."""
        left = {
            key: value
            for key, value in self._config.items()
            if key not in self._read
            and key not in NO_EFFECT
            and value not in (None, False, "", [])
            and value != {}
        }
        if left:
            shown = ", ".join(f"{key}={value!r}" for key, value in list(left.items())[:4])
            raise ValueError(
                f"config.json has keys that are not understood and may change the model: {shown}"
                f"{' ...' if len(left) > 4 else ''}; remove them if they do not"
            )
