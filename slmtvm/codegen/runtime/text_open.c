/* Opening tokenizer.bin: mapped, and every number in it that is followed later is compared with what it
 * points into. slmtvm/text/tables.py writes it and says what is where. */
#define _GNU_SOURCE
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "error.h"
#include "mapped.h"
#include "text.h"

enum {
  VERSION = 1,
  STEP_WORDS = 11,
  MOST_GROWTH = 16 * 64, /* of a step: a byte becomes at most 64 */
  MOST_MORE = 1 << 16,
  MOST_TOKENS = 1 << 24
};

/* The header, in words. */
enum {
  H_MAGIC, H_MAGIC_END, H_VERSION, H_WORDS, H_TOKENS, H_UNKNOWN, H_MODEL, H_FLAGS, H_KINDS,
  H_STEP_COUNT, H_STEPS, H_TRIE, H_INNER_ROOT, H_LONGEST_WORD, H_SYMBOLS, H_INITIAL, H_MERGES,
  H_FALLBACK, H_SCORES, H_FIRST_TEXTS, H_TEXTS, H_NAMES, H_TOKEN_FLAGS, H_TRIMS, H_SINGLE,
  H_SINGLE_COUNT, H_PAIR, H_PAIR_COUNT, H_STRIPPED, H_STRIPPED_COUNT, H_KNOWN_HASHES, H_KNOWN, H_PAGES, H_PAGE_COUNT,
  HEADER_WORDS
};

static const char MAGIC[8] = {'S', 'L', 'M', 'T', 'E', 'X', 'T', '\n'};

/* Reading tables: `wrong` says what is damaged, once something is. */
typedef struct {
  const uint32_t *words;
  size_t count;
  const uint16_t *page_most; /* the largest number of each page */
  const uint16_t *pages;
  uint32_t page_count;
  const char *wrong;
} reader;

static const uint32_t *table(reader *r, uint32_t at, uint64_t words, const char *what) {
  if (at < HEADER_WORDS || at > r->count || words > r->count - at) {
    if (!r->wrong) r->wrong = what;
    return NULL;
  }
  return r->words + at;
}

static void check(reader *r, int right, const char *what) {
  if (!right && !r->wrong) r->wrong = what;
}

/* Values: the first below `first_end` (0: any), the second up to `second_most` (or SLM_NONE: any). */
static void read_pairs(reader *r, uint32_t at, uint32_t first_end, uint32_t second_most,
                       slm_pairs *pairs, const char *what) {
  const uint32_t *log = table(r, at, 1, what);
  if (!log) return;
  if (*log < 1 || *log > 28) {
    check(r, 0, what);
    return;
  }
  const uint32_t count = 1u << *log;
  const uint32_t *slots = table(r, at + 1, 4 * (uint64_t)count, what);
  if (!slots) return;
  int empty = 0;
  for (size_t i = 0; i < count; ++i) {
    const uint32_t *slot = slots + 4 * i;
    if (slot[0] == SLM_NONE) {
      empty = 1;
      continue;
    }
    check(r, (!first_end || slot[2] < first_end) && slot[3] <= second_most, what);
  }
  check(r, empty, what);
  *pairs = (slm_pairs){.shift = 64 - *log, .mask = count - 1, .slots = slots};
}

static void read_map(reader *r, uint32_t at, uint32_t most, slm_char_map *map, const char *what) {
  const uint16_t *index = (const uint16_t *)table(r, at, SLM_TEXT_INDEX / 2, what);
  if (!index) return;
  for (size_t i = 0; i < SLM_TEXT_INDEX; ++i) {
    if (index[i] >= r->page_count || r->page_most[index[i]] > most) {
      check(r, 0, what);
      return;
    }
  }
  *map = (slm_char_map){.index = index, .pages = r->pages};
}

static void read_strings(reader *r, uint32_t at, uint32_t least, int utf8, slm_strings *strings,
                         const char *what) {
  const uint32_t *count = table(r, at, 1, what);
  if (!count || *count > MOST_TOKENS || *count < least) {
    check(r, 0, what);
    return;
  }
  const uint32_t *ends = table(r, at + 1, (uint64_t)*count + 1, what);
  if (!ends) return;
  for (uint32_t i = 0; i < *count; ++i)
    if (ends[i] > ends[i + 1]) {
      check(r, 0, what);
      return;
    }
  const uint8_t *bytes =
      (const uint8_t *)table(r, at + 2 + *count, ((uint64_t)ends[*count] + 3) / 4, what);
  if (!bytes || ends[0] != 0) {
    check(r, 0, what);
    return;
  }
  for (uint32_t i = 0; utf8 && i < *count; ++i) {
    uint32_t invalid;
    for (uint32_t b = ends[i]; b < ends[i + 1];) {
      int size = slm_char_check(bytes + b, ends[i + 1] - b, 0, &invalid);
      check(r, size > 0, what);
      if (size <= 0) return;
      b += (uint32_t)size;
    }
  }
  *strings = (slm_strings){.count = *count, .ends = ends, .bytes = bytes};
}

