/* What is asked for by method and path, and the answers that are given at once. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "serve.h"

enum { PART_HEAD = 8, PART_TAIL = 7 }; /* "xxxxxx\r\n" before a part; "\r\n" and "0\r\n\r\n" after it */

/* ---- writing answers ---- */

size_t out_room(connection *c) {
  if (c->out_begin) {
    memmove(c->out, c->out + c->out_begin, c->out_end - c->out_begin);
    c->out_end -= c->out_begin;
    c->out_begin = 0;
  }
  size_t used = c->out_end + PART_HEAD + PART_TAIL;
  return used < OUT_BYTES ? OUT_BYTES - used : 0;
}

void begin_answer(server *s, connection *c, int status, const char *type, ptrdiff_t length) {
  out_room(c);
  writer w = {c->out + c->out_end, 0, OUT_BYTES - c->out_end, 0};
  int unknown = length < 0;
  if (unknown && c->request.old) c->request.keep = 0; /* the end of the connection is its end */
  c->job.chunked = unknown && !c->request.old;
  c->job.answered = 1;
  c->job.audit.status = status;
  ++s->counters.by_status[status / 100];
  put_format(&w, "HTTP/1.1 %d %s\r\nContent-Type: %s\r\nCache-Control: no-store\r\n", status,
             http_reason(status), type);
  if (c->job.chunked) put(&w, "Transfer-Encoding: chunked\r\n");
  if (!unknown) put_format(&w, "Content-Length: %td\r\n", length);
  if (status == 401) put(&w, "WWW-Authenticate: Bearer\r\n");
  if (status == 405) put_format(&w, "Allow: %s\r\n", c->job.allowed);
  if (status == 503) put(&w, "Retry-After: 1\r\n");
  put(&w, c->request.keep && !s->stopping ? "Connection: keep-alive\r\n\r\n"
                                          : "Connection: close\r\n\r\n");
  c->out_end += w.length;
}

writer begin_part(connection *c) {
  size_t room = out_room(c);
  return (writer){c->out + c->out_end + (c->job.chunked ? PART_HEAD : 0), 0, room, 0};
}

void end_part(connection *c, writer *w) {
  if (w->length == 0) return;
  audit_answer(c, w->bytes, w->length);
  if (c->job.chunked) {
    char head[PART_HEAD + 1];
    snprintf(head, sizeof head, "%06zx\r\n", w->length);
    memcpy(c->out + c->out_end, head, PART_HEAD);
    memcpy(w->bytes + w->length, "\r\n", 2);
    c->out_end += PART_HEAD + 2;
  }
  c->out_end += w->length;
}

void end_answer(connection *c) {
  if (c->job.chunked) {
    memcpy(c->out + c->out_end, "0\r\n\r\n", 5);
    c->out_end += 5;
  }
  c->state = FLUSHING;
  c->since = seconds_now();
}

/* A whole answer that fits one part. */
static void answer_text(server *s, connection *c, int status, const char *type, const char *text,
                        size_t length) {
  int head = part_is(c->request.method, "HEAD");
  begin_answer(s, c, status, type, (ptrdiff_t)length);
  if (!head) {
    memcpy(c->out + c->out_end, text, length);
    c->out_end += length;
    audit_answer(c, text, length);
  }
  end_answer(c);
}

static void put_error(writer *w, const char *type, const char *param, const char *code,
                      const char *message) {
  put(w, "{\"error\":{\"message\":\"");
  put_escaped(w, message, strlen(message));
  put_format(w, "\",\"type\":\"%s\",\"param\":", type);
  put_format(w, param ? "\"%s\"" : "%s", param ? param : "null");
  put(w, ",\"code\":");
  put_format(w, code ? "\"%s\"" : "%s", code ? code : "null");
  put(w, "}}");
}

void answer_error(server *s, connection *c, int status, const char *type, const char *param,
                  const char *code, const char *message) {
  char bytes[4096];
  writer w = {bytes, 0, sizeof bytes, 0};
  put_error(&w, type, param, code, message);
  if (!c->job.answered) {
    answer_text(s, c, status, "application/json", bytes, w.length);
    return;
  }
  /* The status is out already: what is being read must not look whole. */
  c->request.keep = 0;
  if (c->job.stream && out_room(c) > w.length + 16) {
    writer event = begin_part(c);
    put(&event, "data: ");
    put_bytes(&event, bytes, w.length);
    put(&event, "\n\n");
    end_part(c, &event);
  } else {
    c->job.chunked = 0;
  }
  end_answer(c);
}

static void answer_refusal(server *s, connection *c, const refusal *r) {
  answer_error(s, c, r->status, r->status < 500 ? "invalid_request_error" : "server_error", r->param,
               r->code, r->message);
}

