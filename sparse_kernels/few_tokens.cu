// The product of a packed 2:4 matrix with few tokens, Y = X · A^T + bias, which memory binds: a weight's 1.125 bytes are read
// once, and the sparse tensor cores multiply them as they come. Compiled at run time for one shape of work, which the
// definitions below give: HALF, KIND, NT, MT, WM, WK, DEPTH, SLICE; ADAPTERS where it adds adapters' products.
//
//   values    (R, C/2)  kept entries, row by row in column order; C a multiple of 16
//   metadata  in the order of kernels.cu's `metadata_word`, which is the library's: R rounded up to 64 and C to 32
//   X         (B, C), B from 1 to 8·NT;  Y (B, R);  bias (R) or null;  residual (B, R) or null, which is added
//   Z, lora_B (B, S·L), (R, L) or null: adapters' second product Z · B^T is added. The rows are S segments, which end at
//             ends[0], ends[1] and R, multiples of 16; each has its own L columns of Z; L a multiple of 16
//
// A warp holds MT bands of 16 rows and takes every WK-th chunk of 128 columns; WM warps lie side by side along the rows; the
// blocks along y, a cluster, share a row's columns. Of a chunk, lane 4g + t has 16 bytes of rows g and g + 8: four groups of two kept
// entries in tiles 0, 1 (of 32 columns), and four in tiles 2, 3. Product a of the chunk's four takes each lane's a-th groups.
// So its k runs over group a and 4 + a of tile 0, the same of tile 1, 2 and 3: the order in which the metadata's bytes lie. X
// is in shared memory in that order; of tokens that are not there, garbage, which stays in their own sums.
//
// Adapters' first product Z = X · A^T, with A (S·L, C), is that of `first_blocks` blocks, those with the lowest numbers, which
// the GPU starts first. The others await it in the end: ready[0] counts the blocks that have written Z, ready[1] those that
// have seen it, and the last of these makes both 0 again, which they must be at first. Without such blocks Z is there already.
//
// Two ways to keep memory busy. Up to 8 tokens a warp loads its weights into registers, DEPTH chunks ahead, and X comes in
// slices of SLICE chunks (KIND 0). With more, where X is as much traffic as the weights, both go through shared memory, in
// DEPTH stages of SLICE chunks: by every thread's own copies (KIND 1, SLICE = WK), or by the copy engine (KIND 2, compute
// capability 9.0a), which leaves the threads to multiply: warpgroups read both operands where they lie. A product then has
// 64 rows, 16 of each of four warps, and takes a tile of 32 columns in its own order. MT counts such products; WM warps still
// lie side by side along the rows.

#include "common.cuh"

// Blocks on a multiprocessor, by which the compiler is to ration registers.
constexpr int BLOCKS = (KIND == 0 && NT == 1) || (KIND == 2 && WM * WK <= 8) ? 2 : 1;
constexpr int TOKENS = 8 * NT, THREADS = 32 * WM * WK, BLOCK_ROWS = 16 * MT * WM;
constexpr int STRIDE = SLICE * 256 + 16;  // bytes of a staged token: 16 more, so that 8 tokens lie in different banks

// Weights are read once: they need no place in L1.
__device__ inline uint4 stream16(const void* at) {
  uint4 x;
  asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(at));
  return x;
}
__device__ inline u32 stream4(const void* at) {
  u32 x;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(at));
  return x;
}

__device__ inline void multiply(float* c, const u32* a, const u32* b, u32 metadata, int pair) {
#if !HALF
#define SPARSE_MMA(SELECTOR)                                                                                                \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "                                  \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, " #SELECTOR ";"              \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata))
#else
#define SPARSE_MMA(SELECTOR)                                                                                                \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 "                                    \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, " #SELECTOR ";"              \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                             \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata))
#endif
  if (pair == 0)
    SPARSE_MMA(0x0);
  else
    SPARSE_MMA(0x1);
}

#if HALF
#define DENSE_TYPES "f32.f16.f16.f32"
#else
#define DENSE_TYPES "f32.bf16.bf16.f32"
#endif
__device__ inline void multiply_dense(float* c, const u32* a, const u32* b) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col." DENSE_TYPES
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Start to copy 16 bytes into shared memory, or zeros.
__device__ inline void copy16(u32 to, const u8* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0));
}

// A band's part of a chunk: of rows g and g + 8 the kept entries of tiles 0, 1 and of tiles 2, 3; two words of metadata.
struct Part {
  uint4 upper[2], lower[2];
  u32 words[2];
};

// A matrix and the tiles of it that the copy engine takes, as the driver writes them.
struct __align__(64) TensorMap { u64 words[16]; };

struct Matrix {
  const u8* values;
  const u8* metadata;
  i64 rows, columns;
};

// Where a lane's 16 bytes of rows g and g + 8 of a band begin, and its word of the first tile.
struct Band {
  const u8 *upper, *lower, *words;
};

