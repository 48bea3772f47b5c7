/* Models that know words and pieces of words: WordPiece, WordLevel, Unigram. */
#include <string.h>

#include "error.h"
#include "text.h"

static int32_t put_unknown(slm_encoding *e, const slm_piece *word) {
  if (e->tokenizer->unknown == SLM_NONE)
    return slm_fail(SLM_ERR_TOKEN,
                    "the vocabulary has no token for words that it does not know");
  slm_emit(e, word, e->tokenizer->unknown, 0, word->length);
  return SLM_OK;
}

/* The longest token from `at` on, its number + 1, below `node`; 0 where there is none. */
static uint32_t longest(const slm_tokenizer *t, const slm_piece *word, uint32_t node, size_t at,
                        size_t *end) {
  uint32_t found = 0;
  for (size_t i = at; i < word->length; ++i) {
    const uint32_t *next = slm_pairs_find(&t->trie, node, word->bytes[i]);
    if (!next) break;
    node = next[0];
    if (next[1]) {
      found = next[1];
      *end = i + 1;
    }
  }
  return found;
}

int32_t slm_wordpiece(slm_encoding *e, const slm_piece *word) {
  const slm_tokenizer *t = e->tokenizer;
  size_t characters = 0;
  for (size_t i = 0; i < word->length; ++i)
    characters += (t->flags & SLM_TEXT_BYTES) || (word->bytes[i] & 0xc0) != 0x80;
  if (characters > t->longest_word) return put_unknown(e, word);
  const size_t before = e->count;
  for (size_t at = 0, end = 0; at < word->length; at = end) {
    uint32_t found = longest(t, word, at ? t->inner_root : 0, at, &end);
    if (!found) {
      e->count = before; /* the whole word is unknown */
      return put_unknown(e, word);
    }
    slm_emit(e, word, found - 1, at, end);
  }
  return SLM_OK;
}

int32_t slm_wordlevel(slm_encoding *e, const slm_piece *word) {
  size_t end = 0;
  uint32_t found = longest(e->tokenizer, word, 0, 0, &end);
  if (!found || end != word->length) return put_unknown(e, word);
  slm_emit(e, word, found - 1, 0, end);
  return SLM_OK;
}

/* The best way to the end of some byte of the text. */
typedef struct {
  double score;
  uint32_t begin; /* of its last token; SLM_NONE: there is no way yet */
  uint32_t token; /* SLM_NONE: an unknown character */
} way;

static double score(const slm_tokenizer *t, uint32_t token) {
  double value;
  memcpy(&value, t->scores + 2 * (size_t)token, sizeof value);
  return value;
}

static void offer(way *to, double sum, uint32_t begin, uint32_t token) {
  if (to->begin == SLM_NONE || sum > to->score) *to = (way){sum, begin, token};
}

/* Unknown characters in a row are one token, the unknown one's own name among them. */
static int is_unknown(const slm_tokenizer *t, uint32_t token) {
  return t->unknown != SLM_NONE && (token == SLM_NONE || token == t->unknown);
}

static int32_t put_piece(slm_encoding *e, const slm_piece *word, uint32_t token, size_t begin,
                         size_t end) {
  const slm_tokenizer *t = e->tokenizer;
  if (token != SLM_NONE) {
    slm_emit(e, word, token, begin, end);
    return SLM_OK;
  }
  if (t->flags & SLM_TEXT_BYTE_FALLBACK) {
    size_t at = begin;
    while (at < end && t->fallback[word->bytes[at]] != SLM_NONE) ++at;
    if (at == end) {
      for (at = begin; at < end; ++at)
        slm_emit(e, word, t->fallback[word->bytes[at]], begin, end);
      return SLM_OK;
    }
  }
  slm_piece part = slm_piece_part(word, begin, end);
  return put_unknown(e, &part);
}

int32_t slm_unigram(slm_encoding *e, const slm_piece *word) {
  const slm_tokenizer *t = e->tokenizer;
  const uint32_t length = (uint32_t)word->length;
  const size_t used = e->work_used;
  way *ways = slm_work_take(e, ((size_t)length + 1) * sizeof *ways);
  if (!ways) return SLM_ERR_MEMORY;
  const double unknown = score(t, t->token_count);
  for (uint32_t i = 0; i <= length; ++i) ways[i] = (way){0, SLM_NONE, SLM_NONE};
  uint32_t size = 1;
  for (uint32_t at = 0; at < length; at += size) {
    if (!(t->flags & SLM_TEXT_BYTES)) slm_char_at(word->bytes + at, &size);
    const double sum = ways[at].score;
    uint32_t node = 0;
    int alone = 0; /* the character is a token */
    for (uint32_t i = at; i < length; ++i) {
      const uint32_t *next = slm_pairs_find(&t->trie, node, word->bytes[i]);
      if (!next) break;
      node = next[0];
      if (!next[1]) continue;
      offer(&ways[i + 1], score(t, next[1] - 1) + sum, at, next[1] - 1);
      if (i + 1 == at + size) alone = 1;
    }
    if (!alone) offer(&ways[at + size], unknown + sum, at, SLM_NONE);
  }
  /* The way back from the end, turned into one forward: each `token` of a begin, each `score` unused. */
  uint32_t next_end = SLM_NONE;
  for (uint32_t at = length; at != SLM_NONE;) {
    const uint32_t begin = ways[at].begin;
    ways[at].begin = next_end; /* from here on: where the token that starts here ends */
    next_end = at;
    if (at == 0) break;
    if (begin >= at) return slm_fail(SLM_ERR_TOKENIZER, "tokenizer.bin: no way through a word");
    at = begin;
  }
  int32_t code = SLM_OK;
  for (uint32_t at = 0; at < length && code == SLM_OK;) {
    uint32_t end = ways[at].begin;
    uint32_t token = ways[end].token;
    while (is_unknown(t, ways[end].token) && end < length &&
           is_unknown(t, ways[ways[end].begin].token)) {
      end = ways[end].begin;
      token = SLM_NONE;
    }
    code = put_piece(e, word, token, at, end);
    at = end;
  }
  e->work_used = used;
  return code;
}
