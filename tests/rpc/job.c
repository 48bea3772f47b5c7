/* A job: does what its first argument says. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  if (!strcmp(what, "crash")) abort();
  if (!strcmp(what, "hang")) pause();
  if (!strcmp(what, "leave")) { /* a process that outlives its parent, with its pipes */
    if (fork() == 0) pause();
    return 0;
  }
  if (!strcmp(what, "hunger")) {
    char *data = malloc((size_t)100 << 30);
    if (!data) {
      fputs("no memory\n", stderr);
      return 4;
    }
    for (size_t i = 0; i < (size_t)100 << 30; i += 4096) data[i] = 1;
    printf("%d\n", data[rand()]);
  }
  if (!strcmp(what, "flood"))
    for (;;) puts("................................................................");
  if (!strcmp(what, "fill")) { /* the disk: many files, each of which is small enough */
    static char block[1 << 20];
    for (int i = 0;; ++i) {
      char name[32];
      snprintf(name, sizeof name, "file%d", i);
      FILE *file = fopen(name, "wb");
      if (!file || fwrite(block, sizeof block, 1, file) != 1 || fclose(file)) return 5;
      usleep(10000);
    }
  }
  if (!strcmp(what, "link")) return symlink(argv[2], argv[3]);
  if (!strcmp(what, "status")) {
    fputs("said before\n", stderr);
    return atoi(argv[2]);
  }
  if (!strcmp(what, "cat")) {
    FILE *file = argc > 2 ? fopen(argv[2], "rb") : stdin;
    if (!file) return 6;
    for (int c; (c = getc(file)) != EOF;) putchar(c);
    return 0;
  }
  for (int i = 1; i < argc; ++i) printf("%s\n", argv[i]);
  return 0;
}
