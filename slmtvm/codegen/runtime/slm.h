/* The C interface of a compiled model.
 *
 * A library (lib/<target>.so of a bundle) holds the code of one model for one kind of CPU; the
 * weights lie beside it in the bundle. Functions return SLM_OK (0) or another non-negative result,
 * or a negative SLM_ERR_* code; slm_last_error() then says in words what went wrong. No function
 * aborts the process, and a call that fails leaves its session as it was.
 *
 * Threads: sessions are independent of each other and may be used from different threads at the
 * same time. One session is used by one thread at a time, others get SLM_ERR_BUSY. Where a model
 * has several worker threads (slm_options.threads > 1), its sessions take turns: a call waits until
 * the workers are free. Results do not depend on the number of threads.
 *
 * A bundle must not be changed in place while it is open: put a new one beside it and rename.
 */
#ifndef SLM_H
#define SLM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define SLM_API __attribute__((visibility("default")))

/* Changes when a declaration of this file changes its meaning. */
#define SLM_ABI_VERSION 1

enum {
  SLM_OK = 0,
  SLM_ERR_ARGUMENT = -1, /* a null pointer, a number out of its range, an unknown flag */
  SLM_ERR_TOKEN = -2,    /* outside 0 .. vocabulary - 1, or no end where one must be */
  SLM_ERR_CONTEXT = -3,  /* the tokens do not fit the context */
  SLM_ERR_KIND = -4,     /* a decoder's call on an encoder or the other way round, or a model whose
                          * output is no logits of tokens is to sample one */
  SLM_ERR_FILE = -5,     /* the bundle's weights cannot be opened or mapped */
  SLM_ERR_WEIGHTS = -6,  /* the weights are damaged or belong to another library */
  SLM_ERR_CPU = -7,      /* this CPU lacks a feature that the library was built for */
  SLM_ERR_MEMORY = -8,   /* no memory or no thread to be had */
  SLM_ERR_BUSY = -9,     /* the model has sessions, the session is in use in another thread, or the
                          * model was opened before fork() */
  SLM_ERR_LOGITS = -10,  /* no output or no logits to sample from yet, or they are not numbers */
  SLM_ERR_MASK = -11,    /* a mask hides tokens that this model cannot do without */
  SLM_ERR_SIGNATURE = -12, /* the bundle is not signed by a key that is trusted, is too old, or one
                            * of its files is not what was signed */
  SLM_ERR_TOKENIZER = -13, /* the tokenizer is damaged, or of another version */
  SLM_ERR_DEVICE = -14,  /* the GPU, or its driver, that the library was built for is not there, or
                          * it failed: the session is as it was before the call */
  SLM_ERR_KEY = -15,     /* the weights are encrypted, and no key or another one was given */
  SLM_ERR_CONSTRAINT = -16, /* a constraint is damaged or for another model, or nothing that it allows
                             * can follow */
};

typedef struct slm_model slm_model;
typedef struct slm_session slm_session;

enum {
  /* Do not read all weights once to compare their checksum: opening takes no longer than mapping
   * the file. Header and size are still checked, and all the same the checksum of a model whose
   * sparse weights say where they belong: kernels trust that. */
  SLM_SKIP_CHECKSUM = 1,
  /* Measure each kernel, for slm_profile: two readings of the clock for each call of one. */
  SLM_PROFILE = 2,
  /* Use all threads that are asked for all the time, even where there are fewer cores for them or some
   * do not pay: slower, for tests. */
  SLM_ALL_THREADS = 4,
  /* Decrypted weights may go to swap space where they cannot be locked in memory. */
  SLM_MAY_SWAP = 8
};

