/* A chat: each message of the user with all before it, by the pieces of the model's chat template. What the
 * session has already is not computed again. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "run.h"

typedef struct {
  growing_text text; /* up to the end of the last message */
  char before[ROLE_BYTES]; /* whose message that is; "": there is none */
} conversation;

/* Makes room for as much again; what did not fit is then put again. */
static int make_room(conversation *c) {
  char none[PIECE_BYTES] = {0};
  const size_t length = c->text.length;
  if (c->text.room > MOST_TEXT_BYTES) return failed("the chat is longer than 64 MB");
  do
    if (append(&c->text, none, sizeof none) != OK) return FAILED;
  while (c->text.room - c->text.length > PIECE_BYTES);
  if (append(&c->text, none, sizeof none) != OK) return FAILED;
  c->text.length = length;
  return OK;
}

static int add_message(const runner *r, conversation *c, const char *role, const char *text,
                       size_t bytes) {
  chat_refusal why;
  for (;;) {
    writer w = {c->text.bytes, c->text.length, c->text.room, 0};
    if (chat_begin(r->chat.pieces, c->before, role, &w, &why) < 0) return failed("%s", why.message);
    const size_t begin = w.length;
    put_bytes(&w, text, bytes);
    if (!w.full && chat_end(r->chat.pieces, role, &w, begin, &why) < 0) return failed("%s", why.message);
    if (!w.full) {
      c->text.length = w.length;
      strcpy(c->before, role);
      return OK;
    }
    if (make_room(c) != OK) return FAILED;
  }
}

/* The conversation, and what begins an answer, as tokens. */
static int tokens_of(const runner *r, conversation *c, tokenized *prompt) {
  chat_refusal why;
  for (;;) {
    writer w = {c->text.bytes, c->text.length, c->text.room, 0};
    if (chat_answer(r->chat.pieces, c->before, &w, &why) < 0) return failed("%s", why.message);
    const text_pair whole = {w.bytes, w.length, NULL, 0};
    if (!w.full) return tokenize(r, &whole, SLM_NO_SPECIAL, prompt);
    if (make_room(c) != OK) return FAILED;
  }
}

static int answer_to(runner *r, const settings *s, conversation *c, const char *text, size_t bytes) {
  tokenized prompt;
  if (!is_utf8(text, bytes)) return failed("the message is no valid text");
  if (add_message(r, c, "user", text, bytes) != OK || tokens_of(r, c, &prompt) != OK) return FAILED;
  int code = prompt.count ? begin_context(r, s, &prompt, 1) : failed("the message is empty");
  forget(&prompt);
  if (code == OK) code = generate(r, s);
  if (code == OK) code = end_text(r, s, text, bytes);
  return code == OK ? add_message(r, c, "assistant", r->written.bytes, r->written.length) : code;
}

static int answer_input(runner *r, const settings *s, conversation *c) {
  const int asks = isatty(STDIN_FILENO);
  char *line = NULL;
  size_t room = 0;
  int code = OK;
  while (code == OK) {
    if (asks) fputs("> ", stderr);
    ssize_t length = getline(&line, &room, stdin);
    if (length < 0) break;
    if (length && line[length - 1] == '\n') --length;
    if (length) code = answer_to(r, s, c, line, (size_t)length);
  }
  free(line);
  return code;
}

int run_chat(runner *r, const settings *s) {
  conversation c = {0};
  chat_refusal why;
  if (chat_ready(&r->chat, &why) < 0) return failed("%s", why.message);
  if (s->file) return failed("a chat reads the input, or --prompt");
  int code = make_room(&c);
  if (code == OK && s->system) code = add_message(r, &c, "system", s->system, strlen(s->system));
  if (code == OK)
    code = s->prompt ? answer_to(r, s, &c, s->prompt, strlen(s->prompt)) : answer_input(r, s, &c);
  free(c.text.bytes);
  return code;
}