__device__ inline Band band_at(const Matrix& matrix, i64 row) {
  const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const i64 row_bytes = matrix.columns, across = (matrix.columns + 31) / 32;  // two bytes for each second column
  const i64 band = min(row / 16, (matrix.rows + 15) / 16 - 1);
  return {matrix.values + min(row + g, matrix.rows - 1) * row_bytes + 16 * t,
          matrix.values + min(row + g + 8, matrix.rows - 1) * row_bytes + 16 * t,
          matrix.metadata + (band / 4 * across * 32 + band % 4 * 8 + g) * 8 + t % 2 * 512 + t / 2 * 4};
}

__device__ inline void load_part(Part& part, const Band& band, u32 chunk, u32 columns) {
  const u32 at = chunk * 128, words = chunk * 1024;
  if (at + 128 <= columns) {
#pragma unroll
    for (u32 pair = 0; pair < 2; ++pair) {
      part.upper[pair] = stream16(band.upper + at + 64 * pair);
      part.lower[pair] = stream16(band.lower + at + 64 * pair);
      part.words[pair] = stream4(band.words + words + 256 * pair);
    }
    return;
  }
  const u32 t = threadIdx.x % 4, tiles = (columns - at + 31) / 32;  // zeros past the end, and there any valid metadata
#pragma unroll
  for (u32 pair = 0; pair < 2; ++pair) {
    const bool inside = at + 64 * pair + 16 * t < columns;
    part.upper[pair] = inside ? stream16(band.upper + at + 64 * pair) : make_uint4(0, 0, 0, 0);
    part.lower[pair] = inside ? stream16(band.lower + at + 64 * pair) : make_uint4(0, 0, 0, 0);
    part.words[pair] = 2 * (t % 2) + pair < tiles ? stream4(band.words + words + 256 * pair) : 0x44444444;
  }
}

// Lane t of four turns its words, of tiles 2·(t%2) and the next, into the metadata of products 2·(t/2) and the next.
__device__ inline void metadata_of(const Part& part, u32* registers) {
  const u32 first = __byte_perm(part.words[0], part.words[1], 0x6240);   // of each product and tile: group a
  const u32 second = __byte_perm(part.words[0], part.words[1], 0x7351);  // and group 4 + a
  const u32 upper = (first & 0x0f0f0f0f) | (second << 4 & 0xf0f0f0f0);   // of row g: 4 nibbles for each product
  const u32 lower = (first >> 4 & 0x0f0f0f0f) | (second & 0xf0f0f0f0);   // of row g + 8
  registers[0] = __byte_perm(upper, lower, 0x5410);
  registers[1] = __byte_perm(upper, lower, 0x7632);
}

__device__ inline u32 part_of(const uint4& x, int k) { return k == 0 ? x.x : k == 1 ? x.y : k == 2 ? x.z : x.w; }

// Start to copy SLICE chunks of all tokens, from chunk `begin` on, into shared memory; zeros past the end. A warp: a token's
// chunk at a time.
__device__ inline void copy_x(u32 target, const u8* X, u32 begin, u32 columns, u32 tokens) {
  const u32 warp = threadIdx.x / 32, group = threadIdx.x % 32, place = group % 8;
  const u32 to = target + group / 8 * 64 + (place < 4 ? 2 * place : 2 * place - 7) * 8;
#pragma unroll 4
  for (u32 at = warp; at < tokens * SLICE; at += THREADS / 32) {
    const u32 token = at / SLICE, chunk = at % SLICE, column = (begin + chunk) * 128 + group * 4;
    const u32 bytes = column < columns ? 8 : 0, from = (token * columns + (bytes ? column : 0)) * 2;
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to + token * STRIDE + chunk * 256), "l"(X + from), "r"(bytes));
  }
}

// Multiply a warp's bands of a chunk with X, of which token 0 and the chunk's first column are at `staged`.
__device__ inline void multiply_chunk(float (*sum)[NT][4], const Part* parts, u32 staged) {
  const u32 lane = threadIdx.x % 32;
  u32 meta[MT][2], x[2][NT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m) metadata_of(parts[m], meta[m]);
  const auto read = [&](u32(*into)[4], int a) {
#pragma unroll
    for (int n = 0; n < NT; ++n)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(into[n][0]), "=r"(into[n][1]), "=r"(into[n][2]), "=r"(into[n][3])
                   : "r"(staged + lane / 8 * 64 + (lane % 8 + n * 8) * STRIDE + 16 * a));
  };
  read(x[0], 0);
#pragma unroll
  for (int a = 0; a < 4; ++a) {
    if (a < 3) read(x[(a + 1) % 2], a + 1);  // on its way while product a runs
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const Part& part = parts[m];
        const u32 w[4] = {part_of(part.upper[0], a), part_of(part.lower[0], a), part_of(part.upper[1], a),
                          part_of(part.lower[1], a)};
        multiply(sum[m][n], w, x[a % 2][n], meta[m][a % 2], a / 2);
      }
  }
}

