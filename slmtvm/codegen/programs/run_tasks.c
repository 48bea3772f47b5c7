/* What other models than those that write make of a text; the same as slmtvm/runtime/tasks.py, and printed
 * as slmtvm/cli/run.py prints it. This file has what all tasks share, and which of them it is. */
#include "run_tasks.h"

#include <stdlib.h>
#include <string.h>

/* ---- the model ---- */

int32_t vocabulary_of(const runner *r) { return (int32_t)json_number(json_field(r->info, "vocab_size")); }

const char *usual_task(const runner *r) {
  const known_outputs known = look_at_outputs();
  const int is_encoder = is_kind(r, "encoder");
  slm_output first = {.size = sizeof first};
  if (slm_output_info(0, &first) < 0) return "generate";
  const int is_vocabulary = first.features == vocabulary_of(r);
  if (known.start >= 0 && known.end >= 0) return "answer";
  if (!is_encoder && is_vocabulary) return "generate";
  if (!known.named_scores && count_labels(r->info) != (size_t)first.features) return "embed";
  if (first.pooled || !is_encoder) return "classify";
  return is_vocabulary ? "fill" : "entities";
}

/* The tokens of a text or a pair that fit the context. */
int take_text(const runner *r, const text_pair *text, tokenized *made) {
  if (!is_utf8(text->text, text->bytes) || (text->pair && !is_utf8(text->pair, text->pair_bytes)))
    return failed("it is no valid text");
  if (tokenize(r, text, 0, made) != OK) return FAILED;
  const size_t context = (size_t)slm_context_size(), count = made->count;
  if (count && count <= context) return OK;
  forget(made);
  if (!count) return failed("the text is empty: a model needs at least one token");
  return failed("the text has %zu tokens, which do not fit the context of %zu", count, context);
}

int compute_outputs(const runner *r, const int32_t *tokens, const int32_t *segments, size_t count) {
  int32_t code;
  if (!is_kind(r, "encoder")) {
    code = slm_seek(r->session, 0);
    if (code >= 0) code = slm_eval(r->session, tokens, count, NULL);
  } else if (json_number(json_field(r->info, "segments")) > 0) {
    code = slm_encode_segments(r->session, tokens, segments, NULL, count, NULL);
  } else {
    code = slm_encode(r->session, tokens, count, NULL);
  }
  return code < 0 ? slm_failed() : OK;
}

/* An output of what was computed, in memory that the caller frees; NULL after saying why not. */
float *output_of(const runner *r, int32_t index, size_t count, size_t *rows, size_t *features) {
  slm_output o = {.size = sizeof o};
  if (slm_output_info(index, &o) < 0) return slm_failed(), NULL;
  *features = (size_t)o.features;
  *rows = o.pooled || !is_kind(r, "encoder") ? 1 : count;
  float *values = calloc(*rows * *features, sizeof *values);
  if (!values) return failed("no memory for an output"), NULL;
  if (slm_output_get(r->session, index, values) >= 0) return values;
  slm_failed();
  free(values);
  return NULL;
}

/* The first output of a text. */
float *scores_of(const runner *r, const tokenized *t, size_t *rows, size_t *features) {
  if (compute_outputs(r, t->tokens, t->segments, t->count) != OK) return NULL;
  return output_of(r, 0, t->count, rows, features);
}

/* The name of a label; LABEL_3 where the model's settings do not name as many as there are. */
size_t label_name(const runner *r, size_t number, size_t count, char *name) {
  if (count_labels(r->info) == count) {
    const ptrdiff_t length = json_text(label_at(r->info, number), name, LABEL_BYTES);
    if (length >= 0) return (size_t)length;
  }
  return (size_t)snprintf(name, LABEL_BYTES, "LABEL_%zu", number);
}

/* ---- printing ---- */

/* {"text": ..., "pair": ..., "`what`": */
void begin_json(const text_pair *text, const char *what) {
  fputs("{\"text\": ", stdout);
  print_string(text->text, text->bytes);
  if (text->pair) {
    fputs(", \"pair\": ", stdout);
    print_string(text->pair, text->pair_bytes);
  }
  printf(", \"%s\": ", what);
}

void begin_lines(const settings *s, const text_pair *text, int many) {
  if (s->json || !many) return;
  fwrite(text->text, 1, text->bytes, stdout);
  if (text->pair) {
    putchar('\t');
    fwrite(text->pair, 1, text->pair_bytes, stdout);
  }
  putchar('\n');
}

int end_output(const settings *s) {
  if (s->json) puts("}");
  return fflush(stdout) ? failed("the output cannot be written") : OK;
}

void print_named(const char *before, const char *name, const char *bytes, size_t length) {
  printf("%s\"%s\": ", before, name);
  print_string(bytes, length);
}

void print_score(const char *before, float score) {
  printf("%s\"score\": ", before);
  print_number(score);
}

/* Characters before byte `at`. */
size_t characters_before(const char *text, size_t at) {
  size_t count = 0;
  for (size_t i = 0; i < at; ++i) count += ((unsigned char)text[i] & 0xc0) != 0x80;
  return count;
}

void print_place(const char *text, size_t begin, size_t end) {
  printf(", \"start\": %zu, \"end\": %zu", characters_before(text, begin), characters_before(text, end));
}

/* The greatest of what is not taken yet, the first of equal ones; it is taken. */
size_t take_greatest(const float *values, size_t count, unsigned char *taken) {
  size_t best = count;
  for (size_t i = 0; i < count; ++i)
    if (!taken[i] && (best == count || values[i] > values[best])) best = i;
  if (best < count) taken[best] = 1;
  return best;
}

/* ---- which ---- */

int begin_task(const runner *r, const settings *s, const char *task) {
  return strcmp(task, "embed") == 0 ? begin_embed(r, s) : OK;
}

int run_task(runner *r, const settings *s, const char *task, const text_pair *text, int many) {
  if (strcmp(task, "classify") == 0) return classify(r, s, text, many);
  if (strcmp(task, "answer") == 0) return answer(r, s, text, many);
  if (text->pair) return failed("a pair is given, and the task (%s) takes one text", task);
  if (strcmp(task, "entities") == 0) return entities(r, s, text, many);
  return strcmp(task, "fill") == 0 ? fill(r, s, text, many) : embed(r, s, text, many);
}
