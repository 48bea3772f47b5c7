/* The key that a bundle's weights are encrypted with, for programs: where it comes from is in the
 * variable SLM_WEIGHTS_KEY, so that it is on no command line.
 *
 *   file:PATH   fd:NUMBER   command:SHELL COMMAND, which may ask a TPM
 *   keyring:NAME, a key of the type "user" in the kernel's keyrings of the process
 *
 * Each gives 32 bytes, or 64 hexadecimal digits. SLM_WEIGHTS_MAY_SWAP=1 lets the decrypted weights go to
 * swap space. */
#ifndef SLM_PROGRAMS_KEY_H
#define SLM_PROGRAMS_KEY_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "slm.h"

enum { KEY_BYTES = 32 };

static uint8_t weights_key[KEY_BYTES];

static int hex_digit(char c) {
  static const char digits[] = "0123456789abcdef0123456789ABCDEF";
  const char *found = c ? strchr(digits, c) : NULL;
  return found ? (int)(found - digits) % 16 : -1;
}

/* 1 where `text` of `bytes` is a key. */
static int parse_key(const char *text, size_t bytes) {
  if (bytes == KEY_BYTES) {
    memcpy(weights_key, text, KEY_BYTES);
    return 1;
  }
  while (bytes > 2 * KEY_BYTES && strchr(" \t\r\n", text[bytes - 1])) --bytes;
  if (bytes != 2 * KEY_BYTES) return 0;
  for (size_t i = 0; i < KEY_BYTES; ++i) {
    int high = hex_digit(text[2 * i]), low = hex_digit(text[2 * i + 1]);
    if (high < 0 || low < 0) return 0;
    weights_key[i] = (uint8_t)(high << 4 | low);
  }
  return 1;
}

static void forget_weights_key(void) {
  volatile uint8_t *secret = weights_key;
  for (size_t i = 0; i < KEY_BYTES; ++i) secret[i] = 0;
}

/* What the kernel keeps under a name, at most `room` bytes of it; 0 where there is nothing. */
static size_t read_keyring(const char *name, char *text, size_t room) {
  enum { READ = 11 /* KEYCTL_READ */ };
  const long key = syscall(SYS_request_key, "user", name, NULL, 0);
  const long bytes = key < 0 ? -1 : syscall(SYS_keyctl, READ, key, text, room);
  return bytes < 0 ? 0 : (size_t)bytes; /* more than `room` where it does not fit */
}

/* Sets `options` as the environment says; negative where the key cannot be had, after saying so. */
static int take_weights_key(const char *program, slm_options *options) {
  const char *source = getenv("SLM_WEIGHTS_KEY"), *swap = getenv("SLM_WEIGHTS_MAY_SWAP");
  char text[2 * KEY_BYTES + 16];
  if (swap && strcmp(swap, "1") == 0) options->flags |= SLM_MAY_SWAP;
  if (!source || !*source) return 0;
  int is_command = strncmp(source, "command:", 8) == 0, is_kept = strncmp(source, "keyring:", 8) == 0;
  FILE *file = NULL;
  if (is_command) file = popen(source + 8, "r");
  else if (strncmp(source, "file:", 5) == 0) file = fopen(source + 5, "rb");
  else if (strncmp(source, "fd:", 3) == 0 && source[3] >= '0' && source[3] <= '9')
    file = fdopen(atoi(source + 3), "rb");
  size_t bytes = is_kept ? read_keyring(source + 8, text, sizeof text)
                 : file ? fread(text, 1, sizeof text, file) : 0;
  int ended = is_kept ? 0 : file ? is_command ? pclose(file) : fclose(file) : -1;
  if (ended == 0 && bytes < sizeof text && parse_key(text, bytes)) {
    options->weights_key = weights_key;
    return 0;
  }
  fprintf(stderr, "%s: error: SLM_WEIGHTS_KEY: %s gives no key: 32 bytes or 64 hexadecimal digits\n",
          program, source);
  return -1;
}

#endif