int refuse(refusal *r, int status, const char *param, const char *code, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  r->status = status;
  r->param = param;
  r->code = code;
  vsnprintf(r->message, sizeof r->message, format, arguments);
  va_end(arguments);
  return -1;
}

/* ---- what is answered at once ---- */

static void answer_models(server *s, connection *c) {
  char bytes[2048];
  writer w = {bytes, 0, sizeof bytes, 0};
  put(&w, "{\"object\":\"list\",\"data\":[{\"id\":\"");
  put_escaped(&w, s->options.name, strlen(s->options.name));
  put_format(&w, "\",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"slmtvm\","
                 "\"context_length\":%d}]}", (long long)s->started, s->model.context);
  answer_text(s, c, 200, "application/json", bytes, w.length);
}

static void answer_model(server *s, connection *c) {
  part name = c->request.path;
  const size_t prefix = sizeof "/v1/models/" - 1;
  name.at += prefix;
  name.length -= prefix;
  if (!part_is(name, s->options.name)) {
    answer_error(s, c, 404, "invalid_request_error", "model", "model_not_found",
                 "there is no such model: /v1/models lists the one there is");
    return;
  }
  char bytes[2048];
  writer w = {bytes, 0, sizeof bytes, 0};
  put(&w, "{\"id\":\"");
  put_escaped(&w, s->options.name, strlen(s->options.name));
  put_format(&w, "\",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"slmtvm\","
                 "\"context_length\":%d}", (long long)s->started, s->model.context);
  answer_text(s, c, 200, "application/json", bytes, w.length);
}

static void answer_health(server *s, connection *c) {
  const char *words = s->stopping ? "{\"status\":\"stopping\"}" : "{\"status\":\"ok\"}";
  answer_text(s, c, s->stopping ? 503 : 200, "application/json", words, strlen(words));
}

static void answer_metrics(server *s, connection *c) {
  static char bytes[OUT_BYTES / 2];
  writer w = {bytes, 0, sizeof bytes, 0};
  write_metrics(s, &w);
  answer_text(s, c, 200, "text/plain; version=0.0.4; charset=utf-8", bytes, w.length);
}

/* ---- what needs the model ---- */

static void enqueue(server *s, connection *c) {
  long waiting = 0, free_slots = 0;
  for (connection *o = s->connections; o < s->connections + s->options.connections; ++o)
    waiting += o->state == WAITING;
  for (long i = 0; i < s->options.sessions; ++i) free_slots += !s->model.slots[i].busy;
  if (waiting >= s->options.queue + free_slots) {
    ++s->counters.refused;
    answer_error(s, c, 503, "server_error", NULL, "queue_full",
                 "too many requests are waiting (--queue): try again later");
    return;
  }
  c->job.began = seconds_now();
  c->job.created = (int64_t)time(NULL);
  c->job.number = ++s->arrivals;
  ++s->counters.requests;
  c->state = WAITING;
  c->since = c->job.began;
}

static void ask_generation(server *s, connection *c) {
  refusal r;
  if (read_generation(s, c, &r) < 0) answer_refusal(s, c, &r);
  else enqueue(s, c);
}

static void ask_completion(server *s, connection *c) {
  c->job.route = ROUTE_COMPLETION;
  ask_generation(s, c);
}

static void ask_chat(server *s, connection *c) {
  c->job.route = ROUTE_CHAT;
  ask_generation(s, c);
}

static void ask_embeddings(server *s, connection *c) {
  refusal r;
  c->job.route = ROUTE_EMBEDDING;
  if (begin_embeddings(s, c, &r) < 0) answer_refusal(s, c, &r);
  else enqueue(s, c);
}

static void ask_labels(server *s, connection *c) {
  c->job.classify = 1;
  ask_embeddings(s, c);
}

static void ask_tokens(server *s, connection *c) {
  refusal r;
  c->job.route = ROUTE_TOKENIZE;
  if (begin_tokens(s, c, &r) < 0) answer_refusal(s, c, &r);
}

static void ask_text(server *s, connection *c) {
  refusal r;
  c->job.route = ROUTE_DETOKENIZE;
  if (begin_text(s, c, &r) < 0) answer_refusal(s, c, &r);
}

/* ---- who may ask ---- */

/* Takes the same time wherever a wrong key differs. */
static int has_key(const server *s, const connection *c) {
  static const char scheme[] = "Bearer ";
  part given = c->request.authorization;
  char own[sizeof s->key] = {0};
  if (given.length < sizeof scheme - 1 || memcmp(given.at, scheme, sizeof scheme - 1) != 0) return 0;
  given.at += sizeof scheme - 1;
  given.length -= sizeof scheme - 1;
  volatile unsigned differs = given.length != s->key_bytes;
  memcpy(own, given.at, given.length < sizeof own ? given.length : sizeof own);
  for (size_t i = 0; i < sizeof own; ++i) differs |= (unsigned)(uint8_t)own[i] ^ (uint8_t)s->key[i];
  return !differs;
}

