/* Calls one kernel on buffers from a file, and writes what they are afterwards.
 *
 *     driver IN OUT
 *
 * IN: int64 numbers (buffers, scalars, bounds, then the size of each buffer, each scalar, each
 * bound), then the buffers' bytes. The kernel is called for the parts of its grid that lie between
 * bounds.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#define MOST 36 /* words that a kernel can be called with */

/* A kernel takes pointers, then int32_t scalars. In the calling conventions of x86-64, AArch64 and
 * RISC-V each of them is a word, an int32_t a sign-extended one, and words too many are ignored. */
typedef int64_t w;
void kernel(w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w, w,
            w, w, w, w, w, w);

static void call(const w *a) {
  kernel(a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13],
         a[14], a[15], a[16], a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26],
         a[27], a[28], a[29], a[30], a[31], a[32], a[33], a[34], a[35]);
}

static int64_t number(FILE *in) {
  int64_t value;
  if (fread(&value, sizeof value, 1, in) != 1) exit(2);
  return value;
}

int main(int argc, char **argv) {
  if (argc != 3) return 64;
  FILE *in = fopen(argv[1], "rb"), *out = fopen(argv[2], "wb");
  if (!in || !out) return 3;
  int64_t buffers = number(in), scalars = number(in), bounds = number(in);
  if (buffers + scalars + 2 > MOST || bounds > MOST) return 4;
  w words[MOST] = {0}, size[MOST], bound[MOST];
  for (int64_t i = 0; i < buffers; ++i) size[i] = number(in);
  for (int64_t i = 0; i < scalars; ++i) words[buffers + i] = number(in);
  for (int64_t i = 0; i < bounds; ++i) bound[i] = number(in);
  for (int64_t i = 0; i < buffers; ++i) {
    void *buffer = aligned_alloc(64, (size[i] + 127) / 64 * 64);
    if (!buffer || fread(buffer, 1, size[i], in) != (size_t)size[i]) return 2;
    words[i] = (w)(intptr_t)buffer;
  }
  for (int64_t i = 0; i + 1 < bounds; ++i) {
    words[buffers + scalars] = bound[i];
    words[buffers + scalars + 1] = bound[i + 1];
    call(words);
  }
  for (int64_t i = 0; i < buffers; ++i) fwrite((void *)(intptr_t)words[i], 1, size[i], out);
  return fclose(out);
}
