/* The signed manifest of a bundle and the SHA-256 of its files. A manifest is parsed only after its
 * signature was found to be good. */
#define _GNU_SOURCE
#include "trust.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ed25519.h"
#include "error.h"
#include "json.h"
#include "sha256.h"
#include "slm.h"

enum { MOST_MANIFEST_BYTES = 4 << 20, MOST_NAME = 255, READ_BYTES = 1 << 14 };

static const char MANIFEST[] = "manifest.json", SIGNATURE[] = "manifest.json.sig";

/* Opens `bundle`/`file`, a regular file: its descriptor, or -1 with the reason in *code. Where `missing`
 * is not NULL, it is set in place of an error where there is no such file. */
static int open_file(const char *bundle, const char *file, char path[PATH_MAX], uint64_t *bytes,
                     int *missing, int32_t *code) {
  struct stat status;
  int length = snprintf(path, PATH_MAX, "%s/%s", bundle, file);
  if (length < 0 || length >= PATH_MAX) {
    *code = slm_fail(SLM_ERR_ARGUMENT, "the bundle's path is longer than %d bytes", PATH_MAX);
    return -1;
  }
  int opened = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (opened < 0 && errno == ENOENT && missing) {
    *missing = 1;
    return -1;
  }
  if (opened < 0) {
    *code = slm_fail(SLM_ERR_FILE, "%s: cannot open: %s", path, strerror(errno));
    return -1;
  }
  if (fstat(opened, &status) != 0 || !S_ISREG(status.st_mode)) {
    close(opened);
    *code = slm_fail(SLM_ERR_FILE, "%s: not a regular file", path);
    return -1;
  }
  *bytes = (uint64_t)status.st_size;
  return opened;
}

/* Reads up to `room` bytes; what came, or -1. */
static ssize_t read_all(int file, void *data, size_t room) {
  size_t done = 0;
  while (done < room) {
    ssize_t came = read(file, (char *)data + done, room - done);
    if (came < 0 && errno == EINTR) continue;
    if (came < 0) return -1;
    if (came == 0) break;
    done += (size_t)came;
  }
  return (ssize_t)done;
}

int32_t slm_manifest_read(const char *bundle, slm_manifest *manifest) {
  char path[PATH_MAX];
  uint64_t bytes = 0;
  int32_t code = SLM_OK;
  *manifest = (slm_manifest){NULL, 0};
  int file = open_file(bundle, MANIFEST, path, &bytes, NULL, &code);
  if (file < 0) return code;
  if (bytes > MOST_MANIFEST_BYTES)
    code = slm_fail(SLM_ERR_FILE, "%s: %llu bytes, at most %d are read", path,
                    (unsigned long long)bytes, MOST_MANIFEST_BYTES);
  else if (!(manifest->text = malloc(bytes + 1)))
    code = slm_fail(SLM_ERR_MEMORY, "no memory for the manifest");
  else if (read_all(file, manifest->text, bytes) != (ssize_t)bytes)
    code = slm_fail(SLM_ERR_FILE, "%s: cannot be read", path);
  close(file);
  manifest->bytes = bytes;
  if (code != SLM_OK) slm_manifest_free(manifest);
  return code;
}

void slm_manifest_free(slm_manifest *manifest) {
  free(manifest->text);
  *manifest = (slm_manifest){NULL, 0};
}

/* The next key of PEM text: 1 with `key` and *text behind it, 0 where there is none left, -1 where it
 * is no Ed25519 public key. */