static int all_up_to(const uint16_t *values, uint64_t count, uint32_t most) {
  for (uint64_t i = 0; i < count; ++i)
    if (values[i] > most) return 0;
  return 1;
}

static void read_automaton(reader *r, uint32_t at, slm_automaton *a) {
  static const char what[] = "automaton";
  const uint32_t *head = table(r, at, 5, what);
  if (!head) return;
  const uint32_t states = head[1], classes = head[2];
  if (states < 2 || states > 65535 || classes < 1 || classes > 65535 || head[3] >= states ||
      head[4] >= states) {
    check(r, 0, what);
    return;
  }
  const uint64_t steps = (uint64_t)states * classes;
  const uint64_t next_words = (steps + 1) / 2, state_words = (states + 1) / 2;
  const uint16_t *next = (const uint16_t *)table(r, at + 5, next_words + 2 * state_words, what);
  if (!next) return;
  const uint16_t *accepts = next + 2 * next_words, *at_end = accepts + 2 * state_words;
  check(r, all_up_to(next, steps, states - 1) && all_up_to(accepts, states, 2) &&
               all_up_to(at_end, states, 1), what);
  read_map(r, head[0], classes - 1, &a->classes, what);
  if (a->classes.pages) a->ascii = a->classes.pages + (size_t)a->classes.index[0] * SLM_TEXT_PAGE;
  a->states = states;
  a->class_count = classes;
  a->first_start = head[3];
  a->start = head[4];
  a->next = next;
  a->accepts = accepts;
  a->at_end = at_end;
}

static void read_added(reader *r, slm_text_step *step, uint32_t pairs, uint32_t tokens) {
  static const char what[] = "added tokens";
  if (step->word_count < 8 || step->word_count % 2) {
    check(r, 0, what);
    return;
  }
  const uint32_t count = (step->word_count - 8) / 2;
  read_pairs(r, pairs, 0, count, &step->pairs, what);
  for (uint32_t i = 0; step->words && i < count; ++i)
    check(r, step->words[8 + 2 * i] < tokens, what);
}

static void read_step(reader *r, const uint32_t *words, uint32_t tokens, slm_text_step *step) {
  enum { KIND, CHOICE, INVERT, GROWTH, MORE, PAIRS, MAP, STRINGS, AUTOMATON, WORDS, WORD_COUNT };
  *step = (slm_text_step){.kind = words[KIND], .choice = words[CHOICE], .invert = words[INVERT],
                          .growth = words[GROWTH], .more = words[MORE],
                          .word_count = words[WORD_COUNT]};
  check(r, step->growth <= MOST_GROWTH && step->more <= MOST_MORE && step->invert <= 1, "step");
  if (step->word_count) step->words = table(r, words[WORDS], step->word_count, "step");
  switch (step->kind) {
    case SLM_STEP_ADDED:
      read_added(r, step, words[PAIRS], tokens);
      break;
    case SLM_STEP_MAP:
      read_strings(r, words[STRINGS], 0, 1, &step->strings, "map");
      read_map(r, words[MAP], step->strings.count, &step->map, "map");
      break;
    case SLM_STEP_SPLIT:
      check(r, step->choice <= SLM_SPLIT_CONTIGUOUS, "split");
      read_automaton(r, words[AUTOMATON], &step->automaton);
      break;
    case SLM_STEP_PREPEND:
      check(r, step->choice <= SLM_PREPEND_FIRST, "prepend");
      read_strings(r, words[STRINGS], 1, 1, &step->strings, "prepend");
      break;
    case SLM_STEP_REPLACE:
      read_strings(r, words[STRINGS], 1, 1, &step->strings, "replace");
      read_automaton(r, words[AUTOMATON], &step->automaton);
      break;
    case SLM_STEP_STRIP:
      check(r, step->choice <= 3, "strip");
      break;
    case SLM_STEP_NORMALIZE: /* the classes of its automaton are those of combining marks */
      check(r, step->choice <= 1, "normalization");
      read_strings(r, words[STRINGS], 0, 1, &step->strings, "normalization");
      read_map(r, words[MAP], step->strings.count, &step->map, "normalization");
      read_map(r, words[AUTOMATON], 255, &step->automaton.classes, "normalization");
      read_pairs(r, words[PAIRS], SLM_TEXT_CODE_POINTS, SLM_NONE, &step->pairs, "normalization");
      break;
    case SLM_STEP_CHARSMAP:
      read_strings(r, words[STRINGS], 0, 1, &step->strings, "charsmap");
      read_map(r, words[MAP], 15, &step->map, "charsmap");
      read_pairs(r, words[PAIRS], 0, step->strings.count, &step->pairs, "charsmap");
      break;
    default:
      check(r, 0, "step");
  }
}

