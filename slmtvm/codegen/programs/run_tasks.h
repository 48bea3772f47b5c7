/* slm-run: what tasks share. */
#ifndef SLM_RUN_TASKS_H
#define SLM_RUN_TASKS_H

#include "run.h"
#include "shared_scores.h"

enum { LABEL_BYTES = 256 };

/* run_tasks.c */
int32_t vocabulary_of(const runner *r);
/* The tokens of a text or a pair that fit the context. */
int take_text(const runner *r, const text_pair *text, tokenized *made);
int compute_outputs(const runner *r, const int32_t *tokens, const int32_t *segments, size_t count);
/* An output of `count` tokens, `*rows` of `*features` floats in memory that the caller frees; NULL after
 * saying why not. */
float *output_of(const runner *r, int32_t index, size_t count, size_t *rows, size_t *features);
/* The first one, computed. */
float *scores_of(const runner *r, const tokenized *t, size_t *rows, size_t *features);
/* The name of label `number` of `count`, LABEL_BYTES at most; its bytes. */
size_t label_name(const runner *r, size_t number, size_t count, char *name);
/* The greatest of what is not `taken` yet, the first of equal ones; it is taken. */
size_t take_greatest(const float *values, size_t count, unsigned char *taken);

void begin_json(const text_pair *text, const char *what);
void begin_lines(const settings *s, const text_pair *text, int many);
int end_output(const settings *s);
void print_named(const char *before, const char *name, const char *bytes, size_t length);
void print_score(const char *before, float score);
size_t characters_before(const char *text, size_t at);
void print_place(const char *text, size_t begin, size_t end);

/* The tasks; `many`: of several texts. */
int classify(const runner *r, const settings *s, const text_pair *text, int many);
int entities(const runner *r, const settings *s, const text_pair *text, int many);
int answer(const runner *r, const settings *s, const text_pair *text, int many);
int fill(const runner *r, const settings *s, const text_pair *text, int many);
int begin_embed(const runner *r, const settings *s);
int embed(const runner *r, const settings *s, const text_pair *text, int many);

#endif
