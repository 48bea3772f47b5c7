/* /v1/embeddings: of each input the model's own embedding, or its rows pooled as its settings say; and
 * /v1/classify: the probabilities of its labels. */
#include <math.h>
#include <string.h>

#include "serve.h"
#include "shared_scores.h"

enum { COMPUTE, WRITE, NUMBER_BYTES = 20, GROUP = 3 /* bytes that are four characters of base64 */ };

/* The output that is an embedding, or whose rows become one, or has the scores of labels: those that
 * runtime/tasks.py takes. */
static int find_output(const server *s, int classify, slm_output *found) {
  const known_outputs known = look_at_outputs();
  const int scores = known.named_scores || count_labels(s->model.info) == (size_t)slm_output_size();
  if (s->model.kind != KIND_ENCODER || (known.start >= 0 && known.end >= 0) || scores != classify)
    return -1;
  const int index = classify ? 0 : known.embedding >= 0 ? known.embedding : known.rows;
  *found = (slm_output){.size = sizeof *found};
  if (slm_output_info(index, found) < 0 || (classify && !found->pooled)) return -1;
  return index;
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
  if (find_output(s, j->classify, &output) < 0)
    return refuse(r, 400, "model", "unsupported_model",
                  j->classify ? "this model has no labels for texts"
                              : "this model makes no embeddings of texts");
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

/* ---- computing ---- */

/* The embedding of the tokens, or their labels' probabilities, in the connection's text. */
static int compute(server *s, connection *c, int32_t count) {
  slm_output output;
  json task = json_field(s->model.info, "task");
  int index = find_output(s, c->job.classify, &output);
  float *values = (float *)(void *)c->text;
  size_t width = (size_t)output.features;
  slm_session *session = c->job.slot->session;
  if (slm_encode(session, c->tokens, (size_t)count, NULL) < 0) return -1;
  if (slm_output_get(session, index, output.pooled ? values : s->values) < 0) return -1;
  if (!output.pooled) {
    char how[POOLING_BYTES] = "";
    json pooling = json_field(task, "pooling");
    ptrdiff_t length = json_kind(pooling) == '"' ? json_text(pooling, how, sizeof how - 1) : 0;
    how[length > 0 ? length : 0] = 0;
    pool_rows(s->values, (size_t)count, width, how, values);
  }
  if (c->job.classify)
    label_probabilities(values, width, json_is_true(json_field(task, "independent")));
  else if (json_is_true(json_field(task, "normalize")))
    make_length_one(values, width);
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

/* The name of the likeliest label. */
static void put_label(server *s, connection *c, writer *w) {
  const float *values = (const float *)(const void *)c->text;
  size_t count = c->job.text_length / sizeof *values, best = 0;
  for (size_t k = 1; k < count; ++k)
    if (values[k] > values[best]) best = k;
  json label = label_at(s->model.info, best);
  if (label.at) put_bytes(w, label.at, (size_t)(label.end - label.at)); /* JSON as it is there */
  else put_format(w, "\"LABEL_%zu\"", best);
}

static void put_begin(server *s, connection *c, writer *w) {
  job *j = &c->job;
  if (!j->input) put(w, "{\"object\":\"list\",\"data\":[");
  if (j->classify) {
    put_format(w, "%s{\"index\":%d,\"num_classes\":%zu,\"label\":", j->input ? "," : "", j->input,
               j->text_length / sizeof(float));
    put_label(s, c, w);
    put(w, ",\"probs\":[");
    return;
  }
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
  if (begins) put_begin(s, c, &w);
  put_numbers(c, &w, w.room - ENDING);
  if (j->text_sent == j->text_length) {
    put(&w, j->base64 ? "\"}" : "]}");
    j->phase = COMPUTE;
    if (++j->input == j->inputs) put_usage(s, c, &w);
  }
  end_part(c, &w);
  if (j->input == j->inputs) end_answer(c);
}
