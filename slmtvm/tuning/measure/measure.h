/* What a program that measures kernels is told about them: the compiler writes a table of this. */
#ifndef SLM_MEASURE_H
#define SLM_MEASURE_H

#include <stddef.h>
#include <stdint.h>

enum {
  FILL_OUTPUT, /* bytes that no kernel writes */
  FILL_BYTES,  /* low .. high */
  FILL_INT32,  /* low .. high */
  FILL_F32,    /* low .. high */
  FILL_F16,    /* of magnitudes 2^-7 .. 2^-6 */
  FILL_SUMS,   /* float32: of each `low` bytes of the buffer `of` */
  FILL_GIVEN,  /* `given` */
  FILL_STARTS, /* int32: i * low */
  FILL_PLACES  /* uint16: (i mod high) * low */
};

typedef struct {
  size_t bytes;
  int fill;
  double low, high;
  int of;            /* an earlier buffer */
  int cycled;        /* whether each call reads another copy, as the layers of a model do */
  int result;        /* whether its content after a call must be the reference's */
  const void *given;
} slm_measured_buffer;

typedef struct {
  /* args: a pointer for each buffer. */
  void (*run)(void **args, int32_t position, int32_t valid, int32_t begin, int32_t end);
  int32_t grid, buffers;
  const slm_measured_buffer *buffer;
  size_t scratch_bytes; /* of each thread; where not 0, it is the last argument */
} slm_candidate;

/* Where buffers lie that the host does not reach by itself. What it is given are the host's copies. */
typedef struct {
  void (*start)(void);
  void *(*memory)(size_t bytes);                     /* zeroed */
  void (*written)(const void *data, size_t bytes);   /* the host has */
  void (*wanted)(void *data, size_t bytes);          /* the host will see what candidates wrote */
  void (*wait)(void);                                /* for all calls so far */
} slm_place;

extern const slm_place *const slm_measured_place; /* NULL: the host's memory */
extern const int slm_candidate_count; /* the first is the reference */
extern const slm_candidate slm_candidates[];
extern const int32_t slm_measured_position, slm_measured_valid;

#endif
