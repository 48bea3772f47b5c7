/* Damaged tables and any bytes as texts: opening says so or everything goes on, and no sanitizer speaks.
 *
 *   hostile_tables FOLDER SEED ROUNDS      (FOLDER/tokenizer.bin is changed and put back) */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "slm.h"

enum { TEXT_BYTES = 96, ROOM = 512, IDS = 24, MOST_CHANGES = 3 };

static uint64_t state;

static uint32_t random_below(uint32_t end) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return (uint32_t)(state >> 11) % end;
}

static void fail(const char *what) {
  fprintf(stderr, "%s: %s\n", what, slm_last_error());
  exit(1);
}

static size_t random_text(char *text) {
  static const char *const pieces[] = {"a", " ", "the ", "\n", "1", "\xc3\xa9", "\xe6\x97\xa5", "<s>",
                                       "\xf0\x9f\x90\x8d", "\xcc\x81", "e\xcc\xa3", "\xff", "\xe2\x96",
                                       "Running", "'s", ".", "\xea\xb0\x81", "  \r\n"};
  size_t length = 0, count = random_below(20);
  while (count--) {
    const char *piece = pieces[random_below(sizeof pieces / sizeof *pieces)];
    char byte[2] = {(char)(1 + random_below(255)), 0};
    if (random_below(8) == 0) piece = byte;
    const size_t size = strlen(piece);
    if (length + size > TEXT_BYTES) break;
    memcpy(text + length, piece, size);
    length += size;
  }
  return length;
}

static void use(slm_tokenizer *t) {
  char text[TEXT_BYTES];
  int32_t tokens[ROOM], segments[ROOM];
  slm_span spans[ROOM];
  const size_t length = random_text(text), half = length / 2;
  const int64_t bytes = slm_tokenize_bytes(t, length);
  if (bytes < 0) return; /* a growth that cannot be */
  /* Too little work space is an error, no accident. */
  const size_t given = random_below(6) ? (size_t)bytes : random_below(4096) / 8 * 8;
  if (given > 1u << 26) return;
  void *work = malloc(given ? given : 1);
  const size_t room = random_below(4) ? ROOM : random_below(8);
  int32_t count = random_below(2)
                      ? slm_tokenize(t, text, length, 0, tokens, spans, room, work, given)
                      : slm_tokenize_pair(t, text, half, text + half, length - half, 0, tokens,
                                          segments, spans, room, work, given);
  free(work);
  const int32_t size = slm_token_count(t);
  for (int32_t i = 0; i < count && (size_t)i < room; ++i)
    if (tokens[i] < 0 || tokens[i] >= size) fail("a token out of range");
  for (int i = 0; i < IDS; ++i) tokens[i] = (int32_t)random_below((uint32_t)size);
  slm_text_state shown = {0};
  char out[32];
  for (size_t n = 0; n <= IDS; ++n)
    for (int more = 1, calls = 0; more && calls < 10000; ++calls) {
      int32_t written = slm_detokenize(t, &shown, tokens, n, n == IDS ? SLM_TEXT_ENDS : 0, out,
                                       sizeof out);
      if (written < 0) fail("detokenize");
      more = (written & SLM_MORE_TEXT) != 0;
    }
  slm_token_text(t, tokens[0], out, sizeof out);
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  char path[4096];
  snprintf(path, sizeof path, "%s/tokenizer.bin", argv[1]);
  state = 88172645463325252u + strtoull(argv[2], NULL, 10);
  const long rounds = atol(argv[3]);
  int file = open(path, O_RDWR);
  struct stat status;
  if (file < 0 || fstat(file, &status) != 0) return 2;
  const uint32_t words = (uint32_t)(status.st_size / 4);
  long opened = 0;
  for (long round = 0; round < rounds; ++round) {
    uint32_t at[MOST_CHANGES], old[MOST_CHANGES];
    const int changes = round % 4 ? (int)random_below(MOST_CHANGES) + 1 : 0;
    for (int i = 0; i < changes; ++i) {
      /* Half of them in the header and what lies near its end: the steps. */
      at[i] = random_below(2) ? random_below(words) : random_below(words < 64 ? words : 64);
      uint32_t word = random_below(3) ? random_below(words) : (uint32_t)state;
      if (pread(file, &old[i], 4, 4 * (off_t)at[i]) != 4) return 2;
      if (random_below(2)) word = old[i] ^ 1u << random_below(32);
      if (pwrite(file, &word, 4, 4 * (off_t)at[i]) != 4) return 2;
    }
    slm_tokenizer *tokenizer;
    if (slm_tokenizer_open(argv[1], &tokenizer) == SLM_OK) {
      ++opened;
      for (int i = 0; i < 4; ++i) use(tokenizer);
      slm_tokenizer_close(tokenizer);
    } else if (changes == 0) {
      fail("whole tables");
    }
    for (int i = changes; i-- > 0;)
      if (pwrite(file, &old[i], 4, 4 * (off_t)at[i]) != 4) return 2;
  }
  close(file);
  puts(opened > rounds / 4 ? "done" : "hardly any tables were opened");
  return 0;
}