static int next_key(const char **text, uint8_t key[SLM_ED25519_KEY_BYTES]) {
  static const char begin[] = "-----BEGIN PUBLIC KEY-----";
  static const char alphabet[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  /* SubjectPublicKeyInfo of id-Ed25519 (RFC 8410): these bytes, then the key. */
  static const uint8_t prefix[12] = {0x30, 0x2a, 0x30, 0x05, 0x06, 0x03,
                                     0x2b, 0x65, 0x70, 0x03, 0x21, 0x00};
  uint8_t bytes[sizeof prefix + SLM_ED25519_KEY_BYTES];
  const char *at = strstr(*text, begin);
  if (!at) return 0;
  uint32_t bits = 0, held = 0;
  size_t count = 0;
  for (at += sizeof begin - 1; *at && *at != '-' && *at != '='; ++at) {
    if (*at == '\n' || *at == '\r' || *at == ' ') continue;
    const char *letter = strchr(alphabet, *at);
    if (!letter) return -1;
    bits = bits << 6 | (uint32_t)(letter - alphabet);
    held += 6;
    if (held < 8) continue;
    held -= 8;
    if (count == sizeof bytes) return -1;
    bytes[count++] = (uint8_t)(bits >> held);
  }
  if (count != sizeof bytes || memcmp(bytes, prefix, sizeof prefix) != 0) return -1;
  memcpy(key, bytes + sizeof prefix, SLM_ED25519_KEY_BYTES);
  *text = at;
  return 1;
}

int slm_keys_accept(const char *keys, const void *data, size_t bytes, const uint8_t signature[64]) {
  uint8_t key[SLM_ED25519_KEY_BYTES];
  int found, count = 0;
  for (; (found = next_key(&keys, key)) > 0; ++count)
    if (slm_ed25519_verify(signature, data, bytes, key)) return 1;
  return found < 0 || !count ? -1 : 0;
}

static int32_t check_signature(const char *bundle, const char *keys,
                               const slm_manifest *manifest) {
  char path[PATH_MAX];
  uint8_t signature[SLM_ED25519_SIGNATURE_BYTES];
  uint64_t bytes = 0;
  int32_t code = SLM_OK;
  int missing = 0;
  int file = open_file(bundle, SIGNATURE, path, &bytes, &missing, &code);
  if (missing)
    return slm_fail(SLM_ERR_SIGNATURE, "%s: no such file: the bundle is not signed", path);
  if (file < 0) return code;
  int whole = bytes == sizeof signature &&
              read_all(file, signature, sizeof signature) == (ssize_t)sizeof signature;
  close(file);
  if (!whole)
    return slm_fail(SLM_ERR_SIGNATURE, "%s: no Ed25519 signature, which has %d bytes", path,
                    SLM_ED25519_SIGNATURE_BYTES);
  int accepted = slm_keys_accept(keys, manifest->text, manifest->bytes, signature);
  if (accepted > 0) return SLM_OK;
  if (accepted < 0)
    return slm_fail(SLM_ERR_ARGUMENT, "public_keys must be Ed25519 public keys in PEM");
  return slm_fail(SLM_ERR_SIGNATURE,
                  "%s/%s: signed by no public key that is trusted, or changed since", bundle,
                  MANIFEST);
}

static slm_json whole(const slm_manifest *manifest) {
  return (slm_json){manifest->text, manifest->text + manifest->bytes};
}

static int32_t check_counter(const char *bundle, uint64_t least, const slm_manifest *manifest) {
  slm_json release, value;
  uint64_t counter = 0;
  if (slm_json_member(whole(manifest), "release", &release) &&
      slm_json_member(release, "counter", &value) && !slm_json_number(value, &counter))
    return slm_fail(SLM_ERR_SIGNATURE, "%s/%s: release.counter is no number", bundle, MANIFEST);
  if (counter < least)
    return slm_fail(SLM_ERR_SIGNATURE,
                    "%s/%s: the bundle's counter is %llu, older than the least that is taken, %llu",
                    bundle, MANIFEST, (unsigned long long)counter, (unsigned long long)least);
  return SLM_OK;
}

int32_t slm_manifest_trust(const char *bundle, const char *keys, uint64_t least_counter,
                           slm_manifest *manifest) {
  int32_t code = slm_manifest_read(bundle, manifest);
  if (code != SLM_OK) return code;
  code = check_signature(bundle, keys, manifest);
  if (code == SLM_OK && !slm_json_valid(whole(manifest)))
    code = slm_fail(SLM_ERR_SIGNATURE, "%s/%s: not valid JSON", bundle, MANIFEST);
  if (code == SLM_OK) code = check_counter(bundle, least_counter, manifest);
  if (code != SLM_OK) slm_manifest_free(manifest);
  return code;
}

/* An object of the manifest that describes a file: its name inside, size and SHA-256. */
typedef struct {
  char file[MOST_NAME + 1];
  uint64_t bytes;
  char sha256[2 * SLM_SHA256_BYTES + 1];
} entry;

static int is_entry(slm_json object, entry *found) {
  slm_json value;
  return slm_json_member(object, "file", &value) &&
         slm_json_string(value, found->file, sizeof found->file) &&
         slm_json_member(object, "bytes", &value) && slm_json_number(value, &found->bytes) &&
         slm_json_member(object, "sha256", &value) &&
         slm_json_string(value, found->sha256, sizeof found->sha256);
}

static int32_t compare(const char *bundle, const entry *wanted, uint64_t bytes,
                       slm_sha256 *hash) {
  uint8_t digest[SLM_SHA256_BYTES];
  char text[2 * SLM_SHA256_BYTES + 1];
  slm_sha256_final(hash, digest);
  for (int i = 0; i < SLM_SHA256_BYTES; ++i) snprintf(text + 2 * i, 3, "%02x", digest[i]);
  if (bytes == wanted->bytes && strcmp(text, wanted->sha256) == 0) return SLM_OK;
  return slm_fail(SLM_ERR_SIGNATURE,
                  "%s/%s: damaged or changed: SHA-256 %.16s..., the manifest says %.16s...", bundle,
                  wanted->file, text, wanted->sha256);
}

int32_t slm_manifest_check(const slm_manifest *manifest, const char *bundle, const char *file,
                           const void *data, size_t bytes) {
  slm_json at = whole(manifest), name, value;
  entry found;
  while (slm_json_each(&at, &name, &value)) {
    if (!is_entry(value, &found) || strcmp(found.file, file) != 0) continue;
    slm_sha256 hash;
    slm_sha256_init(&hash);
    slm_sha256_update(&hash, data, bytes);
    return compare(bundle, &found, bytes, &hash);
  }
  return slm_fail(SLM_ERR_SIGNATURE, "%s/%s: says nothing of %s", bundle, MANIFEST, file);
}

static int32_t check_file(const char *bundle, const entry *wanted, int may_be_missing) {
  char path[PATH_MAX], piece[READ_BYTES];
  uint64_t bytes = 0, done = 0;
  int32_t code = SLM_OK;
  int missing = 0;
  if (wanted->file[0] == '/' || strstr(wanted->file, ".."))
    return slm_fail(SLM_ERR_SIGNATURE, "%s/%s: %s lies outside of the bundle", bundle, MANIFEST,
                    wanted->file);
  int file = open_file(bundle, wanted->file, path, &bytes, may_be_missing ? &missing : NULL, &code);
  if (file < 0) return code;
  slm_sha256 hash;
  slm_sha256_init(&hash);
  ssize_t came;
  while ((came = read_all(file, piece, sizeof piece)) > 0) {
    slm_sha256_update(&hash, piece, (size_t)came);
    done += (uint64_t)came;
  }
  close(file);
  if (came < 0) return slm_fail(SLM_ERR_FILE, "%s: cannot be read", path);
  return compare(bundle, wanted, done, &hash);
}

int32_t slm_manifest_check_files(const slm_manifest *manifest, const char *bundle,
                                 const char *target, const char *mapped) {
  slm_json at = whole(manifest), name, value, targets, own;
  entry found;
  while (slm_json_each(&at, &name, &value)) {
    if (!is_entry(value, &found) || strcmp(found.file, mapped) == 0) continue;
    int32_t code = check_file(bundle, &found, 0);
    if (code != SLM_OK) return code;
  }
  if (!slm_json_member(whole(manifest), "targets", &targets) ||
      !slm_json_member(targets, target, &own))
    return slm_fail(SLM_ERR_SIGNATURE, "%s/%s: says nothing of the target %s", bundle, MANIFEST,
                    target);
  while (slm_json_each(&own, &name, &value)) {
    if (!is_entry(value, &found)) continue;
    int32_t code = check_file(bundle, &found, 1);
    if (code != SLM_OK) return code;
  }
  return SLM_OK;
}