typedef struct slm_options {
  uint32_t size; /* sizeof(slm_options) */
  /* Most threads that compute, the caller included. More than the cores that the process may use,
   * by its affinity and its control group's quota, are not started. 0: as many as these allow, of
   * cores that differ in speed the fast ones, and no more than paid where the bundle was tuned. Where
   * other processes keep a thread from running, fewer take part for a while. */
  int32_t threads;
  uint32_t flags; /* SLM_SKIP_CHECKSUM, SLM_PROFILE, SLM_ALL_THREADS, SLM_MAY_SWAP or 0 */
  /* Cores to compute on, "4-7,9"; NULL: the system chooses. The workers are bound to them, and so is
   * the thread that calls slm_open, which should be the one that computes. Not there in a caller
   * whose `size` is older. */
  const char *cores;
  /* Ed25519 public keys that are trusted, one or more, as PEM text ("-----BEGIN PUBLIC KEY-----"). The
   * bundle's manifest.json must be signed by one of them (manifest.json.sig), and every file that the
   * library reads must have the SHA-256 that the manifest says, whatever `flags` are. NULL: anyone's
   * bundle is opened; its checksum finds accidents, but no changes on purpose. Not there in a caller
   * whose `size` is older, nor is what follows. */
  const char *public_keys;
  /* With `public_keys`: the least counter ("release" of the manifest) that a bundle must have, so that
   * an older one, signed as well, cannot take the place of a newer one. */
  uint64_t least_counter;
  /* The 32 bytes of the key that the weights are encrypted with (slmtvm encrypt); not looked at where
   * they are not. They are decrypted into memory of the process's own, which is locked, not left in a
   * core dump, and not shared with others. The key may be wiped once slm_open has returned. Not there in
   * a caller whose `size` is older. */
  const uint8_t *weights_key;
} slm_options;

/* What may be written: a JSON schema, a regex or a few choices, compiled (slmtvm constraint) to tables of
 * tokens. It may be used by several sessions and threads at the same time. */
typedef struct slm_constraint slm_constraint;

typedef struct slm_bias {
  int32_t token;
  float bias; /* is added to its logit */
} slm_bias;

/* How to choose the next token. Zero turns each part off; all zero is greedy. The logits are changed by
 * the repetition penalty, the frequency and presence penalties, and the biases, in this order; then come
 * the constraint, the temperature, top_k, top_p and min_p. */
typedef struct slm_sampling {
  uint32_t size;            /* sizeof(slm_sampling) */
  float temperature;        /* 0: the most likely token (greedy) */
  int32_t top_k;            /* only the k most likely tokens */
  float top_p;              /* only the most likely tokens that sum up to this probability */
  float min_p;              /* only tokens at least this fraction as likely as the likeliest */
  float repetition_penalty; /* > 1 makes tokens that are in the context less likely */
  uint64_t seed;            /* equal seeds, contexts and parameters give equal tokens */
  /* Not there in a caller whose `size` is older, nor is what follows. Both penalties are taken from the
   * logits of tokens that are in the context from position `written` on, where the text begins that is
   * being written: one once, the other as often as the token is there. */
  float presence_penalty, frequency_penalty;
  int32_t written;
  int32_t bias_count;
  const slm_bias *biases;
  const slm_constraint *constraint;
  int32_t state; /* of the constraint: 0, then what slm_constraint_next() says */
  int32_t most;  /* tokens that may come, this one included: those are taken that let the text become
                  * whole in so many; 0: any number */
} slm_sampling;

/* The SLM_ABI_VERSION that the library was built with. */
SLM_API uint32_t slm_abi_version(void);

/* What the library holds, as a JSON object: target, kind, vocabulary, context, memory, ... */
SLM_API const char *slm_info(void);

/* Floats in a row of the first output: a decoder's vocabulary, an encoder's features of a token, the
 * labels of a classifier. */
SLM_API int32_t slm_output_size(void);

/* An output of the model: a row of `features` floats for each token, or one `pooled` row for the whole
 * text: an encoder's sentence embedding, the scores of its labels; of a decoder what it makes of the
 * last token. */
typedef struct slm_output {
  uint32_t size;    /* sizeof(slm_output), set by the caller */
  int32_t features; /* floats in a row */
  int32_t pooled;   /* 1: one row, 0: a row for each token */
  const char *name; /* that of the file that was compiled; valid while the library is loaded */
} slm_output;

/* How many outputs there are; at least 1. The first is the one that slm_encode and slm_eval give. */
SLM_API int32_t slm_output_count(void);

/* Describes output `index`, 0 to slm_output_count() - 1. */
SLM_API int32_t slm_output_info(int32_t index, slm_output *output);

/* Copies output `index` of the session's last slm_encode: `values` takes `features` floats for each
 * token of that call, or once where it is pooled. Of a decoder, the row after the last token of its
 * context, once whether pooled or not. Returns the rows that were copied; with `values` NULL those
 * that there are. SLM_ERR_LOGITS before there are any. */
