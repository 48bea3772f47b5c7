/* /metrics: what Prometheus reads (text format 0.0.4), with the names that vLLM's have behind "vllm:". */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "serve.h"

enum { MOST_ZONES = 16 };

/* Upper bounds in seconds. */
static const double bounds[BUCKETS] = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
                                       0.25,  0.5,    1,     2.5,  5,     10,   60};

void observe(histogram *h, double seconds) {
  int i = 0;
  while (i < BUCKETS && seconds > bounds[i]) ++i;
  ++h->counts[i];
  ++h->count;
  h->sum += seconds;
}

static void put_histogram(writer *w, const char *name, const char *help, const histogram *h) {
  uint64_t below = 0;
  put_format(w, "# HELP %s %s\n# TYPE %s histogram\n", name, help, name);
  for (int i = 0; i < BUCKETS; ++i)
    put_format(w, "%s_bucket{le=\"%g\"} %llu\n", name, bounds[i],
               (unsigned long long)(below += h->counts[i]));
  put_format(w, "%s_bucket{le=\"+Inf\"} %llu\n%s_sum %.9g\n%s_count %llu\n", name,
             (unsigned long long)h->count, name, h->sum, name, (unsigned long long)h->count);
}

static void put_kind(writer *w, const char *name, const char *kind, const char *help) {
  put_format(w, "# HELP %s %s\n# TYPE %s %s\n", name, help, name, kind);
}

static void put_counter(writer *w, const char *name, const char *help, uint64_t value) {
  put_kind(w, name, "counter", help);
  put_format(w, "%s %llu\n", name, (unsigned long long)value);
}

static void put_gauge(writer *w, const char *name, const char *help, double value) {
  put_kind(w, name, "gauge", help);
  put_format(w, "%s %.9g\n", name, value);
}

static double resident_bytes(void) {
  unsigned long all = 0, resident = 0;
  FILE *file = fopen("/proc/self/statm", "r");
  if (!file) return 0;
  int found = fscanf(file, "%lu %lu", &all, &resident);
  fclose(file);
  return found == 2 ? (double)resident * (double)sysconf(_SC_PAGESIZE) : 0;
}

/* What the board's sensors say; nothing where it has none. */
static void put_temperatures(writer *w) {
  for (int zone = 0, told = 0; zone < MOST_ZONES; ++zone) {
    char path[64];
    long thousandths;
    snprintf(path, sizeof path, "/sys/class/thermal/thermal_zone%d/temp", zone);
    FILE *file = fopen(path, "r");
    if (!file) continue;
    if (fscanf(file, "%ld", &thousandths) == 1) {
      if (!told++) put_kind(w, "slm_temperature_celsius", "gauge", "Of the board's thermal zones.");
      put_format(w, "slm_temperature_celsius{zone=\"%d\"} %.3f\n", zone, (double)thousandths / 1e3);
    }
    fclose(file);
  }
}

static void put_state(server *s, writer *w) {
  long running = 0, waiting = 0, open = 0;
  double held = 0;
  for (const connection *c = s->connections; c < s->connections + s->options.connections; ++c) {
    running += c->state == RUNNING;
    waiting += c->state == WAITING;
    open += c->state != FREE;
  }
  for (long i = 0; i < s->options.sessions; ++i) held += s->model.slots[i].count;
  put_gauge(w, "slm_num_requests_running", "Requests that have a session.", (double)running);
  put_gauge(w, "slm_num_requests_waiting", "Requests that wait for a session.", (double)waiting);
  put_gauge(w, "slm_connections", "Open connections.", (double)open);
  put_gauge(w, "slm_kv_cache_usage_perc", "Of the sessions' contexts, from 0 to 1.",
            held / ((double)s->model.context * (double)s->options.sessions));
  put_gauge(w, "slm_memory_planned_bytes", "Taken before the first request, besides the weights.",
            (double)s->planned_bytes);
  put_gauge(w, "process_resident_memory_bytes", "Memory that is in use.", resident_bytes());
  put_gauge(w, "process_start_time_seconds", "Since 1970.", (double)s->started);
}

void write_metrics(server *s, writer *w) {
  static const char *const reasons[] = {NULL, "stop", "length"};
  const counters *n = &s->counters;
  put_counter(w, "slm_requests_total", "Requests that were taken up.", n->requests);
  put_counter(w, "slm_requests_refused_total", "For want of a connection or a place in the queue.",
              n->refused);
  put_counter(w, "slm_requests_cancelled_total", "Whose client went away.", n->cancelled);
  put_kind(w, "slm_request_success_total", "counter", "Texts that were written, by their end.");
  for (int i = FINISH_STOP; i <= FINISH_LENGTH; ++i)
    put_format(w, "slm_request_success_total{finished_reason=\"%s\"} %llu\n", reasons[i],
               (unsigned long long)n->finished[i]);
  put_kind(w, "slm_http_responses_total", "counter", "Answers, by the first digit of their status.");
  for (int i = 2; i <= 5; ++i)
    put_format(w, "slm_http_responses_total{code=\"%dxx\"} %llu\n", i,
               (unsigned long long)n->by_status[i]);
  put_counter(w, "slm_prompt_tokens_total", "Tokens of prompts.", n->prompt_tokens);
  put_counter(w, "slm_prefix_cache_hits_total", "Tokens of prompts that a session had already.",
              n->cached_tokens);
  put_counter(w, "slm_generation_tokens_total", "Tokens that were written.", n->generated_tokens);
  put_counter(w, "slm_batched_tokens_total", "Tokens that were evaluated together with other texts'.",
              n->together_tokens);
  put_histogram(w, "slm_time_to_first_token_seconds", "From the whole request, waiting included.",
                &s->first_token);
  put_histogram(w, "slm_time_per_output_token_seconds", "Between two tokens of a text.",
                &s->each_token);
  put_histogram(w, "slm_e2e_request_latency_seconds", "From the whole request to the last token.",
                &s->whole);
  put_state(s, w);
  put_temperatures(w);
}
