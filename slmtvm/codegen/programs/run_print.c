/* JSON on the output, with the spelling of Python's json: numbers in the fewest digits that read back. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "run.h"

enum { MOST_DIGITS = 17, LEAST_EXPONENT = -4, EXPONENT_END = 16 };

void print_string(const char *bytes, size_t length) {
  putchar('"');
  for (size_t i = 0; i < length; ++i) {
    char escaped[8];
    writer w = {escaped, 0, sizeof escaped, 0};
    put_escaped(&w, bytes + i, 1);
    fwrite(escaped, 1, w.length, stdout);
  }
  putchar('"');
}

void print_number(double value) {
  char text[MOST_DIGITS + 16];
  if (!isfinite(value)) {
    fputs(isnan(value) ? "NaN" : value > 0 ? "Infinity" : "-Infinity", stdout);
    return;
  }
  for (int digits = 1; digits <= MOST_DIGITS; ++digits) {
    snprintf(text, sizeof text, "%.*e", digits - 1, value);
    if (strtod(text, NULL) != value) continue;
    const int exponent = atoi(strchr(text, 'e') + 1);
    if (exponent >= LEAST_EXPONENT && exponent < EXPONENT_END) {
      const int behind = digits - 1 - exponent; /* the point */
      snprintf(text, sizeof text, "%.*f", behind > 1 ? behind : 1, value);
    }
    break;
  }
  fputs(text, stdout);
}