/* Without a key a page in this machine's browser must not reach the server under a name of its own that
 * leads here. */
static int is_own_host(part host) {
  const char *colon = host.length && host.at[0] != '[' ? memchr(host.at, ':', host.length) : NULL;
  if (colon) host.length = (size_t)(colon - host.at);
  if (part_is(host, "localhost") || host.length == 0 || host.at[0] == '[') return 1;
  for (size_t i = 0; i < host.length; ++i)
    if (!((host.at[i] >= '0' && host.at[i] <= '9') || host.at[i] == '.')) return 0;
  return 1;
}

static int may_ask(server *s, connection *c) {
  if (s->key_bytes && !has_key(s, c)) {
    answer_error(s, c, 401, "invalid_request_error", NULL, "invalid_api_key",
                 "the key is missing or wrong: Authorization: Bearer KEY");
    return 0;
  }
  if (!s->key_bytes && s->guards_host && !is_own_host(c->request.host)) {
    answer_error(s, c, 403, "invalid_request_error", NULL, "foreign_host",
                 "the Host header names another machine: ask for localhost or an address, or start "
                 "the server with --key-file");
    return 0;
  }
  return 1;
}

/* The body as a JSON object. */
static int read_body(server *s, connection *c) {
  char message[256];
  size_t place;
  if (!is_media_type(c->request.content_type, "application/json")) {
    answer_error(s, c, 415, "invalid_request_error", NULL, NULL,
                 "the body must be JSON: Content-Type: application/json");
    return 0;
  }
  const char *wrong = json_check(c->in + c->request.head_bytes, c->request.body_bytes, &c->body,
                                 &place);
  if (!wrong && json_kind(c->body) == '{') return 1;
  snprintf(message, sizeof message, "the body is no JSON%s%s at byte %zu", wrong ? ": " : " object",
           wrong ? wrong : "", place);
  answer_error(s, c, 400, "invalid_request_error", NULL, NULL, message);
  return 0;
}

static int is_served_model(server *s, connection *c) {
  json name = json_field(c->body, "model");
  char given[256];
  ptrdiff_t length = json_kind(name) == '"' ? json_text(name, given, sizeof given) : 0;
  if (!name.at) return 1;
  if (length == (ptrdiff_t)strlen(s->options.name) &&
      memcmp(given, s->options.name, (size_t)length) == 0)
    return 1;
  char message[300];
  snprintf(message, sizeof message, "there is no such model: this server has %s (--name)",
           s->options.name);
  answer_error(s, c, 404, "invalid_request_error", "model", "model_not_found", message);
  return 0;
}

typedef struct {
  const char *path, *method;
  void (*ask)(server *s, connection *c);
  int open; /* to everybody */
} route;

static const route routes[] = {
    {"/healthz", "GET", answer_health, 1},
    {"/metrics", "GET", answer_metrics, 0},
    {"/v1/models", "GET", answer_models, 0},
    {"/v1/completions", "POST", ask_completion, 0},
    {"/v1/chat/completions", "POST", ask_chat, 0},
    {"/v1/embeddings", "POST", ask_embeddings, 0},
    {"/v1/classify", "POST", ask_labels, 0},
    {"/tokenize", "POST", ask_tokens, 0},
    {"/detokenize", "POST", ask_text, 0},
};
static const route one_model = {"/v1/models/", "GET", answer_model, 0};

static const route *find_route(part path) {
  size_t prefix = strlen(one_model.path);
  for (size_t i = 0; i < sizeof routes / sizeof *routes; ++i)
    if (part_is(path, routes[i].path)) return &routes[i];
  return path.length > prefix && memcmp(path.at, one_model.path, prefix) == 0 ? &one_model : NULL;
}

void answer(server *s, connection *c) {
  const route *r = find_route(c->request.path);
  if (part_is(c->request.method, "POST") && audit_begin(s, c) < 0) {
    answer_error(s, c, 503, "server_error", NULL, "audit", "the audit log cannot be written (--audit)");
    return;
  }
  if (!(r && r->open) && !may_ask(s, c)) return;
  if (!r) {
    answer_error(s, c, 404, "invalid_request_error", NULL, "unknown_url",
                 "there is nothing at this path");
    return;
  }
  int reads = strcmp(r->method, "GET") == 0;
  if (!part_is(c->request.method, r->method) && !(reads && part_is(c->request.method, "HEAD"))) {
    c->job.allowed = reads ? "GET, HEAD" : "POST";
    answer_error(s, c, 405, "invalid_request_error", NULL, NULL, "this path takes another method");
    return;
  }
  if (s->stopping && !r->open) {
    answer_error(s, c, 503, "server_error", NULL, "stopping", "the server is stopping");
    return;
  }
  if (!reads && (!read_body(s, c) || !is_served_model(s, c))) return;
  r->ask(s, c);
}
