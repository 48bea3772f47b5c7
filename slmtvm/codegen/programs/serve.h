/* slm-serve: one thread that reads requests, computes a step of each that runs, and writes.
 *
 * All memory is taken before the first request: a buffer of each connection for what comes in and what
 * goes out, its tokens and its text; the sessions; and one work space for what lives within a call. */
#ifndef SLM_SERVE_H
#define SLM_SERVE_H

#include <stdarg.h>
#include <stdint.h>

#include "serve_audit.h"
#include "serve_http.h"
#include "shared_chat.h"
#include "shared_json.h"
#include "slm.h"

enum {
  MOST_STOPS = 8,
  STOP_BYTES = 128,  /* of one stop string, at most */
  MOST_ENDS = 64,    /* tokens that end a text */
  MOST_BIASES = 300, /* of OpenAI's logit_bias */
  MOST_CONSTRAINTS = 32,
  MOST_LIKELY = 5,   /* alternatives of a token with logprobs */
  MOST_CALLS = 16,   /* of tools, in one answer */
  HEAD_BYTES = 16 << 10,
  OUT_BYTES = 32 << 10,
  EVENT_BYTES = 12 << 10, /* what one step of an answer may write */
  PIECE_BYTES = 512,      /* of text in one event */
  TOKEN_BYTES = 256       /* of a token's text where it is told by itself */
};

typedef struct {
  const char *bundle, *name, *host, *unix_path, *key_file, *keys, *audit;
  long port, sessions, connections, queue, body_bytes, most_tokens, grace;
  double timeout, read_timeout; /* seconds */
  slm_options open;
  const char *constraints[MOST_CONSTRAINTS]; /* NAME=FILE */
  int constraint_count;
} serve_options;

/* What a request may be held to, by its name. */
typedef struct {
  char name[64];
  slm_constraint *constraint;
} named_constraint;

typedef struct {
  float logprob;
  int32_t token;
} likely;

/* In an answer's text, both of JSON: where a call's name and its arguments begin and end. */
typedef struct {
  const char *name, *name_end, *arguments, *arguments_end;
} tool_call;

/* What a session holds, and who uses it. */
typedef struct {
  slm_session *session;
  int32_t *tokens; /* the context: slm_position() of them */
  int32_t count;
  uint64_t used; /* when it was used last: counts requests */
  int busy;
} session_slot;

typedef enum { KIND_DECODER, KIND_ENCODER, KIND_ENCODER_DECODER } model_kind;

typedef struct {
  slm_model *model;
  slm_tokenizer *tokenizer; /* NULL where the bundle has none that is compiled: `no_tokenizer` says so */
  char no_tokenizer[256];
  json info;
  model_kind kind;
  int32_t context, source_context, vocabulary, chunk, start;
  int32_t ends[MOST_ENDS];
  int end_count;
  session_slot *slots;
  chat_template chat;
  int reads_calls; /* of tools, which stand in texts so: begin {"name": ..., key: {...}} end */
  char call_begin[STOP_BYTES], call_key[STOP_BYTES], call_end[STOP_BYTES];
} served_model;

typedef enum {
  ROUTE_COMPLETION,
  ROUTE_CHAT,
  ROUTE_EMBEDDING,
  ROUTE_TOKENIZE,
  ROUTE_DETOKENIZE
} job_route;
typedef enum { FINISH_NONE, FINISH_STOP, FINISH_LENGTH } finish_reason;

/* What a request asked for, and how far that is. */
typedef struct {
  job_route route;
  int stream, include_usage, ids, base64, classify, logprobs; /* logprobs: 0 none, else alternatives + 1 */
  slm_sampling sampling;
  slm_bias biases[MOST_BIASES];
  int32_t most_tokens;
  char stops[MOST_STOPS][STOP_BYTES];
  size_t stop_bytes[MOST_STOPS];
  int stop_count;
  json tools; /* in the body; nothing where none are offered */
  int reads_calls, one_call;
  uint64_t number; /* in the order of arrival */
  int64_t created;
  double began, first_token, last_token;
  /* progress */
  int answered, chunked; /* the answer's head is out; its body comes in parts of any length */
  const char *allowed;   /* methods */
  session_slot *slot;
  int32_t prompt_tokens, cached, count, made; /* count: tokens in `tokens`, the prompt's first */
  int32_t evaluated;
  slm_text_state text_state;
  finish_reason finish;
  int cut; /* at a stop string */
  int said; /* some of the text is written */
  tool_call calls[MOST_CALLS];
  int call_count, call;   /* call: that is being written */
  const char *call_sent; /* of its arguments; NULL: not even its name */
  size_t text_length, text_sent;
  int32_t told; /* tokens whose logprobs or ids are written */
  const char *cursor; /* in the body: the next input of an embedding */
  int32_t input, inputs, total_tokens;
  int phase;
  audit_entry audit;
} job;

typedef enum {
  FREE,
  READING,   /* a request comes in, or the next one is waited for */
  WAITING,   /* for a session */
  RUNNING,   /* has a session, if its answer needs one */
  ANSWERING, /* computed: what is left of the answer is written */
  FLUSHING,  /* all of it is in `out` */
  CLOSING    /* answered and told so; what still comes is thrown away */
} connection_state;

typedef struct connection {
  int fd;
  connection_state state;
  char *in, *out, *text;
  int32_t *tokens;
  likely *likeliest; /* by generated token: itself, then MOST_LIKELY alternatives */
  size_t in_length, out_begin, out_end;
  http_request request;
  int begun, hung_up, continued;
  double since; /* of the state, or of the last byte that was written */
  json body;
  job job;
} connection;

typedef struct {
  uint64_t requests, prompt_tokens, cached_tokens, generated_tokens, together_tokens, by_status[6],
      finished[3], cancelled, refused;
} counters;

