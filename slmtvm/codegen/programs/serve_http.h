/* HTTP/1.1 (RFC 9112): the head of a request, read where it lies in a connection's buffer. */
#ifndef SLM_SERVE_HTTP_H
#define SLM_SERVE_HTTP_H

#include <stddef.h>
#include <stdint.h>

typedef struct {
  const char *at;
  size_t length;
} part;

typedef struct {
  part method, path; /* the path without what follows a '?' */
  part authorization, content_type, host;
  size_t head_bytes, body_bytes;
  int old;          /* HTTP/1.0 */
  int keep;         /* the connection may be used again */
  int expects_continue;
} http_request;

enum { HTTP_MORE = 0, HTTP_READY = 1 };

/* Reads the head at `bytes`: HTTP_MORE where its end is not there yet, HTTP_READY, or the status code
 * of an error, with what is wrong in `wrong`. Nothing behind the head is looked at. */
int http_parse(const char *bytes, size_t length, http_request *request, const char **wrong);

int part_is(part value, const char *text);

/* Whether the header's value is this media type, whatever its parameters. */
int is_media_type(part value, const char *type);

const char *http_reason(int status);

#endif
