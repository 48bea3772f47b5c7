/* Conversations as one text, by the pieces that the compiler took the model's chat template apart into.
 *
 * chat.json (slmtvm/text/chat.py): "between" has what stands between two messages, by their roles, before
 * the first ("") and after the last; "trims" the roles whose texts lose the white space around them,
 * "refused" texts that the template treats in a way of its own; or "reason", why there are no pieces. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve.h"

enum { MOST_CHAT_BYTES = 1 << 20, ROLE_BYTES = 24 };

int load_chat(server *s) {
  char path[4096];
  served_model *m = &s->model;
  snprintf(path, sizeof path, "%s/chat.json", s->options.bundle);
  FILE *file = fopen(path, "rb");
  if (!file && errno == ENOENT) return 0;
  m->chat = file ? malloc(MOST_CHAT_BYTES) : NULL;
  size_t length = m->chat ? fread(m->chat, 1, MOST_CHAT_BYTES, file) : 0, place;
  if (file) fclose(file);
  const char *wrong = length == 0 || length == MOST_CHAT_BYTES
                          ? "cannot be read"
                          : json_check(m->chat, length, &m->chat_pieces, &place);
  if (!wrong) return 0;
  fprintf(stderr, "slm-serve: error: %s: %s; copy the bundle again\n", path, wrong);
  return -1;
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

/* Appends what stands between two roles. */
static int put_between(server *s, const char *before, const char *after, writer *w, refusal *r) {
  json pieces = json_field(json_field(s->model.chat_pieces, "between"), before);
  json piece = json_field(pieces, after);
  if (!piece.at)
    return refuse(r, 400, "messages", "invalid_value",
                  "the model's chat template takes no message of \"%s\" %s%s%s", after,
                  *before ? "after one of \"" : "at the beginning", before, *before ? "\"" : "");
  ptrdiff_t bytes = json_text(piece, w->bytes + w->length, w->room - w->length);
  if (bytes < 0) w->full = 1;
  else w->length += (size_t)bytes;
  return 0;
}

static int is_listed(json list, const char *text) {
  const char *cursor = NULL;
  json element;
  while (json_next(list, &cursor, &element))
    if (json_is(element, text)) return 1;
  return 0;
}

/* Bytes at `text` that are a character of white space (Python's str.strip); 0: none. */
static size_t space_at(const char *text, size_t left) {
  const uint8_t *b = (const uint8_t *)text;
  if (left == 0) return 0;
  if (b[0] == ' ' || (b[0] >= 9 && b[0] <= 13) || (b[0] >= 0x1c && b[0] <= 0x1f)) return 1;
  if (left >= 2 && b[0] == 0xc2 && (b[1] == 0x85 || b[1] == 0xa0)) return 2;
  if (left < 3) return 0;
  if (b[0] == 0xe1 && b[1] == 0x9a && b[2] == 0x80) return 3;
  if (b[0] == 0xe3 && b[1] == 0x80 && b[2] == 0x80) return 3;
  if (b[0] != 0xe2) return 0;
  if (b[1] == 0x80 && ((b[2] >= 0x80 && b[2] <= 0x8a) || b[2] == 0xa8 || b[2] == 0xa9 ||
                       b[2] == 0xaf))
    return 3;
  return b[1] == 0x81 && b[2] == 0x9f ? 3 : 0;
}

static void trim(writer *w, size_t begin) {
  char *text = w->bytes + begin;
  size_t length = w->length - begin, start = 0, n;
  while ((n = space_at(text + start, length - start))) start += n;
  for (size_t back = 1; back <= 3 && length > start;) {
    if (back <= length - start && space_at(text + length - back, back) == back) {
      length -= back;
      back = 1;
    } else {
      ++back;
    }
  }
  memmove(text, text + start, length - start);
  w->length = begin + length - start;
}

static int put_string(json text, writer *w) {
  ptrdiff_t bytes = json_text(text, w->bytes + w->length, w->room - w->length);
  if (bytes < 0) w->full = 1;
  else w->length += (size_t)bytes;
  return 0;
}

/* A string, or an array of parts {"type": "text", "text": ...}. */
static int put_content(json message, writer *w, refusal *r) {
  json content = json_field(message, "content"), element;
  const char *cursor = NULL;
  if (json_kind(content) == '"') return put_string(content, w);
  if (json_kind(content) != '[')
    return refuse(r, 400, "messages", "invalid_value", "a message has no content");
  while (json_next(content, &cursor, &element)) {
    json text = json_field(element, "text");
    if (!json_is(json_field(element, "type"), "text") || json_kind(text) != '"')
      return refuse(r, 400, "messages", "unsupported_value", "messages may hold text alone");
    put_string(text, w);
  }
  return 0;
}

/* The contents of messages that the pieces do not serve. */
static int check_content(server *s, const char *role, const char *text, size_t length, refusal *r) {
  json refused = json_field(json_field(s->model.chat_pieces, "refused"), role), element;
  const char *cursor = NULL;
  while (json_next(refused, &cursor, &element)) {
    char own[128];
    ptrdiff_t bytes = json_text(element, own, sizeof own);
    if (bytes > 0 && memmem(text, length, own, (size_t)bytes))
      return refuse(r, 400, "messages", "unsupported_value",
                    "the model's chat template does something of its own with \"%.*s\" in messages of "
                    "\"%s\": send the text it makes to /v1/completions", (int)bytes, own, role);
  }
  return 0;
}

ptrdiff_t chat_text(server *s, json messages, refusal *r) {
  writer w = {s->scratch, 0, s->scratch_bytes, 0};
  char before[ROLE_BYTES] = "", role[ROLE_BYTES];
  const char *cursor = NULL;
  json message, pieces = s->model.chat_pieces, reason = json_field(pieces, "reason");
  if (!s->model.tokenizer)
    return refuse(r, 501, "messages", "no_tokenizer", "%s", s->model.no_tokenizer);
  if (!s->model.chat || reason.at) {
    char why[256];
    ptrdiff_t bytes = reason.at ? json_text(reason, why, sizeof why) : 0;
    if (bytes <= 0) return refuse(r, 501, "messages", "no_chat_template",
                                  "the bundle has no chat template: use /v1/completions");
    return refuse(r, 501, "messages", "no_chat_template",
                  "the model's chat template is not compiled (%.*s): use /v1/completions", (int)bytes,
                  why);
  }
  while (json_next(messages, &cursor, &message)) {
    if (read_role(message, role, r) < 0 || put_between(s, before, role, &w, r) < 0) return -1;
    size_t begin = w.length;
    if (put_content(message, &w, r) < 0) return -1;
    if (is_listed(json_field(pieces, "trims"), role)) trim(&w, begin);
    if (check_content(s, role, w.bytes + begin, w.length - begin, r) < 0) return -1;
    strcpy(before, role);
  }
  if (!*before)
    return refuse(r, 400, "messages", "invalid_value", "messages must be an array of one or more");
  if (put_between(s, before, "", &w, r) < 0) return -1;
  if (w.full)
    return refuse(r, 400, "messages", "context_length_exceeded",
                  "the messages are longer than %zu bytes: their tokens would not fit the context of %d",
                  s->scratch_bytes, s->model.context);
  return (ptrdiff_t)w.length;
}
