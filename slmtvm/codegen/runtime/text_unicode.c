/* Unicode's normalization forms: characters are taken apart, combining marks put into canonical order,
 * and, where the step says so, put together again (the Unicode standard, sections 3.11 and 3.12). */
#include <string.h>

#include "text.h"
#include "text_writer.h"

enum {
  L_BASE = 0x1100, V_BASE = 0x1161, T_BASE = 0x11a7, S_BASE = 0xac00,
  L_COUNT = 19, V_COUNT = 21, T_COUNT = 28, N_COUNT = V_COUNT * T_COUNT,
  S_COUNT = L_COUNT * N_COUNT, /* Hangul syllables, which follow a rule */
  SHORT_RUN = 16
};

/* A character of the new text; `change` as slm_write_change takes it. */
typedef struct {
  uint32_t character;
  int32_t change;
} mark;

typedef struct {
  const slm_text_step *step;
  mark *marks;
  size_t count, room;
} marks;

static uint32_t class_of(const slm_text_step *step, uint32_t character) {
  return slm_char_value(&step->automaton.classes, character);
}

static void add(marks *m, uint32_t character, int32_t change) {
  if (m->count < m->room) m->marks[m->count] = (mark){character, change};
  ++m->count;
}

/* Each first character that another becomes replaces it, the rest is new. */
static void decompose(marks *m, uint32_t character) {
  if (character - S_BASE < S_COUNT) {
    const uint32_t s = character - S_BASE;
    add(m, L_BASE + s / N_COUNT, 0);
    add(m, V_BASE + s % N_COUNT / T_COUNT, 1);
    if (s % T_COUNT) add(m, T_BASE + s % T_COUNT, 1);
    return;
  }
  const uint32_t value = slm_char_value(&m->step->map, character);
  if (!value) {
    add(m, character, 0);
    return;
  }
  const slm_strings *strings = &m->step->strings;
  uint32_t size;
  for (uint32_t at = strings->ends[value - 1]; at < strings->ends[value]; at += size)
    add(m, slm_char_at(strings->bytes + at, &size), at == strings->ends[value - 1] ? 0 : 1);
}

/* Sorts marks by class; those of one class stay in order. `spare` takes as many. */
static void sort(const slm_text_step *step, mark *run, size_t count, mark *spare) {
  if (count <= SHORT_RUN) {
    for (size_t i = 1; i < count; ++i) {
      const mark moved = run[i];
      const uint32_t class = class_of(step, moved.character);
      size_t at = i;
      for (; at > 0 && class_of(step, run[at - 1].character) > class; --at) run[at] = run[at - 1];
      run[at] = moved;
    }
    return;
  }
  size_t begins[257] = {0};
  for (size_t i = 0; i < count; ++i) ++begins[(class_of(step, run[i].character) & 255) + 1];
  for (int i = 0; i < 256; ++i) begins[i + 1] += begins[i];
  for (size_t i = 0; i < count; ++i)
    spare[begins[class_of(step, run[i].character) & 255]++] = run[i];
  memcpy(run, spare, count * sizeof *run);
}

static void order(marks *m, mark *spare) {
  for (size_t i = 0; i < m->count;) {
    size_t end = i;
    while (end < m->count && class_of(m->step, m->marks[end].character)) ++end;
    if (end > i + 1) sort(m->step, m->marks + i, end - i, spare);
    i = end + 1;
  }
}

/* The character that two are together, or SLM_NONE. */
static uint32_t composed(const slm_text_step *step, uint32_t a, uint32_t b) {
  if (a - L_BASE < L_COUNT && b - V_BASE < V_COUNT)
    return S_BASE + ((a - L_BASE) * V_COUNT + (b - V_BASE)) * T_COUNT;
  if (a - S_BASE < S_COUNT && (a - S_BASE) % T_COUNT == 0 && b - T_BASE - 1 < T_COUNT - 1)
    return a + (b - T_BASE);
  const uint32_t *found = slm_pairs_find(&step->pairs, a, b);
  return found ? found[0] : SLM_NONE;
}

/* Puts marks together with the last starter before them that they reach. */
static void compose(marks *m) {
  size_t starter = SIZE_MAX, kept = 0;
  uint32_t last = SLM_NONE; /* class of the mark before, SLM_NONE right behind the starter */
  for (size_t i = 0; i < m->count; ++i) {
    const mark c = m->marks[i];
    const uint32_t class = class_of(m->step, c.character);
    if (starter != SIZE_MAX && (last == SLM_NONE || last < class)) {
      mark *s = &m->marks[starter];
      const uint32_t together = composed(m->step, s->character, c.character);
      if (together != SLM_NONE) {
        *s = (mark){together, s->change + c.change - 1};
        continue;
      }
    }
    if (class == 0) {
      starter = kept;
      last = SLM_NONE;
    } else if (starter != SIZE_MAX) {
      last = class;
    }
    m->marks[kept++] = c;
  }
  m->count = kept;
}

/* Whether nothing has to be done. */
static int is_normal(const slm_text_step *step, const slm_piece *piece) {
  uint32_t size;
  for (size_t at = 0; at < piece->length; at += size) {
    const uint32_t c = slm_char_at(piece->bytes + at, &size);
    if (c < 0x80) continue;
    if (slm_char_value(&step->map, c) || class_of(step, c) || c - S_BASE < S_COUNT ||
        (c >= L_BASE && c < L_BASE + 256))
      return 0;
  }
  return 1;
}

int32_t slm_step_normalize(slm_encoding *e, uint32_t number, const slm_piece *piece) {
  const slm_text_step *step = &e->tokenizer->steps[number];
  if (is_normal(step, piece)) return slm_follow(e, number + 1, piece);
  slm_writer w;
  int32_t code = slm_write_begin(e, step, piece, &w);
  if (code != SLM_OK) return code;
  /* A character takes a byte of the new text at least, before it is put together. */
  marks m = {.step = step, .room = w.room};
  const size_t used = e->work_used;
  m.marks = slm_work_take(e, m.room * sizeof *m.marks);
  mark *spare = slm_work_take(e, m.room * sizeof *spare);
  if (!m.marks || !spare) return SLM_ERR_MEMORY;
  uint32_t size;
  for (size_t at = 0; at < piece->length; at += size)
    decompose(&m, slm_char_at(piece->bytes + at, &size));
  if (m.count > m.room) return slm_write_overflow();
  order(&m, spare);
  if (step->choice) compose(&m);
  for (size_t i = 0; i < m.count; ++i) {
    uint8_t bytes[4];
    slm_write_change(&w, bytes, slm_char_write(m.marks[i].character, bytes), m.marks[i].change);
  }
  e->work_used = used;
  return slm_write_end(e, number, &w);
}
