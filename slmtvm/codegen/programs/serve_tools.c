/* Tools: those that a request offers and those that its messages called, as the model's chat template writes
 * them; and calls in what the model wrote.
 *
 * Kinds of a chat's pieces: "+tools" one that is offered; of an assistant that calls some "+says" its text,
 * "+call" the name of the first one, "+more" of others, "+arguments" an object; "tool" what a call gave. */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>

#include "serve.h"

enum { MOST_TOOLS = 128, NAME_BYTES = 64 };

static const char invalid[] = "invalid_value";

/* ---- what a request offers ---- */

/* A function's name as OpenAI takes it; its bytes, or 0. */
static size_t read_name(json field, char name[NAME_BYTES + 1]) {
  static const char taken[] =
      "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
  ptrdiff_t bytes = json_kind(field) == '"' ? json_text(field, name, NAME_BYTES) : 0;
  if (bytes <= 0) return 0;
  name[bytes] = 0;
  return strspn(name, taken) == (size_t)bytes ? (size_t)bytes : 0;
}

static int check_tools(json tools, refusal *r) {
  const char *cursor = NULL;
  char name[NAME_BYTES + 1];
  json tool;
  int count = 0;
  if (!tools.at) return 0;
  if (json_kind(tools) != '[') return refuse(r, 400, "tools", invalid, "tools must be an array");
  while (json_next(tools, &cursor, &tool)) {
    json function = json_field(tool, "function"), parameters = json_field(function, "parameters");
    if (!json_is(json_field(tool, "type"), "function"))
      return refuse(r, 400, "tools", invalid, "a tool's type must be function");
    if (!read_name(json_field(function, "name"), name))
      return refuse(r, 400, "tools", invalid, "a function's name must be 1 to %d of a-z, A-Z, 0-9, _ "
                    "and -", NAME_BYTES);
    if (parameters.at && json_kind(parameters) != '{')
      return refuse(r, 400, "tools", invalid, "parameters of %s must be a JSON schema", name);
    if (++count > MOST_TOOLS)
      return refuse(r, 400, "tools", invalid, "there are more than %d tools", MOST_TOOLS);
  }
  return count;
}

static int is_offered(json tools, json name) {
  const char *cursor = NULL;
  json tool;
  while (json_next(tools, &cursor, &tool))
    if (json_same_text(json_field(json_field(tool, "function"), "name"), name)) return 1;
  return 0;
}

/* A call that has to come: by a constraint that was compiled of these tools. */
static int require_call(server *s, job *j, json choice, refusal *r) {
  char name[NAME_BYTES + 1] = "";
  if (!json_is(choice, "required")) {
    json wanted = json_field(json_field(choice, "function"), "name");
    if (!read_name(wanted, name) || !is_offered(j->tools, wanted))
      return refuse(r, 400, "tool_choice", invalid,
                    "tool_choice must be none, auto, required or a function of tools");
  }
  if (!s->model.reads_calls)
    return refuse(r, 400, "tool_choice", "unsupported_value",
                  "how this model writes calls is not known: tool_choice may be auto or none");
  return constrain_to_tools(s, j, j->tools, name, r);
}

int read_tools(server *s, job *j, json body, refusal *r) {
  json tools = json_field(body, "tools"), choice = json_field(body, "tool_choice");
  json parallel = json_field(body, "parallel_tool_calls");
  const int count = check_tools(tools, r);
  if (count < 0) return -1;
  if (count == 0) {
    if (!choice.at || json_is(choice, "none") || json_is(choice, "auto")) return 0;
    return refuse(r, 400, "tool_choice", invalid, "tool_choice asks for a call, and there are no tools");
  }
  if (j->route == ROUTE_COMPLETION)
    return refuse(r, 400, "tools", "unsupported_parameter", "tools are for /v1/chat/completions");
  j->tools = tools;
  if (json_is(choice, "none")) return 0;
  j->reads_calls = s->model.reads_calls;
  j->one_call = parallel.at && !json_is_true(parallel);
  return !choice.at || json_is(choice, "auto") ? 0 : require_call(s, j, choice, r);
}

/* ---- tools and calls as the template writes them ---- */

static int put_value(json table, const char *kind, json value, writer *w, refusal *r) {
  json form = json_field(json_field(table, "forms"), kind), indent = json_field(form, "indent");
  const char *wrong = put_dumped(w, value, indent.at ? (int)json_number(indent) : -1);
  return wrong ? refuse(r, 400, "messages", invalid, "%s: %s", kind + 1, wrong) : 0;
}

int put_tools(json table, json tools, char *before, writer *w, refusal *r) {
  const char *cursor = NULL;
  chat_refusal why;
  json tool;
  const int whole = json_is_true(json_field(json_field(json_field(table, "forms"), "+tools"), "whole"));
  while (!w->full && json_next(tools, &cursor, &tool)) {
    if (chat_begin(table, before, "+tools", w, &why) < 0) return refuse_chat_here(&why, 400, r);
    if (put_value(table, "+tools", whole ? tool : json_field(tool, "function"), w, r) < 0) return -1;
    strcpy(before, "+tools");
  }
  return 0;
}

