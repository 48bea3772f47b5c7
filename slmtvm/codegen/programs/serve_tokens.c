/* /tokenize and /detokenize: texts as the model's tokens, and back. */
#include <string.h>

#include "serve.h"

enum { TOKEN_DIGITS = 12, BEGIN = 0, REST, END };

/* Messages, and tools, as a chat's prompt has them. */
static int32_t read_chat(server *s, connection *c, json messages, refusal *r) {
  if (read_tools(s, &c->job, c->body, r) < 0) return -1;
  const ptrdiff_t bytes = chat_text(s, messages, c->job.tools, r);
  if (bytes < 0) return -1;
  const int32_t count = tokenize_text(s, s->scratch, (size_t)bytes, SLM_NO_SPECIAL, c->tokens,
                                      s->token_room);
  return count < 0 ? refuse(r, 400, "messages", "invalid_value", "%s", slm_last_error()) : count;
}

int begin_tokens(server *s, connection *c, refusal *r) {
  json messages = json_field(c->body, "messages");
  json text = json_field(c->body, "content"), special = json_field(c->body, "add_special");
  const char *param = messages.at ? "messages" : text.at ? "content" : "prompt";
  if (!text.at) text = json_field(c->body, "prompt");
  if (!special.at) special = json_field(c->body, "add_special_tokens");
  if (!messages.at && json_kind(text) != '"')
    return refuse(r, 400, "content", "invalid_value", "content must be the text to tokenize");
  uint32_t flags = !special.at || json_is_true(special) ? 0 : SLM_NO_SPECIAL;
  int32_t count = messages.at ? read_chat(s, c, messages, r)
                              : read_prompt(s, text, param, flags, c->tokens, s->token_room, r);
  if (count < 0) return -1;
  if ((size_t)count > s->token_room)
    return refuse(r, 400, param, "context_length_exceeded",
                  "the text has %d tokens, and no more than the context of %d are listed", count,
                  s->model.context);
  c->job.count = count;
  begin_answer(s, c, 200, "application/json", -1);
  c->state = ANSWERING;
  c->since = seconds_now();
  return 0;
}

int begin_text(server *s, connection *c, refusal *r) {
  json tokens = json_field(c->body, "tokens");
  job *j = &c->job;
  if (!s->model.tokenizer)
    return refuse(r, 501, "tokens", "no_tokenizer", "%s", s->model.no_tokenizer);
  if (json_kind(tokens) != '[')
    return refuse(r, 400, "tokens", "invalid_value", "tokens must be an array of token ids");
  int32_t count = read_prompt(s, tokens, "tokens", 0, c->tokens, s->token_room, r);
  if (count < 0) return -1;
  if ((size_t)count > s->token_room)
    return refuse(r, 400, "tokens", "context_length_exceeded",
                  "%d tokens: no more than the context of %d are taken", count, s->model.context);
  for (int32_t bytes = SLM_MORE_TEXT; bytes & SLM_MORE_TEXT;) {
    size_t room = s->text_room - j->text_length;
    if (room < 16) return refuse(r, 400, "tokens", "too_long", "the text is too long");
    bytes = slm_detokenize(s->model.tokenizer, &j->text_state, c->tokens, (size_t)count,
                           SLM_KEEP_SPECIAL | SLM_TEXT_ENDS, c->text + j->text_length, room);
    if (bytes < 0) return refuse(r, 400, "tokens", "invalid_value", "%s", slm_last_error());
    j->text_length += (size_t)(bytes & ~SLM_MORE_TEXT);
  }
  begin_answer(s, c, 200, "application/json", -1);
  c->state = ANSWERING;
  c->since = seconds_now();
  return 0;
}

/* Some of the answer, as much as fits. */
static void put_some(server *s, connection *c, writer *w, size_t end) {
  job *j = &c->job;
  int texts = j->route == ROUTE_DETOKENIZE;
  if (j->phase == BEGIN) {
    put(w, texts ? "{\"content\":\"" : "{\"tokens\":[");
    j->phase = REST;
  }
  if (texts) {
    size_t left = j->text_length - j->text_sent;
    size_t bytes = escaped_fit(c->text + j->text_sent, left, end - w->length);
    put_escaped(w, c->text + j->text_sent, bytes);
    j->text_sent += bytes;
    if (j->text_sent < j->text_length) return;
    put(w, "\"}");
  } else {
    for (; j->told < j->count && end - w->length > TOKEN_DIGITS; ++j->told)
      put_format(w, j->told ? ",%d" : "%d", c->tokens[j->told]);
    if (j->told < j->count) return;
    put_format(w, "],\"count\":%d,\"max_model_len\":%d}", j->count, s->model.context);
  }
  j->phase = END;
}

void step_tokens(server *s, connection *c) {
  enum { ENDING = 128 }; /* bytes that are left for what comes behind the last token */
  if (out_room(c) < EVENT_BYTES) return;
  writer w = begin_part(c);
  put_some(s, c, &w, w.room - ENDING);
  end_part(c, &w);
  if (c->job.phase == END) end_answer(c);
}
