"""Why a test of transformers' mixins does not run here, and which ones are answered in another way: the two tables.

A skip that neither a line of `SKIPS` explains nor a reason given by `own` makes the run fail.
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Skip:
    """Skips with one reason.

    Args:
        tests: regular expression for the whole name of a test.
        said: regular expression that is found in the reason that the test gave.
        reason: ours: what of the machine, the library or the architecture leaves nothing to test.
    """

    tests: str
    said: str
    reason: str

    def explains(self, test: str, said: str) -> bool:
        return bool(re.fullmatch(self.tests, test) and re.search(self.said, said))


OWN = "Florence: "
ANY = r"test_\w+"
NOT_COMPOSITE = "The class has one configuration and nothing composite about it; `FlorenceModel` runs the test."
NO_LANGUAGE_MODEL = "No class predicts the next token: there is no language modelling head."
NO_EXPERTS = "No layer is a mixture of experts."
NO_ROPE = "Positions are learnt (text) or relative inside windows (pictures): nothing is rotary."
NO_VOCABULARY = "An image tower reads pixels: it has no vocabulary to resize."
NO_CHAT = "Florence compares pictures with plain texts: it does not converse and has no chat template."
NO_PLACEHOLDERS = "Pictures and texts go into separate towers: no token of a text stands for a picture."
NO_SUCH_HEAD = "No public class serves this pipeline."

SKIPS = (
    # The machine
    Skip(ANY, r"^test requires (multiple )?accelerators?$", "Needs an accelerator: there the same command runs it."),
    Skip(ANY, r"^test requires MPS$", "Needs Apple's accelerator: there the same command runs it."),
    Skip(
        ANY,
        r"^test requires the kernels library$",
        "Replaces layers by GPU kernels from the Hub: needs GPU and network.",
    ),
    Skip(
        r"test_flash_attn_\w+",
        r"^test requires Flash Attention",
        "Needs a GPU. There the text tower runs it; an image tower refuses flash attention: it takes no bias.",
    ),
    Skip(
        r"test_resize_\w+_with_deepspeed\w*",
        r"^test requires deepspeed$",
        "Resizes a vocabulary while ZeRO-3 shards it: needs DeepSpeed and an accelerator.",
    ),
    # The architecture: models
    Skip(r"test_attn_implementation_composite_models", r"not a composite", NOT_COMPOSITE),
    Skip(r"test_can_set_attention_dynamically_composite_model", r"not composite", NOT_COMPOSITE),
    Skip(r"test_internal_model_config_and_subconfig_are_same", r"No subconfigs", NOT_COMPOSITE),
    Skip(r"test_sdpa_can_dispatch_composite_models", r"does not support SDPA", NOT_COMPOSITE),
    Skip(
        r"test_sdpa_can_dispatch_non_composite_models",
        r"^Florence(Model|Fusion\w+|For(QuestionAnswering|\w+TextRetrieval|PreTraining|ImageCaptioning)) does not",
        "For classes of one tower, which run it; `FlorenceModel` runs the test for composite ones.",
    ),
    Skip(
        r"test_sdpa_can_dispatch_composite_models",
        r"does not have both a non-text modality tower and a language sub-model",
        "The captioning decoder is no model of its own; its file's own tests compare sdpa with eager.",
    ),
    Skip(
        r"test_encoder_decoder_loss_no_double_shift",
        r"not an encoder-decoder",
        "The decoder looks at picture tokens, not at an encoder of texts.",
    ),
    Skip(
        r"test_(causal_lm_loss_honors_shift_labels|encoder_decoder_loss_no_double_shift)",
        r"No (decoder-only|sequence-to-sequence) language modeling head",
        NO_LANGUAGE_MODEL,
    ),
    Skip(r"test_eager_matches_batched_and_grouped_inference_\w+", r"does not support grouped_mm", NO_EXPERTS),
    Skip(r"test_moe_models_record_router_logits", r"no sparse experts", NO_EXPERTS),
    Skip(r"test_output_router_logits_from_config", r"no `output_router_logits`", NO_EXPERTS),
    Skip(
        r"test_(model_rope_\w+|vision_axial_rope)",
        r"RoPE|no `base_model_class` defined in tester",
        NO_ROPE,
    ),
    Skip(
        r"test_resize_(tokens_embeddings|embeddings_untied\w*)",
        r"test_resize_embeddings is set to `False`",
        NO_VOCABULARY,
    ),
    Skip(
        r"test_resize_position_vector_embeddings",
        r"does not have position embeddings",
        "No position embeddings change size: windows have relative ones (`resize_window_size` has its own tests), "
        "and the length of a text is fixed with its tokenizer, as in transformers' CLIP.",
    ),
    Skip(
        r"test_inputs_embeds\w*",
        r"doesn't use `inputs_embeds`",
        "Pixels are no embeddings; a text is pooled at its end token, which is found by its id in `input_ids`.",
    ),
    Skip(
        r"test_keep_in_fp32_modules\w*",
        r"_keep_in_fp32_modules",
        "No weight must stay float32: what is sensitive (softmax, logits, losses) casts its inputs instead.",
    ),
    Skip(
        r"test_(reverse_loading_mapping|can_load_from_already_mapped_keys)",
        r"No conversion found",
        "A checkpoint holds the model's own names: nothing is renamed while it is loaded.",
    ),
    Skip(
        r"test_sliding_window_mask",
        r"does not support sliding window",
        "About windows that slide over the tokens of a long text; Florence's lie side by side on a picture's grid.",
    ),
    Skip(
        r"test_(tp_plan_matches_params|tied_head_has_a_tp_plan_entry)",
        r"does not have a TP plan",
        "No plan for tensor parallelism is declared: the paper's largest model (893M parameters) fits one device.",
    ),
    Skip(
        r"test_torch_save_load",
        r"^Florence((ZeroShot)?Detection|Captioning)Config not in MODEL_MAPPING",
        "Compares a head with its base model; here that is an image tower, of another configuration.",
    ),
    # The architecture: image processors, processor, tokenizer, pipelines
    Skip(
        r"test_(image|video)_processor_preprocess_arguments",
        r"No validation found",
        "Checks two ways of validating arguments that image processors of this kind replaced by typed settings.",
    ),
    Skip(
        r"test_override_instance_attributes_does_not_affect_other_instances",
        r"does not have dict size or list image_mean",
        "Writes into a processor's settings; here they are a typed object and tuples.",
    ),
    Skip(r"test_(apply_)?chat_template\w*", r"chat template|requires (librosa|Torchcodec)", NO_CHAT),
    Skip(
        r"test_\w+_\d_(videos|audio)",
        r"(video_processor|feature_extractor) attribute not present",
        "The processor takes pictures and texts, neither videos nor sound.",
    ),
    Skip(r"test_(get_num_multimodal_tokens\w+|replacement_offsets)", r"_get_num_multimodal_tokens", NO_PLACEHOLDERS),
    Skip(
        r"test_integration(_from_extractor)?",
        r"No integration expected tokens",
        "Compares with the tokens of a published vocabulary; Florence's was never published.",
    ),
    Skip(
        r"test_(backends_equivalence|save_load_backends|pil_can_run_without_torchvision)\w*",
        r"less than 2 backends|no PIL backend",
        "The detector computes with torchvision, so its image processor has that backend alone.",
    ),
    Skip(r"test_prepare_seq2seq_batch", r"test_seq2seq is set to False", NO_LANGUAGE_MODEL),
    Skip(r"test_pipeline_\w+", r"is not in `self.pipeline_model_mapping`|requires PyTesseract$", NO_SUCH_HEAD),
    Skip(
        r"test_pipeline_video_classification\w*",
        r"requires av$",
        "transformers' pipeline for videos needs PyAV: pip install 'transformers_florence[video]'.",
    ),
    Skip(r"test_pipeline_mask_generation\w*", r"currently not implemented", NO_SUCH_HEAD),
)

# Tests whose check was written for another shape of model: this package's version runs in its place and counts.
ADAPTED = {
    "test_training": "also trains a base model that has a loss of its own",
    "test_attention_outputs": "weights of each window of each layer, of both towers; shapes and sums",
    "test_hidden_states_output": "grids of falling size, of both towers",
    "test_retain_grad_hidden_states_attentions": "the gradient reaches what each tower recorded",
    "test_model_get_set_embeddings": "an image tower's input embedding is a convolution",
    "test_get_image_features_pooler_output": "the shapes of features and tokens, the last stage's width included",
    "test_get_video_features_pooler_output": "the same of clips",
    "test_training_overfit": "on the batch of the entry; upstream makes texts only",
    "test_call_sample_frames": "a clip of fewer frames than are asked for repeats them instead of being refused",
    "test_call_numpy_4_channels": "a fourth channel is transparency and laid on the matte; four means are refused",
    "test_pil_can_run_without_torchvision": "the child process imports this package, by which the processor is found",
    "test_maximum_encoding_length_single_input": "without this tokenizer's one difference: it cuts unless told not to",
    "test_maximum_encoding_length_pair_input": "the same, with pairs of texts",
}


def own(reason: str) -> str:
    """The words for `unittest.skip` when it is this folder that skips a test of one class."""
    return OWN + reason


def explain(test: str, said: str) -> str | None:
    """Why `test` was skipped, which gave the reason `said`: a line of the table or a reason of `own`, else None."""
    if said.startswith(OWN):
        reason = said.removeprefix(OWN)
        return reason if is_sentence(reason) else None
    return next((skip.reason for skip in SKIPS if skip.explains(test, said)), None)


def is_sentence(reason: str) -> bool:
    """Whether a reason can be read: some words and a full stop."""
    return len(reason.split()) >= 5 and reason.endswith(".")


__all__ = ["ADAPTED", "SKIPS", "Skip", "explain", "is_sentence", "own"]
