/* What is believed of a bundle: its signed manifest, and the SHA-256 of its files. */
#ifndef SLM_TRUST_H
#define SLM_TRUST_H

#include <stddef.h>
#include <stdint.h>

typedef struct slm_manifest {
  char *text; /* NULL: there is none, nothing is checked */
  size_t bytes;
} slm_manifest;

/* Reads `bundle`/manifest.json into memory that slm_manifest_free frees: SLM_ERR_SIGNATURE where its
 * signature, manifest.json.sig, is of none of the Ed25519 public `keys` (PEM text), or its counter is
 * below `least_counter`. */
int32_t slm_manifest_trust(const char *bundle, const char *keys, uint64_t least_counter,
                           slm_manifest *manifest);

/* Reads `bundle`/manifest.json without asking who signed it. */
int32_t slm_manifest_read(const char *bundle, slm_manifest *manifest);

void slm_manifest_free(slm_manifest *manifest);

/* SLM_ERR_SIGNATURE where `bytes` of `data`, which are the content of the bundle's `file`, are not what
 * the manifest says. */
int32_t slm_manifest_check(const slm_manifest *manifest, const char *bundle, const char *file,
                           const void *data, size_t bytes);

/* The same for all files of the manifest but `mapped`, which is left to slm_manifest_check, and those
 * of other targets than `target`; a library or object of `target` may be missing. */
int32_t slm_manifest_check_files(const slm_manifest *manifest, const char *bundle,
                                 const char *target, const char *mapped);

/* 1 where one of the Ed25519 public `keys` (PEM text) made `signature` over `bytes` of `data`, 0 where
 * none did, -1 where `keys` hold none at all or something else. */
int slm_keys_accept(const char *keys, const void *data, size_t bytes, const uint8_t signature[64]);

#endif
