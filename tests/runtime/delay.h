/* Included before pool.c: what it calls at the beginning of each part. */
#define SLM_POOL_DELAY(thread, part) delay_part(thread, part)
void delay_part(int thread, int part);
