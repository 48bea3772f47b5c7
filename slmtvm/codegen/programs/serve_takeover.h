/* A server that goes on as another process, of the program and bundle that lie at their paths by then.
 *
 * SIGHUP starts the program anew, with the listening socket and a channel to it. That one opens the bundle
 * as any other does, says that it is ready, and waits for the word to go; then the old one listens no more,
 * hands over each connection between two requests, and ends when the requests that run on it have. Where
 * the new one ends before it is ready, nothing has happened. */
#ifndef SLM_SERVE_TAKEOVER_H
#define SLM_SERVE_TAKEOVER_H

#include "serve.h"

/* Call it first: keeps the command line for the next one, and takes what the one before left. */
void takeover_begin(char **argv);

/* ---- the new one ---- */

int taking_over(void);         /* whether there is one before */
int inherited_listener(void);  /* its socket, or -1 */
/* Waits for the word to go; 0, or -1 where the one before has ended, or does without. */
int takeover_ready(void);
int handed_over_by(void);      /* where connections come from, or -1 */
/* A connection that the one before handed over; -1 where there is none yet. */
int take_connection(void);

/* ---- the old one ---- */

/* SIGHUP came. */
void ask_for_takeover(void);
/* Starts the next one where that was asked for, and hears from it; 1 once it has taken over `listener`. */
int takeover_round(int listener, double now);
/* Gives a connection between two requests away; 0 where that is not possible now. */
int give_connection(int fd);
int handed_over(void);
/* This server is to stop: so does what was started, unless a service manager sees to that. */
void takeover_cancel(void);
/* Unless a service manager follows the new process, stays in its place: passes signals on, and ends as the
 * new one does. Its exit status. */
int stand_for_next(void);

#endif
