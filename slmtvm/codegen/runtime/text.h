/* An open tokenizer: the tables of tokenizer.bin, checked once so that following them needs no checks.
 *
 * slmtvm/text/tables.py writes the file: words of 32 bits, little-endian. A reference is the number of
 * the word that a table starts at. */
#ifndef SLM_TEXT_H
#define SLM_TEXT_H

#include <stddef.h>
#include <stdint.h>

#include "slm.h"

#define SLM_NONE 0xffffffffu

enum {
  SLM_TEXT_MAX_STEPS = 48,
  SLM_TEXT_CODE_POINTS = 0x110000,
  SLM_TEXT_PAGE = 128, /* code points of a page of a character map */
  SLM_TEXT_INDEX = SLM_TEXT_CODE_POINTS / SLM_TEXT_PAGE
};

/* A hash table of pairs of numbers to pairs of numbers; at least one slot of it is empty. */
typedef struct {
  uint32_t shift; /* 64 less the logarithm of the number of slots */
  uint32_t mask;
  const uint32_t *slots; /* four words each: both keys, both values; the first key of an empty one is
                          * SLM_NONE */
} slm_pairs;

/* A number below 65536 for each code point. */
typedef struct {
  const uint16_t *index; /* SLM_TEXT_INDEX */
  const uint16_t *pages;
} slm_char_map;

typedef struct {
  uint32_t count;
  const uint32_t *ends; /* count + 1: where each starts, and the last one ends */
  const uint8_t *bytes;
} slm_strings;

/* An automaton over classes of characters; state 0 is the dead one. */
typedef struct {
  slm_char_map classes;
  const uint16_t *ascii; /* the classes of the first characters */
  uint32_t states, class_count;
  uint32_t first_start, start; /* at the start of a text, and elsewhere */
  const uint16_t *next;        /* states * class_count */
  const uint16_t *accepts;     /* by state: 1 a match ends here, 2 one character before */
  const uint16_t *at_end;      /* by state: 1 a match ends here where the text does */
} slm_automaton;

/* What is done to a text, one after the other; STEP_ in slmtvm/text/steps.py. */
enum {
  SLM_STEP_ADDED = 1, /* takes added tokens out */
  SLM_STEP_MAP,       /* characters become strings */
  SLM_STEP_SPLIT,     /* pieces by an automaton */
  SLM_STEP_PREPEND,
  SLM_STEP_REPLACE, /* what an automaton finds becomes a string */
  SLM_STEP_STRIP,   /* removes white space at the ends: choice 1 left, 2 right, 3 both */
  SLM_STEP_NORMALIZE, /* a normalization form of Unicode; choice 1: marks are put together */
  SLM_STEP_CHARSMAP   /* SentencePiece's normalization */
};

enum { /* of SLM_STEP_SPLIT: what becomes of matches */
  SLM_SPLIT_REMOVED,
  SLM_SPLIT_ISOLATED,
  SLM_SPLIT_PREVIOUS,
  SLM_SPLIT_NEXT,
  SLM_SPLIT_CONTIGUOUS
};

enum { /* of SLM_STEP_PREPEND: when */
  SLM_PREPEND_ALWAYS,
  SLM_PREPEND_UNLESS_SAME, /* it starts with the string */
  SLM_PREPEND_FIRST        /* the same, and only where the whole text starts */
};

typedef struct {
  uint32_t kind, choice, invert;
  uint32_t growth; /* bytes that come out of one byte, times 16, rounded up */
  uint32_t more;   /* and bytes besides */
  slm_pairs pairs;
  slm_char_map map;
  slm_strings strings;
  slm_automaton automaton;
  const uint32_t *words; /* of what is peculiar to a kind */
  uint32_t word_count;
} slm_text_step;

enum { SLM_MODEL_BPE = 1, SLM_MODEL_WORDPIECE, SLM_MODEL_UNIGRAM, SLM_MODEL_WORDLEVEL };

enum { /* of a model */
  SLM_TEXT_BYTES = 1,          /* its characters are bytes */
  SLM_TEXT_WHOLE_WORDS = 2,    /* a word that is a token stays one, whatever the merges */
  SLM_TEXT_FUSE_UNKNOWN = 4,   /* unknown characters in a row are one token */
  SLM_TEXT_BYTE_FALLBACK = 8,  /* unknown characters are written in bytes */
  SLM_TEXT_AFFIXES = 16,       /* characters inside and at the end of a word are tokens of their own */
  SLM_TEXT_TRIM = 32,          /* spans leave white space at the ends of tokens out */
  SLM_TEXT_TRIM_PREFIXED = 64  /* but for one space at the start of the text */
};

