"""Which attributes of a config.json change no logit, by kind: they are read past."""

import re
from typing import Any

# What transformers takes for a GenerationConfig, of versions 4 and 5, and what it says of a model's outputs.
_GENERATION = """
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens cache_implementation constraints
    diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty force_words_ids forced_decoder_ids guidance_scale length_penalty max_length max_new_tokens
    max_time min_length min_new_tokens min_p no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule
    num_beam_groups num_beams num_return_sequences output_attentions output_hidden_states output_logits output_scores
    penalty_alpha prefix remove_invalid_values renormalize_logits repetition_penalty return_dict return_dict_in_generate
    stop_strings suppress_tokens target_lookbehind task_specific_params temperature tie_last_hidden_states tf_legacy_loss top_k
    top_p torchscript typical_p use_bfloat16 use_cache keys_to_ignore_at_inference watermarking_config
"""

# Of the type of the weights (they are read as they are stored), of how a product is computed but not which, and of classifiers.
_OTHERS = """
    architectures chunk_size_feed_forward dtype finetuning_task gradient_checkpointing id2label label2id model_type num_labels
    pretraining_tp problem_type summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
    torch_dtype transformers_weights
"""

_NAMES = frozenset((_GENERATION + _OTHERS).split())

_KINDS = (
    r"\w*_token_(ids?|index)",  # pad_token_id, unk_token_id, image_token_index; bos and eos are read
    r"_?\w*name_or_path|_commit_hash|model_name|base_model|license|tags|language|author|description|_?(comment|note)s?",
    r"tokenizer(_\w+)?|\w+_tokenizer|chat_template|padding_side|add_(bos|eos)_token|(bos|eos|pad|unk|mask|sep|cls)_token",
    r"(model_)?max_seq(uence)?(_len(gth)?)?|max_seq_length|model_max_length|seq(uence)?_length|context_length|n_ctx|n_positions",
    r"initializer_\w+|(\w+_)?(dropout|pdrop)(_p|_prob|_rate)?|training_\w+|train_\w+|pretrain(ed|ing)_(steps|tokens|data\w*)",
    r"_?(attn|attention|experts)_implementation\w*|use_(flash|sdpa|memory_efficient)_?\w*|_?flash_attn\w*",
    r"base_model_(tp|pp|ep|fsdp)_plan|\w+_version|unsloth_\w+|axolotl_\w+|transformers\.js_config|is_\w+_config",
)
_KIND = re.compile("|".join(f"(?:{kind})" for kind in _KINDS))


def changes_no_logit(name: str, value: Any = None) -> bool:
    """Whether an attribute of config.json may be read past: generation, names and paths, tokenizer, training, tools, versions.

    One that is null is none.

    Args:
        name: of the attribute.
        value: of it, as JSON has it.

    Example:
        >>> changes_no_logit("unk_token_id", 0), changes_no_logit("qk_norm", True), changes_no_logit("qk_norm", None)
        (True, False, True)
    """
    if name.endswith("_version") and not isinstance(value, str | None):
        return False  # a number could choose a formula
    return value is None or name in _NAMES or _KIND.fullmatch(name) is not None
