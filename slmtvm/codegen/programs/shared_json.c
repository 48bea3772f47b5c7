/* Reading and writing JSON (RFC 8259). */
#include "shared_json.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- checking ---- */

typedef struct {
  const uint8_t *at, *end;
  const char *wrong;
} checker;

static int fail(checker *c, const char *wrong) {
  if (!c->wrong) c->wrong = wrong;
  return 0;
}

static void pass_space(checker *c) {
  while (c->at < c->end && (*c->at == ' ' || *c->at == '\t' || *c->at == '\n' || *c->at == '\r'))
    ++c->at;
}

static int is_digit(const checker *c) { return c->at < c->end && *c->at >= '0' && *c->at <= '9'; }

/* One character of UTF-8 beyond ASCII (RFC 3629: no surrogates, nothing longer than needed). */
static int check_character(checker *c) {
  const uint8_t *b = c->at;
  size_t left = (size_t)(c->end - b);
  int more = b[0] >= 0xc2 && b[0] < 0xe0 ? 1 : (b[0] & 0xf0) == 0xe0 ? 2
             : b[0] >= 0xf0 && b[0] < 0xf5 ? 3 : 0;
  if (!more || left <= (size_t)more) return fail(c, "bytes that are no UTF-8");
  for (int i = 1; i <= more; ++i)
    if ((b[i] & 0xc0) != 0x80) return fail(c, "bytes that are no UTF-8");
  if ((b[0] == 0xe0 && b[1] < 0xa0) || (b[0] == 0xed && b[1] > 0x9f) ||
      (b[0] == 0xf0 && b[1] < 0x90) || (b[0] == 0xf4 && b[1] > 0x8f))
    return fail(c, "bytes that are no UTF-8");
  c->at += more + 1;
  return 1;
}

static int check_escape(checker *c) {
  if (c->at == c->end) return fail(c, "a string does not end");
  if (*c->at == 'u') {
    for (int i = 1; i <= 4; ++i) {
      if (c->end - c->at <= i) return fail(c, "a string does not end");
      uint8_t h = c->at[i];
      if (!((h >= '0' && h <= '9') || ((h | 32) >= 'a' && (h | 32) <= 'f')))
        return fail(c, "an escape \\u without four hexadecimal digits");
    }
    c->at += 5;
    return 1;
  }
  if (*c->at == 0 || !strchr("\"\\/bfnrt", *c->at)) return fail(c, "an unknown escape");
  ++c->at;
  return 1;
}

static int check_string(checker *c) {
  for (++c->at; c->at < c->end;) {
    uint8_t b = *c->at;
    if (b == '"') return ++c->at, 1;
    if (b < 0x20) return fail(c, "a control character in a string");
    if (b == '\\') {
      ++c->at;
      if (!check_escape(c)) return 0;
    } else if (b < 0x80) {
      ++c->at;
    } else if (!check_character(c)) {
      return 0;
    }
  }
  return fail(c, "a string does not end");
}

static int check_number(checker *c) {
  if (*c->at == '-') ++c->at;
  if (!is_digit(c)) return fail(c, "a number without digits");
  if (*c->at++ != '0')
    while (is_digit(c)) ++c->at;
  if (c->at < c->end && *c->at == '.') {
    ++c->at;
    if (!is_digit(c)) return fail(c, "a number without digits behind its point");
    while (is_digit(c)) ++c->at;
  }
  if (c->at < c->end && (*c->at | 32) == 'e') {
    ++c->at;
    if (c->at < c->end && (*c->at == '+' || *c->at == '-')) ++c->at;
    if (!is_digit(c)) return fail(c, "a number without digits in its exponent");
    while (is_digit(c)) ++c->at;
  }
  return 1;
}

static int check_word(checker *c, const char *word) {
  size_t length = strlen(word);
  if ((size_t)(c->end - c->at) < length || memcmp(c->at, word, length) != 0)
    return fail(c, "a value that is none");
  c->at += length;
  return 1;
}

