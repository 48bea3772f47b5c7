/* What the CPU can do. */
#ifndef SLM_CPU_H
#define SLM_CPU_H

/* The first of `required` (ends with NULL) that this CPU or its operating system lacks, or NULL. */
const char *slm_cpu_missing(const char *const *required);

#endif