enum { /* flags of a token */
  SLM_TOKEN_SKIPPED = 1, /* special: not in decoded text */
  SLM_TOKEN_BYTE = 2,    /* a byte of a row, which is text where the whole row is UTF-8 */
  SLM_TOKEN_SPACE = 4    /* a space follows it, if a token does */
};

struct slm_tokenizer {
  uint32_t mark;
  const uint32_t *words;
  size_t file_bytes;
  uint32_t token_count; /* ids are below it */
  uint32_t unknown;     /* SLM_NONE: there is none */
  uint32_t model, flags;
  slm_char_map kinds; /* SLM_KIND_ of characters */
  uint32_t step_count;
  slm_text_step steps[SLM_TEXT_MAX_STEPS];
  slm_pairs trie;          /* (node, byte) to (node, token + 1); node 0 is the root */
  uint32_t inner_root;     /* of WordPiece: where the pieces inside a word start */
  uint32_t longest_word;   /* of WordPiece, in characters */
  slm_pairs symbols;       /* of BPE: (character, place) to (token, 0) */
  const uint32_t *initial; /* of BPE: tokens of the characters below 256 inside a word */
  slm_pairs merges;        /* of BPE: (token, token) to (rank, token) */
  slm_pairs known_hashes;   /* of BPE: hash of a word that is one token to (token, place in...) */
  slm_strings known;        /* ... these words */
  const uint32_t *fallback; /* tokens of bytes, 256 */
  const uint32_t *scores;   /* of Unigram: a float64 for each token, and that of unknown ones */
  slm_strings first_texts;  /* of tokens that start a text, and of others */
  slm_strings texts;
  slm_strings names;            /* tokens as the vocabulary has them */
  const uint32_t *token_flags;  /* SLM_TOKEN_ */
  const uint32_t *trims;        /* by token: spaces at its start, and at its end times 65536, or
                                 * SLM_NONE where its text says it; or NULL */
  const uint32_t *single, *pair; /* templates: (token or SLM_NONE - 1 and - 2 for texts, segment) */
  uint32_t single_count, pair_count;
  const uint8_t *stripped; /* what a decoded text loses at its start, stripped_count times at most */
  uint32_t stripped_bytes, stripped_count;
};

enum { SLM_TEXT_MARK = 0x544d4c53, SLM_KIND_WORD = 1, SLM_KIND_SPACE = 2 };
#define SLM_TEMPLATE_FIRST (SLM_NONE - 1)
#define SLM_TEMPLATE_SECOND (SLM_NONE - 2)

/* A piece of text on its way, and where in the whole text its bytes come from. */
typedef struct {
  const uint8_t *bytes;
  size_t length;
  const uint32_t *from, *to; /* of each byte; NULL: byte i is byte base + i of the text */
  uint32_t base;             /* where the piece starts in the text */
} slm_piece;

/* A word that the text had already, and its tokens: 64 bytes, a line of a cache. */
enum { SLM_KNOWN_BYTES = 24, SLM_KNOWN_TOKENS = 7 };
typedef struct {
  uint64_t key[3];
  uint32_t tokens[SLM_KNOWN_TOKENS];
  uint8_t lengths[SLM_KNOWN_TOKENS]; /* of the tokens, in bytes */
  uint8_t length, next_length;       /* of the word, 0: nothing is known; of the one that comes */
  uint8_t count;
} slm_known_word;

/* A call of slm_tokenize. */
typedef struct {
  const slm_tokenizer *tokenizer;
  uint8_t *work;
  size_t work_used, work_bytes;
  int32_t *tokens, *segments;
  slm_span *spans;
  size_t room, count, first; /* `first` token of this text */
  int32_t segment;
  slm_known_word *known; /* known_mask + 1 of them; NULL in a short text */
  uint32_t known_mask;
} slm_encoding;

/* The slot's values, or NULL. */
static inline const uint32_t *slm_pairs_find(const slm_pairs *pairs, uint32_t a, uint32_t b) {
  uint64_t hash = (((uint64_t)a << 32) | b) * 0x9e3779b97f4a7c15u;
  for (uint32_t at = (uint32_t)(hash >> pairs->shift);; at = (at + 1) & pairs->mask) {
    const uint32_t *slot = pairs->slots + 4 * (size_t)at;
    if (slot[0] == a && slot[1] == b) return slot + 2;
    if (slot[0] == SLM_NONE) return NULL;
  }
}

