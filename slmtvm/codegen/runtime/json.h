/* Reading JSON text where it lies: no allocation, bounded depth, safe on any bytes. */
#ifndef SLM_JSON_H
#define SLM_JSON_H

#include <stddef.h>
#include <stdint.h>

/* Text that is being read: from `next` up to `end`. */
typedef struct slm_json {
  const char *next;
  const char *end;
} slm_json;

/* 1 where all of it is one valid value, at most 64 deep. What follows may rely on it: the functions
 * below are for text that passed. */
int slm_json_valid(slm_json text);

/* The value of member `name` of the object that `text` begins with, into *value: 0 where it is no
 * object or has no such member. Names are compared as they are written, without escapes. */
int slm_json_member(slm_json text, const char *name, slm_json *value);

/* Steps through an object's members or an array's elements: *at is the object or array at first.
 * Returns 0 behind the last one. `name` gets the member's name, quotes left out; NULL for arrays. */
int slm_json_each(slm_json *at, slm_json *name, slm_json *value);

/* A whole number from 0 to 2^63 - 1; 0 where the value is something else. */
int slm_json_number(slm_json value, uint64_t *number);

/* A string without escapes, copied with a 0 behind it; 0 where it is something else or too long. */
int slm_json_string(slm_json value, char *copy, size_t room);

#endif