/* A number, a string or a word. */
static int check_plain(checker *c) {
  switch (*c->at) {
    case '"': return check_string(c);
    case 't': return check_word(c, "true");
    case 'f': return check_word(c, "false");
    case 'n': return check_word(c, "null");
    default: return *c->at == '-' || is_digit(c) ? check_number(c) : fail(c, "a value that is none");
  }
}

/* "name": of an object. */
static int check_name(checker *c) {
  pass_space(c);
  if (c->at == c->end || *c->at != '"') return fail(c, "an object's name is missing");
  if (!check_string(c)) return 0;
  pass_space(c);
  if (c->at == c->end || *c->at != ':') return fail(c, "a colon is missing");
  ++c->at;
  return 1;
}

int is_utf8(const char *text, size_t length) {
  checker c = {(const uint8_t *)text, (const uint8_t *)text + length, NULL};
  while (c.at < c.end && !c.wrong)
    if (*c.at < 0x80) ++c.at;
    else check_character(&c);
  return !c.wrong;
}

static int check_value(checker *c) {
  char open[JSON_DEPTH];
  int depth = 0;
  for (;;) {
    pass_space(c);
    if (c->at == c->end) return fail(c, "the text ends too early");
    if (*c->at == '{' || *c->at == '[') {
      if (depth == JSON_DEPTH) return fail(c, "values too deep inside each other");
      char closing = *c->at++ == '{' ? '}' : ']';
      open[depth++] = closing;
      pass_space(c);
      if (c->at < c->end && *c->at == closing) {
        ++c->at;
        --depth;
      } else if (closing == '}') {
        if (!check_name(c)) return 0;
        continue;
      } else {
        continue;
      }
    } else if (!check_plain(c)) {
      return 0;
    }
    for (;;) { /* what is over behind this value */
      if (depth == 0) return 1;
      pass_space(c);
      if (c->at == c->end) return fail(c, "the text ends too early");
      if (*c->at == open[depth - 1]) {
        ++c->at;
        --depth;
        continue;
      }
      if (*c->at != ',') return fail(c, "a comma is missing");
      ++c->at;
      if (open[depth - 1] == '}' && !check_name(c)) return 0;
      break;
    }
  }
}

const char *json_check(const char *text, size_t length, json *value, size_t *place) {
  checker c = {(const uint8_t *)text, (const uint8_t *)text + length, NULL};
  pass_space(&c);
  value->at = (const char *)c.at;
  int right = check_value(&c);
  value->end = (const char *)c.at;
  pass_space(&c);
  if (right && c.at < c.end) fail(&c, "something follows the value");
  *place = (size_t)(c.at - (const uint8_t *)text);
  return c.wrong;
}

const char *json_check_first(const char *text, size_t length, json *value) {
  checker c = {(const uint8_t *)text, (const uint8_t *)text + length, NULL};
  pass_space(&c);
  value->at = (const char *)c.at;
  check_value(&c);
  value->end = (const char *)c.at;
  return c.wrong;
}

/* ---- looking into what was checked ---- */

