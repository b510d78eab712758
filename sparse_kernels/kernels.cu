// The kernels around the two sparse products, each one pass over memory. Compiled at run time (NVRTC, through CuPy). Needs
// compute capability 8.0.
//
// Names: O rows (out features), I columns (in features), both multiples of 16; a group is 4 neighbours that share a nibble.
//   values         (O, I/2)  kept entries of W^R, row by row in column order: two for each group along a row
//   row_bits       (O, I/8)  bits of W^R's mask, lowest bit first: a nibble for each group, with exactly two bits set
//   backward_bits  (I, O/8)  bits of W^{R,C}'s mask, transposed: a nibble for each group along a column, 0 to 2 bits set
//
// The filler rule. A packed matrix has exactly two slots for each group, so a group of W^{R,C} that keeps fewer than two
// entries gets fillers: its lowest free places, as many as are missing. Slots are in order of place; a filler's slot holds
// zero. `slot_markers` writes the rule as a matrix, from which the library makes the metadata.

#include "common.cuh"

// N neighbours that are moved together: 4, 8, 16 or 32 bytes.
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

__device__ inline u32 word(const e4m3* four) {
  return u32(four[0].bits) | u32(four[1].bits) << 8 | u32(four[2].bits) << 16 | u32(four[3].bits) << 24;
}
__device__ inline void store(e4m3* address, const Pack<e4m3, 4>& pack) {
  asm volatile("st.global.b32 [%0], %1;" ::"l"(address), "r"(word(pack.at)) : "memory");
}
__device__ inline void store(e4m3* address, const Pack<e4m3, 8>& pack) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(word(pack.at)), "r"(word(pack.at + 4)) : "memory");
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

// The two slots of a group, fillers included: its first place | its last << 2, for each of the 16 nibbles.
constexpr u64 slots_of_all() {
  u64 all = 0;
  for (u32 nibble = 0; nibble < 16; ++nibble) {
    u32 slots = nibble, first = 0, last = 3;
    for (u32 place = 0; place < 4; ++place) {
      const u32 bits = (slots & 1) + (slots >> 1 & 1) + (slots >> 2 & 1) + (slots >> 3 & 1);
      if (bits < 2) slots |= 1u << place;
    }
    while (!(slots >> first & 1)) ++first;
    while (!(slots >> last & 1)) --last;
    all |= u64(first | last << 2) << (4 * nibble);
  }
  return all;
}
constexpr u64 SLOTS = slots_of_all();

__device__ inline u32 slots_of(u32 nibble) { return u32(SLOTS >> (4 * nibble)) & 15; }