#if KIND == 1
constexpr u32 ROW_BYTES = 144;  // of a staged row of a chunk: 128, and 16 more so that 8 rows lie in different banks
constexpr u32 VALUE_BYTES = BLOCK_ROWS * ROW_BYTES, METADATA_BYTES = BLOCK_ROWS * 16;  // of a chunk
constexpr u32 WEIGHT_BYTES = SLICE * (VALUE_BYTES + METADATA_BYTES);

// Start to copy the block's rows of SLICE chunks, from chunk `begin` on: [chunk][row] values, then [chunk][64 rows][tile].
__device__ inline void copy_weights(u32 target, const Matrix& matrix, u32 row0, u32 begin) {
  const u32 columns = matrix.columns, piece = threadIdx.x % 8, first = threadIdx.x / 8, last_row = matrix.rows - 1;
  const u32 across = (columns + 31) / 32, last = last_row / 64;
#pragma unroll
  for (u32 chunk = 0; chunk < SLICE; ++chunk) {
    const u32 at = (begin + chunk) * 128 + piece * 16;
    const bool there = at < columns;
    const u8* from = matrix.values + (there ? at : 0);
#pragma unroll
    for (u32 k = 0; k < BLOCK_ROWS * 8 / THREADS; ++k) {
      const u32 row = first + k * (THREADS / 8);
      copy16(target + chunk * VALUE_BYTES + row * ROW_BYTES + piece * 16, from + u64(min(row0 + row, last_row)) * columns, there);
    }
  }
  target += SLICE * VALUE_BYTES;
#pragma unroll
  for (u32 at = threadIdx.x; at < SLICE * BLOCK_ROWS; at += THREADS) {
    const u32 chunk = at / BLOCK_ROWS, tile = min((begin + chunk) * 4 + at / 16 % 4, across - 1);
    const u32 rows64 = min(row0 / 64 + at / 64 % (BLOCK_ROWS / 64), last);
    copy16(target + at * 16, matrix.metadata + (u64(rows64) * across + tile) * 256 + at % 16 * 16, true);
  }
}

__device__ inline uint4 shared16(u32 at) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
  return x;
}
__device__ inline u32 shared4(u32 at) {
  u32 x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(at));
  return x;
}

// A band's part of a staged chunk: `row` is the band's first in the block.
__device__ inline void read_part(Part& part, u32 stage, u32 row, u32 chunk) {
  const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const u32 values = stage + chunk * VALUE_BYTES + (row + g) * ROW_BYTES + 16 * t;
#pragma unroll
  for (u32 pair = 0; pair < 2; ++pair) {
    part.upper[pair] = shared16(values + 64 * pair);
    part.lower[pair] = shared16(values + 8 * ROW_BYTES + 64 * pair);
  }
  const u32 band = stage + SLICE * VALUE_BYTES + chunk * METADATA_BYTES + row / 64 * 1024 + row % 64 / 16 * 64;
#pragma unroll
  for (u32 k = 0; k < 2; ++k) part.words[k] = shared4(band + (2 * (t % 2) + k) * 256 + g * 8 + t / 2 * 4);
}
#endif

#if KIND == 2
// The copy engine brings tiles of 128 bytes a row, in the swizzled order that warpgroups read, and tells a barrier how many
// bytes have come. Of a stage: values of each of SLICE chunks, X of each (its two halves of 64 columns), metadata of each.
// Past the matrix's sides it writes zeros; so whatever metadata lie there choose among zeros.
constexpr u32 VALUE_BYTES = BLOCK_ROWS * 128, HALF_BYTES = TOKENS * 128, METADATA_BYTES = BLOCK_ROWS * 16;  // of a chunk
constexpr u32 X_AT = SLICE * VALUE_BYTES, METADATA_AT = X_AT + SLICE * 2 * HALF_BYTES;
constexpr u32 STAGE_BYTES = METADATA_AT + SLICE * METADATA_BYTES;

__device__ inline void make_barrier(u32 barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
__device__ inline void expect_bytes(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void wait_for(u32 barrier, u32 parity) {
  asm volatile(
      "{ .reg .pred there;\n"
      "again: mbarrier.try_wait.parity.shared::cta.b64 there, [%0], %1;\n"
      "@!there bra again; }" ::"r"(barrier), "r"(parity) : "memory");
}
__device__ inline void copy_tile(u32 to, const TensorMap& map, u32 column, u32 row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
               "l"(&map), "r"(column), "r"(row), "r"(barrier)
               : "memory");
}
__device__ inline void copy_bytes(u32 to, const u8* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from),
               "r"(bytes), "r"(barrier)
               : "memory");
}

