/* The loop: what came in, a step of each request that runs, what goes out. */
#define _GNU_SOURCE
#include "serve_loop.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "serve_notify.h"
#include "serve_takeover.h"

/* Seconds. */
static const double IDLE_TIMEOUT = 60, WRITE_TIMEOUT = 30, CLOSING_TIMEOUT = 2, TICK = 0.5;
enum { KEPT_BYTES = 64 << 10 };

static volatile sig_atomic_t signals;

static void on_signal(int number) {
  if (number == SIGHUP) ask_for_takeover();
  else ++signals;
}

int block_signals(void) {
  struct sigaction action = {.sa_handler = on_signal};
  sigset_t set;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  /* A terminal that is closed ends what runs in it. */
  if (!isatty(STDIN_FILENO)) {
    sigaddset(&set, SIGHUP);
    sigaction(SIGHUP, &action, NULL);
  }
  signal(SIGPIPE, SIG_IGN);
  if (sigaction(SIGTERM, &action, NULL) < 0 || sigaction(SIGINT, &action, NULL) < 0 ||
      sigprocmask(SIG_BLOCK, &set, NULL) < 0) {
    fprintf(stderr, "slm-serve: error: signals: %s\n", strerror(errno));
    return -1;
  }
  return 0;
}

double seconds_now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- connections ---- */

static void set_state(connection *c, connection_state state) {
  c->state = state;
  c->since = seconds_now();
}

static void drop(server *s, connection *c) {
  if (c->state == WAITING || c->state == RUNNING) ++s->counters.cancelled;
  audit_end(s, c, 0);
  release_session(s, c);
  close(c->fd);
  c->fd = -1;
  /* What an unusually long request touched is given back to the system. */
  if (s->options.body_bytes > KEPT_BYTES)
    madvise(c->in + KEPT_BYTES, HEAD_BYTES + (size_t)s->options.body_bytes - KEPT_BYTES,
            MADV_DONTNEED);
  set_state(c, FREE);
}

static void refuse_connection(int fd) {
  static const char body[] = "{\"error\":{\"message\":\"too many connections (--connections)\","
                             "\"type\":\"server_error\",\"param\":null,\"code\":\"busy\"}}";
  char words[512];
  int length = snprintf(words, sizeof words,
                        "HTTP/1.1 503 %s\r\nContent-Type: application/json\r\nRetry-After: 1\r\n"
                        "Connection: close\r\nContent-Length: %zu\r\n\r\n%s",
                        http_reason(503), sizeof body - 1, body);
  ssize_t sent = send(fd, words, (size_t)length, MSG_NOSIGNAL | MSG_DONTWAIT);
  (void)sent; /* who does not read it sees the connection end */
  close(fd);
}

static connection *free_connection(server *s) {
  for (connection *c = s->connections; c < s->connections + s->options.connections; ++c)
    if (c->state == FREE) return c;
  return NULL;
}

static void begin_connection(connection *c, int fd) {
  int yes = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes); /* a Unix socket has none */
  c->fd = fd;
  c->in_length = c->out_begin = c->out_end = 0;
  c->begun = c->hung_up = c->continued = 0;
  c->job = (job){0};
  set_state(c, READING);
}

static void accept_connections(server *s, int listener) {
  for (;;) {
    int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    connection *c = free_connection(s);
    if (c) {
      begin_connection(c, fd);
    } else {
      ++s->counters.refused;
      refuse_connection(fd);
    }
  }
}

/* Those of the version before, which keeps them while there is no room here. */
static void take_connections(server *s) {
  connection *c;
  int fd;
  while ((c = free_connection(s)) && (fd = take_connection()) >= 0) begin_connection(c, fd);
}

/* What is between two requests goes to the next version. */
static void give_connections(server *s) {
  for (connection *c = s->connections; c < s->connections + s->options.connections; ++c)
    if (c->state == READING && c->in_length == 0 && c->out_end == 0 && give_connection(c->fd)) drop(s, c);
}

