/* The audit log. What cannot be logged is not computed: while a line waits to be written, requests are
 * refused. */
#define _GNU_SOURCE
#include "serve_audit.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include "serve.h"
#include "serve_takeover.h"

static int cannot(const char *path, const char *why) {
  fprintf(stderr, "slm-serve: error: --audit %s: %s\n", path, why);
  return -1;
}

/* Takes up where the last line of the log ended. */
static int read_last(audit_log *log, const char *path, off_t size) {
  char tail[2 * AUDIT_LINE];
  size_t room = size < (off_t)sizeof tail ? (size_t)size : sizeof tail;
  if (pread(log->file, tail, room, size - (off_t)room) != (ssize_t)room)
    return cannot(path, strerror(errno));
  if (tail[room - 1] != '\n')
    return cannot(path, "its last line has no end: keep it under another name, and begin a new log");
  size_t end = room - 1, begin = end;
  while (begin > 0 && tail[begin - 1] != '\n') --begin;
  static const char start[] = "{\"line\":";
  unsigned long long line = 0;
  if (end - begin > sizeof start && memcmp(tail + begin, start, sizeof start - 1) == 0)
    line = strtoull(tail + begin + sizeof start - 1, NULL, 10);
  if (line == 0) return cannot(path, "is there already, and is no audit log");
  log->lines = line;
  slm_sha256 hash;
  slm_sha256_init(&hash);
  slm_sha256_update(&hash, tail + begin, end - begin);
  slm_sha256_final(&hash, log->last);
  return 0;
}

int audit_open(server *s) {
  const char *path = s->options.audit;
  audit_log *log = &s->audit;
  log->file = -1;
  if (!path) return 0;
  struct stat status;
  log->file = open(path, O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (log->file < 0 || fstat(log->file, &status) < 0) return cannot(path, strerror(errno));
  if (!S_ISREG(status.st_mode)) return cannot(path, "must be a file");
  log->waiting = taking_over();
  return audit_resume(s);
}

int audit_resume(server *s) {
  const char *path = s->options.audit;
  audit_log *log = &s->audit;
  struct stat status;
  if (flock(log->file, LOCK_EX | LOCK_NB) < 0)
    return log->waiting && errno == EWOULDBLOCK ? 0 : cannot(path, "another server writes it");
  log->waiting = 0;
  if (fstat(log->file, &status) < 0) return cannot(path, strerror(errno));
  return status.st_size ? read_last(log, path, status.st_size) : 0;
}

/* Writes the lines that wait; 0, or -1 where some, or the rest of one, have to wait longer. */
static int flush(audit_log *log) {
  while (log->pending_bytes) {
    ssize_t written = write(log->file, log->pending, log->pending_bytes);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return -1;
    log->pending_bytes -= (size_t)written;
    memmove(log->pending, log->pending + written, log->pending_bytes);
  }
  return 0;
}

void audit_close(server *s) {
  if (s->audit.file < 0) return;
  if (s->audit.pending_bytes && flush(&s->audit) < 0)
    fprintf(stderr, "slm-serve: error: --audit %s: its last lines could not be written: %s\n",
            s->options.audit, strerror(errno));
  close(s->audit.file);
}

int audit_begin(server *s, connection *c) {
  audit_entry *e = &c->job.audit;
  if (s->audit.file < 0) return 0;
  if (flush(&s->audit) < 0) return -1;
  slm_sha256 hash;
  slm_sha256_init(&hash);
  slm_sha256_update(&hash, c->in + c->request.head_bytes, c->request.body_bytes);
  slm_sha256_final(&hash, e->request);
  slm_sha256_init(&e->answer);
  size_t length = c->request.path.length;
  if (length >= sizeof e->path) length = sizeof e->path - 1;
  memcpy(e->path, c->request.path.at, length);
  e->path[length] = 0;
  e->open = 1;
  return 0;
}

void audit_answer(connection *c, const char *bytes, size_t length) {
  if (c->job.audit.open) slm_sha256_update(&c->job.audit.answer, bytes, length);
}

static void put_hash(writer *w, const char *name, const uint8_t *hash) {
  put_format(w, "\"%s\":\"", name);
  for (int i = 0; i < SLM_SHA256_BYTES; ++i) put_format(w, "%02x", hash[i]);
  put(w, "\"");
}

void audit_end(server *s, connection *c, int whole) {
  audit_log *log = &s->audit;
  audit_entry *e = &c->job.audit;
  if (!e->open) return;
  e->open = 0;
  uint8_t answer[SLM_SHA256_BYTES];
  slm_sha256_final(&e->answer, answer);
  time_t now = time(NULL);
  struct tm utc;
  char when[32] = "";
  if (gmtime_r(&now, &utc)) strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &utc);
  writer w = {log->pending + log->pending_bytes, 0, AUDIT_LINE, 0};
  put_format(&w, "{\"line\":%llu,\"time\":\"%s\",\"path\":\"", (unsigned long long)++log->lines, when);
  put_escaped(&w, e->path, strlen(e->path));
  put(&w, "\",");
  put_hash(&w, "request", e->request);
  put_format(&w, ",\"status\":%d,", e->status);
  put_hash(&w, "answer", answer);
  put_format(&w, ",\"prompt_tokens\":%d,\"tokens\":%d,\"whole\":%s,", c->job.prompt_tokens, c->job.made,
             whole ? "true" : "false");
  put_hash(&w, "before", log->last);
  put(&w, "}");
  slm_sha256 hash;
  slm_sha256_init(&hash);
  slm_sha256_update(&hash, w.bytes, w.length);
  slm_sha256_final(&hash, log->last);
  put(&w, "\n");
  log->pending_bytes += w.length;
  flush(log);
}
