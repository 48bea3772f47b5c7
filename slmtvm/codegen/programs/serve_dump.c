/* JSON as Python's json.dumps writes what its json.loads read: chat templates write tools so. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "serve.h"

enum {
  MOST_FIELDS = 256,  /* of an object: each is compared with those before it */
  NUMBER_BYTES = 512, /* of a number with a point or an exponent */
  MOST_DIGITS = 17    /* which tell every double from others */
};

static void put_repeated(writer *w, char byte, int count) {
  while (count-- > 0) put_bytes(w, &byte, 1);
}

/* The shortest digits that are read as this number, as Python's repr writes them. */
static void put_float(writer *w, double value) {
  char text[40], digits[MOST_DIGITS + 1];
  if (isinf(value)) {
    put(w, value < 0 ? "-Infinity" : "Infinity");
    return;
  }
  for (int precision = 0; precision < MOST_DIGITS; ++precision) {
    snprintf(text, sizeof text, "%.*e", precision, value);
    if (strtod(text, NULL) == value) break;
  }
  const char *at = text, *exponent = strchr(text, 'e');
  int count = 0;
  if (*at == '-') put_bytes(w, at++, 1);
  for (; at < exponent; ++at)
    if (*at != '.') digits[count++] = *at;
  const int point = atoi(exponent + 1) + 1; /* digits before it */
  if (point <= -4 || point > 16) {
    put_bytes(w, digits, 1);
    if (count > 1) put(w, ".");
    put_bytes(w, digits + 1, (size_t)count - 1);
    put_format(w, "e%c%02d", point < 1 ? '-' : '+', abs(point - 1));
  } else if (point <= 0) {
    put(w, "0.");
    put_repeated(w, '0', -point);
    put_bytes(w, digits, (size_t)count);
  } else {
    const int before = count < point ? count : point;
    put_bytes(w, digits, (size_t)before);
    put_repeated(w, '0', point - before);
    put(w, ".");
    if (count > point) put_bytes(w, digits + point, (size_t)(count - point));
    else put(w, "0");
  }
}

static const char *dump_number(writer *w, json value) {
  char text[NUMBER_BYTES];
  const size_t bytes = (size_t)(value.end - value.at);
  int whole = 1;
  for (const char *at = value.at; at < value.end; ++at) whole &= *at != '.' && (*at | 32) != 'e';
  if (whole) {
    const int is_minus_zero = bytes == 2 && memcmp(value.at, "-0", 2) == 0;
    put_bytes(w, is_minus_zero ? "0" : value.at, is_minus_zero ? 1 : bytes);
    return NULL;
  }
  if (bytes >= sizeof text) return "a number has too many digits";
  memcpy(text, value.at, bytes);
  text[bytes] = 0;
  put_float(w, strtod(text, NULL));
  return NULL;
}

static const char *dump(writer *w, json value, int indent, int depth);

/* What is before an element: a comma, and where there is an indent a line of its own. */
static void put_between(writer *w, int first, int indent, int depth) {
  if (!first) put(w, indent < 0 ? ", " : ",");
  if (indent < 0) return;
  put(w, "\n");
  put_repeated(w, ' ', indent * depth);
}

static const char *dump_object(writer *w, json object, int indent, int depth) {
  json names[MOST_FIELDS], value;
  const char *cursor = NULL, *wrong;
  int count = 0;
  put(w, "{");
  for (; json_next_field(object, &cursor, &names[count], &value); ++count) {
    if (count == MOST_FIELDS - 1) return "an object has more than 255 fields";
    for (int i = 0; i < count; ++i)
      if (json_same_text(names[i], names[count])) return "an object has a name twice";
    put_between(w, count == 0, indent, depth + 1);
    put_json_string(w, names[count]);
    put(w, ": ");
    if ((wrong = dump(w, value, indent, depth + 1))) return wrong;
  }
  if (count && indent >= 0) put_between(w, 1, indent, depth);
  put(w, "}");
  return NULL;
}

static const char *dump_array(writer *w, json array, int indent, int depth) {
  const char *cursor = NULL, *wrong;
  int count = 0;
  json element;
  put(w, "[");
  for (; json_next(array, &cursor, &element); ++count) {
    put_between(w, count == 0, indent, depth + 1);
    if ((wrong = dump(w, element, indent, depth + 1))) return wrong;
    if (w->full) return NULL;
  }
  if (count && indent >= 0) put_between(w, 1, indent, depth);
  put(w, "]");
  return NULL;
}

/* As deep as json_check lets values be. */
static const char *dump(writer *w, json value, int indent, int depth) {
  switch (json_kind(value)) {
    case '{': return dump_object(w, value, indent, depth);
    case '[': return dump_array(w, value, indent, depth);
    case '"': return put_json_string(w, value), NULL;
    case '0': return dump_number(w, value);
    default: return put_bytes(w, value.at, (size_t)(value.end - value.at)), NULL;
  }
}

const char *put_dumped(writer *w, json value, int indent) { return dump(w, value, indent, 0); }
