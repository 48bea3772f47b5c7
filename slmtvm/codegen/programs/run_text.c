/* The tokens of a text. */
#include <stdlib.h>
#include <string.h>

#include "run.h"

void forget(tokenized *made) {
  free(made->tokens);
  free(made->segments);
  free(made->spans);
  *made = (tokenized){0};
}

static int32_t call(const runner *r, const text_pair *text, uint32_t flags, tokenized *made,
                    size_t room, void *work, size_t work_bytes) {
  if (!text->pair)
    return slm_tokenize(r->tokenizer, text->text, text->bytes, flags, made->tokens, made->spans, room,
                        work, work_bytes);
  return slm_tokenize_pair(r->tokenizer, text->text, text->bytes, text->pair, text->pair_bytes, flags,
                           made->tokens, made->segments, made->spans, room, work, work_bytes);
}

int tokenize(const runner *r, const text_pair *text, uint32_t flags, tokenized *made) {
  const size_t bytes = text->bytes + (text->pair ? text->pair_bytes : 0);
  *made = (tokenized){0};
  if (bytes > MOST_TEXT_BYTES) return failed("a text is longer than 64 MB");
  const int64_t work_bytes = slm_tokenize_bytes(r->tokenizer, bytes);
  if (work_bytes < 0) return slm_failed();
  void *work = malloc((size_t)work_bytes);
  const int32_t count = work ? call(r, text, flags, made, 0, work, (size_t)work_bytes) : 0;
  const size_t room = count > 0 ? (size_t)count : 1;
  made->tokens = calloc(room, sizeof *made->tokens);
  made->segments = calloc(room, sizeof *made->segments);
  made->spans = calloc(room, sizeof *made->spans);
  int code = OK;
  if (count < 0) code = slm_failed();
  else if (!work || !made->tokens || !made->segments || !made->spans)
    code = failed("no memory for the tokens of a text");
  else call(r, text, flags, made, room, work, (size_t)work_bytes);
  free(work);
  if (code != OK) forget(made);
  else made->count = (size_t)count;
  return code;
}
