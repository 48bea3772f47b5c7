/* What a request for text asks: its fields, checked, and its prompt as tokens. */
#define _GNU_SOURCE
#include <math.h>
#include <string.h>
#include <sys/random.h>

#include "serve.h"

enum { USUAL_TOKENS = 16 /* of OpenAI's completions */ };

static const float LEAST_TOP_P = 1e-6f; /* the likeliest token alone: 0 would be all to slm_sample */
static const char invalid[] = "invalid_value";

int32_t tokenize_text(server *s, const char *text, size_t bytes, uint32_t flags, int32_t *tokens,
                      size_t room) {
  return slm_tokenize(s->model.tokenizer, text, bytes, flags, tokens, NULL, room, s->work,
                      s->work_bytes);
}

static int32_t read_text(server *s, json text, const char *param, uint32_t flags, int32_t *tokens,
                         size_t room, refusal *r) {
  if (!s->model.tokenizer)
    return refuse(r, 501, param, "no_tokenizer", "give token ids in the place of texts: %s",
                  s->model.no_tokenizer);
  ptrdiff_t bytes = json_text(text, s->scratch, s->scratch_bytes);
  if (bytes < 0)
    return refuse(r, 400, param, "context_length_exceeded",
                  "a text is longer than %zu bytes: its tokens would not fit the context of %d",
                  s->scratch_bytes, s->model.context);
  int32_t count = tokenize_text(s, s->scratch, (size_t)bytes, flags, tokens, room);
  return count < 0 ? refuse(r, 400, param, invalid, "%s", slm_last_error()) : count;
}

static int32_t read_ids(server *s, json ids, const char *param, int32_t *tokens, size_t room,
                        refusal *r) {
  const char *cursor = NULL;
  json id;
  int32_t count = 0;
  while (json_next(ids, &cursor, &id)) {
    double token = json_number(id);
    if (!(token >= 0 && token < s->model.vocabulary && token == floor(token)))
      return refuse(r, 400, param, invalid, "%.*s is no token: ids are 0 to %d",
                    (int)(id.end - id.at > 40 ? 40 : id.end - id.at), id.at,
                    s->model.vocabulary - 1);
    if ((size_t)count < room) tokens[count] = (int32_t)token;
    if (count < INT32_MAX) ++count;
  }
  return count;
}

int32_t read_prompt(server *s, json prompt, const char *param, uint32_t flags, int32_t *tokens,
                    size_t room, refusal *r) {
  char kind = json_kind(prompt);
  if (kind == '"') return read_text(s, prompt, param, flags, tokens, room, r);
  if (kind == '[') return read_ids(s, prompt, param, tokens, room, r);
  return refuse(r, 400, param, invalid, "%s must be a string or an array of token ids", param);
}

/* ---- fields ---- */

/* A number between both; `otherwise` where the field is missing. */
static int read_number(json body, const char *name, double least, double most, double otherwise,
                       double *value, refusal *r) {
  json field = json_field(body, name);
  *value = field.at ? json_number(field) : otherwise;
  if (!field.at || (*value >= least && *value <= most)) return 0;
  return refuse(r, 400, name, invalid, "%s must be a number from %g to %g", name, least, most);
}

static int read_whole(json body, const char *name, double least, double most, double otherwise,
                      double *value, refusal *r) {
  if (read_number(body, name, least, most, otherwise, value, r) < 0) return -1;
  if (*value == floor(*value)) return 0;
  return refuse(r, 400, name, invalid, "%s must be a whole number", name);
}

static int read_flag(json body, const char *name, int *value, refusal *r) {
  json field = json_field(body, name);
  *value = json_is_true(field);
  if (!field.at || json_kind(field) == 'b') return 0;
  return refuse(r, 400, name, invalid, "%s must be true or false", name);
}