SLM_API int32_t slm_output_get(slm_session *session, int32_t index, float *values);

/* Tokens that a session holds at most (an encoder: that one call takes at most). */
SLM_API int32_t slm_context_size(void);

/* What the last failed call of this thread said; "" if none failed. Valid until its next failure. */
SLM_API const char *slm_last_error(void);

/* Opens the bundle (a folder that holds weights.bin) and starts the worker threads. The weights are
 * mapped, not copied. `options` may be NULL: one thread, weights checked. A child process made by
 * fork() must open the bundle anew: it has no copy of the worker threads. */
SLM_API int32_t slm_open(const char *bundle, const slm_options *options, slm_model **model);

/* How the model computes, as a JSON object: "threads", as "asked" for or fewer, the "cores" that they
 * may run on, and "why" there are as many. Valid until slm_close; NULL where it is no open model. */
SLM_API const char *slm_model_info(const slm_model *model);

/* Ends the worker threads and unmaps the weights. SLM_ERR_BUSY while sessions are left. NULL is
 * allowed. */
SLM_API int32_t slm_close(slm_model *model);

/* Bytes that slm_session_new takes from the system: KV cache, activations, scratch and logits. Pages
 * that a short conversation does not reach are never touched and cost nothing. */
SLM_API int64_t slm_session_bytes(const slm_model *model);

SLM_API int32_t slm_session_new(slm_model *model, slm_session **session);

/* NULL is allowed. */
SLM_API int32_t slm_session_free(slm_session *session);

/* Appends `count` >= 1 tokens to a decoder's context. `logits` takes slm_output_size() floats, those
 * after the last token; NULL if only slm_sample is to read them. */
SLM_API int32_t slm_eval(slm_session *session, const int32_t *tokens, size_t count, float *logits);

/* The same, with the logits after each token: `logits` takes count * slm_output_size() floats. */
SLM_API int32_t slm_eval_all(slm_session *session, const int32_t *tokens, size_t count,
                             float *logits);

/* Appends one token to each of `count` >= 1 sessions of one model: tokens[i] to sessions[i]. The weights
 * are read once for several sessions, as many as one of "batches" of slm_info() says; sessions beyond
 * that, and all of a model without batches, take turns. Each session's logits have the bits that slm_eval
 * gives, whatever the others are. `logits` takes count * slm_output_size() floats; NULL if only slm_sample
 * is to read them. A call that fails leaves all sessions as they were: SLM_ERR_ARGUMENT where sessions are
 * of different models or one is named twice, SLM_ERR_BUSY where another thread uses one, SLM_ERR_TOKEN,
 * SLM_ERR_CONTEXT or SLM_ERR_KIND where slm_eval would refuse one's token; which one, slm_last_error()
 * says. */
SLM_API int32_t slm_eval_batch(slm_session *const *sessions, const int32_t *tokens, size_t count,
                               float *logits);

/* Runs an encoder over `count` >= 1 tokens: `output` takes count * slm_output_size() floats, or
 * slm_output_size() where the first output is pooled; NULL if only slm_output_get is to read it. An
 * encoder-decoder reads its source so, at most "source_context" tokens of slm_info(): what the
 * decoder needs of it is kept, and a new context begins. Its `output` may be NULL; else it takes
 * count * "hidden_size" floats. */
SLM_API int32_t slm_encode(slm_session *session, const int32_t *tokens, size_t count,
                           float *output);

/* The three calls above with a mask: mask[i] is 0 where token i is hidden, anything else where it is
 * visible. NULL, like a mask that hides nothing, makes them the calls above. The output's rows of
 * hidden tokens are 0, and they count for no pooled output. What a hidden token is depends on the file that was compiled, "mask" of
 * slm_info():
 *   "keys"  a token that no other one attends to, and whose position counts
 *   "skip"  no token at all: it takes no position, and nothing of it is kept
 *   "none"  the model was compiled without --mask arbitrary: hidden tokens may only follow all visible
 *           ones, in slm_encode_masked, where they are left out
 * All other masks are refused with SLM_ERR_MASK. So is one that hides all tokens of slm_encode_masked,
 * or the last one of slm_eval_masked, whose logits are asked for; after an slm_eval_all_masked whose
 * last token is hidden there are none to sample from. Of an encoder-decoder the source alone may have
 * hidden tokens. One call takes no more than slm_context_size() tokens, hidden ones included. */
