/* Text in, text out on a device: all that `slmtvm run` does with a bundle.
 *
 *   slm-run BUNDLE [--prompt TEXT] [OPTIONS]      (without a prompt: each line of the input is one)
 *
 * It continues texts, or writes what an encoder-decoder makes of them (run_generate.c), answers as a chat
 * (run_chat.c), or says what other models make of them (run_tasks.c). The model's code is linked in;
 * BUNDLE's weights, tokenizer.bin and chat.json are read; key.h says where the key of encrypted weights
 * comes from. Ends with 0, with 1 where something failed, with 64 for wrong usage. */
#include "run.h"

#include <errno.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "key.h"
#include "threads.h"

static const char usage[] =
    "usage: slm-run BUNDLE [OPTIONS]\n"
    "  --prompt TEXT     the text; without it, and without --file, each line of the input is one\n"
    "  --file FILE       a text in each line, of a pair with a tab between both\n"
    "  --pair TEXT       the other text: what a reranker scores for the prompt (may be given several\n"
    "                    times), or what the answer stands in\n"
    "  --task TASK       generate, classify, entities, answer, fill or embed (what the outputs say)\n"
    "  --json            a JSON object for each text\n"
    "  --top N           most labels or fills (5)\n"
    "  --pool HOW        rows of tokens as an embedding: mean, weightedmean, first, last, max\n"
    "  --normalize, --no-normalize   make the length of embeddings 1, or do not\n"
    "  --chat            what is given are a user's messages, by the model's chat template\n"
    "  --system TEXT     what the chat begins with\n"
    "  --max-tokens N    most tokens to generate (64)\n"
    "  --temperature X   0 takes the likeliest token (0)\n"
    "  --top-k N  --top-p X  --min-p X  --seed N  --repetition-penalty X\n"
    "  --presence-penalty X  --frequency-penalty X   of tokens that were written\n"
    "  --logit-bias ID:X added to the logit of a token (may be given several times)\n"
    "  --stop TEXT       end before this text (may be given several times)\n"
    "  --constraint FILE what may be written, as slmtvm constraint compiled it\n"
    "  --start ID        the token that an encoder-decoder's text starts from\n"
    "  --threads N       most threads that compute, 0: as many as there are cores (1)\n"
    "  --cores LIST      cores to compute on, such as 4-7,9\n"
    "  --stats           say what was done, and how fast, after each text\n";

