/* Conversations as one text: the pieces of chat.json, and messages between them. */
#define _GNU_SOURCE
#include "shared_chat.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MOST_CHAT_BYTES = 8 << 20 };

int chat_open(const char *program, const char *bundle, chat_template *t) {
  char path[4096];
  *t = (chat_template){0};
  snprintf(path, sizeof path, "%s/chat.json", bundle);
  FILE *file = fopen(path, "rb");
  if (!file && errno == ENOENT) return 0;
  t->bytes = file ? malloc(MOST_CHAT_BYTES) : NULL;
  size_t length = t->bytes ? fread(t->bytes, 1, MOST_CHAT_BYTES, file) : 0, place;
  if (file) fclose(file);
  const char *wrong = length == 0 || length == MOST_CHAT_BYTES
                          ? "cannot be read"
                          : json_check(t->bytes, length, &t->pieces, &place);
  if (!wrong) return 0;
  fprintf(stderr, "%s: error: %s: %s; copy the bundle again\n", program, path, wrong);
  return -1;
}

void chat_close(chat_template *t) {
  free(t->bytes);
  *t = (chat_template){0};
}

__attribute__((format(printf, 3, 4))) static int refuse_chat(chat_refusal *r, const char *code,
                                                             const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  r->code = code;
  vsnprintf(r->message, sizeof r->message, format, arguments);
  va_end(arguments);
  return -1;
}

int chat_ready(const chat_template *t, chat_refusal *r) {
  json reason = json_field(t->pieces, "reason");
  char why[256];
  if (t->bytes && !reason.at && json_field(t->pieces, "forms").at) return 0;
  if (t->bytes && !reason.at)
    return refuse_chat(r, "no_chat_template", "the bundle's chat.json is of another version: compile again");
  ptrdiff_t bytes = reason.at ? json_text(reason, why, sizeof why) : 0;
  if (bytes <= 0) return refuse_chat(r, "no_chat_template", "the bundle has no chat template");
  return refuse_chat(r, "no_chat_template", "the model's chat template is not compiled (%.*s)",
                     (int)bytes, why);
}

/* In a piece a form of strftime between these two characters stands for the local time. */
static const char clock_begins[] = "\xee\x80\x83", clock_ends[] = "\xee\x80\x84";

/* Puts the time in the place of its form, in what was written from `begin` on. */
static void put_times(writer *w, size_t begin) {
  enum { MARK = sizeof clock_begins - 1 };
  for (char *at; !w->full && (at = memmem(w->bytes + begin, w->length - begin, clock_begins, MARK));) {
    char form[64], told[128];
    const char *form_at = at + MARK, *end = w->bytes + w->length;
    const char *after = memmem(form_at, (size_t)(end - form_at), clock_ends, MARK);
    if (!after || (size_t)(after - form_at) >= sizeof form) return;
    memcpy(form, form_at, (size_t)(after - form_at));
    form[after - form_at] = 0;
    const time_t now = time(NULL);
    struct tm local;
    const size_t bytes = localtime_r(&now, &local) ? strftime(told, sizeof told, form, &local) : 0;
    const size_t gone = (size_t)(after + MARK - at), rest = (size_t)(end - after - MARK);
    if (bytes > gone && bytes - gone > w->room - w->length) {
      w->full = 1;
      return;
    }
    begin = (size_t)(at - w->bytes) + bytes;
    memmove(at + bytes, after + MARK, rest);
    memcpy(at, told, bytes);
    w->length = begin + rest;
  }
}

static int put_between(json table, const char *before, const char *after, writer *w,
                       chat_refusal *r) {
  json pieces = json_field(json_field(table, "between"), before);
  json piece = json_field(pieces, after);
  const size_t begin = w->length;
  if (*before == '+') ++before; /* a kind that is no role */
  if (*after == '+') ++after;
  if (!piece.at && !*before && !*after)
    return refuse_chat(r, "invalid_value", "messages must be an array of one or more");
  if (!piece.at && !*after)
    return refuse_chat(r, "invalid_value",
                       "the model's chat template begins no answer after a message of \"%s\"", before);
  if (!piece.at)
    return refuse_chat(r, "invalid_value",
                       "the model's chat template takes no message of \"%s\" %s%s%s", after,
                       *before ? "after one of \"" : "at the beginning", before, *before ? "\"" : "");
  put_json_text(w, piece);
  put_times(w, begin);
  return 0;
}

int chat_begin(json table, const char *before, const char *kind, writer *w, chat_refusal *r) {
  return put_between(table, before, kind, w, r);
}

int chat_answer(json table, const char *before, writer *w, chat_refusal *r) {
  return put_between(table, before, "", w, r);
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

/* Writes what begins there as a string of JSON. */
static void quote(writer *w, size_t begin) {
  const size_t length = w->length - begin;
  put(w, "\"");
  put_escaped(w, w->bytes + begin, length);
  put(w, "\"");
  if (w->full) return;
  memmove(w->bytes + begin, w->bytes + begin + length, w->length - begin - length);
  w->length -= length;
}

/* Texts that the pieces do not serve. */
static int check_text(json table, const char *kind, const char *text, size_t length, chat_refusal *r) {
  json refused = json_field(json_field(table, "refused"), kind), element;
  const char *cursor = NULL;
  while (json_next(refused, &cursor, &element)) {
    char own[128];
    ptrdiff_t bytes = json_text(element, own, sizeof own);
    if (bytes > 0 && memmem(text, length, own, (size_t)bytes))
      return refuse_chat(r, "unsupported_value",
                         "the model's chat template does something of its own with \"%.*s\" in "
                         "messages of \"%s\"", (int)bytes, own, kind);
  }
  return 0;
}

int chat_end(json table, const char *kind, writer *w, size_t begin, chat_refusal *r) {
  json form = json_field(json_field(table, "forms"), kind);
  if (check_text(table, kind, w->bytes + begin, w->length - begin, r) < 0) return -1;
  if (json_is(form, "trimmed")) trim(w, begin);
  if (json_is(form, "quoted")) quote(w, begin);
  return 0;
}
