/* OpenAI's messages as one text, by the pieces of the model's chat template. */
#include <string.h>

#include "serve.h"

int refuse_chat_here(const chat_refusal *why, int status, refusal *r) {
  const int elsewhere = status == 501 || strcmp(why->code, "unsupported_value") == 0;
  return refuse(r, status, "messages", why->code, "%s%s", why->message,
                elsewhere ? ": send the text it makes to /v1/completions" : "");
}

/* The role's name here: what newer clients call developer is the system. */
static int read_role(json message, char *role, refusal *r) {
  json field = json_field(message, "role");
  ptrdiff_t length = json_kind(field) == '"' ? json_text(field, role, ROLE_BYTES - 1) : -1;
  if (length <= 0 || role[0] == '+' || memchr(role, 0, (size_t)length))
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

/* The table by which a conversation is written. */
static int find_table(const server *s, json tools, json *table, refusal *r) {
  const chat_template *t = &s->model.chat;
  chat_refusal why;
  char reason[256];
  if (chat_ready(t, &why) < 0) return refuse_chat_here(&why, 501, r);
  *table = tools.at ? json_field(t->pieces, "offering") : t->pieces;
  if (table->at) return 0;
  json told = json_field(t->pieces, "tools_reason");
  const ptrdiff_t bytes = told.at ? json_text(told, reason, sizeof reason) : 0;
  return refuse(r, 400, "tools", "unsupported_parameter",
                "the model's chat template is not compiled with tools (%.*s)",
                bytes > 0 ? (int)bytes : 0, reason);
}

/* A message of a role, or the text before an assistant's calls. */
static int put_message(json table, const char *kind, json message, char *before, writer *w,
                       refusal *r) {
  chat_refusal why;
  if (chat_begin(table, before, kind, w, &why) < 0) return refuse_chat_here(&why, 400, r);
  const size_t begin = w->length;
  if (put_content(message, w, r) < 0) return -1;
  if (!w->full && chat_end(table, kind, w, begin, &why) < 0) return refuse_chat_here(&why, 400, r);
  strcpy(before, kind);
  return 0;
}

static int is_empty(json content) { return !content.at || json_is(content, ""); }

/* An assistant's message with calls of tools. */
static int put_calling(json table, json message, json calls, char *before, writer *w, refusal *r) {
  if (!is_empty(json_field(message, "content")) &&
      put_message(table, "+says", message, before, w, r) < 0)
    return -1;
  return put_calls(table, calls, before, w, r);
}

ptrdiff_t chat_text(server *s, json messages, json tools, refusal *r) {
  writer w = {s->scratch, 0, s->scratch_bytes, 0};
  char before[ROLE_BYTES] = "", role[ROLE_BYTES];
  const char *cursor = NULL, *none = NULL;
  chat_refusal why;
  json message, table, call;
  int offered = !tools.at;
  if (!s->model.tokenizer)
    return refuse(r, 501, "messages", "no_tokenizer", "%s", s->model.no_tokenizer);
  if (find_table(s, tools, &table, r) < 0) return -1;
  while (!w.full && json_next(messages, &cursor, &message)) {
    if (read_role(message, role, r) < 0) return -1;
    if (!offered && (*before || strcmp(role, "system") != 0)) {
      if (put_tools(table, tools, before, &w, r) < 0) return -1;
      offered = 1;
    }
    json calls = json_field(message, "tool_calls");
    const int calling = strcmp(role, "assistant") == 0 && json_next(calls, &none, &call);
    none = NULL;
    if ((calling ? put_calling(table, message, calls, before, &w, r)
                 : put_message(table, role, message, before, &w, r)) < 0)
      return -1;
  }
  if (!offered && !w.full && *before && put_tools(table, tools, before, &w, r) < 0) return -1;
  if (!w.full && chat_answer(table, before, &w, &why) < 0) return refuse_chat_here(&why, 400, r);
  if (w.full)
    return refuse(r, 400, "messages", "context_length_exceeded",
                  "the messages are longer than %zu bytes: their tokens would not fit the context of %d",
                  s->scratch_bytes, s->model.context);
  return (ptrdiff_t)w.length;
}
