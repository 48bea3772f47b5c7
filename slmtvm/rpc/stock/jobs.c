/* What TVM's own RPC server loads to run programs: it offers to call functions of libraries only.
 *
 *   slm_run(folder, program, arguments, timeout_ms, memory_bytes, file_bytes)
 *   slm_read(folder, path)
 *
 * `arguments` are lines. A program has a process of its own, in `folder`, with stdin from the file
 * slm-stdin where there is one; what it writes lies in slm-stdout and slm-stderr. slm_run gives
 * microseconds << 16 | status & 0xffff, the status negative for a signal. slm_read copies the
 * beginning of a file, such as one of /proc, which has no size, to slm-stdout.
 *
 * The library names no libc as needed: the functions are those of whatever the server has loaded.
 * What it knows of TVM is its calling convention. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <tvm/ffi/c_api.h>

#define EXPORT __attribute__((visibility("default")))

enum { NO_TIME_LEFT = -1000, NOT_STARTED = -1001, BAD_CALL = -1002, CANNOT_EXECUTE = 126 };
enum { MOST_ARGUMENTS = 64, MOST_ARGUMENT_BYTES = 4096, MOST_FILES = 1024, MOST_READ = 1 << 20 };

/* The string of an argument, copied with its end; 0 where it is none or too long. */
static int text(const TVMFFIAny *from, char *to, size_t room) {
  const char *data = from->v_c_str;
  size_t size;
  if (from->type_index == kTVMFFIRawStr) {
    size = strlen(data);
  } else if (from->type_index == kTVMFFISmallStr) {
    data = from->v_bytes;
    size = from->small_str_len;
  } else if (from->type_index == kTVMFFIStr) {
    const TVMFFIByteArray *bytes = (const TVMFFIByteArray *)(from->v_obj + 1);
    data = bytes->data;
    size = bytes->size;
  } else {
    return 0;
  }
  if (size >= room) return 0;
  memcpy(to, data, size);
  to[size] = 0;
  return 1;
}

static int64_t microseconds(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static int opened(const char *name, int flags) { return open(name, flags | O_CLOEXEC, 0600); }

/* In the child: only what may be called between fork and exec. */
static _Noreturn void become(const char *folder, const char *program, char **arguments, int alive,
                             const struct rlimit *memory, const struct rlimit *file) {
  static const char sorry[] = "cannot be executed there\n";
  static char *const no_environment[] = {NULL};
  static const int ignored[] = {SIGPIPE, SIGXFSZ, SIGINT, SIGALRM};
  const struct rlimit none = {0, 0};
  setsid(); /* one group, to be ended together */
  prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
  for (size_t i = 0; i < sizeof ignored / sizeof *ignored; ++i) signal(ignored[i], SIG_DFL);
  if (chdir(folder) != 0) _exit(CANNOT_EXECUTE);
  int in = opened("slm-stdin", O_RDONLY);
  if (in < 0) in = opened("/dev/null", O_RDONLY);
  int out = opened("slm-stdout", O_WRONLY | O_CREAT | O_TRUNC);
  int errors = opened("slm-stderr", O_WRONLY | O_CREAT | O_TRUNC);
  if (dup2(in, 0) < 0 || dup2(out, 1) < 0 || dup2(errors, 2) < 0) _exit(CANNOT_EXECUTE);
  for (int i = 3; i < MOST_FILES; ++i)
    if (i != alive) close(i);
  setrlimit(RLIMIT_CORE, &none);
  setrlimit(RLIMIT_AS, memory);
  setrlimit(RLIMIT_FSIZE, file);
  chmod(program, 0700);
  execve(program, arguments, no_environment);
  (void)!write(2, sorry, sizeof sorry - 1);
  _exit(CANNOT_EXECUTE);
}

/* Whether a child, and all that it started, ended in time. Their end of a pipe closes then: nothing is
 * asked meanwhile, which would take time from what is measured. */
static int ended(int alive, int64_t deadline) {
  struct pollfd end = {.fd = alive, .events = POLLIN};
  for (;;) {
    int64_t left = (deadline - microseconds() + 999) / 1000;
    if (left <= 0) return 0;
    if (poll(&end, 1, left < INT_MAX ? (int)left : INT_MAX) > 0) return 1;
  }
}

/* The status of a child that has until `deadline`. */
static int awaited(pid_t child, int alive, int64_t deadline) {
  int status = 0, late = !ended(alive, deadline);
  for (;;) {
    if (late) {
      kill(-child, SIGKILL);
      kill(child, SIGKILL);
    }
    if (waitpid(child, &status, WNOHANG) != 0) break;
    late = late || microseconds() >= deadline; /* it may have closed all that it had */
    poll(NULL, 0, 1);
  }
  if (late) return NO_TIME_LEFT;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static int given(TVMFFIAny *result, int64_t value) {
  result->type_index = kTVMFFIInt;
  result->zero_padding = 0;
  result->v_int64 = value;
  return 0;
}

EXPORT int __tvm_ffi_slm_run(void *self, const TVMFFIAny *args, int32_t count, TVMFFIAny *result) {
  (void)self;
  char folder[PATH_MAX], program[NAME_MAX + 3] = "./", lines[MOST_ARGUMENT_BYTES];
  char *arguments[MOST_ARGUMENTS + 2] = {program};
  if (count != 6 || !text(&args[0], folder, sizeof folder) ||
      !text(&args[1], program + 2, sizeof program - 2) || !text(&args[2], lines, sizeof lines))
    return given(result, BAD_CALL & 0xffff);
  for (int i = 3; i < count; ++i)
    if (args[i].type_index != kTVMFFIInt || args[i].v_int64 < 0)
      return given(result, BAD_CALL & 0xffff);
  int number = 1;
  for (char *line = lines; *line && number <= MOST_ARGUMENTS; ++number) {
    arguments[number] = line;
    char *end = strchr(line, '\n');
    if (!end) break;
    *end = 0;
    line = end + 1;
  }
  const struct rlimit memory = {(rlim_t)args[4].v_int64, (rlim_t)args[4].v_int64};
  const struct rlimit file = {(rlim_t)args[5].v_int64, (rlim_t)args[5].v_int64};
  int alive[2];
  if (pipe(alive) != 0) return given(result, NOT_STARTED & 0xffff);
  int64_t start = microseconds();
  pid_t child = fork();
  if (child == 0) become(folder, program, arguments, alive[1], &memory, &file);
  close(alive[1]);
  int status = NOT_STARTED;
  if (child > 0) status = awaited(child, alive[0], start + args[3].v_int64 * 1000);
  close(alive[0]);
  return given(result, (microseconds() - start) << 16 | (status & 0xffff));
}

EXPORT int __tvm_ffi_slm_read(void *self, const TVMFFIAny *args, int32_t count,
                              TVMFFIAny *result) {
  (void)self;
  char copy[PATH_MAX], path[PATH_MAX], block[4096];
  static const char name[] = "/slm-stdout";
  if (count != 2 || !text(&args[0], copy, sizeof copy - sizeof name) ||
      !text(&args[1], path, sizeof path))
    return given(result, BAD_CALL);
  strcat(copy, name);
  int to = opened(copy, O_WRONLY | O_CREAT | O_TRUNC), from = opened(path, O_RDONLY);
  int64_t total = from < 0 || to < 0 ? NOT_STARTED : 0;
  for (ssize_t size; total >= 0 && total < MOST_READ; total += size)
    if ((size = read(from, block, sizeof block)) <= 0 || write(to, block, (size_t)size) != size) break;
  if (from >= 0) close(from);
  if (to >= 0) close(to);
  return given(result, total);
}