SLM_API int32_t slm_eval_masked(slm_session *session, const int32_t *tokens, const uint8_t *mask,
                                size_t count, float *logits);
SLM_API int32_t slm_eval_all_masked(slm_session *session, const int32_t *tokens,
                                    const uint8_t *mask, size_t count, float *logits);
SLM_API int32_t slm_encode_masked(slm_session *session, const int32_t *tokens, const uint8_t *mask,
                                  size_t count, float *output);

/* slm_encode_masked of tokens that are of several texts, such as a question and its passage:
 * segments[i], from 0 on, says of which one token i is, as "token_type_ids" do where the file has them;
 * NULL is 0 for all. SLM_ERR_ARGUMENT for a number that is not below "segments" of slm_info(): what a
 * model that tells no texts apart takes is 0. */
SLM_API int32_t slm_encode_segments(slm_session *session, const int32_t *tokens,
                                    const int32_t *segments, const uint8_t *mask, size_t count,
                                    float *output);

/* A model that was compiled with --exit computes fewer layers for a token whose continuation it is sure
 * of earlier ("exits" of slm_info()): slm_eval of exactly one token, the one way in which texts are
 * generated, ends at the first exit whose first logit is ahead of the second by the exit's "margin".
 * What the layers behind it keep of the token is made of the row that it ended with. Calls of several
 * tokens, and slm_eval_all, run all layers. `use` 0: a session does so always; 1, as at first: it does
 * not. Models without exits take both and do the same. */
SLM_API int32_t slm_use_exits(slm_session *session, int32_t use);

/* At which exit the last token that was evaluated ended, from 1 on; 0: behind all layers. */
SLM_API int32_t slm_exit_taken(const slm_session *session);

/* Tokens in the context so far; 0 for an encoder. */
SLM_API int32_t slm_position(const slm_session *session);

/* Forgets all tokens from `position` (0 .. slm_position()) on. Where layers keep a
 * window of positions ("kv_window" of slm_info() is not null) and the context has outgrown its
 * "positions", a session goes back by "seek_back" tokens, or to 0: SLM_ERR_CONTEXT further. After a real step back there are no
 * logits to sample from until the next slm_eval. */
SLM_API int32_t slm_seek(slm_session *session, int32_t position);

/* Chooses the token that follows the last one of the context: its id, or a negative error. It is not
 * appended; pass it to slm_eval. `sampling` may be NULL: greedy. */
SLM_API int32_t slm_sample(slm_session *session, const slm_sampling *sampling);

/* Opens what `slmtvm constraint` wrote. SLM_ERR_FILE where it cannot be read, SLM_ERR_CONSTRAINT where it
 * is damaged. */
SLM_API int32_t slm_constraint_open(const char *path, slm_constraint **constraint);

/* NULL is allowed. */
SLM_API int32_t slm_constraint_close(slm_constraint *constraint);

enum { SLM_TEXT_IS_OVER = -1000 }; /* no error: nothing may follow */

/* The state behind `token`: a text starts in state 0. SLM_TEXT_IS_OVER where it ends the text, which is
 * whole; SLM_ERR_CONSTRAINT where it may not follow. */
SLM_API int32_t slm_constraint_next(const slm_constraint *constraint, int32_t state, int32_t token);

/* How many tokens have to follow at least until the text is whole: 0 where it is, and tokens may follow,
 * or may not; SLM_TEXT_IS_OVER where nothing can, so that no token need be computed to see the end. */
SLM_API int32_t slm_constraint_left(const slm_constraint *constraint, int32_t state);

/* The tokens of its vocabulary. */
SLM_API int32_t slm_constraint_tokens(const slm_constraint *constraint);

/* Where the time went, by kernel, in the order of "kernels" in slm_info(). */
typedef struct slm_kernel_time {
  uint64_t calls;
  uint64_t nanoseconds;     /* of the whole calls, seen by their caller */
  uint64_t own_nanoseconds; /* of the caller's own share: the rest is handing over and waiting */
} slm_kernel_time;

