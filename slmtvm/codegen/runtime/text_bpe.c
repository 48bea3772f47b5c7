/* Byte-pair encoding: characters become tokens, and the pair of the lowest rank is merged until there is
 * none; of equal ranks the first in the text. */
#include <string.h>

#include "error.h"
#include "text.h"

enum {
  SHORT_WORD = 32,        /* tokens up to which searching all pairs is faster than a heap */
  INNER = 1, LAST = 2     /* places of a character in a word */
};

/* A token of the word, with its neighbours; `length` 0 once it is merged into the one before. */
typedef struct {
  uint32_t token, length, before, after;
} symbol;

static uint32_t token_of(const slm_tokenizer *t, uint32_t character, uint32_t place) {
  if (character < 256 && place == 0) return t->initial[character];
  const uint32_t *found = slm_pairs_find(&t->symbols, character, place);
  return found ? found[0] : SLM_NONE;
}

/* Splits the word into the tokens of its characters; how many there are. `tokens` and `lengths` take one
 * for each byte. */
static size_t split(const slm_tokenizer *t, const slm_piece *word, uint32_t *tokens,
                    uint32_t *lengths) {
  size_t count = 0;
  uint32_t unknown = 0; /* bytes of unknown characters that are no token yet */
  uint32_t size = 1;
  for (size_t at = 0; at < word->length; at += size) {
    uint32_t character = word->bytes[at], place = 0;
    if (!(t->flags & SLM_TEXT_BYTES)) character = slm_char_at(word->bytes + at, &size);
    if (t->flags & SLM_TEXT_AFFIXES)
      place = (at ? INNER : 0) | (at + size == word->length ? LAST : 0);
    const uint32_t token = token_of(t, character, place);
    if (token == SLM_NONE && (t->flags & SLM_TEXT_BYTE_FALLBACK)) {
      uint32_t known = 0;
      while (known < size && t->fallback[word->bytes[at + known]] != SLM_NONE) ++known;
      if (known == size) {
        /* The reference puts unknown characters that wait behind these, and so it is done here. */
        for (uint32_t i = 0; i < size; ++i) {
          tokens[count] = t->fallback[word->bytes[at + i]];
          lengths[count++] = 1;
        }
        continue;
      }
    }
    if (token == SLM_NONE) {
      if (t->unknown == SLM_NONE) continue; /* nothing stands for it */
      if (unknown && !(t->flags & SLM_TEXT_FUSE_UNKNOWN)) {
        tokens[count] = t->unknown;
        lengths[count++] = unknown;
        unknown = 0;
      }
      unknown += size;
      continue;
    }
    if (unknown) {
      tokens[count] = t->unknown;
      lengths[count++] = unknown;
      unknown = 0;
    }
    tokens[count] = token;
    lengths[count++] = size;
  }
  if (unknown) {
    tokens[count] = t->unknown;
    lengths[count++] = unknown;
  }
  return count;
}

static size_t merge_short(const slm_tokenizer *t, uint32_t *tokens, uint32_t *lengths,
                          size_t count) {
  const uint32_t *ways[SHORT_WORD]; /* merges of a token with the one after it */
  for (size_t i = 0; i + 1 < count; ++i)
    ways[i] = slm_pairs_find(&t->merges, tokens[i], tokens[i + 1]);
  for (;;) {
    uint32_t lowest = SLM_NONE;
    size_t best = 0;
    for (size_t i = 0; i + 1 < count; ++i)
      if (ways[i] && ways[i][0] < lowest) {
        lowest = ways[i][0];
        best = i;
      }
    if (lowest == SLM_NONE) return count;
    tokens[best] = ways[best][1];
    lengths[best] += lengths[best + 1];
    --count;
    for (size_t i = best + 1; i < count; ++i) { /* few: calls of memmove would take longer */
      tokens[i] = tokens[i + 1];
      lengths[i] = lengths[i + 1];
      ways[i - 1] = ways[i];
    }
    if (best + 1 < count) ways[best] = slm_pairs_find(&t->merges, tokens[best], tokens[best + 1]);
    if (best > 0) ways[best - 1] = slm_pairs_find(&t->merges, tokens[best - 1], tokens[best]);
  }
}

/* ---- long words: a heap of the pairs ---- */

typedef struct {
  const slm_tokenizer *tokenizer;
  symbol *symbols;
  uint32_t *ranks;  /* of the pair that starts at a symbol */
  uint32_t *merged; /* the token it becomes */
  uint32_t *heap;   /* symbols, the one of the lowest rank first */
  uint32_t *place;  /* of a symbol in the heap, SLM_NONE where it is not in it */
  uint32_t heap_count;
} pairs;

static int before(const pairs *p, uint32_t a, uint32_t b) {
  return p->ranks[a] < p->ranks[b] || (p->ranks[a] == p->ranks[b] && a < b);
}

static void set(pairs *p, uint32_t at, uint32_t symbol_at) {
  p->heap[at] = symbol_at;
  p->place[symbol_at] = at;
}

