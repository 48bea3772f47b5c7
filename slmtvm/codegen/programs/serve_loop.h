/* Sockets, and the one loop that everything happens in. */
#ifndef SLM_SERVE_LOOP_H
#define SLM_SERVE_LOOP_H

#include "serve.h"

/* serve_listen.c */
int is_loopback(const char *host);
/* A descriptor, or -1 after saying why not; says where it listens. */
int start_listening(const serve_options *o);

/* SIGTERM and SIGINT come only where the loop waits; call it before threads are made. 0, or -1. */
int block_signals(void);

/* Until a signal; 0, or -1 after saying why not. */
int serve(server *s);

#endif
