/* What may stand in the place of masks. */
#include <stdlib.h>
#include <string.h>

#include "run_tasks.h"

enum { MOST_MARKS = 3 };
static const char *const MASK_MARKS[MOST_MARKS] = {"[MASK]", "<mask>", "<|mask|>"};

static int print_token(const runner *r, int32_t token, int as_json) {
  char piece[PIECE_BYTES];
  growing_text text = {0};
  slm_text_state state = {0};
  int32_t bytes;
  do {
    bytes = slm_detokenize(r->tokenizer, &state, &token, 1, SLM_TEXT_ENDS, piece, sizeof piece);
    if (bytes < 0) slm_failed();
    else if (append(&text, piece, (size_t)bytes & ~(size_t)SLM_MORE_TEXT) != OK) bytes = -1;
  } while (bytes >= 0 && (bytes & SLM_MORE_TEXT));
  if (bytes >= 0 && as_json) print_string(text.bytes, text.length);
  else if (bytes >= 0 && text.length) fwrite(text.bytes, 1, text.length, stdout);
  free(text.bytes);
  return bytes < 0 ? FAILED : OK;
}

static int print_fills(const runner *r, const settings *s, float *row, size_t count, size_t number,
                       size_t masks, int many) {
  unsigned char *taken = calloc(count, 1);
  int code = taken ? OK : failed("no memory for fills");
  softmax(row, count);
  if (s->json) fputs(number ? ", [" : "[", stdout);
  for (long i = 0; code == OK && i < s->top && i < (long)count; ++i) {
    const size_t best = take_greatest(row, count, taken);
    if (s->json) fputs(i ? ", {\"text\": " : "{\"text\": ", stdout);
    else printf("%s%9.4f  ", many ? "  " : "", (double)row[best]);
    code = print_token(r, (int32_t)best, s->json);
    if (s->json) {
      printf(", \"token\": %zu", best);
      print_score(", ", row[best]);
      putchar('}');
    } else if (masks > 1) {
      printf("  mask %zu\n", number + 1);
    } else {
      putchar('\n');
    }
  }
  if (s->json) putchar(']');
  free(taken);
  return code;
}

static int no_masks(const int32_t *marks) {
  char known[64] = "";
  for (int i = 0; i < MOST_MARKS; ++i)
    if (marks[i] >= 0)
      snprintf(known + strlen(known), sizeof known - strlen(known), "%s%s", *known ? ", " : "",
               MASK_MARKS[i]);
  return failed("the text has no mask to fill (%s)", *known ? known : "its tokenizer has none");
}

int fill(const runner *r, const settings *s, const text_pair *text, int many) {
  tokenized t;
  int32_t marks[MOST_MARKS];
  size_t rows, count, masks = 0, number = 0;
  if (take_text(r, text, &t) != OK) return FAILED;
  for (int i = 0; i < MOST_MARKS; ++i)
    marks[i] = slm_token_find(r->tokenizer, MASK_MARKS[i], strlen(MASK_MARKS[i]));
#define IS_MASK(token) ((token) == marks[0] || (token) == marks[1] || (token) == marks[2])
  for (size_t i = 0; i < t.count; ++i) masks += IS_MASK(t.tokens[i]);
  float *scores = masks ? scores_of(r, &t, &rows, &count) : NULL;
  int code = masks ? scores ? OK : FAILED : no_masks(marks);
  if (scores && (rows != t.count || count != (size_t)vocabulary_of(r)))
    code = failed("this model fills no masks");
  if (code == OK) {
    begin_lines(s, text, many);
    if (s->json) begin_json(text, "fills");
    if (s->json) putchar('[');
    for (size_t i = 0; code == OK && i < t.count; ++i)
      if (IS_MASK(t.tokens[i]))
        code = print_fills(r, s, scores + i * count, count, number++, masks, many);
    if (s->json) putchar(']');
    if (code == OK) code = end_output(s);
  }
#undef IS_MASK
  free(scores);
  forget(&t);
  return code;
}
