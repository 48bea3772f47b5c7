#define _GNU_SOURCE
#include "serve_notify.h"

#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

static int manager = -1;
static double interval, last; /* seconds; no watchdog where `interval` is 0 */

void notify_open(void) {
  const char *path = getenv("NOTIFY_SOCKET"), *time = getenv("WATCHDOG_USEC");
  const char *whose = getenv("WATCHDOG_PID");
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  size_t length = path ? strlen(path) : 0;
  if (length < 2 || length >= sizeof address.sun_path || (path[0] != '/' && path[0] != '@')) return;
  memcpy(address.sun_path, path, length);
  if (path[0] == '@') address.sun_path[0] = 0; /* an abstract name, which has no file */
  manager = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (manager < 0) return;
  socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length);
  if (connect(manager, (struct sockaddr *)&address, size) < 0) {
    close(manager);
    manager = -1;
    return;
  }
  if (time && (!whose || strtol(whose, NULL, 10) == (long)getpid()))
    interval = strtod(time, NULL) / 2e6;
}

int notifies(void) { return manager >= 0; }

void notify(const char *state) {
  if (manager < 0) return;
  ssize_t sent = send(manager, state, strlen(state), MSG_NOSIGNAL | MSG_DONTWAIT);
  (void)sent; /* who does not listen misses it */
}

void notify_alive(double now) {
  if (!(interval > 0) || now - last < interval) return;
  last = now;
  notify("WATCHDOG=1");
}
