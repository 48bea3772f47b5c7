/* The part of a text that answers a question. */
#include <stdlib.h>
#include <string.h>

#include "run_tasks.h"

enum { MOST_ANSWER_TOKENS = 30, WINDOW_OVERLAP = 4 /* of windows of a long text: a fraction of one */ };

typedef struct {
  slm_span place;
  float score;
  int found;
} span_answer;

/* A question and its text: tokens `text` to `text` + `length` are the text's. */
typedef struct {
  tokenized all;
  size_t text, length;
} question;

/* The likeliest span of a window's text, whose `length` tokens begin at `text` of `count`. */
static int look_into(const runner *r, const int32_t *tokens, const int32_t *segments,
                     const slm_span *spans, size_t count, size_t text, size_t length,
                     span_answer *best) {
  const known_outputs known = look_at_outputs();
  size_t rows, width;
  if (compute_outputs(r, tokens, segments, count) != OK) return FAILED;
  float *start = output_of(r, known.start, count, &rows, &width);
  float *end = start ? output_of(r, known.end, count, &rows, &width) : NULL;
  if (end) {
    float likeliest = -1;
    slm_span place = {0, 0};
    softmax(start, count); /* of the whole: a model that finds no answer points at a special token */
    softmax(end, count);
    for (size_t i = text; i < text + length; ++i)
      for (size_t j = i; j < text + length && j < i + MOST_ANSWER_TOKENS; ++j)
        if (start[i] * end[j] > likeliest) {
          likeliest = start[i] * end[j];
          place = (slm_span){spans[i].begin, spans[j].end};
        }
    if (length && (!best->found || likeliest > best->score))
      *best = (span_answer){place, likeliest, 1};
  }
  free(start);
  free(end);
  return end ? OK : FAILED;
}

/* Finds where the text's tokens are among those of both, by what they are without special tokens. */
static int divide(const runner *r, const text_pair *given, question *q, size_t *asked) {
  tokenized plain, alone;
  const text_pair first = {given->text, given->bytes, NULL, 0};
  if (take_text(r, &first, &alone) != OK) return FAILED;
  *asked = alone.count;
  forget(&alone);
  if (tokenize(r, given, 0, &q->all) != OK) return FAILED;
  if (tokenize(r, given, SLM_NO_SPECIAL, &plain) != OK) return FAILED;
  size_t begin = 0;
  while (begin < plain.count && plain.segments[begin] == 0) ++begin;
  q->length = plain.count - begin;
  for (q->text = q->all.count - q->length; q->text > 0; --q->text)
    if (memcmp(q->all.tokens + q->text, plain.tokens + begin, q->length * sizeof *plain.tokens) == 0 &&
        memcmp(q->all.spans + q->text, plain.spans + begin, q->length * sizeof *plain.spans) == 0)
      break;
  forget(&plain);
  return OK;
}

/* A text that does not fit is read in windows that overlap. */
static int look_into_windows(const runner *r, const question *q, size_t asked, size_t plain_asked,
                             span_answer *best) {
  const size_t context = (size_t)slm_context_size(), all = q->all.count;
  const size_t special = all - q->length - plain_asked;
  if (asked + special >= context)
    return failed("the question has %zu tokens: no text fits the context of %zu", asked, context);
  const size_t overlap = (context - asked - special) / WINDOW_OVERLAP;
  const size_t most = all <= context ? q->length : context - special - plain_asked;
  int32_t *tokens = malloc(all * sizeof *tokens), *segments = malloc(all * sizeof *segments);
  slm_span *spans = malloc(all * sizeof *spans);
  int code = tokens && segments && spans ? OK : failed("no memory for a window");
  size_t stop = 0;
  for (size_t start = 0; code == OK && stop < q->length; start += most - overlap) {
    stop = start + most < q->length ? start + most : q->length;
    size_t count = 0;
    for (size_t i = 0; i < all; ++i) {
      const int is_text = i >= q->text && i < q->text + q->length;
      if (is_text && (i - q->text < start || i - q->text >= stop)) continue;
      tokens[count] = q->all.tokens[i];
      segments[count] = q->all.segments[i];
      spans[count++] = q->all.spans[i];
    }
    code = look_into(r, tokens, segments, spans, count, q->text, stop - start, best);
  }
  free(tokens);
  free(segments);
  free(spans);
  return code;
}

int answer(const runner *r, const settings *s, const text_pair *text, int many) {
  question q = {0};
  size_t asked, plain_asked;
  span_answer best = {.found = 0};
  if (!text->pair) return failed("this model answers a question from a text: give the text with --pair");
  if (look_at_outputs().start < 0 || look_at_outputs().end < 0 || !is_kind(r, "encoder"))
    return failed("this model answers no questions");
  if (!is_utf8(text->text, text->bytes) || !is_utf8(text->pair, text->pair_bytes))
    return failed("it is no valid text");
  int code = divide(r, text, &q, &asked);
  if (code == OK) {
    const text_pair first = {text->text, text->bytes, NULL, 0};
    tokenized plain;
    code = tokenize(r, &first, SLM_NO_SPECIAL, &plain);
    plain_asked = plain.count;
    forget(&plain);
  }
  if (code == OK) code = look_into_windows(r, &q, asked, plain_asked, &best);
  if (code == OK && !best.found)
    code = failed("the text is empty: there is nothing to find an answer in");
  forget(&q.all);
  if (code != OK) return code;
  const size_t begin = best.place.begin, end = best.place.end;
  const char *inside = text->pair + begin;
  begin_lines(s, text, many);
  if (s->json) {
    begin_json(text, "answer");
    print_named("{", "text", inside, end - begin);
    print_score(", ", best.score);
    print_place(text->pair, begin, end);
    putchar('}');
  } else {
    printf("%s%9.4f  %zu-%zu  %.*s\n", many ? "  " : "", (double)best.score,
           characters_before(text->pair, begin), characters_before(text->pair, end), (int)(end - begin), inside);
  }
  return end_output(s);
}
