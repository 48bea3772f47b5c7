/* Embeddings: the model's own, or rows of tokens pooled. */
#include <stdlib.h>
#include <string.h>

#include "run_tasks.h"

/* Where the rows of a text's tokens are; NULL after saying that there are none. */
static float *rows_of(const runner *r, const tokenized *t, int32_t index, size_t *features) {
  size_t rows;
  if (index < 0)
    return failed("the model gives no rows of tokens to pool: its graph pools them itself"), NULL;
  if (is_kind(r, "encoder")) {
    if (compute_outputs(r, t->tokens, t->segments, t->count) != OK) return NULL;
    return output_of(r, index, t->count, &rows, features);
  }
  *features = (size_t)slm_output_size();
  float *values = calloc(t->count * *features, sizeof *values);
  if (!values) return failed("no memory for an output"), NULL;
  if (slm_seek(r->session, 0) >= 0 &&
      slm_eval_all(r->session, t->tokens, t->count, values) >= 0)
    return values;
  slm_failed();
  free(values);
  return NULL;
}

static void settings_pooling(const runner *r, char how[POOLING_BYTES]) {
  json pooling = json_field(json_field(r->info, "task"), "pooling");
  const ptrdiff_t length = json_kind(pooling) == '"' ? json_text(pooling, how, POOLING_BYTES - 1) : 0;
  how[length > 0 ? length : 0] = 0;
}

/* The embedding of a text, `*width` floats in memory that the caller frees. */
static float *embedding_of(const runner *r, const settings *s, const tokenized *t, size_t *width) {
  const known_outputs known = look_at_outputs();
  char how[POOLING_BYTES];
  size_t rows;
  if (known.embedding >= 0 && !s->pool) {
    if (compute_outputs(r, t->tokens, t->segments, t->count) != OK) return NULL;
    return output_of(r, known.embedding, t->count, &rows, width);
  }
  settings_pooling(r, how);
  float *all = rows_of(r, t, known.rows, width);
  float *values = all ? calloc(*width, sizeof *values) : NULL;
  if (values) pool_rows(all, t->count, *width, s->pool ? s->pool : how, values);
  else if (all) failed("no memory for an embedding");
  free(all);
  return values;
}

int embed(const runner *r, const settings *s, const text_pair *text, int many) {
  tokenized t;
  size_t width;
  if (take_text(r, text, &t) != OK) return FAILED;
  float *values = embedding_of(r, s, &t, &width);
  forget(&t);
  if (!values) return FAILED;
  json said = json_field(json_field(r->info, "task"), "normalize");
  if (s->normalize < 0 ? json_is_true(said) : s->normalize) make_length_one(values, width);
  begin_lines(s, text, many);
  if (s->json) begin_json(text, "embedding");
  for (size_t i = 0; i < width; ++i) {
    if (s->json) {
      fputs(i ? ", " : "[", stdout);
      print_number(values[i]);
    } else {
      printf("%s%.6g", i ? " " : many ? "  " : "", (double)values[i]);
    }
  }
  puts(s->json ? "]}" : "");
  free(values);
  return fflush(stdout) ? failed("the output cannot be written") : OK;
}

int begin_embed(const runner *r, const settings *s) {
  json said = json_field(r->info, "task"), missing = json_field(said, "missing"), word;
  const char *cursor = NULL;
  char name[LABEL_BYTES], how[POOLING_BYTES];
  int count = 0;
  if (s->pool || look_at_outputs().embedding >= 0) return OK;
  while (json_next(missing, &cursor, &word)) {
    const ptrdiff_t length = json_text(word, name, sizeof name);
    fprintf(stderr, "%s%.*s", count++ ? ", " : "slm-run: modules.json asks for ",
            (int)(length > 0 ? length : 0), name);
  }
  if (count) fputs(" too, which is left out\n", stderr);
  settings_pooling(r, how);
  if (!*how) fputs("slm-run: the mean of the tokens' rows: choose with --pool\n", stderr);
  return OK;
}
