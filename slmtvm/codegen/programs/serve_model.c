/* The model that is served: what its library says of it, its sessions, and the memory of all. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "key.h"
#include "marks.h"
#include "public_keys.h"
#include "serve.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

enum {
  PAGE = 4096,
  TEXT_BYTES = 64 << 10, TOKEN_TEXT_BYTES = 32, /* of a prompt: so much, and so much for each token */
  ANSWER_BYTES = 4 << 10, TOKEN_ANSWER_BYTES = 16
};

static int slm_failed(void) {
  fprintf(stderr, "slm-serve: error: %s\n", slm_last_error());
  return -1;
}

static int32_t whole_field(json object, const char *name, int32_t otherwise) {
  double value = json_number(json_field(object, name));
  return value >= 0 && value <= INT32_MAX ? (int32_t)value : otherwise;
}

/* The tokens after which a text is over, and that of an encoder-decoder's start: the model's settings
 * say them, else the tokenizer. */
static void find_marked_tokens(served_model *m) {
  const char *cursor = NULL;
  json end;
  while (m->end_count < MOST_ENDS && json_next(json_field(m->info, "end"), &cursor, &end))
    m->ends[m->end_count++] = (int32_t)json_number(end);
  if (m->end_count == 0) m->end_count = (int)find_marks(m->tokenizer, END_MARKS, m->ends, MOST_ENDS);
  find_marks(m->tokenizer, START_MARKS, &m->start, 1);
  m->start = whole_field(m->info, "start", m->start);
}

/* A prompt is evaluated in pieces, so that others do not wait for all of it: of the most rows that the
 * model computes at once, which read the weights once. */
static int32_t chunk_of(json info) {
  const char *cursor = NULL;
  json rows;
  int32_t chunk = 1;
  while (json_next(json_field(info, "chunks"), &cursor, &rows))
    if (json_number(rows) > chunk) chunk = (int32_t)json_number(rows);
  return chunk;
}

static int describe(served_model *m) {
  size_t place;
  const char *info = slm_info();
  if (json_check(info, strlen(info), &m->info, &place)) {
    fprintf(stderr, "slm-serve: error: the library's description is damaged\n");
    return -1;
  }
  json kind = json_field(m->info, "kind");
  m->kind = json_is(kind, "encoder") ? KIND_ENCODER
            : json_is(kind, "encoder-decoder") ? KIND_ENCODER_DECODER : KIND_DECODER;
  m->context = slm_context_size();
  m->source_context = whole_field(m->info, "source_context", 0);
  m->vocabulary = whole_field(m->info, "vocab_size", slm_output_size());
  m->chunk = chunk_of(m->info);
  return 0;
}

int open_model(server *s) {
  served_model *m = &s->model;
  if (describe(m) < 0) return -1;
  if (take_weights_key("slm-serve", &s->options.open) < 0) return -1;
  char *keys = NULL;
  if (s->options.keys && !(keys = read_keys(s->options.keys))) {
    fprintf(stderr, "slm-serve: error: --keys %s: cannot be read, or is empty\n", s->options.keys);
    return -1;
  }
  s->options.open.public_keys = keys;
  int32_t opened = slm_open(s->options.bundle, &s->options.open, &m->model);
  free(keys);
  s->options.open.public_keys = NULL;
  forget_weights_key();
  if (opened < 0) return slm_failed();
  if (slm_tokenizer_open(s->options.bundle, &m->tokenizer) < 0)
    snprintf(m->no_tokenizer, sizeof m->no_tokenizer, "%s", slm_last_error());
  find_marked_tokens(m);
  if (open_constraints(s) < 0 || chat_open("slm-serve", s->options.bundle, &m->chat) < 0) return -1;
  open_calls(m);
  return 0;
}

void close_model(server *s) {
  for (long i = 0; s->model.slots && i < s->options.sessions; ++i)
    slm_session_free(s->model.slots[i].session);
  close_constraints(s);
  slm_close(s->model.model);
  slm_tokenizer_close(s->model.tokenizer);
  if (s->connections) munmap(s->connections, s->mapped_bytes);
  chat_close(&s->model.chat);
}

/* ---- memory: one mapping, each part at pages of its own ---- */

typedef struct {
  char *base;
  size_t used;
} region;

