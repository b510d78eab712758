// The kernels around the two sparse products, each one pass over memory. Compiled at run time (NVRTC, through CuPy) and
// without any header, so 16-bit floats are their bits with two conversions each. Needs compute capability 8.0.
//
// Names: O rows (out features), I columns (in features), both multiples of 16; a group is 4 neighbours that share a nibble.
//   values       (O, I/2)  kept entries of W^R, row by row in column order: two for each group along a row
//   positions    (O, I/8)  bits of W^R's mask, lowest bit first: a nibble for each group, with exactly two bits set
//   positions_t  (I, O/8)  bits of W^{R,C}'s mask, transposed: a nibble for each group along a column, 0 to 2 bits set
//
// The filler rule. A packed matrix has exactly two slots for each group, so a group of W^{R,C} that keeps fewer than two
// entries gets fillers: its lowest free places, as many as are missing. Slots are in order of place; a filler's slot holds
// zero. `mark` writes the rule as a matrix, from which the library makes the metadata.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

struct bf16 { u16 bits; };
struct fp16 { u16 bits; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }
__device__ inline float to_float(fp16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}

template <class T> __device__ inline T from_float(float x);
template <> __device__ inline float from_float<float>(float x) { return x; }
template <> __device__ inline bf16 from_float<bf16>(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
template <> __device__ inline fp16 from_float<fp16>(float x) {
  fp16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}

// N neighbours that are moved together: 8, 16 or 32 bytes.
template <class T, int N> struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack { T at[N]; };

template <class P> __device__ inline P load(const void* address) { return *static_cast<const P*>(address); }

// Stores to global memory are spelled out, because the compiler splits a copy of 16-bit members into small ones.
template <class T> __device__ inline u32 word(const T* pair) { return u32(pair[0].bits) | u32(pair[1].bits) << 16; }
__device__ inline void store(float* address, const Pack<float, 4>& pack) {
  *reinterpret_cast<float4*>(address) = make_float4(pack.at[0], pack.at[1], pack.at[2], pack.at[3]);
}
template <class T> __device__ inline void store(T* address, const Pack<T, 4>& pack) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(word(pack.at)), "r"(word(pack.at + 2)) : "memory");
}
template <class T> __device__ inline void store(T* address, const Pack<T, 8>& pack) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(word(pack.at)), "r"(word(pack.at + 2)),
               "r"(word(pack.at + 4)), "r"(word(pack.at + 6))
               : "memory");
}

// The two kept entries of a group out of its four, in order; `nibble` has two bits set.
template <class T> __device__ inline T first_of(const T* group, u32 nibble) {
  return nibble & 1 ? group[0] : nibble & 2 ? group[1] : group[2];
}
template <class T> __device__ inline T second_of(const T* group, u32 nibble) {
  return nibble & 8 ? group[3] : nibble & 4 ? group[2] : group[1];
}

// The inverse: two kept entries to four places, `rest` where nothing is kept.
template <class T> __device__ inline void spread(T first, T second, u32 nibble, T rest, T* group) {
  group[0] = nibble & 1 ? first : rest;
  group[1] = nibble & 2 ? (nibble & 1 ? second : first) : rest;
  group[2] = nibble & 4 ? (nibble & 3 ? second : first) : rest;
  group[3] = nibble & 8 ? second : rest;
}

__device__ inline u32 with_fillers(u32 nibble) {
  if (__popc(nibble) < 2) nibble |= ~nibble & (nibble + 1);  // the lowest bit that is not set
  if (__popc(nibble) < 2) nibble |= ~nibble & (nibble + 1);
  return nibble;
}

// ---------------------------------------------------------------------------------------------------------------------
// gather_kept: the entries of a dense (O, I) matrix at `positions`, as (O, I/2). One thread: 4 times 8 columns.

constexpr int GATHER_THREADS = 256, GATHER_UNROLL = 4;