enum { BUCKETS = 14 };
typedef struct {
  uint64_t counts[BUCKETS + 1], count;
  double sum;
} histogram;

typedef struct {
  serve_options options;
  served_model model;
  named_constraint constraints[MOST_CONSTRAINTS];
  connection *connections;
  size_t text_room, token_room, scratch_bytes, mapped_bytes;
  void *work; /* of slm_tokenize */
  size_t work_bytes;
  char *scratch; /* the text of a prompt */
  connection **together; /* texts whose next tokens are evaluated at once, `sessions` at most */
  slm_session **together_in;
  int32_t *together_tokens;
  float *values; /* a row of the model's output */
  char key[256];
  size_t key_bytes;
  int64_t planned_bytes;
  uint64_t arrivals, uses;
  uint64_t nonce; /* makes ids of this run differ from those of others */
  int stopping, guards_host;
  int64_t started; /* seconds since 1970 */
  audit_log audit;
  counters counters;
  histogram first_token, each_token, whole;
} server;

double seconds_now(void);

/* serve_model.c */
int open_model(server *s);  /* 0, or -1 after saying why not */
void close_model(server *s);
int64_t plan_memory(server *s); /* takes it; bytes, or -1 */

/* serve_routes.c: an answer to a request whose body is whole. */
void answer(server *s, connection *c);
void answer_error(server *s, connection *c, int status, const char *type, const char *param,
                  const char *code, const char *message);
/* The head of an answer and of its body of `length` bytes; -1: its length is not known yet. */
void begin_answer(server *s, connection *c, int status, const char *type, ptrdiff_t length);
void end_answer(connection *c);

/* A part of a body of unknown length: what is put into the writer goes into `out` between both. */
writer begin_part(connection *c);
void end_part(connection *c, writer *w);
size_t out_room(connection *c);

/* serve_prompt.c: texts and tokens of requests. */
typedef struct {
  const char *param, *code;
  int status;
  char message[384];
} refusal;
int refuse(refusal *r, int status, const char *param, const char *code, const char *format, ...)
    __attribute__((format(printf, 5, 6)));
int32_t tokenize_text(server *s, const char *text, size_t bytes, uint32_t flags, int32_t *tokens,
                      size_t room);
/* A string, or an array of token ids, as tokens: how many, of which `room` are written; -1 refused. */
int32_t read_prompt(server *s, json prompt, const char *param, uint32_t flags, int32_t *tokens,
                    size_t room, refusal *r);
int read_generation(server *s, connection *c, refusal *r); /* all fields; 0, or -1 refused */

/* serve_chat.c: `messages`, and tools that are offered, as one text in the scratch; its bytes, or -1. */
ptrdiff_t chat_text(server *s, json messages, json tools, refusal *r);
int refuse_chat_here(const chat_refusal *why, int status, refusal *r);

/* serve_tools.c. `before` is the kind of item that was written last. */
void open_calls(served_model *m);
int read_tools(server *s, job *j, json body, refusal *r); /* and tool_choice; 0, or -1 refused */
int put_tools(json table, json tools, char *before, writer *w, refusal *r);
int put_calls(json table, json calls, char *before, writer *w, refusal *r);
size_t held_for_call(const server *s, const connection *c); /* bytes of the text that may be of one */
void find_calls(const server *s, connection *c);            /* in a text that is over */

/* serve_dump.c: as json.dumps(..., ensure_ascii=False, indent=indent); < 0: on one line. NULL, or what is wrong. */
const char *put_dumped(writer *w, json value, int indent);

/* serve_audit.c */
int audit_open(server *s); /* 0, or -1 after saying why not */
int audit_resume(server *s); /* where the version before writes the log: 0, or -1 after saying why not */
void audit_close(server *s);
int audit_begin(server *s, connection *c); /* 0, or -1 where nothing can be logged */
void audit_answer(connection *c, const char *bytes, size_t length); /* a part of the body */
void audit_end(server *s, connection *c, int whole);

/* serve_constrain.c */
int open_constraints(server *s); /* 0, or -1 after saying why not */
void close_constraints(server *s);
int read_format(server *s, job *j, json body, refusal *r); /* response_format; 0, or -1 refused */
int constrain_to_tools(server *s, job *j, json tools, const char *name, refusal *r); /* "": any of them */
int check_room(const server *s, const job *j, refusal *r);
int32_t most_to_come(const server *s, const job *j); /* tokens */
typedef enum { GOES_ON, ENDS_BEFORE, ENDS_BEHIND, FOLLOW_FAILED } follow;
follow follow_constraint(job *j, int32_t token); /* whether the text ends at a token */

/* serve_generate.c */
session_slot *find_session(server *s, const connection *c);
void start_generation(server *s, connection *c, session_slot *slot);
int wants_a_token(const connection *c); /* whether one token is left to evaluate */
void evaluate_together(server *s, int count); /* the `count` of s->together, which want one */
void step_generation(server *s, connection *c);
void release_session(server *s, connection *c);
void finish_generation(server *s, connection *c); /* writes what is left, as room is there */

/* serve_write.c: what OpenAI's clients read. */
void write_begin(server *s, connection *c);
void write_events(server *s, connection *c);
void write_whole(server *s, connection *c);

/* serve_tokens.c: /tokenize and /detokenize. Answered at once, or -1 refused. */
int begin_tokens(server *s, connection *c, refusal *r);
int begin_text(server *s, connection *c, refusal *r);
void step_tokens(server *s, connection *c);

/* serve_embed.c */
int begin_embeddings(server *s, connection *c, refusal *r);
void step_embeddings(server *s, connection *c);

/* serve_metrics.c */
void observe(histogram *h, double seconds);
void write_metrics(server *s, writer *w);

#endif
