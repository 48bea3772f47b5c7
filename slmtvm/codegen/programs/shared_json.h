/* JSON without memory of its own: a text is checked once, then looked into where it lies. */
#ifndef SLM_SHARED_JSON_H
#define SLM_SHARED_JSON_H

#include <stddef.h>
#include <stdint.h>

/* A value inside a checked text, without white space around it; `at` is NULL where there is none. */
typedef struct {
  const char *at, *end;
} json;

enum { JSON_DEPTH = 32 }; /* objects and arrays inside each other */

/* Whether `text` is one JSON value in UTF-8, which `value` then is; else what is wrong, and `place`
 * says at which byte. */
const char *json_check(const char *text, size_t length, json *value, size_t *place);

/* The same of a value that a text begins with, whatever follows. */
const char *json_check_first(const char *text, size_t length, json *value);

/* Whether all of a text is UTF-8. */
int is_utf8(const char *text, size_t length);

/* '{', '[', '"', '0' a number, 'b' true or false, 'n' null, 0 nothing. */
char json_kind(json value);
int json_is_true(json value);

/* The field of an object, the last one of that name; nothing where there is none, or where it is null. */
json json_field(json object, const char *name);

/* The elements of an array one by one: `cursor` starts as NULL. 0 after the last one. */
int json_next(json array, const char **cursor, json *element);

/* The fields of an object one by one, with their names; 0 after the last one. */
int json_next_field(json object, const char **cursor, json *name, json *value);

/* NAN where it is no number. */
double json_number(json value);

/* Writes the characters of a string, which are never more than the value has; what is no character
 * (half a surrogate pair) becomes U+FFFD. Returns their bytes, or -1 where `room` is too small. */
ptrdiff_t json_text(json string, char *text, size_t room);

int json_is(json string, const char *text);
int json_same_text(json first, json second); /* of two strings */

/* Text that is put together in memory of a fixed size. What does not fit is left out, and said. */
typedef struct {
  char *bytes;
  size_t length, room;
  int full;
} writer;

void put_bytes(writer *w, const char *bytes, size_t length);
void put(writer *w, const char *text);
__attribute__((format(printf, 2, 3))) void put_format(writer *w, const char *format, ...);

void put_json_text(writer *w, json string); /* its characters */
void put_json_string(writer *w, json string); /* between quotes, nothing escaped that need not be */

/* A string's inside: quotes, controls and backslashes escaped. */
void put_escaped(writer *w, const char *bytes, size_t length);

/* How many of `length` bytes fit `room` bytes once they are escaped, whole characters only. */
size_t escaped_fit(const char *bytes, size_t length, size_t room);

#endif