template <class D, class V>
__device__ inline void gather_kept(const D* dense, const u8* positions, V* kept, i64 bytes) {
  const i64 start = i64(blockIdx.x) * (GATHER_THREADS * GATHER_UNROLL) + threadIdx.x;
  Pack<D, 8> chunk[GATHER_UNROLL];
  u32 bits[GATHER_UNROLL];
#pragma unroll
  for (int u = 0; u < GATHER_UNROLL; ++u) {
    const i64 at = start + u * GATHER_THREADS;
    if (at < bytes) {
      chunk[u] = load<Pack<D, 8>>(dense + at * 8);
      bits[u] = positions[at];
    }
  }
#pragma unroll
  for (int u = 0; u < GATHER_UNROLL; ++u) {
    const i64 at = start + u * GATHER_THREADS;
    if (at < bytes) {
      Pack<V, 4> out;
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        const u32 nibble = bits[u] >> (4 * g) & 15;
        out.at[2 * g] = from_float<V>(to_float(first_of(chunk[u].at + 4 * g, nibble)));
        out.at[2 * g + 1] = from_float<V>(to_float(second_of(chunk[u].at + 4 * g, nibble)));
      }
      store(kept + at * 4, out);
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// refresh: values to the copies that the products read: W^R (O, I/2 packed or I dense) and W^{R,C} transposed (I, O/2 packed
// or O dense). A block takes a tile of 64 rows and 128 columns; it writes the tile of W^R while it reads, keeps it dense
// in shared memory, and reads it there by columns to write W^{R,C}. A null pointer leaves that copy out.

constexpr int TILE_O = 64, TILE_I = 128, REFRESH_THREADS = 256;

// One layer as `refresh` takes it; cuda.py writes these as rows of 64-bit numbers.
template <class V, class T> struct Layer {
  const V* values;
  const u8* positions;
  const u8* positions_t;
  const V* bias;
  T* w;
  T* w_t;
  T* bias_copy;
  i64 rows, columns, packed, packed_t;
};

template <class V, class T> __device__ inline void refresh(const Layer<V, T>& layer) {
  const auto [values, positions, positions_t, bias, w, w_t, bias_copy, rows, columns, packed, packed_t] = layer;
  const u32 across = u32(columns + TILE_I - 1) / TILE_I;
  const i64 o0 = i64(blockIdx.x / across) * TILE_O, i0 = i64(blockIdx.x % across) * TILE_I;
  if (o0 >= rows) return;  // a layer that is smaller than the largest of the launch
  // Chunks of 8 columns (16 bytes) are swizzled by the row's block of 16, so that neither phase meets a bank conflict.
  __shared__ Pack<T, 8> tile[TILE_O][TILE_I / 8];
  constexpr int ITEMS = TILE_O * (TILE_I / 8) / REFRESH_THREADS;
  // The second phase's item: 16 rows of one column. Four neighbouring threads write 64 neighbouring bytes.
  constexpr int BLOCKS = TILE_O / 16, ITEMS_T = TILE_I * BLOCKS / REFRESH_THREADS;
  Pack<V, 4> kept[ITEMS];
  u32 bits[ITEMS], all_bits_t[ITEMS_T];
#pragma unroll
  for (int u = 0; u < ITEMS; ++u) {
    const int item = u * REFRESH_THREADS + threadIdx.x;
    const i64 o = o0 + item / (TILE_I / 8), i = i0 + item % (TILE_I / 8) * 8;
    if (o < rows && i < columns) {
      kept[u] = load<Pack<V, 4>>(values + (o * columns + i) / 2);
      bits[u] = positions[(o * columns + i) / 8];
    }
  }
#pragma unroll
  for (int u = 0; u < ITEMS_T; ++u) {  // read here, so that the second phase waits for no memory
    const int item = u * REFRESH_THREADS + threadIdx.x;
    const i64 o = o0 + item % BLOCKS * 16, i = i0 + item / BLOCKS;
    if (w_t && o < rows && i < columns)
      all_bits_t[u] = *reinterpret_cast<const u16*>(positions_t + (i * rows + o) / 8);
  }
#pragma unroll
  for (int u = 0; u < ITEMS; ++u) {
    const int item = u * REFRESH_THREADS + threadIdx.x;
    const int row = item / (TILE_I / 8), chunk = item % (TILE_I / 8);
    const i64 o = o0 + row, i = i0 + chunk * 8;
    if (o < rows && i < columns) {
      Pack<T, 4> small;
#pragma unroll
      for (int k = 0; k < 4; ++k) small.at[k] = from_float<T>(to_float(kept[u].at[k]));
      Pack<T, 8> wide;
      spread(small.at[0], small.at[1], bits[u] & 15, from_float<T>(0.0f), wide.at);
      spread(small.at[2], small.at[3], bits[u] >> 4, from_float<T>(0.0f), wide.at + 4);
      if (w && packed) store(w + (o * columns + i) / 2, small);
      if (w && !packed) store(w + o * columns + i, wide);
      tile[row][chunk ^ (row / 16)] = wide;
    }
  }
  if (bias_copy && i0 == 0 && threadIdx.x < TILE_O && o0 + threadIdx.x < rows)
    bias_copy[o0 + threadIdx.x] = from_float<T>(to_float(bias[o0 + threadIdx.x]));
  if (!w_t) return;
  __syncthreads();

#pragma unroll
  for (int u = 0; u < ITEMS_T; ++u) {
    const int item = u * REFRESH_THREADS + threadIdx.x;
    const int block = item % BLOCKS, column = item / BLOCKS;
    const i64 o = o0 + block * 16, i = i0 + column;
    if (o >= rows || i >= columns) continue;
    const u32 bits_t = all_bits_t[u];
    const auto entry = [&](int row) { return tile[block * 16 + row][column / 8 ^ block].at[column % 8]; };
    const T zero = from_float<T>(0.0f);
    if (packed_t) {
      Pack<T, 8> out;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const u32 nibble = bits_t >> (4 * g) & 15, slots = with_fillers(nibble);
        const int first = __ffs(slots) - 1, second = 31 - __clz(slots);
        out.at[2 * g] = nibble >> first & 1 ? entry(4 * g + first) : zero;
        out.at[2 * g + 1] = nibble >> second & 1 ? entry(4 * g + second) : zero;
      }
      store(w_t + (i * rows + o) / 2, out);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pack<T, 8> out;
#pragma unroll
        for (int k = 0; k < 8; ++k) out.at[k] = bits_t >> (8 * half + k) & 1 ? entry(8 * half + k) : zero;
        store(w_t + i * rows + o + 8 * half, out);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// double_prune: of the kept entries of every group along a column, the two largest, of equal ones the first, as
// masks.double_prune chooses them. A thread takes 8 rows and 8 columns; the bytes meet in shared memory to be written in rows.

constexpr int PRUNE_O = 128, PRUNE_I = 64, PRUNE_THREADS = 128;

// A tournament of all pairs: an entry stays whose rank, the number of entries that beat it, is below two.
__device__ inline u32 two_largest(const float* score) {
  u32 rank[4] = {0, 0, 0, 0};
#pragma unroll
  for (int late = 1; late < 4; ++late)
#pragma unroll
    for (int early = 0; early < late; ++early) {
      const bool late_wins = score[late] > score[early];
      rank[early] += late_wins;
      rank[late] += !late_wins;
    }
  u32 nibble = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) nibble |= u32(rank[k] < 2 && score[k] >= 0) << k;
  return nibble;
}

// One layer as `double_prune` takes it, and below as `metadata` does.
template <class V> struct Pruning {
  const V* values;
  const u8* positions;
  u8* positions_t;
  i64 rows, columns;
};

template <class V> __device__ inline void double_prune(const Pruning<V>& layer) {
  const auto [values, positions, positions_t, rows, columns] = layer;
  __shared__ u8 bytes[PRUNE_I][PRUNE_O / 8];
  const u32 across = u32(columns + PRUNE_I - 1) / PRUNE_I;
  const i64 o0 = i64(blockIdx.x / across) * PRUNE_O, i0 = i64(blockIdx.x % across) * PRUNE_I;
  if (o0 >= rows) return;  // a layer that is smaller than the largest of the launch
  const int chunk = threadIdx.x % (PRUNE_I / 8), byte = threadIdx.x / (PRUNE_I / 8);
  const i64 o = o0 + byte * 8, i = i0 + chunk * 8;
  if (o < rows && i < columns) {
    Pack<V, 4> kept[8];
    u32 bits[8], out[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      kept[r] = load<Pack<V, 4>>(values + ((o + r) * columns + i) / 2);
      bits[r] = positions[((o + r) * columns + i) / 8];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int g = 0; g < 2; ++g) {
        float score[4][4];  // [column][row] of a 4 x 4 block
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const Pack<V, 4>& row = kept[4 * half + r];
          float group[4];
          spread(fabsf(to_float(row.at[2 * g])), fabsf(to_float(row.at[2 * g + 1])), bits[4 * half + r] >> (4 * g) & 15, -1.0f, group);
#pragma unroll
          for (int c = 0; c < 4; ++c) score[c][r] = group[c];
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) out[4 * g + c] |= two_largest(score[c]) << (4 * half);
      }
#pragma unroll
    for (int c = 0; c < 8; ++c) bytes[chunk * 8 + c][byte] = u8(out[c]);
  }
  __syncthreads();
  for (int item = threadIdx.x; item < PRUNE_I * (PRUNE_O / 16); item += PRUNE_THREADS) {
    const int column = item / (PRUNE_O / 16), pair = item % (PRUNE_O / 16);
    const i64 out_o = o0 + pair * 16, out_i = i0 + column;
    if (out_o < rows && out_i < columns)
      *reinterpret_cast<u16*>(positions_t + (out_i * rows + out_o) / 8) = bytes[column][2 * pair] | bytes[column][2 * pair + 1] << 8;
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// mark: bits of a mask to a dense matrix of ones in the two slots of every group and zeros elsewhere. A thread: 8 places.

constexpr int MARK_THREADS = 256;

template <class T> __device__ inline void mark(const u8* bits, T* marked, i64 bytes) {
  const i64 at = i64(blockIdx.x) * MARK_THREADS + threadIdx.x;
  if (at >= bytes) return;
  const u32 slots = with_fillers(bits[at] & 15) | with_fillers(bits[at] >> 4) << 4;
  Pack<T, 8> out;
#pragma unroll
  for (int k = 0; k < 8; ++k) out.at[k] = from_float<T>(float(slots >> k & 1));
  store(marked + at * 8, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// metadata: bits of a mask (R, C/8) to the library's metadata of a packed 16-bit matrix on sm_90, R·C/8 bytes; R a multiple of
// 64, C of 32. A group's nibble is the places of its two slots, first | second << 2. Tiles of 16 rows and 32 columns hold, for
// each r of 8, the bytes of rows r (low nibbles) and r + 8 (high), the groups in the order 0 4 1 5 2 6 3 7; 4 tiles downwards
// come first, then those to the right. The order is nowhere documented: copies.py takes it only where it has seen the library
// write the same. A thread: 8 bytes.

constexpr int METADATA_THREADS = 256;

struct Marks {
  const u8* bits;
  u8* metadata;
  i64 rows, columns;
};

__device__ inline u32 places(u32 nibble) {
  const u32 slots = with_fillers(nibble);
  return (__ffs(slots) - 1) | (31 - __clz(slots)) << 2;
}

__device__ inline void metadata(const Marks& layer) {
  const auto [bits, out, rows, columns] = layer;
  const i64 at = i64(blockIdx.x) * METADATA_THREADS + threadIdx.x;  // which 8 bytes: [R/64][C/32][4][8]
  if (at >= rows * columns / 64) return;
  const i64 across = columns / 32, tile = at / 32;
  const i64 r = tile / across * 64 + at % 32 / 8 * 16 + at % 8, c = tile % across * 32;
  const u32 low = *reinterpret_cast<const u32*>(bits + (r * columns + c) / 8);
  const u32 high = *reinterpret_cast<const u32*>(bits + ((r + 8) * columns + c) / 8);
  u32 words[2] = {0, 0};
#pragma unroll
  for (int group = 0; group < 8; ++group) {
    const u32 byte = places(low >> (4 * group) & 15) | places(high >> (4 * group) & 15) << 4;
    const int place = 2 * (group % 4) + group / 4;
    words[place / 4] |= byte << (8 * (place % 4));
  }
  *reinterpret_cast<uint2*>(out + at * 8) = make_uint2(words[0], words[1]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Entry points: gather_kept_<dense>_<values>, refresh_<values>_<copy>, double_prune_<values>, mark_<copy>, metadata; with
// _all, a layer for each blockIdx.y. Numbers come as 64 bits, the width in which CuPy passes a Python integer.

#define GATHER(D, V)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(GATHER_THREADS)                                                              \
      gather_kept_##D##_##V(const D* dense, const u8* positions, V* kept, i64 bytes) {                                      \
    gather_kept(dense, positions, kept, bytes);                                                                             \
  }
#define REFRESH(V, T)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(REFRESH_THREADS)                                                             \
      refresh_##V##_##T(const V* values, const u8* positions, const u8* positions_t, const V* bias, T* w, T* w_t,           \
                        T* bias_copy, i64 rows, i64 columns, i64 packed, i64 packed_t) {                                    \
    refresh(Layer<V, T>{values, positions, positions_t, bias, w, w_t, bias_copy, rows, columns, packed, packed_t});         \
  }                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(REFRESH_THREADS) refresh_##V##_##T##_all(const Layer<V, T>* layers) {        \
    refresh(layers[blockIdx.y]);                                                                                            \
  }
#define PRUNE(V)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(PRUNE_THREADS)                                                               \
      double_prune_##V(const V* values, const u8* positions, u8* positions_t, i64 rows, i64 columns) {                      \
    double_prune(Pruning<V>{values, positions, positions_t, rows, columns});                                                \
  }                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(PRUNE_THREADS) double_prune_##V##_all(const Pruning<V>* layers) {            \
    double_prune(layers[blockIdx.y]);                                                                                       \
  }
#define MARK(T)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(MARK_THREADS) mark_##T(const u8* bits, T* marked, i64 bytes) {               \
    mark(bits, marked, bytes);                                                                                              \
  }

GATHER(bf16, float)
GATHER(bf16, bf16)
GATHER(fp16, float)
GATHER(fp16, fp16)
GATHER(float, float)
REFRESH(float, bf16)
REFRESH(float, fp16)
REFRESH(bf16, bf16)
REFRESH(fp16, fp16)
PRUNE(float)
PRUNE(bf16)
PRUNE(fp16)
MARK(bf16)
MARK(fp16)

extern "C" __global__ void __launch_bounds__(METADATA_THREADS)
    metadata(const u8* bits, u8* out, i64 rows, i64 columns) {
  metadata(Marks{bits, out, rows, columns});
}
extern "C" __global__ void __launch_bounds__(METADATA_THREADS) metadata_all(const Marks* layers) {
  metadata(layers[blockIdx.y]);
}
