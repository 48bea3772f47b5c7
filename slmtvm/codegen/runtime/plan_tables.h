/* The static plan as C tables; a generated file of each library defines slm_plan. */
#ifndef SLM_PLAN_TABLES_H
#define SLM_PLAN_TABLES_H

#include <stddef.h>
#include <stdint.h>

/* Most arguments that a kernel may have; the code generator refuses more. */
#define SLM_MAX_ARGS 32

/* Where an argument lies; the values are those of slmtvm.plan.model.Space. */
enum slm_space {
  SLM_SPACE_WEIGHTS,
  SLM_SPACE_STATE,
  SLM_SPACE_ARENA,
  SLM_SPACE_SCRATCH,
  SLM_SPACE_TOKENS,
  SLM_SPACE_OUTPUT,
  SLM_SPACES
};

/* An argument is its space in the low byte and its offset in the rest: tables without pointers need
 * no relocations when the library is loaded. */
#define SLM_REF(space, offset) (((uint64_t)(offset) << 8) | (uint64_t)(space))
#define SLM_REF_SPACE(ref) ((int)((ref) & 0xff))
#define SLM_REF_OFFSET(ref) ((size_t)((ref) >> 8))

typedef void (*slm_kernel)(void **args, int32_t position, int32_t valid, int32_t begin,
                           int32_t end);

enum {
  SLM_STEP_PARALLEL = 1,  /* worth the cost of waking the workers */
  SLM_STEP_BY_SESSION = 2 /* called for each row, with the state and the position of its session */
};

/* One by session has, behind the `args` references, as many that say what a row's part of each argument
 * is: SLM_REF(is it written, bytes); 0 bytes where all rows have the same. */
typedef struct slm_step {
  uint16_t kernel;
  uint8_t args;
  uint8_t flags;
  uint32_t first_ref;
  int32_t grid;
} slm_step;

typedef struct slm_function {
  int32_t rows;
  uint32_t first_step;
  uint32_t steps;
} slm_function;

/* Where a decoded token may end: `stem` goes on from the exit before, or begins with the token, to a
 * hidden row, of which `head` makes logits and `fill` the keys and values of the layers behind. A token
 * ends where its first logit is `margin` ahead of the second. */
typedef struct slm_exit {
  slm_function stem, head, fill;
  float margin;
} slm_exit;

/* An output: rows of `features` floats from `offset` of SLM_SPACE_OUTPUT on, a pooled one's of an
 * encoder only one. */
typedef struct slm_plan_output {
  const char *name;
  int32_t features;
  int32_t pooled;
  uint64_t offset;
} slm_plan_output;

/* What hidden tokens are: not allowed, keys without weight, or left out. */
enum slm_mask { SLM_MASK_NONE, SLM_MASK_KEYS, SLM_MASK_SKIP };

typedef struct slm_plan_tables {
  const char *info;
  const char *target;
  const char *const *requires; /* CPU features, ends with NULL */
  const slm_kernel *kernels; /* NULL where a device has its own */
  const struct slm_device *device; /* that runs the steps; NULL: this processor */
  const slm_step *steps;
  const uint64_t *refs;
  const slm_function *bodies; /* most rows first */
  const slm_function *heads;  /* most rows first; none for an encoder */
  const slm_function *sources; /* most rows first; an encoder-decoder's only */
  const slm_function *batches; /* bodies of rows of different sessions, most rows first */
  const slm_function *batch_heads; /* one for each of these */
  const slm_exit *exits; /* exit_count, and then a stem that goes on to what the heads read */
  const slm_plan_output *outputs; /* the one that slm_encode and slm_eval give first */
  int32_t kernel_count;
  int32_t body_count;
  int32_t head_count;
  int32_t source_count;
  int32_t batch_count;
  int32_t exit_count;
  int32_t output_count;
  int32_t encoder;
  int32_t context;
  int32_t source_context;
  int32_t capacity;
  int32_t threads; /* as many as pay; 0: not known */
  int32_t ring; /* once more positions were written than this, ... ; 0: never */
  int32_t seek_reach; /* ... sessions go on from those alone that lie no further before their end */
  int32_t mask;
  int32_t weights_have_places; /* kernels read where to read: never unchecked */
  int32_t segment_types; /* 0: tokens are of one text */
  int32_t final_token; /* that every sequence must end with; -1: any */
  int32_t vocab_size;
  int32_t output_size; /* features of the first output */
  int32_t hidden_size;
  uint64_t hidden_offset; /* of the arena */
  uint64_t segments_offset; /* of the state: int32 by position, where there are types */
  uint64_t limits_offset; /* of the state: floats, where hidden tokens are keys without weight */
  uint64_t state_bytes;
  uint64_t arena_bytes;
  uint64_t scratch_bytes; /* for each thread */
  uint64_t output_bytes;
  uint64_t weights_bytes; /* the whole file, header included */
  uint64_t weights_id;
  uint32_t weights_count;
} slm_plan_tables;

extern const slm_plan_tables slm_plan __attribute__((visibility("hidden")));

#endif
