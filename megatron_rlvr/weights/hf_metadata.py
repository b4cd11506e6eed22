"""Fields of config.json that cannot change what the weights compute."""

from __future__ import annotations

# fmt: off
METADATA_FIELDS = frozenset({
    # Where the file came from and how it was made.
    "_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "model_type", "architectures",
    "torch_dtype", "dtype", "tokenizer_class", "model_max_length", "finetuning_task", "task_specific_params",
    "prefix", "problem_type", "id2label", "label2id", "num_labels", "initializer_range",
    "_attn_implementation", "attn_implementation", "_attn_implementation_autoset", "_experts_implementation",
    "experts_implementation", "unsloth_version", "unsloth_fixed",
    # What calls return and how they are run.
    "use_cache", "return_dict", "output_hidden_states", "output_attentions", "output_scores",
    "return_dict_in_generate", "torchscript", "use_bfloat16", "tf_legacy_loss", "use_return_dict",
    # Special tokens and generation settings, which old files keep here.
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "cls_token_id",
    "decoder_start_token_id", "temperature", "top_k", "top_p", "typical_p", "do_sample", "max_length", "min_length",
    "max_new_tokens", "num_beams", "num_beam_groups", "num_return_sequences", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "early_stopping",
    "diversity_penalty", "bad_words_ids", "begin_suppress_tokens", "suppress_tokens",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values",
})
# fmt: on