// The library's metadata of a packed 16-bit matrix on sm_90, R·C/8 bytes; R a multiple of 64, C of 32. A group's nibble is the
// places of its two slots, first | second << 2. Tiles of 16 rows and 32 columns hold, for each r of 8, the bytes of rows r (low
// nibbles) and r + 8 (high), the groups in the order 0 4 1 5 2 6 3 7; 4 tiles downwards come first, then those to the right.
// The order is nowhere documented: matmul_plan.py relies on it only where it has seen the library write the same.
//
// Word 0 or 1 of an r's two; nibble_of(group, lower): the mask's nibble in row r (lower = 0) or r + 8 (1).
template <class Mask> __device__ inline u32 metadata_word(u32 word, const Mask& nibble_of) {
  u32 bytes = 0;
#pragma unroll
  for (u32 k = 0; k < 4; ++k) {
    const u32 group = 2 * word + k / 2 + k % 2 * 4;
    bytes |= (slots_of(nibble_of(group, 0)) | slots_of(nibble_of(group, 1)) << 4) << (8 * k);
  }
  return bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// gather_kept: the entries of a dense (O, I) matrix at `row_bits`, as (O, I/2). One thread: 4 times 8 columns.

constexpr int GATHER_THREADS = 256, GATHER_UNROLL = 4;

template <class D, class V>
__device__ inline void gather_kept(const D* dense, const u8* row_bits, V* kept, i64 bytes) {
  const i64 start = i64(blockIdx.x) * (GATHER_THREADS * GATHER_UNROLL) + threadIdx.x;
  Pack<D, 8> chunk[GATHER_UNROLL];
  u32 bits[GATHER_UNROLL];
#pragma unroll
  for (int u = 0; u < GATHER_UNROLL; ++u) {
    const i64 at = start + u * GATHER_THREADS;
    if (at < bytes) {
      chunk[u] = load<Pack<D, 8>>(dense + at * 8);
      bits[u] = row_bits[at];
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
// refresh: values to what the products read: W^R (O, I/2 packed or I dense) and W^{R,C} transposed (I, O/2 packed
// or O dense); in 8 bits times `factor`. A block takes a tile of 64 rows and 128 columns, a thread 4 rows and 8 columns of it; it writes the tile of
// W^R while it reads, keeps it dense in shared memory, and reads it there by columns to write W^{R,C}. A null pointer leaves
// that one out.
//
// update: the same, and before it W^{R,C} is chosen again: of the kept entries of every group along a column the two largest,
// of equal ones the first, as masks.double_prune chooses them. Writes backward_bits, and of a packed W^{R,C} the metadata in
// the order that `metadata_word` tells of, or no metadata where the pointer is null.

constexpr int TILE_O = 64, TILE_I = 128, REFRESH_THREADS = 256;
// Blocks on a multiprocessor, by which the compiler is to ration registers: it would take twice as many for update.
constexpr int refresh_BLOCKS = 6, update_BLOCKS = 4;

// One layer as `refresh` and `update` take it; cuda.py writes these as rows of 64-bit numbers.
template <class V, class T> struct Layer {
  const V* values;
  const u8* row_bits;
  u8* backward_bits;
  const V* bias;
  T* w;
  T* w_t;
  T* bias_out;
  u8* metadata;  // of a packed w_t: rows a multiple of 32, columns of 64
  const float* factor;  // of what is written in 8 bits
  i64 rows, columns, packed, packed_t;
};

// Which of four scores, those of entries that are not there being negative, are the two largest: a tournament of all pairs,
// in which an entry stays whose rank, the number of entries that beat it, is below two.
__device__ inline u32 two_largest_of_ties(const float* score) {
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

// The same in fewer instructions; of more than two where the second largest has an equal.
__device__ inline u32 from_second_largest(const float* score) {
  const float most = fminf(fmaxf(score[0], score[1]), fmaxf(score[2], score[3]));
  const float least = fmaxf(fminf(score[0], score[1]), fminf(score[2], score[3]));
  const float second = fmaxf(fmaxf(most, least), 0.0f);
  u32 nibble = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) nibble |= score[k] >= second ? 1u << k : 0u;
  return nibble;
}

// The nibbles of W^{R,C} of 8 columns in a group of 4 rows: byte k of the result, that of column k. `bits`: of the rows.
template <class V> __device__ inline u64 prune(const Pack<V, 4>* kept, const u32* bits) {
  u32 bytes[2] = {0, 0};
#pragma unroll
  for (int g = 0; g < 2; ++g) {
    float score[4][4];  // [column][row]
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float group[4];
      spread(fabsf(to_float(kept[r].at[2 * g])), fabsf(to_float(kept[r].at[2 * g + 1])), bits[r] >> (4 * g) & 15, -1.0f, group);
#pragma unroll
      for (int c = 0; c < 4; ++c) score[c][r] = group[c];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      u32 nibble = from_second_largest(score[c]);
      if (__popc(nibble) > 2) nibble = two_largest_of_ties(score[c]);
      bytes[g] |= nibble << (8 * c);
    }
  }
  return bytes[0] | u64(bytes[1]) << 32;
}

template <bool UPDATE, class V, class T> __device__ inline void refresh(const Layer<V, T>& layer) {
  const auto [values, row_bits, backward_bits, bias, w, w_t, bias_out, metadata, factor, rows, columns, packed, packed_t] =
      layer;
  const u32 across = (u32(columns) + TILE_I - 1) / TILE_I;
  const u32 o0 = blockIdx.x / across * TILE_O, i0 = blockIdx.x % across * TILE_I;
  if (o0 >= rows) return;  // a layer that is smaller than the largest of the launch
  // What is left of the matrix from this tile on, and where the tile begins in it, and in the transpose: within the tile,
  // places are numbers of 32 bits.
  const u32 height = u32(rows) - o0, width = u32(columns) - i0, stride = u32(columns), stride_t = u32(rows);
  const u64 corner = u64(o0) * stride + i0, corner_t = u64(i0) * stride_t + o0;
  // Chunks of 8 columns (16 bytes) are swizzled by the row's block of 16, so that neither phase meets a bank conflict.
  __shared__ Pack<T, 8> tile[TILE_O][TILE_I / 8];
  // [group of 4 rows][column]: a nibble a byte, and rows that far apart that neighbours of the second phase differ in bank.
  alignas(8) __shared__ u8 nibbles[UPDATE ? TILE_O / 4 : 1][TILE_I + 8];
  // The second phase's item: 16 rows of one column. Four neighbouring threads write 64 neighbouring bytes.
  constexpr int BLOCKS = TILE_O / 16, ITEMS = TILE_I * BLOCKS / REFRESH_THREADS;
  const u32 group = threadIdx.x / (TILE_I / 8), chunk = threadIdx.x % (TILE_I / 8);
  const bool inside = 4 * group < height && 8 * chunk < width;
  Pack<V, 4> kept[4];
  u32 bits[4], all_bits_t[ITEMS];
  if (inside) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const u32 at = (4 * group + r) * stride + 8 * chunk;
      kept[r] = load<Pack<V, 4>>(values + corner / 2 + at / 2);
      bits[r] = row_bits[corner / 8 + at / 8];
    }
  }
  if constexpr (!UPDATE) {
#pragma unroll
    for (int u = 0; u < ITEMS; ++u) {  // read here, so that the second phase waits for no memory
      const u32 item = u * REFRESH_THREADS + threadIdx.x, block = item % BLOCKS, column = item / BLOCKS;
      const u32 at = column * stride_t + 16 * block;
      if (w_t && 16 * block < height && column < width)
        all_bits_t[u] = *reinterpret_cast<const u16*>(backward_bits + corner_t / 8 + at / 8);
    }
  }
  if (inside) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const u32 row = 4 * group + r, at = row * stride + 8 * chunk;
      Pack<T, 4> small;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float value = to_float(kept[r].at[k]);
        if constexpr (sizeof(T) == 1)
          small.at[k] = from_float<T>(value * *factor);
        else
          small.at[k] = from_float<T>(value);
      }
      Pack<T, 8> wide;
      spread(small.at[0], small.at[1], bits[r] & 15, from_float<T>(0.0f), wide.at);
      spread(small.at[2], small.at[3], bits[r] >> 4, from_float<T>(0.0f), wide.at + 4);
      if (w && packed) store(w + corner / 2 + at / 2, small);
      if (w && !packed) store(w + corner + at, wide);
      tile[row][chunk ^ (row / 16)] = wide;
    }
    if constexpr (UPDATE) *reinterpret_cast<u64*>(&nibbles[group][8 * chunk]) = prune(kept, bits);
  }
  if (bias_out && i0 == 0 && threadIdx.x < TILE_O && threadIdx.x < height)
    bias_out[o0 + threadIdx.x] = from_float<T>(to_float(bias[o0 + threadIdx.x]));
  if (!UPDATE && !w_t) return;
  __syncthreads();

