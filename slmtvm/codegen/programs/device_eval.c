/* slm-device: what a bundle computes.
 *
 *   eval THREADS
 *
 * On standard input a request: int32 operation, flags, count, first, source; then what the flags say is
 * there, in this order: `source` tokens and as many bytes of a mask; `count` tokens, as many bytes of a
 * mask, as many int32 of segments. All integers are little endian, as on all targets. On standard
 * output float32 rows:
 *   EVAL     after each of a decoder's tokens from `first` on
 *   ENCODE   slm_encode's output; of an encoder-decoder hidden states
 *   OUTPUTS  all outputs, one after the other
 * Before EVAL and OUTPUTS an encoder-decoder reads the source. */
#include <stdio.h>
#include <string.h>

#include "device.h"
#include "plan_tables.h"

enum { EVAL, ENCODE, OUTPUTS };
enum { HAS_MASK = 1, HAS_SOURCE_MASK = 2, HAS_SEGMENTS = 4 };

typedef struct {
  int32_t operation, flags, count, first, source;
} header;

/* What the request says follows; NULL where the flag is not set. */
static void *take(int there, size_t bytes) {
  if (!there) return NULL;
  void *data = device_memory(bytes);
  if (fread(data, 1, bytes, stdin) != bytes) exit(device_cannot("the request is cut off"));
  return data;
}

static int give(const float *values, size_t count) {
  return fwrite(values, sizeof *values, count, stdout) == count;
}

/* Float values of one row of every encoder call's first output. */
static size_t encoded_floats(int32_t count) {
  if (slm_plan.source_count) return (size_t)count * (size_t)slm_plan.hidden_size;
  size_t rows = slm_plan.outputs[0].pooled ? 1 : (size_t)count;
  return rows * (size_t)slm_output_size();
}

static int give_outputs(slm_session *session, int32_t count) {
  for (int32_t i = 0; i < slm_output_count(); ++i) {
    slm_output output = {.size = sizeof output};
    if (slm_output_info(i, &output) < 0) return 0;
    size_t rows = output.pooled || !slm_plan.encoder ? 1 : (size_t)count;
    float *values = device_memory(rows * (size_t)output.features * sizeof *values);
    int given = slm_output_get(session, i, values) >= 0 && give(values, rows * (size_t)output.features);
    free(values);
    if (!given) return 0;
  }
  return 1;
}

/* What comes before the rows that are wanted. A call without logits must end with a visible token;
 * hidden ones behind it are evaluated for rows of zeros. */
static int32_t before(slm_session *session, const int32_t *tokens, const uint8_t *mask,
                      size_t count) {
  size_t seen = count;
  while (mask && seen > 0 && !mask[seen - 1]) --seen;
  int32_t code = seen ? slm_eval_masked(session, tokens, mask, seen, NULL) : SLM_OK;
  if (code < 0 || seen == count) return code;
  float *rows = device_memory((count - seen) * (size_t)slm_output_size() * sizeof *rows);
  code = slm_eval_all_masked(session, tokens + seen, mask + seen, count - seen, rows);
  free(rows);
  return code;
}

/* A negative code, or whether all was written. */
static int32_t answer(slm_session *session, const header *h, const int32_t *tokens,
                      const uint8_t *mask, const int32_t *segments) {
  size_t count = (size_t)h->count, first = (size_t)h->first;
  int32_t code;
  if (h->operation == OUTPUTS) {
    code = slm_plan.encoder ? slm_encode_segments(session, tokens, segments, mask, count, NULL)
                            : slm_eval_masked(session, tokens, mask, count, NULL);
    return code < 0 ? code : give_outputs(session, h->count);
  }
  size_t floats = h->operation == ENCODE ? encoded_floats(h->count)
                                         : (count - first) * (size_t)slm_output_size();
  float *rows = device_memory(floats * sizeof *rows);
  if (h->operation == ENCODE) {
    code = slm_encode_segments(session, tokens, segments, mask, count, rows);
  } else {
    code = before(session, tokens, mask, first);
    if (code >= 0)
      code = slm_eval_all_masked(session, tokens + first, mask ? mask + first : NULL, count - first,
                                 rows);
  }
  if (code >= 0) code = give(rows, floats);
  free(rows);
  return code;
}

int device_eval(const char *bundle, int count, char **arguments) {
  if (count != 1) return DEVICE_USAGE;
  int32_t threads = device_number(arguments[0], 0, 256);
  header h;
  slm_model *model;
  slm_session *session;
  if (fread(&h, sizeof h, 1, stdin) != 1) return device_cannot("the request is cut off");
  if (h.operation < EVAL || h.operation > OUTPUTS || h.count < 1 || h.count > 1 << 24 || h.first < 0 ||
      h.first >= h.count || h.source < 0 || h.source > 1 << 24 || h.flags < 0 || h.flags > 7)
    return device_cannot("the request is none");
  int32_t *source = take(h.source > 0, (size_t)h.source * sizeof *source);
  uint8_t *source_mask = take(h.flags & HAS_SOURCE_MASK, (size_t)h.source);
  int32_t *tokens = take(1, (size_t)h.count * sizeof *tokens);
  uint8_t *mask = take(h.flags & HAS_MASK, (size_t)h.count);
  int32_t *segments = take(h.flags & HAS_SEGMENTS, (size_t)h.count * sizeof *segments);
  /* `check` has compared the weights' checksum once, as they were when they came here. */
  if (device_open(bundle, threads, SLM_SKIP_CHECKSUM, &model, &session) < 0)
    return device_cannot(slm_last_error());
  int32_t code = source ? slm_encode_masked(session, source, source_mask, (size_t)h.source, NULL)
                        : SLM_OK;
  if (code >= 0) code = answer(session, &h, tokens, mask, segments);
  if (code < 0) return device_cannot(slm_last_error());
  device_close(model, session);
  free(source), free(source_mask), free(tokens), free(mask), free(segments);
  return code == 1 && fflush(stdout) == 0 ? DEVICE_OK : device_cannot("the answer cannot be written");
}
