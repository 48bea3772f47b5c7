/* A server for the device: text generation, chat and embeddings over HTTP, as OpenAI's clients ask.
 *
 *   slm-serve BUNDLE [OPTIONS]
 *
 * The model's code is linked in; BUNDLE's weights, tokenizer.bin and chat.json are read. Ends with 0 after
 * SIGTERM or SIGINT, with 1 where something failed, with 64 for wrong usage. SIGHUP has it go on as what
 * lies at its own path and the bundle's by then. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "serve.h"
#include "serve_loop.h"
#include "serve_takeover.h"
#include "threads.h"

enum { OK, FAILED, USAGE = 64 };

static const char usage[] =
    "usage: slm-serve BUNDLE [OPTIONS]\n"
    "  --host ADDRESS    where to listen (127.0.0.1); others than this machine's need --key-file\n"
    "  --port N          0 takes a free one (8080)\n"
    "  --unix PATH       listen on a Unix socket instead\n"
    "  --key-file FILE   holds the key that requests must bring: Authorization: Bearer KEY\n"
    "  --open            listen for other machines without a key\n"
    "  --keys FILE       public keys (PEM), by one of which the bundle must be signed\n"
    "  --name NAME       what the model is called (the bundle's name)\n"
    "  --sessions N      texts that are computed side by side, each with a KV cache (2)\n"
    "  --connections N   most connections (32)\n"
    "  --queue N         most requests that wait for a session (32)\n"
    "  --max-body BYTES  of a request (1048576)\n"
    "  --max-tokens N    most tokens that an answer may have (the context)\n"
    "  --constraint NAME=FILE   what response_format may ask for by this name, as slmtvm constraint\n"
    "                    compiled it (may be given several times)\n"
    "  --audit FILE      log a line for each POST request, with hashes of what was asked and answered\n"
    "  --timeout S       most seconds for a request, waiting included (300)\n"
    "  --read-timeout S  most seconds for a request to come in (30)\n"
    "  --grace S         seconds that requests have to finish after SIGTERM (30)\n"
    "  --threads N       most threads that compute, 0: as many as there are cores (1)\n"
    "  --cores LIST      cores to compute on, such as 4-7,9\n";

static int read_whole(const char *text, long least, long most, long *value) {
  char *end;
  errno = 0;
  *value = strtol(text, &end, 10);
  return end != text && *end == 0 && errno == 0 && *value >= least && *value <= most;
}

static int read_seconds(const char *text, double *value) {
  char *end;
  *value = strtod(text, &end);
  return end != text && *end == 0 && *value > 0 && *value < 1e7;
}

typedef struct {
  const char *option;
  long least, most, *value;
} whole_option;

static int take(serve_options *o, const char *name, const char *value) {
  long threads = 0;
  const whole_option wholes[] = {
      {"--port", 0, 65535, &o->port},
      {"--sessions", 1, 256, &o->sessions},
      {"--connections", 1, 1024, &o->connections},
      {"--queue", 0, 1024, &o->queue},
      {"--max-body", 1024, 64 << 20, &o->body_bytes},
      {"--max-tokens", 1, INT32_MAX, &o->most_tokens},
      {"--grace", 0, 3600, &o->grace},
      {"--threads", 0, 256, &threads},
  };
  const struct { const char *option; const char **value; } texts[] = {
      {"--host", &o->host},         {"--unix", &o->unix_path}, {"--key-file", &o->key_file},
      {"--name", &o->name},         {"--cores", &o->open.cores},  {"--audit", &o->audit},
      {"--keys", &o->keys},
  };
  int known = 0, right = 1;
  for (size_t i = 0; i < sizeof wholes / sizeof *wholes; ++i)
    if (strcmp(name, wholes[i].option) == 0) {
      known = 1;
      right = read_whole(value, wholes[i].least, wholes[i].most, wholes[i].value);
      if (wholes[i].value == &threads) o->open.threads = (int32_t)threads;
    }
  for (size_t i = 0; i < sizeof texts / sizeof *texts; ++i)
    if (strcmp(name, texts[i].option) == 0) {
      known = 1;
      *texts[i].value = value;
    }
  if (strcmp(name, "--constraint") == 0) {
    known = 1;
    right = o->constraint_count < MOST_CONSTRAINTS;
    if (right) o->constraints[o->constraint_count++] = value;
  }
  if (strcmp(name, "--timeout") == 0) known = 1, right = read_seconds(value, &o->timeout);
  if (strcmp(name, "--read-timeout") == 0) known = 1, right = read_seconds(value, &o->read_timeout);
  if (known && right) return OK;
  if (!known) fprintf(stderr, "slm-serve: error: there is no option %s\n%s", name, usage);
  else fprintf(stderr, "slm-serve: error: %s cannot be %s\n%s", name, value, usage);
  return USAGE;
}

/* The bundle's name without its folder and ".slm". */
static const char *usual_name(const char *bundle) {
  static char name[128];
  size_t end = strlen(bundle);
  while (end > 1 && bundle[end - 1] == '/') --end;
  size_t begin = end;
  while (begin > 0 && bundle[begin - 1] != '/') --begin;
  if (end - begin > 4 && memcmp(bundle + end - 4, ".slm", 4) == 0) end -= 4;
  snprintf(name, sizeof name, "%.*s", (int)(end - begin), bundle + begin);
  return name;
}