static const char *skip_space(const char *at) {
  while (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r') ++at;
  return at;
}

static const char *string_end(const char *at) {
  for (++at; *at != '"'; ++at)
    if (*at == '\\') ++at;
  return at + 1;
}

/* Behind the value at `at`, which is before `end`. */
static const char *value_end(const char *at, const char *end) {
  int depth = 0;
  do {
    if (*at == '"') {
      at = string_end(at);
      continue;
    }
    if (*at == '{' || *at == '[') ++depth;
    if (*at == '}' || *at == ']') --depth;
    if (depth == 0 && *at != '}' && *at != ']') { /* a number or a word */
      while (at < end && !strchr(",]} \t\r\n", *at)) ++at;
      return at;
    }
    ++at;
  } while (depth > 0);
  return at;
}

char json_kind(json value) {
  if (!value.at) return 0;
  if (*value.at == 't' || *value.at == 'f') return 'b';
  if (*value.at == '-' || (*value.at >= '0' && *value.at <= '9')) return '0';
  return *value.at;
}

int json_is_true(json value) { return value.at && *value.at == 't'; }

/* The value that begins at or behind `at` in a container. */
static json value_in(json container, const char *at) {
  at = skip_space(at);
  return (json){at, value_end(at, container.end)};
}

json json_field(json object, const char *name) {
  json found = {NULL, NULL};
  if (json_kind(object) != '{') return found;
  const char *at = skip_space(object.at + 1);
  while (*at != '}') {
    json key = {at, string_end(at)};
    json value = value_in(object, skip_space(key.end) + 1);
    if (json_is(key, name)) found = value;
    at = skip_space(value.end);
    if (*at == ',') at = skip_space(at + 1);
  }
  if (json_kind(found) == 'n') found = (json){NULL, NULL};
  return found;
}

int json_next(json array, const char **cursor, json *element) {
  if (json_kind(array) != '[') return 0;
  const char *at = skip_space(*cursor ? *cursor : array.at + 1);
  if (*at == ',') at = skip_space(at + 1);
  if (*at == ']') return 0;
  *element = value_in(array, at);
  *cursor = element->end;
  return 1;
}

int json_next_field(json object, const char **cursor, json *name, json *value) {
  if (json_kind(object) != '{') return 0;
  const char *at = skip_space(*cursor ? *cursor : object.at + 1);
  if (*at == ',') at = skip_space(at + 1);
  if (*at == '}') return 0;
  *name = (json){at, string_end(at)};
  *value = value_in(object, skip_space(name->end) + 1);
  *cursor = value->end;
  return 1;
}

double json_number(json value) {
  enum { WHOLE_DIGITS = 15 }; /* which a double has exactly */
  char digits[64];
  size_t length = (size_t)(value.end - value.at);
  if (json_kind(value) != '0') return NAN;
  if (length <= WHOLE_DIGITS) { /* token ids come by the thousand */
    size_t i = 0;
    double whole = 0;
    while (i < length && value.at[i] >= '0' && value.at[i] <= '9')
      whole = whole * 10 + (value.at[i++] - '0');
    if (i == length) return whole;
  }
  if (length >= sizeof digits) length = sizeof digits - 1; /* more than a double holds */
  memcpy(digits, value.at, length);
  digits[length] = 0;
  return strtod(digits, NULL);
}

static uint32_t hex4(const char *at) {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i)
    value = value << 4 | (uint32_t)(at[i] <= '9' ? at[i] - '0' : (at[i] | 32) - 'a' + 10);
  return value;
}

/* The character of the escape \u at `*at`, which moves behind it. */
static uint32_t unicode(const char **at) {
  uint32_t high = hex4(*at + 2);
  *at += 6;
  if (high < 0xd800 || high > 0xdfff) return high;
  if (high < 0xdc00 && (*at)[0] == '\\' && (*at)[1] == 'u') {
    uint32_t low = hex4(*at + 2);
    if (low >= 0xdc00 && low <= 0xdfff) {
      *at += 6;
      return 0x10000 + ((high - 0xd800) << 10) + (low - 0xdc00);
    }
  }
  return 0xfffd;
}

static size_t write_character(uint32_t c, char *bytes) {
  if (c < 0x80) return bytes[0] = (char)c, 1;
  if (c < 0x800) {
    bytes[0] = (char)(0xc0 | c >> 6);
    return bytes[1] = (char)(0x80 | (c & 0x3f)), 2;
  }
  if (c < 0x10000) {
    bytes[0] = (char)(0xe0 | c >> 12);
    bytes[1] = (char)(0x80 | (c >> 6 & 0x3f));
    return bytes[2] = (char)(0x80 | (c & 0x3f)), 3;
  }
  bytes[0] = (char)(0xf0 | c >> 18);
  bytes[1] = (char)(0x80 | (c >> 12 & 0x3f));
  bytes[2] = (char)(0x80 | (c >> 6 & 0x3f));
  return bytes[3] = (char)(0x80 | (c & 0x3f)), 4;
}

