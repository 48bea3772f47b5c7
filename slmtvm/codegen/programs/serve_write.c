/* The answers with generated text, as OpenAI's clients read them: whole, or an event for each piece.
 *
 * completions: choices[0].text; chat: choices[0].message.content, in events delta.content. */
#include <math.h>
#include <string.h>

#include "serve.h"


static int is_chat(const connection *c) { return c->job.route == ROUTE_CHAT; }

static void put_head(server *s, const connection *c, writer *w) {
  const char *object = !is_chat(c) ? "text_completion"
                       : c->job.stream ? "chat.completion.chunk" : "chat.completion";
  put_format(w, "{\"id\":\"%s-%016llx\",\"object\":\"%s\",\"created\":%lld,\"model\":\"",
             is_chat(c) ? "chatcmpl" : "cmpl", (unsigned long long)(s->nonce + c->job.number), object,
             (long long)c->job.created);
  put_escaped(w, s->options.name, strlen(s->options.name));
  put(w, "\",");
}

static void put_usage(const connection *c, writer *w) {
  const job *j = &c->job;
  put_format(w, "\"usage\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,\"total_tokens\":%d,"
                "\"prompt_tokens_details\":{\"cached_tokens\":%d}}",
             j->prompt_tokens, j->made, j->prompt_tokens + j->made, j->cached);
}

static void put_finish(const connection *c, int last, writer *w) {
  const char *reason = c->job.call_count ? "\"tool_calls\""
                       : c->job.finish == FINISH_STOP ? "\"stop\"" : "\"length\"";
  put_format(w, "\"finish_reason\":%s", last ? reason : "null");
}

/* ---- log probabilities ---- */

/* The text of a token by itself. */
static size_t token_text(server *s, int32_t token, char *text) {
  slm_text_state state = {.started = 1};
  if (!s->model.tokenizer) return 0;
  int32_t bytes = slm_detokenize(s->model.tokenizer, &state, &token, 1,
                                 SLM_KEEP_SPECIAL | SLM_TEXT_ENDS, text, TOKEN_BYTES);
  return bytes < 0 ? 0 : (size_t)(bytes & ~SLM_MORE_TEXT);
}

static void put_token(server *s, int32_t token, writer *w) {
  char text[TOKEN_BYTES];
  size_t bytes = token_text(s, token, text);
  put(w, "\"");
  put_escaped(w, text, bytes);
  put(w, "\"");
}

/* JSON has no infinity. */
static double finite_or_least(float logprob) { return isfinite(logprob) ? logprob : -9999.0; }

static void put_chat_token(server *s, likely told, writer *w) {
  char text[TOKEN_BYTES];
  size_t bytes = token_text(s, told.token, text);
  put(w, "{\"token\":");
  put_token(s, told.token, w);
  put_format(w, ",\"logprob\":%.9g,\"bytes\":[", finite_or_least(told.logprob));
  for (size_t i = 0; i < bytes; ++i) put_format(w, i ? ",%d" : "%d", (uint8_t)text[i]);
  put(w, "]");
}

static const likely *told_of(const connection *c, int32_t token) {
  return c->likeliest + (size_t)token * (1 + MOST_LIKELY);
}

/* An element of choices[0].logprobs.content. */
static void put_chat_logprobs(server *s, const connection *c, int32_t number, writer *w) {
  const likely *told = told_of(c, number);
  put_chat_token(s, told[0], w);
  put(w, ",\"top_logprobs\":[");
  for (int k = 1; k < c->job.logprobs; ++k) {
    if (k > 1) put(w, ",");
    put_chat_token(s, told[k], w);
    put(w, "}");
  }
  put(w, "]}");
}

/* The alternatives of a token: {"text": logprob}. */
static void put_alternatives(server *s, const connection *c, int32_t number, writer *w) {
  put(w, "{");
  for (int k = 1; k < c->job.logprobs; ++k) {
    if (k > 1) put(w, ",");
    put_token(s, told_of(c, number)[k].token, w);
    put_format(w, ":%.9g", finite_or_least(told_of(c, number)[k].logprob));
  }
  put(w, "}");
}