static const uint32_t *read_tokens(reader *r, uint32_t at, uint64_t count, uint32_t tokens,
                                   const char *what) {
  const uint32_t *words = table(r, at, count, what);
  for (uint64_t i = 0; words && i < count; ++i)
    check(r, words[i] < tokens || words[i] == SLM_NONE, what);
  return words;
}

static const uint32_t *read_template(reader *r, uint32_t at, uint32_t count, uint32_t tokens) {
  const uint32_t *words = table(r, at, 2 * (uint64_t)count, "template");
  for (uint32_t i = 0; words && i < count; ++i)
    check(r, (words[2 * i] < tokens || words[2 * i] == SLM_TEMPLATE_FIRST ||
              words[2 * i] == SLM_TEMPLATE_SECOND) && words[2 * i + 1] <= 1, "template");
  return words;
}

static void read_model(reader *r, const uint32_t *h, slm_tokenizer *t) {
  const uint32_t tokens = t->token_count;
  check(r, t->model >= SLM_MODEL_BPE && t->model <= SLM_MODEL_WORDLEVEL, "model");
  check(r, t->unknown == SLM_NONE || t->unknown < tokens, "unknown token");
  read_pairs(r, h[H_TRIE], 0, tokens, &t->trie, "trie");
  if (t->flags & SLM_TEXT_BYTE_FALLBACK)
    t->fallback = read_tokens(r, h[H_FALLBACK], 256, tokens, "tokens of bytes");
  if (t->model == SLM_MODEL_BPE) {
    t->initial = read_tokens(r, h[H_INITIAL], 256, tokens, "tokens of characters");
    read_pairs(r, h[H_SYMBOLS], tokens, SLM_NONE, &t->symbols, "tokens of characters");
    read_pairs(r, h[H_MERGES], 0, tokens - 1, &t->merges, "merges");
    read_strings(r, h[H_KNOWN], 1, 0, &t->known, "words");
    read_pairs(r, h[H_KNOWN_HASHES], tokens, t->known.count ? t->known.count - 1 : 0,
               &t->known_hashes, "words");
  }
  if (t->model == SLM_MODEL_UNIGRAM)
    t->scores = table(r, h[H_SCORES], 2 * ((uint64_t)tokens + 1), "scores");
}

static void read_tables(reader *r, slm_tokenizer *t) {
  const uint32_t *h = r->words;
  t->token_count = h[H_TOKENS];
  if (t->token_count < 1 || t->token_count > MOST_TOKENS || h[H_STEP_COUNT] > SLM_TEXT_MAX_STEPS) {
    check(r, 0, "header");
    return;
  }
  t->unknown = h[H_UNKNOWN];
  t->model = h[H_MODEL];
  t->flags = h[H_FLAGS];
  t->inner_root = h[H_INNER_ROOT];
  t->longest_word = h[H_LONGEST_WORD];
  read_map(r, h[H_KINDS], 3, &t->kinds, "kinds of characters");
  t->step_count = h[H_STEP_COUNT];
  const uint32_t *steps = table(r, h[H_STEPS], (uint64_t)t->step_count * STEP_WORDS, "steps");
  for (uint32_t i = 0; steps && i < t->step_count; ++i)
    read_step(r, steps + (size_t)i * STEP_WORDS, t->token_count, &t->steps[i]);
  read_model(r, h, t);
  read_strings(r, h[H_FIRST_TEXTS], t->token_count, 0, &t->first_texts, "texts");
  read_strings(r, h[H_TEXTS], t->token_count, 0, &t->texts, "texts");
  read_strings(r, h[H_NAMES], t->token_count, 0, &t->names, "names");
  t->token_flags = table(r, h[H_TOKEN_FLAGS], t->token_count, "flags");
  if (t->flags & SLM_TEXT_TRIM) t->trims = table(r, h[H_TRIMS], t->token_count, "spaces");
  t->single_count = h[H_SINGLE_COUNT];
  t->pair_count = h[H_PAIR_COUNT];
  t->single = read_template(r, h[H_SINGLE], t->single_count, t->token_count);
  t->pair = read_template(r, h[H_PAIR], t->pair_count, t->token_count);
  slm_strings stripped = {0};
  read_strings(r, h[H_STRIPPED], 1, 1, &stripped, "decoder");
  if (r->wrong) return;
  t->stripped = stripped.bytes;
  t->stripped_bytes = stripped.ends[1];
  t->stripped_count = h[H_STRIPPED_COUNT];
  check(r, t->stripped_bytes <= 4, "decoder");
  /* A byte of a row is one byte. */
  for (uint32_t i = 0; i < t->token_count; ++i)
    check(r, !(t->token_flags[i] & SLM_TOKEN_BYTE) || t->texts.ends[i + 1] == t->texts.ends[i] + 1,
          "bytes");
}