static inline uint32_t slm_char_value(const slm_char_map *map, uint32_t character) {
  return map->pages[(size_t)map->index[character / SLM_TEXT_PAGE] * SLM_TEXT_PAGE +
                    character % SLM_TEXT_PAGE];
}

/* The character at `bytes` of valid UTF-8, and its bytes. */
static inline uint32_t slm_char_at(const uint8_t *bytes, uint32_t *length) {
  uint32_t b = bytes[0];
  if (b < 0x80) return *length = 1, b;
  if (b < 0xe0) return *length = 2, (b & 0x1f) << 6 | (bytes[1] & 0x3f);
  if (b < 0xf0)
    return *length = 3, (b & 0xf) << 12 | (uint32_t)(bytes[1] & 0x3f) << 6 | (bytes[2] & 0x3f);
  return *length = 4, (b & 7) << 18 | (uint32_t)(bytes[1] & 0x3f) << 12 |
                          (uint32_t)(bytes[2] & 0x3f) << 6 | (bytes[3] & 0x3f);
}

/* Writes a character as UTF-8, at most 4 bytes; their number. */
uint32_t slm_char_write(uint32_t character, uint8_t *bytes);

/* How many bytes at `bytes` are one character of UTF-8. Where they are none: 0, and `invalid` is how
 * many belong to what is damaged (at least 1); those of a character that is cut off by the end are
 * -1 together, if `more` may follow. */
int slm_char_check(const uint8_t *bytes, size_t length, int more, uint32_t *invalid);

/* Where byte `at` of a piece comes from. */
static inline uint32_t slm_piece_from(const slm_piece *piece, size_t at) {
  if (piece->from) return piece->from[at];
  while (at > 0 && (piece->bytes[at] & 0xc0) == 0x80) --at;
  return piece->base + (uint32_t)at;
}

static inline uint32_t slm_piece_to(const slm_piece *piece, size_t at) {
  if (piece->to) return piece->to[at];
  do ++at;
  while (at < piece->length && (piece->bytes[at] & 0xc0) == 0x80);
  return piece->base + (uint32_t)at;
}

slm_piece slm_piece_part(const slm_piece *piece, size_t begin, size_t end);

/* Work space of the call, 8-aligned; NULL, with a message, where it is used up. What is taken after
 * `work_used` was read is given back by setting it again. */
void *slm_work_take(slm_encoding *encoding, size_t bytes);

/* Follows the steps from `step` on, and the model after them. */
int32_t slm_follow(slm_encoding *encoding, uint32_t step, const slm_piece *piece);

/* The end of the match that starts at `at`, or SLM_NONE. */
size_t slm_match(const slm_automaton *automaton, const slm_piece *piece, size_t at);

int32_t slm_step_added(slm_encoding *encoding, uint32_t step, const slm_piece *piece);
int32_t slm_step_split(slm_encoding *encoding, uint32_t step, const slm_piece *piece);
/* The steps that make another text. */
int32_t slm_step_transform(slm_encoding *encoding, uint32_t step, const slm_piece *piece);

int32_t slm_step_normalize(slm_encoding *encoding, uint32_t step, const slm_piece *piece);

int32_t slm_step_charsmap(slm_encoding *encoding, uint32_t step, const slm_piece *piece);

/* The models: a word into tokens. */
int32_t slm_bpe(slm_encoding *encoding, const slm_piece *word);
int32_t slm_wordpiece(slm_encoding *encoding, const slm_piece *word);
int32_t slm_unigram(slm_encoding *encoding, const slm_piece *word);
int32_t slm_wordlevel(slm_encoding *encoding, const slm_piece *word);

/* Puts a token out, which was made of the bytes `begin` to `end` of `piece`. */
static inline void slm_emit(slm_encoding *e, const slm_piece *piece, uint32_t token, size_t begin,
                            size_t end) {
  size_t at = e->count++;
  if (at >= e->room) return;
  e->tokens[at] = (int32_t)token;
  if (e->segments) e->segments[at] = e->segment;
  if (!e->spans) return;
  if (begin >= end || end > piece->length)
    e->spans[at] = (slm_span){piece->base, piece->base};
  else
    e->spans[at] = (slm_span){slm_piece_from(piece, begin), slm_piece_to(piece, end - 1)};
}

#endif