/* What an event tells of tokens `from` to `to`. */
static void put_event_logprobs(server *s, const connection *c, int32_t from, int32_t to, writer *w) {
  if (!c->job.logprobs || from == to) {
    put(w, "\"logprobs\":null,");
    return;
  }
  if (is_chat(c)) {
    put(w, "\"logprobs\":{\"content\":[");
    for (int32_t i = from; i < to; ++i) put_chat_logprobs(s, c, i, w);
    put(w, "],\"refusal\":null},");
    return;
  }
  put(w, "\"logprobs\":{\"tokens\":[");
  for (int32_t i = from; i < to; ++i) put_token(s, told_of(c, i)->token, w);
  put(w, "],\"token_logprobs\":[");
  for (int32_t i = from; i < to; ++i) put_format(w, "%.9g", finite_or_least(told_of(c, i)->logprob));
  put(w, "],\"top_logprobs\":[");
  for (int32_t i = from; i < to; ++i) put_alternatives(s, c, i, w);
  put(w, "],\"text_offset\":[]},");
}

/* Which tokens a text is made of, as vLLM says it: all that there is of a model without a compiled
 * tokenizer. */
static void put_ids(const connection *c, int32_t from, int32_t to, writer *w) {
  const int32_t *made = c->tokens + c->job.count - c->job.made;
  put(w, "\"token_ids\":[");
  for (int32_t i = from; i < to; ++i) put_format(w, i > from ? ",%d" : "%d", made[i]);
  put(w, "],");
}

/* ---- calls of tools ---- */

/* The inside of what tells one: its name, then its arguments, which are JSON in a string. */
static void put_call_name(server *s, const connection *c, writer *w) {
  const job *j = &c->job;
  const tool_call *call = &j->calls[j->call];
  put_format(w, "\"id\":\"call_%016llx%02d\",\"type\":\"function\",\"function\":{\"name\":",
             (unsigned long long)(s->nonce + j->number), j->call);
  put_json_string(w, (json){call->name, call->name_end});
  put(w, ",\"arguments\":\"");
}

static size_t piece_of(const char *text, size_t length);

/* Some of its arguments; 0 where that was all, and the next call begins. */
static int put_some_arguments(connection *c, writer *w) {
  job *j = &c->job;
  const tool_call *call = &j->calls[j->call];
  const size_t bytes = piece_of(j->call_sent, (size_t)(call->arguments_end - j->call_sent));
  put_escaped(w, j->call_sent, bytes);
  j->call_sent += bytes;
  if (j->call_sent < call->arguments_end) return 1;
  ++j->call;
  j->call_sent = NULL;
  return 0;
}

static void write_call(server *s, connection *c) {
  job *j = &c->job;
  writer w = begin_part(c);
  put(&w, "data: ");
  put_head(s, c, &w);
  put_format(&w, "\"choices\":[{\"index\":0,\"delta\":{\"tool_calls\":[{\"index\":%d,", j->call);
  if (!j->call_sent) {
    put_call_name(s, c, &w);
    j->call_sent = j->calls[j->call].arguments;
  } else {
    put(&w, "\"function\":{\"arguments\":\"");
    put_some_arguments(c, &w);
  }
  put(&w, "\"}}]},\"logprobs\":null,");
  put_finish(c, 0, &w);
  put(&w, "}]}\n\n");
  end_part(c, &w);
}

/* ---- events ---- */

void write_begin(server *s, connection *c) {
  if (!c->job.stream) return;
  begin_answer(s, c, 200, "text/event-stream; charset=utf-8", -1);
  if (!is_chat(c)) return;
  writer w = begin_part(c);
  put(&w, "data: ");
  put_head(s, c, &w);
  put(&w, "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
          "\"logprobs\":null,\"finish_reason\":null}]}\n\n");
  end_part(c, &w);
}