static int read_key(server *s) {
  if (!s->options.key_file) return 0;
  FILE *file = fopen(s->options.key_file, "rb");
  if (!file) {
    fprintf(stderr, "slm-serve: error: %s: %s\n", s->options.key_file, strerror(errno));
    return -1;
  }
  size_t length = fread(s->key, 1, sizeof s->key, file);
  fclose(file);
  int too_long = length == sizeof s->key;
  while (length && strchr(" \t\r\n", s->key[length - 1])) --length;
  for (size_t i = 0; i < length; ++i)
    if (s->key[i] <= ' ' || s->key[i] == 0x7f) length = 0;
  if (!too_long && length >= 8) {
    s->key_bytes = length;
    memset(s->key + length, 0, sizeof s->key - length);
    return 0;
  }
  fprintf(stderr, "slm-serve: error: %s: must hold one key, 8 to 255 characters without spaces\n",
          s->options.key_file);
  return -1;
}

static int run(server *s) {
  if (read_key(s) < 0 || block_signals() < 0) return FAILED;
  s->started = (int64_t)time(NULL);
  if (getrandom(&s->nonce, sizeof s->nonce, 0) < 0) s->nonce = (uint64_t)s->started << 24;
  s->guards_host = !s->options.unix_path && is_loopback(s->options.host);
  int code = FAILED;
  if (audit_open(s) == 0 && open_model(s) == 0 && (s->planned_bytes = plan_memory(s)) >= 0) code = serve(s) < 0;
  audit_close(s);
  close_model(s);
  return handed_over() ? stand_for_next() : code;
}

int main(int argc, char **argv) {
  takeover_begin(argv);
  static server s = {.options = {.host = "127.0.0.1", .port = 8080, .sessions = 2,
                                 .connections = 32, .queue = 32, .body_bytes = 1 << 20,
                                 .most_tokens = INT32_MAX, .timeout = 300, .read_timeout = 30,
                                 .grace = 30}};
  serve_options *o = &s.options;
  o->open.size = sizeof o->open;
  o->open.threads = 1;
  int open = 0;
  for (int i = 1; i < argc; ++i) {
    if (strcmp(argv[i], "--help") == 0) return fputs(usage, stdout) == EOF;
    if (strcmp(argv[i], "--open") == 0) {
      open = 1;
    } else if (strncmp(argv[i], "--", 2) == 0) {
      if (i + 1 == argc) {
        fprintf(stderr, "slm-serve: error: %s needs a value\n%s", argv[i], usage);
        return USAGE;
      }
      int code = take(o, argv[i], argv[i + 1]);
      if (code != OK) return code;
      ++i;
    } else if (!o->bundle) {
      o->bundle = argv[i];
    } else {
      fprintf(stderr, "slm-serve: error: two bundles: %s and %s\n%s", o->bundle, argv[i], usage);
      return USAGE;
    }
  }
  if (!o->bundle) {
    fputs(usage, stderr);
    return USAGE;
  }
  if (!o->name) o->name = usual_name(o->bundle);
  if (!o->unix_path && !o->key_file && !open && !is_loopback(o->host)) {
    fprintf(stderr, "slm-serve: error: --host %s is open to other machines: give a --key-file, or "
                    "--open where no key is wanted\n", o->host);
    return USAGE;
  }
  return run(&s);
}