int failed(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("slm-run: error: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  return FAILED;
}

int slm_failed(void) { return failed("%s", slm_last_error()); }

int is_kind(const runner *r, const char *kind) { return json_is(json_field(r->info, "kind"), kind); }

int append(growing_text *t, const char *bytes, size_t length) {
  if (length > t->room - t->length) {
    const size_t room = 2 * (t->length + length) + PIECE_BYTES;
    char *grown = realloc(t->bytes, room);
    if (!grown) return failed("no memory for the text");
    t->bytes = grown;
    t->room = room;
  }
  if (length) memcpy(t->bytes + t->length, bytes, length);
  t->length += length;
  return OK;
}

/* ---- texts ---- */

static int run_text(runner *r, const settings *s, const char *task, const text_pair *text, int many) {
  if (strcmp(task, "generate") != 0) return run_task(r, s, task, text, many);
  if (s->json && !is_utf8(text->text, text->bytes)) return failed("the prompt is no valid text");
  return generate_from(r, s, text->text, text->bytes);
}

static int run_prompt(runner *r, const settings *s, const char *task) {
  text_pair text = {s->prompt, strlen(s->prompt), NULL, 0};
  int code = OK;
  if (!s->pair_count) return run_text(r, s, task, &text, 0);
  for (size_t i = 0; code == OK && i < s->pair_count; ++i) {
    text.pair = s->pairs[i];
    text.pair_bytes = strlen(text.pair);
    code = run_text(r, s, task, &text, s->pair_count > 1);
  }
  return code;
}

/* A line, which a tab divides into a pair where the task is not to write. */
static int run_line(runner *r, const settings *s, const char *task, const char *line, size_t bytes,
                    int many) {
  text_pair text = {line, bytes, NULL, 0};
  const char *tab = strcmp(task, "generate") == 0 ? NULL : memchr(line, '\t', bytes);
  if (tab) {
    text.bytes = (size_t)(tab - line);
    text.pair = tab + 1;
    text.pair_bytes = bytes - text.bytes - 1;
  }
  return bytes ? run_text(r, s, task, &text, many) : OK;
}

static int run_input(runner *r, const settings *s, const char *task) {
  char *line = NULL;
  size_t room = 0;
  ssize_t length;
  int code = OK;
  while (code == OK && (length = getline(&line, &room, stdin)) >= 0) {
    if (length && line[length - 1] == '\n') --length;
    code = run_line(r, s, task, line, (size_t)length, 1);
  }
  free(line);
  return code;
}

static int read_file(const char *path, growing_text *all) {
  char piece[PIECE_BYTES];
  size_t length;
  FILE *file = fopen(path, "rb");
  if (!file) return failed("%s: not a readable text: %s", path, strerror(errno));
  int code = OK;
  while (code == OK && (length = fread(piece, 1, sizeof piece, file)) > 0)
    code = all->length > MOST_TEXT_BYTES ? failed("%s: longer than 64 MB", path)
                                         : append(all, piece, length);
  if (code == OK && ferror(file)) code = failed("%s: not a readable text: %s", path, strerror(errno));
  fclose(file);
  if (code == OK && !is_utf8(all->bytes, all->length)) return failed("%s: not a UTF-8 text", path);
  return code;
}

/* The next line that is not empty, from `*at` on; NULL: none. Ends are \n, \r and \r\n. */
static const char *next_line(const growing_text *all, size_t *at, size_t *bytes) {
  while (*at < all->length && (all->bytes[*at] == '\n' || all->bytes[*at] == '\r')) ++*at;
  const size_t begin = *at;
  while (*at < all->length && all->bytes[*at] != '\n' && all->bytes[*at] != '\r') ++*at;
  *bytes = *at - begin;
  return *bytes ? all->bytes + begin : NULL;
}

static int run_file(runner *r, const settings *s, const char *task) {
  growing_text all = {0};
  size_t at = 0, bytes, lines = 0;
  const char *line;
  int code = s->pair_count ? failed("a pair goes with --prompt; in a file it stands behind a tab")
                           : read_file(s->file, &all);
  while (code == OK && next_line(&all, &at, &bytes)) ++lines;
  at = 0;
  while (code == OK && (line = next_line(&all, &at, &bytes)))
    code = run_line(r, s, task, line, bytes, lines > 1);
  free(all.bytes);
  return code;
}

/* ---- the model ---- */

static int open_all(runner *r, settings *s) {
  r->room = (size_t)slm_context_size() + 1;
  r->tokens = malloc((r->room + 1) * sizeof *r->tokens);
  if (!r->tokens) return failed("no memory for the tokens");
  if (take_weights_key("slm-run", &s->open) < 0) return FAILED;
  const int32_t opened = slm_open(s->bundle, &s->open, &r->model);
  forget_weights_key();
  if (opened < 0 || slm_tokenizer_open(s->bundle, &r->tokenizer) < 0 ||
      (s->constraint && slm_constraint_open(s->constraint, &r->constraint) < 0) ||
      slm_session_new(r->model, &r->session) < 0)
    return slm_failed();
  return s->chat && chat_open("slm-run", s->bundle, &r->chat) < 0 ? FAILED : OK;
}

static void close_all(runner *r) {
  slm_session_free(r->session);
  slm_close(r->model);
  slm_constraint_close(r->constraint);
  slm_tokenizer_close(r->tokenizer);
  chat_close(&r->chat);
  free(r->tokens);
  free(r->held.bytes);
  free(r->written.bytes);
}

static int run_all(runner *r, const settings *s, const char *task) {
  find_ends(r);
  if (s->chat) return run_chat(r, s);
  if (strcmp(task, "generate") != 0 && begin_task(r, s, task) != OK) return FAILED;
  if (s->file) return run_file(r, s, task);
  return s->prompt ? run_prompt(r, s, task) : run_input(r, s, task);
}

static int run(settings *s) {
  runner r = {0};
  size_t place;
  if (json_check(slm_info(), strlen(slm_info()), &r.info, &place))
    return failed("the library's description is damaged");
  const char *usual = usual_task(&r), *task = s->task ? s->task : usual;
  if (s->chat) task = "generate";
  if (strcmp(task, "generate") == 0 && strcmp(usual, task) != 0)
    return failed("this model writes no text; what it is for is --task %s", usual);
  int code = open_all(&r, s);
  if (code == OK) code = run_all(&r, s, task);
  close_all(&r);
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

/* ID:X */
static int read_bias(settings *s, const char *text) {
  char number[16];
  const char *colon = strchr(text, ':');
  const size_t digits = colon ? (size_t)(colon - text) : 0;
  long token;
  slm_bias *bias = s->biases + s->sampling.bias_count;
  if (digits == 0 || digits >= sizeof number) return 0;
  memcpy(number, text, digits);
  number[digits] = 0;
  if (!read_whole(number, 0, INT32_MAX, &token) || !read_real(colon + 1, &bias->bias)) return 0;
  bias->token = (int32_t)token;
  ++s->sampling.bias_count;
  return 1;
}

static int is_one_of(const char *const *names, const char *name) {
  for (; *names; ++names)
    if (strcmp(*names, name) == 0) return 1;
  return 0;
}

/* Options whose value is a text, a real or a whole number. */
static int take(settings *s, const char *name, const char *value) {
  static const char *const tasks[] = {"generate", "classify", "entities", "answer",
                                      "fill",     "embed",    NULL};
  static const char *const pools[] = {"mean", "weightedmean", "first", "last", "max", NULL};
  const struct { const char *name, **text; const char *const *one_of; } texts[] = {
      {"--prompt", &s->prompt, NULL}, {"--file", &s->file, NULL}, {"--system", &s->system, NULL},
      {"--constraint", &s->constraint, NULL}, {"--cores", &s->open.cores, NULL},
      {"--task", &s->task, tasks}, {"--pool", &s->pool, pools}};
  const struct { const char *name; float *real; } reals[] = {
      {"--temperature", &s->sampling.temperature}, {"--top-p", &s->sampling.top_p},
      {"--min-p", &s->sampling.min_p}, {"--repetition-penalty", &s->sampling.repetition_penalty},
      {"--presence-penalty", &s->sampling.presence_penalty},
      {"--frequency-penalty", &s->sampling.frequency_penalty}};
  long top_k = s->sampling.top_k, threads = s->open.threads, seed = 0;
  const struct { const char *name; long least, most, *whole; } wholes[] = {
      {"--max-tokens", 1, INT32_MAX, &s->most_tokens}, {"--top", 1, INT32_MAX, &s->top},
      {"--start", 0, INT32_MAX, &s->start}, {"--threads", 0, 256, &threads},
      {"--top-k", 0, INT32_MAX, &top_k}, {"--seed", 0, INT64_MAX, &seed}};
  int right = -1;
  for (size_t i = 0; i < sizeof texts / sizeof *texts; ++i)
    if (strcmp(name, texts[i].name) == 0) {
      *texts[i].text = value;
      right = !texts[i].one_of || is_one_of(texts[i].one_of, value);
    }
  for (size_t i = 0; i < sizeof reals / sizeof *reals; ++i)
    if (strcmp(name, reals[i].name) == 0) right = read_real(value, reals[i].real);
  for (size_t i = 0; i < sizeof wholes / sizeof *wholes; ++i)
    if (strcmp(name, wholes[i].name) == 0)
      right = read_whole(value, wholes[i].least, wholes[i].most, wholes[i].whole);
  s->sampling.top_k = (int32_t)top_k;
  s->open.threads = (int32_t)threads;
  if (strcmp(name, "--seed") == 0) s->sampling.seed = (uint64_t)seed;
  if (strcmp(name, "--pair") == 0) s->pairs[s->pair_count++] = value, right = 1;
  if (strcmp(name, "--stop") == 0) s->stops[s->stop_count++] = value, right = *value != 0;
  if (strcmp(name, "--logit-bias") == 0) right = read_bias(s, value);
  if (right > 0) return OK;
  if (right == 0) fprintf(stderr, "slm-run: error: %s cannot be %s\n%s", name, value, usage);
  else fprintf(stderr, "slm-run: error: there is no option %s\n%s", name, usage);
  return USAGE;
}

/* Options without a value. */
static int take_flag(settings *s, const char *name) {
  const struct { const char *name; int *flag, value; } flags[] = {
      {"--stats", &s->stats, 1}, {"--json", &s->json, 1}, {"--chat", &s->chat, 1},
      {"--normalize", &s->normalize, 1}, {"--no-normalize", &s->normalize, 0}};
  for (size_t i = 0; i < sizeof flags / sizeof *flags; ++i)
    if (strcmp(name, flags[i].name) == 0) {
      *flags[i].flag = flags[i].value;
      return 1;
    }
  return 0;
}

static int read_arguments(settings *s, int argc, char **argv) {
  for (int i = 1; i < argc; ++i) {
    if (take_flag(s, argv[i])) continue;
    if (strncmp(argv[i], "--", 2) == 0) {
      if (i + 1 == argc) {
        fprintf(stderr, "slm-run: error: %s needs a value\n%s", argv[i], usage);
        return USAGE;
      }
      const int code = take(s, argv[i], argv[i + 1]);
      if (code != OK) return code;
      ++i;
    } else if (!s->bundle) {
      s->bundle = argv[i];
    } else {
      fprintf(stderr, "slm-run: error: two bundles: %s and %s\n%s", s->bundle, argv[i], usage);
      return USAGE;
    }
  }
  if (s->bundle && !(s->prompt && s->file)) return OK;
  if (s->bundle) fputs("slm-run: error: --prompt or --file, not both\n", stderr);
  fputs(usage, stderr);
  return USAGE;
}

int main(int argc, char **argv) {
  settings s = {.most_tokens = 64, .start = -1, .top = 5, .normalize = -1};
  for (int i = 1; i < argc; ++i)
    if (strcmp(argv[i], "--help") == 0) return fputs(usage, stdout) == EOF;
  s.sampling.size = sizeof s.sampling;
  s.sampling.seed = (uint64_t)time(NULL);
  s.open.size = sizeof s.open;
  s.open.threads = 1;
  const size_t most = (size_t)argc + 1;
  s.pairs = calloc(most, sizeof *s.pairs);
  s.stops = calloc(most, sizeof *s.stops);
  s.biases = calloc(most, sizeof *s.biases);
  int code = s.pairs && s.stops && s.biases ? read_arguments(&s, argc, argv)
                                            : failed("no memory for the arguments");
  s.sampling.biases = s.biases;
  if (code == OK) code = run(&s);
  free(s.pairs);
  free(s.stops);
  free(s.biases);
  return code;
}