static void sift(pairs *p, uint32_t at) {
  const uint32_t moved = p->heap[at];
  for (uint32_t parent; at > 0; at = parent) {
    parent = (at - 1) / 2;
    if (!before(p, moved, p->heap[parent])) break;
    set(p, at, p->heap[parent]);
  }
  for (uint32_t child; (child = 2 * at + 1) < p->heap_count; at = child) {
    if (child + 1 < p->heap_count && before(p, p->heap[child + 1], p->heap[child])) ++child;
    if (!before(p, p->heap[child], moved)) break;
    set(p, at, p->heap[child]);
  }
  set(p, at, moved);
}

static void leave(pairs *p, uint32_t symbol_at) {
  const uint32_t at = p->place[symbol_at];
  if (at == SLM_NONE) return;
  p->place[symbol_at] = SLM_NONE;
  const uint32_t last = p->heap[--p->heap_count];
  if (at == p->heap_count) return;
  set(p, at, last);
  sift(p, at);
}

/* Looks up the pair that starts at a symbol. */
static void enter(pairs *p, uint32_t at) {
  const symbol *s = &p->symbols[at];
  const uint32_t *way =
      s->after == SLM_NONE
          ? NULL
          : slm_pairs_find(&p->tokenizer->merges, s->token, p->symbols[s->after].token);
  if (!way) {
    leave(p, at);
    return;
  }
  p->ranks[at] = way[0];
  p->merged[at] = way[1];
  if (p->place[at] == SLM_NONE) set(p, p->heap_count++, at);
  sift(p, p->place[at]);
}

static int32_t merge_long(slm_encoding *e, uint32_t *tokens, uint32_t *lengths, size_t *count) {
  const size_t n = *count;
  pairs p = {.tokenizer = e->tokenizer};
  p.symbols = slm_work_take(e, n * sizeof *p.symbols);
  p.ranks = slm_work_take(e, n * sizeof *p.ranks);
  p.merged = slm_work_take(e, n * sizeof *p.merged);
  p.heap = slm_work_take(e, n * sizeof *p.heap);
  p.place = slm_work_take(e, n * sizeof *p.place);
  if (!p.symbols || !p.ranks || !p.merged || !p.heap || !p.place) return SLM_ERR_MEMORY;
  for (uint32_t i = 0; i < n; ++i) {
    p.symbols[i] = (symbol){tokens[i], lengths[i], i ? i - 1 : SLM_NONE,
                            i + 1 < n ? i + 1 : SLM_NONE};
    p.place[i] = SLM_NONE;
  }
  for (uint32_t i = 0; i < n; ++i) enter(&p, i);
  while (p.heap_count) {
    const uint32_t at = p.heap[0];
    symbol *s = &p.symbols[at];
    symbol *gone = &p.symbols[s->after];
    leave(&p, at);
    leave(&p, s->after);
    s->token = p.merged[at];
    s->length += gone->length;
    s->after = gone->after;
    gone->length = 0;
    if (s->after != SLM_NONE) p.symbols[s->after].before = at;
    enter(&p, at);
    if (s->before != SLM_NONE) enter(&p, s->before);
  }
  size_t kept = 0;
  for (uint32_t i = 0; i != SLM_NONE; i = p.symbols[i].after) {
    tokens[kept] = p.symbols[i].token;
    lengths[kept++] = p.symbols[i].length;
  }
  *count = kept;
  return SLM_OK;
}

/* ---- words that the text had already ---- */

static uint64_t load(const uint8_t *bytes, size_t count) { /* 8 or 4 of them */
  uint64_t eight = 0;
  uint32_t four;
  if (count == 8) return memcpy(&eight, bytes, 8), eight;
  return memcpy(&four, bytes, 4), four;
}

/* What, with its length, tells a word of at most SLM_KNOWN_BYTES bytes from all others. */
static void key_of(const uint8_t *bytes, size_t length, uint64_t key[3]) {
  key[1] = key[2] = 0;
  if (length >= 8) {
    key[0] = load(bytes, 8);
    key[1] = load(bytes + length - 8, 8);
    if (length > 16) key[2] = load(bytes + 8, 8);
  } else if (length >= 4) {
    key[0] = load(bytes, 4) | load(bytes + length - 4, 4) << 32;
  } else {
    key[0] = bytes[0] | (uint64_t)bytes[length / 2] << 8 | (uint64_t)bytes[length - 1] << 16;
  }
}

