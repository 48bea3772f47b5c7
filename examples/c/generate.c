/* Continues token ids with a compiled model, greedily or, with a temperature, by drawing.
 *
 *   generate BUNDLE COUNT TEMPERATURE [TOKEN...]     (without tokens they are read from stdin)
 *
 * Built against the library of one target in the bundle, from the repository's root:
 *
 *   cc -O2 -Islmtvm/codegen/runtime -o generate examples/c/generate.c \
 *     demo.slm/lib/TARGET.so -Wl,-rpath,"$PWD/demo.slm/lib" -pthread
 */
#include <stdio.h>
#include <stdlib.h>

#include "slm.h"

static int32_t check(int32_t result) {
  if (result >= 0) return result;
  fprintf(stderr, "generate: %s\n", slm_last_error());
  exit(1);
}

static size_t read_tokens(int argc, char **argv, int32_t *tokens, size_t room) {
  size_t count = 0;
  for (int i = 0; i < argc && count < room; ++i) tokens[count++] = atoi(argv[i]);
  while (argc == 0 && count < room && scanf("%d", &tokens[count]) == 1) ++count;
  return count;
}

int main(int argc, char **argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: generate BUNDLE COUNT TEMPERATURE [TOKEN...]\n");
    return 2;
  }
  slm_model *model;
  slm_session *session;
  check(slm_open(argv[1], NULL, &model));
  check(slm_session_new(model, &session));

  /* One more than fits: a prompt that is too long gets the library's own message. */
  size_t room = (size_t)slm_context_size() + 1;
  int32_t *tokens = malloc(room * sizeof *tokens);
  if (!tokens) return 1;
  size_t count = read_tokens(argc - 4, argv + 4, tokens, room);
  check(slm_eval(session, tokens, count, NULL));
  free(tokens);

  slm_sampling sampling = {.size = sizeof sampling, .temperature = strtof(argv[3], NULL)};
  for (long left = atol(argv[2]); left > 0; --left) {
    int32_t token = check(slm_sample(session, &sampling));
    printf("%d\n", token);
    fflush(stdout);
    if (left == 1 || slm_position(session) == slm_context_size()) break;
    check(slm_eval(session, &token, 1, NULL));
  }
  check(slm_session_free(session));
  return check(slm_close(model));
}
