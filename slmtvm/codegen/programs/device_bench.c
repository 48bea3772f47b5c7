/* slm-device: how fast a bundle is. On standard output, a JSON object a line.
 *
 *   load SOURCE PROMPT
 *
 * {"how": slm_model_info() for as many threads as pay}; {"busy": [seconds, line of /proc/stat, seconds
 * of this process]}, twice, a fifth of a second apart; {"load", "map": seconds with the checksum of all
 * weights and without, "first": of a first prompt of PROMPT tokens after that, "resident": bytes after
 * a full context}.
 *
 *   bench THREADS PROFILE SOURCE STEP...
 *
 * PROFILE 1 measures kernels; 2 counts, in the place of the time that passes, that in which the thread
 * ran, so that other processes take nothing of it: for one thread. An encoder-decoder first reads a source of SOURCE tokens. Each step is
 *   prefill:TOKENS:TIMES:MILLISECONDS  a call on an empty context, at least so often and so long after
 *                                      one more; of an encoder too
 *   decode:POSITION:TOKENS             one by one from POSITION on
 * and gives {"step", "times": [seconds, ...], "kernels": [[calls, nanoseconds, own nanoseconds], ...]}:
 * times of each call or token, and of each kernel in the order of slm_info(), in all of them. "busy" as
 * above, before and after all steps. */
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "clock.h"
#include "device.h"
#include "plan_tables.h"

enum { OPENINGS = 5, MOST_CALLS = 100000 };

static double now(void) { return 1e-9 * (double)slm_now_nanoseconds(); }

static double of_timeval(struct timeval t) { return (double)t.tv_sec + 1e-6 * (double)t.tv_usec; }

static void print_busy(void) {
  char line[512] = "";
  FILE *file = fopen("/proc/stat", "r");
  if (file && !fgets(line, sizeof line, file)) line[0] = 0;
  if (file) fclose(file);
  line[strcspn(line, "\n\"\\")] = 0;
  struct rusage used;
  getrusage(RUSAGE_SELF, &used);
  printf("{\"busy\": [%.6f, \"%s\", %.6f], \"ticks\": %ld}\n", now(), line,
         of_timeval(used.ru_utime) + of_timeval(used.ru_stime), sysconf(_SC_CLK_TCK));
}

static long long resident(void) {
  char line[256];
  long long kilobytes = 0;
  FILE *file = fopen("/proc/self/status", "r");
  while (file && fgets(line, sizeof line, file))
    if (!strncmp(line, "VmRSS:", 6)) kilobytes = atoll(line + 6);
  if (file) fclose(file);
  return kilobytes * 1024;
}

static int32_t read_source(slm_session *session, int32_t count) {
  if (!slm_plan.source_count) return SLM_OK;
  int32_t *tokens = device_some_tokens((size_t)count);
  int32_t code = slm_encode(session, tokens, (size_t)count, NULL);
  free(tokens);
  return code;
}

/* `count` tokens behind the context, or of a text of their own. */
static int32_t evaluate(slm_session *session, int32_t count) {
  int32_t *tokens = device_some_tokens((size_t)count);
  int32_t code = slm_plan.encoder ? slm_encode(session, tokens, (size_t)count, NULL)
                                  : slm_eval(session, tokens, (size_t)count, NULL);
  free(tokens);
  return code;
}

/* A token, and the choice of the next, which it returns; where the output is no logits, always one. */
static int32_t one_token(slm_session *session, int32_t token) {
  int32_t code = slm_eval(session, &token, 1, NULL);
  if (code < 0) return code;
  code = slm_sample(session, NULL);
  return code == SLM_ERR_KIND ? token : code;
}

/* The best time of some openings; negative where it cannot be opened. */
static double opening(const char *bundle, uint32_t flags) {
  double best = -1;
  for (int i = 0; i < OPENINGS; ++i) {
    slm_model *model;
    slm_session *session;
    double start = now();
    if (device_open(bundle, 1, flags, &model, &session) < 0) return -1;
    double took = now() - start;
    device_close(model, session);
    if (best < 0 || took < best) best = took;
  }
  return best;
}

int device_load(const char *bundle, int count, char **arguments) {
  if (count != 2) return DEVICE_USAGE;
  int32_t source = device_number(arguments[0], 0, slm_plan.source_context);
  int32_t prompt = device_number(arguments[1], 1, slm_plan.context);
  slm_model *model;
  slm_session *session;
  if (device_open(bundle, 0, 0, &model, &session) < 0) return device_cannot(slm_last_error());
  printf("{\"how\": %s}\n", slm_model_info(model));
  device_close(model, session);
  print_busy();
  struct timespec fifth = {.tv_nsec = 200 * 1000 * 1000};
  nanosleep(&fifth, NULL);
  print_busy();
  double load = opening(bundle, 0), map = opening(bundle, SLM_SKIP_CHECKSUM);
  long long before = resident();
  if (load < 0 || map < 0 || device_open(bundle, 1, 0, &model, &session) < 0)
    return device_cannot(slm_last_error());
  double start = now();
  int32_t code = read_source(session, source);
  if (code >= 0) code = evaluate(session, prompt);
  if (code >= 0 && !slm_plan.encoder) code = slm_sample(session, NULL);
  double first = now() - start;
  if (code == SLM_ERR_KIND) code = SLM_OK;
  int32_t rest = slm_plan.context - prompt;
  if (code >= 0 && rest > 0) code = evaluate(session, slm_plan.encoder ? slm_plan.context : rest);
  if (code < 0) return device_cannot(slm_last_error());
  printf("{\"load\": %.9f, \"map\": %.9f, \"first\": %.9f, \"resident\": %lld}\n", load, map, first,
         resident() - before);
  device_close(model, session);
  return fflush(stdout) ? DEVICE_CANNOT : DEVICE_OK;
}