/* OpenAI's arguments are JSON inside a string: that is written behind all else, and read there. */
static int put_arguments(json table, json arguments, writer *w, refusal *r) {
  writer rest = *w;
  json object = arguments;
  if (json_kind(arguments) == '"') {
    const size_t room = (size_t)(arguments.end - arguments.at);
    size_t place;
    if (room > w->room - w->length) return w->full = 1, 0;
    rest.room -= room;
    const ptrdiff_t bytes = json_text(arguments, w->bytes + rest.room, room);
    if (bytes < 0 || json_check(w->bytes + rest.room, (size_t)bytes, &object, &place))
      object = (json){NULL, NULL};
  }
  if (json_kind(object) != '{')
    return refuse(r, 400, "messages", invalid, "the arguments of a call are no JSON object");
  const int code = put_value(table, "+arguments", object, &rest, r);
  w->length = rest.length;
  w->full |= rest.full;
  return code;
}

int put_calls(json table, json calls, char *before, writer *w, refusal *r) {
  const char *cursor = NULL, *kind = "+call";
  char name[NAME_BYTES + 1];
  chat_refusal why;
  json call;
  for (; !w->full && json_next(calls, &cursor, &call); kind = "+more") {
    json function = json_field(call, "function");
    const size_t bytes = read_name(json_field(function, "name"), name);
    if (bytes == 0)
      return refuse(r, 400, "messages", invalid, "a call has no name of a function");
    if (chat_begin(table, before, kind, w, &why) < 0) return refuse_chat_here(&why, 400, r);
    put_bytes(w, name, bytes);
    if (chat_begin(table, kind, "+arguments", w, &why) < 0) return refuse_chat_here(&why, 400, r);
    if (put_arguments(table, json_field(function, "arguments"), w, r) < 0) return -1;
    strcpy(before, "+arguments");
  }
  return 0;
}

/* ---- calls in an answer ---- */

static int copy_text(json field, char *text, size_t room) {
  ptrdiff_t bytes = json_kind(field) == '"' ? json_text(field, text, room - 1) : -1;
  text[bytes < 0 ? 0 : bytes] = 0;
  return bytes < 0 ? -1 : 0;
}

void open_calls(served_model *m) {
  json calls = json_field(m->chat.pieces, "calls");
  m->reads_calls = copy_text(json_field(calls, "begin"), m->call_begin, sizeof m->call_begin) == 0 &&
                   copy_text(json_field(calls, "key"), m->call_key, sizeof m->call_key) == 0 &&
                   copy_text(json_field(calls, "end"), m->call_end, sizeof m->call_end) == 0;
}

static int is_space(char byte) { return byte == ' ' || (byte >= 9 && byte <= 13); }

static size_t skip_space(const char *text, size_t at, size_t length) {
  while (at < length && is_space(text[at])) ++at;
  return at;
}

/* Moves over a text that stands there. */
static int skip_text(const char *text, size_t *at, size_t length, const char *expected) {
  const size_t bytes = strlen(expected);
  if (bytes > length - *at || memcmp(text + *at, expected, bytes) != 0) return 0;
  *at += bytes;
  return 1;
}

/* A call at `at`, which moves behind it; 0 where there is none of a tool that is offered. */
static int read_call(const server *s, connection *c, size_t *at) {
  job *j = &c->job;
  const served_model *m = &s->model;
  const size_t length = j->text_length;
  json call;
  if (!skip_text(c->text, at, length, m->call_begin)) return 0;
  if (json_check_first(c->text + *at, length - *at, &call)) return 0;
  json name = json_field(call, "name"), arguments = json_field(call, m->call_key);
  if (json_kind(name) != '"' || json_kind(arguments) != '{' || !is_offered(j->tools, name)) return 0;
  *at = skip_space(c->text, (size_t)(call.end - c->text), length);
  /* The token that ends the text may stand for the end of its last call, too. */
  if (*at < length && !skip_text(c->text, at, length, m->call_end)) return 0;
  j->calls[j->call_count++] = (tool_call){name.at, name.end, arguments.at, arguments.end};
  return 1;
}

size_t held_for_call(const server *s, const connection *c) {
  const job *j = &c->job;
  const char *begin = s->model.call_begin;
  const size_t bytes = strlen(begin), length = j->text_length;
  if (!j->reads_calls || j->finish) return 0;
  size_t at = length;
  if (bytes == 0) { /* calls are the whole text */
    const size_t first = skip_space(c->text, 0, length);
    return !j->said && (first == length || c->text[first] == '{') ? length : 0;
  }
  const char *found = memmem(c->text, length, begin, bytes);
  if (found) at = (size_t)(found - c->text);
  else
    for (size_t n = bytes - 1; n > 0 && at == length; --n)
      if (n <= length && memcmp(c->text + length - n, begin, n) == 0) at = length - n;
  while (at > 0 && is_space(c->text[at - 1])) --at;
  return length - at;
}

void find_calls(const server *s, connection *c) {
  job *j = &c->job;
  const char *begin = s->model.call_begin;
  if (!j->reads_calls || j->finish != FINISH_STOP) return;
  size_t at = skip_space(c->text, 0, j->text_length);
  if (*begin) {
    const char *found = memmem(c->text, j->text_length, begin, strlen(begin));
    if (!found) return;
    at = (size_t)(found - c->text);
  } else if (j->said) {
    return;
  }
  size_t content = at;
  while (content > 0 && is_space(c->text[content - 1])) --content;
  while (at < j->text_length) {
    if (j->call_count == MOST_CALLS || !read_call(s, c, &at)) { /* then all of it is text */
      j->call_count = 0;
      return;
    }
    at = skip_space(c->text, at, j->text_length);
  }
  if (j->call_count > 1 && j->one_call) j->call_count = 1;
  if (j->call_count) j->text_length = content;
}
