"""What tokenizers call the token that ends a text: for models without settings that say it."""

END_MARKS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<eos>",
    "<end_of_turn>",
    "</s>",
)