/* The longest end of the text that may become a stop string. */
static size_t held_back(const server *s, const connection *c) {
  const job *j = &c->job;
  size_t most = held_for_call(s, c);
  if (j->finish) return 0;
  for (int i = 0; i < j->stop_count; ++i)
    for (size_t n = j->stop_bytes[i] - 1; n > most; --n)
      if (n <= j->text_length && memcmp(c->text + j->text_length - n, j->stops[i], n) == 0) most = n;
  return most;
}

/* Bytes of `length` that are whole characters and not more than a piece. */
static size_t piece_of(const char *text, size_t length) {
  if (length <= PIECE_BYTES) return length;
  length = PIECE_BYTES;
  while (length > 0 && ((uint8_t)text[length] & 0xc0) == 0x80) --length;
  return length;
}

static void write_event(server *s, connection *c, size_t bytes, int32_t told) {
  writer w = begin_part(c);
  put(&w, "data: ");
  put_head(s, c, &w);
  put(&w, is_chat(c) ? "\"choices\":[{\"index\":0,\"delta\":{\"content\":\""
                     : "\"choices\":[{\"index\":0,\"text\":\"");
  put_escaped(&w, c->text, bytes);
  put(&w, is_chat(c) ? "\"}," : "\",");
  put_event_logprobs(s, c, c->job.told, told, &w);
  if (c->job.ids) put_ids(c, c->job.told, told, &w);
  put_finish(c, 0, &w);
  put(&w, "}]}\n\n");
  end_part(c, &w);
  memmove(c->text, c->text + bytes, c->job.text_length -= bytes);
  c->job.said |= bytes > 0;
  c->job.told = told;
}

static void write_last(server *s, connection *c) {
  writer w = begin_part(c);
  put(&w, "data: ");
  put_head(s, c, &w);
  put(&w, is_chat(c) ? "\"choices\":[{\"index\":0,\"delta\":{},\"logprobs\":null,"
                     : "\"choices\":[{\"index\":0,\"text\":\"\",\"logprobs\":null,");
  put_finish(c, 1, &w);
  put(&w, "}]}\n\n");
  if (c->job.include_usage) {
    put(&w, "data: ");
    put_head(s, c, &w);
    put(&w, "\"choices\":[],");
    put_usage(c, &w);
    put(&w, "}\n\n");
  }
  put(&w, "data: [DONE]\n\n");
  end_part(c, &w);
  end_answer(c);
}

void write_events(server *s, connection *c) {
  job *j = &c->job;
  for (;;) {
    size_t bytes = piece_of(c->text, j->text_length - held_back(s, c));
    int32_t told = (j->logprobs || j->ids) && j->told < j->made ? j->told + 1 : j->told;
    if (out_room(c) < EVENT_BYTES) return; /* later, when what is there was read */
    if (bytes == 0 && told == j->told) break;
    write_event(s, c, bytes, told);
  }
  for (; c->state == ANSWERING && j->call < j->call_count; write_call(s, c))
    if (out_room(c) < EVENT_BYTES) return;
  if (j->finish && c->state == ANSWERING && out_room(c) >= EVENT_BYTES) write_last(s, c);
}

/* ---- a whole answer, in as many parts as its buffer needs ---- */

enum { BEGIN, TEXT, CALLS, ARGUMENTS, AFTER_MESSAGE, TOKENS, SCORES, OTHERS, IDS, MORE_IDS, END };

static void put_whole_begin(server *s, connection *c, writer *w) {
  put_head(s, c, w);
  put(w, is_chat(c) ? "\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
                    : "\"choices\":[{\"index\":0,\"text\":");
  if (!c->job.call_count || c->job.text_length) {
    put(w, "\"");
    c->job.phase = TEXT;
  } else {
    put(w, "null");
    c->job.phase = CALLS;
  }
}

