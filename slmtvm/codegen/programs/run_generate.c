/* Writing text: what follows a prompt, up to an end or a stop string. */
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "marks.h"
#include "run.h"

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* The tokens after which a text is over: the model's settings say it, else the tokenizer. */
void find_ends(runner *r) {
  const char *cursor = NULL;
  json end;
  while (r->end_count < MOST_ENDS && json_next(json_field(r->info, "end"), &cursor, &end))
    r->ends[r->end_count++] = (int32_t)json_number(end);
  if (r->end_count == 0) r->end_count = find_marks(r->tokenizer, END_MARKS, r->ends, MOST_ENDS);
}

/* The token that an encoder-decoder's text starts from; -1 after saying that there is none. */
static int32_t find_start(const runner *r, const settings *s) {
  const double said = json_number(json_field(r->info, "start"));
  const char *cursor = NULL;
  json padding;
  int32_t token = 0;
  if (s->start >= 0) return (int32_t)s->start;
  if (said >= 0 && said <= INT32_MAX) return (int32_t)said;
  find_marks(r->tokenizer, START_MARKS, &token, 1);
  while (json_next(json_field(r->info, "padding"), &cursor, &padding))
    if (json_number(padding) == token) {
      failed("this model's positions leave out padding (%d), so that its texts do not start from it; "
             "say which token they start from (--start)", (int)token);
      return -1;
    }
  return token;
}

static int ends_text(const runner *r, int32_t token) {
  for (size_t i = 0; i < r->end_count; ++i)
    if (r->ends[i] == token) return 1;
  return 0;
}

/* ---- what is written ---- */

static int write_out(runner *r, const settings *s, const char *bytes, size_t length) {
  if (!length) return OK;
  if (s->json || s->chat) {
    const int code = append(&r->written, bytes, length);
    if (code != OK || s->json) return code;
  }
  if (fwrite(bytes, 1, length, stdout) != length || fflush(stdout))
    return failed("the output cannot be written");
  return OK;
}

/* Where the first of the stop strings is in what is held back; its length where there is none. */
static size_t find_stop(const runner *r, const settings *s) {
  size_t first = r->held.length;
  for (size_t i = 0; i < s->stop_count; ++i) {
    const size_t length = strlen(s->stops[i]);
    for (size_t at = 0; at < first && at + length <= r->held.length; ++at)
      if (memcmp(r->held.bytes + at, s->stops[i], length) == 0) first = at;
  }
  return first;
}

/* The bytes of the longest end of what is held back that may go on to be a stop string. */
static size_t find_waiting(const runner *r, const settings *s) {
  size_t longest = 0;
  for (size_t i = 0; i < s->stop_count; ++i)
    for (size_t n = strlen(s->stops[i]) - 1; n > longest; --n)
      if (n <= r->held.length && memcmp(r->held.bytes + r->held.length - n, s->stops[i], n) == 0)
        longest = n;
  return longest;
}

static int take_piece(runner *r, const settings *s, const char *piece, size_t length) {
  if (!s->stop_count || !length) return write_out(r, s, piece, length);
  if (append(&r->held, piece, length) != OK) return FAILED;
  const size_t stop = find_stop(r, s);
  r->stopped = stop < r->held.length;
  const size_t ready = r->stopped ? stop : r->held.length - find_waiting(r, s);
  const int code = write_out(r, s, r->held.bytes, ready);
  r->held.length = r->stopped ? 0 : r->held.length - ready;
  memmove(r->held.bytes, r->held.bytes + ready, r->held.length);
  return code;
}

/* Writes what the tokens say after what was written before. */
static int write_text(runner *r, const settings *s, slm_text_state *state, uint32_t flags) {
  char piece[PIECE_BYTES];
  while (!r->stopped) {
    int32_t bytes = slm_detokenize(r->tokenizer, state, r->tokens, r->count, flags, piece,
                                   sizeof piece);
    if (bytes < 0) return slm_failed();
    const int code = take_piece(r, s, piece, (size_t)bytes & ~(size_t)SLM_MORE_TEXT);
    if (code != OK || !(bytes & SLM_MORE_TEXT)) return code;
  }
  return OK;
}

/* Passes over the text of the prompt's tokens: it is printed as it was given. */
static int skip_prompt(const runner *r, slm_text_state *state) {
  char piece[PIECE_BYTES];
  int32_t bytes;
  do bytes = slm_detokenize(r->tokenizer, state, r->tokens, r->count, 0, piece, sizeof piece);
  while (bytes >= 0 && (bytes & SLM_MORE_TEXT));
  if (bytes < 0) return slm_failed();
  /* A row of bytes that the prompt ends in may go on: its bytes so far are passed over, too. */
  if (state->token < r->count) state->written = (uint32_t)(r->count - state->token);
  return OK;
}