static int32_t read_all(const char *path, slm_tokenizer *t) {
  const uint32_t *h = t->words;
  const size_t count = t->file_bytes / sizeof *h;
  if (t->file_bytes < HEADER_WORDS * sizeof *h || memcmp(h, MAGIC, sizeof MAGIC) != 0)
    return slm_fail(SLM_ERR_TOKENIZER, "%s: not a compiled tokenizer", path);
  if (h[H_VERSION] != VERSION)
    return slm_fail(SLM_ERR_TOKENIZER, "%s: format %u, this library reads format %d", path,
                    h[H_VERSION], VERSION);
  if (h[H_WORDS] != count || t->file_bytes % sizeof *h)
    return slm_fail(SLM_ERR_TOKENIZER, "%s: %zu bytes, expected %llu; copy the bundle again", path,
                    t->file_bytes, 4 * (unsigned long long)h[H_WORDS]);
  reader r = {.words = h, .count = count, .page_count = h[H_PAGE_COUNT]};
  if (r.page_count > 65535) r.wrong = "pages";
  r.pages = (const uint16_t *)table(&r, h[H_PAGES], (uint64_t)r.page_count * SLM_TEXT_PAGE / 2,
                                    "pages");
  uint16_t *most = calloc((size_t)(r.wrong ? 0 : r.page_count) + 1, sizeof *most);
  if (!most) return slm_fail(SLM_ERR_MEMORY, "no memory for the tokenizer");
  for (size_t i = 0; !r.wrong && i < (size_t)r.page_count * SLM_TEXT_PAGE; ++i)
    if (r.pages[i] > most[i / SLM_TEXT_PAGE]) most[i / SLM_TEXT_PAGE] = r.pages[i];
  r.page_most = most;
  if (!r.wrong) read_tables(&r, t);
  free(most);
  if (r.wrong)
    return slm_fail(SLM_ERR_TOKENIZER, "%s: damaged: %s; copy the bundle again", path, r.wrong);
  return SLM_OK;
}

int32_t slm_tokenizer_open(const char *bundle, slm_tokenizer **result) {
  if (!bundle || !result)
    return slm_fail(SLM_ERR_ARGUMENT, "slm_tokenizer_open: an argument is NULL");
  *result = NULL;
  char path[PATH_MAX];
  int length = snprintf(path, sizeof path, "%s/tokenizer.bin", bundle);
  if (length < 0 || (size_t)length >= sizeof path)
    return slm_fail(SLM_ERR_ARGUMENT, "the bundle's path is longer than %d bytes", PATH_MAX);
  slm_tokenizer *t = calloc(1, sizeof *t);
  if (!t) return slm_fail(SLM_ERR_MEMORY, "no memory for the tokenizer");
  int32_t code = slm_map_file(path, "tokenizer", &t->words, &t->file_bytes);
  if (code == SLM_OK) {
    code = read_all(path, t);
    if (code != SLM_OK) munmap((void *)t->words, t->file_bytes);
  }
  if (code != SLM_OK) {
    free(t);
    return code;
  }
  t->mark = SLM_TEXT_MARK;
  *result = t;
  return SLM_OK;
}

int32_t slm_tokenizer_close(slm_tokenizer *t) {
  if (!t) return SLM_OK;
  if (t->mark != SLM_TEXT_MARK)
    return slm_fail(SLM_ERR_ARGUMENT, "the tokenizer is not open");
  munmap((void *)t->words, t->file_bytes);
  t->mark = 0;
  free(t);
  return SLM_OK;
}
