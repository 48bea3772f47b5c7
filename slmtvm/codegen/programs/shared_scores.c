/* What runtime/tasks.py computes of a model's numbers, without numpy. */
#include "shared_scores.h"

#include <math.h>
#include <string.h>

void pool_rows(const float *rows, size_t count, size_t width, const char *how, float *values) {
  const int last = strcmp(how, "last") == 0, greatest = strcmp(how, "max") == 0;
  const int weighted = strcmp(how, "weightedmean") == 0;
  if (last || strcmp(how, "first") == 0) {
    memcpy(values, rows + (last ? count - 1 : 0) * width, width * sizeof *values);
    return;
  }
  memcpy(values, rows, width * sizeof *values);
  for (size_t i = 1; i < count; ++i)
    for (size_t k = 0; k < width; ++k) {
      const float value = rows[i * width + k] * (weighted ? (float)(i + 1) : 1);
      if (!greatest) values[k] += value;
      else if (value > values[k]) values[k] = value;
    }
  const float weight = (float)(weighted ? count * (count + 1) / 2 : count);
  for (size_t k = 0; !greatest && k < width; ++k) values[k] /= weight;
}

void make_length_one(float *values, size_t width) {
  double sum = 0;
  for (size_t k = 0; k < width; ++k) sum += (double)values[k] * values[k];
  const float length = (float)fmax(sqrt(sum), 1e-12);
  for (size_t k = 0; k < width; ++k) values[k] /= length;
}

void softmax(float *values, size_t count) {
  double sum = 0, greatest = values[0];
  for (size_t k = 1; k < count; ++k)
    if (values[k] > greatest) greatest = values[k];
  for (size_t k = 0; k < count; ++k) sum += exp(values[k] - greatest);
  for (size_t k = 0; k < count; ++k) values[k] = (float)(exp(values[k] - greatest) / sum);
}

void label_probabilities(float *values, size_t count, int independent) {
  if (count == 1) return;
  if (!independent) {
    softmax(values, count);
    return;
  }
  for (size_t k = 0; k < count; ++k) values[k] = (float)(1 / (1 + exp(-(double)values[k])));
}

static int starts_with(const char *text, const char *start) {
  return strncmp(text, start, strlen(start)) == 0;
}

known_outputs look_at_outputs(void) {
  known_outputs found = {-1, -1, -1, -1, 0};
  for (int32_t i = 0; i < slm_output_count(); ++i) {
    slm_output o = {.size = sizeof o};
    if (slm_output_info(i, &o) < 0) continue;
    if (i == 0) found.named_scores = starts_with(o.name, "logits") || starts_with(o.name, "score");
    if (strcmp(o.name, "start_logits") == 0) found.start = i;
    if (strcmp(o.name, "end_logits") == 0) found.end = i;
    /* That of a pooler is of a model that was trained for another task. */
    if (o.pooled && found.embedding < 0 && strcmp(o.name, "pooler_output") != 0) found.embedding = i;
    if (!o.pooled && found.rows < 0) found.rows = i;
  }
  if (found.embedding < 0 && found.rows < 0) found.embedding = 0;
  return found;
}

size_t count_labels(json info) {
  const char *cursor = NULL;
  json labels = json_field(json_field(info, "task"), "labels"), label;
  size_t count = 0;
  while (json_next(labels, &cursor, &label)) ++count;
  return count;
}

json label_at(json info, size_t number) {
  const char *cursor = NULL;
  json labels = json_field(json_field(info, "task"), "labels"), label = {NULL, NULL};
  for (size_t n = 0; json_next(labels, &cursor, &label); ++n)
    if (n == number) return label;
  return (json){NULL, NULL};
}
