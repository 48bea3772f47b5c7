/* What instructions of PTX mean that are no operators of C++; included after emulator.h. */
#ifndef PTX_H
#define PTX_H

#include <limits>

namespace ptx {
template <class T, class F> inline T as(F v) {
  T t{};
  std::memcpy(&t, &v, sizeof t < sizeof v ? sizeof t : sizeof v);
  return t;
}
template <class T> inline T get(uint64_t at) {
  T v;
  if (at % sizeof v) emu::fail("a load that is not aligned");
  std::memcpy(&v, (const void *)at, sizeof v);
  return v;
}
template <class T> inline void put(uint64_t at, T v) {
  if (at % sizeof v) emu::fail("a store that is not aligned");
  std::memcpy((void *)at, &v, sizeof v);
}
struct any { /* an argument of a call */
  const char *at;
  template <class T> operator T() const { return get<T>((uint64_t)at); }
};
inline uint64_t shared() { return (uint64_t)emu::self->block->shared.data(); }
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t all = (uint64_t)b << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t from = selector >> 4 * i, byte = (uint32_t)(all >> 8 * (from & 7)) & 255;
    if (from & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}
template <class T> inline uint32_t field(T v, uint32_t at, uint32_t count) {
  if (!count) return 0;
  if (count > 31) return (uint32_t)(v >> at);
  uint32_t found = (uint32_t)(v >> at) & ((1u << count) - 1);
  return (T)-1 < 0 && found >> (count - 1) ? found | ~((1u << count) - 1) : found;
}
template <class T> inline T least(T a, T b) { return a != a ? b : b != b ? a : a < b ? a : b; }
template <class T> inline T most(T a, T b) { return a != a ? b : b != b ? a : a > b ? a : b; }
template <class T, class F> inline T to_int(F v) {
  if (v != v) return 0;
  if (v <= (F)std::numeric_limits<T>::min()) return std::numeric_limits<T>::min();
  if (v >= (F)std::numeric_limits<T>::max()) return std::numeric_limits<T>::max();
  return (T)v;
}
}
using namespace ptx;

#endif