static void refuse_head(server *s, connection *c, int status, const char *message) {
  c->request.keep = 0;
  answer_error(s, c, status, "invalid_request_error", NULL, NULL, message);
}

/* Looks whether a whole request is there, and answers it. */
static void look_at_input(server *s, connection *c) {
  const char *wrong = "";
  size_t begin = 0;
  while (begin + 1 < c->in_length && c->in[begin] == '\r' && c->in[begin + 1] == '\n') begin += 2;
  if (begin) memmove(c->in, c->in + begin, c->in_length -= begin);
  if (c->in_length == 0) return;
  if (!c->begun) {
    c->begun = 1;
    c->since = seconds_now();
  }
  int code = http_parse(c->in, c->in_length, &c->request, &wrong);
  if (code == HTTP_MORE) {
    if (c->in_length >= HEAD_BYTES) refuse_head(s, c, 431, "the request's head is too long");
    return;
  }
  if (code != HTTP_READY) {
    refuse_head(s, c, code, wrong);
  } else if (c->request.head_bytes > HEAD_BYTES) {
    refuse_head(s, c, 431, "the request's head is too long");
  } else if (c->request.body_bytes > (size_t)s->options.body_bytes) {
    refuse_head(s, c, 413, "the request's body is too long (--max-body)");
  } else if (c->in_length - c->request.head_bytes >= c->request.body_bytes) {
    answer(s, c);
  } else if (c->request.expects_continue && !c->continued) {
    static const char words[] = "HTTP/1.1 100 Continue\r\n\r\n";
    memcpy(c->out + c->out_end, words, sizeof words - 1);
    c->out_end += sizeof words - 1;
    c->continued = 1;
  }
}

/* 0 where the connection is over. */
static int receive(server *s, connection *c) {
  char thrown[4096];
  int closing = c->state == CLOSING;
  size_t room = HEAD_BYTES + (size_t)s->options.body_bytes - c->in_length;
  ssize_t count = recv(c->fd, closing ? thrown : c->in + c->in_length,
                       closing ? sizeof thrown : room, 0);
  if (count < 0) return errno == EAGAIN || errno == EINTR;
  if (count == 0) return 0;
  if (closing) return 1;
  c->in_length += (size_t)count;
  look_at_input(s, c);
  return 1;
}

/* 0 where the connection is over. */
static int flush_output(connection *c) {
  while (c->out_begin < c->out_end) {
    ssize_t sent = send(c->fd, c->out + c->out_begin, c->out_end - c->out_begin, MSG_NOSIGNAL);
    if (sent < 0) return errno == EAGAIN || errno == EINTR;
    c->out_begin += (size_t)sent;
    c->since = seconds_now();
  }
  c->out_begin = c->out_end = 0;
  return 1;
}

/* All of an answer is out: the next request of the connection, which may be there already. */
static void next_request(server *s, connection *c) {
  audit_end(s, c, 1);
  if (!c->request.keep || s->stopping) {
    shutdown(c->fd, SHUT_WR);
    set_state(c, CLOSING); /* to close now would throw away what the other side has not read yet */
    return;
  }
  size_t used = c->request.head_bytes + c->request.body_bytes;
  memmove(c->in, c->in + used, c->in_length -= used);
  c->begun = c->continued = 0;
  c->job = (job){0};
  set_state(c, READING);
  look_at_input(s, c);
}

static int timed_out(server *s, connection *c, double now) {
  switch (c->state) {
    case READING:
      if (!c->begun) return now - c->since > IDLE_TIMEOUT || s->stopping;
      if (now - c->since > s->options.read_timeout)
        refuse_head(s, c, 408, "the request took too long to come in");
      return 0;
    case RUNNING:
    case WAITING:
      if (c->out_begin < c->out_end && now - c->since > WRITE_TIMEOUT) return 1;
      if (now - c->job.began > s->options.timeout) {
        release_session(s, c);
        answer_error(s, c, 504, "server_error", NULL, "timeout",
                     "the request took too long (--timeout)");
      }
      return 0;
    case ANSWERING:
    case FLUSHING: return now - c->since > WRITE_TIMEOUT;
    case CLOSING: return now - c->since > CLOSING_TIMEOUT;
    default: return 0;
  }
}