/* The character at `*at`, which moves behind it; 0 at the string's end. Bytes of UTF-8 come one by one. */
static size_t next_in_text(const char **at, char *bytes) {
  static const char named[] = "\"\\/bfnrt", stands_for[] = "\"\\/\b\f\n\r\t";
  if (**at == '"') return 0;
  if (**at != '\\') return bytes[0] = *(*at)++, 1;
  if ((*at)[1] == 'u') return write_character(unicode(at), bytes);
  bytes[0] = stands_for[strchr(named, (*at)[1]) - named];
  return *at += 2, 1;
}

ptrdiff_t json_text(json string, char *text, size_t room) {
  size_t length = 0, count;
  char bytes[4];
  for (const char *at = string.at + 1; (count = next_in_text(&at, bytes));) {
    if (count > room - length) return -1;
    memcpy(text + length, bytes, count);
    length += count;
  }
  return (ptrdiff_t)length;
}

int json_same_text(json first, json second) {
  const char *at[2] = {first.at + 1, second.at + 1};
  char bytes[2][4];
  size_t count[2] = {0, 0}, used[2] = {0, 0};
  for (;;) {
    for (int i = 0; i < 2; ++i) {
      if (used[i] < count[i]) continue;
      count[i] = next_in_text(&at[i], bytes[i]);
      used[i] = 0;
    }
    if (count[0] == 0 || count[1] == 0) return count[0] == count[1];
    if (bytes[0][used[0]++] != bytes[1][used[1]++]) return 0;
  }
}

int json_is(json string, const char *text) {
  char own[64];
  if (json_kind(string) != '"') return 0;
  ptrdiff_t length = json_text(string, own, sizeof own);
  return length >= 0 && (size_t)length == strlen(text) && memcmp(own, text, (size_t)length) == 0;
}

/* ---- writing ---- */

void put_bytes(writer *w, const char *bytes, size_t length) {
  if (length > w->room - w->length) {
    w->full = 1;
    return;
  }
  if (length) memcpy(w->bytes + w->length, bytes, length);
  w->length += length;
}

void put(writer *w, const char *text) { put_bytes(w, text, strlen(text)); }

void put_format(writer *w, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  size_t room = w->room - w->length;
  int length = vsnprintf(w->bytes + w->length, room, format, arguments);
  va_end(arguments);
  if (length < 0 || (size_t)length >= room)
    w->full = 1;
  else
    w->length += (size_t)length;
}

void put_json_text(writer *w, json string) {
  ptrdiff_t bytes = json_text(string, w->bytes + w->length, w->room - w->length);
  if (bytes < 0) w->full = 1;
  else w->length += (size_t)bytes;
}

/* The escape of a byte, "" where it needs none. */
static void escape(char byte, char *text) {
  static const char named[] = "\"\\\b\f\n\r\t", names[] = "\"\\bfnrt";
  const char *found = byte ? strchr(named, byte) : NULL;
  text[0] = 0;
  if (found)
    sprintf(text, "\\%c", names[found - named]);
  else if ((uint8_t)byte < 0x20)
    sprintf(text, "\\u%04x", (uint8_t)byte);
}

void put_escaped(writer *w, const char *bytes, size_t length) {
  for (size_t i = 0; i < length; ++i) {
    char escaped[8];
    escape(bytes[i], escaped);
    if (escaped[0])
      put(w, escaped);
    else
      put_bytes(w, bytes + i, 1);
  }
}

void put_json_string(writer *w, json string) {
  char bytes[4];
  size_t count;
  put(w, "\"");
  for (const char *at = string.at + 1; !w->full && (count = next_in_text(&at, bytes));)
    put_escaped(w, bytes, count);
  put(w, "\"");
}

size_t escaped_fit(const char *bytes, size_t length, size_t room) {
  size_t used = 0, i = 0;
  for (; i < length; ++i) {
    char escaped[8];
    escape(bytes[i], escaped);
    used += escaped[0] ? strlen(escaped) : 1;
    if (used > room) break;
  }
  if (i < length)
    while (i > 0 && ((uint8_t)bytes[i] & 0xc0) == 0x80) --i;
  return i;
}
