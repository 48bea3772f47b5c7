/* Reading the head of an HTTP request. Strict where being lax lets two readers disagree about where
 * a request ends: one length, no folded lines, no bare newlines. */
#define _GNU_SOURCE
#include "serve_http.h"

#include <string.h>
#include <strings.h>

enum { MOST_HEADERS = 100, BAD = 400 };
enum { HAS_HOST = 1, HAS_LENGTH = 2, HAS_AUTHORIZATION = 4 };

int part_is(part value, const char *text) {
  return value.length == strlen(text) && memcmp(value.at, text, value.length) == 0;
}

static int is_token(uint8_t c) {
  return (c >= '0' && c <= '9') || ((c | 32) >= 'a' && (c | 32) <= 'z') ||
         (c && strchr("!#$%&'*+-.^_`|~", c));
}

static int same_name(part name, const char *text) {
  return name.length == strlen(text) && strncasecmp(name.at, text, name.length) == 0;
}

int is_media_type(part value, const char *type) {
  size_t length = strlen(type);
  if (value.length < length || strncasecmp(value.at, type, length) != 0) return 0;
  return value.length == length || strchr("; \t", value.at[length]);
}

/* Whether a list of tokens with commas in between has this one. */
static int lists(part value, const char *token) {
  for (size_t i = 0; i < value.length;) {
    while (i < value.length && strchr(", \t", value.at[i])) ++i;
    size_t begin = i;
    while (i < value.length && !strchr(", \t", value.at[i])) ++i;
    if (same_name((part){value.at + begin, i - begin}, token)) return 1;
  }
  return 0;
}

static int request_line(part line, http_request *r, const char **wrong) {
  const char *end = line.at + line.length, *at = line.at;
  *wrong = "the first line is no request";
  while (at < end && is_token((uint8_t)*at)) ++at;
  r->method = (part){line.at, (size_t)(at - line.at)};
  if (r->method.length == 0 || at == end || *at != ' ') return BAD;
  const char *target = ++at;
  while (at < end && *at > ' ' && *at < 0x7f) ++at;
  r->path = (part){target, (size_t)(at - target)};
  const char *query = memchr(target, '?', r->path.length);
  if (query) r->path.length = (size_t)(query - target);
  if (r->path.length == 0 || at == end || *at != ' ') return BAD;
  part version = {at + 1, (size_t)(end - at - 1)};
  if (version.length != 8 || memcmp(version.at, "HTTP/", 5) != 0) return BAD;
  r->old = part_is(version, "HTTP/1.0");
  r->keep = !r->old;
  *wrong = "only HTTP/1.1 and 1.0 are spoken here";
  return r->old || part_is(version, "HTTP/1.1") ? 0 : 505;
}

static int content_length(part value, http_request *r, unsigned *has, const char **wrong) {
  size_t bytes = 0;
  *wrong = "Content-Length is no number, or given twice";
  if (value.length == 0 || value.length > 15) return BAD;
  for (size_t i = 0; i < value.length; ++i) {
    if (value.at[i] < '0' || value.at[i] > '9') return BAD;
    bytes = bytes * 10 + (size_t)(value.at[i] - '0');
  }
  if (*has & HAS_LENGTH) return BAD;
  *has |= HAS_LENGTH;
  r->body_bytes = bytes;
  return 0;
}

static int header(part name, part value, http_request *r, unsigned *has, const char **wrong) {
  if (same_name(name, "content-length")) return content_length(value, r, has, wrong);
  if (same_name(name, "transfer-encoding")) {
    *wrong = "give the body's length in Content-Length: Transfer-Encoding is not read";
    return 411;
  }
  if (same_name(name, "connection")) {
    if (lists(value, "close")) r->keep = 0;
  } else if (same_name(name, "content-type")) {
    r->content_type = value;
  } else if (same_name(name, "authorization")) {
    *wrong = "Authorization is given twice";
    if (*has & HAS_AUTHORIZATION) return BAD;
    *has |= HAS_AUTHORIZATION;
    r->authorization = value;
  } else if (same_name(name, "host")) {
    *wrong = "Host is given twice";
    if (*has & HAS_HOST) return BAD;
    *has |= HAS_HOST;
    r->host = value;
  } else if (same_name(name, "expect")) {
    *wrong = "Expect asks for something unknown";
    if (!same_name(value, "100-continue")) return 417;
    r->expects_continue = 1;
  }
  return 0;
}

static int header_line(part line, http_request *r, unsigned *has, const char **wrong) {
  size_t name = 0;
  *wrong = "a header is no \"name: value\"";
  while (name < line.length && is_token((uint8_t)line.at[name])) ++name;
  if (name == 0 || name == line.length || line.at[name] != ':') return BAD;
  const char *at = line.at + name + 1, *end = line.at + line.length;
  for (const char *c = at; c < end; ++c)
    if (((uint8_t)*c < 0x20 && *c != '\t') || *c == 0x7f) return BAD;
  while (at < end && (*at == ' ' || *at == '\t')) ++at;
  while (end > at && (end[-1] == ' ' || end[-1] == '\t')) --end;
  return header((part){line.at, name}, (part){at, (size_t)(end - at)}, r, has, wrong);
}

/* The line at `at`, whose end \r\n is before `end`; `next` is behind it. */
static int take_line(const char *at, const char *end, part *line, const char **next) {
  const char *newline = memchr(at, '\n', (size_t)(end - at));
  if (!newline || newline == at || newline[-1] != '\r') return 0;
  *line = (part){at, (size_t)(newline - 1 - at)};
  *next = newline + 1;
  return 1;
}

int http_parse(const char *bytes, size_t length, http_request *r, const char **wrong) {
  *r = (http_request){0};
  const char *end = bytes + length, *at = bytes, *head = memmem(bytes, length, "\r\n\r\n", 4);
  if (!head) {
    /* What can become no request needs no waiting for: half of this is binary, or no HTTP at all. */
    *wrong = "this is no HTTP request";
    return length && !is_token((uint8_t)bytes[0]) ? BAD : HTTP_MORE;
  }
  end = head + 4;
  r->head_bytes = (size_t)(end - bytes);
  part line;
  unsigned has = 0;
  *wrong = "a line of the head ends without a carriage return";
  if (!take_line(at, end, &line, &at)) return BAD;
  int code = request_line(line, r, wrong);
  for (int count = 0; code == 0; ++count) {
    *wrong = "a line of the head ends without a carriage return";
    if (!take_line(at, end, &line, &at)) return BAD;
    if (line.length == 0) break;
    *wrong = "too many headers";
    code = count == MOST_HEADERS ? 431 : header_line(line, r, &has, wrong);
  }
  *wrong = code == 0 ? "the Host header is missing" : *wrong;
  if (code == 0 && !r->old && !(has & HAS_HOST)) return BAD;
  return code ? code : HTTP_READY;
}

const char *http_reason(int status) {
  switch (status) {
    case 200: return "OK";
    case 400: return "Bad Request";
    case 401: return "Unauthorized";
    case 403: return "Forbidden";
    case 404: return "Not Found";
    case 405: return "Method Not Allowed";
    case 408: return "Request Timeout";
    case 411: return "Length Required";
    case 413: return "Content Too Large";
    case 415: return "Unsupported Media Type";
    case 417: return "Expectation Failed";
    case 431: return "Request Header Fields Too Large";
    case 500: return "Internal Server Error";
    case 501: return "Not Implemented";
    case 503: return "Service Unavailable";
    case 504: return "Gateway Timeout";
    case 505: return "HTTP Version Not Supported";
    default: return "Error";
  }
}