typedef struct {
  slm_model *model;
  slm_session *session;
  int profiled, running;
  double *times;
  int32_t taken;
} bench;

/* What the times of calls and tokens are read from. */
static double reading(const bench *b) {
  struct timespec t;
  if (!b->running || clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t)) return now();
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void forget_profile(bench *b) {
  if (b->profiled) slm_profile(b->model, NULL, 0);
}

static int32_t prefill(bench *b, int32_t tokens) {
  int32_t code = slm_plan.encoder ? SLM_OK : slm_seek(b->session, 0);
  double start = reading(b);
  if (code >= 0) code = evaluate(b->session, tokens);
  if (b->taken < MOST_CALLS) b->times[b->taken++] = reading(b) - start;
  return code;
}

static int32_t prefills(bench *b, int32_t tokens, int32_t least, double seconds) {
  int32_t code = prefill(b, tokens);
  b->taken = 0;
  forget_profile(b);
  double start = now();
  while (code >= 0 && b->taken < MOST_CALLS && (b->taken < least || now() - start < seconds))
    code = prefill(b, tokens);
  return code;
}

static int32_t decode(bench *b, int32_t position, int32_t tokens) {
  int32_t missing = position - slm_position(b->session), code = SLM_OK, token = 3 % slm_plan.vocab_size;
  if (missing > 0) code = evaluate(b->session, missing);
  if (code >= 0 && slm_seek(b->session, position) < 0) {
    /* Layers with a window do not have what is seen from there any more. */
    code = slm_seek(b->session, 0);
    if (code >= 0) code = evaluate(b->session, position);
  }
  forget_profile(b);
  b->taken = 0;
  double before = reading(b);
  while (code >= 0 && b->taken < tokens) {
    code = token = one_token(b->session, token);
    double after = reading(b);
    b->times[b->taken++] = after - before;
    before = after;
  }
  return code;
}

static int print_step(const bench *b, const char *step) {
  printf("{\"step\": \"%s\", \"times\": [", step);
  for (int32_t i = 0; i < b->taken; ++i) printf("%s%.9f", i ? ", " : "", b->times[i]);
  printf("], \"kernels\": [");
  if (b->profiled) {
    size_t kernels = (size_t)slm_plan.kernel_count;
    slm_kernel_time *found = device_memory(kernels * sizeof *found);
    slm_profile(b->model, found, kernels);
    for (size_t i = 0; i < kernels; ++i)
      printf("%s[%llu, %llu, %llu]", i ? ", " : "", (unsigned long long)found[i].calls,
             (unsigned long long)found[i].nanoseconds,
             (unsigned long long)found[i].own_nanoseconds);
    free(found);
  }
  return printf("]}\n") < 0 || fflush(stdout) ? DEVICE_CANNOT : DEVICE_OK;
}

static int run_step(bench *b, char *step) {
  int32_t first, second, third = 0, milliseconds = 0, code;
  if (sscanf(step, "prefill:%d:%d:%d", &first, &third, &milliseconds) == 3 && first >= 1 &&
      first <= slm_plan.context && third >= 1)
    code = prefills(b, first, third, 1e-3 * milliseconds);
  else if (sscanf(step, "decode:%d:%d", &first, &second) == 2 && first >= 0 && second >= 1 &&
           second <= MOST_CALLS && first <= slm_plan.context - second && !slm_plan.encoder)
    code = decode(b, first, second);
  else
    return DEVICE_USAGE;
  return code < 0 ? device_cannot(slm_last_error()) : print_step(b, step);
}

int device_bench(const char *bundle, int count, char **arguments) {
  if (count < 3) return DEVICE_USAGE;
  int32_t threads = device_number(arguments[0], 0, 256);
  int32_t how = device_number(arguments[1], 0, 2);
  bench b = {.profiled = how == 1, .running = how == 2};
  int32_t source = device_number(arguments[2], 0, slm_plan.source_context);
  b.times = device_memory(MOST_CALLS * sizeof *b.times);
  if (device_open(bundle, threads, b.profiled ? SLM_PROFILE : 0, &b.model, &b.session) < 0 ||
      read_source(b.session, source) < 0)
    return device_cannot(slm_last_error());
  int result = DEVICE_OK;
  print_busy();
  for (int i = 3; result == DEVICE_OK && i < count; ++i) result = run_step(&b, arguments[i]);
  print_busy();
  device_close(b.model, b.session);
  free(b.times);
  return result == DEVICE_OK && fflush(stdout) ? DEVICE_CANNOT : result;
}