// One thread starts to copy a stage's chunks `begin` to `end`, and says how many bytes the barrier is to await, X's too.
__device__ inline void copy_weights(u32 stage, const TensorMap& map, const Matrix& matrix, u32 row0, u32 begin, u32 end, u32 barrier) {
  const u32 across = u32(matrix.columns + 31) / 32, groups = min(BLOCK_ROWS / 64u, u32(matrix.rows + 63) / 64 - row0 / 64);
  u32 bytes = 0;
  for (u32 chunk = begin; chunk < end; ++chunk)
    bytes += VALUE_BYTES + 2 * HALF_BYTES + groups * min(4u, across - chunk * 4) * 256;
  expect_bytes(barrier, bytes);
  for (u32 chunk = begin; chunk < end; ++chunk) {
    copy_tile(stage + (chunk - begin) * VALUE_BYTES, map, chunk * 64, row0, barrier);
    const u32 to = stage + METADATA_AT + (chunk - begin) * METADATA_BYTES, tiles = min(4u, across - chunk * 4);
    for (u32 k = 0; k < groups; ++k)
      copy_bytes(to + k * 1024, matrix.metadata + (u64(row0 / 64 + k) * across + chunk * 4) * 256, tiles * 256, barrier);
  }
}

__device__ inline void copy_columns(u32 stage, const TensorMap& map, u32 begin, u32 end, u32 barrier) {
  for (u32 half = 2 * begin; half < 2 * end; ++half)
    copy_tile(stage + X_AT + (half - 2 * begin) * HALF_BYTES, map, half * 64, 0, barrier);
}

// The metadata of a band's products with tiles `tile` and the next, which lanes 4g + 0, 1 and 4g + 2, 3 hold. A lane's words
// have the groups 0 4 1 5 and 2 6 3 7 of rows g (low nibbles) and g + 8 (high); it gives four groups of each, one row in 16 bits.
__device__ inline u32 metadata_of_tiles(u32 band, u32 tile) {
  const u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  u32 words[2];
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
               : "=r"(words[0]), "=r"(words[1])
               : "r"(band + (tile + t / 2) * 256 + g * 8));
  const u32 bytes = __byte_perm(words[0], words[1], t % 2 ? 0x7531 : 0x6420);
  const auto close_up = [](u32 x) {
    x &= 0x0f0f0f0f;
    x = (x | x >> 4) & 0x00ff00ff;
    return (x | x >> 8) & 0xffff;
  };
  return close_up(bytes) | close_up(bytes >> 4) << 16;
}

