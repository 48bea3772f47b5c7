/* Kernels that behave well and badly, behind child/main.c: what program.py writes for real ones. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { ROWS = 8, COLUMNS = 16, ANY = 0 };

/* y[r, c] = x[r, c] + factor * w[c] */
static void add_rows(void *const *b, const int32_t *s, int32_t begin, int32_t end) {
  const float *x = b[0], *w = b[1];
  float *y = b[2];
  for (int r = begin; r < end; ++r)
    for (int c = 0; c < COLUMNS; ++c) y[r * COLUMNS + c] = x[r * COLUMNS + c] + (float)s[0] * w[c];
}

/* The bytes of 4 elements of any type, in reverse order of elements of `s[0]` bytes. */
static void reverse(void *const *b, const int32_t *s, int32_t begin, int32_t end) {
  (void)begin, (void)end;
  for (int i = 0; i < 4; ++i)
    memcpy((char *)b[1] + i * s[0], (char *)b[0] + (3 - i) * s[0], (size_t)s[0]);
}

static void crash(void *const *b, const int32_t *s, int32_t begin, int32_t end) {
  (void)s, (void)begin, (void)end;
  memset(b[0], 0x77, 4);
  *(volatile int *)0 = 1;
}

static void hang(void *const *b, const int32_t *s, int32_t begin, int32_t end) {
  (void)b, (void)s, (void)begin, (void)end;
  for (volatile int i = 0;; ++i) {
  }
}

static void hunger(void *const *b, const int32_t *s, int32_t begin, int32_t end) {
  (void)s, (void)begin, (void)end;
  size_t size = (size_t)100 << 30;
  char *data = malloc(size);
  for (size_t i = 0; i < size; i += 4096) ((volatile char *)data)[i] = 1;
  *(char *)b[0] = data[size / 2];
}

static const uint64_t row_sizes[] = {ROWS * COLUMNS * 4, COLUMNS * 4, ROWS * COLUMNS * 4};
static const uint8_t row_written[] = {0, 0, 1};
static const uint64_t any_sizes[] = {ANY, ANY};
static const uint8_t first_written[] = {1, 0}, second_written[] = {0, 1};

const slm_rpc_kernel slm_rpc_kernels[] = {
    {"add_rows", add_rows, 3, 1, ROWS, row_sizes, row_written, 0},
    {"reverse", reverse, 2, 1, 1, any_sizes, second_written, 0},
    {"crash", crash, 1, 0, 1, any_sizes, first_written, 0},
    {"hang", hang, 1, 0, 1, any_sizes, first_written, 0},
    {"hunger", hunger, 1, 0, 1, any_sizes, first_written, 0},
};
const int32_t slm_rpc_kernel_count = sizeof slm_rpc_kernels / sizeof *slm_rpc_kernels;
const char *const slm_rpc_requires[] = {NULL};
