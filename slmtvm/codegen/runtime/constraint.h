/* Constraints: which tokens may follow, by tables that slmtvm/text/constraint wrote.
 *
 * Tokens that lead from each state to the same one are a class; class 0 is of those that are never
 * written. A state's row lists the classes that may follow it, and the states behind them. */
#ifndef SLM_CONSTRAINT_H
#define SLM_CONSTRAINT_H

#include <stddef.h>
#include <stdint.h>

#include "slm.h"

typedef struct {
  uint32_t class, next;
} slm_transition;

struct slm_constraint {
  uint32_t mark; /* SLM_CONSTRAINT_MARK */
  const uint32_t *words;
  size_t file_bytes;
  uint32_t vocab_size, class_count, state_count, transition_count, end_count;
  const uint16_t *class_of;       /* by token */
  const uint32_t *class_begins;   /* by class, and one more: where its tokens are in `tokens` */
  const uint32_t *tokens;
  const uint32_t *row_begins;     /* by state, and one more: where its row is in `transitions` */
  const slm_transition *transitions;
  const uint32_t *left;           /* by state: tokens until the text is whole, at least */
  const uint32_t *ends;           /* tokens that may follow a whole text, and end it */
  const uint8_t *source_digest;   /* SHA-256 of what was compiled */
  const uint8_t *tokenizer_digest; /* and of the tokenizer.json that it was compiled for */
};

enum { SLM_CONSTRAINT_MARK = 0x434d4c53, SLM_DIGEST_BYTES = 32 };

/* SLM_OK where `constraint` looks like one, and `state` is a state of it. */
int32_t slm_check_constraint(const slm_constraint *constraint, int32_t state);

/* Whether a text can become whole in `most` tokens (0: any number) of which the first leads there. */
static inline int slm_reaches(const slm_constraint *c, uint32_t next, int32_t most) {
  return most <= 0 || c->left[next] < (uint32_t)most;
}

#endif
