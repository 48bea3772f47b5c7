/* Which cores this process may really use, and how many threads pay.
 *
 * A thread that has no core to run on, or shares a quota of time with the others, only makes them
 * wait. So three things bound the number: the cores that the process is bound to (affinity), its
 * control group's quota of time (version 2: cpu.max; version 1: cpu.cfs_quota_us), and, of cores that
 * differ in speed, how many are fast: parts are handed out evenly at first, and a slow core takes its
 * part three times as long.
 */
#define _GNU_SOURCE
#include "cores.h"

#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "error.h"
#include "pool.h"
#include "slm.h"

enum {
  FILE_BYTES = 4096,
  /* Of the fastest core's speed: what is slower is of another kind (an A55 beside an A76 has 0.5, a
   * cluster of the same cores with another clock 0.9). */
  FAST_PERCENT = 70
};

/* Reads a small file into `text` as a string; whether there is one. */
static int read_file(const char *path, char text[FILE_BYTES]) {
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return 0;
  size_t length = 0;
  ssize_t got;
  while (length < FILE_BYTES - 1 && (got = read(file, text + length, FILE_BYTES - 1 - length)) > 0)
    length += (size_t)got;
  close(file);
  text[length] = 0;
  return length > 0;
}

/* A line's part after `prefix`, in `text`; NULL where no line begins so. */
static char *after_prefix(char *text, const char *prefix) {
  for (char *line = text; line; line = strchr(line, '\n')) {
    if (*line == '\n') ++line;
    if (strncmp(line, prefix, strlen(prefix)) == 0) return line + strlen(prefix);
  }
  return NULL;
}

/* Cores' worth of time in a group's files; a large number where there is no bound. */
static double group_quota(const char *root, const char *mount, const char *group, int version) {
  char path[PATH_MAX], text[FILE_BYTES];
  double quota = -1, period = 100000;
  const char *name = version == 2 ? "cpu.max" : "cpu.cfs_quota_us";
  if (snprintf(path, sizeof path, "%s%s%s/%s", root, mount, group, name) >= (int)sizeof path ||
      !read_file(path, text))
    return INT_MAX;
  if (version == 2) {
    if (sscanf(text, "%lf %lf", &quota, &period) < 1) return INT_MAX; /* "max" */
  } else {
    quota = atof(text);
    snprintf(path, sizeof path, "%s%s%s/cpu.cfs_period_us", root, mount, group);
    if (read_file(path, text)) period = atof(text);
  }
  return quota > 0 && period > 0 ? quota / period : INT_MAX;
}

/* The smallest quota of the group and those it lies in; `group` is cut up. */
static double smallest_quota(const char *root, const char *mount, char *group, int version) {
  double smallest = INT_MAX;
  group[strcspn(group, "\n")] = 0;
  for (;;) {
    double quota = group_quota(root, mount, strcmp(group, "/") ? group : "", version);
    if (quota < smallest) smallest = quota;
    char *last = strrchr(group, '/');
    if (!last || !*group) return smallest;
    *last = 0;
  }
}

/* Where the process is in the hierarchy that bounds time, from /proc/self/cgroup: "0::/a/b" or
 * "4:cpu,cpuacct:/a/b". */
static double quota_of_process(const char *root) {
  char path[PATH_MAX], text[FILE_BYTES];
  snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
  if (!read_file(path, text)) return INT_MAX;
  double smallest = INT_MAX;
  char *unified = after_prefix(text, "0::");
  if (unified) {
    char group[FILE_BYTES];
    strcpy(group, unified);
    smallest = smallest_quota(root, "/sys/fs/cgroup", group, 2);
  }
  for (char *line = text; line; line = strchr(line, '\n')) {
    if (*line == '\n') ++line;
    char *names = strchr(line, ':'), *end = names ? strchr(names + 1, ':') : NULL;
    if (!end) continue;
    char listed[FILE_BYTES], group[FILE_BYTES];
    snprintf(listed, sizeof listed, ",%.*s,", (int)(end - names - 1), names + 1);
    if (!strstr(listed, ",cpu,")) continue;
    strcpy(group, end + 1);
    double quota = smallest_quota(root, "/sys/fs/cgroup/cpu", group, 1);
    if (quota < smallest) smallest = quota;
  }
  return smallest;
}

/* How fast a core is, in a unit that is the same for all cores of a machine; 0 where unknown. */
static long core_speed(const char *root, int core) {
  static const char *const names[] = {"cpu_capacity", "cpufreq/cpuinfo_max_freq"};
  char path[PATH_MAX], text[FILE_BYTES];
  for (size_t i = 0; i < sizeof names / sizeof *names; ++i) {
    snprintf(path, sizeof path, "%s/sys/devices/system/cpu/cpu%d/%s", root, core, names[i]);
    if (read_file(path, text) && atol(text) > 0) return atol(text);
  }
  return 0;
}

