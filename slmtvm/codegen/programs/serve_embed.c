/* /v1/embeddings: of each input the model's own embedding, or its rows pooled as its settings say. */
#include <math.h>
#include <string.h>

#include "serve.h"

enum { COMPUTE, WRITE, NUMBER_BYTES = 20, GROUP = 3 /* bytes that are four characters of base64 */ };

static int starts_with(const char *text, const char *start) {
  return strncmp(text, start, strlen(start)) == 0;
}

/* The output that is an embedding, or whose rows become one: those that runtime/tasks.py takes. */
static int find_output(const server *s, slm_output *found) {
  int rows = -1, own = -1, starts = 0;
  const char *first = "";
  for (int32_t i = 0; i < slm_output_count(); ++i) {
    slm_output o = {.size = sizeof o};
    if (slm_output_info(i, &o) < 0) continue;
    if (i == 0) first = o.name;
    starts += strcmp(o.name, "start_logits") == 0 || strcmp(o.name, "end_logits") == 0;
    if (o.pooled && own < 0 && strcmp(o.name, "pooler_output") != 0) own = i;
    if (!o.pooled && rows < 0) rows = i;
  }
  const char *cursor = NULL;
  json label;
  int labels = 0;
  while (json_next(json_field(json_field(s->model.info, "task"), "labels"), &cursor, &label)) ++labels;
  if (s->model.kind != KIND_ENCODER || starts == 2 || starts_with(first, "logits") ||
      starts_with(first, "score") || labels == slm_output_size())
    return -1;
  int index = own >= 0 ? own : rows >= 0 ? rows : 0;
  *found = (slm_output){.size = sizeof *found};
  return slm_output_info(index, found) < 0 ? -1 : index;
}

/* The next input: 0 after the last one. A string and an array of numbers are one input. */
static int next_input(const connection *c, const char **cursor, json *input) {
  json all = json_field(c->body, "input"), first;
  const char *inside = NULL;
  int many = json_next(all, &inside, &first) && json_kind(first) != '0';
  if (many) return json_next(all, cursor, input);
  if (*cursor) return 0;
  *input = all;
  *cursor = all.end;
  return 1;
}

static int32_t read_input(server *s, connection *c, json input, refusal *r) {
  int32_t count = read_prompt(s, input, "input", 0, c->tokens, s->token_room, r);
  if (count == 0) return refuse(r, 400, "input", "invalid_value", "an input is empty");
  if (count > s->model.context)
    return refuse(r, 400, "input", "context_length_exceeded",
                  "this model takes %d tokens, and an input has %d", s->model.context, count);
  return count;
}

int begin_embeddings(server *s, connection *c, refusal *r) {
  slm_output output;
  job *j = &c->job;
  json format = json_field(c->body, "encoding_format"), input;
  json dimensions = json_field(c->body, "dimensions");
  const char *cursor = NULL;
  if (find_output(s, &output) < 0)
    return refuse(r, 400, "model", "unsupported_model", "this model makes no embeddings of texts");
  j->base64 = json_is(format, "base64");
  if (format.at && !j->base64 && !json_is(format, "float"))
    return refuse(r, 400, "encoding_format", "invalid_value",
                  "encoding_format must be float or base64");
  if (dimensions.at && json_number(dimensions) != output.features)
    return refuse(r, 400, "dimensions", "unsupported_value",
                  "dimensions must be %d: the model's are not cut", output.features);
  if (json_kind(json_field(c->body, "input")) != '"' &&
      json_kind(json_field(c->body, "input")) != '[')
    return refuse(r, 400, "input", "invalid_value", "input must be a string, or an array of strings "
                                                    "or of token ids");
  /* All are read once before anything is answered: afterwards nothing can be refused any more. */
  while (next_input(c, &cursor, &input)) {
    int32_t count = read_input(s, c, input, r);
    if (count < 0) return -1;
    j->total_tokens += count;
    ++j->inputs;
  }
  if (!j->inputs) return refuse(r, 400, "input", "invalid_value", "input is empty");
  j->prompt_tokens = 0; /* nothing that a session could have */
  return 0;
}

/* ---- pooling ---- */

static void pool(const float *rows, int32_t count, size_t width, json how, float *values) {
  if (json_is(how, "first") || json_is(how, "last")) {
    memcpy(values, rows + (json_is(how, "last") ? (size_t)count - 1 : 0) * width,
           width * sizeof *values);
    return;
  }
  int greatest = json_is(how, "max");
  memcpy(values, rows, width * sizeof *values);
  for (int32_t i = 1; i < count; ++i)
    for (size_t k = 0; k < width; ++k) {
      float value = rows[(size_t)i * width + k];
      if (!greatest) values[k] += value;
      else if (value > values[k]) values[k] = value;
    }
  for (size_t k = 0; !greatest && k < width; ++k) values[k] /= (float)count;
}