#pragma unroll
  for (int u = 0; u < ITEMS; ++u) {
    const u32 item = u * REFRESH_THREADS + threadIdx.x, block = item % BLOCKS, column = item / BLOCKS;
    const u32 at = column * stride_t + 16 * block;
    if (16 * block >= height || column >= width) continue;
    if constexpr (UPDATE) {
      all_bits_t[u] = 0;
#pragma unroll
      for (int g = 0; g < 4; ++g) all_bits_t[u] |= u32(nibbles[4 * block + g][column]) << (4 * g);
      *reinterpret_cast<u16*>(backward_bits + corner_t / 8 + at / 8) = u16(all_bits_t[u]);
    }
    if (!w_t) continue;
    const u32 bits_t = all_bits_t[u];
    const auto entry = [&](u32 row) { return tile[block * 16 + row][column / 8 ^ block].at[column % 8]; };
    const T zero = from_float<T>(0.0f);
    if (packed_t) {
      Pack<T, 8> out;
#pragma unroll
      for (int g = 0; g < 4; ++g) {
        const u32 nibble = bits_t >> (4 * g) & 15, slots = slots_of(nibble), first = slots & 3, last = slots >> 2;
        out.at[2 * g] = nibble >> first & 1 ? entry(4 * g + first) : zero;
        out.at[2 * g + 1] = nibble >> last & 1 ? entry(4 * g + last) : zero;
      }
      store(w_t + corner_t / 2 + at / 2, out);
    } else {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Pack<T, 8> out;
#pragma unroll
        for (int k = 0; k < 8; ++k) out.at[k] = bits_t >> (8 * half + k) & 1 ? entry(8 * half + k) : zero;
        store(w_t + corner_t + at + 8 * half, out);
      }
    }
  }
  if constexpr (UPDATE) {
    // A thread: 4 of the 8 bytes of an item of `metadata`, for a matrix of `columns` rows and `rows` columns.
    const u32 word = threadIdx.x % 2, r = threadIdx.x / 2 % 8, band = threadIdx.x / 16 % 8, half = threadIdx.x / 128;
    const u32 column = 16 * band + r;
    if (!metadata || 32 * half >= height || column >= width) return;
    const u64 tiles = u64(i0 / 64 + band / 4) * (stride_t / 32) + o0 / 32 + half, at = tiles * 32 + band % 4 * 8 + r;
    *reinterpret_cast<u32*>(metadata + at * 8 + 4 * word) =
        metadata_word(word, [&](u32 group, u32 lower) { return nibbles[8 * half + group][column + 8 * lower]; });
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// round: a matrix (rows, columns), columns a multiple of 16, over its scale, in e4m3: as it lies, and transposed as (columns,
// rows up to a multiple of 16, zeros there). Also the sums of its columns, for each 128 rows as (rows / 128 up, columns), and
// counts, to which are added how many entries are not zero, and how many of them become zero. A null pointer leaves that out.
// A block takes 128 rows and as many columns; a thread reads 4 times 16 columns of a row.

constexpr int ROUND_SIDE = 128, ROUND_THREADS = 256;

// As operands.scale_of computes it from a matrix's largest magnitude.
__device__ inline float scale_of(float largest) {
  const float exact = largest * float(1.0 / 448);
  if (!(exact <= 3.402823466e38f)) return exact;
  return __uint_as_float((__float_as_uint(fmaxf(exact, 1.175494351e-38f)) + 0x7FFFFF) & 0x7F800000);
}

// Four neighbours in e4m3, the first in the lowest byte.
__device__ inline u32 four_e4m3(const float* x) {
#if __CUDA_ARCH__ >= 890
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(x[1]), "f"(x[0]));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(x[3]), "f"(x[2]));
  return u32(low) | u32(high) << 16;