/* ---- the loop ---- */

static int can_step(connection *c) {
  return (c->state == RUNNING || c->state == ANSWERING) && out_room(c) >= EVENT_BYTES;
}

/* Sessions that are free go to the requests that have waited longest. */
static void hand_out_sessions(server *s) {
  for (;;) {
    connection *first = NULL;
    for (connection *c = s->connections; c < s->connections + s->options.connections; ++c)
      if (c->state == WAITING && (!first || c->job.number < first->job.number)) first = c;
    session_slot *slot = first ? find_session(s, first) : NULL;
    if (!slot) return;
    set_state(first, RUNNING);
    start_generation(s, first, slot);
  }
}

static void step(server *s, connection *c) {
  if (c->job.route == ROUTE_EMBEDDING)
    step_embeddings(s, c);
  else if (c->job.route == ROUTE_TOKENIZE || c->job.route == ROUTE_DETOKENIZE)
    step_tokens(s, c);
  else if (c->state == RUNNING)
    step_generation(s, c);
  else
    finish_generation(s, c);
}

/* The weights are read once for the next tokens of several texts. */
static void compute_together(server *s) {
  int count = 0;
  for (connection *c = s->connections; c < s->connections + s->options.connections; ++c)
    if (can_step(c) && wants_a_token(c)) s->together[count++] = c;
  if (count > 1) evaluate_together(s, count);
}

static void compute(server *s) {
  hand_out_sessions(s);
  compute_together(s);
  for (connection *c = s->connections; c < s->connections + s->options.connections; ++c) {
    if (can_step(c)) step(s, c);
    /* Several small requests of a connection may lie in its buffer. */
    for (int live = 1; live && c->state != FREE && c->state != CLOSING;) {
      if (!flush_output(c)) {
        drop(s, c);
      } else if (c->state == FLUSHING && c->out_end == 0) {
        next_request(s, c);
        continue;
      }
      live = 0;
    }
  }
}

static void handle_events(server *s, connection *c, short events) {
  if (events & (POLLERR | POLLNVAL)) return drop(s, c);
  if (c->state == READING || c->state == CLOSING) {
    if ((events & (POLLIN | POLLHUP | POLLRDHUP)) && !receive(s, c)) drop(s, c);
  } else if (events & POLLHUP) {
    drop(s, c);
  } else if ((events & POLLRDHUP) && (c->state == WAITING || c->state == RUNNING)) {
    drop(s, c); /* who asked has gone */
  }
}

static size_t list_events(server *s, int listener, struct pollfd *fds, connection **whose,
                          int *busy) {
  size_t count = 0;
  *busy = 0;
  /* What cannot be logged yet waits in the sockets. */
  if (listener >= 0 && !s->audit.waiting) {
    whose[count] = NULL;
    fds[count++] = (struct pollfd){listener, POLLIN, 0};
  }
  if (handed_over_by() >= 0 && !s->audit.waiting && free_connection(s)) {
    whose[count] = NULL;
    fds[count++] = (struct pollfd){handed_over_by(), POLLIN, 0};
  }
  for (connection *c = s->connections; c < s->connections + s->options.connections; ++c) {
    if (c->state == FREE) continue;
    short events = c->state == READING || c->state == CLOSING ? POLLIN
                   : c->state == WAITING || c->state == RUNNING ? POLLRDHUP : 0;
    if (c->out_begin < c->out_end) events |= POLLOUT;
    if (can_step(c) || (c->state == FLUSHING && c->out_end == 0)) *busy = 1;
    whose[count] = c;
    fds[count++] = (struct pollfd){c->fd, events, 0};
  }
  return count;
}