static void normalize(float *values, size_t width) {
  double sum = 0;
  for (size_t k = 0; k < width; ++k) sum += (double)values[k] * values[k];
  float length = (float)fmax(sqrt(sum), 1e-12);
  for (size_t k = 0; k < width; ++k) values[k] /= length;
}

/* The embedding of the tokens, in the connection's text. */
static int compute(server *s, connection *c, int32_t count) {
  slm_output output;
  json task = json_field(s->model.info, "task");
  int index = find_output(s, &output);
  float *values = (float *)(void *)c->text;
  size_t width = (size_t)output.features;
  slm_session *session = c->job.slot->session;
  if (slm_encode(session, c->tokens, (size_t)count, NULL) < 0) return -1;
  if (slm_output_get(session, index, output.pooled ? values : s->values) < 0) return -1;
  if (!output.pooled) pool(s->values, count, width, json_field(task, "pooling"), values);
  if (json_is_true(json_field(task, "normalize"))) normalize(values, width);
  c->job.text_length = width * sizeof *values;
  return 0;
}

/* ---- writing ---- */

static void put_base64(writer *w, const uint8_t *bytes, size_t length) {
  static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (size_t i = 0; i < length; i += GROUP) {
    size_t left = length - i;
    uint32_t group = (uint32_t)bytes[i] << 16 | (left > 1 ? (uint32_t)bytes[i + 1] << 8 : 0) |
                     (left > 2 ? bytes[i + 2] : 0);
    char four[4] = {digits[group >> 18], digits[group >> 12 & 63],
                    left > 1 ? digits[group >> 6 & 63] : '=', left > 2 ? digits[group & 63] : '='};
    put_bytes(w, four, 4);
  }
}

static void put_begin(connection *c, writer *w) {
  job *j = &c->job;
  if (!j->input) put(w, "{\"object\":\"list\",\"data\":[");
  put_format(w, "%s{\"object\":\"embedding\",\"index\":%d,\"embedding\":%s", j->input ? "," : "",
             j->input, j->base64 ? "\"" : "[");
}

/* Numbers from text_sent on, as many as fit. */
static void put_numbers(connection *c, writer *w, size_t end) {
  job *j = &c->job;
  const uint8_t *bytes = (const uint8_t *)c->text;
  if (j->base64) {
    size_t most = (end - w->length) / 4 * GROUP, left = j->text_length - j->text_sent;
    put_base64(w, bytes + j->text_sent, left < most ? left : most);
    j->text_sent += left < most ? left : most;
    return;
  }
  for (; j->text_sent < j->text_length && end - w->length > NUMBER_BYTES;
       j->text_sent += sizeof(float)) {
    float value;
    memcpy(&value, bytes + j->text_sent, sizeof value);
    put_format(w, j->text_sent ? ",%.9g" : "%.9g", isfinite(value) ? (double)value : 0.0);
  }
}

static void put_usage(server *s, connection *c, writer *w) {
  put(w, "],\"model\":\"");
  put_escaped(w, s->options.name, strlen(s->options.name));
  put_format(w, "\",\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%d}}", c->job.total_tokens,
             c->job.total_tokens);
}

/* Computes the next input; 0, or -1 where that failed and is answered. */
static int next_embedding(server *s, connection *c) {
  refusal r;
  json input;
  job *j = &c->job;
  int32_t count = next_input(c, &j->cursor, &input) ? read_input(s, c, input, &r) : -1;
  if (count < 0 || compute(s, c, count) < 0) {
    release_session(s, c);
    answer_error(s, c, 500, "server_error", NULL, NULL, slm_last_error());
    return -1;
  }
  s->counters.prompt_tokens += (uint64_t)count;
  j->text_sent = 0;
  if (j->input + 1 == j->inputs) {
    release_session(s, c);
    observe(&s->whole, seconds_now() - j->began);
  }
  return 0;
}

void step_embeddings(server *s, connection *c) {
  enum { ENDING = 1024 };
  job *j = &c->job;
  int begins = j->phase == COMPUTE;
  if (begins && next_embedding(s, c) < 0) return;
  if (!j->answered) begin_answer(s, c, 200, "application/json", -1);
  j->phase = WRITE;
  writer w = begin_part(c);
  if (begins) put_begin(c, &w);
  put_numbers(c, &w, w.room - ENDING);
  if (j->text_sent == j->text_length) {
    put(&w, j->base64 ? "\"}" : "]}");
    j->phase = COMPUTE;
    if (++j->input == j->inputs) put_usage(s, c, &w);
  }
  end_part(c, &w);
  if (j->input == j->inputs) end_answer(c);
}
