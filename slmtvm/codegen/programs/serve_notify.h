/* What the service manager is told (sd_notify(3)): nothing where there is none. */
#ifndef SLM_SERVE_NOTIFY_H
#define SLM_SERVE_NOTIFY_H

/* Takes NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID of the environment. */
void notify_open(void);

int notifies(void); /* whether there is a service manager */

/* Sends a state, such as "READY=1". */
void notify(const char *state);

/* Says that the loop is alive, at most twice in each watchdog's time; `now` in seconds. */
void notify_alive(double now);

#endif
