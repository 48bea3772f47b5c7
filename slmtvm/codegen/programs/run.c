/* Text in, text out on a device: continues a prompt, or writes what an encoder-decoder makes of it.
 *
 *   slm-run BUNDLE [--prompt TEXT] [OPTIONS]      (without a prompt: each line of the input is one)
 *
 * The model's code is linked in; BUNDLE's weights and tokenizer.bin are read; key.h says where the key
 * of encrypted weights comes from. Ends with 0, with 1
 * where something failed, with 64 for wrong usage. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "key.h"
#include "marks.h"
#include "slm.h"
#include "threads.h"

enum { OK, FAILED, USAGE = 64 };
enum { MOST_PROMPT_BYTES = 1 << 26, MOST_ENDS = 64, PIECE_BYTES = 4096 };

static const char usage[] =
    "usage: slm-run BUNDLE [OPTIONS]\n"
    "  --prompt TEXT     the text to continue; without it each line of the input is one\n"
    "  --max-tokens N    most tokens to generate (64)\n"
    "  --temperature X   0 takes the likeliest token (0)\n"
    "  --top-k N  --top-p X  --min-p X  --seed N  --repetition-penalty X\n"
    "  --presence-penalty X  --frequency-penalty X   of tokens that were written\n"
    "  --constraint FILE what may be written, as slmtvm constraint compiled it\n"
    "  --start ID        the token that an encoder-decoder's text starts from\n"
    "  --threads N       most threads that compute, 0: as many as there are cores (1)\n"
    "  --stats           say what was done, and how fast, after each text\n";

typedef struct {
  const char *bundle, *prompt, *constraint;
  long most_tokens, start;
  int stats;
  slm_sampling sampling;
  slm_options open;
} settings;

typedef struct {
  slm_model *model;
  slm_session *session;
  slm_tokenizer *tokenizer;
  slm_constraint *constraint;
  int32_t ends[MOST_ENDS];
  size_t end_count;
  int32_t *tokens; /* of the text that is written, the prompt's first */
  size_t count, room;
} runner;

static int failed(const char *what) {
  fprintf(stderr, "slm-run: error: %s\n", what);
  return FAILED;
}

static int slm_failed(void) { return failed(slm_last_error()); }

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- what the model's description says: JSON that the compiler wrote, keys followed by ": " ---- */

static const char *said(const char *key) { /* what follows "key": */
  char quoted[64];
  snprintf(quoted, sizeof quoted, "\"%s\": ", key);
  const char *found = strstr(slm_info(), quoted);
  return found ? found + strlen(quoted) : NULL;
}

static int is_kind(const char *kind) {
  const char *value = said("kind");
  return value && value[0] == '"' && strncmp(value + 1, kind, strlen(kind)) == 0 &&
         value[1 + strlen(kind)] == '"';
}

/* The tokens after which a text is over: the model's settings say it, else the tokenizer. */
static void find_ends(runner *r) {
  const char *value = said("end");
  if (value && *value == '[')
    while (r->end_count < MOST_ENDS && (*value == '[' || *value == ',')) {
      char *after;
      long token = strtol(value + 1, &after, 10);
      if (after == value + 1) break;
      r->ends[r->end_count++] = (int32_t)token;
      value = after;
    }
  if (r->end_count == 0) r->end_count = find_marks(r->tokenizer, END_MARKS, r->ends, MOST_ENDS);
}

static int32_t usual_start(const runner *r) {
  const char *value = said("start");
  int32_t token = 0;
  if (value && *value >= '0' && *value <= '9') return (int32_t)strtol(value, NULL, 10);
  find_marks(r->tokenizer, START_MARKS, &token, 1);
  return token;
}

static int ends_text(const runner *r, int32_t token) {
  for (size_t i = 0; i < r->end_count; ++i)
    if (r->ends[i] == token) return 1;
  return 0;
}

/* ---- one text ---- */