#else
  return 0;  // operands.py does not launch it there
#endif
}

template <class T>
__device__ inline void round(const T* X, const float* largest, e4m3* Y, e4m3* Y_t, float* scale, float* sums, u64* counts,
                             i64 rows, i64 columns) {
  // Chunks of 16 columns (16 bytes) are swizzled by the row's block of 16, so that neither phase meets a bank conflict.
  __shared__ uint4 tile[ROUND_SIDE][ROUND_SIDE / 16];
  __shared__ float partial[ROUND_THREADS / 32][ROUND_SIDE];
  __shared__ u32 counted[ROUND_THREADS / 32][2];
  const i64 across = (columns + ROUND_SIDE - 1) / ROUND_SIDE, stride_t = (rows + 15) / 16 * 16;
  const i64 r0 = blockIdx.x / across * ROUND_SIDE, c0 = blockIdx.x % across * ROUND_SIDE;
  const float own = scale_of(*largest), factor = __frcp_rn(own);
  if (blockIdx.x == 0 && threadIdx.x == 0) *scale = own;
  const u32 chunk = threadIdx.x % 8, first = threadIdx.x / 8, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const i64 column = c0 + 16 * chunk;
  Pack<T, 8> read[4][2];
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const i64 row = r0 + 32 * u + first;
    const bool inside = row < rows && column < columns;
#pragma unroll
    for (int half = 0; half < 2; ++half)
      read[u][half] = inside ? load<Pack<T, 8>>(X + row * columns + column + 8 * half) : Pack<T, 8>{};
  }
  float sum[16] = {};
  u32 entries = 0, zeroed = 0;
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const u32 row = 32 * u + first;
    u32 words[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      float x[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        x[j] = to_float(read[u][k / 2].at[k % 2 * 4 + j]);
        sum[4 * k + j] += x[j];
        x[j] *= factor;
        entries += x[j] != 0.0f;
        zeroed += x[j] != 0.0f && fabsf(x[j]) <= 0.0009765625f;
      }
      words[k] = four_e4m3(x);
    }
    const uint4 out = make_uint4(words[0], words[1], words[2], words[3]);
    if (Y && r0 + row < rows && column < columns) *reinterpret_cast<uint4*>(Y + (r0 + row) * columns + column) = out;
    tile[row][chunk ^ (row / 16)] = out;
  }
  if (sums) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      sum[j] += __shfl_xor_sync(0xffffffff, sum[j], 8);
      sum[j] += __shfl_xor_sync(0xffffffff, sum[j], 16);
      if (lane < 8) partial[warp][16 * chunk + j] = sum[j];
    }
  }
  if (counts) {
#pragma unroll
    for (int step = 16; step; step /= 2) {
      entries += __shfl_xor_sync(0xffffffff, entries, step);
      zeroed += __shfl_xor_sync(0xffffffff, zeroed, step);
    }
    if (lane == 0) counted[warp][0] = entries, counted[warp][1] = zeroed;
  }
  __syncthreads();
  if (sums && threadIdx.x < ROUND_SIDE && c0 + threadIdx.x < columns) {
    float total = 0.0f;
#pragma unroll
    for (int k = 0; k < ROUND_THREADS / 32; ++k) total += partial[k][threadIdx.x];
    sums[r0 / ROUND_SIDE * columns + c0 + threadIdx.x] = total;
  }
  if (counts && threadIdx.x < 2) {
    u32 total = 0;
    for (int k = 0; k < ROUND_THREADS / 32; ++k) total += counted[k][threadIdx.x];
    if (total) atomicAdd(counts + threadIdx.x, u64(total));
  }
  if (!Y_t) return;
  // A thread: 16 rows of 4 columns. Eight neighbouring threads write 128 neighbouring bytes.
  const u32 block = threadIdx.x % 8, four = threadIdx.x / 8;
  if (r0 + 16 * block >= stride_t || c0 + 4 * four >= columns) return;
  u32 out[4][4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    u32 word[4];
#pragma unroll
    for (int j = 0; j < 4; ++j)
      word[j] = reinterpret_cast<const u32*>(&tile[16 * block + 4 * k + j][four / 4 ^ block])[four % 4];
    const u32 low = __byte_perm(word[0], word[1], 0x5140), low_2 = __byte_perm(word[2], word[3], 0x5140);
    const u32 high = __byte_perm(word[0], word[1], 0x7362), high_2 = __byte_perm(word[2], word[3], 0x7362);
    out[0][k] = __byte_perm(low, low_2, 0x5410);
    out[1][k] = __byte_perm(low, low_2, 0x7632);
    out[2][k] = __byte_perm(high, high_2, 0x5410);
    out[3][k] = __byte_perm(high, high_2, 0x7632);
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    *reinterpret_cast<uint4*>(Y_t + (c0 + 4 * four + j) * stride_t + r0 + 16 * block) =
        make_uint4(out[j][0], out[j][1], out[j][2], out[j][3]);
}