/* OpenAI's object of token ids, as texts, and what is added to their logits. */
static int read_biases(const served_model *m, job *j, json body, refusal *r) {
  json biases = json_field(body, "logit_bias"), name, bias;
  const char *cursor = NULL;
  slm_sampling *p = &j->sampling;
  if (biases.at && json_kind(biases) != '{')
    return refuse(r, 400, "logit_bias", invalid, "logit_bias must be an object of token ids");
  p->biases = j->biases;
  while (json_next_field(biases, &cursor, &name, &bias)) {
    char digits[12];
    ptrdiff_t length = json_text(name, digits, sizeof digits - 1);
    int64_t token = length > 0 ? 0 : -1;
    for (ptrdiff_t i = 0; i < length && token >= 0; ++i)
      token = digits[i] >= '0' && digits[i] <= '9' ? 10 * token + (digits[i] - '0') : -1;
    if (token < 0 || token >= m->vocabulary)
      return refuse(r, 400, "logit_bias", invalid, "logit_bias: %.*s is no token: ids are 0 to %d",
                    (int)(name.end - name.at > 40 ? 40 : name.end - name.at), name.at,
                    m->vocabulary - 1);
    const double value = json_number(bias);
    if (!(value >= -100 && value <= 100))
      return refuse(r, 400, "logit_bias", invalid, "logit_bias of token %d must be a number from -100 "
                    "to 100", (int)token);
    if (p->bias_count == MOST_BIASES)
      return refuse(r, 400, "logit_bias", invalid, "logit_bias has more than %d tokens", MOST_BIASES);
    j->biases[p->bias_count++] = (slm_bias){(int32_t)token, (float)value};
  }
  return 0;
}

static int read_sampling(json body, slm_sampling *sampling, refusal *r) {
  double temperature, top_p, top_k, min_p, penalty, presence, frequency, seed;
  if (read_number(body, "temperature", 0, 100, 1, &temperature, r) < 0 ||
      read_number(body, "top_p", 0, 1, 1, &top_p, r) < 0 ||
      read_number(body, "min_p", 0, 1, 0, &min_p, r) < 0 ||
      read_number(body, "repetition_penalty", 0, 100, 0, &penalty, r) < 0 ||
      read_number(body, "presence_penalty", -2, 2, 0, &presence, r) < 0 ||
      read_number(body, "frequency_penalty", -2, 2, 0, &frequency, r) < 0 ||
      read_whole(body, "top_k", -1, INT32_MAX, 0, &top_k, r) < 0 ||
      read_whole(body, "seed", -0x1p63, 0x1p64, 0, &seed, r) < 0)
    return -1;
  *sampling = (slm_sampling){.size = sizeof *sampling,
                             .temperature = (float)temperature,
                             .top_k = top_k > 0 ? (int32_t)top_k : 0,
                             .top_p = top_p > 0 ? (float)top_p : LEAST_TOP_P,
                             .min_p = (float)min_p,
                             .repetition_penalty = (float)penalty,
                             .presence_penalty = (float)presence,
                             .frequency_penalty = (float)frequency};
  if (json_field(body, "seed").at)
    sampling->seed = seed < 0 ? (uint64_t)(int64_t)seed : seed < 0x1p64 ? (uint64_t)seed : UINT64_MAX;
  else if (getrandom(&sampling->seed, sizeof sampling->seed, 0) != sizeof sampling->seed)
    sampling->seed = (uint64_t)(seconds_now() * 1e9);
  return 0;
}

static int read_stop(job *j, json stop, refusal *r) {
  if (j->stop_count == MOST_STOPS)
    return refuse(r, 400, "stop", invalid, "stop has more than %d strings", MOST_STOPS);
  ptrdiff_t bytes = json_kind(stop) == '"' ? json_text(stop, j->stops[j->stop_count], STOP_BYTES)
                                           : -1;
  if (bytes <= 0)
    return refuse(r, 400, "stop", invalid, "stop must be strings of 1 to %d bytes", STOP_BYTES);
  j->stop_bytes[j->stop_count++] = (size_t)bytes;
  return 0;
}

static int read_stops(job *j, json body, refusal *r) {
  json field = json_field(body, "stop"), stop;
  const char *cursor = NULL;
  if (json_kind(field) != '[') return field.at ? read_stop(j, field, r) : 0;
  while (json_next(field, &cursor, &stop))
    if (read_stop(j, stop, r) < 0) return -1;
  return 0;
}

/* What OpenAI's fields may ask for, and nobody does here, is refused by name unless it changes nothing. */
static int refuse_unknown(json body, refusal *r) {
  static const struct { const char *name; double neutral; } numbers[] = {
      {"n", 1}, {"best_of", 1}};
  static const char *const others[] = {"functions", "suffix"};
  for (size_t i = 0; i < sizeof numbers / sizeof *numbers; ++i) {
    json field = json_field(body, numbers[i].name);
    if (field.at && json_number(field) != numbers[i].neutral)
      return refuse(r, 400, numbers[i].name, "unsupported_value", "%s must be %g: others are not "
                    "supported", numbers[i].name, numbers[i].neutral);
  }
  for (size_t i = 0; i < sizeof others / sizeof *others; ++i) {
    json field = json_field(body, others[i]);
    if (field.at && field.end - field.at > 2) /* not {}, [] or "" */
      return refuse(r, 400, others[i], "unsupported_parameter", "%s is not supported", others[i]);
  }
  if (json_is_true(json_field(body, "echo")))
    return refuse(r, 400, "echo", "unsupported_value", "echo is not supported");
  return 0;
}

