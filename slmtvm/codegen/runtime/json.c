/* Reading JSON text where it lies (RFC 8259). */
#include "json.h"

#include <string.h>

enum { MOST_DEEP = 64 };

static void skip_space(slm_json *t) {
  while (t->next < t->end && (*t->next == ' ' || *t->next == '\n' || *t->next == '\t' ||
                              *t->next == '\r'))
    ++t->next;
}

static int take(slm_json *t, char wanted) {
  skip_space(t);
  if (t->next == t->end || *t->next != wanted) return 0;
  ++t->next;
  return 1;
}

static int skip_string(slm_json *t) {
  if (!take(t, '"')) return 0;
  while (t->next < t->end) {
    unsigned char c = (unsigned char)*t->next++;
    if (c == '"') return 1;
    if (c < ' ') return 0;
    if (c != '\\') continue;
    if (t->next == t->end) return 0;
    c = (unsigned char)*t->next++;
    if (c == 'u') {
      for (int i = 0; i < 4; ++i, ++t->next)
        if (t->next == t->end || !strchr("0123456789abcdefABCDEF", *t->next) || !*t->next) return 0;
    } else if (!c || !strchr("\"\\/bfnrt", c)) {
      return 0;
    }
  }
  return 0;
}

static int digits(slm_json *t) {
  const char *from = t->next;
  while (t->next < t->end && *t->next >= '0' && *t->next <= '9') ++t->next;
  return t->next > from;
}

static int skip_number(slm_json *t) {
  if (t->next < t->end && *t->next == '-') ++t->next;
  const char *from = t->next;
  if (!digits(t) || (*from == '0' && t->next > from + 1)) return 0;
  if (t->next < t->end && *t->next == '.') {
    ++t->next;
    if (!digits(t)) return 0;
  }
  if (t->next < t->end && (*t->next == 'e' || *t->next == 'E')) {
    ++t->next;
    if (t->next < t->end && (*t->next == '+' || *t->next == '-')) ++t->next;
    if (!digits(t)) return 0;
  }
  return 1;
}

static int skip_word(slm_json *t) {
  static const char *const words[] = {"true", "false", "null"};
  for (int i = 0; i < 3; ++i) {
    size_t length = strlen(words[i]);
    if ((size_t)(t->end - t->next) < length || memcmp(t->next, words[i], length) != 0) continue;
    t->next += length;
    return 1;
  }
  return 0;
}

static int skip_value(slm_json *t, int deep) {
  skip_space(t);
  if (t->next == t->end || deep > MOST_DEEP) return 0;
  char first = *t->next;
  if (first == '"') return skip_string(t);
  if (first != '{' && first != '[') return first == '-' || (first >= '0' && first <= '9')
                                               ? skip_number(t)
                                               : skip_word(t);
  char last = first == '{' ? '}' : ']';
  ++t->next;
  if (take(t, last)) return 1;
  do {
    if (first == '{' && (!skip_string(t) || !take(t, ':'))) return 0;
    if (!skip_value(t, deep + 1)) return 0;
  } while (take(t, ','));
  return take(t, last);
}

int slm_json_valid(slm_json text) {
  if (!skip_value(&text, 0)) return 0;
  skip_space(&text);
  return text.next == text.end;
}

int slm_json_each(slm_json *at, slm_json *name, slm_json *value) {
  skip_space(at);
  if (at->next == at->end || !strchr("{[,", *at->next) || !*at->next) return 0;
  ++at->next;
  /* In an object a string is a name where a colon follows; in an array it is an element. */
  slm_json ahead = *at;
  skip_space(at);
  *name = (slm_json){NULL, NULL};
  if (skip_string(&ahead) && take(&ahead, ':')) {
    *name = (slm_json){at->next + 1, ahead.next};
    slm_json string = *at;
    skip_string(&string);
    name->end = string.next - 1;
    *at = ahead;
  }
  skip_space(at);
  value->next = at->next;
  if (!skip_value(at, 0)) return 0; /* an empty object or array */
  value->end = at->next;
  return 1;
}

int slm_json_member(slm_json text, const char *name, slm_json *value) {
  slm_json found, at = text;
  size_t length = strlen(name);
  skip_space(&at);
  if (at.next == at.end || *at.next != '{') return 0;
  while (slm_json_each(&at, &found, value))
    if (found.next && (size_t)(found.end - found.next) == length &&
        memcmp(found.next, name, length) == 0)
      return 1;
  return 0;
}

int slm_json_number(slm_json value, uint64_t *number) {
  *number = 0;
  skip_space(&value);
  if (value.next == value.end) return 0;
  for (; value.next < value.end; ++value.next) {
    if (*value.next < '0' || *value.next > '9') return 0;
    uint64_t digit = (uint64_t)(*value.next - '0');
    if (*number > (INT64_MAX - digit) / 10) return 0;
    *number = *number * 10 + digit;
  }
  return 1;
}

int slm_json_string(slm_json value, char *copy, size_t room) {
  skip_space(&value);
  if (value.end - value.next < 2 || *value.next != '"' || value.end[-1] != '"') return 0;
  size_t length = (size_t)(value.end - value.next) - 2;
  if (length >= room || memchr(value.next, '\\', (size_t)(value.end - value.next))) return 0;
  memcpy(copy, value.next + 1, length);
  copy[length] = 0;
  return 1;
}
