/* Constraints that were compiled beforehand and have a name: a request's response_format chooses one.
 *
 * A schema is compiled in Python: what a request brings is only compared with what was compiled. */
#include <stdio.h>
#include <string.h>

#include "constraint.h"
#include "serve.h"
#include "sha256.h"

static const char field[] = "response_format";

int open_constraints(server *s) {
  for (int i = 0; i < s->options.constraint_count; ++i) {
    named_constraint *named = &s->constraints[i];
    const char *given = s->options.constraints[i], *equals = strchr(given, '=');
    const size_t length = equals ? (size_t)(equals - given) : 0;
    if (length == 0 || length >= sizeof named->name || !equals[1]) {
      fprintf(stderr, "slm-serve: error: --constraint %s: must be NAME=FILE, the name of at most %zu "
                      "bytes\n", given, sizeof named->name - 1);
      return -1;
    }
    memcpy(named->name, given, length);
    if (slm_constraint_open(equals + 1, &named->constraint) < 0) {
      fprintf(stderr, "slm-serve: error: %s\n", slm_last_error());
      return -1;
    }
    if (slm_constraint_tokens(named->constraint) != s->model.vocabulary) {
      fprintf(stderr, "slm-serve: error: %s: is for a vocabulary of %d, this model has %d: compile it "
                      "with this model's bundle\n",
              equals + 1, slm_constraint_tokens(named->constraint), s->model.vocabulary);
      return -1;
    }
  }
  return 0;
}

void close_constraints(server *s) {
  for (int i = 0; i < s->options.constraint_count; ++i)
    slm_constraint_close(s->constraints[i].constraint);
}

/* A JSON value without the white space between its parts. */
static void add_compact(slm_sha256 *hash, json value) {
  int in_string = 0;
  const char *begin = value.at, *at = value.at;
  for (; at < value.end; ++at) {
    if (in_string && *at == '\\') ++at;
    else if (*at == '"') in_string = !in_string;
    else if (!in_string && strchr(" \t\r\n", *at)) {
      slm_sha256_update(hash, begin, (size_t)(at - begin));
      begin = at + 1;
    }
  }
  if (begin < value.end) slm_sha256_update(hash, begin, (size_t)(value.end - begin));
}

static int no_such(const server *s, json name, refusal *r) {
  char known[256] = "";
  size_t length = 0;
  for (int i = 0; i < s->options.constraint_count && length < sizeof known; ++i)
    length += (size_t)snprintf(known + length, sizeof known - length, "%s%s", i ? ", " : "",
                               s->constraints[i].name);
  const int shown = name.at ? (int)(name.end - name.at > 70 ? 70 : name.end - name.at) : 0;
  return refuse(r, 400, field, "unsupported_value",
                "%s: json_schema.name %.*s is no constraint of this server, which takes those that were "
                "compiled before it started (slmtvm constraint, --constraint NAME=FILE): %s",
                field, shown, name.at ? name.at : "", *known ? known : "none");
}

int read_format(server *s, job *j, json body, refusal *r) {
  json format = json_field(body, field), type = json_field(format, "type");
  if (!format.at || json_is(type, "text")) return 0;
  if (!json_is(type, "json_schema"))
    return refuse(r, 400, field, "unsupported_value",
                  "%s.type must be text or json_schema: others are not supported", field);
  json wanted = json_field(format, "json_schema"), name = json_field(wanted, "name");
  for (int i = 0; i < s->options.constraint_count; ++i)
    if (json_is(name, s->constraints[i].name)) j->sampling.constraint = s->constraints[i].constraint;
  if (!j->sampling.constraint) return no_such(s, name, r);
  json schema = json_field(wanted, "schema");
  if (!schema.at) return 0;
  uint8_t digest[SLM_SHA256_BYTES];
  slm_sha256 hash;
  slm_sha256_init(&hash);
  add_compact(&hash, schema);
  slm_sha256_final(&hash, digest);
  if (memcmp(digest, j->sampling.constraint->source_digest, sizeof digest) == 0) return 0;
  return refuse(r, 400, field, "unsupported_value",
                "%s: json_schema.schema is not the one that was compiled under this name: leave it out, "
                "or compile it and start the server with it", field);
}

/* Tools are known by their JSON, and the name of the one that has to be called. */
int constrain_to_tools(server *s, job *j, json tools, const char *name, refusal *r) {
  static const char kind[] = "tools";
  uint8_t digest[SLM_SHA256_BYTES];
  slm_sha256 hash;
  if (j->sampling.constraint)
    return refuse(r, 400, "tool_choice", "unsupported_value",
                  "tool_choice asks for a call, and %s for something else", field);
  slm_sha256_init(&hash);
  slm_sha256_update(&hash, kind, sizeof kind);
  slm_sha256_update(&hash, name, strlen(name) + 1);
  add_compact(&hash, tools);
  slm_sha256_final(&hash, digest);
  for (int i = 0; i < s->options.constraint_count; ++i)
    if (memcmp(digest, s->constraints[i].constraint->source_digest, sizeof digest) == 0)
      j->sampling.constraint = s->constraints[i].constraint;
  if (j->sampling.constraint) return 0;
  return refuse(r, 400, "tool_choice", "unsupported_value",
                "calls of these tools%s%s were not compiled before this server started (slmtvm constraint "
                "--tools FILE%s%s, --constraint NAME=FILE): leave tool_choice out, or start it with them",
                *name ? " by name " : "", name, *name ? " --tool " : "", name);
}

int32_t most_to_come(const server *s, const job *j) {
  const int32_t room = s->model.context - j->count + 1; /* the last token needs no place */
  return j->most_tokens - j->made < room ? j->most_tokens - j->made : room;
}

/* A text that cannot become whole is refused before it is begun. */
int check_room(const server *s, const job *j, refusal *r) {
  if (!j->sampling.constraint) return 0;
  const int32_t least = slm_constraint_left(j->sampling.constraint, 0);
  const int32_t begun = s->model.kind == KIND_ENCODER_DECODER ? 1 : j->prompt_tokens;
  const int32_t room = s->model.context - begun + 1;
  const int32_t most = j->most_tokens < room ? j->most_tokens : room;
  if (least <= most) return 0;
  return refuse(r, 400, j->most_tokens < room ? "max_tokens" : "prompt", "invalid_value",
                "what may be written takes at least %d tokens, and %d may come", least, most);
}

follow follow_constraint(job *j, int32_t token) {
  slm_sampling *p = &j->sampling;
  p->state = slm_constraint_next(p->constraint, p->state, token);
  if (p->state == SLM_TEXT_IS_OVER) return ENDS_BEFORE;
  if (p->state < 0) return FOLLOW_FAILED;
  return slm_constraint_left(p->constraint, p->state) == SLM_TEXT_IS_OVER ? ENDS_BEHIND : GOES_ON;
}
