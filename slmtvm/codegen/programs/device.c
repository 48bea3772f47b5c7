/* A bundle on a device, for `slmtvm bench --rpc` and `slmtvm verify --rpc`.
 *
 *   slm-device BUNDLE info
 *   slm-device BUNDLE check
 *   slm-device BUNDLE load SOURCE PROMPT
 *   slm-device BUNDLE bench THREADS PROFILE SOURCE STEP...
 *   slm-device BUNDLE eval THREADS
 *
 * The model's code is linked in; of BUNDLE the weights are read. `info` prints slm_info(), a JSON object
 * in a line; `check` opens the bundle, which this CPU must be able to run; device_bench.c and
 * device_eval.c say what the others do. Ends with 0, with 2 where the
 * bundle cannot be opened or used here, 64 for wrong usage. */
#include "device.h"

#include <stdio.h>
#include <string.h>

#include "plan_tables.h"
#include "threads.h"

int device_cannot(const char *what) {
  fprintf(stderr, "slm-device: %s\n", what);
  return DEVICE_CANNOT;
}

int32_t device_number(const char *text, int32_t least, int32_t most) {
  char *end;
  long value = strtol(text, &end, 10);
  if (end == text || *end || value < least || value > most) {
    fprintf(stderr, "slm-device: %s is no number from %d to %d\n", text, least, most);
    exit(DEVICE_USAGE);
  }
  return (int32_t)value;
}

void *device_memory(size_t bytes) {
  void *memory = malloc(bytes ? bytes : 1);
  if (!memory) exit(device_cannot("there is not enough memory"));
  return memory;
}

int32_t *device_some_tokens(size_t count) {
  int32_t *tokens = device_memory(count * sizeof *tokens);
  for (size_t i = 0; i < count; ++i)
    tokens[i] = (int32_t)((i * 7 + 3) % (size_t)slm_plan.vocab_size);
  if (count && slm_plan.final_token >= 0) tokens[count - 1] = slm_plan.final_token;
  return tokens;
}

int32_t device_open(const char *bundle, int32_t threads, uint32_t flags, slm_model **model,
                    slm_session **session) {
  slm_options options = {.size = sizeof options, .threads = threads, .flags = flags};
  int32_t code = slm_open(bundle, &options, model);
  if (code < 0) return code;
  code = slm_session_new(*model, session);
  if (code < 0) slm_close(*model);
  return code;
}

void device_close(slm_model *model, slm_session *session) {
  slm_session_free(session);
  slm_close(model);
}

static int check(const char *bundle) {
  slm_model *model;
  slm_session *session;
  if (device_open(bundle, 1, 0, &model, &session) < 0) return device_cannot(slm_last_error());
  device_close(model, session);
  return DEVICE_OK;
}

static int run(int argc, char **argv) {
  if (argc < 3) return DEVICE_USAGE;
  const char *bundle = argv[1], *what = argv[2];
  if (!strcmp(what, "info") && argc == 3) return puts(slm_info()) < 0 ? DEVICE_CANNOT : DEVICE_OK;
  if (!strcmp(what, "check") && argc == 3) return check(bundle);
  if (!strcmp(what, "load")) return device_load(bundle, argc - 3, argv + 3);
  if (!strcmp(what, "bench")) return device_bench(bundle, argc - 3, argv + 3);
  if (!strcmp(what, "eval")) return device_eval(bundle, argc - 3, argv + 3);
  return DEVICE_USAGE;
}

int main(int argc, char **argv) {
  int result = run(argc, argv);
  if (result == DEVICE_USAGE)
    fprintf(stderr, "usage: slm-device BUNDLE info | check | load SOURCE PROMPT | "
                    "bench THREADS PROFILE SOURCE STEP... | eval THREADS\n");
  return result;
}
