#define _GNU_SOURCE
#include "serve_takeover.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "serve_loop.h"
#include "serve_notify.h"

static const char VARIABLE[] = "SLM_SERVE_TAKEOVER"; /* LISTENER CHANNEL, descriptors */
static const char READY = 'R', GO = 'G', CONNECTION = 'C';
static const double START_SECONDS = 600; /* to open a bundle */

static char **command;
static int before = -1, listener_of_before = -1; /* of the new one */
static struct {
  pid_t pid; /* 0: there is none */
  int channel, taken, again;
  double since;
} next = {0, -1, 0, 0, 0}; /* of the old one */
static volatile sig_atomic_t asked;

void takeover_begin(char **argv) {
  command = argv;
  const char *given = getenv(VARIABLE);
  int listener, channel;
  if (given && sscanf(given, "%d %d", &listener, &channel) == 2 && listener > 2 && channel > 2 &&
      fcntl(listener, F_SETFD, FD_CLOEXEC) == 0 && fcntl(channel, F_SETFD, FD_CLOEXEC) == 0) {
    listener_of_before = listener;
    before = channel;
  }
  unsetenv(VARIABLE);
}

/* ---- the new one ---- */

int taking_over(void) { return before >= 0; }

int inherited_listener(void) { return listener_of_before; }

static ssize_t send_byte(int channel, char byte, int fd, int flags) {
  struct iovec part = {&byte, 1};
  union { char bytes[CMSG_SPACE(sizeof fd)]; struct cmsghdr aligned; } room = {{0}};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  if (fd >= 0) {
    message.msg_control = room.bytes;
    message.msg_controllen = sizeof room.bytes;
    struct cmsghdr *head = CMSG_FIRSTHDR(&message);
    head->cmsg_level = SOL_SOCKET;
    head->cmsg_type = SCM_RIGHTS;
    head->cmsg_len = CMSG_LEN(sizeof fd);
    memcpy(CMSG_DATA(head), &fd, sizeof fd);
  }
  return sendmsg(channel, &message, flags | MSG_NOSIGNAL);
}

int takeover_ready(void) {
  char word = 0;
  if (before < 0) return 0;
  ssize_t count = send_byte(before, READY, -1, 0);
  while (count >= 0 && (count = recv(before, &word, 1, 0)) < 0 && errno == EINTR) count = 0;
  if (count == 1 && word == GO) return 0;
  fprintf(stderr, "slm-serve: error: the server that asked for another one ended before it was ready\n");
  return -1;
}

int handed_over_by(void) { return before; }

int take_connection(void) {
  char word;
  int fd = -1;
  struct iovec part = {&word, 1};
  union { char bytes[CMSG_SPACE(sizeof fd)]; struct cmsghdr aligned; } room;
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = room.bytes,
                           .msg_controllen = sizeof room.bytes};
  if (before < 0) return -1;
  ssize_t count = recvmsg(before, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return -1;
  struct cmsghdr *head = count == 1 ? CMSG_FIRSTHDR(&message) : NULL;
  if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS &&
      head->cmsg_len == CMSG_LEN(sizeof fd)) {
    memcpy(&fd, CMSG_DATA(head), sizeof fd);
    return fd;
  }
  close(before); /* the one before has ended */
  before = -1;
  return -1;
}

/* ---- the old one ---- */

void ask_for_takeover(void) { asked = 1; }

int handed_over(void) { return next.taken; }

static void stays(const char *why) {
  fprintf(stderr, "slm-serve: error: %s; this version stays\n", why);
  notify("READY=1");
}

static void start(int listener, double now) {
  static const char once[] = "fd:";
  const char *key = getenv("SLM_WEIGHTS_KEY");
  int ends[2];
  char value[64], state[96];
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  snprintf(state, sizeof state, "RELOADING=1\nMONOTONIC_USEC=%lld",
           (long long)t.tv_sec * 1000000 + t.tv_nsec / 1000);
  notify(state);
  if (key && strncmp(key, once, sizeof once - 1) == 0)
    return stays("SLM_WEIGHTS_KEY: a descriptor gives its key once: another version cannot be opened");
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) < 0) return stays(strerror(errno));
  snprintf(value, sizeof value, "%d %d", listener, ends[1]);
  setenv(VARIABLE, value, 1);
  unsetenv("WATCHDOG_PID"); /* of this process; the next one is to be watched as well */
  fflush(stdout);
  pid_t pid = fork();
  if (pid == 0) {
    if (!notifies()) prctl(PR_SET_PDEATHSIG, SIGTERM); /* see stand_for_next */
    if (fcntl(listener, F_SETFD, 0) == 0 && fcntl(ends[1], F_SETFD, 0) == 0) execvp(command[0], command);
    static const char words[] = "slm-serve: error: the program cannot be started anew\n";
    ssize_t written = write(2, words, sizeof words - 1);
    (void)written;
    _exit(1);
  }
  unsetenv(VARIABLE);
  close(ends[1]);
  if (pid < 0) {
    close(ends[0]);
    return stays(strerror(errno));
  }
  next.pid = pid;
  next.channel = ends[0];
  next.since = now;
}

static void forget_next(void) {
  close(next.channel);
  kill(next.pid, SIGKILL); /* has ended, but where it took too long */
  waitpid(next.pid, NULL, 0);
  next.pid = 0;
  next.channel = -1;
}

void takeover_cancel(void) {
  if (next.pid && !next.taken) forget_next();
  else if (next.pid && !notifies()) kill(next.pid, SIGTERM);
}

int takeover_round(int listener, double now) {
  char word = 0, state[64];
  if (asked || (next.again && !next.pid)) {
    asked = next.again = 0;
    if (next.taken) kill(next.pid, SIGHUP);
    else if (next.pid) next.again = 1;
    else start(listener, now);
  }
  if (!next.pid || next.taken) return 0;
  ssize_t count = recv(next.channel, &word, 1, MSG_DONTWAIT);
  int waits = count < 0 && (errno == EAGAIN || errno == EINTR);
  if (waits && now - next.since < START_SECONDS) return 0;
  if (count == 1 && word == READY) {
    /* The service manager first: it listens to nobody but the process that it knows. */
    snprintf(state, sizeof state, "MAINPID=%ld\nREADY=1", (long)next.pid);
    notify(state);
    if (send_byte(next.channel, GO, -1, 0) == 1) {
      printf("slm-serve: process %ld goes on\n", (long)next.pid);
      fflush(stdout);
      next.taken = 1;
      if (next.again) kill(next.pid, SIGHUP);
      next.again = 0;
      return 1;
    }
    snprintf(state, sizeof state, "MAINPID=%ld", (long)getpid());
    notify(state);
  }
  forget_next();
  stays(waits ? "the new version took too long to open" : "the new version did not open");
  return 0;
}

int give_connection(int fd) {
  return next.taken && send_byte(next.channel, CONNECTION, fd, MSG_DONTWAIT) == 1;
}

int stand_for_next(void) {
  const struct timespec tick = {1, 0};
  int status = 0;
  sigset_t set;
  close(next.channel);
  if (notifies()) return 0;
  sigemptyset(&set);
  sigaddset(&set, SIGTERM);
  sigaddset(&set, SIGINT);
  sigaddset(&set, SIGHUP);
  sigaddset(&set, SIGCHLD);
  sigprocmask(SIG_BLOCK, &set, NULL);
  while (waitpid(next.pid, &status, WNOHANG) == 0) {
    int number = sigtimedwait(&set, NULL, &tick);
    if (number == SIGTERM || number == SIGINT || number == SIGHUP) kill(next.pid, number);
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