static void *take(region *r, size_t bytes) {
  size_t at = r->used;
  r->used += (bytes + PAGE - 1) / PAGE * PAGE;
#ifdef __SANITIZE_ADDRESS__
  r->used += PAGE; /* no part touches the next one, and what is between them may not be touched */
  if (r->base) __asan_poison_memory_region(r->base + at + bytes, r->used - at - bytes);
#endif
  return r->base ? r->base + at : NULL;
}

/* Without a base: only how much it is. */
static void lay_out(server *s, region *r) {
  served_model *m = &s->model;
  size_t longest = (size_t)(m->context > m->source_context ? m->context : m->source_context);
  size_t row = (size_t)slm_output_size();
  for (int32_t i = 0; i < slm_output_count(); ++i) {
    slm_output output = {.size = sizeof output};
    if (slm_output_info(i, &output) < 0) continue;
    size_t floats = (size_t)output.features;
    if (m->kind == KIND_ENCODER && !output.pooled) floats *= longest + 1;
    if (floats > row) row = floats;
  }
  s->connections = take(r, (size_t)s->options.connections * sizeof *s->connections);
  m->slots = take(r, (size_t)s->options.sessions * sizeof *m->slots);
  for (long i = 0; i < s->options.sessions; ++i) {
    int32_t *tokens = take(r, longest * sizeof *tokens);
    if (r->base) m->slots[i].tokens = tokens;
  }
  for (long i = 0; i < s->options.connections; ++i) {
    connection c = {.fd = -1};
    c.in = take(r, HEAD_BYTES + (size_t)s->options.body_bytes);
    c.out = take(r, OUT_BYTES);
    c.text = take(r, s->text_room);
    c.tokens = take(r, s->token_room * sizeof *c.tokens);
    c.likeliest = take(r, s->token_room * (1 + MOST_LIKELY) * sizeof *c.likeliest);
    if (r->base) s->connections[i] = c;
  }
  const size_t sessions = (size_t)s->options.sessions;
  s->together = take(r, sessions * sizeof *s->together);
  s->together_in = take(r, sessions * sizeof *s->together_in);
  s->together_tokens = take(r, sessions * sizeof *s->together_tokens);
  s->audit.pending = take(r, s->audit.file < 0 ? 0 : (size_t)s->options.connections * AUDIT_LINE);
  s->scratch = take(r, s->scratch_bytes);
  s->work = take(r, s->work_bytes);
  s->values = take(r, row * sizeof *s->values);
}

int64_t plan_memory(server *s) {
  served_model *m = &s->model;
  size_t longest = (size_t)(m->context > m->source_context ? m->context : m->source_context);
  s->text_room = ANSWER_BYTES + TOKEN_ANSWER_BYTES * longest;
  for (int32_t i = 0; i < slm_output_count(); ++i) { /* an embedding is put there, too */
    slm_output output = {.size = sizeof output};
    size_t bytes = slm_output_info(i, &output) < 0 ? 0 : (size_t)output.features * sizeof(float);
    if (bytes > s->text_room) s->text_room = bytes;
  }
  s->token_room = longest + 2;
  s->scratch_bytes = TEXT_BYTES + TOKEN_TEXT_BYTES * longest;
  int64_t work = m->tokenizer ? slm_tokenize_bytes(m->tokenizer, s->scratch_bytes) : 0;
  if (work < 0) return slm_failed();
  s->work_bytes = (size_t)work;
  region r = {NULL, 0};
  lay_out(s, &r);
  /* Pages that no request reaches are never touched. */
  r.base = mmap(NULL, r.used, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                -1, 0);
  if (r.base == MAP_FAILED) {
    fprintf(stderr, "slm-serve: error: no memory for %zu bytes: %s; fewer --connections, or a smaller "
                    "--max-body\n", r.used, strerror(errno));
    s->connections = NULL;
    return -1;
  }
  r.used = 0;
  lay_out(s, &r);
  s->mapped_bytes = r.used;
  for (long i = 0; i < s->options.sessions; ++i)
    if (slm_session_new(m->model, &m->slots[i].session) < 0) return slm_failed();
  return (int64_t)r.used + s->options.sessions * slm_session_bytes(m->model);
}
