/* Labels of whole texts, and of their tokens. */
#include <stdlib.h>
#include <string.h>

#include "run_tasks.h"

int classify(const runner *r, const settings *s, const text_pair *text, int many) {
  tokenized t;
  size_t rows, count;
  char name[LABEL_BYTES];
  if (take_text(r, text, &t) != OK) return FAILED;
  float *scores = scores_of(r, &t, &rows, &count);
  forget(&t);
  if (!scores) return FAILED;
  unsigned char *taken = rows == 1 ? calloc(count, 1) : NULL;
  int code = taken ? OK : failed(rows == 1 ? "no memory for labels" : "this model has no labels for texts");
  if (taken) {
    json settings = json_field(r->info, "task");
    label_probabilities(scores, count, json_is_true(json_field(settings, "independent")));
    begin_lines(s, text, many);
    if (s->json) begin_json(text, "labels");
    for (long i = 0; i < s->top && i < (long)count; ++i) {
      const size_t best = take_greatest(scores, count, taken);
      const size_t length = label_name(r, best, count, name);
      if (s->json) {
        print_named(i ? ", {" : "[{", "label", name, length);
        print_score(", ", scores[best]);
        putchar('}');
      } else {
        printf("%s%9.4f  %.*s\n", many ? "  " : "", (double)scores[best], (int)length, name);
      }
    }
    if (s->json) putchar(']');
    code = end_output(s);
  }
  free(taken);
  free(scores);
  return code;
}

/* ---- entities ---- */

typedef struct {
  char label[LABEL_BYTES]; /* without its prefix */
  size_t length, first, last, tokens;
  double sum; /* of its tokens' scores */
} entity;

static void print_entity(const settings *s, const text_pair *text, const tokenized *t, const entity *e,
                         size_t number, int many) {
  const size_t begin = t->spans[e->first].begin, end = t->spans[e->last].end;
  const char *inside = text->text + begin;
  const float score = (float)(e->sum / (double)e->tokens);
  if (!s->json) {
    printf("%s%9.4f  %.*s  %zu-%zu  %.*s\n", many ? "  " : "", (double)score, (int)e->length, e->label,
           characters_before(text->text, begin), characters_before(text->text, end), (int)(end - begin), inside);
    return;
  }
  print_named(number ? ", {" : "{", "label", e->label, e->length);
  print_score(", ", score);
  print_place(text->text, begin, end);
  print_named(", ", "text", inside, end - begin);
  putchar('}');
}

/* Where a tag's label begins: behind the last '-' of one such as B-PER. */
static size_t label_begin(const char *tag, size_t length) {
  size_t second = 1;
  while (second < length && ((unsigned char)tag[second] & 0xc0) == 0x80) ++second;
  if (second >= length || tag[second] != '-') return 0;
  size_t begin = length;
  while (tag[begin - 1] != '-') --begin;
  return begin;
}

static void print_entities(const runner *r, const settings *s, const text_pair *text,
                           const tokenized *t, float *scores, size_t labels, int many) {
  entity e = {.tokens = 0};
  size_t number = 0, before = SIZE_MAX;
  char tag[LABEL_BYTES];
  for (size_t i = 0; i < t->count; ++i) {
    float *row = scores + i * labels;
    size_t best = 0;
    if (t->spans[i].end <= t->spans[i].begin) continue; /* a token that the text does not have */
    softmax(row, labels);
    for (size_t k = 1; k < labels; ++k)
      if (row[k] > row[best]) best = k;
    const size_t length = label_name(r, best, labels, tag);
    if (length == 1 && tag[0] == 'O') continue;
    const size_t begin = label_begin(tag, length);
    const int is_first = begin == 2 && tag[0] == 'B';
    const int joins = e.tokens && before + 1 == i && !is_first && e.length == length - begin &&
                      memcmp(e.label, tag + begin, e.length) == 0;
    if (!joins) {
      if (e.tokens) print_entity(s, text, t, &e, number++, many);
      e = (entity){.length = length - begin, .first = i};
      memcpy(e.label, tag + begin, e.length);
    }
    e.last = before = i;
    e.sum += row[best];
    ++e.tokens;
  }
  if (e.tokens) print_entity(s, text, t, &e, number, many);
}

int entities(const runner *r, const settings *s, const text_pair *text, int many) {
  tokenized t;
  size_t rows, labels;
  if (take_text(r, text, &t) != OK) return FAILED;
  float *scores = scores_of(r, &t, &rows, &labels);
  int code = scores ? OK : FAILED;
  if (scores && rows != t.count) code = failed("this model has no labels for each token");
  if (code == OK) {
    begin_lines(s, text, many);
    if (s->json) begin_json(text, "entities");
    if (s->json) putchar('[');
    print_entities(r, s, text, &t, scores, labels, many);
    if (s->json) putchar(']');
    code = end_output(s);
  }
  free(scores);
  forget(&t);
  return code;
}