/* Takes the times since the last slm_profile of a model that was opened with SLM_PROFILE, and starts
 * anew; nothing may run on the model meanwhile. `times` takes the first `count` of them. Returns how
 * many kernels there are. */
SLM_API int32_t slm_profile(slm_model *model, slm_kernel_time *times, size_t count);

/* Text in, text out: what turns text into the model's tokens and back. It needs no open model. Texts
 * are UTF-8, with their length in bytes and no 0 at the end; bytes that are no UTF-8 are read as
 * U+FFFD. A tokenizer may be used from several threads at the same time. */
typedef struct slm_tokenizer slm_tokenizer;

/* A part of a text, in bytes from its start: where a token comes from. */
typedef struct slm_span {
  uint32_t begin, end;
} slm_span;

enum { SLM_NO_SPECIAL = 1 /* no tokens that a model wants around a text */ };

/* Opens tokenizer.bin of the bundle (a folder). SLM_ERR_FILE where it cannot be read, as in a bundle
 * whose tokenizer could not be compiled; SLM_ERR_TOKENIZER where it is damaged. */
SLM_API int32_t slm_tokenizer_open(const char *bundle, slm_tokenizer **tokenizer);

/* NULL is allowed. */
SLM_API int32_t slm_tokenizer_close(slm_tokenizer *tokenizer);

/* Bytes of work space that are enough for texts of `bytes` together; what a short call does not reach is
 * never touched. */
SLM_API int64_t slm_tokenize_bytes(const slm_tokenizer *tokenizer, size_t bytes);

/* The tokens of a text; how many there are, of which the first `room` are written. `spans`, which may be
 * NULL, says of each where it comes from: a token that the text does not have is at 0, 0. `work` is
 * 8-aligned and takes slm_tokenize_bytes(). Nothing else is allocated. */
SLM_API int32_t slm_tokenize(const slm_tokenizer *tokenizer, const char *text, size_t bytes,
                             uint32_t flags, int32_t *tokens, slm_span *spans, size_t room,
                             void *work, size_t work_bytes);

/* The tokens of two texts that belong together, such as a question and a passage. `segments` may be
 * NULL; it says of each token which text it is of. Spans are of the token's own text. */
SLM_API int32_t slm_tokenize_pair(const slm_tokenizer *tokenizer, const char *first,
                                  size_t first_bytes, const char *second, size_t second_bytes,
                                  uint32_t flags, int32_t *tokens, int32_t *segments,
                                  slm_span *spans, size_t room, void *work, size_t work_bytes);

/* How far a text has been written; all 0 at its start. */
typedef struct slm_text_state {
  uint64_t token;   /* the first that is not written yet */
  uint32_t written; /* bytes of that one's text, or of a row of bytes, that are */
  uint32_t held;    /* bytes of a character that is not whole */
  uint8_t bytes[4];
  uint32_t started;  /* 1 once a token was text */
  uint32_t stripped; /* how much the start of the text has lost */
} slm_text_state;

enum { SLM_KEEP_SPECIAL = 1, /* write special tokens too */
       SLM_TEXT_ENDS = 2     /* no token follows: write what was held back */
};

/* Writes what `tokens`, all `count` from the start of the text, say after what was written before: only
 * whole characters, and nothing that tokens which follow could change. Returns the bytes that were
 * written; `room` is at least 16, and where it is full, SLM_MORE_TEXT is added: call again. */
SLM_API int32_t slm_detokenize(const slm_tokenizer *tokenizer, slm_text_state *state,
                               const int32_t *tokens, size_t count, uint32_t flags, char *text,
                               size_t room);

enum { SLM_MORE_TEXT = 1 << 30 };

/* The token as the vocabulary has it: bytes of `text` are written, at most `room`; how many there are. */
SLM_API int32_t slm_token_text(const slm_tokenizer *tokenizer, int32_t token, char *text,
                               size_t room);

/* The token whose name in the vocabulary is `text`; SLM_ERR_TOKEN where there is none. */
SLM_API int32_t slm_token_find(const slm_tokenizer *tokenizer, const char *text, size_t bytes);

/* How many tokens there are. */
SLM_API int32_t slm_token_count(const slm_tokenizer *tokenizer);

#ifdef __cplusplus
}
#endif

#endif