/* Where a word is, or would be; NULL where words are not kept, or not such long ones. */
static slm_known_word *slot_of(const slm_encoding *e, const slm_piece *word, int *is_known) {
  const uint64_t factor = 0x9e3779b97f4a7c15u;
  uint64_t key[3];
  *is_known = 0;
  if (!e->known || !word->length || word->length > SLM_KNOWN_BYTES) return NULL;
  key_of(word->bytes, word->length, key);
  uint64_t sum = (key[0] ^ word->length) * factor;
  sum = (sum ^ sum >> 32 ^ key[1]) * factor;
  sum = (sum ^ sum >> 32 ^ key[2]) * factor;
  slm_known_word *slot = &e->known[(sum >> 40) & e->known_mask];
  *is_known = slot->length == word->length && slot->key[0] == key[0] && slot->key[1] == key[1] &&
              slot->key[2] == key[2];
  if (*is_known) return slot;
  slot->length = 0; /* until its tokens are there */
  slot->next_length = (uint8_t)word->length;
  memcpy(slot->key, key, sizeof key);
  return slot;
}

static void remember(slm_known_word *slot, const uint32_t *tokens, const uint32_t *lengths,
                     size_t count) {
  if (count > SLM_KNOWN_TOKENS) return;
  for (size_t i = 0; i < count; ++i) {
    slot->tokens[i] = tokens[i];
    slot->lengths[i] = (uint8_t)lengths[i];
  }
  slot->count = (uint8_t)count;
  slot->length = slot->next_length;
}

/* ---- a word ---- */

static int32_t encode(slm_encoding *e, const slm_piece *word, uint32_t *tokens, uint32_t *lengths,
                      slm_known_word *slot) {
  const slm_tokenizer *t = e->tokenizer;
  size_t count = split(t, word, tokens, lengths);
  if (count > SHORT_WORD) {
    int32_t code = merge_long(e, tokens, lengths, &count);
    if (code != SLM_OK) return code;
  } else {
    count = merge_short(t, tokens, lengths, count);
  }
  if (slot) remember(slot, tokens, lengths, count);
  size_t at = 0;
  for (size_t i = 0; i < count; ++i) {
    slm_emit(e, word, tokens[i], at, at + lengths[i]);
    at += lengths[i];
  }
  return SLM_OK;
}

/* 8 bytes at a time; slmtvm/text/models.py computes the same. */
static uint64_t hash(const uint8_t *bytes, size_t length) {
  const uint64_t factor = 0x9e3779b97f4a7c15u;
  uint64_t sum = length;
  for (size_t at = 0; at < length; at += 8) {
    uint64_t next = 0;
    if (length - at >= 8)
      memcpy(&next, bytes + at, sizeof next);
    else
      for (size_t i = at; i < length; ++i) next |= (uint64_t)bytes[i] << 8 * (i - at);
    sum = (sum ^ next) * factor;
    sum ^= sum >> 32;
  }
  return sum;
}

/* The token that merging makes of the whole word, where that is known beforehand; or SLM_NONE. */
static uint32_t known_word(const slm_tokenizer *t, const slm_piece *word) {
  if (word->length > SHORT_WORD) return SLM_NONE;
  const uint64_t sum = hash(word->bytes, word->length);
  const uint32_t *found = slm_pairs_find(&t->known_hashes, (uint32_t)(sum >> 32), (uint32_t)sum);
  if (!found) return SLM_NONE;
  const uint32_t begin = t->known.ends[found[1]], end = t->known.ends[found[1] + 1];
  return end - begin == word->length &&
                 memcmp(t->known.bytes + begin, word->bytes, word->length) == 0
             ? found[0]
             : SLM_NONE;
}

int32_t slm_bpe(slm_encoding *e, const slm_piece *word) {
  const slm_tokenizer *t = e->tokenizer;
  int is_known;
  slm_known_word *slot = slot_of(e, word, &is_known);
  if (is_known) {
    size_t at = 0;
    for (size_t i = 0; i < slot->count; at += slot->lengths[i++])
      slm_emit(e, word, slot->tokens[i], at, at + slot->lengths[i]);
    return SLM_OK;
  }
  const uint32_t whole = known_word(t, word);
  if (whole != SLM_NONE) {
    const uint32_t length = (uint32_t)word->length;
    if (slot) remember(slot, &whole, &length, 1);
    slm_emit(e, word, whole, 0, word->length);
    return SLM_OK;
  }
  if (t->flags & SLM_TEXT_WHOLE_WORDS) {
    uint32_t node = 0, found = 0;
    size_t at = 0;
    for (; at < word->length; ++at) {
      const uint32_t *next = slm_pairs_find(&t->trie, node, word->bytes[at]);
      if (!next) break;
      node = next[0];
      found = next[1];
    }
    if (at == word->length && found) {
      slm_emit(e, word, found - 1, 0, word->length);
      return SLM_OK;
    }
  }
  if (word->length <= SHORT_WORD) {
    uint32_t tokens[SHORT_WORD], lengths[SHORT_WORD];
    return encode(e, word, tokens, lengths, slot);
  }
  const size_t used = e->work_used;
  uint32_t *tokens = slm_work_take(e, word->length * sizeof *tokens);
  uint32_t *lengths = slm_work_take(e, word->length * sizeof *lengths);
  int32_t code = tokens && lengths ? encode(e, word, tokens, lengths, slot) : SLM_ERR_MEMORY;
  e->work_used = used;
  return code;
}
