/* Tokens that a vocabulary marks by their text, where a model's settings name none. */
#ifndef SLM_MARKS_H
#define SLM_MARKS_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "slm.h"

/* After which a text is over, and with which an encoder-decoder starts. */
static const char *const END_MARKS[] = {"<|endoftext|>", "<|end_of_text|>", "<|eot_id|>",
                                        "<|im_end|>",    "<|end|>",         "<eos>",
                                        "<end_of_turn>", "</s>",            NULL};
static const char *const START_MARKS[] = {"<pad>", "[PAD]", "<|pad|>", NULL};

/* The first tokens of `marks`, up to `most`, that the vocabulary has: how many; none without a
 * tokenizer. */
static inline size_t find_marks(const slm_tokenizer *tokenizer, const char *const *marks,
                                int32_t *tokens, size_t most) {
  size_t count = 0;
  for (; tokenizer && *marks && count < most; ++marks) {
    int32_t token = slm_token_find(tokenizer, *marks, strlen(*marks));
    if (token >= 0) tokens[count++] = token;
  }
  return count;
}

#endif