/* One element of the arrays of the log probabilities; 0 where the array is over. */
static int put_element(server *s, connection *c, writer *w) {
  job *j = &c->job;
  if (j->told == j->made) return 0;
  if (j->told) put(w, ",");
  if (is_chat(c)) put_chat_logprobs(s, c, j->told, w);
  else if (j->phase == TOKENS) put_token(s, told_of(c, j->told)->token, w);
  else if (j->phase == SCORES) put_format(w, "%.9g", finite_or_least(told_of(c, j->told)->logprob));
  else put_alternatives(s, c, j->told, w);
  ++j->told;
  return 1;
}

static void next_array(connection *c, const char *text, writer *w) {
  put(w, text);
  c->job.told = 0;
  ++c->job.phase;
}

/* Some of the ids: a part of an answer has room for so many. */
static void put_some_ids(connection *c, writer *w) {
  enum { MOST_IDS = 500 };
  job *j = &c->job;
  const int32_t *made = c->tokens + j->count - j->made;
  int32_t end = j->made - j->told > MOST_IDS ? j->told + MOST_IDS : j->made;
  for (; j->told < end; ++j->told) put_format(w, j->told ? ",%d" : "%d", made[j->told]);
  if (j->told < j->made) return;
  put(w, "],");
  j->phase = END;
}

/* A phase of an answer, or a part of it. */
static void put_phase(server *s, connection *c, writer *w) {
  job *j = &c->job;
  switch (j->phase) {
    case BEGIN:
      put_whole_begin(s, c, w);
      break;
    case TEXT: {
      size_t bytes = piece_of(c->text + j->text_sent, j->text_length - j->text_sent);
      put_escaped(w, c->text + j->text_sent, bytes);
      j->text_sent += bytes;
      if (j->text_sent < j->text_length) break;
      put(w, "\"");
      j->phase = j->call_count ? CALLS : AFTER_MESSAGE;
      break;
    }
    case CALLS:
      if (j->call == j->call_count) {
        put(w, "]");
        j->phase = AFTER_MESSAGE;
        break;
      }
      put(w, j->call ? ",{" : ",\"tool_calls\":[{");
      put_call_name(s, c, w);
      j->call_sent = j->calls[j->call].arguments;
      j->phase = ARGUMENTS;
      break;
    case ARGUMENTS:
      if (put_some_arguments(c, w)) break;
      put(w, "\"}}");
      j->phase = CALLS;
      break;
    case AFTER_MESSAGE:
      put(w, is_chat(c) ? ",\"refusal\":null}," : ",");
      j->told = 0;
      j->phase = j->logprobs ? TOKENS : IDS;
      put(w, !j->logprobs ? "\"logprobs\":null,"
             : is_chat(c) ? "\"logprobs\":{\"content\":[" : "\"logprobs\":{\"tokens\":[");
      break;
    case TOKENS:
      if (put_element(s, c, w)) break;
      next_array(c, is_chat(c) ? "],\"refusal\":null}," : "],\"token_logprobs\":[", w);
      if (is_chat(c)) j->phase = IDS;
      break;
    case SCORES:
      if (!put_element(s, c, w)) next_array(c, "],\"top_logprobs\":[", w);
      break;
    case OTHERS:
      if (!put_element(s, c, w)) next_array(c, "],\"text_offset\":[]},", w);
      break;
    case IDS:
      if (j->ids) next_array(c, "\"token_ids\":[", w);
      else j->phase = END;
      break;
    case MORE_IDS: put_some_ids(c, w); break;
    default: break;
  }
}

void write_whole(server *s, connection *c) {
  job *j = &c->job;
  if (!j->answered) begin_answer(s, c, 200, "application/json", -1);
  while (j->phase != END) {
    if (out_room(c) < EVENT_BYTES) return;
    writer w = begin_part(c);
    size_t whole = w.room;
    while (j->phase != END && whole - w.length >= EVENT_BYTES) put_phase(s, c, &w);
    end_part(c, &w);
  }
  if (out_room(c) < EVENT_BYTES) return;
  writer w = begin_part(c);
  put_finish(c, 1, &w);
  put(&w, "}],");
  put_usage(c, &w);
  put(&w, "}");
  end_part(c, &w);
  end_answer(c);
}