// ---------------------------------------------------------------------------------------------------------------------
// slot_markers: bits of a mask to a dense matrix, ones in the two slots of every group and zeros elsewhere. A thread: 8 places.

constexpr int MARKER_THREADS = 256;

template <class T> __device__ inline void slot_markers(const u8* bits, T* marked, i64 bytes) {
  const i64 at = i64(blockIdx.x) * MARKER_THREADS + threadIdx.x;
  if (at >= bytes) return;
  Pack<T, 8> out;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const u32 slots = slots_of(bits[at] >> (k & 4) & 15);
    out.at[k] = from_float<T>(float((slots & 3) == k % 4 || slots >> 2 == k % 4));
  }
  store(marked + at * 8, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// metadata: bits of a mask (R, C/8) to the metadata that `metadata_word` tells of. A thread: 8 bytes.

constexpr int METADATA_THREADS = 256;

struct Marks {
  const u8* bits;
  u8* metadata;
  i64 rows, columns;
};

__device__ inline void metadata(const Marks& layer) {
  const auto [bits, out, rows, columns] = layer;
  const i64 at = i64(blockIdx.x) * METADATA_THREADS + threadIdx.x;  // which 8 bytes: [R/64][C/32][4][8]
  if (at >= rows * columns / 64) return;
  const i64 across = columns / 32, tile = at / 32;
  const i64 r = tile / across * 64 + at % 32 / 8 * 16 + at % 8, c = tile % across * 32;
  const u32 low = *reinterpret_cast<const u32*>(bits + (r * columns + c) / 8);
  const u32 high = *reinterpret_cast<const u32*>(bits + ((r + 8) * columns + c) / 8);
  const auto nibble_of = [&](u32 group, u32 lower) { return (lower ? high : low) >> (4 * group) & 15; };
  *reinterpret_cast<uint2*>(out + at * 8) = make_uint2(metadata_word(0, nibble_of), metadata_word(1, nibble_of));
}

// ---------------------------------------------------------------------------------------------------------------------
// metadata_in: the same in any order that metadata_order.py finds, as its `table` has it. A thread: 4 bytes, 16 slots.

struct OrderedMarks {
  const u8* bits;
  u32* metadata;
  const int* order;
  i64 rows, columns;
};

__device__ inline void metadata_in(const OrderedMarks& layer) {
  const auto [bits, out, order, rows, columns] = layer;
  const i64 word = i64(blockIdx.x) * METADATA_THREADS + threadIdx.x;
  if (word >= rows * columns / 32) return;
  const int row_bits = order[0], group_bits = order[1], size = 1 + row_bits + group_bits;
  const int *groups = order + 4, *lines = groups + 16, *differ = lines + 16;
  const u32 place = u32(word * 16) & ((1u << size) - 1), slot = __popc(place & order[3]) & 1;
  const i64 tile = word * 16 >> size, across = order[2] ? columns / 4 >> group_bits : rows >> row_bits;
  const i64 outer = tile / across, inner = tile % across;
  u32 row = 0, group = 0, bytes = 0;
  for (int k = 0; k < group_bits; ++k) group |= u32(__popc(place & groups[k]) & 1) << k;
  for (int k = 0; k < row_bits; ++k) row |= u32(__popc(place & lines[k]) & 1) << k;
  const i64 first_row = (order[2] ? outer : inner) << row_bits, first_group = (order[2] ? inner : outer) << group_bits;
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    const u32 other = differ[k];
    const i64 r = first_row + (row ^ (other & 0xFFF)), g = first_group + (group ^ (other >> 12 & 0xFFF));
    const u32 slots = slots_of(bits[(r * columns + 4 * g) / 8] >> (g % 2 * 4) & 15);
    bytes |= (slot ^ other >> 24 ? slots >> 2 : slots & 3) << (2 * k);
  }
  out[word] = bytes;
}