/* The tokens of a prompt, `*count` of them, in memory that the caller frees; NULL after an error. */
static int32_t *tokenize(const runner *r, const char *text, size_t bytes, size_t *count) {
  int64_t work_bytes = slm_tokenize_bytes(r->tokenizer, bytes);
  if (work_bytes < 0) return slm_failed(), NULL;
  void *work = malloc((size_t)work_bytes);
  int32_t most = work ? slm_tokenize(r->tokenizer, text, bytes, 0, NULL, NULL, 0, work,
                                     (size_t)work_bytes)
                      : 0;
  int32_t *tokens = work ? malloc(((size_t)(most > 0 ? most : 0) + 1) * sizeof *tokens) : NULL;
  if (!tokens || most < 0) {
    free(work);
    free(tokens);
    return most < 0 ? slm_failed() : failed("no memory for the prompt"), NULL;
  }
  slm_tokenize(r->tokenizer, text, bytes, 0, tokens, NULL, (size_t)most, work, (size_t)work_bytes);
  free(work);
  *count = (size_t)most;
  return tokens;
}

/* Prints what the tokens say after what was printed before. */
static int print_text(const runner *r, slm_text_state *state, uint32_t flags) {
  char piece[PIECE_BYTES];
  for (;;) {
    int32_t bytes = slm_detokenize(r->tokenizer, state, r->tokens, r->count, flags, piece,
                                   sizeof piece);
    if (bytes < 0) return slm_failed();
    const size_t length = (size_t)bytes & ~(size_t)SLM_MORE_TEXT;
    if (fwrite(piece, 1, length, stdout) != length || (length && fflush(stdout)))
      return failed("the output cannot be written");
    if (!(bytes & SLM_MORE_TEXT)) return OK;
  }
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

static int generate(runner *r, const settings *s, slm_text_state *state, size_t prompt) {
  const double begin = now();
  double first = 0;
  size_t made = 0;
  int last = 0;
  slm_sampling sampling = s->sampling;
  if (slm_eval(r->session, r->tokens, r->count, NULL) < 0) return slm_failed();
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
    int code = print_text(r, state, 0);
    if (code != OK) return code;
    if (last || (long)made == s->most_tokens || slm_position(r->session) == slm_context_size()) break;
    if (slm_eval(r->session, &token, 1, NULL) < 0) return slm_failed();
  }
  int code = print_text(r, state, SLM_TEXT_ENDS);
  if (code != OK) return code;
  if (putchar('\n') == EOF || fflush(stdout)) return failed("the output cannot be written");
  if (s->stats) print_stats(prompt, made, begin, first ? first : now(), now());
  return OK;
}

static int run_tokens(runner *r, const settings *s, const char *text, size_t bytes,
                      const int32_t *tokens, size_t count) {
  slm_text_state state = {0};
  if (slm_seek(r->session, 0) < 0) return slm_failed();
  if (is_kind("encoder-decoder")) {
    if (slm_encode(r->session, tokens, count, NULL) < 0) return slm_failed();
    r->tokens[0] = s->start >= 0 ? (int32_t)s->start : usual_start(r);
    r->count = 1;
  } else {
    if (count > r->room) /* the library says how many fit */
      return slm_eval(r->session, tokens, count, NULL) < 0 ? slm_failed() : FAILED;
    memcpy(r->tokens, tokens, count * sizeof *tokens);
    r->count = count;
    if (fwrite(text, 1, bytes, stdout) != bytes) return failed("the output cannot be written");
  }
  int code = skip_prompt(r, &state);
  return code == OK ? generate(r, s, &state, count) : code;
}

static int run_text(runner *r, const settings *s, const char *text, size_t bytes) {
  size_t count = 0;
  if (bytes > MOST_PROMPT_BYTES) return failed("the prompt is longer than 64 MB");
  int32_t *tokens = tokenize(r, text, bytes, &count);
  if (!tokens) return FAILED;
  int code = count ? run_tokens(r, s, text, bytes, tokens, count)
                   : failed("the prompt is empty: a model needs at least one token to continue");
  free(tokens);
  return code;
}

static int run_lines(runner *r, const settings *s) {
  char *line = NULL;
  size_t room = 0;
  ssize_t length;
  int code = OK;
  while (code == OK && (length = getline(&line, &room, stdin)) >= 0) {
    if (length && line[length - 1] == '\n') --length;
    if (length) code = run_text(r, s, line, (size_t)length);
  }
  free(line);
  return code;
}