/* The fast cores of `set`; all where nothing is known of one. */
static cpu_set_t fast_cores(const char *root, const cpu_set_t *set) {
  long speeds[CPU_SETSIZE], fastest = 0;
  cpu_set_t fast;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (!CPU_ISSET(i, set)) continue;
    speeds[i] = core_speed(root, i);
    if (speeds[i] == 0) return *set;
    if (speeds[i] > fastest) fastest = speeds[i];
  }
  CPU_ZERO(&fast);
  for (int i = 0; i < CPU_SETSIZE; ++i)
    if (CPU_ISSET(i, set) && speeds[i] * 100 >= fastest * FAST_PERCENT) CPU_SET(i, &fast);
  return fast;
}

/* Reads "4-7,9" into `set`; whether it is such a list. */
static int parse_list(const char *list, cpu_set_t *set) {
  CPU_ZERO(set);
  for (const char *at = list;;) {
    char *end;
    if (*at < '0' || *at > '9') return 0;
    long first = strtol(at, &end, 10), last = first;
    if (*end == '-') {
      at = end + 1;
      if (*at < '0' || *at > '9') return 0;
      last = strtol(at, &end, 10);
    }
    if (first > last || last >= CPU_SETSIZE) return 0;
    for (long i = first; i <= last; ++i) CPU_SET((int)i, set);
    if (*end == 0) return 1;
    if (*end != ',') return 0;
    at = end + 1;
  }
}

static void cores_of_process(cpu_set_t *set) {
  CPU_ZERO(set);
  if (sched_getaffinity(0, sizeof *set, set) == 0 && CPU_COUNT(set) > 0) return;
  long online = sysconf(_SC_NPROCESSORS_ONLN);
  for (int i = 0; i < (online < 1 ? 1 : online) && i < CPU_SETSIZE; ++i) CPU_SET(i, set);
}

static int32_t take_list(const char *list, cpu_set_t *set) {
  cpu_set_t listed, both;
  if (!parse_list(list, &listed))
    return slm_fail(SLM_ERR_ARGUMENT, "cores is \"%.40s\", must be a list such as \"4-7,9\"", list);
  CPU_AND(&both, &listed, set);
  if (!CPU_EQUAL(&both, &listed))
    return slm_fail(SLM_ERR_ARGUMENT, "cores is \"%.40s\", of which this process may use %d of %d",
                    list, CPU_COUNT(&both), CPU_COUNT(&listed));
  *set = listed;
  return SLM_OK;
}

/* Writes `set` as a list; cut short where it is too long. */
static void write_list(const cpu_set_t *set, char *text, size_t size) {
  size_t length = 0;
  text[0] = 0;
  for (int i = 0; i < CPU_SETSIZE && length < size; ++i) {
    if (!CPU_ISSET(i, set)) continue;
    int first = i;
    while (i + 1 < CPU_SETSIZE && CPU_ISSET(i + 1, set)) ++i;
    const char *comma = length ? "," : "";
    int more = first == i ? snprintf(text + length, size - length, "%s%d", comma, i)
                          : snprintf(text + length, size - length, "%s%d-%d", comma, first, i);
    length += (size_t)more;
  }
}

int32_t slm_cores_choose(int asked, const char *list, int all, const char *root, slm_cores *cores) {
  memset(cores, 0, sizeof *cores);
  cpu_set_t set;
  cores_of_process(&set);
  if (list) {
    int32_t code = take_list(list, &set);
    if (code != SLM_OK) return code;
    cores->pinned = 1;
  }
  int there = CPU_COUNT(&set);
  cpu_set_t fast = fast_cores(root, &set);
  int fast_count = CPU_COUNT(&fast);
  cores->mixed = fast_count < there;
  snprintf(cores->why, sizeof cores->why, "%d core%s %s", there, there == 1 ? "" : "s",
           list ? "listed" : "to run on");
  if (asked == 0 && cores->mixed) {
    snprintf(cores->why, sizeof cores->why, "%d of %d cores are fast", fast_count, there);
    set = fast;
    cores->pinned = 1;
    cores->mixed = 0;
    there = fast_count;
  }
  double quota = quota_of_process(root);
  if (quota < there) {
    int whole = (int)quota;
    snprintf(cores->why, sizeof cores->why, "the control group's quota is %.4g core%s", quota,
             quota == 1 ? "" : "s");
    there = whole < quota || whole == 0 ? whole + 1 : whole;
  }
  cores->count = there;
  cores->all = all;
  cores->threads = asked && (all || asked < there) ? asked : there;
  if (cores->threads == asked) snprintf(cores->why, sizeof cores->why, "as asked for");
  if (cores->threads > SLM_MAX_THREADS) cores->threads = SLM_MAX_THREADS;
  memcpy(cores->set, &set, sizeof set);
  write_list(&set, cores->list, sizeof cores->list);
  return SLM_OK;
}

void slm_cores_bind(const slm_cores *cores) {
  if (!cores->pinned) return;
  cpu_set_t set;
  memcpy(&set, cores->set, sizeof set);
  sched_setaffinity(0, sizeof set, &set); /* where a core has gone, any other will do */
}

_Static_assert(sizeof(cpu_set_t) == sizeof(((slm_cores *)0)->set), "slm_cores.set is a cpu_set_t");
