/* Reads random and mutated JSON, keys and signatures: run under sanitizers, it must only end well.
 *
 *   hostile_manifests FOLDER SEED ROUNDS
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "json.h"
#include "slm.h"
#include "trust.h"

static uint64_t state;

static uint32_t below(uint32_t limit) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (uint32_t)(state >> 33) % limit;
}

/* Walks through all of a value as the runtime does. */
static void walk(slm_json value, int deep) {
  slm_json at = value, name, inner;
  uint64_t number;
  char text[64];
  slm_json_number(value, &number);
  slm_json_string(value, text, sizeof text);
  slm_json_member(value, "weights", &inner);
  while (slm_json_each(&at, &name, &inner))
    if (deep) walk(inner, deep - 1);
}

static void mutate(char *text, size_t *bytes, size_t room) {
  static const char pieces[] = "{}[]\",:\\u0eE+-.tfn 19\n\0\xff";
  for (uint32_t n = below(4) + 1; n; --n) {
    size_t at = *bytes ? below((uint32_t)*bytes) : 0;
    switch (below(4)) {
      case 0:
        *bytes = at;
        break;
      case 1:
        if (*bytes + 1 < room) {
          memmove(text + at + 1, text + at, *bytes - at);
          text[at] = pieces[below(sizeof pieces)];
          ++*bytes;
        }
        break;
      default:
        if (*bytes) text[at] = pieces[below(sizeof pieces)];
    }
  }
}

int main(int argc, char **argv) {
  static const char seed_text[] =
      "{\"weights\": {\"file\": \"weights.bin\", \"bytes\": 12, \"sha256\": \"00ff\"}, \"a\": [1, -2.5e3, "
      "true, null, \"\\u00e4\\\"\", [[]], {}], \"targets\": {\"x\": {\"library\": {\"file\": "
      "\"lib/x.so\", \"bytes\": 0, \"sha256\": \"\"}}}, \"release\": {\"counter\": 3}}";
  static const char seed_keys[] =
      "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n"
      "-----END PUBLIC KEY-----\n";
  enum { ROOM = 2048 };
  if (argc != 4) return 2;
  state = strtoull(argv[2], NULL, 10);
  char path[4096];
  snprintf(path, sizeof path, "%s/manifest.json", argv[1]);
  for (long round = atol(argv[3]); round; --round) {
    size_t bytes = sizeof seed_text - 1, key_bytes = sizeof seed_keys - 1;
    char *text = malloc(ROOM), *keys = malloc(ROOM);
    memcpy(text, seed_text, bytes);
    memcpy(keys, seed_keys, key_bytes);
    mutate(text, &bytes, ROOM);
    mutate(keys, &key_bytes, ROOM - 1);
    /* Of exactly its size, so that one byte too far is seen. */
    char *exact = malloc(bytes ? bytes : 1), *exact_keys = malloc(key_bytes + 1);
    memcpy(exact, text, bytes);
    memcpy(exact_keys, keys, key_bytes);
    exact_keys[key_bytes] = 0;
    slm_json json = {exact, exact + bytes};
    if (slm_json_valid(json)) walk(json, 8);
    uint8_t signature[64];
    for (int i = 0; i < 64; ++i) signature[i] = (uint8_t)below(256);
    slm_keys_accept(exact_keys, exact, bytes, signature);
    slm_manifest manifest = {exact, bytes};
    if (slm_json_valid(json)) {
      slm_manifest_check(&manifest, argv[1], "weights.bin", text, 3);
      slm_manifest_check_files(&manifest, argv[1], "x", "weights.bin");
    }
    free(text), free(keys), free(exact), free(exact_keys);
  }
  printf("done\n");
  return 0;
}
