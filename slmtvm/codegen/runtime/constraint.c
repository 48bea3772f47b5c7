/* The file of a constraint, checked whole when it is opened: who follows it need not look again. */
#define _GNU_SOURCE
#include "constraint.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "error.h"
#include "mapped.h"

static const char MAGIC[8] = "SLMCONS";
enum { VERSION = 1, MOST_TOKENS = 1 << 24, MOST_CLASSES = 1 << 16, MOST_STATES = 1 << 24 };

/* Words of the file's head; slmtvm/text/constraint/file.py writes them. */
enum {
  H_MAGIC, H_VERSION = 2, H_WORDS, H_VOCAB_SIZE, H_CLASSES, H_LISTED, H_STATES, H_TRANSITIONS, H_ENDS,
  H_SOURCE, H_TOKENIZER = H_SOURCE + SLM_DIGEST_BYTES / 4, HEADER_WORDS = H_TOKENIZER + SLM_DIGEST_BYTES / 4
};

/* Offsets that start at 0, never fall, and end at `total`. */
static int rises(const uint32_t *begins, uint32_t count, uint32_t total) {
  for (uint32_t i = 0; i < count; ++i)
    if (begins[i] > begins[i + 1]) return 0;
  return begins[0] == 0 && begins[count] == total;
}

static const char *check_classes(const slm_constraint *c, uint32_t listed) {
  if (!rises(c->class_begins, c->class_count, listed) || c->class_begins[1] != 0) return "classes";
  for (uint32_t token = 0; token < c->vocab_size; ++token)
    if (c->class_of[token] >= c->class_count) return "classes";
  for (uint32_t class = 1; class < c->class_count; ++class)
    for (uint32_t i = c->class_begins[class]; i < c->class_begins[class + 1]; ++i)
      if (c->tokens[i] >= c->vocab_size || c->class_of[c->tokens[i]] != class) return "tokens";
  for (uint32_t i = 0; i < c->end_count; ++i)
    if (c->ends[i] >= c->vocab_size || c->class_of[c->ends[i]] != 0) return "ends";
  return NULL;
}

static const char *check_states(const slm_constraint *c) {
  if (!rises(c->row_begins, c->state_count, c->transition_count)) return "states";
  for (uint32_t state = 0; state < c->state_count; ++state) {
    uint32_t before = 0, least = UINT32_MAX;
    for (uint32_t i = c->row_begins[state]; i < c->row_begins[state + 1]; ++i) {
      const slm_transition t = c->transitions[i];
      if (t.class <= before || t.class >= c->class_count || t.next >= c->state_count ||
          c->class_begins[t.class] == c->class_begins[t.class + 1])
        return "transitions";
      before = t.class;
      if (c->left[t.next] < least) least = c->left[t.next];
    }
    /* From each state a whole text can be reached. */
    if (c->left[state] > INT32_MAX || (c->left[state] && c->left[state] != (uint64_t)least + 1))
      return "states";
  }
  return NULL;
}

static int32_t read_all(const char *path, slm_constraint *c) {
  const uint32_t *h = c->words;
  const size_t count = c->file_bytes / sizeof *h;
  if (c->file_bytes < HEADER_WORDS * sizeof *h || memcmp(h, MAGIC, sizeof MAGIC) != 0)
    return slm_fail(SLM_ERR_CONSTRAINT, "%s: not a compiled constraint", path);
  if (h[H_VERSION] != VERSION)
    return slm_fail(SLM_ERR_CONSTRAINT, "%s: format %u, this library reads format %d", path,
                    h[H_VERSION], VERSION);
  c->vocab_size = h[H_VOCAB_SIZE];
  c->class_count = h[H_CLASSES];
  c->state_count = h[H_STATES];
  c->transition_count = h[H_TRANSITIONS];
  c->end_count = h[H_ENDS];
  const uint32_t listed = h[H_LISTED];
  const uint64_t class_words = ((uint64_t)c->vocab_size + 1) / 2;
  const uint64_t words = HEADER_WORDS + class_words + c->class_count + 1 + listed + c->state_count + 1 +
                         2 * (uint64_t)c->transition_count + c->state_count + c->end_count;
  if (c->file_bytes % sizeof *h || h[H_WORDS] != count || words != count)
    return slm_fail(SLM_ERR_CONSTRAINT, "%s: %zu bytes, expected %llu; copy it again", path,
                    c->file_bytes, 4 * (unsigned long long)words);
  const char *wrong = NULL;
  if (c->vocab_size < 1 || c->vocab_size > MOST_TOKENS || c->class_count < 1 ||
      c->class_count > MOST_CLASSES || c->state_count < 1 || c->state_count > MOST_STATES)
    wrong = "header";
  const uint32_t *at = h + HEADER_WORDS;
  c->source_digest = (const uint8_t *)(h + H_SOURCE);
  c->tokenizer_digest = (const uint8_t *)(h + H_TOKENIZER);
  c->class_of = (const uint16_t *)at;
  c->class_begins = at += class_words;
  c->tokens = at += c->class_count + 1;
  c->row_begins = at += listed;
  at += c->state_count + 1;
  c->transitions = (const slm_transition *)at;
  c->left = at += 2 * (size_t)c->transition_count;
  c->ends = at + c->state_count;
  if (!wrong) wrong = check_classes(c, listed);
  if (!wrong) wrong = check_states(c);
  if (wrong)
    return slm_fail(SLM_ERR_CONSTRAINT, "%s: damaged: %s; copy it again", path, wrong);
  return SLM_OK;
}