static int run(settings *s) {
  runner r = {0};
  int code = FAILED;
  if (is_kind("encoder")) return failed("this model writes no text");
  r.room = (size_t)slm_context_size() + 1;
  r.tokens = malloc((r.room + 1) * sizeof *r.tokens);
  if (!r.tokens) return failed("no memory for the tokens");
  if (take_weights_key("slm-run", &s->open) < 0) return FAILED;
  int32_t opened = slm_open(s->bundle, &s->open, &r.model);
  forget_weights_key();
  if (opened < 0 || slm_tokenizer_open(s->bundle, &r.tokenizer) < 0 ||
      (s->constraint && slm_constraint_open(s->constraint, &r.constraint) < 0) ||
      slm_session_new(r.model, &r.session) < 0) {
    slm_failed();
  } else {
    find_ends(&r);
    code = s->prompt ? run_text(&r, s, s->prompt, strlen(s->prompt)) : run_lines(&r, s);
  }
  slm_session_free(r.session);
  slm_close(r.model);
  slm_constraint_close(r.constraint);
  slm_tokenizer_close(r.tokenizer);
  free(r.tokens);
  return code;
}

/* ---- the command line ---- */

static int read_whole(const char *text, long least, long most, long *value) {
  char *end;
  errno = 0;
  *value = strtol(text, &end, 10);
  return end != text && *end == 0 && errno == 0 && *value >= least && *value <= most;
}

static int read_real(const char *text, float *value) {
  char *end;
  *value = strtof(text, &end);
  return end != text && *end == 0;
}

static int take(settings *s, const char *name, const char *value) {
  long whole = 0;
  int right = 1;
  if (strcmp(name, "--prompt") == 0) {
    s->prompt = value;
  } else if (strcmp(name, "--constraint") == 0) {
    s->constraint = value;
  } else if (strcmp(name, "--presence-penalty") == 0) {
    right = read_real(value, &s->sampling.presence_penalty);
  } else if (strcmp(name, "--frequency-penalty") == 0) {
    right = read_real(value, &s->sampling.frequency_penalty);
  } else if (strcmp(name, "--max-tokens") == 0) {
    right = read_whole(value, 1, INT32_MAX, &s->most_tokens);
  } else if (strcmp(name, "--start") == 0) {
    right = read_whole(value, 0, INT32_MAX, &s->start);
  } else if (strcmp(name, "--threads") == 0) {
    right = read_whole(value, 0, 256, &whole);
    s->open.threads = (int32_t)whole;
  } else if (strcmp(name, "--top-k") == 0) {
    right = read_whole(value, 0, INT32_MAX, &whole);
    s->sampling.top_k = (int32_t)whole;
  } else if (strcmp(name, "--seed") == 0) {
    right = read_whole(value, 0, INT64_MAX, &whole);
    s->sampling.seed = (uint64_t)whole;
  } else if (strcmp(name, "--temperature") == 0) {
    right = read_real(value, &s->sampling.temperature);
  } else if (strcmp(name, "--top-p") == 0) {
    right = read_real(value, &s->sampling.top_p);
  } else if (strcmp(name, "--min-p") == 0) {
    right = read_real(value, &s->sampling.min_p);
  } else if (strcmp(name, "--repetition-penalty") == 0) {
    right = read_real(value, &s->sampling.repetition_penalty);
  } else {
    fprintf(stderr, "slm-run: error: there is no option %s\n%s", name, usage);
    return USAGE;
  }
  if (right) return OK;
  fprintf(stderr, "slm-run: error: %s cannot be %s\n%s", name, value, usage);
  return USAGE;
}

int main(int argc, char **argv) {
  settings s = {.most_tokens = 64, .start = -1};
  s.sampling.size = sizeof s.sampling;
  s.sampling.seed = (uint64_t)time(NULL);
  s.open.size = sizeof s.open;
  s.open.threads = 1;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--help") == 0) return fputs(usage, stdout) == EOF;
    if (strcmp(argv[i], "--stats") == 0) {
      s.stats = 1;
    } else if (strncmp(argv[i], "--", 2) == 0) {
      if (i + 1 == argc) {
        fprintf(stderr, "slm-run: error: %s needs a value\n%s", argv[i], usage);
        return USAGE;
      }
      int code = take(&s, argv[i], argv[i + 1]);
      if (code != OK) return code;
      ++i;
    } else if (!s.bundle) {
      s.bundle = argv[i];
    } else {
      fprintf(stderr, "slm-run: error: two bundles: %s and %s\n%s", s.bundle, argv[i], usage);
      return USAGE;
    }
  }
  if (!s.bundle) {
    fputs(usage, stderr);
    return USAGE;
  }
  return run(&s);
}