// Where an operand's rows or tokens begin, 128 bytes each in the copy engine's 128-byte swizzle; 8 of them are 1,024 bytes.
__device__ inline u64 descriptor(u32 address) { return u64(address >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62; }

#define SUMS4(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#if HALF
#define TYPES "k32.f32.f16.f16 "
#else
#define TYPES "k32.f32.bf16.bf16 "
#endif
#define WARPGROUP_MMA(N, SUMS, AT, SELECTOR, ...)                                                                           \
  asm volatile("wgmma.mma_async.sp.sync.aligned.m64n" #N TYPES "{" SUMS "}, " AT ", " SELECTOR ", 1, 1, 1, 0, 0;"            \
               : __VA_ARGS__                                                                                                \
               : "l"(a), "l"(b), "r"(metadata))
#if NT == 2
#define MULTIPLY(SELECTOR)                                                                                                  \
  WARPGROUP_MMA(16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8, %9, %10", SELECTOR, SUMS4(0), SUMS4(1))
#elif NT == 4
#define MULTIPLY(SELECTOR)                                                                                                  \
  WARPGROUP_MMA(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16, %17, %18", SELECTOR, SUMS4(0), SUMS4(1), \
                SUMS4(2), SUMS4(3))
#elif NT == 8
#define MULTIPLY(SELECTOR)                                                                                                  \
  WARPGROUP_MMA(64,                                                                                                         \
                "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,"        \
                "%27,%28,%29,%30,%31",                                                                                      \
                "%32, %33, %34", SELECTOR, SUMS4(0), SUMS4(1), SUMS4(2), SUMS4(3), SUMS4(4), SUMS4(5), SUMS4(6), SUMS4(7))
#endif
__device__ inline void multiply_tile(float (*c)[4], u64 a, u64 b, u32 metadata, u32 odd) {
  if (odd == 0)
    MULTIPLY("0x0");
  else
    MULTIPLY("0x1");
}
#endif

// Adapters' operands go through shared memory, LORA_RANKS of them at a time: the block's rows of B, then of each segment that
// these rows are of all tokens of Z. A row takes 16 bytes more, so that 8 rows lie in different banks.
constexpr u32 LORA_RANKS = 64, LORA_STRIDE = LORA_RANKS * 2 + 16;

struct Adapters {
  const u16* Z;
  const u16* B;
  i64 rank, segments, ends[2];

  __device__ u32 segment_of(i64 row) const { return (row >= ends[0]) + (row >= ends[1]); }
};

__device__ inline void prefetch_B(const Adapters& lora, i64 row0, i64 rows) {
  const u8* from = reinterpret_cast<const u8*>(lora.B + row0 * lora.rank);
  const u32 bytes = u32(min(i64(BLOCK_ROWS), rows - row0) * lora.rank) * 2;
  for (u32 at = threadIdx.x * 128; at < bytes; at += THREADS * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at));
}

__device__ inline void copy_B(u32 target, const Adapters& lora, u32 first, i64 row0, i64 rows) {
  for (u32 at = threadIdx.x; at < BLOCK_ROWS * LORA_RANKS / 8; at += THREADS) {
    const u32 row = at / (LORA_RANKS / 8), piece = at % (LORA_RANKS / 8), k = first + 8 * piece;
    const bool there = k < lora.rank;
    const u16* from = lora.B + min(row0 + row, rows - 1) * lora.rank + (there ? k : 0);
    copy16(target + row * LORA_STRIDE + piece * 16, reinterpret_cast<const u8*>(from), there);
  }
}

__device__ inline void copy_Z(u32 target, const Adapters& lora, u32 first, i64 row0, i64 rows, u32 tokens) {
  const u32 from_segment = lora.segment_of(row0), segments = lora.segment_of(min(row0 + BLOCK_ROWS, rows) - 1) - from_segment + 1;
  const u32 width = u32(lora.segments * lora.rank);
  for (u32 at = threadIdx.x; at < segments * TOKENS * LORA_RANKS / 8; at += THREADS) {
    const u32 row = at / (LORA_RANKS / 8), piece = at % (LORA_RANKS / 8), k = first + 8 * piece;
    const bool there = k < lora.rank;
    const u16* from = lora.Z + min(row % TOKENS, tokens - 1) * width + (from_segment + row / TOKENS) * lora.rank + (there ? k : 0);
    copy16(target + (BLOCK_ROWS + row) * LORA_STRIDE + piece * 16, reinterpret_cast<const u8*>(from), there);
  }
}

// Add Z · B^T of the staged ranks to the sums of a band whose first row in the block is `row` and which is of the block's
// segment `segment`. The warps along K share the ranks.
__device__ inline void add_adapters(float (*sum)[4], u32 staged, u32 row, u32 segment, u32 ranks, u32 wk) {
  const u32 lane = threadIdx.x % 32;
  const u32 B = staged + (row + lane % 16) * LORA_STRIDE + lane / 16 * 16;
  const u32 Z = staged + (BLOCK_ROWS + segment * TOKENS + lane % 8) * LORA_STRIDE + lane / 8 % 2 * 16;
  for (u32 k = 16 * wk; k < ranks; k += 16 * WK) {
    u32 b[4], z[NT][2];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(B + 2 * k));
#pragma unroll
    for (int n = 0; n < NT; ++n)
      asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                   : "=r"(z[n][0]), "=r"(z[n][1])
                   : "r"(Z + n * 8 * LORA_STRIDE + 2 * k));
#pragma unroll
    for (int n = 0; n < NT; ++n) multiply_dense(sum[n], b, z[n]);
  }
}

#if __CUDA_ARCH__ >= 900
__device__ inline void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// What stands at an address of shared memory in another block of the cluster.
__device__ inline float of_block(u32 address, u32 block) {
  float x;
  asm volatile("{ .reg .u32 remote; mapa.shared::cluster.u32 remote, %1, %2; ld.shared::cluster.f32 %0, [remote]; }"
               : "=f"(x)
               : "r"(address), "r"(block));
  return x;
}
#else  // no block has others in its cluster
__device__ inline void cluster_barrier() {}
__device__ inline float of_block(u32, u32) { return 0; }
#endif
// The sum of what stands there in the blocks of the cluster, at most 8, in their order; all loads are on their way at once.
__device__ inline float of_cluster(u32 address, u32 blocks) {
  float part[8], total = 0;
#pragma unroll
  for (u32 k = 0; k < 8; ++k) part[k] = k < blocks ? of_block(address, k) : 0;
#pragma unroll
  for (u32 k = 0; k < 8; ++k) total += part[k];
  return total;
}

// Z = X · A^T with a dense A (L, C), (B, L); L a multiple of 16. A block: Z_COLUMNS of its columns of Z_TOKENS, and of X's
// columns what the blocks along y, a cluster, share. Lane 4g + t has 8 columns of rows g (and g + 8) of A and of token g (and
// g + 8) at once. sums: shared memory, [warp][token][row].
constexpr u32 Z_EIGHTS = NT == 1 ? 1 : 2, UNROLL = 4, Z_COLUMNS = 8 * Z_EIGHTS, Z_TOKENS = 8 * Z_EIGHTS;