// ---------------------------------------------------------------------------------------------------------------------
// expand: a packed matrix, (R, C/2) values and metadata in the order above with R rounded up to 64 and C to 32, to a dense one.
// A thread: 8 columns.

constexpr int EXPAND_THREADS = 256;

template <class T> __device__ inline void expand(const T* values, const u8* metadata, T* dense, i64 rows, i64 columns) {
  const i64 at = i64(blockIdx.x) * EXPAND_THREADS + threadIdx.x, across = columns / 8;
  if (at >= rows * across) return;
  const i64 r = at / across, c = at % across * 8, tile = r / 64 * ((columns + 31) / 32) + c / 32;
  const u8* bytes = metadata + tile * 256 + r % 64 / 16 * 64 + r % 8 * 8;
  const u32 shift = r % 16 / 8 * 4, first = u32(c / 4 % 8);
  const Pack<T, 4> kept = load<Pack<T, 4>>(values + at * 4);
  Pack<T, 8> out;
#pragma unroll
  for (u32 g = 0; g < 2; ++g) {
    const u32 group = first + g, nibble = bytes[group < 4 ? 2 * group : 2 * group - 7] >> shift & 15;
    spread(kept.at[2 * g], kept.at[2 * g + 1], 1u << (nibble & 3) | 1u << (nibble >> 2), from_float<T>(0.0f), out.at + 4 * g);
  }
  store(dense + at * 8, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// silu_mul: silu(gate) · up of rows with `columns` entries of gate, then as many of up. A thread: 8 columns.

constexpr int SILU_THREADS = 256;

template <class T> __device__ inline void silu_mul(const T* gate_up, T* product, i64 rows, i64 columns) {
  let_next_come();
  await_others();
  const i64 at = (i64(blockIdx.x) * SILU_THREADS + threadIdx.x) * 8;
  if (at >= rows * columns) return;
  const T* row = gate_up + at / columns * 2 * columns + at % columns;
  const Pack<T, 8> gate = load<Pack<T, 8>>(row), up = load<Pack<T, 8>>(row + columns);
  Pack<T, 8> out;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const float x = to_float(gate.at[k]);
    out.at[k] = from_float<T>(x / (1.0f + __expf(-x)) * to_float(up.at[k]));
  }
  store(product + at, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// norm: rows minus their mean, over their deviation, times `weight`, plus `bias` (layer), or over their root mean square,
// times `weight`. A block a row, which stays in registers: at most NORM_PACKS times 8 columns a thread. Further blocks along y
// multiply the normed row with NORM_ROWS rows of A (width, columns) each: Z = Y · A^T, (rows, width).

constexpr int NORM_PACKS = 4, NORM_ROWS = 4;

// The sum over a block.
__device__ inline float block_sum(float x) {
  __shared__ float warps[32];
#pragma unroll
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(0xffffffff, x, step);
  __syncthreads();  // what was there has been read
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
  for (u32 k = 0; k < blockDim.x / 32; ++k) sum += warps[k];
  return sum;
}

template <class T>
__device__ inline void norm(const T* X, const T* weight, const T* bias, T* Y, i64 columns, float eps, bool layer, const T* A,
                            T* Z, i64 width) {
  __shared__ float products[32][NORM_ROWS];
  const bool stores = blockIdx.y == 0;
  const i64 first = (i64(blockIdx.y) - 1) * NORM_ROWS;
  const auto pack_of = [&](int k) { return (i64(k) * blockDim.x + threadIdx.x) * 8; };
  Pack<T, 8> a[NORM_ROWS];
  let_next_come();
  if (!stores && pack_of(0) < columns)
#pragma unroll
    for (int r = 0; r < NORM_ROWS; ++r) a[r] = load<Pack<T, 8>>(A + (first + r) * columns + pack_of(0));
  await_others();
  const T* row = X + blockIdx.x * columns;
  float x[NORM_PACKS][8], sum = 0.0f, squares = 0.0f, product[NORM_ROWS] = {};
#pragma unroll
  for (int k = 0; k < NORM_PACKS; ++k) {
    if (pack_of(k) >= columns) break;
    const Pack<T, 8> pack = load<Pack<T, 8>>(row + pack_of(k));
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += x[k][j] = to_float(pack.at[j]);
  }
  const float mean = layer ? block_sum(sum) / columns : 0.0f;
#pragma unroll
  for (int k = 0; k < NORM_PACKS; ++k) {
    if (pack_of(k) >= columns) break;
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += (x[k][j] - mean) * (x[k][j] - mean);
  }
  const float scale = rsqrtf(block_sum(squares) / columns + eps);
#pragma unroll
  for (int k = 0; k < NORM_PACKS; ++k) {
    const i64 at = pack_of(k);
    if (at >= columns) break;
    const Pack<T, 8> w = load<Pack<T, 8>>(weight + at);
    Pack<T, 8> b, out;
    if (bias) b = load<Pack<T, 8>>(bias + at);
#pragma unroll
    for (int j = 0; j < 8; ++j)
      out.at[j] = from_float<T>((x[k][j] - mean) * scale * to_float(w.at[j]) + (bias ? to_float(b.at[j]) : 0.0f));
    if (stores) {
      store(Y + blockIdx.x * columns + at, out);
      continue;
    }
#pragma unroll
    for (int r = 0; r < NORM_ROWS; ++r) {
      if (k) a[r] = load<Pack<T, 8>>(A + (first + r) * columns + at);
#pragma unroll
      for (int j = 0; j < 8; ++j) product[r] += to_float(out.at[j]) * to_float(a[r].at[j]);
    }
  }
  if (stores) return;
#pragma unroll
  for (int r = 0; r < NORM_ROWS; ++r) {
#pragma unroll
    for (int step = 16; step; step /= 2) product[r] += __shfl_xor_sync(0xffffffff, product[r], step);
    if (threadIdx.x % 32 == 0) products[threadIdx.x / 32][r] = product[r];
  }
  __syncthreads();
  if (threadIdx.x >= NORM_ROWS) return;
  float total = 0.0f;
  for (u32 k = 0; k < blockDim.x / 32; ++k) total += products[k][threadIdx.x];
  Z[blockIdx.x * width + first + threadIdx.x] = from_float<T>(total);
}

// ---------------------------------------------------------------------------------------------------------------------
// remember: of prompts' queries, keys and values, (prompts · tokens, heads + 2 kv_heads, dim), the first two are turned in place
// by their positions, and keys and values are copied to the places of each prompt's slot, (slots, kv_heads, places, dim).
//
//   rotary  (2, prompts · tokens, dim): cosines, and sines of which the first half is negated; null for none
//
// A thread: 8 columns of a head's first half, and those of its second with which they turn.

constexpr int REMEMBER_THREADS = 256;

template <class T> struct Remembered {
  T* qkv;
  const T* rotary;
  T *keys, *values;
  const i64* slots;
  i64 rows, tokens, heads, kv_heads, dim, places;
};

template <class T> __device__ inline void remember(const Remembered<T>& r) {
  using Eight = Pack<T, 8>;
  let_next_come();
  await_others();
  const i64 half = r.dim / 2, parts = half / 8, all_heads = r.heads + 2 * r.kv_heads;
  const i64 at = i64(blockIdx.x) * REMEMBER_THREADS + threadIdx.x;
  if (at >= r.rows * all_heads * parts) return;
  const i64 row = at / (all_heads * parts), head = at / parts % all_heads, column = at % parts * 8;
  T* own = r.qkv + (row * all_heads + head) * r.dim + column;
  Eight low = load<Eight>(own), high = load<Eight>(own + half);
  if (r.rotary && head < r.heads + r.kv_heads) {
    const T* turns = r.rotary + row * r.dim + column;
    const T* sines = turns + r.rows * r.dim;
    const Eight cos_low = load<Eight>(turns), cos_high = load<Eight>(turns + half);
    const Eight sin_low = load<Eight>(sines), sin_high = load<Eight>(sines + half);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const float x = to_float(low.at[k]), y = to_float(high.at[k]);
      low.at[k] = from_float<T>(x * to_float(cos_low.at[k]) + y * to_float(sin_low.at[k]));
      high.at[k] = from_float<T>(y * to_float(cos_high.at[k]) + x * to_float(sin_high.at[k]));
    }
    store(own, low);
    store(own + half, high);
  }
  if (head < r.heads) return;
  const i64 kv_head = (head - r.heads) % r.kv_heads, slot = r.slots[row / r.tokens];
  T* kept = (head < r.heads + r.kv_heads ? r.keys : r.values) +
            ((slot * r.kv_heads + kv_head) * r.places + row % r.tokens) * r.dim + column;
  store(kept, low);
  store(kept + half, high);
}

// ---------------------------------------------------------------------------------------------------------------------
// Entry points: gather_kept_<dense>_<values>, refresh_<values>_<packed>, update_<values>_<packed>, slot_markers_<packed>,
// round_<X>, expand_<packed>, silu_mul_<packed>, norm_<packed>, remember_<packed>, and metadata, metadata_in; with _all, a layer
// for each blockIdx.y. Numbers come as 64 bits, the width in which CuPy passes a Python integer.

#define GATHER(D, V)                                                                                                        \
  extern "C" __global__ void __launch_bounds__(GATHER_THREADS)                                                              \
      gather_kept_##D##_##V(const D* dense, const u8* row_bits, V* kept, i64 bytes) {                                       \
    gather_kept(dense, row_bits, kept, bytes);                                                                              \
  }
#define REFRESH(NAME, UPDATE, V, T)                                                                                         \
  extern "C" __global__ void __launch_bounds__(REFRESH_THREADS, NAME##_BLOCKS)                                              \
      NAME##_##V##_##T(const V* values, const u8* row_bits, u8* backward_bits, const V* bias, T* w, T* w_t, T* bias_out,    \
                       u8* metadata, const float* factor, i64 rows, i64 columns, i64 packed, i64 packed_t) {                \
    const Layer<V, T> layer{values, row_bits, backward_bits, bias, w,       w_t,    bias_out,                               \
                            metadata, factor, rows,          columns, packed, packed_t};                                    \
    refresh<UPDATE>(layer);                                                                                                 \
  }                                                                                                                         \
  extern "C" __global__ void __launch_bounds__(REFRESH_THREADS, NAME##_BLOCKS)                                              \
      NAME##_##V##_##T##_all(const Layer<V, T>* layers) {                                                                   \
    refresh<UPDATE>(layers[blockIdx.y]);                                                                                    \
  }
#define BOTH(V, T) REFRESH(refresh, false, V, T) REFRESH(update, true, V, T)
#define MARKERS(T)                                                                                                          \
  extern "C" __global__ void __launch_bounds__(MARKER_THREADS) slot_markers_##T(const u8* bits, T* marked, i64 bytes) {     \
    slot_markers(bits, marked, bytes);                                                                                      \
  }
