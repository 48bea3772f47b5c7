/* Conversations as one text, by the pieces that the compiler took the model's chat template apart into.
 *
 * chat.json (slmtvm/text/chat/pieces.py) is a table: "between" has what stands between two items, by their
 * kinds, before the first ("") and after the last; "forms" how values are written, by kind: of texts
 * "trimmed", without the white space around them, or "quoted", as a string of JSON; "refused" texts that the
 * template treats in a way of its own. Kinds are the roles of messages, and those of serve_tools.c. In it,
 * "offering" is the table where tools may be called; "reason" and "tools_reason" say why there is none. */
#ifndef SLM_SHARED_CHAT_H
#define SLM_SHARED_CHAT_H

#include "shared_json.h"

enum { ROLE_BYTES = 24 };

typedef struct {
  char *bytes; /* chat.json, checked; NULL where the bundle has none */
  json pieces; /* the table of conversations without tools */
} chat_template;

typedef struct {
  const char *code; /* as OpenAI's errors have one */
  char message[384];
} chat_refusal;

/* Reads chat.json, if there is one; 0, or -1 after saying on stderr why not. */
int chat_open(const char *program, const char *bundle, chat_template *t);
void chat_close(chat_template *t);

/* What follows returns 0, or -1 where `r` says why not; `w` is full where a text does not fit. */

/* Whether there are pieces. */
int chat_ready(const chat_template *t, chat_refusal *r);

/* A message, by a table: what stands between one of `before` ("": none) and one of `kind`; the caller then
 * appends its text, and ends it with where that began. */
int chat_begin(json table, const char *before, const char *kind, writer *w, chat_refusal *r);
int chat_end(json table, const char *kind, writer *w, size_t begin, chat_refusal *r);

/* What begins an answer to the last message, which is of `before`. */
int chat_answer(json table, const char *before, writer *w, chat_refusal *r);

#endif
