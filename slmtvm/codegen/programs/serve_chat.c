/* OpenAI's messages as one text, by the pieces of the model's chat template. */
#include <string.h>

#include "serve.h"

static int refused(const chat_refusal *why, int status, refusal *r) {
  const int elsewhere = status == 501 || strcmp(why->code, "unsupported_value") == 0;
  return refuse(r, status, "messages", why->code, "%s%s", why->message,
                elsewhere ? ": send the text it makes to /v1/completions" : "");
}

/* The role's name here: what newer clients call developer is the system. */
static int read_role(json message, char *role, refusal *r) {
  json field = json_field(message, "role");
  ptrdiff_t length = json_kind(field) == '"' ? json_text(field, role, ROLE_BYTES - 1) : -1;
  if (length <= 0 || memchr(role, 0, (size_t)length))
    return refuse(r, 400, "messages", "invalid_value", "a message has no role");
  role[length] = 0;
  if (strcmp(role, "developer") == 0) strcpy(role, "system");
  return 0;
}

/* A string, or an array of parts {"type": "text", "text": ...}. */
static int put_content(json message, writer *w, refusal *r) {
  json content = json_field(message, "content"), element;
  const char *cursor = NULL;
  if (json_kind(content) == '"') return put_json_text(w, content), 0;
  if (json_kind(content) != '[')
    return refuse(r, 400, "messages", "invalid_value", "a message has no content");
  while (json_next(content, &cursor, &element)) {
    json text = json_field(element, "text");
    if (!json_is(json_field(element, "type"), "text") || json_kind(text) != '"')
      return refuse(r, 400, "messages", "unsupported_value", "messages may hold text alone");
    put_json_text(w, text);
  }
  return 0;
}

ptrdiff_t chat_text(server *s, json messages, refusal *r) {
  writer w = {s->scratch, 0, s->scratch_bytes, 0};
  const chat_template *t = &s->model.chat;
  char before[ROLE_BYTES] = "", role[ROLE_BYTES];
  const char *cursor = NULL;
  chat_refusal why;
  json message;
  if (!s->model.tokenizer)
    return refuse(r, 501, "messages", "no_tokenizer", "%s", s->model.no_tokenizer);
  if (chat_ready(t, &why) < 0) return refused(&why, 501, r);
  while (json_next(messages, &cursor, &message)) {
    if (read_role(message, role, r) < 0) return -1;
    if (chat_begin(t, before, role, &w, &why) < 0) return refused(&why, 400, r);
    size_t begin = w.length;
    if (put_content(message, &w, r) < 0) return -1;
    if (chat_end(t, role, &w, begin, &why) < 0) return refused(&why, 400, r);
    strcpy(before, role);
  }
  if (chat_answer(t, before, &w, &why) < 0) return refused(&why, 400, r);
  if (w.full)
    return refuse(r, 400, "messages", "context_length_exceeded",
                  "the messages are longer than %zu bytes: their tokens would not fit the context of %d",
                  s->scratch_bytes, s->model.context);
  return (ptrdiff_t)w.length;
}
