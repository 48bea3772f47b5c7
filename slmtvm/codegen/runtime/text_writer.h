/* Writing another text of a text, with where its bytes come from.
 *
 * The rules of where are those of the reference: a character replaces the next one of the old text and
 * maybe some that follow, or it is new and comes from where the one before it does. */
#ifndef SLM_TEXT_WRITER_H
#define SLM_TEXT_WRITER_H

#include "text.h"

typedef struct {
  const slm_piece *old;
  size_t at; /* in the old text */
  uint8_t *bytes;
  uint32_t *from, *to;
  size_t length, room;
} slm_writer;

int32_t slm_write_begin(slm_encoding *encoding, const slm_text_step *step, const slm_piece *old,
                        slm_writer *writer);

/* Follows the steps after `step` with what was written. */
int32_t slm_write_end(slm_encoding *encoding, uint32_t step, const slm_writer *writer);

/* `count` bytes that come from where byte `source` of the old text does. */
void slm_write_from(slm_writer *writer, const uint8_t *bytes, size_t count, size_t source);

/* One character. `change` 1: it is new; 0 or less: it replaces the next one of the old text, and takes the
 * place of -change more. */
void slm_write_change(slm_writer *writer, const uint8_t *bytes, size_t count, int32_t change);

/* SLM_ERR_TOKENIZER: a step says less of how much a text grows than it does. */
int32_t slm_write_overflow(void);

#endif
