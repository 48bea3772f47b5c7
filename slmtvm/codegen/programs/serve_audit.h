/* The audit log: a line of JSON for each POST request, with the hash of the line before it.
 *
 *   {"line":N,"time":"...Z","path":"...","request":H,"status":N,"answer":H,"prompt_tokens":N,
 *    "tokens":N,"whole":B,"before":H}
 *
 * H: SHA-256 in hexadecimal, of the request's body, of the answer's as far as it came, and of the line
 * before, without its end; 64 zeros where there is none. Of texts themselves the log holds nothing. */
#ifndef SLM_SERVE_AUDIT_H
#define SLM_SERVE_AUDIT_H

#include <stdint.h>
#include <time.h>

#include "sha256.h"

enum { AUDIT_LINE = 1024 }; /* bytes of a line, at most */

/* Of a request that is being answered. */
typedef struct {
  int open, status;
  uint8_t request[SLM_SHA256_BYTES];
  slm_sha256 answer;
  char path[64];
} audit_entry;

typedef struct {
  int file, waiting; /* -1: no log; whether the version before still writes it */
  uint64_t lines;
  uint8_t last[SLM_SHA256_BYTES]; /* hash of the last line */
  char *pending; /* lines that could not be written yet: one for each connection at most */
  size_t pending_bytes;
} audit_log;

#endif