__device__ inline void first_product(float* sums, const u8* A, const u8* X, u16* Z, u32 width, i64 columns, i64 tokens, u32 block) {
  constexpr u32 WARPS = THREADS / 32, ROWS = Z_EIGHTS, SPAN = UNROLL * THREADS;
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const u32 splits = gridDim.y, share = u32(columns / 16 + splits - 1) / splits * 16;
  const u32 begin = min(blockIdx.y * share, u32(columns)), end = min(begin + share, u32(columns));
  const u32 across = width / Z_COLUMNS, row0 = block % across * Z_COLUMNS, token0 = block / across * Z_TOKENS;
  const u32 own = min(Z_TOKENS, u32(tokens) - token0) * Z_COLUMNS;
  const u8* row = A + (u64(row0) + g) * columns * 2;
  const auto column = [&](u32 first, u32 u) { return first + (u * WARPS + warp) * 32 + 8 * t; };
  const auto part = [&](const u8* from, u32 at) {
    uint4 x = make_uint4(0, 0, 0, 0);
    if (at < end)  // volatile, so that all are on their way before the first product
      asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from + at * 2));
    return x;
  };
  uint4 a[UNROLL][ROWS];
  const auto load = [&](u32 first) {
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u)
#pragma unroll
      for (u32 r = 0; r < ROWS; ++r) {
        const u32 at = column(first, u);
        a[u][r] = at < end ? stream16(row + (u64(r) * 8 * columns + at) * 2) : make_uint4(0, 0, 0, 0);
      }
  };
  load(begin);
  await_others();
  float sum[Z_EIGHTS][4] = {};
  for (u32 first = begin; first < end; first += SPAN) {
    uint4 x[UNROLL][Z_EIGHTS];
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u)
#pragma unroll
      for (u32 n = 0; n < Z_EIGHTS; ++n)
        x[u][n] = part(X + u64(min(token0 + n * 8 + g, u32(tokens) - 1)) * columns * 2, column(first, u));
#pragma unroll
    for (u32 u = 0; u < UNROLL; ++u) {
      const uint4 upper = a[u][0], lower = ROWS == 2 ? a[u][ROWS - 1] : make_uint4(0, 0, 0, 0);
      const u32 low[4] = {upper.x, lower.x, upper.y, lower.y}, high[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
      for (u32 n = 0; n < Z_EIGHTS; ++n) {
        const u32 x_low[2] = {x[u][n].x, x[u][n].y}, x_high[2] = {x[u][n].z, x[u][n].w};
        multiply_dense(sum[n], low, x_low);
        multiply_dense(sum[n], high, x_high);
      }
    }
    if (first + SPAN < end) load(first + SPAN);
  }
#pragma unroll
  for (u32 n = 0; n < Z_EIGHTS; ++n)
#pragma unroll
    for (u32 k = 0; k < 2 * ROWS; ++k) sums[(warp * Z_TOKENS + n * 8 + 2 * t + k % 2) * Z_COLUMNS + g + k / 2 * 8] = sum[n][k];
  __syncthreads();
  for (u32 at = threadIdx.x; at < own; at += THREADS) {
    float total = 0;
#pragma unroll
    for (u32 k = 0; k < WARPS; ++k) total += sums[k * Z_TOKENS * Z_COLUMNS + at];
    sums[at] = total;
  }
  __syncthreads();
  cluster_barrier();
  const u32 base = u32(__cvta_generic_to_shared(sums)), share_of_sums = (own + splits - 1) / splits;
  for (u32 k = threadIdx.x; k < share_of_sums; k += THREADS) {
    const u32 at = blockIdx.y * share_of_sums + k;
    if (at >= own) break;
    const float total = splits == 1 ? sums[at] : of_cluster(base + at * 4, splits);
    Z[(token0 + at / Z_COLUMNS) * width + row0 + at % Z_COLUMNS] = from_float(total);
  }
  cluster_barrier();  // no block ends while another reads its sums
}

