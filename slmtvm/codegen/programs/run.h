/* slm-run: what its parts share. */
#ifndef SLM_RUN_H
#define SLM_RUN_H

#include <stdint.h>
#include <stdio.h>

#include "shared_chat.h"
#include "shared_json.h"
#include "slm.h"

enum { OK, FAILED, USAGE = 64 };
enum { MOST_TEXT_BYTES = 1 << 26, MOST_ENDS = 64, PIECE_BYTES = 4096 };

/* A text that grows; all 0 is an empty one. */
typedef struct {
  char *bytes;
  size_t length, room;
} growing_text;

typedef struct {
  const char *bundle, *prompt, *file, *constraint, *task, *pool, *system;
  const char **pairs, **stops; /* as many as there are arguments, of which some are used */
  size_t pair_count, stop_count;
  long most_tokens, start, top;
  int stats, json, chat, normalize; /* normalize: -1 as the model's settings say */
  slm_sampling sampling;
  slm_bias *biases;
  slm_options open;
} settings;

typedef struct {
  slm_model *model;
  slm_session *session;
  slm_tokenizer *tokenizer;
  slm_constraint *constraint;
  chat_template chat;
  json info; /* slm_info() */
  int32_t ends[MOST_ENDS];
  size_t end_count;
  int32_t *tokens; /* of the text that is written, the prompt's first */
  size_t count, room, known; /* known: those that the session holds already */
  growing_text held, written; /* what may be the start of a stop string; all that was written */
  int stopped;                /* at one of them */
} runner;

/* A text, and the one that goes with it. */
typedef struct {
  const char *text;
  size_t bytes;
  const char *pair; /* NULL: none */
  size_t pair_bytes;
} text_pair;

/* run.c */
int failed(const char *format, ...) __attribute__((format(printf, 1, 2))); /* says so: FAILED */
int slm_failed(void);
int is_kind(const runner *r, const char *kind);
int append(growing_text *t, const char *bytes, size_t length); /* OK, or FAILED after saying so */

/* run_text.c: the tokens of a text, or of two, in memory that the caller frees. */
typedef struct {
  int32_t *tokens, *segments;
  slm_span *spans;
  size_t count;
} tokenized;
int tokenize(const runner *r, const text_pair *text, uint32_t flags, tokenized *made);
void forget(tokenized *made);

/* run_generate.c */
void find_ends(runner *r);
int generate_from(runner *r, const settings *s, const char *text, size_t bytes);
/* Its three parts. The prompt becomes r->tokens, an encoder-decoder's its source; with `keeps`, what the
 * session has of it stays. Then what follows is written, and the line or the JSON ended. */
int begin_context(runner *r, const settings *s, const tokenized *prompt, int keeps);
int generate(runner *r, const settings *s);
int end_text(runner *r, const settings *s, const char *text, size_t bytes);

/* run_chat.c */
int run_chat(runner *r, const settings *s);

/* run_tasks.c: classify, entities, answer, fill, embed. */
const char *usual_task(const runner *r);
int begin_task(const runner *r, const settings *s, const char *task); /* says what is unexpected */
/* `many`: of several texts, whose lines are told apart. */
int run_task(runner *r, const settings *s, const char *task, const text_pair *text, int many);

/* run_print.c: as Python's json writes them. */
void print_string(const char *bytes, size_t length);
void print_number(double value);

#endif