/* completions: a number of alternatives; chat: true or false, and top_logprobs. */
static int read_logprobs(const server *s, job *j, json body, refusal *r) {
  const double most = s->model.vocabulary < MOST_LIKELY ? s->model.vocabulary : MOST_LIKELY;
  double count;
  if (j->route == ROUTE_COMPLETION) {
    if (read_whole(body, "logprobs", 0, most, -1, &count, r) < 0) return -1;
    j->logprobs = (int)count + 1;
    return 0;
  }
  int wanted;
  if (read_flag(body, "logprobs", &wanted, r) < 0 ||
      read_whole(body, "top_logprobs", 0, most, 0, &count, r) < 0)
    return -1;
  j->logprobs = wanted ? (int)count + 1 : 0;
  return 0;
}

static int read_most_tokens(server *s, job *j, json body, refusal *r) {
  int chat = j->route == ROUTE_CHAT;
  const char *name = chat && json_field(body, "max_completion_tokens").at ? "max_completion_tokens"
                                                                           : "max_tokens";
  double most;
  if (read_whole(body, name, 1, INT32_MAX, chat ? INT32_MAX : USUAL_TOKENS, &most, r) < 0) return -1;
  j->most_tokens = (int32_t)most;
  if (j->most_tokens > s->options.most_tokens) j->most_tokens = (int32_t)s->options.most_tokens;
  return 0;
}

/* The prompt's tokens, in the connection's room for them. */
static int32_t read_tokens(server *s, connection *c, refusal *r) {
  json body = c->body;
  if (c->job.route == ROUTE_CHAT) {
    ptrdiff_t bytes = chat_text(s, json_field(body, "messages"), c->job.tools, r);
    if (bytes < 0) return -1;
    int32_t count = tokenize_text(s, s->scratch, (size_t)bytes, SLM_NO_SPECIAL, c->tokens,
                                  s->token_room);
    return count < 0 ? refuse(r, 400, "messages", invalid, "%s", slm_last_error()) : count;
  }
  json prompt = json_field(body, "prompt"), first, second;
  const char *cursor = NULL;
  /* A list of one prompt is that prompt. */
  if (json_next(prompt, &cursor, &first) && (json_kind(first) == '"' || json_kind(first) == '[')) {
    if (json_next(prompt, &cursor, &second))
      return refuse(r, 400, "prompt", "unsupported_value", "one prompt a request: send several");
    prompt = first;
  }
  return read_prompt(s, prompt, "prompt", 0, c->tokens, s->token_room, r);
}

int read_generation(server *s, connection *c, refusal *r) {
  job *j = &c->job;
  const served_model *m = &s->model;
  if (m->kind == KIND_ENCODER || slm_output_size() != m->vocabulary)
    return refuse(r, 400, "model", "unsupported_model", "this model writes no text");
  if (read_flag(c->body, "stream", &j->stream, r) < 0 ||
      read_flag(c->body, "return_token_ids", &j->ids, r) < 0 || refuse_unknown(c->body, r) < 0 ||
      read_sampling(c->body, &j->sampling, r) < 0 || read_biases(m, j, c->body, r) < 0 ||
      read_format(s, j, c->body, r) < 0 || read_tools(s, j, c->body, r) < 0 || read_stops(j, c->body, r) < 0 ||
      read_logprobs(s, j, c->body, r) < 0 || read_most_tokens(s, j, c->body, r) < 0 ||
      read_flag(json_field(c->body, "stream_options"), "include_usage", &j->include_usage, r) < 0)
    return -1;
  int32_t count = read_tokens(s, c, r);
  if (count < 0) return -1;
  const char *param = j->route == ROUTE_CHAT ? "messages" : "prompt";
  int32_t most = m->kind == KIND_ENCODER_DECODER ? m->source_context : m->context;
  if (count == 0) return refuse(r, 400, param, invalid, "%s is empty: give at least one token", param);
  if (count > most)
    return refuse(r, 400, param, "context_length_exceeded",
                  "this model's context is %d tokens, and the prompt has %d", most, count);
  j->prompt_tokens = count;
  return check_room(s, j, r);
}