// Of the blocks that write Z: all of this one's threads have written.
__device__ inline void tell_written(u32* ready) {
  __syncthreads();
  if (threadIdx.x) return;
  __threadfence();
  atomicAdd(ready, 1u);
}
// Of the `readers` blocks that read it: they are resident only after the `writers`, which do not wait for them.
__device__ inline void await_written(u32* ready, u32 writers, u32 readers) {
  if (threadIdx.x == 0) {
    u32 written;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(written) : "l"(ready) : "memory");
    while (written < writers);
    if (atomicAdd(ready + 1, 1u) == readers - 1) ready[0] = ready[1] = 0;
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    few_tokens(const u8* values, const u8* metadata, const u8* X, const u16* bias, const u16* residual, u16* Y, i64 rows,
               i64 columns, i64 tokens, i64 stages, const u8* lora_A, const u16* lora_B, u16* Z, i64 rank, i64 segments, i64 end0,
               i64 end1, i64 first_blocks, u32* ready
#if KIND == 2
               , const __grid_constant__ TensorMap values_map, const __grid_constant__ TensorMap X_map
#endif
               ) {
  extern __shared__ __align__(16) u8 shared[];
  const u32 base = u32(__cvta_generic_to_shared(shared));
  const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp % WM, wk = warp / WM;
  const Matrix matrix{values, metadata, rows, columns};
  const Adapters lora{Z, lora_B, rank, segments, {end0, end1}};
  let_next_come();
#if ADAPTERS
  if (blockIdx.x < first_blocks) {
    first_product(reinterpret_cast<float*>(shared), lora_A, X, Z, u32(segments * rank), columns, tokens, blockIdx.x);
    tell_written(ready);
    return;
  }
#endif
  const i64 row0 = (i64(blockIdx.x) - first_blocks) * BLOCK_ROWS;
  const u32 splits = gridDim.y;
  const u32 chunks = u32(columns + 127) / 128, share = (chunks + splits - 1) / splits;
  const u32 begin = min(blockIdx.y * share, chunks), end = min(begin + share, chunks);
  float sum[MT][NT][4] = {};
#if KIND == 2
  const auto band_row = [&](int m) { return row0 + (wm / 4 * MT + m) * 64 + wm % 4 * 16; };
#else
  const auto band_row = [&](int m) { return row0 + (wm * MT + m) * 16; };
#endif
  // Adapters come last. Where shared memory has room beside X (KIND 0) their operands come with it, else from L2 in the end.
  const bool adapted = ADAPTERS && blockIdx.y == 0;
  const u32 lora_at = base + (KIND == 0 ? u32(stages) * TOKENS * STRIDE : 0);

#if KIND == 1
  const u32 turns = (end - begin + WK - 1) / WK, stage_bytes = WEIGHT_BYTES + TOKENS * STRIDE;
  const auto weights_of = [&](u32 turn) {
    if (turn < turns) copy_weights(base + turn % DEPTH * stage_bytes, matrix, row0, begin + turn * WK);
  };
  const auto x_of = [&](u32 turn) {
    if (turn < turns) copy_x(base + turn % DEPTH * stage_bytes + WEIGHT_BYTES, X, begin + turn * WK, columns, tokens);
    asm volatile("cp.async.commit_group;");
  };
#pragma unroll
  for (u32 turn = 0; turn < DEPTH - 1; ++turn) weights_of(turn);
  if (adapted) prefetch_B(lora, row0, rows);
  await_others();
#pragma unroll
  for (u32 turn = 0; turn < DEPTH - 1; ++turn) x_of(turn);
  for (u32 turn = 0; turn < turns; ++turn) {
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2));
    __syncthreads();  // this stage is there for all, and all are through with the one before
    weights_of(turn + DEPTH - 1);
    x_of(turn + DEPTH - 1);
    if (begin + turn * WK + wk < end) {
      const u32 stage = base + turn % DEPTH * stage_bytes;
      Part parts[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) read_part(parts[m], stage, (wm * MT + m) * 16, wk);
      multiply_chunk(sum, parts, stage + WEIGHT_BYTES + wk * 256);
    }
  }
  asm volatile("cp.async.wait_all;");
