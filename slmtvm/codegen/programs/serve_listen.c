/* The socket that connections come to: of an address of this machine, or a file. */
#define _GNU_SOURCE
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "serve_loop.h"
#include "serve_takeover.h"

enum { BACKLOG = 64 };

int is_loopback(const char *host) {
  return strcmp(host, "localhost") == 0 || strcmp(host, "::1") == 0 || strncmp(host, "127.", 4) == 0;
}

static int cannot_listen(const char *where) {
  fprintf(stderr, "slm-serve: error: cannot listen on %s: %s\n", where, strerror(errno));
  return -1;
}

/* A socket file that nobody listens on any more is in the way of the next one. */
static void remove_stale(const struct sockaddr_un *address) {
  struct stat found;
  if (lstat(address->sun_path, &found) < 0 || !S_ISSOCK(found.st_mode)) return;
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  if (connect(fd, (const struct sockaddr *)address, sizeof *address) < 0 && errno == ECONNREFUSED)
    unlink(address->sun_path);
  close(fd);
}

static int listen_unix(const char *path) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(path) >= sizeof address.sun_path) return errno = ENAMETOOLONG, cannot_listen(path);
  strcpy(address.sun_path, path);
  remove_stale(&address);
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  mode_t mask = umask(0177); /* for this user alone */
  int bound = fd >= 0 && bind(fd, (const struct sockaddr *)&address, sizeof address) == 0;
  umask(mask);
  if (!bound || listen(fd, BACKLOG) < 0) {
    cannot_listen(path);
    if (fd >= 0) close(fd);
    return -1;
  }
  printf("slm-serve: listening on unix:%s\n", path);
  return fd;
}

static int listen_tcp(const char *host, long port) {
  char service[8], where[300];
  struct addrinfo hints = {.ai_flags = AI_PASSIVE | AI_NUMERICHOST | AI_NUMERICSERV,
                           .ai_socktype = SOCK_STREAM}, *found;
  snprintf(service, sizeof service, "%ld", port);
  snprintf(where, sizeof where, "%.256s, port %ld", host, port);
  if (getaddrinfo(strcmp(host, "localhost") == 0 ? "127.0.0.1" : host, service, &hints, &found)) {
    fprintf(stderr, "slm-serve: error: --host %s is no address: give a number such as 127.0.0.1\n",
            host);
    return -1;
  }
  int yes = 1, fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  struct sockaddr_storage own;
  socklen_t length = sizeof own;
  if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes) < 0 ||
      bind(fd, found->ai_addr, found->ai_addrlen) < 0 || listen(fd, BACKLOG) < 0 ||
      getsockname(fd, (struct sockaddr *)&own, &length) < 0) {
    cannot_listen(where);
    if (fd >= 0) close(fd);
    fd = -1;
  } else {
    int six = own.ss_family == AF_INET6;
    in_port_t bound = six ? ((struct sockaddr_in6 *)&own)->sin6_port
                          : ((struct sockaddr_in *)&own)->sin_port;
    printf("slm-serve: listening on http://%s%s%s:%d\n", six ? "[" : "", host, six ? "]" : "",
           ntohs(bound));
  }
  freeaddrinfo(found);
  return fd;
}

int start_listening(const serve_options *o) {
  if (inherited_listener() >= 0) return inherited_listener();
  return o->unix_path ? listen_unix(o->unix_path) : listen_tcp(o->host, o->port);
}