#define ROUND(T)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(ROUND_THREADS, sizeof(T) == 2 ? 3 : 2)                                       \
      round_##T(const T* X, const float* largest, e4m3* Y, e4m3* Y_t, float* scale, float* sums, u64* counts, i64 rows,     \
                i64 columns) {                                                                                              \
    round(X, largest, Y, Y_t, scale, sums, counts, rows, columns);                                                          \
  }
#define EXPAND(T)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(EXPAND_THREADS)                                                              \
      expand_##T(const T* values, const u8* metadata, T* dense, i64 rows, i64 columns) {                                    \
    expand(values, metadata, dense, rows, columns);                                                                         \
  }
#define SILU_MUL(T)                                                                                                         \
  extern "C" __global__ void __launch_bounds__(SILU_THREADS)                                                                \
      silu_mul_##T(const T* gate_up, T* product, i64 rows, i64 columns) {                                                   \
    silu_mul(gate_up, product, rows, columns);                                                                              \
  }
#define NORM(T)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(1024)                                                                        \
      norm_##T(const T* X, const T* weight, const T* bias, T* Y, i64 columns, double eps, i64 layer, const T* A, T* Z,      \
               i64 width) {                                                                                                 \
    norm(X, weight, bias, Y, columns, float(eps), layer, A, Z, width);                                                      \
  }