static void print_stats(size_t prompt, size_t made, double begin, double first, double end) {
  const double reading = first - begin, writing = end - first;
  fprintf(stderr, "[prompt: %zu tokens in %.3f s; written: %zu tokens in %.3f s", prompt, reading,
          made, writing);
  if (made > 1 && writing > 0) fprintf(stderr, ", %.1f tokens/s", (double)(made - 1) / writing);
  fprintf(stderr, "; first token after %.3f s]\n", reading);
}

/* ---- one text ---- */

/* What may come still: the last token needs no place in the context. */
static int32_t most_left(const runner *r, const settings *s, size_t made) {
  const long wanted = s->most_tokens - (long)made;
  const long room = slm_context_size() - slm_position(r->session) + 1;
  return (int32_t)(wanted < room ? wanted : room);
}

/* Follows the constraint; 1 where the text is over, before `token` or, `*last`, behind it. */
static int is_over(const runner *r, slm_sampling *sampling, int32_t token, int *last) {
  if (!r->constraint) return ends_text(r, token);
  sampling->state = slm_constraint_next(r->constraint, sampling->state, token);
  if (sampling->state == SLM_TEXT_IS_OVER) return 1;
  *last = slm_constraint_left(r->constraint, sampling->state) == SLM_TEXT_IS_OVER;
  return 0;
}

int generate(runner *r, const settings *s) {
  const double begin = now();
  const size_t prompt = r->count;
  slm_text_state state = {0};
  slm_sampling sampling = s->sampling;
  double first = 0;
  size_t made = 0;
  int last = 0;
  r->held.length = r->written.length = 0;
  r->stopped = 0;
  if (skip_prompt(r, &state) != OK) return FAILED;
  if (slm_eval(r->session, r->tokens + r->known, r->count - r->known, NULL) < 0) return slm_failed();
  sampling.written = slm_position(r->session);
  sampling.constraint = r->constraint;
  while ((long)made < s->most_tokens) {
    if (r->constraint) sampling.most = most_left(r, s, made);
    int32_t token = slm_sample(r->session, &sampling);
    if (token < 0) return slm_failed();
    if (made == 0) first = now();
    if (is_over(r, &sampling, token, &last)) break;
    r->tokens[r->count++] = token;
    ++made;
    if (write_text(r, s, &state, 0) != OK) return FAILED;
    if (last || r->stopped || (long)made == s->most_tokens ||
        slm_position(r->session) == slm_context_size())
      break;
    if (slm_eval(r->session, &token, 1, NULL) < 0) return slm_failed();
  }
  if (write_text(r, s, &state, SLM_TEXT_ENDS) != OK) return FAILED;
  if (r->held.length && write_out(r, s, r->held.bytes, r->held.length) != OK) return FAILED;
  if (s->stats) print_stats(prompt, made, begin, first ? first : now(), now());
  return OK;
}

int begin_context(runner *r, const settings *s, const tokenized *prompt, int keeps) {
  const size_t has = keeps ? (size_t)slm_position(r->session) : 0, count = prompt->count;
  if (is_kind(r, "encoder-decoder")) {
    const int32_t start = find_start(r, s);
    if (start < 0) return FAILED;
    if (slm_encode(r->session, prompt->tokens, count, NULL) < 0) return slm_failed();
    r->tokens[0] = start;
    r->count = 1;
    r->known = 0;
    return OK;
  }
  /* The last token's logits are needed: it is evaluated in any case. */
  for (r->known = 0; r->known < has && r->known + 1 < count; ++r->known)
    if (r->tokens[r->known] != prompt->tokens[r->known]) break;
  if (slm_seek(r->session, (int32_t)r->known) < 0) return slm_failed();
  if (count > r->room) /* the library says how many fit */
    return slm_eval(r->session, prompt->tokens + r->known, count - r->known, NULL) < 0 ? slm_failed()
                                                                                     : FAILED;
  memcpy(r->tokens, prompt->tokens, count * sizeof *r->tokens);
  r->count = count;
  return OK;
}

int end_text(runner *r, const settings *s, const char *text, size_t bytes) {
  if (s->json) {
    fputs("{\"text\": ", stdout);
    print_string(text, bytes);
    fputs(", \"generated\": ", stdout);
    print_string(r->written.bytes, r->written.length);
    putchar('}');
  }
  return putchar('\n') == EOF || fflush(stdout) ? failed("the output cannot be written") : OK;
}

int generate_from(runner *r, const settings *s, const char *text, size_t bytes) {
  const text_pair given = {text, bytes, NULL, 0};
  tokenized prompt;
  if (tokenize(r, &given, 0, &prompt) != OK) return FAILED;
  int code = prompt.count ? begin_context(r, s, &prompt, 0)
                          : failed("the prompt is empty: a model needs at least one token to continue");
  forget(&prompt);
  if (code != OK) return code;
  if (!s->json && !is_kind(r, "encoder-decoder") && fwrite(text, 1, bytes, stdout) != bytes)
    return failed("the output cannot be written");
  code = generate(r, s);
  return code == OK ? end_text(r, s, text, bytes) : code;
}
