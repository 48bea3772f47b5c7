/* What a model's numbers stand for: rows of tokens pooled, lengths made 1, scores as probabilities; with
 * the bits of slmtvm/runtime/tasks.py. */
#ifndef SLM_SHARED_SCORES_H
#define SLM_SHARED_SCORES_H

#include <stddef.h>

#include "shared_json.h"
#include "slm.h"

enum { POOLING_BYTES = 16 }; /* of the name of a pooling, with its end */

/* One row of `count` rows of `width` floats: by `how`, "mean" (which everything else is, too),
 * "weightedmean" (row i weighs i + 1), "first", "last" or "max". */
void pool_rows(const float *rows, size_t count, size_t width, const char *how, float *values);

void make_length_one(float *values, size_t width);

/* Scores as probabilities that sum up to 1. */
void softmax(float *values, size_t count);

/* Scores of labels as probabilities: of one of them, or of each on its own (`independent`); that of a
 * single one is what it is. */
void label_probabilities(float *values, size_t count, int independent);

/* What a model's outputs are for, by the names that exporters give them. Indices of outputs; -1: none. */
typedef struct {
  int32_t embedding; /* of a whole text, as the graph makes it */
  int32_t rows;      /* the first with a row for each token */
  int32_t start, end; /* of an answer */
  int named_scores;  /* the first is called so */
} known_outputs;

known_outputs look_at_outputs(void);

/* The labels that the model's description (slm_info) has. */
size_t count_labels(json info);

/* JSON of a label, with its quotes; nothing where the description has none of the number. */
json label_at(json info, size_t number);

#endif