#define REMEMBER(T)                                                                                                         \
  extern "C" __global__ void __launch_bounds__(REMEMBER_THREADS)                                                            \
      remember_##T(T* qkv, const T* rotary, T* keys, T* values, const i64* slots, i64 rows, i64 tokens, i64 heads,          \
                   i64 kv_heads, i64 dim, i64 places) {                                                                     \
    remember(Remembered<T>{qkv, rotary, keys, values, slots, rows, tokens, heads, kv_heads, dim, places});                  \
  }

GATHER(bf16, float)
GATHER(bf16, bf16)
GATHER(fp16, float)
GATHER(fp16, fp16)
GATHER(float, float)
BOTH(float, bf16)
BOTH(float, fp16)
BOTH(bf16, bf16)
BOTH(fp16, fp16)
BOTH(float, e4m3)
MARKERS(bf16)
MARKERS(fp16)
MARKERS(e4m3)
ROUND(bf16)
ROUND(float)
EXPAND(bf16)
EXPAND(fp16)
SILU_MUL(bf16)
SILU_MUL(fp16)
NORM(bf16)
NORM(fp16)
REMEMBER(bf16)
REMEMBER(fp16)

extern "C" __global__ void __launch_bounds__(METADATA_THREADS)
    metadata(const u8* bits, u8* out, i64 rows, i64 columns) {
  metadata(Marks{bits, out, rows, columns});
}
extern "C" __global__ void __launch_bounds__(METADATA_THREADS) metadata_all(const Marks* layers) {
  metadata(layers[blockIdx.y]);
}
extern "C" __global__ void __launch_bounds__(METADATA_THREADS)
    metadata_in(const u8* bits, u32* out, const int* order, i64 rows, i64 columns) {
  metadata_in(OrderedMarks{bits, out, order, rows, columns});
}
extern "C" __global__ void __launch_bounds__(METADATA_THREADS) metadata_in_all(const OrderedMarks* layers) {
  metadata_in(layers[blockIdx.y]);
}