#elif KIND == 2
  const u32 turns = (end - begin + SLICE - 1) / SLICE, first_stage = (base + 1023) / 1024 * 1024;
  const auto stage_at = [&](u32 turn) { return first_stage + turn % DEPTH * STAGE_BYTES; };
  const auto barrier_of = [&](u32 turn) { return first_stage + DEPTH * STAGE_BYTES + turn % DEPTH * 8; };
  const auto chunk_of = [&](u32 turn) { return min(begin + turn * SLICE, end); };
  const auto weights_of = [&](u32 turn) {
    if (turn < turns)
      copy_weights(stage_at(turn), values_map, matrix, row0, chunk_of(turn), chunk_of(turn + 1), barrier_of(turn));
  };
  const auto x_of = [&](u32 turn) {
    if (turn < turns) copy_columns(stage_at(turn), X_map, chunk_of(turn), chunk_of(turn + 1), barrier_of(turn));
  };
  if (threadIdx.x == 0) {
    for (u32 turn = 0; turn < DEPTH; ++turn) make_barrier(barrier_of(turn));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (u32 turn = 0; turn < DEPTH; ++turn) weights_of(turn);
  }
  if (adapted) prefetch_B(lora, row0, rows);
  await_others();
  if (threadIdx.x == 0)
    for (u32 turn = 0; turn < DEPTH; ++turn) x_of(turn);
  __syncthreads();  // the barriers are there for all
  for (u32 turn = 0; turn < turns; ++turn) {
    const u32 stage = stage_at(turn);
    wait_for(barrier_of(turn), turn / DEPTH % 2);
#pragma unroll
    for (u32 chunk = wk; chunk < SLICE; chunk += WK) {
      if (chunk_of(turn) + chunk >= end) break;
      const u32 values_at = stage + chunk * VALUE_BYTES, x_at = stage + X_AT + chunk * 2 * HALF_BYTES;
      u32 meta[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (u32 k = 0; k < 2; ++k)
          meta[m][k] = metadata_of_tiles(stage + METADATA_AT + chunk * METADATA_BYTES + (wm / 4 * MT + m) * 1024 + wm % 4 * 64, 2 * k);
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
      for (u32 tile = 0; tile < 4; ++tile)
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const u64 a = descriptor(values_at + (wm / 4 * MT + m) * 8192 + tile * 32);
          multiply_tile(sum[m], a, descriptor(x_at + tile / 2 * HALF_BYTES + tile % 2 * 64), meta[m][tile / 2], tile % 2);
        }
      asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
    __syncthreads();  // all are through with this stage
    if (threadIdx.x == 0) weights_of(turn + DEPTH), x_of(turn + DEPTH);
  }
#else
  const u32 turns = (end - begin + WK - 1) / WK, slice_bytes = TOKENS * STRIDE;
  constexpr u32 TURNS = SLICE / WK;  // of a slice
  Part ring[DEPTH][MT];
  Band bands[MT];
#pragma unroll
  for (int m = 0; m < MT; ++m) bands[m] = band_at(matrix, band_row(m));
  const auto load = [&](Part* parts, u32 turn) {
    const u32 chunk = begin + turn * WK + wk;
#pragma unroll
    for (int m = 0; m < MT; ++m)
      if (chunk < end) load_part(parts[m], bands[m], chunk, columns);
  };
#pragma unroll
  for (u32 d = 0; d < DEPTH; ++d)
    if (d < turns) load(ring[d], d);
  if (adapted) copy_B(lora_at, lora, 0, row0, rows);
  await_others();
  if (adapted && !first_blocks) copy_Z(lora_at, lora, 0, row0, rows, u32(tokens));
  if (turns) copy_x(base, X, begin, columns, tokens);
  for (u32 first = 0; first < turns; first += DEPTH) {
#pragma unroll
    for (u32 d = 0; d < DEPTH; ++d) {
      const u32 turn = first + d, slice = turn / TURNS;
      if (turn >= turns) break;
      if (turn % TURNS == 0) {  // X of this slice is there for all, and all are through with the one before
        asm volatile("cp.async.wait_all;");
        __syncthreads();
        if ((slice + 1) * TURNS < turns)
          copy_x(base + (slice + 1) % stages * slice_bytes, X, begin + (slice + 1) * SLICE, columns, tokens);
      }
      if (begin + turn * WK + wk < end)
        multiply_chunk(sum, ring[d], base + slice % stages * slice_bytes + (turn % TURNS * WK + wk) * 256);
      if (turn + DEPTH < turns) load(ring[d], turn + DEPTH);
    }
  }
#endif

  if (adapted && first_blocks) await_written(ready, u32(first_blocks) * splits, gridDim.x - u32(first_blocks));
  for (u32 first = 0; adapted && first < rank; first += LORA_RANKS) {
    const bool there = KIND == 0 && !first;
    if (!there) {
      __syncthreads();  // all are through with what lies there
      copy_B(lora_at, lora, first, row0, rows);
    }
    if (!there || first_blocks) copy_Z(lora_at, lora, first, row0, rows, u32(tokens));
    asm volatile("cp.async.wait_all;");
    __syncthreads();
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const i64 row = band_row(m);
      const u32 segment = lora.segment_of(min(row, rows - 1)) - lora.segment_of(row0);
      add_adapters(sum[m], lora_at, u32(row - row0), segment, min(LORA_RANKS, u32(rank) - first), wk);
    }
  }

  const auto write = [&](u32 token, i64 row, float y) {
    const i64 at = token * rows + row;
    Y[at] = from_float(y + (bias ? to_float(bias[row]) : 0.0f) + (residual ? to_float(residual[at]) : 0.0f));
  };

  // The warps along K add up in shared memory, [WK][tokens][rows of the block].
  __syncthreads();
  float* sums = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int n = 0; n < NT; ++n)
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const u32 row = u32(band_row(m) - row0) + lane / 4 + k / 2 * 8, token = n * 8 + lane % 4 * 2 + k % 2;
        sums[(wk * TOKENS + token) * BLOCK_ROWS + row] = sum[m][n][k];
      }
  __syncthreads();
  for (u32 at = threadIdx.x; at < tokens * BLOCK_ROWS; at += THREADS) {
    const u32 token = at / BLOCK_ROWS, row = at % BLOCK_ROWS;
    float total = 0;
#pragma unroll
    for (int k = 0; k < WK; ++k) total += sums[(k * TOKENS + token) * BLOCK_ROWS + row];
    if (splits > 1)
      sums[at] = total;
    else if (row0 + row < rows)
      write(token, row0 + row, total);
  }
  if (splits == 1) return;
  // Then the blocks of the cluster, each for its share of the rows, in the blocks' order.
  cluster_barrier();
  const u32 own = (BLOCK_ROWS + splits - 1) / splits;
  for (u32 at = threadIdx.x; at < tokens * own; at += THREADS) {
    const u32 token = at / own, row = blockIdx.y * own + at % own;
    if (row >= BLOCK_ROWS) continue;
    if (row0 + row < rows) write(token, row0 + row, of_cluster(base + (token * BLOCK_ROWS + row) * 4, splits));
  }
  cluster_barrier();  // no block ends while another reads its sums
}