static int round_of_events(server *s, int listener, struct pollfd *fds, connection **whose) {
  int busy;
  sigset_t none;
  sigemptyset(&none);
  size_t count = list_events(s, listener, fds, whose, &busy);
  struct timespec wait = {0, busy ? 0 : (long)(TICK * 1e9)};
  int ready = ppoll(fds, count, &wait, &none);
  if (ready < 0 && errno != EINTR) {
    fprintf(stderr, "slm-serve: error: waiting for requests: %s\n", strerror(errno));
    return -1;
  }
  for (size_t i = 0; ready > 0 && i < count; ++i) {
    if (!fds[i].revents) continue;
    if (whose[i]) handle_events(s, whose[i], fds[i].revents);
    else if (fds[i].fd == listener) accept_connections(s, listener);
    else take_connections(s);
  }
  double now = seconds_now();
  for (connection *c = s->connections; c < s->connections + s->options.connections; ++c)
    if (c->state != FREE && timed_out(s, c, now)) drop(s, c);
  compute(s);
  return 0;
}

static int all_free(const server *s) {
  for (long i = 0; i < s->options.connections; ++i)
    if (s->connections[i].state != FREE) return 0;
  return 1;
}

/* Each connection takes a descriptor; without one left, accept would fail for ever. */
static int allow_descriptors(const serve_options *o) {
  enum { OTHERS = 16 };
  struct rlimit limit;
  rlim_t wanted = (rlim_t)o->connections + OTHERS;
  if (getrlimit(RLIMIT_NOFILE, &limit) < 0 || limit.rlim_cur >= wanted) return 0;
  limit.rlim_cur = wanted;
  if (wanted <= limit.rlim_max && setrlimit(RLIMIT_NOFILE, &limit) == 0) return 0;
  fprintf(stderr, "slm-serve: error: --connections %ld: this process may open %lu files (ulimit -n)\n",
          o->connections, (unsigned long)limit.rlim_max);
  return -1;
}

int serve(server *s) {
  const serve_options *o = &s->options;
  if (allow_descriptors(o) < 0) return -1;
  int listener = start_listening(o), code = 0;
  struct pollfd *fds = calloc((size_t)o->connections + 2, sizeof *fds);
  connection **whose = calloc((size_t)o->connections + 2, sizeof *whose);
  if (listener < 0 || !fds || !whose) code = -1;
  if (code == 0)
    printf("slm-serve: %s, %ld sessions, context %d; %.1f MB are taken besides the weights\n",
           o->name, o->sessions, s->model.context, (double)s->planned_bytes / 1e6);
  if (code == 0 && !s->model.tokenizer)
    printf("slm-serve: prompts must be token ids: %s\n", s->model.no_tokenizer);
  fflush(stdout);
  if (code == 0) code = takeover_ready();
  notify_open();
  if (code == 0) notify("READY=1");
  double stop_at = 0;
  while (code == 0) {
    if (!handed_over()) notify_alive(seconds_now());
    if (signals && !s->stopping) {
      s->stopping = 1;
      notify("STOPPING=1");
      stop_at = seconds_now() + (double)o->grace;
      takeover_cancel();
      if (listener >= 0) close(listener);
      listener = -1;
    }
    if (!s->stopping && takeover_round(listener, seconds_now())) {
      close(listener);
      listener = -1;
    }
    if (handed_over()) {
      give_connections(s);
      if (all_free(s)) break;
    }
    if (s->audit.waiting && (code = audit_resume(s)) < 0) break;
    if (s->stopping && (all_free(s) || signals > 1 || seconds_now() > stop_at)) break;
    code = round_of_events(s, listener, fds, whose);
  }
  for (connection *c = s->connections; c < s->connections + o->connections; ++c)
    if (c->state != FREE) drop(s, c);
  if (listener >= 0) close(listener);
  if (o->unix_path && code == 0 && !handed_over()) unlink(o->unix_path);
  free(fds);
  free(whose);
  return code;
}