int32_t slm_constraint_open(const char *path, slm_constraint **result) {
  if (!path || !result)
    return slm_fail(SLM_ERR_ARGUMENT, "slm_constraint_open: an argument is NULL");
  *result = NULL;
  slm_constraint *c = calloc(1, sizeof *c);
  if (!c) return slm_fail(SLM_ERR_MEMORY, "no memory for the constraint");
  int32_t code = slm_map_file(path, "constraint", &c->words, &c->file_bytes);
  if (code == SLM_OK) {
    code = read_all(path, c);
    if (code != SLM_OK) munmap((void *)c->words, c->file_bytes);
  }
  if (code != SLM_OK) {
    free(c);
    return code;
  }
  c->mark = SLM_CONSTRAINT_MARK;
  *result = c;
  return SLM_OK;
}

int32_t slm_constraint_close(slm_constraint *c) {
  if (!c) return SLM_OK;
  if (c->mark != SLM_CONSTRAINT_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the constraint is not open");
  munmap((void *)c->words, c->file_bytes);
  c->mark = 0;
  free(c);
  return SLM_OK;
}

int32_t slm_check_constraint(const slm_constraint *c, int32_t state) {
  if (!c || c->mark != SLM_CONSTRAINT_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the constraint is NULL or not open");
  if (state < 0 || (uint32_t)state >= c->state_count)
    return slm_fail(SLM_ERR_ARGUMENT, "state %d of a constraint that has %u", state, c->state_count);
  return SLM_OK;
}

int32_t slm_constraint_next(const slm_constraint *c, int32_t state, int32_t token) {
  int32_t code = slm_check_constraint(c, state);
  if (code != SLM_OK) return code;
  if (token < 0 || (uint32_t)token >= c->vocab_size)
    return slm_fail(SLM_ERR_TOKEN, "token %d, must be 0 to %u", token, c->vocab_size - 1);
  const uint32_t class = c->class_of[token];
  uint32_t low = c->row_begins[state], high = c->row_begins[state + 1];
  while (low < high) {
    uint32_t middle = low + (high - low) / 2;
    if (c->transitions[middle].class < class) low = middle + 1;
    else high = middle;
  }
  if (c->left[state] == 0)
    for (uint32_t i = 0; i < c->end_count; ++i)
      if (c->ends[i] == (uint32_t)token) return SLM_TEXT_IS_OVER;
  if (low == c->row_begins[state + 1] || c->transitions[low].class != class)
    return slm_fail(SLM_ERR_CONSTRAINT, "token %d may not follow", token);
  return (int32_t)c->transitions[low].next;
}

int32_t slm_constraint_left(const slm_constraint *c, int32_t state) {
  int32_t code = slm_check_constraint(c, state);
  if (code != SLM_OK) return code;
  if (c->row_begins[state] == c->row_begins[state + 1]) return SLM_TEXT_IS_OVER;
  return (int32_t)c->left[state];
}

int32_t slm_constraint_tokens(const slm_constraint *c) {
  int32_t code = slm_check_constraint(c, 0);
  return code != SLM_OK ? code : (int32_t)c->vocab_size;
}
