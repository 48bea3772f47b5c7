/* Evaluates tokens one by one, to their logits, between marks that the counting plugin reads.
 *
 *   slm_decode BUNDLE PROMPT_TOKENS COUNT */
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "slm.h"

enum { MARK_BEGIN = 9001, MARK_END = 9002, CONTEXT = 1024, FIRST_TOKEN = 1000 };

static void check(int32_t status) {
  if (status >= 0) return;
  fprintf(stderr, "error %d: %s\n", status, slm_last_error());
  exit(3);
}

int main(int argc, char **argv) {
  if (argc != 4) return 2;
  slm_model *model;
  slm_session *session;
  slm_options options = {sizeof options, 1, SLM_SKIP_CHECKSUM};
  check(slm_open(argv[1], &options, &model));
  check(slm_session_new(model, &session));
  int32_t prompt[CONTEXT];
  int count = atoi(argv[2]);
  for (int i = 0; i < count; ++i) prompt[i] = FIRST_TOKEN + i;
  check(slm_eval(session, prompt, (size_t)count, NULL));
  check(slm_eval(session, prompt, 1, NULL));
  syscall(MARK_BEGIN);
  for (int i = atoi(argv[3]); i > 0; --i) check(slm_eval(session, prompt, 1, NULL));
  syscall(MARK_END);
  return 0;
}
